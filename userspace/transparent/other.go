//go:build !linux

package transparent

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
)

var errLinux = errors.New("only Linux can do this")

// Way is for Linux. What is here says so, or does nothing.
type Way struct{}

func Open(*slog.Logger) (*Way, error)   { return nil, errLinux }
func Probe() error                      { return errLinux }
func (*Way) Close() error               { return nil }
func (*Way) Fits(_, _ netip.Addr) error { return no(Unavailable, "%v", errLinux) }
func From(*net.Dialer, netip.Addr)      {}
