//go:build unix && !linux

package relaytest

import (
	"net"
	"testing"
	"time"
)

func waitAcked(net.Conn) error { time.Sleep(50 * time.Millisecond); return nil }

func cork(net.Conn) error { return nil }

func watchHeld(testing.TB, net.Conn, net.Conn) (held func() int64, closeAll func()) {
	return func() int64 { return 0 }, func() {}
}
