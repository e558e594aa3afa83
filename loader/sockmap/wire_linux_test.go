package sockmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/test/wire"
)

// Without the trim all that overlaps on the wire comes out damaged, and with it nothing does.
func TestWire(t *testing.T) {
	loadertest.NeedRoot(t)
	r := new(Hooks).Without(ruleTrim)
	n, trims, not := wire.New(t), open(t, nil, 64), open(t, r, 64)
	for _, k := range wire.Cases() {
		t.Run(k.Name, func(t *testing.T) {
			try := func(l *Engine) error {
				c, down := n.Connect(t)
				up, server := loadertest.Connect(t, "tcp4")
				defer server.Close()
				loadertest.Must(t, errors.Join(down.SetReadBuffer(64<<10), up.SetWriteBuffer(64<<10),
					server.SetReadBuffer(64<<10)))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				return k.Run(c, server, func() {
					_, err := loadertest.Splice(ctx, l, down, up, Flow{ID: "wire", Buffer: 64 << 10})
					loadertest.Must(t, err)
				})
			}
			loadertest.Must(t, try(trims))
			if err := try(not); err == nil {
				t.Error("without trimming no harm was done: this case proves nothing")
			} else {
				t.Logf("without trimming: %v", err)
			}
		})
	}
}

func TestOverlaps(t *testing.T) {
	l := open(t, nil, 16)
	if err := overlaps(t, l, 300); err != nil {
		t.Error(err)
	}
}

// overlaps makes rounds of: a few real bytes, then injected segments that repeat, overlap and come out of
// order, then the connection itself sending it all once more.
func overlaps(t *testing.T, l *Engine, rounds int) error {
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	in, err := prove.NewInjector(p.Client)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
	rnd := rand.New(rand.NewPCG(1, 2))
	data := prove.Pattern(rounds*3000 + 20000)
	at := 0
	for round := range rounds {
		first := 1 + rnd.IntN(200)
		if _, err := p.Client.Write(data[at : at+first]); err != nil {
			return err
		}
		if err := prove.Expect(p.Server, data[at:at+first]); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		at += first
		if err := in.Sync(); err != nil {
			return err
		}
		back, ahead := rnd.IntN(min(at, 4000)+1), 1+rnd.IntN(1500)
		hole := rnd.IntN(2) == 0
		if hole { // the later part comes first
			if err := in.Send(ahead/2, data[at+ahead/2:at+ahead]); err != nil {
				return err
			}
		}
		if err := in.Send(-back, data[at-back:at+ahead]); err != nil {
			return err
		}
		if rnd.IntN(2) == 0 { // the same once more
			if err := in.Send(-back, data[at-back:at+ahead]); err != nil {
				return err
			}
		}
		if err := prove.Expect(p.Server, data[at:at+ahead]); err != nil {
			return fmt.Errorf("round %d, %d back, %d ahead, hole %v: %w", round, back, ahead, hole, err)
		}
		more := ahead + rnd.IntN(1000)
		if _, err := p.Client.Write(data[at : at+more]); err != nil {
			return err
		}
		if err := prove.Expect(p.Server, data[at+ahead:at+more]); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		at += more
		if at > len(data)-8000 {
			break
		}
	}
	s := l.onlyFlow(t).directions[0].snapshot()
	if up, _ := p.Count(); up != int64(at) || s.redirected+s.passed != uint64(at) {
		return fmt.Errorf("%d bytes were sent, and %d counted: %+v", at, up, s)
	}
	t.Logf("%d bytes: %+v", at, s)
	if s.trimmed == 0 && l.hooks.Keeps(ruleTrim) {
		t.Error("nothing was trimmed: the segments did not come in")
	}
	return nil
}

// While bytes are passed and userspace has not read them, copied_seq is behind: only an own count of what was
// handled can tell an overlap.
func TestOverlapWhileReaderStops(t *testing.T) {
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 64 << 10, Before: func(client, server, down, up *net.TCPConn) {
		client.SetWriteBuffer(32 << 10)
		server.SetReadBuffer(32 << 10)
		up.SetWriteBuffer(32 << 10)
	}})
	up := &l.onlyFlow(t).directions[0]
	data := prove.Pattern(8 << 20)
	at := 0
	for at < 6<<20 { // fill until the direction is passing
		p.Client.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := p.Client.Write(data[at:min(at+1000, len(data))])
		at += n
		if m := up.shared(); load64(&m.Consumed) > 0 || load64(&m.Passed) > 100<<10 {
			break
		}
		if err != nil {
			break
		}
	}
	time.Sleep(100 * time.Millisecond)
	in, err := prove.NewInjector(p.Client)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	before := up.snapshot()
	for i := range 20 {
		if err := in.Send(-500-10*i, data[at-500-10*i:at+100*(i+1)]); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d bytes sent, before %+v", at, before)
	loadertest.WaitFor(t, func() bool { return up.snapshot().trimmed > before.trimmed }, "an overlap to come in")
	go func() {
		p.Client.SetWriteDeadline(time.Now().Add(loadertest.Patience))
		p.Client.Write(data[at:])
		p.Client.CloseWrite()
	}()
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	if err := prove.Expect(p.Server, data); err != nil {
		t.Fatal(err)
	}
}

// An urgent byte stays where it is in the stream, as RFC 6093 wants.
func TestUrgent(t *testing.T) {
	l := open(t, nil, 16)
	for name, way := range loadertest.Ways {
		for _, size := range []int{10, 2 << 20} {
			t.Run(fmt.Sprintf("%s %d", name, size), func(t *testing.T) {
				data := prove.Pattern(size)
				p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, server, _, _ *net.TCPConn) {
					if size > 100 {
						return
					}
					// urgent bytes in the queue at insertion
					for _, c := range []*net.TCPConn{client, server} {
						raw, _ := c.SyscallConn()
						raw.Write(func(fd uintptr) bool {
							return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) == nil
						})
					}
					time.Sleep(5 * time.Millisecond)
				}})
				f := l.live[firstLive(l)].Load()
				from, to := way(p)
				if size < 100 {
					for _, c := range []*net.TCPConn{p.Client, p.Server} {
						c.SetDeadline(time.Now().Add(loadertest.Patience))
						var b [1]byte
						raw, _ := c.SyscallConn()
						raw.Control(func(fd uintptr) {
							unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
						})
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
				to.SetDeadline(time.Now().Add(loadertest.Patience))
				got, err := io.ReadAll(to)
				if want := append(append(bytes.Clone(data), '!'), data...); err != nil ||
					!bytes.Equal(got, want) {
					t.Errorf("%d bytes, %d expected, %v\n%s", len(got), len(want), err, f.dump())
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
				p.Client.Close()
				p.Server.Close()
				p.Wait(loadertest.Patience)
			})
		}
	}
}

func firstLive(l *Engine) int {
	for i := range l.live {
		if l.live[i].Load() != nil {
			return i
		}
	}
	return 0
}
