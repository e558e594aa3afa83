//go:build !linux

package transparent

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
)

var errLinux = errors.New("only Linux can do this")

// ReturnPath is for Linux. What is here says so, or does nothing.
type ReturnPath struct{}

func Open(*slog.Logger) (*ReturnPath, error)   { return nil, errLinux }
func Probe() error                             { return errLinux }
func (*ReturnPath) Close() error               { return nil }
func (*ReturnPath) Fits(_, _ netip.Addr) error { return no(Unavailable, "%v", errLinux) }
func From(*net.Dialer, netip.Addr)             {}
