package server

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// TestShortOfTCPMemory: when memory is short, whose readers have stopped opens no more connections, and then those
// that have stood still for longest are ended, of the source that has most first; none that moves or holds
// nothing.
func TestShortOfTCPMemory(t *testing.T) {
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
			dial := func(from string) (net.Conn, error) {
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
				return dialer.Dial("tcp", at)
			}
			connect := func(from string, ask bool) *net.TCPConn {
				t.Helper()
				c, err := dial(from)
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
			moves.SetReadBuffer(256 << 10) // more than a segment of loopback, which else comes by a timer
			all := len(bad) + len(kept) + 1
			still := func() {
				t.Helper()
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
			}
			still()

			w, now := &memoryWatch{server: d.Server}, time.Now()
			taken := func(eighths int64) memoryUse {
				return memoryUse{used: eighths << 30, total: 8 << 30, what: "tcp_memory"}
			}
			look := func(after time.Duration, eighths int64, ended int) {
				t.Helper()
				w.look(now.Add(after), taken(eighths))
				all -= ended
				eventually(t, fmt.Sprintf("%d flows are left", all), func() bool { return d.flows.Len() == all })
			}
			refused := func() bool {
				t.Helper()
				before := metrics.Totals(d.metrics.Refused, "reason")[overMemory]
				if c, err := dial(v.bad); err == nil { // else the reset has come already
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					c.Write([]byte{1})
					c.Read(make([]byte, 1)) // an answer, if it is not refused
				}
				return metrics.Totals(d.metrics.Refused, "reason")[overMemory] > before
			}
			look(0, 3, 0)
			look(0, 4, 0)
			if d.greedySources.Load() != nil {
				t.Error("a source is refused before memory is short")
			}
			look(0, 5, 0)
			if refused() {
				t.Error("who may be reading still is refused")
			}
			look(stoppedForShort, 5, 0)
			if !refused() {
				t.Error("who holds most may open connections")
			}
			look(stoppedFor-1, 6, 0) // not stopped for long enough
			io.CopyN(io.Discard, moves, 8<<20)
			look(stoppedFor, 5, 0) // not short
			look(stoppedFor, 6, 1) // which gives back enough
			look(stoppedFor, 2, 0)
			if !refused() {
				t.Error("who held most may open connections as soon as theirs were reset")
			}
			look(stoppedFor+greedyFor, 2, 0)
			if d.greedySources.Load() != nil {
				t.Error("a source is refused when there has been memory again for long enough")
			}
			reset := 0
			for _, c := range bad {
				if _, err := c.Write([]byte{1}); err != nil {
					reset++
				}
			}
			if reset != 1 {
				t.Errorf("%d of who holds most are reset, want 1", reset)
			}
			still()
			// What all of them hold is too little now. What they send is no sign of life.
			standing := len(bad) - 1
			if v.other != "" {
				standing += 2
			}
			look(stoppedFor, 7, standing)
			look(stoppedFor+stoppedForShort-1, 7, 0)
			look(stoppedFor+stoppedForShort, 7, 1) // moves, which does not any more
			for i, c := range kept[:1] {
				if _, err := c.Write([]byte{1}); err != nil {
					t.Errorf("number %d of the others: %v", i, err)
				}
			}
			if n := metrics.Totals(d.metrics.Cut, "reason")["tcp_memory"]; n != int64(standing+2) {
				t.Errorf("%d are counted, want %d", n, standing+2)
			}
		})
	}
}

// TestGreedyHop: a hop that many clients stand behind, none of whom it names, is refused nothing for what one of them
// holds; a client whom it names is. Those behind it are ended one by one.
func TestGreedyHop(t *testing.T) {
	const readers = 16 // each holds little where others on the machine have made TCP's memory scarce
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		io.Copy(c, forever{})
	})
	for _, v := range []struct {
		name, hop, client string
		refused           bool
	}{
		{"a trusted hop says nothing", "127.0.0.21", "", false},
		{"a trusted hop names a client", "127.0.0.22", "198.51.100.7", true},
		{"a trusted hop names a node of the tailnet", "127.0.0.23", "100.64.0.9", false},
		{"another listener's hop", "127.0.0.24", "", false},
		{"a client", "127.0.0.25", "", true},
	} {
		t.Run(v.name, func(t *testing.T) {
			at, plain := freeAddr(t), freeAddr(t)
			d := start(t, fmt.Sprintf(`
listeners:
  - { name: hops, listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.20/30, 127.0.0.24] }, default: { forward: %q } }
  - { name: plain, listen: [%q], mode: tcp, default: { forward: %q } }`, at, up, plain, up))
			connect := func() (net.Conn, error) {
				dialer, where := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(v.hop)}}, at
				if v.name == "a client" || v.name == "another listener's hop" {
					where = plain
				}
				c, err := dialer.Dial("tcp", where)
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { c.Close() })
				c.(*net.TCPConn).SetReadBuffer(16 << 10)
				c.SetDeadline(time.Now().Add(patience))
				if v.client != "" {
					fmt.Fprintf(c, "PROXY TCP4 %s 192.0.2.1 4000 443\r\n", v.client)
				}
				if where == at {
					c.Write(helloFor(t, "app.test"))
				}
				return c, nil
			}
			for range readers {
				if _, err := connect(); err != nil {
					t.Fatal(err)
				}
			}
			w, now := &memoryWatch{server: d.Server}, time.Now()
			var all []stalled
			eventually(t, "all readers have stopped", func() bool {
				d.opts.Relay.MeasureHeld(now)
				diag, err := newSockDiag()
				if err != nil {
					t.Fatal(err)
				}
				defer diag.Close()
				sockets, err := diag.tcpSockets(*d.ports.Load())
				if err != nil {
					t.Fatal(err)
				}
				all = w.stalled(now, sockets)
				sum := int64(0)
				for _, s := range all {
					sum += s.held
				}
				return len(all) == readers && sum > greedyMin
			})
			owners := map[owner]bool{}
			for _, s := range all {
				owners[s.owner] = true
			}
			if want := map[bool]int{true: 1, false: readers}[v.refused]; len(owners) != want {
				t.Errorf("%d owners of what is held, want %d: %v", len(owners), want, owners)
			}
			for tries := 0; ; tries++ { // the kernel may have made room for a few bytes more since they stood still
				now = now.Add(stoppedForShort)
				w.look(now, memoryUse{used: 5 << 30, total: 8 << 30, what: overMemory})
				c, err := connect()
				if err == nil { // else the reset has come already
					_, err = c.Read(make([]byte, 1))
					c.Close()
				}
				if refused := err != nil; refused == v.refused {
					break
				} else if refused || tries == 3 {
					t.Fatalf("a connection more is refused: %v (%v), want %v", refused, err, v.refused)
				}
			}
		})
	}
}

// TestSlowHTTP: what the answers hold that an HTTP client does not read is its own, and its connection is ended for it:
// that of one who reads nothing, and that of one who speaks HTTP/2, reads all but the streams, and pings.
func TestSlowHTTP(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, forever{}) }))
	defer server.Close()
	defer server.CloseClientConnections()
	for v, streams := range map[string]int{"HTTP/1.1": 8, "HTTP/2": 60} {
		t.Run(v, func(t *testing.T) {
			at := freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, default: { forward: %q } } ]`, at, server.Listener.Addr()))
			var framer *http2.Framer
			for i := range streams {
				if i > 0 && framer != nil {
					var head bytes.Buffer
					enc := hpack.NewEncoder(&head)
					for _, h := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", "/"}} {
						enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
					}
					if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i - 1), BlockFragment: head.Bytes(), EndStream: true, EndHeaders: true}); err != nil {
						t.Fatal(err)
					}
					continue
				}
				c := dialTCP(t, at)
				c.SetReadBuffer(16 << 10)
				if v == "HTTP/1.1" {
					io.WriteString(c, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
					continue
				}
				io.WriteString(c, http2.ClientPreface)
				framer = http2.NewFramer(c, c)
				framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
				go func() {
					for {
						if _, err := framer.ReadFrame(); err != nil {
							return
						}
					}
				}()
			}
			connections := map[string]int{"HTTP/1.1": streams, "HTTP/2": 1}[v] // of the daemon
			w := &memoryWatch{server: d.Server}
			taken := func(eighths int64) memoryUse { return memoryUse{used: eighths << 30, total: 8 << 30, what: overMemory} }
			eventually(t, "the client may open no more", func() bool {
				if framer != nil {
					framer.WritePing(false, [8]byte{})
				}
				if d.flows.Len() == connections { // a source that is refused gets no more
					w.look(time.Now().Add(stoppedForShort), taken(5))
				}
				return d.flows.Len() == connections && d.greedy(netip.MustParseAddr("127.0.0.1")) != nil
			})
			eventually(t, "all are ended", func() bool {
				if framer != nil {
					framer.WritePing(false, [8]byte{1}) // no sign of life
				}
				w.look(time.Now().Add(stoppedFor), taken(7))
				return d.flows.Len() == 0
			})
			if n := metrics.Totals(d.metrics.Cut, "reason")[overMemory]; n < int64(connections) {
				t.Errorf("%d are counted, want %d", n, connections)
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
	at := tcpsock.AddrPortOf(ln.Addr())
	c := dialTCP(t, at.String())
	if _, err := c.Write(make([]byte, 2*stoppedMin)); err != nil { // which nobody reads
		t.Fatal(err)
	}
	diag, err := newSockDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for _, v := range []struct {
		ports []uint16
		ours  bool
	}{{[]uint16{at.Port() - 1}, false}, {[]uint16{at.Port()}, true}, {[]uint16{at.Port(), 1}, true}, {[]uint16{1, 2}, false}} {
		ports := map[uint16]bool{}
		for _, p := range v.ports {
			ports[p] = true
		}
		sockets, err := diag.tcpSockets(ports)
		s, ok := sockets[tcpsock.AddrPortOf(c.LocalAddr())]
		if err != nil || ok != v.ours || ok && s.held < 2*stoppedMin {
			t.Errorf("at ports %d: %v, %+v, %v", v.ports, ok, s, err)
		}
	}
}

// forever is an endless stream.
type forever struct{}

func (forever) Read(b []byte) (int, error) { return len(b), nil }

// TestGreedySources: each source that holds much is refused while memory is short, and no other one; a hop is not.
func TestGreedySources(t *testing.T) {
	prefix := func(last byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, last}), 32) }
	var all []stalled
	for source, n := range map[byte]int64{1: 2 * greedyMin, 2: greedyMin, 3: greedyMin - 1} {
		all = append(all, stalled{owner: owner{source: prefix(source)}, held: n / 2}, stalled{owner: owner{source: prefix(source)}, held: n - n/2})
	}
	all = append(all, stalled{owner: owner{alone: netip.AddrPortFrom(prefix(4).Addr(), 1)}, held: 9 * greedyMin})
	greedy := greedySources(all, greedyMin)
	f := new(Server)
	f.greedySources.Store(&greedy)
	for source, refused := range map[byte]bool{1: true, 2: true, 3: false, 4: false} {
		if err := f.greedy(prefix(source).Addr()); (err != nil) != refused {
			t.Errorf("source %d: %v", source, err)
		}
	}
	if most, held := greediest(greedy); most != prefix(1) || held != 2*greedyMin {
		t.Errorf("%v holds most: %d bytes", most, held)
	}
}

// TestGreedyTakes: what is on the way to a client who takes it is held for nobody. What a client sends is no sign that
// it takes anything.
func TestGreedyTakes(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
	peer := netip.MustParseAddrPort("192.0.2.1:5")
	var up, down int64
	fl := &flow.Flow{Client: peer.String(), Downstream: peer.String(), Bytes: func() (int64, int64) { return up, down }}
	d.flows.Add(fl)
	defer d.flows.Remove(fl)
	w, now := &memoryWatch{server: d.Server}, time.Now()
	sockets := map[netip.AddrPort]tcpSocket{peer: {held: 2 * greedyMin}}
	for i, look := range []struct {
		up, down int64 // MiB
		greedy   bool
	}{{0, 1, false}, {0, 2, false}, {0, 2, true}, {1, 2, true}, {2, 2, true}, {2, 3, false}, {2, 3, true}} {
		up, down = look.up<<20, look.down<<20
		now = now.Add(memoryEvery)
		if greedy := len(greedySources(w.stalled(now, sockets), greedyMin)) > 0; greedy != look.greedy {
			t.Errorf("look %d, with %d bytes up and %d down: greedy is %v", i, up, down, greedy)
		}
	}
}

// TestSlowReader: who takes or sends a little now and then stands still, and who takes in half a minute what is held
// for him does not, whoever moves the bytes; nor does one who goes on after a long rest.
func TestSlowReader(t *testing.T) {
	const held = 3 << 20
	for _, v := range []struct {
		name     string
		up, down int64 // bytes between two looks
		stands   bool
	}{
		{"nothing", 0, 0, true},
		{"a byte is sent", 1, 0, true},
		{"a byte is taken", 0, 1, true},
		{"too little is taken", 0, held / 200, true},
		{"enough is taken", 0, held / 100, false},
	} {
		for _, mover := range []string{"pumps", "the kernel"} {
			t.Run(v.name+", "+mover, func(t *testing.T) {
				d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
				peer := netip.MustParseAddrPort("192.0.2.1:5")
				var up, down int64
				var moved time.Time
				fl := &flow.Flow{Client: peer.String(), Downstream: peer.String(), Bytes: func() (int64, int64) { return up, down }}
				sockets := map[netip.AddrPort]tcpSocket{peer: {held: held}}
				if mover == "pumps" {
					fl.Held = func() (int64, time.Time) { return held, moved }
				}
				d.flows.Add(fl)
				defer d.flows.Remove(fl)
				w, now := &memoryWatch{server: d.Server}, time.Now()
				look := func(moreUp, moreDown int64, stands bool) {
					t.Helper()
					if up, down = up+moreUp, down+moreDown; moreDown > 0 {
						moved = now
					}
					isStanding := false
					for _, s := range w.stalled(now, sockets) {
						isStanding = isStanding || now.Sub(s.since) >= stoppedForShort
					}
					if isStanding != stands {
						t.Errorf("after %d bytes up and %d down it stands still: %v", up, down, isStanding)
					}
					now = now.Add(memoryEvery)
				}
				moved = now
				for range stoppedForShort / memoryEvery {
					look(v.up, v.down, false)
				}
				for range 8 {
					look(v.up, v.down, v.stands)
				}
				now = now.Add(time.Hour)
				look(0, held, false)
			})
		}
	}
}

// TestOrphans: what a reader has not taken of a flow that has ended is his as well: he is refused for it, and the
// kernel's socket is ended.
func TestOrphans(t *testing.T) {
	if !canEndOrphans() {
		t.Skip("before Linux 6.12 an orphan can't be ended")
	}
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		c.Write(make([]byte, 256<<10))
	})
	for _, hop := range []bool{false, true} {
		t.Run(fmt.Sprintf("hop: %v", hop), func(t *testing.T) {
			addr, trust := freeAddr(t), "127.0.0.99"
			if hop {
				trust = "127.0.0.1"
			}
			d := start(t, fmt.Sprintf(`
listeners:
  - { name: main, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: hops, listen: [%q], mode: tcp, accept_proxy: { from: [%s] }, default: { reject: true } }`, addr, up, freeAddr(t), trust))
			const flows = 8
			for range flows {
				c := dialTCP(t, addr)
				c.SetReadBuffer(4 << 10)
				c.CloseWrite()
			}
			orphans := func() (n int) {
				t.Helper()
				diag, err := newSockDiag()
				if err != nil {
					t.Fatal(err)
				}
				defer diag.Close()
				sockets, err := diag.tcpSockets(*d.ports.Load())
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range sockets {
					if s.isOrphan && s.held > stoppedMin {
						n++
					}
				}
				return n
			}
			eventually(t, "the flows have ended, and the kernel has their bytes", func() bool { return d.flows.Len() == 0 && orphans() == flows })
			w, now := &memoryWatch{server: d.Server}, time.Now()
			look := func(after time.Duration, eighths int64) {
				w.look(now.Add(after), memoryUse{used: eighths << 30, total: 8 << 30, what: "tcp_memory"})
			}
			look(0, 7)
			if n := orphans(); n != flows {
				t.Errorf("%d are left of those that may be taken still", n)
			}
			look(stoppedForShort, 5)
			if refused := d.greedy(netip.MustParseAddr("127.0.0.1")) != nil; refused == hop {
				t.Errorf("the source is refused: %v", refused)
			}
			look(stoppedForShort, 7)
			if n := orphans(); n != 0 {
				t.Errorf("%d are left", n)
			}
			if n := metrics.Totals(d.metrics.Cut, "reason")["tcp_memory"]; n != flows {
				t.Errorf("%d are counted, want %d", n, flows)
			}
		})
	}
}

// TestSamePeer: a flow is ended though its client has another one from the same address and port, to another port.
func TestSamePeer(t *testing.T) {
	up := backend(t, func(c net.Conn) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			io.Copy(c, forever{})
		}
	})
	var ports []string
	for range 8 {
		ports = append(ports, freeAddr(t))
	}
	d := start(t, fmt.Sprintf(`listeners: [ { listen: ["%s"], mode: tcp, default: { forward: %q } } ]`, strings.Join(ports, `", "`), up))
	from := netip.MustParseAddrPort(freeAddr(t))
	for i, at := range ports {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
		if err := unix.Bind(fd, tcpsock.Sockaddr(from)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, tcpsock.Sockaddr(netip.MustParseAddrPort(at))); err != nil {
			t.Fatal(err)
		}
		if i == len(ports)/2 {
			unix.Write(fd, []byte{1})
		}
	}
	moved := func() (n int64) {
		for _, f := range d.flows.Snapshot(flow.Query{}) {
			n += f.BytesDown
		}
		return n
	}
	last := int64(0)
	eventually(t, "the reader has stopped", func() bool {
		time.Sleep(300 * time.Millisecond)
		n := moved()
		isSame := n > 0 && n == last
		last = n
		return isSame && d.flows.Len() == len(ports)
	})
	w, now := &memoryWatch{server: d.Server}, time.Now()
	for range 2 {
		w.look(now, memoryUse{used: 7 << 30, total: 8 << 30, what: "tcp_memory"})
		now = now.Add(stoppedForShort)
	}
	eventually(t, "the flow that holds much has ended", func() bool { return moved() == 0 })
}

// TestSmallHolders: where TCP's memory is short those that hold little are ended as well; for the budget they aren't.
func TestSmallHolders(t *testing.T) {
	const flows, each = 20, 3 << 10
	up := backend(t, func(c net.Conn) {
		c.Write(make([]byte, each))
		c.Read(make([]byte, 1))
	})
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, up))
	for range flows {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // which is the least, and no room for so much
		if err := unix.Connect(fd, tcpsock.Sockaddr(netip.MustParseAddrPort(addr))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all answers have come", func() bool {
		sum := int64(0)
		for _, f := range d.flows.Snapshot(flow.Query{}) {
			sum += f.BytesDown
		}
		return sum == flows*each
	})
	w, now := &memoryWatch{server: d.Server}, time.Now()
	for _, what := range []string{overMemory, "tcp_memory"} {
		for range 2 {
			now = now.Add(stoppedForShort)
			w.look(now, memoryUse{used: 7 << 30, total: 8 << 30, what: what})
		}
		if n, want := metrics.Totals(d.metrics.Cut, "reason")[what], map[string]int64{"tcp_memory": flows}[what]; n != want {
			t.Errorf("for want of %s %d are ended, want %d", what, n, want)
		}
	}
}

// TestGreedyForgotten: sources that were refused are not remembered without bound, and who is a hop by now is let in.
func TestGreedyForgotten(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, accept_proxy: { from: [192.0.2.9] }, default: { reject: true } } ]`, freeAddr(t)))
	w, now := &memoryWatch{server: d.Server, greedy: map[netip.Prefix]greed{}}, time.Now()
	source := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0, byte(i >> 8), byte(i)}), 64)
	}
	for i := range 2 * mostGreedy {
		w.greedy[source(i)] = greed{}.again(1, now.Add(time.Duration(i-2*mostGreedy)*time.Millisecond))
	}
	hop := netip.MustParsePrefix("192.0.2.9/32")
	w.greedy[hop] = greed{}.again(1, now)
	w.refuse(now, memoryUse{})
	if n := len(w.greedy); n > mostGreedy || n < mostGreedy/4 {
		t.Errorf("%d sources are remembered", n)
	}
	if d.greedy(source(2*mostGreedy-1).Addr()) == nil {
		t.Error("the last one may open connections")
	}
	if err := d.greedy(hop.Addr()); err != nil {
		t.Errorf("a hop: %v", err)
	}
}

// TestVictims: connections are ended in the order that one by one would give, and to find it for ten times as many
// takes about ten times as long.
func TestVictims(t *testing.T) {
	now := time.Now()
	make := func(n, sources int) (all []stalled) {
		r := rand.New(rand.NewPCG(uint64(n), uint64(sources)))
		for i := range n {
			a := netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})
			all = append(all, stalled{netip.AddrPortFrom(a, uint16(i)), owner{source: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 0, byte(r.IntN(sources))}), 32)},
				now.Add(-time.Duration(r.IntN(1e6)) * time.Microsecond), stoppedMin + r.Int64N(1<<20), nil})
		}
		return all
	}
	until := now.Add(-100 * time.Millisecond)
	for _, n := range []int{0, 1, 7, 300} {
		left := slices.DeleteFunc(make(n, 5), func(s stalled) bool { return s.since.After(until) })
		for i, v := range victims(make(n, 5), until) {
			source, _ := greediest(greedySources(left, 1))
			longest := -1
			for j, s := range left {
				if s.owner.source == source && (longest < 0 || s.since.Before(left[longest].since)) {
					longest = j
				}
			}
			if v.peer != left[longest].peer {
				t.Fatalf("of %d number %d is %v, want %v", n, i, v, left[longest])
			}
			left = slices.Delete(left, longest, longest+1)
		}
		if len(left) > 0 {
			t.Errorf("of %d %d are left out", n, len(left))
		}
	}
	took := func(n int) time.Duration {
		all, least := make(n, 256), time.Hour
		for range 5 {
			started := time.Now()
			victims(all, now)
			least = min(least, time.Since(started))
		}
		return least
	}
	if few, many := took(5_000), took(50_000); many > 40*few {
		t.Errorf("5,000 take %v, and 50,000 %v", few, many)
	}
}

// TestTCPMemory: what the kernel says of it is understood, in a network namespace of a container too, which has no
// tcp_mem.
func TestTCPMemory(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
	use := func(where string) (tcp int64) {
		used, short := tcpsock.Memory("/proc")
		if used < 0 || short < 100<<12 {
			t.Errorf("%s: %d bytes, short from %d", where, used, short)
		}
		if u := d.memoryUse("/proc", "/sys/fs/cgroup"); u.used <= 0 || u.total <= 0 {
			t.Errorf("%s: %+v", where, u)
		}
		return short
	}
	first := use("here")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocks: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if n := use("in a namespace"); n < first/2 || n > 2*first {
			t.Logf("%d bytes in a namespace, %d here: has somebody set tcp_mem?", n, first)
		}
	}()
	<-done
}

// TestMemoryOfOthers: what other programs' sockets hold leads to nothing: neither is a source refused for it, nor a flow
// ended.
func TestMemoryOfOthers(t *testing.T) {
	for _, v := range []struct {
		used, own, short int64
		over             bool // 3/4
	}{
		{75, 75, 100, true},
		{74, 74, 100, false},
		{95, 5, 100, false},
		{200, 5, 100, false},
		{100, 30, 100, false}, // of 50
		{100, 38, 100, true},
		{60, 40, 100, false}, // of 80
		{80, 60, 100, true},
		{1000, 1000, 100, true},
		{0, 0, 0, false},
		{5, 9, 100, false}, // read one after the other
	} {
		if got := tcpUse(v.used<<20, v.own<<20, v.short<<20); got.over(3, 4) != v.over {
			t.Errorf("%+v: %+v", v, got)
		}
	}
	// A program of this machine whose peer has stopped reading, while nothing is known but all sockets' sum.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var used int64
	eventually(t, "the kernel counts what is held", func() bool {
		c := dialTCP(t, ln.Addr().String())
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		io.Copy(c, forever{})
		used, _ = tcpsock.Memory("/proc")
		return used > 8<<20
	})
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
	if n, targets, _ := d.socketMemory("/proc"); n > 1<<20 || targets > 0 {
		t.Errorf("%d bytes of %d are said to be ours, and %d those of targets", n, used, targets)
	}
	proc := fakeProc(t, used, used)
	if u := d.memoryUse(proc, t.TempDir()); u.over(1, 2) {
		t.Errorf("ours are short of memory: %+v", u)
	}
	// But what a target on this machine holds for such readers is our clients' fault.
	for range 8 {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	if err := os.WriteFile(filepath.Join(proc, "sys/net/ipv4/tcp_wmem"), []byte("4096\t16384\t4194304\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ours are short of memory", func() bool {
		u := d.memoryUse(proc, t.TempDir())
		return u.over(3, 4) && u.what == "tcp_memory"
	})
}

// TestTargetsOfStopped: what other programs' sockets hold is not taken for what targets hold for readers that have
// stopped, whether the targets are here, may be in another network namespace, or are elsewhere.
func TestTargetsOfStopped(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 8 {
		c := dialTCP(t, ln.Addr().String())
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		io.Copy(c, forever{})
	}
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
	diag, err := newSockDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for _, target := range []string{backend(t, func(net.Conn) {}), "10.255.255.1:80", "[fd7a:115c:a1e0::1]:80", "192.0.2.7:80"} {
		var flows []*flow.Flow
		for range 100 {
			fl := &flow.Flow{Client: "192.0.2.1:5", Downstream: "192.0.2.1:5", Upstream: target, Held: func() (int64, time.Time) { return 1 << 10, time.Now() }}
			flows = append(flows, fl)
			d.flows.Add(fl)
		}
		var used int64
		if err := diag.each(nil, func(s tcpSocket, _ netip.AddrPort) { used += s.held }); err != nil || used < 8<<20 {
			t.Fatalf("others hold %d bytes: %v", used, err)
		}
		proc := fakeProc(t, used, used)
		if err := os.WriteFile(filepath.Join(proc, "sys/net/ipv4/tcp_wmem"), []byte("4096\t16384\t4194304\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if u := d.memoryUse(proc, t.TempDir()); u.over(1, 2) {
			t.Errorf("with readers of %s ours are short of memory: %+v", target, u)
		}
		for _, fl := range flows {
			d.flows.Remove(fl)
		}
	}
}

// TestDialledSocketsCount: what a target has sent and nobody has read is ours, whoever moves the flow's bytes.
func TestDialledSocketsCount(t *testing.T) {
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	dialTCP(t, up)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
	fl := &flow.Flow{Client: "192.0.2.1:5", Downstream: "192.0.2.1:5", Upstream: up}
	d.flows.Add(fl)
	defer d.flows.Remove(fl)
	eventually(t, "it counts", func() bool { own, _, _ := d.socketMemory("/proc"); return own > 32<<10 })
}

// TestBudgetOfOthers: what other programs' sockets hold is no part of the budget, also where it is less than half of
// that, and this process has taken the rest.
func TestBudgetOfOthers(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
	budget := 4 * processMemory()
	d.memory.Store(budget)
	proc := fakeProc(t, budget/2-1, 2*budget)
	if u := d.memoryUse(proc, t.TempDir()); u.over(1, 2) {
		t.Errorf("ours are short of memory: %+v", u)
	}
}

// fakeProc is a /proc where all TCP sockets hold so many bytes, and may hold so many.
func fakeProc(t *testing.T, used, short int64) (proc string) {
	t.Helper()
	proc = t.TempDir()
	for name, text := range map[string]string{
		"net/sockstat":         fmt.Sprintf("sockets: used 9\nTCP: inuse 9 orphan 0 tw 0 alloc 9 mem %d\n", used>>12),
		"sys/net/ipv4/tcp_mem": fmt.Sprintf("1\t%d\t9\n", short>>12),
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(proc, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return proc
}

// TestNothingSaysWhatIsUsed: the budget is kept by what is known where the kernel hides the rest.
func TestNothingSaysWhatIsUsed(t *testing.T) {
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]
limits: { memory: 16MiB }`, freeAddr(t)))
	if u := d.memoryUse(t.TempDir(), t.TempDir()); u.used < 1<<20 || u.total != 16<<20 || u.what != overMemory {
		t.Errorf("%+v", u)
	}
}

// TestGreedAgain: a source that holds much once more as soon as it is let in is refused for twice as long each time.
func TestGreedAgain(t *testing.T) {
	now := time.Now()
	g := greed{}.again(1, now)
	for want := greedyFor; want < 4*greedyMost; want *= 2 {
		want := min(want, greedyMost)
		if g = g.again(1, now); g.refused != want {
			t.Errorf("it is refused for %v, not for %v, while it is refused", g.refused, want)
		}
		if now = now.Add(want - 1); g.isOver(now) {
			t.Errorf("it is let in before %v", want)
		}
		if now = now.Add(1); !g.isOver(now) {
			t.Errorf("it is refused after %v", want)
		}
		g = g.again(1, now)
	}
}

// TestRestIsOf: what a flow has moved, and what it leaves to the kernel at its end, are counted apart.
func TestRestIsOf(t *testing.T) {
	for _, c := range []struct {
		was, is int64
		same    bool
	}{
		{0, 0, true},
		{5, 9, true},
		{9, 5, false},          // another flow from the same port
		{100 << 20, -9, false}, // the flow has ended
		{-9, -5, true},
		{-5, -9, true}, // more came to be held: that is no new beginning
		{-5, 7, false},
	} {
		if got := (rest{bytes: c.was}).isOf(c.is); got != c.same {
			t.Errorf("%d after %d goes on: %v", c.is, c.was, got)
		}
	}
}

// TestGlance: the watch looks whole as often as what is taken calls for, and not at all while nobody is connected.
func TestGlance(t *testing.T) {
	const small, large = 64 << 20, 4 << 30
	for _, v := range []struct {
		name      string
		used      int64
		budget    int64 // 0: there is none; -1: of half there are 24 MiB left, which is sooner than short
		short     int64 // 0: small
		connected bool
		greedy    bool
		wasShort  bool
		calm      int64 // the watch has looked just now, and up to so much nothing is to be done for long
		looks     int   // of 9 glances in 2 s
		isShort   bool
		pause     time.Duration
	}{
		{name: "nobody is connected", looks: 1, pause: idleEvery},
		{name: "nobody is connected, and others hold half", used: small / 2, looks: 9, pause: idleEvery},
		{name: "somebody is connected", connected: true, looks: 1, pause: memoryEvery},
		{name: "less than half is taken", connected: true, used: small/2 - 4096, looks: 1, pause: memoryEvery},
		{name: "half is taken", connected: true, used: small / 2, looks: 9, pause: memoryEvery},
		{name: "half of the budget is taken", budget: 2 << 20, looks: 9, isShort: true, pause: memoryEvery},
		{name: "memory is large", connected: true, short: large, looks: 1, pause: restEvery},
		{name: "memory is large, but a quarter is taken", connected: true, short: large, used: large / 4, looks: 1, pause: restEvery},
		{name: "memory is large, but nearly half is taken", connected: true, short: large, used: large/2 - small, looks: 1, pause: restEvery},
		{name: "memory is large, and half is taken, and calm", connected: true, short: large, used: large / 2, wasShort: true, calm: 1 << 40, isShort: true, pause: restEvery},
		{name: "memory is large, and 5/8 are taken, and calm", connected: true, short: large, used: large / 8 * 5, wasShort: true, calm: 1 << 40, isShort: true, pause: memoryEvery},
		{name: "memory is large, but not the budget", connected: true, short: large, budget: -1, looks: 1},
		{name: "a source is refused", greedy: true, looks: 3, pause: memoryEvery},
		{name: "half was taken", wasShort: true, looks: 1, pause: idleEvery},
		{name: "half is taken, and calm", connected: true, used: small / 2, wasShort: true, calm: 1 << 40, looks: 0, isShort: true, pause: memoryEvery},
		{name: "half is taken, and more than when it was calm", connected: true, used: small / 2, calm: 1, looks: 9, pause: memoryEvery},
		{name: "half was taken, and calm", wasShort: true, calm: 1 << 40, looks: 1, pause: idleEvery},
	} {
		t.Run(v.name, func(t *testing.T) {
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]`, freeAddr(t)))
			if d.memory.Store(v.budget); v.budget < 0 {
				d.memory.Store(2 * (d.ownMemory() + 24<<20))
			}
			if v.connected {
				lease, err := d.limiter.Acquire(netip.Addr{})
				if err != nil {
					t.Fatal(err)
				}
				defer lease.Release()
			}
			w, now := &memoryWatch{server: d.Server, isShort: v.wasShort}, time.Now()
			if v.greedy {
				w.greedy = map[netip.Prefix]greed{netip.MustParsePrefix("192.0.2.1/32"): greed{}.again(1, now)}
			}
			if v.calm > 0 {
				w.last, w.calm = now.Add(-time.Millisecond), calm{now.Add(time.Hour), v.calm, v.calm}
			}
			proc, looks := fakeProc(t, v.used, cmp.Or(v.short, small)), 0
			for range 9 {
				last := w.last
				pause := w.glance(now, proc, t.TempDir())
				whole := w.last != last
				if whole {
					if looks++; v.used >= small/2 && !now.Before(w.calm.until) {
						t.Error("though nothing is to be done, it does not rest")
					}
					w.calm = calm{} // how long it is depends on how long the look took
				}
				switch {
				case v.budget < 0: // how soon depends on what this process has
					if pause >= restEvery && !whole {
						t.Errorf("the next glance is in %v", pause)
					}
				case pause < v.pause || pause > v.pause && !whole: // a look may take long, and its rest longer
					t.Errorf("the next glance is in %v, want %v", pause, v.pause)
				}
				now = now.Add(memoryEvery)
			}
			if looks != v.looks || w.isShort != v.isShort {
				t.Errorf("%d of 9 looks were whole, want %d; memory is short: %v", looks, v.looks, w.isShort)
			}
		})
	}
}

// TestWatchWakes: the watch rests while nobody is connected, and looks again when somebody is.
func TestWatchWakes(t *testing.T) {
	at := freeAddr(t)
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		io.Copy(c, c)
	})
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
	rests := func(want bool) func() bool { return func() bool { return d.memoryRests.Load() == want } }
	for range 3 {
		eventually(t, "it rests", rests(true))
		c := dialTCP(t, at)
		eventually(t, "it is awake", rests(false))
		c.Close()
	}
}

// TestSavingIsSaid: that less is buffered is logged when it begins and when it ends, and is in status and metrics
// beside what is taken.
func TestSavingIsSaid(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]`, freeAddr(t)))
	eventually(t, "the watch rests", d.memoryRests.Load)
	w, now := &memoryWatch{server: d.Server}, time.Now()
	says := func(memory, tcp bool) {
		t.Helper()
		m := d.Status().Memory
		if m.Saving != memory || m.TCPSaving != tcp || m.Used < 1<<20 || m.Budget != d.Memory() {
			t.Errorf("status has %+v, want %v, %v", *m, memory, tcp)
		}
		for budget, want := range map[string]bool{overMemory: memory, overTCPMemory: tcp} {
			if got := d.scrape(fmt.Sprintf("tailsplice_memory_saving{budget=%q}", budget)); got != map[bool]string{false: "0", true: "1"}[want] {
				t.Errorf("the metric of %s is %q, want %v", budget, got, want)
			}
		}
		if got := d.scrape(`tailsplice_memory_budget_bytes{budget="memory"}`); got == "" || got == "0" {
			t.Errorf("the budget's metric is %q", got)
		}
	}
	says(false, false)
	for range 2 {
		w.look(now, memoryUse{used: 4 << 30, total: 8 << 30, what: overMemory})
		says(true, false)
	}
	w.look(now, memoryUse{used: 3 << 30, total: 8 << 30, what: overMemory})
	says(false, false)
	for _, line := range []string{"half of the memory is taken (", "less than half of the memory"} {
		if n := d.log.Count("\"" + line); n != 1 {
			t.Errorf("%q is logged %d times", line, n)
		}
	}
	w.look(now, memoryUse{used: 4 << 30, total: 8 << 30, what: overTCPMemory})
	says(false, true)
	w.look(now, memoryUse{used: 3 << 30, total: 8 << 30, what: overTCPMemory})
	w.glance(now, fakeProc(t, 1<<20, 4<<20), t.TempDir())
	says(false, true)
	w.glance(now, fakeProc(t, 1<<19, 4<<20), t.TempDir())
	says(false, false)
}

// TestEndsBothSides: what is held at the other side of a flow that is ended is given back at once as well, and
// counts, so that no more flows are ended than have to be.
func TestEndsBothSides(t *testing.T) {
	const flows = 8
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
	for range flows {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	w, now := &memoryWatch{server: d.Server}, time.Now()
	var all map[netip.AddrPort]tcpSocket
	eventually(t, "all readers have stopped", func() bool {
		d.opts.Relay.MeasureHeld(now)
		_, _, all = d.socketMemory("/proc")
		return len(all) == flows && len(w.stalled(now, all)) == flows
	})
	accepted := heldBy(all)
	use := func(dialled int64) memoryUse { // so much that nine tenths of what accepted sockets hold have to go
		return memoryUse{used: accepted / 10 * 21, total: accepted / 10 * 24, what: "tcp_memory", sockets: all, dialled: dialled}
	}
	now = now.Add(stoppedForShort + time.Minute)
	w.look(now, use(8*accepted))
	cut := func() int64 { return metrics.Totals(d.metrics.Cut, "reason")["tcp_memory"] }
	if n := cut(); n < 1 || n > 2 {
		t.Errorf("%d flows are ended, though one holds enough", n)
	}
	eventually(t, "what was ended is gone", func() bool { return int64(d.flows.Len()) == flows-cut() })
	w.look(now, use(0))
	if n := cut(); n < 4 {
		t.Errorf("%d flows are ended, which hold too little", n)
	}
	eventually(t, "they are reset by the daemon", func() bool {
		return metrics.Totals(d.metrics.Ended, "end")[string(relay.EndKilled)] == cut()
	})
}

// TestEndsWithoutRights: without CAP_NET_ADMIN, as in our own image, flows are ended as far as is called for, and
// counted. What flows that have ended left to the kernel stays, and what is missing is said once.
func TestEndsWithoutRights(t *testing.T) {
	const flows = 8
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		if n, _ := c.Read(make([]byte, 1)); n == 1 {
			c.Write(make([]byte, 256<<10)) // and ends: the kernel keeps it for the client
			return
		}
		io.Copy(c, forever{})
	})
	at := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
	w, now := &memoryWatch{server: d.Server}, time.Now()
	connect := func(first string) {
		t.Helper()
		c := dialTCP(t, at)
		c.SetReadBuffer(4 << 10)
		io.WriteString(c, first)
		c.CloseWrite()
	}
	connect("x")
	var all map[netip.AddrPort]tcpSocket
	orphans := func() (n int) {
		t.Helper()
		_, _, all = d.socketMemory("/proc")
		for _, s := range all {
			if s.isOrphan && s.held > stoppedMin {
				n++
			}
		}
		return n
	}
	eventually(t, "a flow has ended that leaves bytes to the kernel", func() bool { return d.flows.Len() == 0 && orphans() == 1 })
	for range flows {
		connect("")
	}
	eventually(t, "all readers have stopped", func() bool {
		d.opts.Relay.MeasureHeld(now)
		orphans()
		return len(all) == flows+1 && len(w.stalled(now, all)) == flows+1
	})
	now = now.Add(stoppedForShort + time.Minute)
	look := func(u memoryUse) {
		t.Helper()
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and ends with the thread
			var caps [2]unix.CapUserData
			err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0])
			w.look(now, u)
			done <- err
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	held := heldBy(all)
	cut := func() int64 { return metrics.Totals(d.metrics.Cut, "reason")["tcp_memory"] }
	look(memoryUse{used: held / 10 * 21, total: held / 10 * 24, what: "tcp_memory", sockets: all})
	n := cut()
	if n < 2 || n > flows {
		t.Errorf("%d are ended, want all that is called for", n)
	}
	eventually(t, "what is counted has ended", func() bool { return int64(d.flows.Len()) == flows-n })
	look(memoryUse{used: 7 << 30, total: 8 << 30, what: "tcp_memory", sockets: all})
	eventually(t, "all have ended", func() bool { return d.flows.Len() == 0 && cut() == flows })
	if n := orphans(); n != 1 {
		t.Errorf("%d are left of what flows left to the kernel, want 1", n)
	}
	if n := d.log.Count("CAP_NET_ADMIN"); n != 1 {
		t.Errorf("what is missing is said %d times, want 1", n)
	}
	if n := d.log.Count("can't be ended"); n != 0 {
		t.Errorf("the log says %d times that flows can't be ended", n)
	}
}

// TestRestsLess: while TCP is short the watch rests little after a look, and what a look waits for on a busy
// machine does not make the rest longer.
func TestRestsLess(t *testing.T) {
	if rest := restAfter(time.Second, true); rest > 3*time.Second {
		t.Errorf("it rests for %v after a look of a second while TCP is short", rest)
	}
	if rest := restAfter(time.Second, false); rest < 10*time.Second {
		t.Errorf("it rests for %v after a look of a second while TCP is not short", rest)
	}
	if took := threadTime(func() { time.Sleep(200 * time.Millisecond) }); took > 100*time.Millisecond {
		t.Errorf("to wait takes %v of a CPU", took)
	}
}

// TestEndsWhileShort: once the kernel is short of memory for TCP it is so until less than 3/4 are taken, and
// until then readers who have stopped for a second are ended.
func TestEndsWhileShort(t *testing.T) {
	const flows = 4
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, at, up))
	for range flows {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	w, now := &memoryWatch{server: d.Server}, time.Now()
	eventually(t, "all readers have stopped", func() bool {
		d.opts.Relay.MeasureHeld(now)
		_, _, all := d.socketMemory("/proc")
		return len(all) == flows && len(w.stalled(now, all)) == flows
	})
	now = now.Add(stoppedForShort + time.Second)
	for _, v := range []struct {
		what    string
		isShort bool
		ended   int64
	}{{"tcp_memory", false, 0}, {overMemory, true, 0}, {"tcp_memory", true, flows}} {
		eventually(t, fmt.Sprintf("%+v", v), func() bool { // one may have had room yet, and stand still later
			w.look(now, memoryUse{used: 6 << 30, total: 8 << 30, what: v.what, isTCPShort: v.isShort})
			now = now.Add(stoppedForShort + time.Second)
			n := metrics.Totals(d.metrics.Cut, "reason")[v.what]
			if n > v.ended {
				t.Fatalf("%+v: %d are ended", v, n)
			}
			return n == v.ended
		})
	}
}
