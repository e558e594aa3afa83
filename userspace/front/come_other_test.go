//go:build !linux

package front

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// arrived is an accepted connection from an address of our choice.
type arrived struct{ *net.TCPConn }

func (a arrived) Conn() (*net.TCPConn, error) { return a.TCPConn, nil }
func (a arrived) Reset()                      { tcpsock.ResetConn(a.TCPConn) }

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
	d.admit(l, arrived{there.(*net.TCPConn)}, netip.MustParseAddrPort(peer))
	return c
}
