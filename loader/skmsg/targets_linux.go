package skmsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
)

const (
	// learnAgain is how long a target that could not be learned is left alone.
	learnAgain = 10 * time.Second
	// missedMost is how many sockets in a row may be missed before a target is learned anew: its process may
	// have been started again, in another cgroup.
	missedMost = 4
	// claimWithin is how long a captured socket may wait for its flow, before it is taken out of the map.
	claimWithin = 5 * time.Second
	// zeroCopyAgain is how long a target that sends with MSG_ZEROCOPY is left alone.
	zeroCopyAgain = 10 * time.Minute
)

// Why a flow is not taken, beside the reasons of sockmap.
const (
	refusedTargets     = sockmap.Refusal("more targets than sk_msg can track are in use")
	refusedElsewhere   = sockmap.Refusal("the target is not a process on this host")
	refusedRootCgroup  = sockmap.Refusal("the target's process is in the root cgroup")
	refusedNoCgroup    = sockmap.Refusal("the cgroup of the target's process could not be found")
	refusedAttach      = sockmap.Refusal("the program could not be attached to the cgroup of the target's process")
	refusedZeroCopy    = sockmap.Refusal("the target's process sends with MSG_ZEROCOPY")
	refusedNotCaptured = sockmap.Refusal("the target's socket was not seen when it was created")
	refusedPair        = sockmap.Refusal("the target's socket is not the peer of ours")
)

// The same of a flow that may be taken later.
var (
	refusedUnknown = later{"the target's process is not known yet", false}
	refusedHeld    = later{"the target's socket is on its way from another daemon", true}
)

type later struct {
	sockmap.Refusal
	isNew bool // also a flow that begins here, whose target's socket was captured as it was accepted
}

// Later tells userspace/relay so.
func (l later) Later(isNew bool) bool { return l.isNew || !isNew }

// targets are the addresses that flows go to, and what is known about who listens there.
type targets struct {
	n *Local

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	// +checklocks:mu
	hasLeft bool // what is accepted is another daemon's to capture
	// +checklocks:mu
	known map[netip.AddrPort]*target
	// +checklocks:mu
	groups  map[string]*group // with the program, by folder
	working sync.WaitGroup
}

type target struct {
	why    error     // why flows to it are refused; nil: its sockets are captured
	group  string    // the folder of its cgroup
	space  int32     // its network namespace, as capture_late takes it
	again  time.Time // when it is to be learned anew; zero: never
	used   time.Time // when a flow last asked for it
	missed int       // sockets in a row that were not captured
}

// group is a cgroup that the programs are attached to.
type group struct {
	links []link.Link
	flows int // with a socket in it, whose end the programs see
}

func (g *group) close() error {
	var errs []error
	for _, a := range g.links {
		errs = append(errs, a.Close())
	}
	return errors.Join(errs...)
}

// +checklocksignore: nobody else has it yet.
func (t *targets) init(n *Local) {
	t.n, t.known, t.groups = n, make(map[netip.AddrPort]*target), make(map[string]*group)
}

// find gives the process's socket at the other end of up, or says why there is none. It never waits: an
// unknown target is looked up meanwhile, for the flows to come.
func (t *targets) find(up int) (*process, error) {
	at, own := withoutZone(tcpsock.Remote(up)), withoutZone(tcpsock.Local(up))
	if !at.IsValid() { // a connection that was reset names no peer
		return nil, sockmap.RefusedState
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.hasLeft {
		return nil, sockmap.RefusedOff
	}
	k, now := t.known[at], time.Now()
	if k == nil || k.why != nil && !k.again.IsZero() && now.After(k.again) {
		if k == nil && len(t.known) >= maxTargets && !t.forget(now) {
			return nil, refusedTargets
		}
		t.learn(at, own)
		return nil, refusedUnknown
	}
	k.used = now
	if k.why != nil {
		return nil, k.why
	}
	p, err := t.n.captured(pairOf(at, own), k.space)
	switch err {
	case refusedZeroCopy:
		k.why, k.again = err, now.Add(zeroCopyAgain)
	case refusedNotCaptured:
		if k.missed++; k.missed >= missedMost {
			t.learn(at, own)
		}
	}
	if err != nil {
		return nil, err
	}
	k.missed = 0
	if p.group = t.groups[k.group]; p.group != nil {
		p.group.flows++
	}
	return p, nil
}

// captured gives the socket of a pair, or says why the kernel has captured none.
func (n *Local) captured(pair skmsgPair, space int32) (*process, error) {
	p := &process{local: n, pair: pair}
	if n.objects.Locals.Lookup(pair, &p.cookie) == nil {
		return p, nil
	}
	switch n.captureLate(pair, space) {
	case skmsgLocalAnswerLOCAL_THERE:
		if n.objects.Locals.Lookup(pair, &p.cookie) == nil {
			p.isLate = true
			return p, nil
		}
	case skmsgLocalAnswerLOCAL_HELD:
		return nil, refusedHeld
	}
	var is skmsgLocalTarget
	if n.objects.Targets.Lookup(pair.Own, &is) == nil && is == skmsgLocalTargetTARGET_ZEROCOPY {
		return nil, refusedZeroCopy
	}
	return nil, refusedNotCaptured
}

// captureLate captures a socket that an earlier daemon had captured. The answer is LOCAL_THERE or LOCAL_HELD,
// or 0 where there is no such socket.
func (n *Local) captureLate(pair skmsgPair, space int32) skmsgLocalAnswer {
	if space == unnamedSpace {
		return 0
	}
	key, err := binary.Append(make([]byte, ethernetHeader), binary.NativeEndian, pair)
	if err != nil {
		return 0
	}
	answer, err := n.run(n.objects.CaptureLate, key, uint32(space))
	if err != nil {
		return 0
	}
	return answer
}

// release is told that a flow which find gave a process has ended, or has not begun.
func (t *targets) release(p *process) {
	if p.group == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p.group.flows--
	p.group = nil
}

// maxTargets is the size of the map.
const maxTargets = 4096

// forget makes room for a target: the one that no flow went to for the longest time goes. It reports false
// where that was not long ago: else more targets than there is room for would take it from each other with
// every flow.
// +checklocks:t.mu
func (t *targets) forget(now time.Time) bool {
	var oldest netip.AddrPort
	var was *target
	for at, k := range t.known {
		if was == nil || k.used.Before(was.used) {
			oldest, was = at, k
		}
	}
	if now.Sub(was.used) < learnAgain {
		return false
	}
	delete(t.known, oldest)
	_ = t.n.objects.Targets.Delete(endOf(oldest))
	return true
}

// learn finds out in the background which cgroup the socket at, which is connected to other, belongs to. From
// then on the sockets that are accepted there are captured.
// +checklocks:t.mu
func (t *targets) learn(at, other netip.AddrPort) {
	k := &target{why: refusedUnknown, used: time.Now()}
	t.known[at] = k
	t.working.Add(1)
	go func() {
		defer t.working.Done()
		group, space, err := cgroupOf(at, other)
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.closed || t.hasLeft || t.known[at] != k { // it was forgotten meanwhile
			return
		}
		if err == nil {
			err = t.attach(at, group)
		}
		if err != nil {
			why := refusedNoCgroup
			if !errors.As(err, &why) {
				err = fmt.Errorf("%w: %w", why, err)
			}
			k.why, k.again = why, time.Now().Add(learnAgain)
			t.n.log.Info("a target can't use datapath sk_msg", "target", at, "reason", err)
			_ = t.n.objects.Targets.Delete(endOf(at))
		} else {
			k.why, k.group, k.space = nil, group, space
			t.n.log.Info("a target is a process on this host, and uses datapath sk_msg", "target", at, "cgroup", group)
		}
		t.detachUnused()
	}()
}

// attach has the sockets captured that are accepted in the cgroup at that address.
// +checklocks:t.mu
func (t *targets) attach(at netip.AddrPort, path string) error {
	if t.groups[path] == nil {
		g := &group{}
		for _, o := range []link.CgroupOptions{
			{Path: path, Attach: ebpf.AttachCGroupSetsockopt, Program: t.n.objects.SockoptRefuse},
			{Path: path, Attach: ebpf.AttachCGroupSockOps, Program: t.n.objects.SockopsCapture},
		} {
			a, err := link.AttachCgroup(o)
			if err != nil {
				return errors.Join(fmt.Errorf("%w (%s: %w)", refusedAttach, path, err), g.close())
			}
			g.links = append(g.links, a)
		}
		t.groups[path] = g
	}
	return t.n.objects.Targets.Put(endOf(at), uint32(skmsgLocalTargetTARGET_CAPTURE))
}

// detachUnused closes the links to cgroups in which neither a target nor a socket of a flow is any more.
// +checklocks:t.mu
func (t *targets) detachUnused() {
	used := make(map[string]bool)
	for _, k := range t.known {
		used[k.group] = true
	}
	for path, g := range t.groups {
		if !used[path] && g.flows == 0 {
			_ = g.close()
			delete(t.groups, path)
		}
	}
}

// Leave has another daemon capture what targets accept from now on: of two, the first one would get it. No
// flow is taken any more, and those that are here go on.
func (n *Local) Leave() {
	t := &n.targets
	t.mu.Lock()
	t.hasLeft = true
	for at := range t.known { // those that are not captured are not there
		_ = n.objects.Targets.Update(endOf(at), uint32(skmsgLocalTargetTARGET_LEFT), ebpf.UpdateExist)
	}
	t.mu.Unlock()
	n.sweep(0)
}

func (t *targets) close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.working.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, g := range t.groups {
		errs = append(errs, g.close())
	}
	t.groups = nil
	return errors.Join(errs...)
}

// Sweep takes sockets out of the map that no flow has claimed in time: those of somebody else's connections
// to the same target.
func (n *Local) Sweep() { n.sweep(claimWithin) }

func (n *Local) sweep(within time.Duration) {
	now := monotonic()
	var pair skmsgPair
	var since uint64
	var old []skmsgPair
	for i := n.objects.Caught.Iterate(); i.Next(&pair, &since); {
		if now > since+uint64(within) {
			old = append(old, pair)
		}
	}
	for _, pair := range old {
		if n.objects.Caught.Delete(pair) == nil { // else a flow has just claimed it
			_ = n.objects.Locals.Delete(pair)
		}
	}
}

// monotonic is bpf_ktime_get_ns.
func monotonic() uint64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // there always is one
	return uint64(now.Nano())
}
