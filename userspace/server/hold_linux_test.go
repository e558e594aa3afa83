package server

import (
	"net"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/plan"
)

// TestHasLeft: who has ended its stream has left, but on a tcp listener; who has reset its connection has in any case.
func TestHasLeft(t *testing.T) {
	for _, mode := range []string{"sni", "tcp"} {
		accepted := make(chan net.Conn, 1)
		client := dialTCP(t, backend(t, func(c net.Conn) { accepted <- c }))
		in := &stream{TCPConn: (<-accepted).(*net.TCPConn), conn: &conn{service: &service{Service: &plan.Service{Mode: mode}}}}
		defer in.TCPConn.Close()
		if in.hasLeft() {
			t.Errorf("%s: it is there", mode)
		}
		client.CloseWrite()
		eventually(t, mode+": the end is here", in.Gone)
		if left := in.hasLeft(); left != (mode != "tcp") {
			t.Errorf("%s: after the end of its stream it has left is %v", mode, left)
		}
		client.SetLinger(0)
		client.Close()
		eventually(t, mode+": it has left", in.hasLeft)
	}
}
