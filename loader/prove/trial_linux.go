package prove

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// patience bounds one wait of the self-test; bytes that come one after another get it each time, since a busy
// machine may be slow and is not wrong.
const patience = 3 * time.Second

// trial is one test's client, server and what is between them.
type trial struct {
	d              Datapath
	sent           *[]byte // what data gives, for all tests
	client, server *net.TCPConn
	down, up       *net.TCPConn
	ended          chan string
	count          func() (up, down int64)
	cancel         context.CancelFunc
	returns        *atomic.Int32 // how often the flow was given back
}

// failure ends a test.
type failure struct{ error }

// try gives the error that a test ended with.
func (t *trial) try(test func(*trial)) (err error) {
	defer func() {
		switch f := recover().(type) {
		case nil:
		case failure:
			err = f.error
		default:
			panic(f)
		}
	}()
	test(t)
	return nil
}

// must ends the test if there is an error.
func (t *trial) must(err error) {
	if err != nil {
		panic(failure{err})
	}
}

func (t *trial) fail(format string, args ...any) { t.must(fmt.Errorf(format, args...)) }
func (t *trial) skip(why error, advice string)   { t.must(untried{why, advice}) }
func (t *trial) write(to io.Writer, data []byte) { _, err := to.Write(data); t.must(err) }

func (t *trial) connect() {
	t.close()
	var err error
	t.client, t.down, err = loopback()
	t.must(err)
	t.up, t.server, err = loopback()
	t.must(err)
}

func loopback() (dialled, accepted *net.TCPConn, err error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", errNoLoopback, err)
		}
	}()
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if err := ln.(*net.TCPListener).SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, nil, err
	}
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", ln.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	a, err := ln.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c.(*net.TCPConn), a.(*net.TCPConn), nil
}

func (t *trial) splice() {
	t.ended, t.returns = make(chan string, 1), new(atomic.Int32)
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel = cancel
	limit := time.Now().Add(20 * patience)
	t.must(errors.Join(t.client.SetDeadline(limit), t.server.SetDeadline(limit)))
	ended := t.ended
	o := Flow{ID: "self-test", Buffer: 1 << 20, Ended: func(_, _ int64, end string, _ error) { ended <- end }}
	d, server, returns := t.d, t.server, t.returns
	splice := func(down, up int) (func() (up, down int64), error) { return d.Splice(ctx, down, up, server, o) }
	o.Returned = func(down, up int, downRest, upRest []byte, _, _ int64, _ time.Time, _ func(), _ error) {
		returns.Add(1)
		go takeBack(ctx, splice, o, [2]int{down, up}, [2][]byte{downRest, upRest})
	}
	var err error
	if t.count, err = OfConns(t.down, t.up, splice); err != nil {
		t.fail("splice: %w", err)
	}
}

func (t *trial) connectAndSplice() {
	t.connect()
	t.splice()
}

// takeBack splices a flow again that was given back, as userspace/relay does it: when all that there was to
// be read is written. The verdict may not be able to cut off what was read of an skb that was read in part.
func takeBack(ctx context.Context, splice func(down, up int) (func() (up, down int64), error), o Flow,
	sockets [2]int, rest [2][]byte) {
	all := make([]byte, 4<<20) // more than is sent at a time
	for i, rest := range rest {
		n, _ := unix.Read(sockets[i], all)
		rest = append(rest, all[:max(n, 0)]...)
		for len(rest) > 0 && ctx.Err() == nil {
			n, err := unix.SendmsgN(sockets[1-i], rest, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if rest = rest[max(n, 0):]; err != nil && err != unix.EAGAIN && err != unix.EINTR {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	if _, err := splice(sockets[0], sockets[1]); err != nil {
		for _, s := range sockets {
			_ = tcpsock.Reset(s)
		}
		o.Ended(0, 0, EndError, err)
	}
}

func (t *trial) close() {
	if t.cancel != nil {
		t.cancel()
	}
	for _, c := range []*net.TCPConn{t.client, t.server, t.down, t.up} {
		if c != nil {
			_ = c.Close()
		}
	}
	if t.count != nil {
		select { // so that the slot is free
		case <-t.ended:
		case <-time.After(patience):
		}
	}
	*t = trial{d: t.d, sent: t.sent}
}

// data is as Pattern, and is not to be written to: to make it costs more than to send it.
func (t *trial) data(n int) []byte {
	if len(*t.sent) < n {
		*t.sent = Pattern(n)
	}
	return (*t.sent)[:n:n]
}

func (t *trial) end(want string) {
	select {
	case end := <-t.ended:
		t.ended <- end
		if end != want {
			t.fail("the flow ended with %q instead of %q", end, want)
		}
	case <-time.After(patience):
		t.fail("the flow did not end")
	}
}

// Pattern gives n bytes that are the same each time, and repeat nowhere near.
func Pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// patient is a connection that gives each read patience.
type patient struct{ *net.TCPConn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	return p.TCPConn.Read(b)
}

// Expect reads len(want) bytes, which have to be these.
func Expect(c io.Reader, want []byte) error {
	got := make([]byte, min(len(want), 64<<10))
	for at := 0; at < len(want); {
		piece := want[at:min(at+len(got), len(want))]
		n, err := io.ReadFull(c, got[:len(piece)])
		if at += n; err != nil {
			return fmt.Errorf("%d of %d bytes arrived: %w", at, len(want), err)
		}
		if !bytes.Equal(got[:n], piece) {
			return errors.New("other bytes arrived than were sent")
		}
	}
	return nil
}

// whole writes to one, ends the stream, and expects all and the end at the other.
func whole(from, to *net.TCPConn, data []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(data)
		sent <- errors.Join(err, from.CloseWrite())
	}()
	err := Expect(patient{to}, data)
	if err == nil {
		err = expectEnd(patient{to})
	}
	return errors.Join(err, <-sent)
}

func expectEnd(c io.Reader) error {
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("after the last byte came %d bytes, %v", n, err)
	}
	return nil
}

// OfConns calls splice with descriptors of the sockets of down and up, which a datapath owns if it takes the
// flow. Then the connections are closed: they would wake Go's poller at each message.
func OfConns(down, up *net.TCPConn, splice func(down, up int) (func() (up, down int64), error)) (count func() (up, down int64), err error) {
	fds := []int{-1, -1}
	for i, c := range []*net.TCPConn{down, up} {
		raw, rerr := c.SyscallConn()
		if rerr == nil {
			fds[i], rerr = tcpsock.Dup(raw)
		}
		err = errors.Join(err, rerr)
	}
	if err == nil {
		if count, err = splice(fds[0], fds[1]); err == nil {
			_, _ = down.Close(), up.Close()
			return count, nil
		}
	}
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	return nil, err
}
