// Package preface says how a connection failed before its beginning, a TLS hello or a PROXY header, had come.
package preface

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Error is what it means that reading on failed with err after n bytes of what, such as "TLS hello". It is
// timeout where the deadline has passed, and eof where the connection ended or was reset before its first
// byte; one that wraps [io.ErrUnexpectedEOF] where it ended later; else one that wraps err.
func Error(what string, n int, err, timeout, eof error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return timeout
	case n == 0 && (err == io.EOF || errors.Is(err, syscall.ECONNRESET)):
		return eof
	case err == io.EOF:
		return fmt.Errorf("the connection ended after %d bytes of a %s: %w", n, what, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read the %s: %w", what, err)
}
