package front

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/metrics"
)

// TestShortOfTCPMemory: flows whose readers have stopped are ended when the kernel is short of memory, and
// not before; those of the source that has most first, and none that moves or holds nothing.
func TestShortOfTCPMemory(t *testing.T) {
	const short = 1000 // pages
	for _, v := range []struct{ listen, bad, other string }{
		{"127.0.0.1:%d", "127.0.0.11", "127.0.0.12"},
		{":%d", "127.0.0.11", "127.0.0.12"},
		{"[::1]:%d", "::1", ""},
	} {
		t.Run(v.listen, func(t *testing.T) {
			up := backend(t, func(c net.Conn) { // speaks as long as anybody listens, once it was asked to
				defer c.Close()
				if _, err := c.Read(make([]byte, 1)); err == nil {
					io.Copy(c, forever{})
				}
			})
			addr := freeAddr(t)
			_, port, _ := net.SplitHostPort(addr)
			at := strings.Replace(v.listen, "%d", port, 1)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
			if strings.HasPrefix(at, ":") {
				at = addr
			}
			connect := func(from string, ask bool) *net.TCPConn {
				t.Helper()
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
				c, err := dialer.Dial("tcp", at)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				c.(*net.TCPConn).SetReadBuffer(16 << 10)
				c.SetDeadline(time.Now().Add(patience))
				if ask {
					c.Write([]byte{1})
				}
				return c.(*net.TCPConn)
			}
			var bad, kept []*net.TCPConn
			for range 12 {
				bad = append(bad, connect(v.bad, true))
			}
			kept = append(kept, connect(v.bad, false))
			if v.other != "" {
				kept = append(kept, connect(v.other, true), connect(v.other, true))
			}
			moves := connect(v.bad, true)
			all := len(bad) + len(kept) + 1
			last := int64(-1)
			eventually(t, "all stand still", func() bool {
				sum := int64(0)
				for _, f := range d.flows.Snapshot(flow.Query{}) {
					sum += f.BytesUp + f.BytesDown
				}
				same := sum == last && d.flows.Len() == all
				last = sum
				time.Sleep(200 * time.Millisecond)
				return same
			})

			w, now := &memoryWatch{front: d.Front}, time.Now()
			w.look(now, short, short)
			w.look(now.Add(stoppedFor-1), short, short) // not stopped for long enough
			if n := d.flows.Len(); n != all {
				t.Fatalf("%d flows are left of %d", n, all)
			}
			io.CopyN(io.Discard, moves, 8<<20)
			w.look(now.Add(stoppedFor), short-1, short) // not short
			if n := d.flows.Len(); n != all {
				t.Fatalf("%d flows are left of %d", n, all)
			}
			standing := len(bad)
			if v.other != "" {
				standing += 2
			}
			ended := 0
			for range 3 { // who is bad holds most, all the while
				n := (standing + 3) / 4
				w.look(now.Add(stoppedFor), short, short)
				standing, ended = standing-n, ended+n
				eventually(t, "a quarter is ended", func() bool { return d.flows.Len() == all-ended })
			}
			reset := 0
			for _, c := range bad {
				if _, err := c.Write([]byte{1}); err != nil {
					reset++
				}
			}
			if reset != ended {
				t.Errorf("%d of who holds most are reset, want %d", reset, ended)
			}
			for i, c := range append(kept, moves) {
				if _, err := c.Write([]byte{1}); err != nil {
					t.Errorf("number %d of the others: %v", i, err)
				}
			}
			if n := metrics.Totals(d.metrics.Cut, "reason")["tcp_memory"]; n != int64(ended) {
				t.Errorf("%d are counted, want %d", n, ended)
			}
		})
	}
}

// TestSocketsOfOthers: another server's connection is not ended, though its peer has the address and port of one of ours.
func TestSocketsOfOthers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	at := addrPort(ln.Addr())
	c := dialTCP(t, at.String())
	if _, err := c.Write(make([]byte, 2*stoppedMin)); err != nil { // which nobody reads
		t.Fatal(err)
	}
	stopped := map[netip.AddrPort]netip.Prefix{addrPort(c.LocalAddr()): netip.MustParsePrefix("127.0.0.1/32")}
	for _, v := range []struct{ port, ended int }{{int(at.Port()) - 1, 0}, {int(at.Port()), 1}} {
		if n, _, err := endFullest(stopped, map[uint16]bool{uint16(v.port): true}); n != v.ended || err != nil {
			t.Errorf("%d of the sockets at port %d are ended, want %d: %v", n, v.port, v.ended, err)
		}
	}
}

// forever is an endless stream.
type forever struct{}

func (forever) Read(b []byte) (int, error) { return len(b), nil }

// TestTCPMemory: what the kernel says of it is understood.
func TestTCPMemory(t *testing.T) {
	used, short, err := tcpMemory()
	if err != nil || used < 0 || short < 100 {
		t.Errorf("%d pages, short from %d: %v", used, short, err)
	}
}
