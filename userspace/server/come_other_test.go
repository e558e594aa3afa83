//go:build !linux

package server

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// come connects to a listener of d as somebody from peer would, and returns the peer's end.
func (d *daemon) come(t *testing.T, listener, peer string) *net.TCPConn {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := dialTCP(t, ln.Addr().String())
	c.SetDeadline(time.Now().Add(time.Minute))
	there, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	l := d.listeners[listener]
	d.mu.Unlock()
	d.admit(l, accepted{there.(*net.TCPConn)}, netip.MustParseAddrPort(peer))
	return c
}
