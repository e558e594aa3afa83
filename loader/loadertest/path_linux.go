package loadertest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// Result is how a flow ended.
type Result struct {
	Up, Down int64
	End      string
	Err      error
}

// Path is a client and a server with a spliced flow between them.
type Path struct {
	T              testing.TB
	Client, Server *net.TCPConn
	Down, Up       *net.TCPConn // the proxy's, before Splice closed them
	Count          func() (up, down int64)
	Ended          chan Result
	Returns        *atomic.Int32 // how often the flow was given back
	Recall         func()        // of BecomeLocal
	Returned       chan Returned // the same
	Cancel         context.CancelFunc
}

// Returned is a flow that was given back.
type Returned struct {
	Sockets  [2]int    // downstream's and upstream's
	Rest     [2][]byte // that was read from them
	Up, Down int64
}

// splicer is a datapath.
type splicer interface {
	Splice(ctx context.Context, down, up int, o prove.Flow) (count func() (upBytes, downBytes int64), err error)
}

// Splice gives d a flow of connections, which are closed if d takes it.
func Splice(ctx context.Context, d splicer, down, up *net.TCPConn, o prove.Flow) (count func() (up, down int64), err error) {
	return prove.OfConns(down, up, func(down, up int) (func() (up, down int64), error) {
		return d.Splice(ctx, down, up, o)
	})
}

// PathOptions say how the flow of a path is.
type PathOptions struct {
	Buffer int64
	Idle   time.Duration
	// as prove.Flow.Busy; when the flow is given back, it is spliced again
	Busy    int64
	Network string                                      // "tcp4" or "tcp6"
	Before  func(client, server, down, up *net.TCPConn) // runs before Splice
}

// Connect makes a TCP connection over loopback.
func Connect(t testing.TB, network string) (dialled, accepted *net.TCPConn) {
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
	t.Cleanup(func() { c.Close(); a.Close() }) // an end that nobody refers to would be closed at any time
	return c.(*net.TCPConn), a.(*net.TCPConn)
}

// Networks are those that a test goes over: one where all is slow.
func Networks() []string {
	if os.Getenv("RELAYTEST") == "slow" {
		return []string{"tcp6"}
	}
	return []string{"tcp4", "tcp6"}
}

// SplicePath makes a path, and splices its flow.
func SplicePath(t testing.TB, l splicer, o PathOptions) *Path {
	t.Helper()
	p, err := TrySplice(t, l, o)
	if err != nil {
		t.Fatalf("splice: %v", err)
	}
	return p
}

// TrySplice is SplicePath where the flow may be refused: the path then has its connections.
func TrySplice(t testing.TB, l splicer, o PathOptions) (*Path, error) {
	t.Helper()
	if o.Network == "" {
		o.Network = "tcp4"
	}
	if o.Buffer == 0 {
		o.Buffer = 2 << 20
	}
	p := &Path{T: t, Ended: make(chan Result, 1), Returns: new(atomic.Int32)}
	p.Client, p.Down = Connect(t, o.Network)
	p.Up, p.Server = Connect(t, o.Network)
	if o.Before != nil {
		o.Before(p.Client, p.Server, p.Down, p.Up)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.Cancel = cancel
	var err error
	p.Count, err = Splice(ctx, l, p.Down, p.Up, p.Flow(ctx, l, o))
	t.Cleanup(func() {
		cancel()
		p.Client.Close()
		p.Server.Close()
		if err != nil {
			p.Down.Close()
			p.Up.Close()
		}
	})
	return p, err
}

// Flow is what the loader is told of the path.
func (p *Path) Flow(ctx context.Context, l splicer, o PathOptions) prove.Flow {
	f := prove.Flow{
		ID: "id-" + p.T.Name(), Route: "web/" + p.T.Name(), Buffer: o.Buffer, Idle: o.Idle, Busy: o.Busy,
		Ended: func(up, down int64, end string, err error) { p.Ended <- Result{up, down, end, err} },
	}
	if o.Busy > 0 {
		f.Returned = func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, _ time.Time, _ func(), _ error) {
			f.Up, f.Down = upBytes+int64(len(downRest)), downBytes+int64(len(upRest))
			go p.spliceAgain(ctx, l, f, [2]int{down, up}, [2][]byte{downRest, upRest})
		}
	}
	return f
}

// spliceAgain gives a flow that was given back to l again, when all that there was to be read is written, as
// userspace/relay does it.
func (p *Path) spliceAgain(ctx context.Context, l splicer, f prove.Flow, sockets [2]int, rest [2][]byte) {
	all := make([]byte, 16<<20) // more than a receive buffer has
	for i, rest := range rest {
		for n := len(all); n == len(all) && ctx.Err() == nil; { // less: no skb was read in part
			n, _ = unix.Read(sockets[i], all)
			n = max(n, 0)
			rest = append(rest, all[:n]...)
			*[]*int64{&f.Up, &f.Down}[i] += int64(n)
			for len(rest) > 0 && ctx.Err() == nil {
				n, err := unix.SendmsgN(sockets[1-i], rest, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				if rest = rest[max(n, 0):]; err == unix.EAGAIN || err == unix.EINTR {
					// only then: else the sender fills the queue faster than this empties it
					time.Sleep(time.Millisecond)
				} else if err != nil {
					break
				}
			}
		}
	}
	if _, err := l.Splice(ctx, sockets[0], sockets[1], f); err != nil {
		for _, s := range sockets {
			_ = tcpsock.Reset(s)
		}
		p.Ended <- Result{f.Up, f.Down, prove.EndError, err}
	}
	p.Returns.Add(1)
}

// Patience is for what comes sooner or later, on a machine that is busy too.
const Patience = time.Minute

// Wait gives the flow's end, or fails.
func (p *Path) Wait(within time.Duration) Result {
	p.T.Helper()
	select {
	case r := <-p.Ended:
		return r
	case <-time.After(within):
		p.T.Fatalf("the flow did not end within %v", within)
		return Result{}
	}
}

// Stream writes n bytes of a seeded stream to w, and gives its hash.
func Stream(w io.Writer, seed uint64, n int64) ([32]byte, error) {
	h := sha256.New()
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	_, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(w, h)},
		io.LimitReader(struct{ io.Reader }{readerOf{r}}, n), make([]byte, 64<<10))
	return [32]byte(h.Sum(nil)), err
}

type readerOf struct{ r *rand.ChaCha8 }

func (r readerOf) Read(b []byte) (int, error) { return r.r.Read(b) }

// Drain reads all, and gives the hash and the number of bytes.
func Drain(r io.Reader) ([32]byte, int64, error) {
	h := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	return [32]byte(h.Sum(nil)), n, err
}

// Send writes a stream one way, closes it, and checks that it arrives whole.
func Send(from, to *net.TCPConn, seed uint64, n int64) error {
	type sum struct {
		hash [32]byte
		err  error
	}
	sent := make(chan sum, 1)
	go func() {
		hash, err := Stream(from, seed, n)
		if err == nil {
			err = from.CloseWrite()
		}
		sent <- sum{hash, err}
	}()
	hash, got, err := Drain(to)
	s := <-sent
	if err := errors.Join(s.err, err); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", got, n, err)
	}
	if got != n || hash != s.hash {
		return fmt.Errorf("%d of %d bytes arrived, the same: %v", got, n, hash == s.hash)
	}
	return nil
}

// SendPart is Send without the end.
func SendPart(from, to *net.TCPConn, seed uint64, n int64) error {
	type sum struct {
		hash [32]byte
		err  error
	}
	sent := make(chan sum, 1)
	go func() {
		hash, err := Stream(from, seed, n)
		sent <- sum{hash, err}
	}()
	end := time.Now().Add(time.Minute)
	errs := errors.Join(from.SetWriteDeadline(end), to.SetReadDeadline(end))
	hash, got, err := Drain(io.LimitReader(to, n))
	s := <-sent
	if err := errors.Join(errs, s.err, err); err != nil || got != n || hash != s.hash {
		return fmt.Errorf("%d of %d bytes arrived, the same: %v, %w", got, n, hash == s.hash, err)
	}
	return nil
}

// BothWays sends n bytes each way at once, ends both streams, and checks hashes, counts and the end.
func BothWays(p *Path, n int64) error {
	up, down := make(chan error, 1), make(chan error, 1)
	go func() { up <- Send(p.Client, p.Server, 1, n) }()
	go func() { down <- Send(p.Server, p.Client, 2, n) }()
	if err := errors.Join(<-up, <-down); err != nil {
		return err
	}
	if r := p.Wait(Patience); r != (Result{Up: n, Down: n, End: prove.EndEOF}) {
		return fmt.Errorf("ended %+v", r)
	}
	if u, d := p.Count(); u != n || d != n {
		return fmt.Errorf("counted %d and %d after the end", u, d)
	}
	return nil
}

// Upward and Downward are the ends of a direction, Ways both.
func Upward(p *Path) (from, to *net.TCPConn)   { return p.Client, p.Server }
func Downward(p *Path) (from, to *net.TCPConn) { return p.Server, p.Client }

var Ways = map[string]func(*Path) (from, to *net.TCPConn){"up": Upward, "down": Downward}

// ExchangeBytes sends so many bytes each way.
func ExchangeBytes(p *Path, up, down int) error {
	a, b := prove.Pattern(up), prove.Pattern(down)
	go p.Client.Write(a)
	err := prove.Expect(p.Server, a)
	go p.Server.Write(b)
	return errors.Join(err, prove.Expect(p.Client, b))
}

// BecomeLocal makes flows to the listener until one goes past TCP, which is the only one left.
func BecomeLocal(t testing.TB, n splicer, ln net.Listener) *Path {
	t.Helper()
	network := "tcp4"
	if strings.HasPrefix(ln.Addr().String(), "[") {
		network = "tcp6"
	}
	for end := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		p := &Path{T: t, Ended: make(chan Result, 1), Returned: make(chan Returned, 1)}
		p.Client, p.Down = Connect(t, network)
		up, err := net.Dial(network, ln.Addr().String())
		Must(t, err)
		server, err := ln.Accept()
		Must(t, err)
		p.Up, p.Server = up.(*net.TCPConn), server.(*net.TCPConn)
		ctx, cancel := context.WithCancel(context.Background())
		p.Cancel = cancel
		t.Cleanup(func() { cancel(); p.Client.Close(); p.Server.Close() })
		p.Count, err = Splice(ctx, n, p.Down, p.Up,
			prove.Flow{ID: "local", Buffer: 1 << 20,
				Ended:      func(up, down int64, end string, err error) { p.Ended <- Result{up, down, end, err} },
				Recallable: func(recall func()) { p.Recall = recall },
				Returned: func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, _ time.Time, _ func(), _ error) {
					p.Returned <- Returned{[2]int{down, up}, [2][]byte{downRest, upRest}, upBytes, downBytes}
				}})
		if err == nil {
			return p
		}
		p.Down.Close()
		p.Up.Close()
		p.Client.Close()
		p.Server.Close()
		if time.Now().After(end) {
			t.Fatalf("the target does not become local: %v", err)
		}
	}
}

// Chatter sends what the process reads, all the time, so that the flow moves.
func Chatter(t *testing.T, p *Path) {
	stop, done := make(chan struct{}), sync.WaitGroup{}
	done.Go(func() { io.Copy(io.Discard, p.Server) })
	done.Go(func() {
		for tick := time.NewTicker(50 * time.Millisecond); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
				if _, err := p.Client.Write([]byte("x")); err != nil {
					return
				}
			}
		}
	})
	t.Cleanup(func() { close(stop); p.Client.Close(); p.Server.Close(); done.Wait() })
}
