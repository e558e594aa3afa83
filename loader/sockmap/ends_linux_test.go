package sockmap

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

func TestHalfClose(t *testing.T) {
	l := open(t, nil, 16)
	for _, c := range []struct {
		name        string
		first, last func(*loadertest.Path) (from, to *net.TCPConn)
	}{
		{"downstream first", loadertest.Upward, loadertest.Downward},
		{"upstream first", loadertest.Downward, loadertest.Upward},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
			for i, way := range []func(*loadertest.Path) (from, to *net.TCPConn){c.first, c.last} {
				from, to := way(p)
				if err := loadertest.Send(from, to, uint64(i), 32<<20); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					loadertest.WaitFor(t, func() bool { return l.entry(t).State == sockmapFlowStateFLOW_HALF_CLOSED },
						"the state after the first half")
				}
			}
			if r := p.Wait(loadertest.Patience); r != (loadertest.Result{Up: 32 << 20, Down: 32 << 20, End: prove.EndEOF}) {
				t.Errorf("ended %+v", r)
			}
		})
	}
}

// A FIN in the segment of the last bytes wakes userspace before the verdict has run for them.
func TestFINWithData(t *testing.T) {
	l := open(t, nil, 16)
	for name, way := range loadertest.Ways {
		t.Run(name, func(t *testing.T) {
			for i := range 200 {
				p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
				from, to := way(p)
				data := prove.Pattern(1 + i*37)
				setOption(t, from, unix.TCP_CORK, 1)
				if _, err := from.Write(data); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(from.CloseWrite(), to.CloseWrite()); err != nil {
					t.Fatal(err)
				}
				to.SetDeadline(time.Now().Add(loadertest.Patience))
				got, err := io.ReadAll(to)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%d of %d bytes arrived: %v", len(got), len(data), err)
				}
				if r := p.Wait(loadertest.Patience); r.End != prove.EndEOF {
					t.Fatalf("ended %+v", r)
				}
				p.Client.Close()
				p.Server.Close()
			}
		})
	}
}

func setOption(t testing.TB, c *net.TCPConn, name, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, name, value) })
	if err != nil {
		t.Fatal(err)
	}
}

// A FIN alone runs the verdict with an empty skb; the other direction must go on after it.
func TestFINAlone(t *testing.T) { testFINAlone(t, nil, false) }

func TestRuleFinOff(t *testing.T) {
	r := new(Hooks).Without(ruleFIN)
	testFINAlone(t, r, true)
}

func testFINAlone(t *testing.T, r *Hooks, mustFail bool) {
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	p.Client.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	long := loadertest.Patience
	if mustFail {
		long = 2 * time.Second
	}
	p.Client.SetDeadline(time.Now().Add(long))
	p.Server.SetDeadline(time.Now().Add(long))
	_, err := io.ReadAll(p.Server)
	if err == nil {
		err = loadertest.Send(p.Server, p.Client, 5, 1<<20)
	}
	if mustFail == (err == nil) {
		t.Errorf("after a FIN alone: %v", err)
	}
	t.Logf("after a FIN alone: %v", err)
}

func TestReset(t *testing.T) {
	l := open(t, nil, 16)
	for name, c := range map[string]struct {
		from func(*loadertest.Path) (from, to *net.TCPConn)
		end  string
	}{
		"downstream": {loadertest.Upward, prove.EndDownstreamReset},
		"upstream":   {loadertest.Downward, prove.EndUpstreamReset},
	} {
		for _, kind := range []string{
			"idle", "while it sends", "while it receives", "after it ended its stream",
			"with a reader that stopped",
		} {
			t.Run(name+" "+kind, func(t *testing.T) {
				p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
				from, to := c.from(p)
				stop := make(chan struct{})
				var writing sync.WaitGroup
				push := func(w *net.TCPConn) {
					writing.Add(1)
					go func() {
						defer writing.Done()
						b := make([]byte, 64<<10)
						for {
							select {
							case <-stop:
								return
							default:
							}
							w.SetWriteDeadline(time.Now().Add(loadertest.Patience))
							if _, err := w.Write(b); err != nil {
								return
							}
						}
					}()
				}
				var got int64
				var err error
				read := func(r *net.TCPConn) {
					r.SetReadDeadline(time.Now().Add(loadertest.Patience))
					got, err = io.Copy(io.Discard, struct{ io.Reader }{r})
				}
				switch kind {
				case "while it sends":
					push(from)
				case "while it receives":
					push(to)
				case "after it ended its stream":
					from.CloseWrite()
					read(to) // its end
					if err != nil || got != 0 {
						t.Fatal(got, err)
					}
				case "with a reader that stopped":
					push(from)
				}
				time.Sleep(50 * time.Millisecond)
				start := time.Now()
				from.SetLinger(0)
				from.Close()
				close(stop)
				writing.Wait()
				r := p.Wait(loadertest.Patience)
				if r.End != c.end {
					t.Errorf("ended %+v", r)
				}
				read(to)
				if !errors.Is(err, unix.ECONNRESET) &&
					!(kind == "after it ended its stream" && errors.Is(err, unix.EPIPE)) {
					// After its FIN the stream was read to its end: the reset shows in writing only.
					if _, werr := to.Write([]byte("x")); err != nil ||
						!errors.Is(werr, unix.ECONNRESET) && !errors.Is(werr, unix.EPIPE) {
						t.Errorf("the reset arrived as %v, %v", err, werr)
					}
				}
				t.Logf("%+v after %v, %d bytes read", r, time.Since(start), got)
			})
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// Without the watch a reset of upstream shows nowhere: the client's bytes are acknowledged and thrown away.
func TestRuleResetOff(t *testing.T) {
	r := new(Hooks).Without(ruleReset)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	p.Server.SetLinger(0)
	p.Server.Close()
	p.Client.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err := p.Client.Read(make([]byte, 1)); !isTimeout(err) {
		t.Errorf("the reset arrived without the rule: %v", err)
	}
}

// Without draining, what waits in the backlog when the FIN comes is lost.
func TestRuleDrainOff(t *testing.T) {
	if n := endBehind(t, nil); n != 16<<20 {
		t.Errorf("%d bytes arrived", n)
	}
	r := new(Hooks).Without(ruleDrain)
	if n := endBehind(t, r); n == 16<<20 {
		t.Error("nothing was lost without draining: this test proves nothing")
	}
}

// endBehind sends 16 MiB and the end for a reader that comes late, with a backlog as long as that, and gives
// how much arrives.
func endBehind(t *testing.T, r *Hooks) int64 {
	r = r.Without(ruleBound)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	limit := time.Now().Add(loadertest.Patience)
	p.Client.SetDeadline(limit)
	p.Server.SetDeadline(limit)
	loadertest.Must(t, p.Server.SetReadBuffer(64<<10))
	if _, err := io.Copy(p.Client, io.LimitReader(loadertest.Zeroes{}, 16<<20)); err != nil {
		t.Fatal(err)
	}
	loadertest.Must(t, p.Client.CloseWrite())
	if r.Keeps(ruleDrain) {
		time.Sleep(200 * time.Millisecond) // it must not be over
	} else {
		f := l.onlyFlow(t)
		loadertest.WaitFor(t, func() bool { return f.directions[0].isDone.Load() }, "the end to overtake the backlog")
	}
	n, err := io.Copy(io.Discard, p.Server)
	t.Logf("draining %v: %d bytes arrived, %v", r.Keeps(ruleDrain), n, err)
	return n
}

func TestIdleAndCancel(t *testing.T) {
	l := open(t, nil, 16)
	// A busy machine may be the one that pauses: then a longer timeout shows whether the loader is to blame.
	for idle := 400 * time.Millisecond; ; idle *= 3 {
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Idle: idle})
		var last time.Time
		for range 8 {
			time.Sleep(idle / 4)
			last = time.Now()
			p.Client.Write([]byte("x"))
		}
		r := p.Wait(loadertest.Patience)
		took := time.Since(last)
		if r.End == prove.EndIdle && r.Up == 8 && took > idle*3/4 && took < idle*7/4 {
			break
		}
		if r.End != prove.EndIdle || idle > 10*time.Second {
			t.Fatalf("idle for %v, of %v: ended %+v", took, idle, r)
		}
	}
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	p.Client.Write([]byte("x"))
	loadertest.WaitFor(t, func() bool { up, _ := p.Count(); return up == 1 }, "the byte")
	p.Cancel()
	if r := p.Wait(loadertest.Patience); r.End != prove.EndCanceled || !errors.Is(r.Err, context.Canceled) || r.Up != 1 {
		t.Errorf("ended %+v", r)
	}
	p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
	if _, err := p.Client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a canceled flow is not reset: %v", err)
	}
}
