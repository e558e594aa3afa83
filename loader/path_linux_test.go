package loader

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

var instances atomic.Int64

// open loads a Loader for one test, with rules, and closes it after.
func open(t testing.TB, r *hooks, flows int) *Loader {
	t.Helper()
	needRoot(t)
	l, err := load(Options{
		Instance: fmt.Sprintf("ts-ldr-%d-%d", os.Getpid(), instances.Add(1)),
		MaxFlows: flows,
		Local:    true,
		Log:      slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}, r)
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

// result is how a flow ended.
type result struct {
	up, down int64
	end      string
	err      error
}

// path is a client and a server with a spliced flow between them.
type path struct {
	t              testing.TB
	client, server *net.TCPConn
	down, up       *net.TCPConn // the proxy's, before Splice closed them
	count          func() (up, down int64)
	ended          chan result
	returns        *atomic.Int32 // how often the flow was given back
	cancel         context.CancelFunc
}

type pathOptions struct {
	buffer  int64
	idle    time.Duration
	busy    int64                                       // as Flow.Busy; when the flow is given back, it is spliced again
	network string                                      // "tcp4" or "tcp6"
	before  func(client, server, down, up *net.TCPConn) // runs before Splice
}

// connect makes a TCP connection over loopback.
func connect(t testing.TB, network string) (dialled, accepted *net.TCPConn) {
	t.Helper()
	at := "127.0.0.1:0"
	if network == "tcp6" {
		at = "[::1]:0"
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), network, at)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	c, err := d.Dial(network, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), a.(*net.TCPConn)
}

// networks are those that a test goes over: one where all is slow.
func networks() []string {
	if os.Getenv("RELAYTEST") == "slow" {
		return []string{"tcp6"}
	}
	return []string{"tcp4", "tcp6"}
}

func splicePath(t testing.TB, l *Loader, o pathOptions) *path {
	t.Helper()
	p, err := trySplice(t, l, o)
	if err != nil {
		t.Fatalf("splice: %v", err)
	}
	return p
}

func trySplice(t testing.TB, l *Loader, o pathOptions) (*path, error) {
	t.Helper()
	if o.network == "" {
		o.network = "tcp4"
	}
	if o.buffer == 0 {
		o.buffer = 2 << 20
	}
	p := &path{t: t, ended: make(chan result, 1), returns: new(atomic.Int32)}
	p.client, p.down = connect(t, o.network)
	p.up, p.server = connect(t, o.network)
	if o.before != nil {
		o.before(p.client, p.server, p.down, p.up)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	var err error
	p.count, err = l.Splice(ctx, p.down, p.up, p.flow(ctx, l, o))
	t.Cleanup(func() {
		cancel()
		p.client.Close()
		p.server.Close()
		if err != nil {
			p.down.Close()
			p.up.Close()
		}
	})
	return p, err
}

// flow is what the loader is told of the path.
func (p *path) flow(ctx context.Context, l *Loader, o pathOptions) Flow {
	f := Flow{
		ID: "id-" + p.t.Name(), Route: "web/" + p.t.Name(), Buffer: o.buffer, Idle: o.idle, Busy: o.busy,
		Ended: func(up, down int64, end string, err error) { p.ended <- result{up, down, end, err} },
	}
	if o.busy > 0 {
		f.Returned = func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, _ func(), _ error) {
			f.Up, f.Down = upBytes+int64(len(downRest)), downBytes+int64(len(upRest))
			go p.spliceAgain(ctx, l, f, [2]int{down, up}, [2][]byte{downRest, upRest})
		}
	}
	return f
}

// spliceAgain gives a flow that was given back to l again, when all that there was to be read is written, as
// userspace/relay does it.
func (p *path) spliceAgain(ctx context.Context, l *Loader, f Flow, sockets [2]int, rest [2][]byte) {
	all := make([]byte, 16<<20) // more than a receive buffer has
	for i, rest := range rest {
		for n := len(all); n == len(all) && ctx.Err() == nil; { // less: no skb was read in part
			n, _ = socket(sockets[i]).read(all)
			rest = append(rest, all[:n]...)
			*[]*int64{&f.Up, &f.Down}[i] += int64(n)
			for len(rest) > 0 && ctx.Err() == nil {
				n, err := socket(sockets[1-i]).write(rest)
				if rest = rest[n:]; isAgain(err) {
					time.Sleep(time.Millisecond) // only then: else the sender fills the queue faster than this empties it
				} else if err != nil {
					break
				}
			}
		}
	}
	if _, err := l.SpliceSockets(ctx, sockets[0], sockets[1], f); err != nil {
		for _, s := range sockets {
			socket(s).reset()
		}
		p.ended <- result{f.Up, f.Down, endError, err}
	}
	p.returns.Add(1)
}

// leave asks the flow to leave the sockmap, if it is there.
func leave(l *Loader) {
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			f.mu.RLock()
			if !f.isClosed {
				l.detacher.ask(f)
			}
			f.mu.RUnlock()
		}
	}
}

// detachOne takes one direction of the flow out of the sockmap, and lets the other one stay.
func detachOne(t *testing.T, l *Loader, f *flow, side int) {
	t.Helper()
	l.detacher.mu.Lock()
	f.directions[1-side].wasAsked = true // so that it is not
	l.detacher.mu.Unlock()
	waitFor(t, func() bool { leave(l); return f.directions[side].isDetached.Load() }, "the side to leave")
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// wait gives the flow's end, or fails.
func (p *path) wait(within time.Duration) result {
	p.t.Helper()
	select {
	case r := <-p.ended:
		return r
	case <-time.After(within):
		p.t.Fatalf("the flow did not end within %v", within)
		return result{}
	}
}

// stream writes n bytes of a seeded stream to w, and gives its hash.
func stream(w io.Writer, seed uint64, n int64) ([32]byte, error) {
	h := sha256.New()
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	_, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(w, h)},
		io.LimitReader(struct{ io.Reader }{readerOf{r}}, n), make([]byte, 64<<10))
	return [32]byte(h.Sum(nil)), err
}

type readerOf struct{ r *rand.ChaCha8 }

func (r readerOf) Read(b []byte) (int, error) { return r.r.Read(b) }

// drain reads all, and gives the hash and the number of bytes.
func drain(r io.Reader) ([32]byte, int64, error) {
	h := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	return [32]byte(h.Sum(nil)), n, err
}

// send writes a stream one way, closes it, and checks that it arrives whole.
func send(from, to *net.TCPConn, seed uint64, n int64) error {
	type sum struct {
		hash [32]byte
		err  error
	}
	sent := make(chan sum, 1)
	go func() {
		hash, err := stream(from, seed, n)
		if err == nil {
			err = from.CloseWrite()
		}
		sent <- sum{hash, err}
	}()
	hash, got, err := drain(to)
	s := <-sent
	if err := errors.Join(s.err, err); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", got, n, err)
	}
	if got != n || hash != s.hash {
		return fmt.Errorf("%d of %d bytes arrived, the same: %v", got, n, hash == s.hash)
	}
	return nil
}
