package relaytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// runProgram runs p over a flow in the hands h, and gives what it saw that was not right. No step may stand
// still for longer than patient.
func runProgram(t testing.TB, h Hands, p Program, patient time.Duration) (faults []string) {
	f := h.Path.Connect(t)
	client, server := newEnds(f, h, patient)
	defer client.c.Close()
	defer server.c.Close()
	if !h.Fast {
		for _, c := range []net.Conn{f.Client, f.Server} {
			must(t, c.(*net.TCPConn).SetReadBuffer(SmallWindow))
		}
	}
	proxied := f.Down != nil
	var relays []net.Conn
	if proxied {
		relays = []net.Conn{f.Down, f.Up}
	}
	for _, c := range relays {
		if !h.Usual {
			must(t, errors.Join(c.(*net.TCPConn).SetReadBuffer(128<<10), c.(*net.TCPConn).SetWriteBuffer(48<<10)))
		}
	}
	if h.Path.Loses { // and nobody repeats a reset that was lost, but for who is asked
		for _, c := range append(relays, f.Client, f.Server) {
			probe := net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 30}
			must(t, c.(*net.TCPConn).SetKeepAliveConfig(probe))
		}
	}
	var moved relay.Counters
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // so that a failure leaves nothing
	if proxied {
		f.Start(ctx, relay.Options{Counters: &moved})
	}
	var taken [2]int64
	if h.Take != nil {
		taken[0], taken[1] = h.Take(t, f, &moved)
	}
	var both sync.WaitGroup
	both.Go(func() { client.run(p.Client) })
	both.Go(func() { server.run(p.Server) })
	both.Wait()
	if client.v.refused || server.v.refused {
		t.Logf("%s: %q: TCP stands still, whose two ends do not agree about a window", h.Name, p)
		return nil
	}
	by := between{proxy: proxied, short: !h.Usual || h.Path.Loses}
	for _, way := range []struct{ from, to *end }{{client, server}, {server, client}} {
		for _, fault := range append(promise(&way.from.v, &way.to.v, by), way.to.v.wrong...) {
			faults = append(faults, "the "+way.to.name+" "+fault)
		}
	}
	if proxied {
		faults = append(faults, checkResult(f, &client.v, &server.v, taken, patient)...)
	}
	if len(faults) > 0 {
		faults = append(faults, fmt.Sprintf("client %+v", client.v), fmt.Sprintf("server %+v", server.v))
	}
	return faults
}

// checkResult holds what the relay says of a flow against what its ends did.
func checkResult(f *Flow, client, server *view, taken [2]int64, patient time.Duration) (faults []string) {
	var r relay.Result
	select {
	case r = <-f.result:
	case <-time.After(patient):
		return []string{"the flow does not end"}
	}
	if ok := r.End == relay.EndEOF ||
		r.End == relay.EndDownstreamReset && client.left != "" ||
		r.End == relay.EndUpstreamReset && server.left != ""; !ok {
		faults = append(faults, fmt.Sprintf("the flow ended as %q (%v)", r.End, r.Err))
	}
	for _, way := range []struct {
		name        string
		moved, took int64
		from, to    *view
	}{{"up", r.Up, taken[0], client, server}, {"down", r.Down, taken[1], server, client}} {
		n, most := way.moved-way.took, way.from.sent+int64(way.from.urgents)
		if n < way.to.got || n > most || way.from.left+way.to.left == "" && n < way.from.sent {
			faults = append(faults, fmt.Sprintf("%d bytes %s are counted, of %d to %d", n, way.name, way.to.got, most))
		}
	}
	return faults
}

// An end runs one of the two parts of a program. A goroutine of its own reads.
type end struct {
	name    string
	flow    *Flow
	c       *net.TCPConn
	other   *end
	fast    bool
	loses   bool
	patient time.Duration

	out stream // the next byte that it sends

	mu      *sync.Mutex // of both ends, so that no change of the other one is missed
	changed *sync.Cond
	v       view
	urgent  []int64 // where in its stream it sent an urgent byte
	done    int     // steps
	over    bool    // no step is left
	in      stream  // the next byte that it reads
	skipped int     // urgent bytes that were read just before that one
	hold    time.Time
	slow    time.Time
	quit    bool // the reader is to go
	looks   int  // of the reader at what it is to do
	gone    bool // the reader has gone
}

func newEnds(f *Flow, h Hands, patient time.Duration) (client, server *end) {
	changed := sync.NewCond(new(sync.Mutex))
	client, server = &end{name: "client", flow: f}, &end{name: "server", flow: f}
	for _, e := range []*end{client, server} {
		e.c, e.other, e.patient = f.Client.(*net.TCPConn), server, patient
		e.fast, e.loses = h.Fast, h.Path.Loses
		e.out = *newStream()
		e.mu, e.changed = changed.L.(*sync.Mutex), changed
	}
	server.c, server.other = f.Server.(*net.TCPConn), client
	client.in, server.in = server.out, client.out
	return client, server
}

// wrong notes what is not as it has to be.
func (e *end) wrong(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.v.wrong = append(e.v.wrong, fmt.Sprintf(format, args...))
}

// late notes that something does not come. It is called with e.mu held.
func (e *end) late(what string) {
	if s := socketAt(e.c.RemoteAddr(), e.c.LocalAddr()); s != nil {
		m := s.InetDiagMsg
		what += fmt.Sprintf(" (the other side of %s: state %d, %d bytes unread, %d unacknowledged)",
			e.c.LocalAddr(), m.State, m.RQueue, m.WQueue)
	} else {
		what += fmt.Sprintf(" (no other side of %s)", e.c.LocalAddr())
	}
	if len(e.flow.result) > 0 {
		what += " (the relay has ended the flow)"
	}
	e.v.wrong = append(e.v.wrong, what)
	e.v.refused = e.v.refused || windowRefused(e.c) || windowRefused(e.other.c)
}

// await waits until ok, which is called with e.mu held, or until it has taken too long.
func (e *end) await(what string, ok func() bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	late := false
	defer time.AfterFunc(e.patient, func() { e.set(func() { late = true }) }).Stop()
	for !ok() {
		if late {
			e.late(what + ": it does not come")
			return
		}
		e.changed.Wait()
	}
}

func (e *end) set(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
	e.changed.Broadcast()
}

// poll waits, without an event, until ok, or until the connection is broken.
func (e *end) poll(what string, ok func() bool) {
	for p := (poll{}); p.again(e.patient); {
		if ok() || e.broken() {
			return
		}
	}
	e.set(func() { e.late(what + ": it does not come") })
}

// broken reports whether e's TCP knows of a reset.
func (e *end) broken() bool {
	e.mu.Lock()
	known := e.v.told || e.v.over == sawReset
	e.mu.Unlock()
	var revents int16
	err := onSocket(e.c, func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(fds, 0)
		revents = fds[0].Revents
		return err
	})
	return known || err != nil && err != unix.EINTR || revents&(unix.POLLERR|unix.POLLHUP) != 0
}

// run does the steps, and what comes behind them.
func (e *end) run(ops []Op) {
	go e.read()
	for i, o := range ops {
		e.step(o)
		e.set(func() { e.done++ })
		if e.v.left != "" && i < len(ops)-1 {
			e.wrong("has steps behind %q", o.Do)
		}
	}
	e.set(func() { e.over = true })
	if e.v.left != "" {
		return
	}
	e.await("its last step", func() bool { return e.other.over })
	e.mu.Lock()
	mine := e.v.ended
	e.mu.Unlock()
	e.other.mu.Lock()
	reset := e.other.v.left == opReset || e.other.v.left == opClose && e.other.v.unread
	e.other.mu.Unlock()
	if !mine {
		if reset {
			e.poll("to be told of the reset", func() bool { return false })
		}
		e.end()
	}
	e.await("the end of the other's stream", func() bool { return e.gone })
	e.c.Close()
}

func (e *end) step(o Op) {
	switch o.Do {
	case opWrite:
		e.write(o.N)
	case opUrgent:
		if e.loses {
			return // Linux may take another byte for it when it has to send them again
		}
		e.set(func() { e.urgent = append(e.urgent, e.out.pos); e.v.urgents++ })
		e.c.SetWriteDeadline(time.Now().Add(e.patient))
		e.failed("urgent", sendUrgent(e.c, ^e.out.next(1)[0]))
	case opEnd:
		e.end()
	case opReset, opClose:
		e.leave(o.Do)
	case opStop:
		e.stop(func() { e.hold = time.Now().Add(time.Duration(o.N) * time.Millisecond) })
		time.AfterFunc(time.Duration(o.N)*time.Millisecond, func() { e.set(func() {}) })
	case opSlow:
		e.set(func() { e.slow = time.Now().Add(time.Duration(o.N) * time.Millisecond) })
	case opBuffer:
		if !e.fast {
			e.failed("buffer", e.c.SetReadBuffer(int(o.N)/2)) // of which the kernel takes twice as much
		}
	case opPause:
		time.Sleep(time.Duration(o.N) * time.Millisecond)
	case opAcked:
		e.poll("what was sent is acknowledged", func() bool { return e.unacked() == 0 })
	case opGot:
		e.other.mu.Lock()
		n := e.other.v.sent
		e.other.mu.Unlock()
		e.await("what the other has sent", func() bool { return e.v.got >= n || e.gone })
	case opCome:
		e.poll("something to read", func() bool {
			e.mu.Lock()
			held := time.Now().Before(e.hold)
			e.mu.Unlock()
			return !held || e.readable()
		})
	case opWait:
		done := func() bool { return e.other.done >= int(o.N) || e.other.over }
		e.await(fmt.Sprintf("step %d of the other", o.N), done)
	default:
		e.wrong("does not know how to %q", o.Do)
	}
}

// failed takes the error of a step.
func (e *end) failed(what string, err error) {
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded):
		e.set(func() { e.late(what + ": it takes too long") })
	case isReset(err) || saysReset(err) || errors.Is(err, syscall.ENOTCONN):
		e.set(func() { e.v.told = true })
	default:
		e.wrong("%s: %v", what, err)
	}
}

func (e *end) write(n int64) {
	for n > 0 {
		e.c.SetWriteDeadline(time.Now().Add(e.patient))
		m, err := e.c.Write(e.out.next(min(n, 1<<20)))
		e.out.pos += int64(m)
		n -= int64(m)
		e.set(func() { e.v.sent += int64(m) })
		if err != nil {
			e.failed("write", err)
			return
		}
	}
}

func (e *end) end() {
	e.set(func() { e.v.ended = true })
	e.failed("end", e.c.CloseWrite())
}

// leave closes the connection, by a reset or not.
func (e *end) leave(how string) {
	e.stop(func() { e.quit = true })
	unread := e.readable()
	if how == opReset {
		e.c.SetLinger(0)
	}
	unacked := int64(e.unacked())
	e.set(func() {
		e.v.whole = e.v.ended && unacked == 0
		e.v.left, e.v.unread, e.v.acked = how, unread, max(0, e.v.sent-unacked)
		e.v.ended = e.v.ended || how == opClose && !unread
	})
	e.c.Close()
}

func (e *end) unacked() (n int) {
	onSocket(e.c, func(fd int) (err error) { n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ); return err })
	return n
}

// readable reports whether bytes wait to be read.
func (e *end) readable() bool {
	n := 0
	err := onSocket(e.c, func(fd int) (err error) {
		n, _, err = unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err
	})
	if err == unix.ECONNRESET || err == unix.EPIPE { // which is told only once
		e.set(func() { e.v.told = true })
	}
	return n > 0
}

// stop changes what the reader does, and waits until it does not read any more.
func (e *end) stop(change func()) {
	looks := 0
	e.set(func() {
		change()
		looks = e.looks
		e.c.SetReadDeadline(time.Unix(1, 0))
	})
	e.await("the reader stops", func() bool { return e.looks > looks || e.gone })
}

// read reads and compares what comes, as the steps say.
func (e *end) read() {
	defer e.set(func() { e.gone = true })
	buf := buffers.Get().(*[256 << 10]byte)
	defer buffers.Put(buf)
	const piece, pause = 4 << 10, 20 * time.Millisecond
	last, begin := time.Now(), time.Now()
	for {
		e.mu.Lock()
		for {
			e.looks++
			e.changed.Broadcast()
			if e.quit {
				e.mu.Unlock()
				return
			}
			if !time.Now().Before(e.hold) {
				break
			}
			e.changed.Wait()
		}
		now := time.Now()
		e.v.paused = max(e.v.paused, now.Sub(last))
		slow := now.Before(e.slow)
		e.c.SetReadDeadline(begin.Add(e.patient))
		e.mu.Unlock()
		most := len(buf)
		if slow {
			most = piece
		}
		n, err := e.c.Read(buf[:most])
		last = time.Now()
		waited := last.Sub(now)
		if errors.Is(err, os.ErrDeadlineExceeded) && last.Sub(begin) < e.patient {
			continue // it was told to stop
		}
		begin = last
		if !e.took(buf[:n], err, waited) {
			return
		}
		if slow {
			time.Sleep(pause)
		}
	}
}

// took takes what a read gave. It is false when that was the last.
func (e *end) took(b []byte, err error, waited time.Duration) (more bool) {
	e.other.mu.Lock()
	urgent, otherEnded := e.other.urgent, e.other.v.ended
	e.other.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.changed.Broadcast()
	if cerr := e.compare(b, urgent); cerr != nil {
		e.v.wrong = append(e.v.wrong, cerr.Error())
		return false
	}
	switch {
	case err == nil:
		return true
	case err == io.EOF:
		e.v.over, e.v.early = sawEnd, !otherEnded
	case errors.Is(err, os.ErrDeadlineExceeded):
		e.late(fmt.Sprintf("got nothing for %v, behind %d bytes", e.patient, e.v.got))
	case saysReset(err) || isReset(err):
		e.v.over, e.v.waited = sawReset, waited
	default:
		e.v.wrong = append(e.v.wrong, "read: "+err.Error())
	}
	return false
}

// compare compares bytes that were read with those that the other end has sent. It is called with e.mu held.
// An urgent byte need not be among them: the reader is shown it in its place only where another one has come
// before it was read.
func (e *end) compare(b []byte, urgent []int64) error {
	for len(b) > 0 {
		n, here := int64(len(b)), 0
		for _, at := range urgent {
			if at == e.in.pos {
				here++
			} else if at > e.in.pos {
				n = min(n, at-e.in.pos)
			}
		}
		if e.skipped < here && b[0] == ^e.in.next(1)[0] {
			e.skipped++
			b = b[1:]
			continue
		}
		if err := e.in.compare(b[:n]); err != nil {
			return err
		}
		e.skipped = 0
		e.v.got += n
		b = b[n:]
	}
	return nil
}
