package server

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

func TestLimits(t *testing.T) {
	up := backend(t, echo)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]
limits: { connections_per_source: 3 }
`, addr, up))
	ping := func(c net.Conn) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	var held []net.Conn
	for range 3 {
		c := dialTCP(t, addr)
		if err := ping(c); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	try := func() error { // a refusal may come as early as the connect
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		return ping(c)
	}
	if try() == nil {
		t.Error("the fourth connection of a source was served")
	}
	eventually(t, "it is counted", func() bool { return d.refused("over_limit") == 1 })
	held[0].Close()
	eventually(t, "a place is free again", func() bool { return try() == nil })
}
