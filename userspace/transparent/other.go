//go:build !linux

package transparent

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
)

var errLinux = errors.New("only Linux can do this")

// Way is of Linux only.
type Way struct{}

// Open says that it can't.
func Open(*slog.Logger) (*Way, error) { return nil, errLinux }

// Probe says that it can't.
func Probe() error { return errLinux }

// Close does nothing.
func (*Way) Close() error { return nil }

// Fits says that nothing does.
func (*Way) Fits(_, _ netip.Addr) error { return no(Unavailable, "%v", errLinux) }

// From does nothing.
func From(*net.Dialer, netip.Addr) {}
