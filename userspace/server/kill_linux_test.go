package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKillWhileConnecting: of a request whose connection is killed while its upstream connects, nothing is
// sent, though all of it has come.
func TestKillWhileConnecting(t *testing.T) {
	target, fd := deafTarget(t)
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "target")
	defer file.Close()
	ln, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accept := func() net.Conn {
		t.Helper()
		ln.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		return c
	}
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: http, default: { forward: %q } } ]", addr, target))
	client := dialTCP(t, addr)
	if _, err := io.WriteString(client, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\npay"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its upstream connects", func() bool { return dialling(t, target) == 1 })
	if k, err := d.KillFlows(url.Values{"client": {"127.0.0.1"}}, "a test"); k.Killed != 1 || err != nil {
		t.Fatalf("%d killed, %v", k.Killed, err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client reads %v", err)
	}
	accept() // the connection that has filled the queue
	if n, err := accept().Read(make([]byte, 1)); n > 0 || err != io.EOF {
		t.Errorf("the upstream gets %d bytes, %v", n, err)
	}
}
