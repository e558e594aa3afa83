package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// TestRefusedTakesNoGoroutine: a connection that is denied, or over a limit, is reset on the loop that accepted
// it. ARCHITECTURE.md says so.
func TestRefusedTakesNoGoroutine(t *testing.T) {
	for reason, config := range map[string]string{
		"denied":     "  deny: [127.0.0.0/8]\n",
		"over_limit": "",
	} {
		t.Run(reason, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf("limits: { connections_per_source: 1 }\nlisteners:\n- listen: [%q]\n  mode: tcp\n%s"+
				"  default: { forward: %q }\n", addr, config, backend(t, echo)))
			if reason == "over_limit" {
				c := dialTCP(t, addr)
				c.Write([]byte("x"))
				if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			refuse := func() { // without a goroutine of its own
				fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer syscall.Close(fd)
				to := tcpsock.AddrPortOf(resolved(t, addr))
				if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
					if errors.Is(err, syscall.ECONNRESET) {
						return
					}
					t.Fatal(err)
				}
				if n, err := syscall.Read(fd, make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("a refused connection: %d bytes, %v", n, err)
				}
			}
			refuse()
			const times = 200
			before := goroutines()
			for range times {
				refuse()
			}
			took := goroutines() - before
			eventually(t, "all are counted", func() bool { return d.refused(reason) == times+1 })
			if took > times/10 { // what else is going on in this process
				t.Errorf("%d refused connections took %d goroutines", times, took)
			}
		})
	}
}

func resolved(t *testing.T, addr string) net.Addr {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
