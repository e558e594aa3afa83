package handover

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Queue keeps flows that live for the process after a crash. They are in flight, as the kernel has it: sent
// into a pair of sockets and not received by anybody, with descriptors of theirs. The service manager has
// both ends, so a crash ends neither. For the manager a queue is two descriptors, however many flows there
// are.
//
// Flows can't be taken out of its middle. Those that have ended stay until [Queue.Renew] puts those that live
// into another pair.
type Queue struct {
	store func() error
	most  int // flows of a pair

	mu sync.Mutex
	// +checklocks:mu
	pairs []*queuePair // the newest is the last; there are several while it gets the flows of the others
	// +checklocks:mu
	isClosed bool
}

// queuePair is a pair of sockets, of one generation.
type queuePair struct {
	generation uint64
	in, out    *os.File
	flows      int  // that are in flight; of who puts them in
	messages   int  // that they are in
	isUnread   bool // another process has left it, and not all of it was read
}

const (
	// mostQueued is how many bytes may wait in a pair, with what the kernel takes for them. A flow takes
	// about 1 KB.
	mostQueued = 512 << 20
	// mostTogether bounds the flows of a message.
	mostTogether = 16
	// mostMessages are read soon: for each the kernel looks at all before it.
	mostMessages = 512
)

var errQueueFull = errors.New("the kernel lets a process have no more descriptors in flight (LimitNOFILE=, CAP_SYS_RESOURCE)")

// ErrQueueClosed is the error of a [Queue] that is closed.
var ErrQueueClosed = errors.New("no flow is kept any more")

// OpenQueue opens the queue that a process has left which has ended, of which handed are the ends, or one
// that has nothing. store has the manager keep [Queue.Sockets], and nothing that was among them before.
//
// +checklocksignore: nobody else has the Queue yet
func OpenQueue(handed []Socket, store func() error) *Queue {
	q := &Queue{store: store, most: mostInFlight()}
	for _, s := range handed {
		generation, err := strconv.ParseUint(s.Address, 10, 64)
		if err != nil { // it is none of ours
			s.File.Close()
			continue
		}
		i := slices.IndexFunc(q.pairs, func(p *queuePair) bool { return p.generation == generation })
		if i < 0 {
			i = len(q.pairs)
			q.pairs = append(q.pairs, &queuePair{generation: generation, isUnread: true})
		}
		if s.Kind == KindFlowsIn {
			q.pairs[i].in = s.File
		} else {
			q.pairs[i].out = s.File
		}
	}
	q.pairs = slices.DeleteFunc(q.pairs, func(p *queuePair) bool {
		if isHalf := p.in == nil || p.out == nil; isHalf { // it was about to be made, or to go
			p.close()
			return true
		}
		return false
	})
	slices.SortFunc(q.pairs, func(a, b *queuePair) int { return cmp.Compare(a.generation, b.generation) })
	return q
}

// Flows calls each with the flows that a process has left which has ended. They stay in the queue, and each
// closes these copies of them. It may wait for others that it was called with: they are read a message at a
// time, so that few descriptors are needed. Once ctx has ended, those that are left are reset. wrong says
// what can't be used, which is reset, as far as it can be received.
func (q *Queue) Flows(ctx context.Context, each func(*KeptFlow)) (wrong []error) {
	q.mu.Lock()
	pairs := slices.DeleteFunc(slices.Clone(q.pairs), func(p *queuePair) bool { return !p.isUnread })
	q.mu.Unlock()
	r := &queueReader{each: each, seen: map[uint64]bool{}}
	defer r.spend()
	for _, p := range slices.Backward(pairs) {
		r.spare(p)
		flows, messages, errs := r.read(ctx, p)
		wrong = append(wrong, errs...)
		q.mu.Lock()
		p.flows, p.messages, p.isUnread = flows, messages, len(errs) > 0
		q.mu.Unlock()
	}
	return wrong
}

// Len is how many flows the newest pair has, those included that have ended since. isWhole: there is no other
// one that may have others, and this one is well. Where some of it can't be read, or it would take long to
// read it, it is to be renewed.
func (q *Queue) Len() (flows int, isWhole bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.pairs) == 0 {
		return 0, true
	}
	p := q.pairs[len(q.pairs)-1]
	return p.flows, len(q.pairs) == 1 && !p.isUnread && p.messages <= mostMessages+p.flows/8
}

// Sockets are copies of all ends. The caller closes them.
func (q *Queue) Sockets() (all []Socket, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range q.pairs {
		for kind, f := range map[string]*os.File{KindFlowsIn: p.in, KindFlowsOut: p.out} {
			own, err := descriptor(f)
			if err == nil {
				own, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0)
			}
			if err != nil {
				Close(all)
				return nil, os.NewSyscallError("fcntl", err)
			}
			all = append(all, Socket{Kind: kind, Address: strconv.FormatUint(p.generation, 10),
				File: os.NewFile(uintptr(own), kind)})
		}
	}
	return all, nil
}

// Put puts flows in, and closes them, up to an error among them. It returns how many of the first are kept:
// an error says why others are not. Of Put and Renew one call may be under way. What [Queue.Flows] is still
// to read gets no more: it would be taken for what the other process has left.
func (q *Queue) Put(flows iter.Seq2[*KeptFlow, error]) (kept int, err error) {
	var p *queuePair
	q.mu.Lock()
	if n := len(q.pairs); n > 0 && !q.pairs[n-1].isUnread {
		p = q.pairs[n-1]
	}
	q.mu.Unlock()
	if p == nil {
		p, err = q.begin()
	}
	return q.put(p, flows, err)
}

// Renew puts flows, which are all that live, into another pair, and gives up those before it. With an error,
// which may be one among the flows, and less than least of them there, these stay, and so does what is kept.
func (q *Queue) Renew(flows iter.Seq2[*KeptFlow, error], least int) (kept int, err error) {
	p, err := q.begin()
	kept, err = q.put(p, flows, err)
	q.mu.Lock()
	old := slices.DeleteFunc(slices.Clone(q.pairs), func(o *queuePair) bool { return o == p })
	if p == nil || err != nil && kept < least {
		old = slices.DeleteFunc(slices.Clone(q.pairs), func(o *queuePair) bool { return o != p })
	}
	q.pairs = slices.DeleteFunc(q.pairs, func(o *queuePair) bool { return slices.Contains(old, o) })
	q.mu.Unlock()
	for _, o := range old {
		o.drain()
		o.close()
	}
	return kept, errors.Join(err, q.store())
}

// begin has another pair, and the manager keep it.
func (q *Queue) begin() (*queuePair, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	// Another process may have begun at 1, and the manager not have been told that its are given up.
	p := &queuePair{generation: rand.Uint64N(1<<40) + 1,
		in: os.NewFile(uintptr(fds[0]), KindFlowsIn), out: os.NewFile(uintptr(fds[1]), KindFlowsOut)}
	if unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, mostQueued) != nil {
		unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, mostQueued) // or less, by the kernel
	}
	q.mu.Lock()
	if n := len(q.pairs); n > 0 {
		p.generation = q.pairs[n-1].generation + 1
	}
	isClosed := q.isClosed
	if !isClosed {
		q.pairs = append(q.pairs, p)
	}
	q.mu.Unlock()
	if isClosed {
		p.close()
		return nil, ErrQueueClosed
	}
	if err := q.store(); err != nil {
		q.mu.Lock()
		q.pairs = slices.DeleteFunc(q.pairs, func(o *queuePair) bool { return o == p })
		q.mu.Unlock()
		p.close()
		return nil, err
	}
	return p, nil
}

// put puts flows into p unless there is an error already, and closes them.
func (q *Queue) put(p *queuePair, flows iter.Seq2[*KeptFlow, error], before error) (kept int, err error) {
	err = before
	var some []*KeptFlow
	q.mu.Lock()
	room, messages := 0, 0
	if p != nil {
		room = q.most - p.flows
	}
	q.mu.Unlock()
	send := func() {
		if err == nil && kept+len(some) > room {
			err = errQueueFull
		}
		if err == nil && len(some) > 0 {
			var n, m int
			n, m, err = p.send(some)
			kept, messages = kept+n, messages+m
		}
		for _, k := range some {
			k.Close()
		}
		some = some[:0]
	}
	var noMore error
	for k, wrong := range flows {
		if noMore = wrong; noMore != nil {
			break
		}
		if some = append(some, k); len(some) == mostTogether {
			send()
		}
		if err != nil {
			break
		}
	}
	send()
	if err == nil {
		err = noMore
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if p != nil {
		p.flows, p.messages = p.flows+kept, p.messages+messages
	}
	return kept, err
}

// mostInFlight is how many flows a pair may have, of which there are two at times. Without a capability the
// kernel counts what all processes of the user have in flight, and refuses more than a process may have open
// (net/core/scm.c, too_many_unix_fds): other descriptors have to be sent as well.
func mostInFlight() int {
	var sets [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &sets[0])
	if err == nil && sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE|1<<unix.CAP_SYS_ADMIN) != 0 {
		return math.MaxInt
	}
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) != nil {
		return 0
	}
	return int(min(files.Cur, math.MaxInt32) / 8)
}

// send sends flows, as many in a message as fit.
func (p *queuePair) send(flows []*KeptFlow) (sent, messages int, err error) {
	for len(flows) > 0 {
		n := len(flows)
		var b []byte
		var fds []int
		for ; ; n = (n + 1) / 2 {
			m := Message{Version: Version, Step: keptStep}
			fds = fds[:0]
			for i, k := range flows[:n] {
				k.Flow.Number, k.Flow.Version = uint64(i+1), max(k.Flow.Version, FlowVersion)
				m.Flows = append(m.Flows, k.Flow)
				m.Sockets = append(m.Sockets, Socket{Kind: KindDown, Flow: k.Flow.Number},
					Socket{Kind: KindUp, Flow: k.Flow.Number})
				fds = append(fds, k.down, k.up)
			}
			if b, err = m.encode(); err != nil {
				return sent, messages, err
			}
			if len(b) <= mostBytes {
				break
			} else if n == 1 {
				return sent, messages, fmt.Errorf("the record of a flow is too large: %d bytes", len(b))
			}
		}
		err := control(p.in, func(fd int) error {
			return os.NewSyscallError("sendmsg",
				unix.Sendmsg(fd, b, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL))
		})
		if err != nil {
			return sent, messages, err
		}
		sent, messages = sent+n, messages+1
		flows = flows[n:]
	}
	return sent, messages, nil
}

// control calls do with f's descriptor, which nobody closes meanwhile.
func control(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err == nil {
		if cerr := c.Control(func(fd uintptr) { err = do(int(fd)) }); cerr != nil {
			return cerr
		}
	}
	return err
}

// drain ends all that is in flight, whoever has the ends: the kernel closes what nobody has room for.
func (p *queuePair) drain() {
	_ = control(p.out, func(fd int) error {
		for b := make([]byte, 1); ; {
			n, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
			if n == 0 && err == nil || err != nil && err != unix.EINTR {
				return err
			}
		}
	})
}

// queueReader reads what is in flight.
type queueReader struct {
	each   func(*KeptFlow)
	seen   map[uint64]bool // the cookies of the sockets of all flows that each was called with
	spared []int           // descriptors that are given up for a message where there are no others
	waited time.Duration   // for descriptors
	receiveBuffer
}

// mostFilesWait bounds how long descriptors are waited for in all.
const mostFilesWait = 10 * time.Second

var (
	errNoFiles = errors.New("no descriptors are free for the sockets of some flows, which are reset (LimitNOFILE=)")
	errGivenUp = errors.New("flows that were not looked at yet are reset, as this process is to end")
)

// read has a look at each message that is in flight.
func (r *queueReader) read(ctx context.Context, p *queuePair) (flows, messages int, wrong []error) {
	for at := 0; ; {
		n, fds, isCut, err := r.look(p, at)
		if isCut {
			closeAll(fds)
			if r.await(ctx) {
				continue
			}
			r.spend() // what is received now can be reset at least
			n, fds, _, err = r.look(p, at)
		}
		switch {
		case err != nil:
			return flows, messages, append(wrong, err)
		case n == 0:
			return flows, messages, wrong
		}
		at += n
		messages++
		var some []*KeptFlow
		switch {
		case isCut:
			err = errNoFiles
		case ctx.Err() != nil:
			err = errGivenUp
		default:
			some, err = unpack(r.b[:n], fds)
		}
		if err != nil {
			r.reset(fds)
			if !slices.Contains(wrong, err) {
				wrong = append(wrong, err)
			}
		}
		r.spare(p)
		flows += len(some)
		r.call(some)
	}
}

// call calls each with flows that it was not called with before.
func (r *queueReader) call(flows []*KeptFlow) {
	for _, k := range flows {
		down, err := unix.GetsockoptUint64(k.down, unix.SOL_SOCKET, unix.SO_COOKIE)
		up, err2 := unix.GetsockoptUint64(k.up, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil || err2 != nil || r.seen[down] || k.isGone() {
			k.Close()
			continue
		}
		r.seen[down], r.seen[up] = true, true
		r.each(k)
	}
}

// reset resets and closes sockets of flows that can't be used: nobody would move their bytes, and the queue
// has them still. Those of flows that each was called with it only closes.
func (r *queueReader) reset(fds []int) {
	for _, fd := range fds {
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err == nil && !r.seen[cookie] {
			cut(fd)
		}
		unix.Close(fd)
	}
}

// await waits for descriptors, unless it has waited for too long in all.
func (r *queueReader) await(ctx context.Context) bool {
	const pause = 10 * time.Millisecond
	if r.waited += pause; r.waited > mostFilesWait {
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(pause):
		return true
	}
}

// spare has as many descriptors as a message may have sockets, as far as there are any.
func (r *queueReader) spare(p *queuePair) {
	_ = control(p.out, func(fd int) error {
		for len(r.spared) < 2*mostTogether {
			own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			r.spared = append(r.spared, own)
		}
		return nil
	})
}

func (r *queueReader) spend() {
	closeAll(r.spared)
	r.spared = nil
}

// look gives the message that comes after so many bytes, with copies of its descriptors. n is 0 where there
// is none. isCut: there was no room for all descriptors.
func (r *queueReader) look(p *queuePair, after int) (n int, fds []int, isCut bool, err error) {
	var oobn, flags int
	err = control(p.out, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, after); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		for {
			var err error
			n, oobn, flags, _, err = unix.Recvmsg(fd, r.b[:], r.oob[:],
				unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			switch err {
			case unix.EINTR:
			case unix.EAGAIN:
				n, oobn, flags = 0, 0, 0
				return nil
			default:
				return os.NewSyscallError("recvmsg", err)
			}
		}
	})
	if err != nil {
		return 0, nil, false, err
	}
	fds, err = receivedFDs(r.oob[:oobn])
	if err != nil {
		closeAll(fds)
		return 0, nil, false, err
	}
	return n, fds, flags&unix.MSG_CTRUNC != 0, nil
}

// unpack gives the flows of a message, which own fds. With an error the caller does.
func unpack(b []byte, fds []int) (flows []*KeptFlow, err error) {
	if len(b) > mostBytes {
		return nil, errors.New("no message: it is too long")
	}
	m, err := Parse(b, len(fds))
	if err == nil && m.Step != keptStep {
		err = fmt.Errorf("message %q is none of flows that are kept", m.Step)
	}
	if err != nil {
		return nil, err
	}
	of := map[uint64]*KeptFlow{}
	for _, f := range m.Flows {
		of[f.Number] = &KeptFlow{Flow: f, down: -1, up: -1}
		flows = append(flows, of[f.Number])
	}
	for i, s := range m.Sockets {
		switch k := of[s.Flow]; {
		case k != nil && s.Kind == KindDown:
			k.down = fds[i]
		case k != nil && s.Kind == KindUp:
			k.up = fds[i]
		default:
			unix.Close(fds[i])
		}
	}
	return flows, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func (p *queuePair) close() {
	for _, f := range []*os.File{p.in, p.out} {
		if f != nil {
			f.Close()
		}
	}
}

// Close gives up all flows: none is kept any more, also where the manager still has the ends. It does not
// tell the manager.
func (q *Queue) Close() {
	q.mu.Lock()
	pairs := q.pairs
	q.pairs, q.isClosed = nil, true
	q.mu.Unlock()
	for _, p := range pairs {
		p.drain()
		p.close()
	}
}
