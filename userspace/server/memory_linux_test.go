package server

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/metrics"
)

// What docs/configuration.md says of flows that stand still, and of sources that hold much.
const (
	stoppedFor      = 15 * time.Second
	stoppedForShort = time.Second
	greedyFor       = 30 * time.Second
)

// watch is the daemon's, which looks from now on only when the test says it.
func (d *daemon) watch() *memory.Watch {
	d.memory.Close()
	return d.memory
}

// acceptedSockets are those of the connections that were accepted.
func (d *daemon) acceptedSockets(t *testing.T) tcpsock.Sockets {
	t.Helper()
	diag, err := tcpsock.OpenDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	all, err := diag.At(*d.ports.Load())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

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

			w, now := d.watch(), time.Now()
			taken := func(eighths int64) memory.Use {
				return memory.Use{Used: eighths << 30, Total: 8 << 30, What: memory.OfTCP}
			}
			look := func(after time.Duration, eighths int64, ended int) {
				t.Helper()
				w.Look(now.Add(after), taken(eighths))
				all -= ended
				eventually(t, fmt.Sprintf("%d flows are left", all), func() bool { return d.flows.Len() == all })
			}
			refused := func() bool {
				t.Helper()
				before := metrics.Totals(d.metrics.Refused, "reason")[memory.OfBudget]
				if c, err := dial(v.bad); err == nil { // else the reset has come already
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					c.Write([]byte{1})
					c.Read(make([]byte, 1)) // an answer, if it is not refused
				}
				return metrics.Totals(d.metrics.Refused, "reason")[memory.OfBudget] > before
			}
			look(0, 3, 0)
			look(0, 4, 0)
			if w.Refuse(netip.MustParseAddr(v.bad)) != nil {
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
			if w.Refuse(netip.MustParseAddr(v.bad)) != nil {
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
			if n := metrics.Totals(d.metrics.Cut, "reason")[memory.OfTCP]; n != int64(standing+2) {
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
			now := time.Now()
			w := d.watch()
			eventually(t, "all readers have stopped", func() bool {
				d.opts.Relay.MeasureHeld(now)
				stopped, sum := 0, int64(0)
				sockets := d.acceptedSockets(t)
				for _, fl := range d.flows.Live() {
					if held, _ := fl.Held(); held > 0 {
						stopped++
						sum += max(held, sockets[netip.MustParseAddrPort(fl.Downstream)].Held)
					}
				}
				return stopped == readers && sum > 1<<20
			})
			w.Look(now, memory.Use{Used: 4 << 30, Total: 8 << 30, What: memory.OfBudget}) // which only sees them
			owners := map[any]bool{}
			for _, fl := range d.flows.Live() {
				if fl.Shared {
					owners[fl.Downstream] = true
				} else {
					owners[limit.PrefixOf(netip.MustParseAddrPort(fl.Client).Addr())] = true
				}
			}
			if want := map[bool]int{true: 1, false: readers}[v.refused]; len(owners) != want {
				t.Errorf("%d owners of what is held, want %d: %v", len(owners), want, owners)
			}
			for tries := 0; ; tries++ { // the kernel may have made room for a few bytes more since they stood still
				now = now.Add(stoppedForShort)
				w.Look(now, memory.Use{Used: 5 << 30, Total: 8 << 30, What: memory.OfBudget})
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
			w := d.watch()
			taken := func(eighths int64) memory.Use {
				return memory.Use{Used: eighths << 30, Total: 8 << 30, What: memory.OfBudget}
			}
			eventually(t, "the client may open no more", func() bool {
				if framer != nil {
					framer.WritePing(false, [8]byte{})
				}
				if d.flows.Len() == connections { // a source that is refused gets no more
					w.Look(time.Now().Add(stoppedForShort), taken(5))
				}
				return d.flows.Len() == connections && w.Refuse(netip.MustParseAddr("127.0.0.1")) != nil
			})
			eventually(t, "all are ended", func() bool {
				if framer != nil {
					framer.WritePing(false, [8]byte{1}) // no sign of life
				}
				w.Look(time.Now().Add(stoppedFor), taken(7))
				return d.flows.Len() == 0
			})
			if n := metrics.Totals(d.metrics.Cut, "reason")[memory.OfBudget]; n < int64(connections) {
				t.Errorf("%d are counted, want %d", n, connections)
			}
		})
	}
}

// TestOrphans: what a reader has not taken of a flow that has ended is his as well: he is refused for it, and the
// kernel's socket is ended.
func TestOrphans(t *testing.T) {
	if !tcpsock.CanEndOrphans() {
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
				for _, s := range d.acceptedSockets(t) {
					if s.IsOrphan && s.Held > 16<<10 {
						n++
					}
				}
				return n
			}
			eventually(t, "the flows have ended, and the kernel has their bytes", func() bool { return d.flows.Len() == 0 && orphans() == flows })
			w, now := d.watch(), time.Now()
			look := func(after time.Duration, eighths int64) {
				w.Look(now.Add(after), memory.Use{Used: eighths << 30, Total: 8 << 30, What: memory.OfTCP})
			}
			look(0, 7)
			if n := orphans(); n != flows {
				t.Errorf("%d are left of those that may be taken still", n)
			}
			look(stoppedForShort, 5)
			if refused := w.Refuse(netip.MustParseAddr("127.0.0.1")) != nil; refused == hop {
				t.Errorf("the source is refused: %v", refused)
			}
			look(stoppedForShort, 7)
			if n := orphans(); n != 0 {
				t.Errorf("%d are left", n)
			}
			if n := metrics.Totals(d.metrics.Cut, "reason")[memory.OfTCP]; n != flows {
				t.Errorf("%d are counted, want %d", n, flows)
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
	rests := func(want bool) func() bool { return func() bool { return d.memory.IsIdle() == want } }
	for range 3 {
		eventually(t, "it rests", rests(true))
		c := dialTCP(t, at)
		eventually(t, "it is awake", rests(false))
		c.Close()
	}
}

// TestSavingIsShown: that less is buffered is in status and metrics beside what is taken.
func TestSavingIsShown(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]`, freeAddr(t)))
	w, now := d.watch(), time.Now()
	says := func(saving, tcp bool) {
		t.Helper()
		m := d.Status().Memory
		if m.Saving != saving || m.TCPSaving != tcp || m.Used < 1<<20 || m.Budget != d.Memory() {
			t.Errorf("status has %+v, want %v, %v", *m, saving, tcp)
		}
		for budget, want := range map[string]bool{memory.OfBudget: saving, memory.OfTCP: tcp} {
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
		w.Look(now, memory.Use{Used: 4 << 30, Total: 8 << 30, What: memory.OfBudget})
		says(true, false)
	}
	w.Look(now, memory.Use{Used: 3 << 30, Total: 8 << 30, What: memory.OfBudget})
	says(false, false)
	w.Look(now, memory.Use{Used: 4 << 30, Total: 8 << 30, What: memory.OfTCP})
	says(false, true)
	w.Look(now, memory.Use{Used: 3 << 30, Total: 8 << 30, What: memory.OfTCP})
	says(false, false)
}

// forever is an endless stream.
type forever struct{}

func (forever) Read(b []byte) (int, error) { return len(b), nil }
