package sockmap

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// The sweep finds what an event should have told of, and counts it: without the events a slow reader gets all
// the same, but late.
func TestStallOfCopying(t *testing.T) {
	r := new(Hooks).Without(ruleEvents)
	p, l := stalling(t, r)
	go p.push()
	d := &l.onlyFlow(t).directions[0]
	// Until it comes to rest, with bytes to copy and no room for them.
	for s := (snapshot{}); ; time.Sleep(100 * time.Millisecond) {
		now := d.snapshot()
		if now == s && now.passed != load64(&d.shared().Consumed) {
			break
		}
		s = now
	}
	p.arrives(t, l)
}

// TestStallOfLeaving: so does a direction that has left.
func TestStallOfLeaving(t *testing.T) {
	r := new(Hooks).Without(ruleEvents)
	p, l := stalling(t, r)
	detachOne(t, l, l.onlyFlow(t), 0)
	go p.push()
	p.arrives(t, l)
}

type stalled struct {
	*loadertest.Path
	data []byte // on its way up
}

func stalling(t *testing.T, r *Hooks) (stalled, *Engine) {
	l := open(t, r, 16)
	// A stall may be told of when the test is over.
	l.log = slog.New(slog.DiscardHandler)
	// These are more than the buffers that a reader leaves full.
	return stalled{loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 256 << 10, Busy: 1 << 40}), prove.Pattern(24 << 20)}, l
}

func (p stalled) push() { p.Client.Write(p.data); p.Client.CloseWrite() }

func (p stalled) arrives(t *testing.T, l *Engine) {
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience)) // each stall takes seconds
	loadertest.Must(t, prove.Expect(p.Server, p.data))
	wantStalls(t, l)
}

// The sweep makes the verdict run for what the kernel has kept it from: here what was queued before, without
// a kick.
func TestStallOfTheVerdict(t *testing.T) {
	r := new(Hooks).Without(ruleKick)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, _, _, _ *net.TCPConn) {
		client.Write([]byte("hello"))
		time.Sleep(20 * time.Millisecond)
	}})
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
	wantStalls(t, l)
}

func wantStalls(t *testing.T, l *Engine) {
	for end := time.Now().Add(loadertest.Patience); l.stalls() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no stall was counted")
		}
	}
}

// What a direction waits for stays watched when the flow begins: on another CPU it may be woken and come to
// rest before.
func TestBeginKeepsWhatIsWatched(t *testing.T) {
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	f := l.live[firstLive(l)].Load()
	for i := range f.directions { // nobody takes away what is watched
		f.directions[i].bits.Store(isRunning)
	}
	f.watchFor(0, unix.EPOLLIN, true)
	f.watchFor(1, unix.EPOLLOUT, true)
	f.wakeAll()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.poller().fd))
	loadertest.Must(t, err)
	for side, want := range []uint32{baseEvents | unix.EPOLLIN, baseEvents | unix.EPOLLOUT} {
		found := false
		for line := range strings.Lines(string(b)) { // tfd:        9 events: 80002001 data: ...
			var fd int
			var events uint32
			if n, _ := fmt.Sscanf(line, "tfd: %d events: %x", &fd, &events); n == 2 &&
				fd == int(f.sockets[side]) {
				found = true
				if events&^(unix.EPOLLERR|unix.EPOLLHUP) != want { // which epoll always adds
					t.Errorf("side %d is watched for %x, not for %x", side, events, want)
				}
			}
		}
		if !found {
			t.Errorf("side %d is not watched:\n%s", side, b)
		}
	}
	for i := range f.directions {
		f.directions[i].bits.Store(0)
		f.directions[i].wake(0)
	}
	loadertest.Must(t, loadertest.BothWays(p, 1<<20))
}

// behind makes a flow whose upward direction is passing, with 24 MiB in front of what is passed, for a client
// that does not read.
func behind(t *testing.T, r *Hooks) (*Engine, *loadertest.Path, []byte) {
	r = r.Without(ruleBound) // so that there is a backlog
	l := open(t, r, 16)
	data := prove.Pattern(24 << 20)
	var p *loadertest.Path
	// Where TCP is short of memory, which others use too, the kernel may not take as much.
	for try := 1; ; try++ {
		p = loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 1 << 20})
		loadertest.Must(t, p.Server.SetWriteDeadline(time.Now().Add(loadertest.Patience/3)))
		n, err := p.Server.Write(data)
		if err == nil {
			break
		}
		if try == 5 {
			t.Fatalf("only %d bytes were taken for a reader that does not read: %v", n, err)
		}
		p.Cancel()
		p.Wait(loadertest.Patience)
	}
	loadertest.Must(t, p.Server.SetWriteDeadline(time.Time{}))
	d := &l.onlyFlow(t).directions[0]
	pretendConsumed(d, 1<<62) // the verdict passes, since passed is something else
	_, err := p.Client.Write([]byte("hello"))
	loadertest.Must(t, err)
	for end := time.Now().Add(loadertest.Patience); d.snapshot().passed == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing was passed")
		}
	}
	pretendConsumed(d, 0)
	d.wake(0) // the verdict has rung, but for another number
	return l, p, data
}

// Bytes that userspace has to copy get past those that wait in front of them, in the same queue of the
// kernel's, for a reader that has stopped: each way goes on without the other.
func TestBacklogOfTheOtherWay(t *testing.T) {
	l, p, data := behind(t, nil)
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
	p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
	loadertest.Must(t, prove.Expect(p.Client, data))
	loadertest.Must(t, errors.Join(loadertest.Send(p.Client, p.Server, 1, 1<<20), loadertest.Send(p.Server, p.Client, 2, 1<<20)))
	if n := l.stalls(); n != 0 {
		t.Errorf("%d stalls", n)
	}
}

// Where a store of the verdict's may be seen late, and it may see one of a direction late, so that it does
// not ring, the direction looks once more when it has copied: also what it did not have in its usual buffer.
func TestLooksAgainAfterACopy(t *testing.T) {
	for name, take := range map[string]func(d *direction){
		"read":          func(*direction) {},
		"read to leave": func(d *direction) { loadertest.Must(t, d.takeInHand(1000)) },
	} {
		t.Run(name, func(t *testing.T) {
			looks := make(chan func(), 100)
			r := (&Hooks{again: func(look func()) { looks <- look }}).Without(ruleSweep)
			l := open(t, r, 16)
			p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
			d := &l.onlyFlow(t).directions[0]
			loadertest.Must(t, p.Server.SetDeadline(time.Now().Add(loadertest.Patience)))
			// passes sends what the verdict passes, and does not ring for.
			passes := func(b []byte) {
				passed, consumed := d.snapshot().passed, d.consumed
				pretendConsumed(d, 1<<62)
				_, err := p.Client.Write(b)
				loadertest.Must(t, err)
				passed += uint64(len(b))
				loadertest.WaitFor(t, func() bool { return d.snapshot().passed == passed }, "bytes to be passed")
				pretendConsumed(d, consumed)
			}
			d.bits.Store(isRunning) // it is this test that is
			data := prove.Pattern(1000)
			passes(data)
			loadertest.WaitFor(t, d.source().readable, "bytes to be read")
			take(d)
			d.run()
			loadertest.Must(t, prove.Expect(p.Server, data))
			if len(looks) == 0 {
				t.Fatal("it does not look again")
			}
			passes([]byte("hello"))
			(<-looks)()
			loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
		})
	}
}

// While a direction may leave, the verdict is kept from what comes: that is no stall.
func TestHeldIsNoStall(t *testing.T) {
	r := new(Hooks).Without(ruleSweep) // nobody looks but this test
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 1 << 40})
	loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 1000))
	d := &l.onlyFlow(t).directions[0]
	d.offer.Store(&offer{isOver: true})
	d.source().hold()
	before, err := d.source().received()
	loadertest.Must(t, err)
	_, err = p.Client.Write([]byte("hello"))
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool { n, err := d.source().received(); return n > before || err != nil }, "the bytes to come")
	if n := d.handled(); n != 1000 {
		t.Fatalf("%d bytes were handled: this test proves nothing", n)
	}
	d.wasChecked = true
	d.checkVerdict()
	if d.wasChecked {
		t.Error("nobody looks again")
	}
	d.source().kick()
	d.offer.Store(nil)
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
	if n := l.stalls(); n != 0 {
		t.Errorf("%d stalls", n)
	}
}

// A direction that has stalled is found while the other one moves.
func TestStallWhileTheOtherWayMoves(t *testing.T) {
	for _, network := range loadertest.Networks() {
		r := new(Hooks).Without(ruleKick)
		l := open(t, r, 16)
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Network: network, Before: func(client, _, down, _ *net.TCPConn) {
			client.Write([]byte("hello"))
			raw, err := down.SyscallConn()
			loadertest.Must(t, err)
			loadertest.Must(t, raw.Read(func(fd uintptr) bool {
				_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
				return err == nil
			}))
		}})
		back := *p
		back.Client, back.Server = p.Server, p.Client
		loadertest.Chatter(t, &back)
		loadertest.Must(t, p.Server.SetReadDeadline(time.Now().Add(20*time.Second)))
		loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
		wantStalls(t, l)
	}
}

// pretendConsumed has the verdict believe that so many of the passed bytes were copied.
// +checklocksignore
func pretendConsumed(d *direction, n uint64) { atomic.StoreUint64(&d.shared().Consumed, n) }
