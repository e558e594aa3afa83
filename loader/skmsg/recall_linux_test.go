package skmsg

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// recalled asks for the flow, and waits for it.
func recalled(t *testing.T, p *loadertest.Path) loadertest.Returned {
	t.Helper()
	p.Recall()
	return returned(t, p)
}

func returned(t *testing.T, p *loadertest.Path) (back loadertest.Returned) {
	t.Helper()
	select {
	case back = <-p.Returned:
	case r := <-p.Ended:
		t.Fatalf("the flow has ended: %+v", r)
	case <-time.After(loadertest.Patience):
		t.Fatal("the flow is not given back")
	}
	return back
}

// carry goes on with a flow that was given back, as userspace does.
func carry(t *testing.T, back loadertest.Returned) {
	t.Helper()
	var conns [2]*net.TCPConn
	for i, fd := range back.Sockets {
		file := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(file)
		loadertest.Must(t, errors.Join(err, file.Close()))
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.TCPConn)
	}
	for i, from := range conns {
		go func() {
			to := conns[1-i]
			if _, err := to.Write(back.Rest[i]); err != nil {
				return
			}
			if _, err := io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from}); err == nil {
				to.CloseWrite()
			}
		}()
	}
}

// finish ends both streams of a flow that is carried.
func finish(t *testing.T, p *loadertest.Path) {
	t.Helper()
	loadertest.Must(t, errors.Join(loadertest.Send(p.Client, p.Server, 7, 100_000), loadertest.Send(p.Server, p.Client, 8, 100_000)))
}

// becomeRecallable gives a flow that has been past TCP both ways.
func becomeRecallable(t *testing.T, h *sockmap.Hooks, network string) (*Local, *loadertest.Path) {
	t.Helper()
	n := openLocal(t, h)
	ln, _ := cgroup.Listen(t, network)
	p := loadertest.BecomeLocal(t, n, ln)
	loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 2000))
	if at := onlyProcess(t, n); at.Moved(0) != 1000 || at.Moved(1) != 2000 {
		t.Fatalf("%d and %d bytes went past TCP", at.Moved(0), at.Moved(1))
	}
	end := time.Now().Add(loadertest.Patience)
	loadertest.Must(t, errors.Join(p.Client.SetDeadline(end), p.Server.SetDeadline(end)))
	return n, p
}

// A flow that is idle is given back, with nothing left of it, and the process's socket is one like any other.
func TestLocalRecallIdle(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			n, p := becomeRecallable(t, nil, network)
			at := onlyProcess(t, n)
			back := recalled(t, p)
			if back.Up != 1000 || back.Down != 2000 || len(back.Rest[0])+len(back.Rest[1]) > 0 {
				t.Errorf("%+v", back)
			}
			var cookie uint64
			if err := n.objects.Locals.Lookup(at.pair, &cookie); err == nil {
				t.Error("the process's socket is in its map")
			}
			carry(t, back)
			finish(t, p)
			loadertest.WaitFor(t, func() bool { return *n.flowAt(at.slot) == skmsgLocal{} }, "the slot to be free")
		})
	}
}

// flowAt is a flow of the map.
func (n *Local) flowAt(slot uint32) *skmsgLocal { return &n.flows[slot] }

// A flow is given back in the middle of what it moves, and each byte comes in its place.
func TestLocalRecallTalking(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			_, p := becomeRecallable(t, nil, network)
			go io.Copy(struct{ io.Writer }{p.Server}, struct{ io.Reader }{p.Server})
			hands := make(chan bool)
			talked := make(chan error, 1)
			go func() {
				for i := 0; ; i++ {
					word := fmt.Appendf(nil, "word %d;", i)
					if _, err := p.Client.Write(word); err != nil {
						talked <- err
						return
					}
					if err := prove.Expect(p.Client, word); err != nil {
						talked <- fmt.Errorf("word %d: %w", i, err)
						return
					}
					select {
					case <-hands:
						talked <- nil
						return
					default:
					}
				}
			}()
			carry(t, recalled(t, p))
			time.Sleep(20 * time.Millisecond) // words
			close(hands)
			loadertest.Must(t, <-talked)
		})
	}
}

// A process that waits in a read while its flow is given back gets what comes after it.
func TestLocalRecallReader(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			_, p := becomeRecallable(t, nil, network)
			read := readOne(t, p.Server)
			carry(t, recalled(t, p))
			_, err := p.Client.Write([]byte("hello"))
			loadertest.Must(t, err)
			if got := <-read; got != "hello" {
				t.Errorf("it has read %q", got)
			}
		})
	}
}

// isReading reports whether a thread of this process waits in read(2).
func isReading(t *testing.T, thread int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", thread))
	loadertest.Must(t, err)
	return bytes.HasPrefix(b, fmt.Appendf(nil, "%d ", unix.SYS_READ))
}

func TestLocalRecallBulk(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			for round := range 3 {
				_, p := becomeRecallable(t, nil, network)
				const size = 32 << 20
				sent := make(chan error, 2)
				go func() { sent <- loadertest.SendPart(p.Client, p.Server, uint64(round), size) }()
				go func() { sent <- loadertest.SendPart(p.Server, p.Client, uint64(round+100), size) }()
				loadertest.WaitFor(t, func() bool {
					up, down := p.Count()
					return up > int64(round)<<22 && down > int64(round)<<22
				}, "the flow to move")
				carry(t, recalled(t, p))
				loadertest.Must(t, errors.Join(<-sent, <-sent))
				finish(t, p)
			}
		})
	}
}

// A flow of which half has ended goes on with the other half.
func TestLocalRecallHalf(t *testing.T) {
	for name, way := range loadertest.Ways {
		t.Run(name, func(t *testing.T) {
			_, p := becomeRecallable(t, nil, "tcp4")
			from, to := way(p)
			loadertest.Must(t, loadertest.Send(from, to, 1, 10_000))
			carry(t, recalled(t, p))
			loadertest.Must(t, loadertest.Send(to, from, 2, 1<<20))
		})
	}
}

// While the process has not read what went past TCP, the flow stays, and goes on: what it had not read would
// be lost.
func TestLocalRecallUnread(t *testing.T) {
	for _, network := range loadertest.Networks() {
		for _, on := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, rule %v", network, on), func(t *testing.T) {
				var h *sockmap.Hooks
				if !on {
					h = h.Without(ruleLocalLeave)
				}
				n, p := becomeRecallable(t, h, network)
				at := onlyProcess(t, n)
				data := prove.Pattern(20_000)
				_, err := p.Client.Write(data)
				loadertest.Must(t, err)
				loadertest.WaitFor(t, func() bool {
					answer, err := at.query(skmsgLocalRequestLOCAL_LOOK, 0)
					return at.Moved(0) == 21_000 && answer&skmsgLocalAnswerLOCAL_BACKLOG == 0 && err == nil
				}, "the bytes to reach the process's queue")
				if !on {
					carry(t, recalled(t, p))
					loadertest.Must(t, p.Client.CloseWrite())
					got, err := io.ReadAll(p.Server)
					t.Logf("without the rule %d of %d bytes come, %v", len(got), len(data), err)
					if bytes.Equal(got, data) {
						t.Error("without the rule all arrived too: it is not needed, or the test is wrong")
					}
					return
				}
				p.Recall()
				for side := range uint32(2) {
					loadertest.WaitFor(t, func() bool { return !isSource(n, 2*at.slot+side) }, "a direction to leave")
				}
				more := prove.Pattern(3000) // by TCP, behind the rest
				_, err = p.Client.Write(more)
				loadertest.Must(t, err)
				_, err = p.Server.Write(more)
				loadertest.Must(t, errors.Join(err, prove.Expect(p.Client, more)))
				select {
				case back := <-p.Returned:
					t.Fatalf("it was given back: %+v", back)
				case <-time.After(100 * time.Millisecond):
				}
				loadertest.Must(t, prove.Expect(p.Server, append(data, more...)))
				carry(t, returned(t, p))
				finish(t, p)
			})
		}
	}
}

// A process that closes its socket with bytes unread resets the other side, also while its flow is to be given
// back and nobody has told yet how it was closed.
func TestLocalRecallClosed(t *testing.T) {
	n, p := becomeRecallable(t, &sockmap.Hooks{Window: 700 * time.Millisecond}, "tcp4")
	at := onlyProcess(t, n)
	_, err := p.Client.Write(prove.Pattern(1000))
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool {
		answer, err := at.query(skmsgLocalRequestLOCAL_LOOK, 0)
		return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
	}, "the bytes to reach the process's queue")
	p.Recall()
	for side := range uint32(2) {
		loadertest.WaitFor(t, func() bool { return !isSource(n, 2*at.slot+side) }, "a direction to leave")
	}
	loadertest.Must(t, p.Server.Close())
	if _, err = p.Client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client is told: %v", err)
	}
	select {
	case back := <-p.Returned:
		t.Errorf("it was given back: %+v", back)
	default:
	}
}

// isSource reports whether a direction's source gets the verdict.
func isSource(n *Local, index uint32) bool {
	var cookie uint64
	return n.objects.LocalSources.Lookup(index, &cookie) == nil
}

// A redirect that waits for room is waited for: it would fail if downstream were gone.
func TestLocalRecallWaits(t *testing.T) {
	p := cutShort(t, nil, "tcp4")
	file, err := p.Server.File()
	loadertest.Must(t, err)
	defer file.Close()
	loadertest.Must(t, unix.SetNonblock(int(file.Fd()), false))
	data, sent := prove.Pattern(1<<20), make(chan error, 1)
	go func() {
		_, err := unix.Write(int(file.Fd()), data)
		sent <- err
	}()
	loadertest.WaitFor(t, func() bool { return p.lacks(t) }, "a redirect to wait")
	p.Recall()
	for side := range uint32(2) {
		loadertest.WaitFor(t, func() bool { return !isSource(p.n, 2*p.at.slot+side) }, "a direction to leave")
	}
	h := halfOf(t, p.n, 2*p.at.slot+1)
	answer, err := p.at.query(skmsgLocalRequestLOCAL_SETTLE, uint32(h.Redirected+h.Consumed))
	if loadertest.Must(t, err); answer&skmsgLocalAnswerLOCAL_SETTLED != 0 || !p.lacks(t) {
		t.Error("what waits was taken for what failed")
	}
	select {
	case back := <-p.Returned:
		t.Fatalf("it was given back: %+v", back)
	case err := <-sent:
		t.Fatalf("the process is told %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	got := make(chan error, 1)
	go func() { got <- prove.Expect(p.Client, data) }()
	carry(t, returned(t, p.Path))
	loadertest.Must(t, errors.Join(<-got, <-sent))
}

// After a redirect that was cut short the flow is given back, too.
func TestLocalRecallCutShort(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			p := cutShort(t, nil, network)
			data, sent := prove.Pattern(1<<20), make(chan error, 1)
			go func() {
				_, err := p.Server.Write(data)
				sent <- err
			}()
			loadertest.WaitFor(t, func() bool { return p.lacks(t) }, "a redirect to be cut short")
			p.Recall()
			got := make(chan error, 1)
			go func() { got <- prove.Expect(p.Client, data) }()
			carry(t, returned(t, p.Path))
			loadertest.Must(t, errors.Join(<-got, <-sent))
		})
	}
}

// spliceAgain gives a flow that was given back to n, as soon as that takes it.
func spliceAgain(t *testing.T, n *Local, p *loadertest.Path, back loadertest.Returned) {
	t.Helper()
	o := sockmap.Flow{ID: "again", Buffer: 1 << 20, Up: back.Up, Down: back.Down,
		Ended: func(up, down int64, end string, err error) {
			p.Ended <- loadertest.Result{Up: up, Down: down, End: end, Err: err}
		},
		Recallable: func(recall func()) { p.Recall = recall },
		Returned: func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, _ time.Time, _ func(), _ error) {
			p.Returned <- loadertest.Returned{Sockets: [2]int{down, up}, Rest: [2][]byte{downRest, upRest}, Up: upBytes, Down: downBytes}
		}}
	loadertest.WaitFor(t, func() bool {
		count, err := n.Splice(t.Context(), back.Sockets[0], back.Sockets[1], o)
		var again later
		if err != nil && !errors.As(err, &again) {
			t.Fatal(err)
		}
		if err == nil {
			p.Count = count
		}
		return err == nil
	}, "the flow to be taken again")
}

// A flow that was given back goes past TCP again, by the same daemon and by the next one, and again.
func TestLocalCapturedLate(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			n, p := becomeRecallable(t, nil, network)
			next := openLocal(t, nil)
			for i, n := range []*Local{n, next, next, n} {
				before := [2]int64{1000 + 6000*int64(i), 2000 + 6000*int64(i)}
				back := recalled(t, p)
				if back.Up != before[0] || back.Down != before[1] || len(back.Rest[0])+len(back.Rest[1]) > 0 {
					t.Fatalf("round %d: %+v", i, back)
				}
				spliceAgain(t, n, p, back)
				for range 2 {
					loadertest.Must(t, loadertest.ExchangeBytes(p, 3000, 3000))
				}
				if at := onlyProcess(t, n); at.Moved(0) != 3000 || at.Moved(1) != 6000 { // the first by TCP
					t.Errorf("round %d: %d and %d bytes went past TCP", i, at.Moved(0), at.Moved(1))
				}
			}
			loadertest.Must(t, errors.Join(loadertest.Send(p.Client, p.Server, 7, 1<<20), loadertest.Send(p.Server, p.Client, 8, 1<<20)))
			if r := p.Wait(loadertest.Patience); r != (loadertest.Result{Up: 25_000 + 1<<20, Down: 26_000 + 1<<20, End: prove.EndEOF}) {
				t.Errorf("ended %+v", r)
			}
		})
	}
}

// A process that waits in TCP's read while its socket is captured is woken by what comes next, which goes by
// TCP.
func TestLocalCapturedLateReader(t *testing.T) {
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprintf("rule %v", on), func(t *testing.T) {
			var h *sockmap.Hooks
			if !on {
				h = h.Without(ruleLocalLate)
			}
			n, p := becomeRecallable(t, h, "tcp4")
			back := recalled(t, p)
			read := readOne(t, p.Server)
			spliceAgain(t, n, p, back)
			_, err := p.Client.Write([]byte("hello"))
			loadertest.Must(t, err)
			select {
			case got := <-read:
				if got != "hello" || !on {
					t.Errorf("it has read %q", got)
				}
				_, err := p.Client.Write([]byte("again"))
				loadertest.Must(t, errors.Join(err, prove.Expect(p.Server, []byte("again"))))
				if at := onlyProcess(t, n); at.Moved(0) != 5 {
					t.Errorf("%d bytes went past TCP", at.Moved(0))
				}
			case <-time.After(map[bool]time.Duration{true: loadertest.Patience, false: time.Second}[on]):
				if on {
					t.Error("it reads nothing")
				}
				loadertest.Must(t, p.Client.CloseWrite()) // which wakes it
				<-read
			}
		})
	}
}

// While a process waits in a read of its socket as it was, that can't be captured anew. With what comes it can.
func TestLocalCapturedLateHeld(t *testing.T) {
	n, p := becomeRecallable(t, nil, "tcp4")
	read := readOne(t, p.Server)
	back := recalled(t, p)
	var again later
	_, err := n.Splice(t.Context(), back.Sockets[0], back.Sockets[1], sockmap.Flow{Buffer: 1 << 20})
	if !errors.As(err, &again) || again != refusedHeld {
		t.Errorf("it was taken, or %v", err)
	}
	_, err = unix.Write(back.Sockets[1], []byte("hello"))
	loadertest.Must(t, err)
	if got := <-read; got != "hello" {
		t.Errorf("it has read %q", got)
	}
	back.Up += 5
	spliceAgain(t, n, p, back)
	loadertest.Must(t, loadertest.ExchangeBytes(p, 3000, 3000))
}

// A process that has SO_RCVLOWAT above 1 by then is left to TCP, which wakes it.
func TestLocalCapturedLateLowat(t *testing.T) {
	n, p := becomeRecallable(t, nil, "tcp4")
	back := recalled(t, p)
	for _, fd := range back.Sockets {
		defer unix.Close(fd)
	}
	raw, err := p.Server.SyscallConn()
	loadertest.Must(t, err)
	loadertest.Must(t, raw.Control(func(fd uintptr) {
		loadertest.Must(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, 10))
	}))
	_, err = n.Splice(t.Context(), back.Sockets[0], back.Sockets[1], sockmap.Flow{Buffer: 1 << 20})
	if !errors.Is(err, refusedNotCaptured) {
		t.Errorf("it was taken, or %v", err)
	}
}

// readOne has a thread wait in a read of c, and gives what that reads.
func readOne(t *testing.T, c *net.TCPConn) <-chan string {
	t.Helper()
	file, err := c.File()
	loadertest.Must(t, err)
	t.Cleanup(func() { file.Close() })
	fd := int(file.Fd())
	loadertest.Must(t, unix.SetNonblock(fd, false))
	read, waits := make(chan string, 1), make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		waits <- unix.Gettid()
		b := make([]byte, 100)
		n, err := unix.Read(fd, b)
		if err != nil {
			read <- err.Error()
			return
		}
		read <- string(b[:n])
	}()
	thread := <-waits
	loadertest.WaitFor(t, func() bool { return isReading(t, thread) }, "the process to wait")
	return read
}
