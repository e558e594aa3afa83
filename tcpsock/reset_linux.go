package tcpsock

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Reset closes fd with a reset; what was not sent is lost.
func Reset(fd int) error { return errors.Join(ResetFDOnClose(fd), unix.Close(fd)) }

// ResetFDOnClose makes a socket send a reset when its last descriptor is closed.
func ResetFDOnClose(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
