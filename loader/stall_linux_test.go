package loader

import (
	"net"
	"testing"
	"time"
)

// The sweep finds what an event should have told of, and counts it: without the events a slow reader gets all the same, but late.
func TestStallOfCopying(t *testing.T) {
	r := allRules
	r.events = false
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{buffer: 256 << 10})
	data := pattern(24 << 20) // more than the buffers that a reader leaves full
	go func() { p.client.Write(data); p.client.CloseWrite() }()
	for s := (snapshot{}); ; time.Sleep(20 * time.Millisecond) { // until it comes to rest
		now := l.live[firstLive(l)].Load().halves[0].snapshot()
		if now == s && now.passed > 0 {
			break
		}
		s = now
	}
	p.server.SetDeadline(time.Now().Add(60 * time.Second))
	must(t, expect(p.server, data))
	wantStalls(t, l)
}

// The sweep makes the verdict run for what the kernel has kept it from: here what was queued before, without a kick.
func TestStallOfTheVerdict(t *testing.T) {
	r := allRules
	r.kick = false
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{before: func(client, _, _, _ *net.TCPConn) {
		client.Write([]byte("hello"))
		time.Sleep(20 * time.Millisecond)
	}})
	p.server.SetDeadline(time.Now().Add(20 * time.Second))
	must(t, expect(p.server, []byte("hello")))
	wantStalls(t, l)
}

func wantStalls(t *testing.T, l *Loader) {
	for end := time.Now().Add(5 * time.Second); l.Stats().Stalls == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no stall was counted: %+v", l.Stats())
		}
	}
}
