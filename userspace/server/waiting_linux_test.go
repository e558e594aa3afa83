package server

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// inRecords makes records of n bytes of a hello's one record.
func inRecords(hello []byte, n int) (out []byte) {
	for piece := range slices.Chunk(hello[5:], n) {
		out = binary.BigEndian.AppendUint16(append(out, hello[:3]...), uint16(len(piece)))
		out = append(out, piece...)
	}
	return out
}

// TestHelloInPieces: however a hello comes, it leads to the same place, and each byte arrives once.
func TestHelloInPieces(t *testing.T) {
	echoes := backend(t, echo)
	bare, trusting := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: bare, listen: [%q], mode: sni, routes: [ { sni: [a.test], forward: %q } ] }
  - { name: trusting, listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.1/32] }, routes: [ { sni: [a.test], forward: %q } ] }
limits: { hello_timeout: 5m }
`, bare, echoes, trusting, echoes))
	hello := helloFor(t, "a.test")
	header := []byte("PROXY TCP4 192.0.2.1 192.0.2.2 1234 443\r\n")
	for _, v := range []struct {
		name, addr string
		sent       []byte
		cut        int // bytes that are sent at a time
		echoed     []byte
	}{
		{"one record, byte by byte", bare, hello, 1, hello},
		{"one record, in halves", bare, hello, len(hello)/2 + 1, hello},
		{"records of a byte, byte by byte", bare, inRecords(hello, 1), 7, inRecords(hello, 1)},
		{"records of 100 bytes, one at a time", bare, inRecords(hello, 100), 105, inRecords(hello, 100)},
		{"records of 100 bytes, at once", bare, inRecords(hello, 100), 1 << 20, inRecords(hello, 100)},
		{"more than the buffer behind it", bare, append(slices.Clone(hello), make([]byte, 100_000)...), len(hello) - 1, append(slices.Clone(hello), make([]byte, 100_000)...)},
		{"behind a PROXY header, byte by byte", trusting, slices.Concat(header, hello), 1, hello},
		{"behind a PROXY header, at once", trusting, slices.Concat(header, inRecords(hello, 50)), 1 << 20, inRecords(hello, 50)},
	} {
		t.Run(v.name, func(t *testing.T) {
			c := dialTCP(t, v.addr)
			c.SetNoDelay(true)
			go func() {
				for i := 0; i < len(v.sent); i += v.cut {
					c.Write(v.sent[i:min(i+v.cut, len(v.sent))])
					if i < len(hello) {
						time.Sleep(100 * time.Microsecond)
					}
				}
				c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, v.echoed) {
				t.Errorf("%d bytes come back, want %d: %v", len(got), len(v.echoed), err)
			}
		})
	}
	eventually(t, "nothing is left", func() bool { return d.limiter.Total() == 0 })
	if n, y := d.partialBytes.Load(), d.limiter.Yielding(); n != 0 || y != 0 {
		t.Errorf("%d bytes of hellos and %d connections wait yet", n, y)
	}
}

// TestTLSHelloInPieces: where TLS ends here, hellos may come in pieces too.
func TestTLSHelloInPieces(t *testing.T) {
	up := httpBackend(t, nil)
	_, _, secure, pool := floodDaemon(t, up, "")
	for _, cut := range []int{1, 100} {
		c := tls.Client(pieces{dialTCP(t, secure[0]), cut}, &tls.Config{RootCAs: pool, ServerName: "a.test"})
		if err := c.Handshake(); err != nil {
			t.Errorf("%d bytes at a time: %v", cut, err)
		}
	}
}

// pieces writes a few bytes at a time.
type pieces struct {
	*net.TCPConn
	cut int
}

func (p pieces) Write(b []byte) (n int, err error) {
	for piece := range slices.Chunk(b, p.cut) {
		m, err := p.TCPConn.Write(piece)
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// half connects to addr, and sends a part of a hello.
func half(t *testing.T, addr string, hello []byte) *net.TCPConn {
	t.Helper()
	c := dialTCP(t, addr)
	if _, err := c.Write(hello[:len(hello)/2]); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestHalfHellosWait: connections whose hello does not come whole have no goroutine, and end in time.
func TestHalfHellosWait(t *testing.T) {
	const clients = 100
	hello := helloFor(t, "a.test")
	up := backend(t, echo)
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	for mode, more := range map[string]string{"sni": "", "sni, allow: [127.0.0.0/8]": "", "https": fmt.Sprintf(", certificates: [ { files: { cert: %q, key: %q } } ]", certFile, keyFile)} {
		t.Run(mode, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: %s%s, default: { forward: %q } } ]
limits: { hello_timeout: 5s }`, addr, mode, more, up))
			before := runtime.NumGoroutine()
			var conns []*net.TCPConn
			for range clients {
				conns = append(conns, half(t, addr, hello))
			}
			eventually(t, "all wait", func() bool {
				return d.limiter.Total() == clients && d.partialBytes.Load() == int64(clients*(len(hello)/2))
			})
			if n := runtime.NumGoroutine() - before; n > clients/5 {
				t.Errorf("%d goroutines for %d connections that wait", n, clients)
			}
			if mode == "sni" {
				eventually(t, "they have had their time", func() bool { return d.refused("hello_timeout") == clients })
			}
			for _, c := range conns {
				c.Close()
			}
			eventually(t, "they end", func() bool { return d.limiter.Total() == 0 })
			if n, y := d.partialBytes.Load(), d.limiter.Yielding(); n != 0 || y != 0 {
				t.Errorf("%d bytes of hellos and %d connections wait yet", n, y)
			}
		})
	}
}

// TestTrickledHello: bytes that keep coming buy no time.
func TestTrickledHello(t *testing.T) {
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: 100ms }`, addr))
	c := dialTCP(t, addr)
	c.Write([]byte{22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xf0})
	for sent := 0; d.refused("hello_timeout") == 0; sent++ {
		if sent == 10_000 {
			t.Fatal("still read")
		}
		c.Write([]byte{0})
		time.Sleep(5 * time.Millisecond)
	}
}

// TestOldestHelloGoes: where connections wait for hellos in all places that there are, one who comes gets
// that of the oldest.
func TestOldestHelloGoes(t *testing.T) {
	for _, v := range []struct{ name, limits string }{
		{"limit of all", "connections: 4"},
		{"limit of a source", "connections_per_source: 4"},
		{"memory", ""},
	} {
		t.Run(v.name, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, default: { forward: %q } } ]
limits: { hello_timeout: 5m, %s }`, addr, backend(t, echo), v.limits))
			if v.limits == "" {
				d.mostWaiting.Store(4)
			}
			hello := helloFor(t, "a.test")
			var waiting []*net.TCPConn
			for i := range 4 {
				waiting = append(waiting, half(t, addr, hello))
				eventually(t, "it waits", func() bool { return d.limiter.Yielding() == i+1 })
			}
			good := dialTCP(t, addr)
			good.Write(hello)
			if _, err := io.ReadFull(good, make([]byte, len(hello))); err != nil {
				t.Fatalf("a good client: %v", err)
			}
			if _, err := waiting[0].Read(make([]byte, 1)); err == nil || err == io.EOF {
				t.Errorf("the oldest has not been reset: %v", err)
			}
			for i, c := range waiting[1:] {
				c.Write(hello[len(hello)/2:])
				if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
					t.Errorf("number %d of those that waited: %v", i+2, err)
				}
			}
			if n := d.refused("hello_displaced"); n != 1 {
				t.Errorf("%d are counted, want 1", n)
			}
		})
	}
}

// TestLongHalfHellos: of what hellos hold before they are whole there is a limit for all together; the oldest
// go.
func TestLongHalfHellos(t *testing.T) {
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, default: { forward: %q } } ]
limits: { hello_timeout: 5m }`, addr, backend(t, echo)))
	// A hello of 64 KiB, which is what one may be, but for its last record.
	long := append([]byte{1, 0, 0xff, 0xfc}, make([]byte, 60_000)...)
	part := inRecords(append([]byte{22, 3, 1, 0, 0}, long...), 16<<10)
	for range 2 * partialBytes / len(part) / 3 {
		dialTCP(t, addr).Write(part)
	}
	eventually(t, "all wait", func() bool { return d.partialBytes.Load() > partialBytes*6/10 })
	if n := d.refused("hello_displaced"); n != 0 {
		t.Errorf("%d have gone though there was room", n)
	}
	for range partialBytes / len(part) * 2 / 3 {
		dialTCP(t, addr).Write(part)
	}
	eventually(t, "the oldest have gone", func() bool { return d.refused("hello_displaced") >= int64(partialBytes/len(part)/4) })
	if n := d.partialBytes.Load(); n > partialBytes+fastHello*int64(runtime.GOMAXPROCS(0)) {
		t.Errorf("%d bytes wait, the limit is %d", n, partialBytes)
	}
	good := dialTCP(t, addr)
	hello := helloFor(t, "a.test")
	good.Write(hello)
	if _, err := io.ReadFull(good, make([]byte, len(hello))); err != nil {
		t.Errorf("a good client: %v", err)
	}
}

// TestGivesWayAtOnce: a connection that is told to give way before anybody waits for its bytes does so.
func TestGivesWayAtOnce(t *testing.T) {
	d := start(t, fmt.Sprintf(`
listeners: [ { name: edge, listen: [%q], mode: sni, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: 5m }`, freeAddr(t)))
	d.mostWaiting.Store(0) // it is told so by itself
	c := d.come(t, "edge", "192.0.2.1:1")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it has not been reset: %v", err)
	}
	if n := d.refused("hello_displaced"); n != 1 {
		t.Errorf("%d are counted, want 1", n)
	}
}

// TestEndBeforeItWaits: a connection of which nobody waits for bytes yet when the daemon ends does not wait
// for them afterwards.
func TestEndBeforeItWaits(t *testing.T) {
	d := start(t, fmt.Sprintf(`
listeners: [ { name: edge, listen: [%q], mode: sni, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: 5m }`, freeAddr(t)))
	d.mostWaiting.Store(1)
	older, err := d.limiter.Acquire(netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	older.Yield(func() { // called while the connection is admitted
		older.Release()
		d.cancel()
		for stacks := make([]byte, 1<<20); bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("afterFuncCtx")); {
			runtime.Gosched() // until all who were to hear of it have
		}
	})
	c := d.come(t, "edge", "192.0.2.1:1")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it has not been reset: %v", err)
	}
}

// TestUrgentHello: a byte of a hello that comes as an urgent one is one of the hello's.
func TestUrgentHello(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		addr := freeAddrAt(t, host)
		d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, default: { forward: %q } } ]
limits: { hello_timeout: 5m }`, addr, backend(t, echo)))
		hello := helloFor(t, "a.test")
		c := dialTCP(t, addr)
		half := len(hello) / 2
		c.Write(hello[:half])
		tcpsock.Control(c, func(fd int) {
			if err := unix.Sendto(fd, hello[half:half+1], unix.MSG_OOB, nil); err != nil {
				t.Error(err)
			}
		})
		c.Write(hello[half+1:])
		got := make([]byte, len(hello))
		if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, hello) {
			t.Errorf("%s: %d bytes of %d come back: %v, and refused are %v", host, n, len(hello), err, d.Status().Refused)
		}
	}
}
