package handover

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
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
	isUnread   bool // not all of it could be read
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
			q.pairs = append(q.pairs, &queuePair{generation: generation})
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

// Flows are those in the queue: they stay there, and the caller closes these copies of them. wrong says what
// can't be used.
func (q *Queue) Flows() (flows []*KeptFlow, wrong []error) {
	q.mu.Lock()
	pairs := slices.Clone(q.pairs)
	q.mu.Unlock()
	seen := map[uint64]bool{}
	for _, p := range slices.Backward(pairs) {
		n, messages := 0, 0
		errs := p.read(func(some []*KeptFlow) {
			messages++
			n += len(some)
			for _, k := range some {
				cookie, err := unix.GetsockoptUint64(k.down, unix.SOL_SOCKET, unix.SO_COOKIE)
				if err != nil || seen[cookie] || k.isGone() {
					k.Close()
					continue
				}
				seen[cookie] = true
				flows = append(flows, k)
			}
		})
		wrong = append(wrong, errs...)
		q.mu.Lock()
		p.flows, p.messages, p.isUnread = n, messages, len(errs) > 0
		q.mu.Unlock()
	}
	return flows, wrong
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

// Put puts flows in, and closes them. It returns how many of the first are kept: an error says why others are
// not. Of Put and Renew one call may be under way.
func (q *Queue) Put(flows iter.Seq[*KeptFlow]) (kept int, err error) {
	q.mu.Lock()
	isClosed, isNew := q.isClosed, len(q.pairs) == 0
	q.mu.Unlock()
	if isNew && !isClosed {
		_, err = q.begin()
	}
	q.mu.Lock()
	var p *queuePair
	if len(q.pairs) > 0 {
		p = q.pairs[len(q.pairs)-1]
	}
	q.mu.Unlock()
	if p == nil {
		err = cmp.Or(err, ErrQueueClosed)
	}
	return q.put(p, flows, err)
}

// Renew puts flows, which are all that live, into another pair, and gives up those before it. Where that can
// keep less than least of them, which is an error, these stay, and so does what is kept.
func (q *Queue) Renew(flows iter.Seq[*KeptFlow], least int) (kept int, err error) {
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
		unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, mostQueued) // as far as the kernel lets it
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
func (q *Queue) put(p *queuePair, flows iter.Seq[*KeptFlow], before error) (kept int, err error) {
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
	for k := range flows {
		if some = append(some, k); len(some) == mostTogether {
			send()
		}
		if err != nil {
			break
		}
	}
	send()
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
			if b, err = json.Marshal(m); err != nil {
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

// read calls flows with copies of those of each message that is in flight.
func (p *queuePair) read(flows func([]*KeptFlow)) (wrong []error) {
	err := control(p.out, func(fd int) error {
		// Each look at a message is at the next one, from the first.
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0))
	})
	b := new(receiveBuffer)
	for err == nil {
		var some []*KeptFlow
		var isOver bool
		err = control(p.out, func(fd int) (err error) {
			some, isOver, err = b.receive(fd)
			return err
		})
		if isOver {
			return wrong
		}
		flows(some)
		if isMessage := errors.As(err, new(*badMessage)); isMessage { // but the next may be well
			wrong, err = append(wrong, err), nil
		}
	}
	return append(wrong, err)
}

// badMessage is what is wrong with one message.
type badMessage struct{ error }

func (e *badMessage) Unwrap() error { return e.error }

// drain ends all that is in flight, whoever has the ends: the kernel closes what nobody has room for.
func (p *queuePair) drain() {
	fd, err := descriptor(p.out)
	for b := make([]byte, 1); err == nil || err == unix.EINTR; {
		var n int
		if n, _, err = unix.Recvfrom(fd, b, unix.MSG_DONTWAIT); n == 0 && err == nil {
			return
		}
	}
}

// receiveBuffer is room for a message and its descriptors.
type receiveBuffer struct {
	b   [mostBytes + 1]byte
	oob [4 * (253 + 16)]byte
}

// receive gives copies of the flows of the next message. isOver: there is none.
func (r *receiveBuffer) receive(fd int) (flows []*KeptFlow, isOver bool, err error) {
	b, oob := r.b[:], r.oob[:]
	n, oobn, got, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	switch {
	case err == unix.EINTR:
		return nil, false, nil
	case err == unix.EAGAIN || err == nil && n == 0:
		return nil, true, nil
	case err != nil:
		return nil, false, os.NewSyscallError("recvmsg", err)
	}
	fds, err := receivedFDs(oob[:oobn])
	var m *Message
	if err == nil && (n > mostBytes || got&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = errors.New("no message: not all of it could be received")
	}
	if err == nil {
		m, err = Parse(b[:n], len(fds))
	}
	if err == nil && m.Step != keptStep {
		err = fmt.Errorf("message %q is none of flows that are kept", m.Step)
	}
	if err != nil {
		for _, fd := range fds { // nobody would move their bytes, and the queue has them still
			tcpsock.Abort(fd)
			unix.Close(fd)
		}
		return nil, false, &badMessage{err}
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
	return flows, false, nil
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
