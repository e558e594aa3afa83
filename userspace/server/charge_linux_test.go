package server

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// deafTarget is an address where the kernel answers no SYN any more, until somebody accepts from its socket.
func deafTarget(t *testing.T) (addr *net.TCPAddr, fd int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	addr = net.TCPAddrFromAddrPort(tcpsock.Local(fd))
	c, err := net.DialTCP("tcp", nil, addr) // which nobody accepts: the queue is full
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return addr, fd
}

// dialling counts connections to addr that are being made.
func dialling(t *testing.T, addr *net.TCPAddr) (n int) {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", addr.Port)) && f[3] == "02" {
			n++
		}
	}
	return n
}

// TestResetStreamsDial: a client opens streams to a target that takes its time to
// connect, resets them and opens more. What is dialled for a request that is gone
// is still charged: there are never more connections being made than a source may
// have requests under way.
func TestResetStreamsDial(t *testing.T) {
	const perSource = 20
	for _, v := range []struct {
		name   string
		secure bool
		family int
	}{
		{"HTTP/2 without TLS", false, 0}, {"HTTP/2 without TLS over IPv6", false, 1},
		{"HTTP/2 with TLS", true, 0}, {"HTTP/2 with TLS over IPv6", true, 1},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel() // it waits as long as a request may for its turn
			target, _ := deafTarget(t)
			d, plain, secure, pool := floodDaemon(t, target.String(), fmt.Sprintf("limits: { requests_per_source: %d }", perSource))
			at, tlsConfig := plain, (*tls.Config)(nil)
			if v.secure {
				at, tlsConfig = secure, &tls.Config{RootCAs: pool, ServerName: "a.test"}
			}
			f := flood(t, at[v.family], tlsConfig, nil, perSource)
			eventually(t, "all are dialled for", func() bool { return dialling(t, target) == perSource })
			f.reset()
			eventually(t, "the requests have ended", func() bool { return d.log.Count("status=499") == perSource })
			f.open(perSource)
			eventually(t, "those after them are refused, or dialled for", func() bool {
				return refused(f) == perSource || dialling(t, target) > perSource
			})
			if n := dialling(t, target); n > perSource {
				t.Errorf("%d connections are being made, a source may have %d requests under way", n, perSource)
			}
		})
	}
}

// TestStoppedReaders: streams whose client reads nothing hold little of an
// answer, whatever the upstream speaks.
func TestStoppedReaders(t *testing.T) {
	const streams, most = 50, 1 << 20 // bytes of an answer that may be on the way
	for _, protocol := range []string{"protocol: http", "protocol: h2c", "protocol: https, insecure: true"} {
		t.Run(protocol, func(t *testing.T) {
			var sent, handlers atomic.Int64
			var protocols http.Protocols
			protocols.SetHTTP1(true)
			protocols.SetHTTP2(true)
			protocols.SetUnencryptedHTTP2(true)
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				handlers.Add(1)
				for piece := make([]byte, 16<<10); r.Context().Err() == nil; {
					n, err := w.Write(piece)
					sent.Add(int64(n))
					if err != nil {
						return
					}
				}
			}), ConnState: func(c net.Conn, s http.ConnState) {
				if tc, ok := c.(*net.TCPConn); ok && s == http.StateNew { // what the kernel holds is bounded elsewhere
					tc.SetWriteBuffer(64 << 10)
				}
			}}
			if strings.Contains(protocol, "https") {
				cert, _ := certificate(t, "a.test")
				srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
				go srv.ServeTLS(ln, "", "")
			} else {
				go srv.Serve(ln)
			}
			defer srv.Close()
			addr := freeAddr(t)
			start(t, fmt.Sprintf(`listeners: [{ listen: [%q], mode: http, default: { forward: %q, upstream: { %s } } }]`, addr, ln.Addr(), protocol))
			f := flood(t, addr, nil, nil, streams)
			eventually(t, "all answers have begun", func() bool { return handlers.Load() == streams && served(f) == streams })
			last := int64(-1)
			eventually(t, "nothing moves any more", func() bool {
				now := sent.Load()
				same := now == last
				last = now
				time.Sleep(300 * time.Millisecond)
				return same
			})
			if n := last / streams; n > most {
				t.Errorf("of each answer %d bytes were sent to a client that reads none, want %d at most", n, most)
			}
			if n := runtime.NumGoroutine(); n > streams*10+100 {
				t.Errorf("%d goroutines for %d requests", n, streams)
			}
		})
	}
}
