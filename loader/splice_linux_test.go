package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/wire"
)

func TestBothWays(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			l := open(t, allRules, 16)
			p := splicePath(t, l, pathOptions{network: network})
			const n = 256 << 20
			start := time.Now()
			if err := bothWays(p, n); err != nil {
				t.Fatal(err)
			}
			t.Logf("%v %+v", time.Since(start), l.Stats())
		})
	}
}

// bothWays sends n bytes each way at once, ends both streams, and checks hashes, counts and the end.
func bothWays(p *path, n int64) error {
	up, down := make(chan error, 1), make(chan error, 1)
	go func() { up <- send(p.client, p.server, 1, n) }()
	go func() { down <- send(p.server, p.client, 2, n) }()
	if err := errors.Join(<-up, <-down); err != nil {
		return err
	}
	if r := p.wait(5 * time.Second); r != (result{up: n, down: n, end: endEOF}) {
		return fmt.Errorf("ended %+v", r)
	}
	if u, d := p.count(); u != n || d != n {
		return fmt.Errorf("counted %d and %d after the end", u, d)
	}
	return nil
}

func TestHalfClose(t *testing.T) {
	l := open(t, allRules, 16)
	for _, c := range []struct {
		name        string
		first, last func(*path) (from, to *net.TCPConn)
	}{
		{"downstream first", upward, downward},
		{"upstream first", downward, upward},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := splicePath(t, l, pathOptions{})
			for i, way := range []func(*path) (from, to *net.TCPConn){c.first, c.last} {
				from, to := way(p)
				if err := send(from, to, uint64(i), 32<<20); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					time.Sleep(20 * time.Millisecond)
					if s := l.Flows()[0].State; s != "half_closed" {
						t.Errorf("state %q after the first half", s)
					}
				}
			}
			if r := p.wait(5 * time.Second); r != (result{up: 32 << 20, down: 32 << 20, end: endEOF}) {
				t.Errorf("ended %+v", r)
			}
		})
	}
}

func upward(p *path) (from, to *net.TCPConn)   { return p.client, p.server }
func downward(p *path) (from, to *net.TCPConn) { return p.server, p.client }

var ways = map[string]func(*path) (from, to *net.TCPConn){"up": upward, "down": downward}

// A FIN in the segment of the last bytes wakes userspace before the verdict has run for them.
func TestFINWithData(t *testing.T) {
	l := open(t, allRules, 16)
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			for i := range 200 {
				p := splicePath(t, l, pathOptions{})
				from, to := way(p)
				data := pattern(1 + i*37)
				setOption(t, from, unix.TCP_CORK, 1)
				if _, err := from.Write(data); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(from.CloseWrite(), to.CloseWrite()); err != nil {
					t.Fatal(err)
				}
				to.SetDeadline(time.Now().Add(3 * time.Second))
				got, err := io.ReadAll(to)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%d of %d bytes arrived: %v", len(got), len(data), err)
				}
				if r := p.wait(5 * time.Second); r.end != endEOF {
					t.Fatalf("ended %+v", r)
				}
				p.client.Close()
				p.server.Close()
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
func TestFINAlone(t *testing.T) { testFINAlone(t, allRules, false) }

func TestRuleFinOff(t *testing.T) {
	r := allRules
	r.fin = false
	testFINAlone(t, r, true)
}

func testFINAlone(t *testing.T, r rules, mustFail bool) {
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{})
	p.client.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	p.client.SetDeadline(time.Now().Add(2 * time.Second))
	p.server.SetDeadline(time.Now().Add(2 * time.Second))
	_, err := io.ReadAll(p.server)
	if err == nil {
		err = send(p.server, p.client, 5, 1<<20)
	}
	if mustFail == (err == nil) {
		t.Errorf("after a FIN alone: %v", err)
	}
	t.Logf("after a FIN alone: %v", err)
}

func TestReset(t *testing.T) {
	l := open(t, allRules, 16)
	for name, c := range map[string]struct {
		from func(*path) (from, to *net.TCPConn)
		end  string
	}{
		"downstream": {upward, endDownstreamReset},
		"upstream":   {downward, endUpstreamReset},
	} {
		for _, kind := range []string{"idle", "while it sends", "while it receives", "after it ended its stream", "with a reader that stopped"} {
			t.Run(name+" "+kind, func(t *testing.T) {
				p := splicePath(t, l, pathOptions{})
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
							w.SetWriteDeadline(time.Now().Add(time.Second))
							if _, err := w.Write(b); err != nil {
								return
							}
						}
					}()
				}
				var got int64
				var err error
				read := func(r *net.TCPConn) {
					r.SetReadDeadline(time.Now().Add(5 * time.Second))
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
				r := p.wait(4 * time.Second)
				if r.end != c.end {
					t.Errorf("ended %+v", r)
				}
				read(to)
				if !errors.Is(err, unix.ECONNRESET) && !(kind == "after it ended its stream" && errors.Is(err, unix.EPIPE)) {
					// After its FIN the stream was read to its end: the reset shows in writing only.
					if _, werr := to.Write([]byte("x")); err != nil || !errors.Is(werr, unix.ECONNRESET) && !errors.Is(werr, unix.EPIPE) {
						t.Errorf("the reset arrived as %v, %v", err, werr)
					}
				}
				t.Logf("%+v after %v, %d bytes read", r, time.Since(start), got)
			})
		}
	}
}

// A reader that stops holds the sender up; nothing is lost when it goes on.
func TestReaderStops(t *testing.T) {
	l := open(t, allRules, 16)
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			p := splicePath(t, l, pathOptions{buffer: 256 << 10})
			from, to := way(p)
			const n = 96 << 20
			done := make(chan error, 1)
			slow := &pausing{r: to, at: []int64{0, 1 << 20, 40 << 20}, pause: 700 * time.Millisecond}
			go func() {
				hash, err := stream(from, 9, n)
				from.CloseWrite()
				got, m, rerr := [32]byte{}, int64(0), error(nil)
				<-slow.ended
				got, m, rerr = slow.hash, slow.n, slow.err
				if err == nil && (rerr != nil || m != n || got != hash) {
					err = fmt.Errorf("%d of %d bytes, the same %v, %v", m, n, got == hash, rerr)
				}
				done <- err
			}()
			slow.run()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			f := l.Flows()
			if len(f) != 1 || f[0].UpCopied+f[0].DownCopied == 0 {
				t.Errorf("nothing was copied: %+v", f)
			}
		})
	}
}

type pausing struct {
	r     *net.TCPConn
	at    []int64
	pause time.Duration
	ended chan struct{}
	hash  [32]byte
	n     int64
	err   error
}

func (p *pausing) run() {
	p.ended = make(chan struct{})
	defer close(p.ended)
	p.hash, p.n, p.err = drain(p)
}

func (p *pausing) Read(b []byte) (int, error) {
	if len(p.at) > 0 && p.n >= p.at[0] {
		p.at = p.at[1:]
		time.Sleep(p.pause)
	}
	n, err := p.r.Read(b)
	p.n += int64(n)
	return n, err
}

func TestOneByteSegments(t *testing.T) {
	l := open(t, allRules, 16)
	p := splicePath(t, l, pathOptions{})
	data := pattern(20000)
	go func() {
		for i := range data {
			if _, err := p.client.Write(data[i : i+1]); err != nil {
				return
			}
		}
		p.client.CloseWrite()
	}()
	p.server.SetDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(p.server)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes: %v", len(got), len(data), err)
	}
}

// Bytes that came before the splice, unread, read in part, and read to the end.
func TestSenderIsEarly(t *testing.T) {
	l := open(t, allRules, 16)
	for _, c := range []struct{ sent, read int }{{1, 0}, {16, 6}, {100000, 0}, {100000, 1}, {100000, 99999}, {100000, 100000}, {1 << 20, 70000}} {
		t.Run(fmt.Sprintf("%d read of %d", c.read, c.sent), func(t *testing.T) {
			data := pattern(c.sent)
			p := splicePath(t, l, pathOptions{before: func(client, _, down, _ *net.TCPConn) {
				go client.Write(data)
				if err := expect(down, data[:c.read]); err != nil {
					t.Fatal(err)
				}
				if c.read == 0 {
					time.Sleep(20 * time.Millisecond)
				}
			}})
			p.server.SetDeadline(time.Now().Add(3 * time.Second))
			if err := expect(p.server, data[c.read:]); err != nil {
				t.Error(err)
			}
			if up, _ := p.count(); up != int64(c.sent-c.read) {
				t.Errorf("counted %d", up)
			}
		})
	}
}

func TestRuleKickOff(t *testing.T) {
	r := allRules
	r.kick, r.look = false, false
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{before: func(client, _, _, _ *net.TCPConn) {
		client.Write([]byte("hello"))
		time.Sleep(20 * time.Millisecond)
	}})
	p.server.SetDeadline(time.Now().Add(time.Second))
	if _, err := p.server.Read(make([]byte, 5)); !isTimeout(err) {
		t.Errorf("without a kick the queued bytes arrived anyhow: %v", err)
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// Without the watch a reset of upstream shows nowhere: the client's bytes are acknowledged and thrown away.
func TestRuleResetOff(t *testing.T) {
	r := allRules
	r.reset = false
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{})
	p.server.SetLinger(0)
	p.server.Close()
	p.client.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err := p.client.Read(make([]byte, 1)); !isTimeout(err) {
		t.Errorf("the reset arrived without the rule: %v", err)
	}
}

// Without draining, what waits in the backlog when the FIN comes is lost.
func TestRuleDrainOff(t *testing.T) {
	r := allRules
	r.drain = false
	l := open(t, r, 16)
	lost := 0
	for i := 0; i < 300 && lost == 0; i++ {
		p := splicePath(t, l, pathOptions{})
		p.client.SetDeadline(time.Now().Add(3 * time.Second))
		p.server.SetDeadline(time.Now().Add(3 * time.Second))
		if err := send(p.client, p.server, 3, 1<<20); err != nil {
			t.Logf("flow %d: %v", i, err)
			lost++
		}
		p.client.Close()
		p.server.Close()
		p.wait(5 * time.Second)
	}
	if lost == 0 {
		t.Error("nothing was lost without draining: this test proves nothing")
	}
}

// Without the trim all that overlaps on the wire comes out damaged, and with it nothing does.
func TestWire(t *testing.T) {
	needRoot(t)
	r := allRules
	r.trim = false
	n, trims, not := wire.New(t), open(t, allRules, 64), open(t, r, 64)
	for _, k := range wire.Cases() {
		t.Run(k.Name, func(t *testing.T) {
			try := func(l *Loader) error {
				c, down := n.Connect(t)
				up, server := connect(t, "tcp4")
				defer server.Close()
				must(t, errors.Join(down.SetReadBuffer(64<<10), up.SetWriteBuffer(64<<10), server.SetReadBuffer(64<<10)))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				return k.Run(c, server, func() {
					_, err := l.Splice(ctx, down, up, Flow{ID: "wire", Buffer: 64 << 10})
					must(t, err)
				})
			}
			must(t, try(trims))
			if err := try(not); err == nil {
				t.Error("without trimming no harm was done: this case proves nothing")
			} else {
				t.Logf("without trimming: %v", err)
			}
		})
	}
}

func TestOverlaps(t *testing.T) {
	l := open(t, allRules, 16)
	if err := overlaps(t, l, 300); err != nil {
		t.Error(err)
	}
}

// overlaps makes rounds of: a few real bytes, then injected segments that repeat, overlap and come out of order, then the
// connection itself sending it all once more.
func overlaps(t *testing.T, l *Loader, rounds int) error {
	p := splicePath(t, l, pathOptions{})
	in, err := newInjector(p.client)
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	p.server.SetDeadline(time.Now().Add(30 * time.Second))
	p.client.SetDeadline(time.Now().Add(30 * time.Second))
	rnd := rand.New(rand.NewPCG(1, 2))
	data := pattern(rounds*3000 + 20000)
	at := 0
	for round := range rounds {
		first := 1 + rnd.IntN(200)
		if _, err := p.client.Write(data[at : at+first]); err != nil {
			return err
		}
		if err := expect(p.server, data[at:at+first]); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		at += first
		if err := in.sync(); err != nil {
			return err
		}
		back, ahead := rnd.IntN(min(at, 4000)+1), 1+rnd.IntN(1500)
		hole := rnd.IntN(2) == 0
		if hole { // the later part comes first
			if err := in.send(ahead/2, data[at+ahead/2:at+ahead]); err != nil {
				return err
			}
		}
		if err := in.send(-back, data[at-back:at+ahead]); err != nil {
			return err
		}
		if rnd.IntN(2) == 0 { // the same once more
			if err := in.send(-back, data[at-back:at+ahead]); err != nil {
				return err
			}
		}
		if err := expect(p.server, data[at:at+ahead]); err != nil {
			return fmt.Errorf("round %d, %d back, %d ahead, hole %v: %w", round, back, ahead, hole, err)
		}
		more := ahead + rnd.IntN(1000)
		if _, err := p.client.Write(data[at : at+more]); err != nil {
			return err
		}
		if err := expect(p.server, data[at+ahead:at+more]); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		at += more
		if at > len(data)-8000 {
			break
		}
	}
	f := l.Flows()
	if len(f) != 1 || f[0].Up != int64(at) {
		return fmt.Errorf("%d bytes were sent, flows say %+v", at, f)
	}
	t.Logf("%d bytes, %d trimmed, %d copied", at, f[0].UpTrimmed, f[0].UpCopied)
	if f[0].UpTrimmed == 0 && l.rules.trim {
		t.Error("nothing was trimmed: the segments did not come in")
	}
	return nil
}

// While bytes are passed and userspace has not read them, copied_seq is behind: only an own count of what was handled
// can tell an overlap.
func TestOverlapWhileReaderStops(t *testing.T) {
	l := open(t, allRules, 16)
	p := splicePath(t, l, pathOptions{buffer: 64 << 10, before: func(client, server, down, up *net.TCPConn) {
		client.SetWriteBuffer(32 << 10)
		server.SetReadBuffer(32 << 10)
		up.SetWriteBuffer(32 << 10)
	}})
	data := pattern(8 << 20)
	at := 0
	for at < 6<<20 { // fill until the direction is passing
		p.client.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := p.client.Write(data[at:min(at+1000, len(data))])
		at += n
		if f := l.Flows()[0]; f.UpCopied > 0 || f.UpWaiting > 100<<10 {
			break
		}
		if err != nil {
			break
		}
	}
	time.Sleep(100 * time.Millisecond)
	in, err := newInjector(p.client)
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	before := l.Flows()[0]
	for i := range 20 {
		if err := in.send(-500-10*i, data[at-500-10*i:at+100*(i+1)]); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond)
	after := l.Flows()[0]
	t.Logf("%d bytes sent, before %+v", at, before)
	if after.UpTrimmed == before.UpTrimmed {
		t.Fatal("no overlap came in")
	}
	go func() {
		p.client.SetWriteDeadline(time.Now().Add(10 * time.Second))
		p.client.Write(data[at:])
		p.client.CloseWrite()
	}()
	p.server.SetDeadline(time.Now().Add(10 * time.Second))
	if err := expect(p.server, data); err != nil {
		t.Fatal(err)
	}
}

// An urgent byte stays where it is in the stream, as RFC 6093 wants.
func TestUrgent(t *testing.T) {
	l := open(t, allRules, 16)
	for name, way := range ways {
		for _, size := range []int{10, 2 << 20} {
			t.Run(fmt.Sprintf("%s %d", name, size), func(t *testing.T) {
				data := pattern(size)
				p := splicePath(t, l, pathOptions{before: func(client, server, _, _ *net.TCPConn) {
					if size > 100 {
						return
					}
					for _, c := range []*net.TCPConn{client, server} { // urgent bytes in the queue at insertion
						raw, _ := c.SyscallConn()
						raw.Write(func(fd uintptr) bool { return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) == nil })
					}
					time.Sleep(5 * time.Millisecond)
				}})
				f := l.live[firstLive(l)].Load()
				from, to := way(p)
				if size < 100 {
					for _, c := range []*net.TCPConn{p.client, p.server} {
						c.SetDeadline(time.Now().Add(5 * time.Second))
						var b [1]byte
						raw, _ := c.SyscallConn()
						raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
						if _, err := c.Read(b[:]); err != nil || b[0] != '!' {
							t.Fatalf("%q %v", b, err)
						}
					}
				}
				sent := make(chan error, 1)
				go func() {
					_, err := from.Write(data)
					raw, _ := from.SyscallConn()
					raw.Write(func(fd uintptr) bool {
						e := unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil)
						if e != unix.EAGAIN {
							err = errors.Join(err, e)
						}
						return e != unix.EAGAIN
					})
					_, err2 := from.Write(data)
					sent <- errors.Join(err, err2, from.CloseWrite())
				}()
				to.SetDeadline(time.Now().Add(5 * time.Second))
				got, err := io.ReadAll(to)
				if want := append(append(bytes.Clone(data), '!'), data...); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes, %d expected, %v\n%s", len(got), len(want), err, f.dump())
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
				p.client.Close()
				p.server.Close()
				p.wait(5 * time.Second)
			})
		}
	}
}

func firstLive(l *Loader) int {
	for i := range l.live {
		if l.live[i].Load() != nil {
			return i
		}
	}
	return 0
}

func TestIdleAndCancel(t *testing.T) {
	l := open(t, allRules, 16)
	p := splicePath(t, l, pathOptions{idle: 400 * time.Millisecond})
	for range 8 {
		time.Sleep(100 * time.Millisecond)
		p.client.Write([]byte("x"))
	}
	start := time.Now()
	r := p.wait(2 * time.Second)
	if took := time.Since(start); r.end != endIdle || r.up != 8 || took < 300*time.Millisecond || took > 700*time.Millisecond {
		t.Errorf("ended %+v after %v", r, took)
	}
	p = splicePath(t, l, pathOptions{})
	p.client.Write([]byte("x"))
	time.Sleep(20 * time.Millisecond)
	p.cancel()
	if r := p.wait(time.Second); r.end != endCanceled || !errors.Is(r.err, context.Canceled) || r.up != 1 {
		t.Errorf("ended %+v", r)
	}
	p.client.SetDeadline(time.Now().Add(time.Second))
	if _, err := p.client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a canceled flow is not reset: %v", err)
	}
}

// What is refused is left as it was, and goes on in userspace.
func TestRefusal(t *testing.T) {
	l := open(t, allRules, 1)
	splicePath(t, l, pathOptions{})
	p, err := trySplice(t, l, pathOptions{})
	if !errors.Is(err, refusedFull) {
		t.Fatalf("a second flow in one slot: %v", err)
	}
	relayed(t, p)

	l = open(t, allRules, 4)
	p, err = trySplice(t, l, pathOptions{before: func(client, _, down, _ *net.TCPConn) {
		down.SetNoDelay(false)
		client.CloseWrite()
		time.Sleep(20 * time.Millisecond)
	}})
	if !errors.Is(err, refusedState) {
		t.Fatalf("a side that has ended: %v", err)
	}
	raw, _ := p.down.SyscallConn()
	raw.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY); n != 0 || err != nil {
			t.Errorf("TCP_NODELAY is %d, %v", n, err)
		}
	})
	if s := l.Stats(); s.Flows != 0 || s.Refused[refusedState.Error()] != 1 || s.Off != "" {
		t.Errorf("%+v", s)
	}
}

// relayed checks that a refused pair of sockets works without us.
func relayed(t *testing.T, p *path) {
	t.Helper()
	go io.Copy(p.up, p.down)
	p.client.Write([]byte("hello"))
	p.server.SetDeadline(time.Now().Add(time.Second))
	if err := expect(p.server, []byte("hello")); err != nil {
		t.Error(err)
	}
}

// The other side ends or breaks while a flow is being inserted.
func TestEndDuringInsertion(t *testing.T) {
	l := open(t, allRules, 64)
	refused := 0
	for i := range 300 {
		data := pattern(1000)
		p, err := trySplice(t, l, pathOptions{before: func(_, server, _, _ *net.TCPConn) {
			go func() {
				for range i * 20 {
				}
				server.Write(data)
				server.CloseWrite()
			}()
		}})
		if err != nil {
			refused++
			continue
		}
		p.client.SetDeadline(time.Now().Add(3 * time.Second))
		got, rerr := io.ReadAll(p.client)
		if rerr != nil || !bytes.Equal(got, data) {
			t.Fatalf("flow %d: %d bytes, %v", i, len(got), rerr)
		}
		if err := send(p.client, p.server, 1, 5000); err != nil {
			t.Fatal(err)
		}
		if r := p.wait(3 * time.Second); r.end != endEOF || r.down != 1000 || r.up != 5000 {
			t.Fatalf("flow %d ended %+v", i, r)
		}
	}
	t.Logf("%d of 300 refused", refused)
}

func TestConcurrentFlows(t *testing.T) {
	l := open(t, allRules, 1024)
	const flows = 200
	var all sync.WaitGroup
	errs := make(chan error, flows)
	for i := range flows {
		p := splicePath(t, l, pathOptions{buffer: 128 << 10})
		all.Add(1)
		go func() {
			defer all.Done()
			rnd := rand.New(rand.NewPCG(uint64(i), 7))
			up, down := make(chan error, 1), make(chan error, 1)
			go func() { up <- send(p.client, p.server, uint64(i), rnd.Int64N(2<<20)) }()
			go func() { down <- send(p.server, p.client, uint64(i)+1, int64(i)*10000) }()
			if err := errors.Join(<-up, <-down); err != nil {
				errs <- fmt.Errorf("flow %d: %w", i, err)
				return
			}
			if r := p.wait(10 * time.Second); r.end != endEOF {
				errs <- fmt.Errorf("flow %d ended %+v", i, r)
			}
		}()
	}
	stuck := time.AfterFunc(30*time.Second, func() {
		for i := range l.live {
			if f := l.live[i].Load(); f != nil {
				t.Logf("slot %d:\n%s", i, f.dump())
			}
		}
		t.Error("stuck")
		l.Close()
	})
	all.Wait()
	stuck.Stop()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	t.Logf("%+v", l.Stats())
}
