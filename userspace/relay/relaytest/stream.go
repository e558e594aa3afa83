package relaytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pattern is what streams are cut from. Its length is a prime: bytes that are lost, repeated or moved by any
// number that buffers, pages or segments come in show as a difference.
var pattern = sync.OnceValue(func() []byte {
	b := make([]byte, 1048573)
	rand.NewChaCha8([32]byte{'t', 's'}).Read(b)
	return b
})

// A stream is the bytes that one end sends, from a position on.
type stream struct{ pos int64 }

// newStream begins somewhere, so that the streams of two flows differ.
func newStream() *stream { return &stream{rand.Int64N(1 << 40)} }

// next gives up to n of the following bytes. It does not move on.
func (s stream) next(n int64) []byte {
	p := pattern()
	at := s.pos % int64(len(p))
	return p[at : at+min(n, int64(len(p))-at)]
}

// send writes n bytes of s.
func (s *stream) send(c net.Conn, n int64) error { return s.sendBy(c, n, 1<<20) }

// sendBy writes n bytes of s, up to chunk with each write.
func (s *stream) sendBy(c net.Conn, n, chunk int64) error {
	for n > 0 {
		c.SetWriteDeadline(time.Now().Add(patience))
		m, err := c.Write(s.next(min(n, chunk)))
		s.pos += int64(m)
		n -= int64(m)
		if err != nil {
			return fmt.Errorf("send, with %d bytes to go: %w", n, err)
		}
	}
	return nil
}

// receive reads and compares n bytes.
func (s *stream) receive(c net.Conn, n int64) error {
	buf := buffers.Get().(*[256 << 10]byte)
	defer buffers.Put(buf)
	for n > 0 {
		c.SetReadDeadline(time.Now().Add(patience))
		m, err := c.Read(buf[:min(n, int64(len(buf)))])
		if err := s.compare(buf[:m]); err != nil {
			return fmt.Errorf("receive, with %d bytes to go before this read: %w", n, err)
		}
		n -= int64(m)
		if err != nil {
			return fmt.Errorf("receive, with %d bytes to go: %w", n, err)
		}
	}
	return nil
}

var buffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

func (s *stream) compare(b []byte) error {
	for len(b) > 0 {
		want := s.next(int64(len(b)))
		if !bytes.Equal(b[:len(want)], want) {
			i := 0
			for b[i] == want[i] {
				i++
			}
			return fmt.Errorf("byte %d of the stream differs%s", s.pos+int64(i), s.whose(b[i:], int64(i)))
		}
		s.pos += int64(len(want))
		b = b[len(want):]
	}
	return nil
}

// whose says where in the stream the bytes b are, which came i bytes behind s.pos, if they are near.
func (s *stream) whose(b []byte, i int64) string {
	const near, enough = 256 << 10, 16
	b = b[:min(len(b), enough)]
	for off := int64(1); len(b) == enough && off <= near; off++ {
		for _, d := range []int64{off, -off} {
			at := stream{s.pos + i + d}
			if at.pos >= 0 && bytes.HasPrefix(at.next(enough), b) {
				return fmt.Sprintf(": what came belongs %d bytes later", d)
			}
		}
	}
	return ""
}

// drain reads and compares until the stream ends, and gives the number of bytes and how it ended.
func (s *stream) drain(c net.Conn) (n int64, err error) {
	buf := buffers.Get().(*[256 << 10]byte)
	defer buffers.Put(buf)
	for {
		c.SetReadDeadline(time.Now().Add(patience))
		m, err := c.Read(buf[:])
		n += int64(m)
		if err := s.compare(buf[:m]); err != nil {
			return n, err
		}
		if err != nil {
			return n, err
		}
	}
}

// transfer sends n bytes from one end to the other, while the reader compares. Without the end of the stream.
func transfer(from, to net.Conn, n int64) error {
	out := newStream()
	in := *out
	sent := make(chan error, 1)
	go func() { sent <- out.send(from, n) }()
	return joinSender(in.receive(to, n), from, sent)
}

// joinSender waits for the sender too, but not if the reader has failed.
func joinSender(err error, from net.Conn, sent chan error) error {
	if err != nil {
		from.SetWriteDeadline(time.Unix(1, 0))
	}
	return errors.Join(err, <-sent)
}

// transferAll is transfer and the end of the stream.
func transferAll(from, to net.Conn, n int64) error {
	if err := transfer(from, to, n); err != nil {
		return err
	}
	if err := closeWrite(from); err != nil {
		return err
	}
	return wantEOF(to)
}

// Exchange sends up and down bytes, each way at once and with the end of the stream behind them, compares
// what arrives, and closes both ends.
func Exchange(client, server net.Conn, up, down int64) error {
	defer client.Close()
	defer server.Close()
	other := make(chan error, 1)
	go func() { other <- transferAll(server, client, down) }()
	err := transferAll(client, server, up)
	return errors.Join(err, <-other)
}

// Both sends n bytes each way, one after the other.
func Both(client, server net.Conn, n int64) error {
	return errors.Join(transfer(client, server, n), transfer(server, client, n))
}

// Until waits for ok.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for p := (poll{}); !ok(); {
		if !p.again(patience) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// A poll waits for what nothing tells of: shortly at first, for what comes soon, then longer, so that many
// can.
type poll struct {
	end   time.Time
	pause time.Duration
}

// again is false when that has taken so long. The first one does not wait.
func (p *poll) again(within time.Duration) bool {
	if p.end.IsZero() {
		p.end = time.Now().Add(within)
		return true
	}
	p.pause = min(max(2*p.pause, 100*time.Microsecond), 20*time.Millisecond)
	time.Sleep(p.pause)
	return time.Now().Before(p.end)
}

func closeWrite(c net.Conn) error {
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return fmt.Errorf("end the stream: %w", err)
	}
	return nil
}

// wantEOF wants the end of the stream and nothing before it.
func wantEOF(c net.Conn) error {
	c.SetReadDeadline(time.Now().Add(patience))
	var b [1]byte
	n, err := c.Read(b[:])
	if n != 0 || err != io.EOF {
		return fmt.Errorf("instead of the end of the stream: %d bytes, %v", n, err)
	}
	return nil
}

// wantReset wants a reset and nothing before it.
func wantReset(t testing.TB, p Path, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(p.resetIn(patience)))
	var b [1]byte
	if n, err := c.Read(b[:]); n != 0 || !saysReset(err) {
		t.Errorf("instead of a reset: %d bytes, %v", n, err)
	}
}

// saysReset: err of a read is a reset. While one comes in, there is an instant in which epoll tells of an
// error and of nothing else, and Go's poller calls such a descriptor "not pollable" from then on.
func saysReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) ||
		err != nil && strings.HasSuffix(err.Error(), ": not pollable")
}

// abort closes c by a reset.
func abort(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bothRoles runs f with the client as the active end, and with the server.
func bothRoles(t *testing.T, p Path, f func(t *testing.T, active, passive net.Conn)) {
	eachRole(t, p, false, func(t *testing.T, dial func() (active, passive net.Conn)) {
		active, passive := dial()
		f(t, active, passive)
	})
}

// bothRolesAtOnce is bothRoles for what mostly waits.
func bothRolesAtOnce(t *testing.T, p Path, f func(t *testing.T, active, passive net.Conn)) {
	eachRole(t, p, true, func(t *testing.T, dial func() (active, passive net.Conn)) {
		active, passive := dial()
		f(t, active, passive)
	})
}

// eachRole runs f for each end as the active one, of flows that dial makes; for both at once, or not.
func eachRole(t *testing.T, p Path, atOnce bool, f func(t *testing.T, dial func() (active, passive net.Conn))) {
	var dialling sync.Mutex // a path may take any connection that comes for the one that it has dialled
	roles := func(t *testing.T) {
		for _, role := range []string{"client", "server"} {
			t.Run(role, func(t *testing.T) {
				if atOnce {
					t.Parallel()
				}
				f(t, func() (active, passive net.Conn) {
					dialling.Lock()
					defer dialling.Unlock()
					client, server := p.Dial(t)
					t.Cleanup(func() {
						client.Close()
						server.Close()
					})
					if role == "client" {
						return client, server
					}
					return server, client
				})
			})
		}
	}
	if atOnce {
		t.Run("at once", roles) // which ends when both have
	} else {
		roles(t)
	}
}

// Send sends n bytes from one end to the other, where they are compared.
func Send(from, to net.Conn, n int64) error { return transfer(from, to, n) }
