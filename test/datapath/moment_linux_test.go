package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestBreaksWhileGivenBack: whatever an end does while its flow, which has just become busy, is given back, the other one
// is told of it, and has got all bytes that were sent before, or with a reset the first of them.
func TestBreaksWhileGivenBack(t *testing.T) {
	l := load(t)
	for _, what := range []string{"reset", "half-close", "urgent byte", "urgent byte and reset", "urgent byte and half-close"} {
		for _, both := range []bool{false, true} {
			for _, byReader := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, bulk both ways %v, by the reader %v", what, both, byReader), func(t *testing.T) {
					const flows, atOnce = 12, 4
					var all sync.WaitGroup
					places := make(chan bool, atOnce)
					for i := range uint64(flows) {
						places <- true
						all.Go(func() {
							defer func() { <-places }()
							m := moment{rnd: rand.New(rand.NewPCG(i, 7)), what: what, both: both}
							f, _ := preferred(t, l)
							m.run(t, f, byReader)
						})
					}
					all.Wait()
				})
			}
		}
	}
}

// A moment is one at which an end does something.
type moment struct {
	rnd  *rand.Rand
	what string
	both bool // the other end sends as well
}

// heard is what an end has got.
type heard struct {
	bytes int64
	err   error // nil: the end of the stream
}

// run has one end send, and one of both act after a moment.
func (m *moment) run(t *testing.T, f *relaytest.Flow, byReader bool) {
	a, b := f.Client.(*net.TCPConn), f.Server.(*net.TCPConn)
	if m.rnd.IntN(2) == 0 {
		a, b = b, a
	}
	actor, other := a, b
	if byReader {
		actor, other = b, a
	}
	for range 40 {
		if _, _, err := relaytest.PingPong(f.Client, f.Server, 200, rounds(1)); err != nil {
			t.Error(err)
			return
		}
	}
	for _, c := range []*net.TCPConn{a, b} {
		c.SetDeadline(time.Now().Add(30 * time.Second))
		tcpsock.Control(c, tcpsock.KeepUrgent)
	}
	var sent [2]int64 // by actor, by other
	var failed [2]error
	var sending [2]sync.WaitGroup
	var receiving sync.WaitGroup
	stop := [2]chan struct{}{make(chan struct{}), make(chan struct{})}
	for i, c := range []*net.TCPConn{actor, other} {
		if c != a && !m.both {
			continue
		}
		sending[i].Go(func() {
			for {
				select {
				case <-stop[i]:
					return
				default:
				}
				n, err := c.Write(patternAt(sent[i]))
				sent[i] += int64(n)
				if failed[i] = err; err != nil {
					return
				}
			}
		})
	}
	end := func(i int) {
		close(stop[i])
		sending[i].Wait()
	}
	var got [2]heard
	receive := func(c *net.TCPConn, h *heard, urgent bool) {
		receiving.Go(func() { h.bytes, h.err = receivePattern(c, urgent) })
	}
	receive(other, &got[1], true)
	receive(actor, &got[0], false)
	time.Sleep(time.Duration(m.rnd.IntN(120000)) * time.Microsecond)
	isReset, urgents := false, int64(0)
	switch m.what {
	case "urgent byte", "urgent byte and reset", "urgent byte and half-close":
		if err := sendOOB(actor); err != nil {
			t.Errorf("send an urgent byte: %v", err)
		}
		urgents++
	}
	switch m.what {
	case "reset", "urgent byte and reset":
		isReset = true
		actor.SetLinger(0)
		actor.Close()
		end(0)
		end(1)
	default:
		end(0)
		actor.CloseWrite()
		time.Sleep(time.Duration(m.rnd.IntN(20000)) * time.Microsecond)
		end(1)
		other.CloseWrite()
	}
	receiving.Wait()
	r := f.Result(t)
	switch {
	case isReset && !errors.Is(got[1].err, syscall.ECONNRESET) && !errors.Is(failed[1], syscall.ECONNRESET): // which is told once
		t.Errorf("a reset came as %v; %+v", got[1].err, r)
	case isReset && got[1].bytes > sent[0]+urgents:
		t.Errorf("%d bytes came of %d", got[1].bytes, sent[0]+urgents)
	case isReset:
	case got[0].err != nil || got[1].err != nil:
		t.Errorf("the ends came as %v and %v; %+v", got[0].err, got[1].err, r)
	case got[0].bytes != sent[1] || got[1].bytes != sent[0]+urgents && got[1].bytes != sent[0]:
		t.Errorf("%d bytes came of %d, and %d of %d with %d urgent ones; %+v", got[0].bytes, sent[1], got[1].bytes, sent[0], urgents, r)
	}
	a.Close()
	b.Close()
}

func sendOOB(c *net.TCPConn) (err error) {
	for range 10000 {
		tcpsock.Control(c, func(fd int) { err = unix.Sendto(fd, []byte{'!'}, unix.MSG_OOB|unix.MSG_DONTWAIT, nil) })
		if err != unix.EAGAIN {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// patterns is what is sent, again and again. An urgent byte is none of it.
var patterns = bytes.Repeat([]byte("abcdefghijklmnopqrstuvw"), 1<<13)

// patternAt is the next of a stream, at least 64 KiB.
func patternAt(at int64) []byte { return patterns[at%23:][:64<<10] }

// receivePattern reads to the end of c's stream, and says where it is not what was sent.
func receivePattern(c net.Conn, mayBeUrgent bool) (n int64, err error) {
	buf, at := make([]byte, 64<<10), int64(0)
	for {
		k, err := c.Read(buf)
		got := buf[:k]
		if i := bytes.IndexByte(got, '!'); i >= 0 && mayBeUrgent {
			mayBeUrgent, got = false, slices.Delete(got, i, i+1)
		}
		if !bytes.Equal(got, patternAt(at)[:len(got)]) {
			return n, fmt.Errorf("other bytes than were sent, in the %d behind %d", len(got), at)
		}
		at, n = at+int64(len(got)), n+int64(k)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
