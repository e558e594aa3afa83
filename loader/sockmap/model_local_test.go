package sockmap

import (
	"fmt"
	"strings"
	"testing"
)

// A model of the way back past TCP, as bpf/skmsg.bpf.c has it: the process's send() with `msg_redirect`, its
// connection with upstream, the verdict on that, the worker, userspace that copies, and the correction of
// `out` after a redirect that was cut short. One step is what other CPUs can see of it; each byte is its
// number.
type backModel struct {
	next int8 // the byte that the process sends next
	push int8 // bytes that a redirect is about to write; those it does not write, the process sends again
	cuts int8 // redirects that were cut short

	out, tcp                     int8 // bytes that went each way, as `msg_redirect` and write_seq count them
	wire                         queue
	verdict                      verdictStep // vDecide, or counted and not yet queued
	redirected, passed, consumed int8
	backlog, source, peer        queue

	rest   int8 // the byte that userspace has read; -1: none
	copied int8

	settle settleStep
	byTCP  int8 // what settle has read
}

type settleStep int8

const (
	sIdle settleStep = iota
	sRead            // byTCP
	sLook            // and correct
)

type backVariant struct {
	noSettle  bool // out stays as it is
	noLock    bool // settle does not wait for the verdict that has counted
	noBacklog bool // nor look whether something waits for the worker
	noRefs    bool // nor whether a redirect is at work
	noOrder   bool // bytes go past TCP though some by TCP have not arrived
}

func (m backModel) steps(bytes int8, v backVariant) (out []backModel) {
	add := func(n backModel) { out = append(out, n) }

	// The process.
	switch {
	case m.push > 0:
		n := m
		n.peer, n.next, n.push = m.peer.push(m.next), m.next+1, m.push-1
		add(n)
		if m.cuts < 2 {
			n := m
			n.push, n.cuts = 0, m.cuts+1
			add(n)
		}
	case m.next < bytes:
		if m.peer.n == m.out+m.tcp || v.noOrder {
			n := m
			n.push = min(2, bytes-m.next)
			n.out += n.push
			add(n)
		}
		n := m
		n.wire, n.tcp, n.next = m.wire.push(m.next), m.tcp+1, m.next+1
		add(n)
	}

	// The verdict on upstream, and the worker.
	switch n := m; m.verdict {
	case vDecide:
		if m.wire.n > 0 {
			n.passed++
			n.verdict = vPassQueue
			add(n)
			if m.passed == m.consumed {
				n = m
				n.redirected++
				n.verdict = vRedirectQueue
				add(n)
			}
		}
	case vPassQueue, vRedirectQueue:
		var b int8
		b, n.wire = m.wire.pop()
		if n.verdict = vDecide; m.verdict == vPassQueue {
			n.source = m.source.push(b)
		} else {
			n.backlog = m.backlog.push(b)
		}
		add(n)
	}
	if m.backlog.n > 0 {
		n := m
		var b int8
		b, n.backlog = m.backlog.pop()
		n.peer = m.peer.push(b)
		add(n)
	}

	// Userspace copies.
	switch n := m; {
	case m.copied > m.consumed:
		n.consumed = m.copied
		add(n)
	case m.rest < 0 && m.source.n > 0:
		n.rest, n.source = m.source.pop()
		add(n)
	case m.rest >= 0 && m.peer.n >= m.redirected+m.copied+m.out:
		n.peer, n.rest, n.copied = m.peer.push(m.rest), -1, m.copied+1
		add(n)
	}

	// The sweep.
	switch n := m; m.settle {
	case sIdle:
		if m.peer.n < m.out+m.redirected+m.consumed && !v.noSettle {
			n.settle, n.byTCP = sRead, m.redirected+m.consumed
			add(n)
		}
	case sRead:
		if m.verdict == vDecide || v.noLock {
			n.settle = sLook
			add(n)
		}
	case sLook:
		settled := (m.backlog.n == 0 || v.noBacklog) && (m.push == 0 || v.noRefs) &&
			m.redirected+m.consumed == m.byTCP
		if settled && m.out > m.peer.n-m.byTCP {
			n.out = m.peer.n - m.byTCP
		}
		n.settle, n.byTCP = sIdle, 0
		add(n)
	}
	return out
}

// checkBack visits every reachable state, and looks whether all bytes can still arrive from each.
func checkBack(bytes int8, v backVariant) (states int, wrong string) {
	start := backModel{rest: -1}
	from := map[backModel][]backModel{start: nil}
	todo := []backModel{start}
	var ends []backModel
	for len(todo) > 0 {
		m := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for i := range m.peer.n {
			if m.peer.b[i] != i {
				return len(from), fmt.Sprintf("out of order: %v", m.peer.b[:m.peer.n])
			}
		}
		if m.peer.n == bytes {
			ends = append(ends, m)
		}
		for _, n := range m.steps(bytes, v) {
			if _, seen := from[n]; !seen {
				todo = append(todo, n)
			}
			from[n] = append(from[n], m)
		}
	}
	live := make(map[backModel]bool)
	for len(ends) > 0 {
		m := ends[len(ends)-1]
		ends = ends[:len(ends)-1]
		if !live[m] {
			live[m] = true
			ends = append(ends, from[m]...)
		}
	}
	for m := range from {
		if !live[m] {
			return len(from), fmt.Sprintf("stands still with %d of %d bytes delivered: %+v", m.peer.n, bytes,
				m)
		}
	}
	return len(from), ""
}

const backBytes = 6

func TestModelOfTheWayBack(t *testing.T) {
	for bytes := int8(1); bytes <= backBytes; bytes++ {
		states, wrong := checkBack(bytes, backVariant{})
		if wrong != "" {
			t.Errorf("%d bytes: %s", bytes, wrong)
		}
		t.Logf("%d bytes: %d states", bytes, states)
	}
}

func TestModelOfTheWayBackFindsBrokenProtocols(t *testing.T) {
	for name, c := range map[string]struct {
		v    backVariant
		want string
	}{
		"nobody corrects out":                   {backVariant{noSettle: true}, "stands still"},
		"settle does not wait for the verdict":  {backVariant{noLock: true}, "out of order"},
		"settle does not look at the backlog":   {backVariant{noBacklog: true}, "out of order"},
		"settle does not look for redirects":    {backVariant{noRefs: true}, "out of order"},
		"bytes go past those that wait for TCP": {backVariant{noOrder: true}, "out of order"},
	} {
		t.Run(name, func(t *testing.T) {
			for bytes := int8(1); bytes <= backBytes; bytes++ {
				if _, wrong := checkBack(bytes, c.v); wrong != "" {
					if !strings.Contains(wrong, c.want) {
						t.Errorf("found %q instead of %q", wrong, c.want)
					}
					t.Logf("%d bytes: %s", bytes, wrong)
					return
				}
			}
			t.Error("nothing was found")
		})
	}
}
