package agent

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

// world is a client, a server and a proxy between them that does with the bytes what relay does.
func world(t *testing.T, relay func(dst, src *net.TCPConn, up bool)) (*Client, *Server, netip.AddrPort) {
	t.Helper()
	hello, err := stream.Hello()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := probe.Addr().(*net.TCPAddr).AddrPort()
	probe.Close()
	server, err := NewServer(addr, hello, 2)
	if err != nil {
		t.Fatal(err)
	}
	client, err := NewClient(hello, 2)
	if err != nil {
		t.Fatal(err)
	}
	if relay == nil {
		return client, server, addr
	}
	go func() {
		for {
			down, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				up, err := net.Dial("tcp", addr.String())
				if err != nil {
					down.Close()
					return
				}
				go relay(down.(*net.TCPConn), up.(*net.TCPConn), false)
				relay(up.(*net.TCPConn), down.(*net.TCPConn), true)
			}()
		}
	}()
	return client, server, ln.Addr().(*net.TCPAddr).AddrPort()
}

// copyBy relays, and has change look at each buffer and its offset.
func copyBy(change func(b []byte, offset int64) []byte) func(dst, src *net.TCPConn, up bool) {
	return func(dst, src *net.TCPConn, _ bool) {
		buf := make([]byte, 64<<10)
		for offset := int64(0); ; {
			n, err := src.Read(buf)
			if n > 0 {
				if _, err := dst.Write(change(buf[:n], offset)); err != nil {
					return
				}
				offset += int64(n)
			}
			if err != nil {
				dst.CloseWrite()
				return
			}
		}
	}
}

func jobs(addr netip.AddrPort) map[string]Job {
	j := func(kind Kind, flows, size int) Job {
		return Job{Cell: 7, Addr: addr, Kind: kind, Flows: flows, Size: size,
			Warm: 20 * time.Millisecond, Duration: 150 * time.Millisecond, Limit: 2 * time.Second}
	}
	return map[string]Job{
		"up": j(Up, 3, 0), "down": j(Down, 3, 0), "requests": j(Requests, 20, 200), "large requests": j(Requests, 5, 16<<10),
		"connects": j(Connects, 20, 64), "hold": j(Hold, 100, 64), "stall": j(Stall, 10, 0),
		"fill": j(Fill, 10, 0),
	}
}

// do runs a job to its end, and returns what both ends saw.
func do(t *testing.T, c *Client, s *Server, j Job) (near, far Report) {
	t.Helper()
	near = c.Run(j)
	switch j.Kind {
	case Hold:
		if near.Faults == 0 {
			near = c.Check()
		}
		near = c.Resume()
	case Stall, Fill:
		sender := func() Report { return s.Report(j.Cell) }
		if j.Kind == Fill {
			sender = c.Look
		}
		for begin := time.Now(); sender().Quiet < 50*time.Millisecond; time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatalf("readers that had stopped took %d bytes, and still do", sender().Held)
			}
		}
		if held := sender().Held; held < int64(j.Flows)*64<<10 {
			t.Errorf("%d bytes were sent to readers that had stopped: where do they stop?", held)
		}
		s.Stop(j.Cell)
		near = c.Resume()
	}
	for range 100 {
		if far = s.Report(j.Cell); far.Done >= near.Done {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.Forget(j.Cell)
	return near, far
}

func TestHonestProxy(t *testing.T) {
	same := copyBy(func(b []byte, _ int64) []byte { return b })
	for _, proxy := range []string{"none", "proxy"} {
		relay := same
		if proxy == "none" {
			relay = nil
		}
		c, s, addr := world(t, relay)
		for name, j := range jobs(addr) {
			t.Run(proxy+"/"+name, func(t *testing.T) {
				near, far := do(t, c, s, j)
				if near.Faults+far.Faults > 0 {
					t.Fatalf("faults: client %q, server %q", near.FaultTexts, far.FaultTexts)
				}
				if near.Flows < j.Flows || near.Done != near.Flows || far.Done != near.Flows || far.Flows != near.Flows {
					t.Errorf("flows: client %d of %d done, server %d of %d", near.Done, near.Flows, far.Done, far.Flows)
				}
				if near.Sent != far.Received || near.Received != far.Sent {
					t.Errorf("bytes: up %d sent, %d received; down %d, %d", near.Sent, far.Received, far.Sent, near.Received)
				}
				if near.Sent+near.Received == 0 {
					t.Error("nothing was sent")
				}
				if (j.Kind == Requests || j.Kind == Connects) && (near.Count == 0 || near.P50 <= 0 || near.P99 < near.P50) {
					t.Errorf("no latencies: %+v", near)
				}
				if j.Kind == Up && far.Rate <= 0 || j.Kind == Down && near.Rate <= 0 {
					t.Errorf("no rate: client %v, server %v", near.Rate, far.Rate)
				}
			})
		}
	}
}

// A proxy that breaks a flow in any way must be found out.
func TestBrokenProxy(t *testing.T) {
	at := func(do func(b []byte, i int) []byte) func([]byte, int64) []byte {
		const offset = 2000 // behind hello and command
		return func(b []byte, o int64) []byte {
			if o <= offset && offset < o+int64(len(b)) {
				return do(b, int(offset-o))
			}
			return b
		}
	}
	var n atomic.Int64
	broken := map[string]func(dst, src *net.TCPConn, up bool){
		"wrong byte":   copyBy(at(func(b []byte, i int) []byte { b[i] ^= 0x10; return b })),
		"lost byte":    copyBy(at(func(b []byte, i int) []byte { return append(b[:i], b[i+1:]...) })),
		"doubled byte": copyBy(at(func(b []byte, i int) []byte { return append(b[:i+1:i+1], b[i:]...) })),
		"cut off":      func(dst, src *net.TCPConn, _ bool) { io.CopyN(dst, src, 2500); dst.CloseWrite() },
		"reset":        func(dst, src *net.TCPConn, _ bool) { io.CopyN(dst, src, 2500); dst.SetLinger(0); dst.Close() },
		"stuck":        func(dst, src *net.TCPConn, _ bool) { io.CopyN(dst, src, 2500) },
		"lost period": copyBy(func(b []byte, o int64) []byte { // at its end, so that no byte is wrong
			if o > 4<<20 && n.Add(1) > 0 && len(b) > 1 {
				return b[:len(b)-1]
			}
			return b
		}),
	}
	for name, relay := range broken {
		t.Run(name, func(t *testing.T) {
			c, s, addr := world(t, relay)
			for _, kind := range []string{"up", "down", "large requests"} {
				if name == "lost period" && kind == "large requests" {
					continue
				}
				j := jobs(addr)[kind]
				j.Limit = 300 * time.Millisecond
				near, far := do(t, c, s, j)
				if near.Faults+far.Faults == 0 && near.Done == far.Done && near.Sent == far.Received && near.Received == far.Sent {
					t.Errorf("%s: not found out: %+v", kind, near)
				}
			}
		})
	}
}

func TestHungFlowsAreNamed(t *testing.T) {
	c, s, addr := world(t, func(dst, src *net.TCPConn, _ bool) { io.Copy(io.Discard, src) })
	j := jobs(addr)["requests"]
	j.Limit = 200 * time.Millisecond
	near, _ := do(t, c, s, j)
	if near.Faults == 0 || !strings.Contains(strings.Join(near.FaultTexts, ""), "20 of 20 flows were not there") &&
		!strings.Contains(strings.Join(near.FaultTexts, ""), "10 of 10 flows were not there") {
		t.Errorf("faults: %d %q", near.Faults, near.FaultTexts)
	}
}
