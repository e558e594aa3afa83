package sockmap

import (
	"fmt"
	"strings"
	"testing"
)

// A model of one direction's flow control, checked over all interleavings of small cases: the verdict of
// bpf/verdict.h, the kernel's backlog worker, and the copying of direction_linux.go, each step by step, as
// other CPUs can see it. Each skb is one byte with its number as content, so order and loss show at once.
//
// The state is small enough to be a map key; the search visits each reachable state once.
type model struct {
	// shared
	consumed, passed, redirected int8
	source                       queue // skbs that were passed and not yet read
	backlog                      queue // skbs that were redirected and not yet written
	peer                         queue // bytes that the peer's TCP was given
	bell                         bool  // an event that userspace has not yet seen
	room                         int8  // skbs that the peer's send buffer takes; the reader makes more

	// the verdict, for skb number next
	next    int8
	at      verdictStep
	seen    int8 // the consumed that it decided by
	waspass int8

	// userspace
	user   userStep
	rest   int8 // the byte it has read; -1: none
	copied int8 // its own consumed

	// epoll: what is watched for, edge-triggered, and the events that userspace has not yet seen
	in, out           bool
	inEvent, outEvent bool
	noSpace           bool // a write found no room: the socket tells when there is some

	// bulk
	left    bool  // the source is out of the sockmap
	copying bool  // userspace was told so
	leaves  int8  // how often it has left
	tcp     queue // skbs that came meanwhile
	kicked  bool
}

type queue struct {
	n int8
	b [6]int8
}

func (q queue) push(v int8) queue { q.b[q.n] = v; q.n++; return q }
func (q queue) pop() (int8, queue) {
	v := q.b[0]
	copy(q.b[:], q.b[1:])
	q.n--
	q.b[q.n] = 0
	return v, q
}

type verdictStep int8

const (
	vDecide  verdictStep = iota
	vPassAdd             // passed += 1
	vPassCheck
	vPassQueue
	vRedirectQueue
)

type userStep int8

const (
	uAsleep userStep = iota
	uCheck           // passed == consumed?
	uRead
	uWait  // until what was redirected is written
	uWrite // to the peer
	uPublish
	uWantIn  // it found nothing to read, and is about to say that it waits for some
	uWantOut // likewise, no room
	uAwait   // asleep until an event of epoll
	uBack    // it is about to come back: passed = consumed
	uInsert  // into the sockmap
	uKick
)

// variant is what a test can take away from the protocol.
type variant struct {
	noWait         bool // userspace writes without waiting for the backlog
	earlyPublish   bool // consumed is published before the write
	noRecheck      bool // the verdict rings only when it starts to pass, before it adds to passed
	noLevel        bool // epoll does not tell at once of what is already so
	leaveUnread    bool // the source leaves although bytes that were passed wait to be read
	leaveUnsettled bool // userspace goes on without waiting for the backlog when the source has left
	comeBackFull   bool // the source comes back although userspace holds a byte
	noKick         bool // nobody makes the verdict run when the source is back
}

type modelCase struct {
	skbs   int8
	room   int8
	leaves int8 // how often the source may leave the sockmap
}

// steps gives all states that can follow.
func (m model) steps(c modelCase, v variant) []model {
	var out []model
	add := func(n model) { out = append(out, n) }

	// The verdict runs for one skb at a time, under the source's lock.
	n := m
	switch {
	case m.at == vDecide && m.left: // there is none
		if m.next < c.skbs {
			n.tcp = m.tcp.push(m.next)
			n.inEvent = m.inEvent || m.in
			n.next++
			add(n)
		}
	case m.at == vDecide && m.tcp.n > 0: // what came while there was none is next
		if m.next < c.skbs || m.kicked {
			n.next -= m.tcp.n
			n.tcp, n.kicked = queue{}, false
			add(n)
		}
	}
	n = m
	switch m.at {
	case vDecide:
		if m.next < c.skbs && !m.left && m.tcp.n == 0 {
			n.seen = m.consumed
			n.waspass = m.passed
			pass := m.passed != m.consumed
			if !pass && int8(m.backlog.n) >= m.room {
				pass = true
			}
			if !pass {
				r := n
				r.redirected++
				r.at = vRedirectQueue
				add(r)
			}
			// Also because of what the verdict sees elsewhere: the other way passes, or TCP is short of
			// memory.
			n.at = vPassAdd
			if v.noRecheck && m.passed == m.consumed {
				n.bell = true
			}
			add(n)
		}
	case vPassAdd:
		n.passed++
		n.at = vPassCheck
		add(n)
	case vPassCheck:
		if !v.noRecheck && m.consumed == m.waspass {
			n.bell = true
		}
		n.at = vPassQueue
		add(n)
	case vPassQueue:
		n.source = m.source.push(m.next)
		n.inEvent = m.inEvent || m.in
		n.next++
		n.at = vDecide
		add(n)
	case vRedirectQueue:
		n.backlog = m.backlog.push(m.next)
		n.next++
		n.at = vDecide
		add(n)
	}

	// The source leaves, under its lock; then userspace is told.
	read := m.copied
	if m.rest >= 0 {
		read++
	}
	if m.at == vDecide && !m.left && m.leaves < c.leaves && (m.passed == read || v.leaveUnread) && m.tcp.n == 0 {
		n := m
		n.left = true
		n.leaves++
		n.source = queue{} // splice(2) doesn't look there
		add(n)
	}
	if m.left && !m.copying && m.user != uKick {
		n := m
		n.copying, n.bell = true, true
		add(n)
	}

	// The backlog worker writes what fits.
	if m.backlog.n > 0 && m.room > 0 {
		n := m
		var b int8
		b, n.backlog = m.backlog.pop()
		n.peer = m.peer.push(b)
		n.room--
		add(n)
	}

	// The reader takes a byte, which makes room.
	if m.room < c.room {
		n := m
		n.room++
		if m.noSpace {
			n.noSpace = false
			n.outEvent = m.outEvent || m.out
		}
		add(n)
	}

	n = m
	switch m.user {
	case uAsleep:
		if m.bell {
			n.bell = false
			n.user = uCheck
			add(n)
		}
	case uCheck:
		if m.passed == m.copied && !m.copying {
			n.user = uAsleep
			n.in, n.out, n.inEvent, n.outEvent = false, false, false, false
		} else {
			n.user = uRead
		}
		add(n)
	case uRead:
		if m.copying {
			if m.peer.n < m.redirected+m.copied && !v.leaveUnsettled {
				break
			}
			if m.tcp.n == 0 {
				n.user = uWantIn
				add(n)
				n.user = uBack
				add(n)
				break
			}
			n.rest, n.tcp = m.tcp.pop()
			n.user = uWrite
			add(n)
			if v.comeBackFull {
				n.user = uBack
				add(n)
			}
			break
		}
		if m.source.n == 0 {
			n.user = uWantIn
			add(n)
		} else {
			n.rest, n.source = m.source.pop()
			n.user = uWait
			if v.noWait {
				n.user = uWrite
			}
			if v.earlyPublish {
				n.copied++
				n.consumed = n.copied
			}
			add(n)
		}
	case uWait:
		mine := m.copied
		if v.earlyPublish {
			mine--
		}
		if m.peer.n >= m.redirected+mine {
			n.user = uWrite
			add(n)
		}
	case uWrite:
		if m.room == 0 {
			n.noSpace = true
			n.user = uWantOut
			add(n)
		} else {
			n.peer = m.peer.push(m.rest)
			n.rest = -1
			n.room--
			n.user = uPublish
			add(n)
		}
	case uPublish:
		if !v.earlyPublish {
			n.copied++
			n.consumed = n.copied
		}
		n.user = uCheck
		add(n)
	case uWantIn:
		if !m.in { // else it is watched for already, and an edge since the read has told
			n.in, n.inEvent = true, m.source.n+m.tcp.n > 0 && !v.noLevel
		}
		n.user = uAwait
		add(n)
	case uWantOut:
		if !m.out {
			n.out, n.outEvent = true, m.room > 0 && !v.noLevel
		}
		n.user = uAwait
		add(n)
	case uAwait:
		if m.inEvent && m.rest >= 0 { // a byte that it can't write is no reason to look
			n.inEvent = false
			add(n)
			n = m
		}
		if m.inEvent && m.rest < 0 || m.outEvent || m.bell {
			n.inEvent, n.outEvent, n.bell = false, false, false
			n.user = uCheck
			if m.rest >= 0 {
				n.user = uWrite
			}
			add(n)
		}
	case uBack:
		n.passed = m.consumed
		n.user = uInsert
		add(n)
	case uInsert: // takes the source's lock
		n.left, n.copying = false, false
		n.user = uKick
		add(n)
	case uKick:
		n.kicked = m.tcp.n > 0 && !v.noKick
		n.user = uCheck
		if m.rest >= 0 {
			n.user = uWrite
		}
		add(n)
	}
	return out
}

// check visits every reachable state.
func check(c modelCase, v variant) (states int, wrong string) {
	start := model{rest: -1, room: c.room}
	seen := map[model]bool{start: true}
	todo := []model{start}
	for len(todo) > 0 {
		m := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for i := range m.peer.n {
			if m.peer.b[i] != i {
				return len(seen), fmt.Sprintf("out of order: %v", m.peer.b[:m.peer.n])
			}
		}
		next := m.steps(c, v)
		if len(next) == 0 {
			switch {
			case m.peer.n != c.skbs:
				return len(seen), fmt.Sprintf("asleep with %d of %d bytes delivered: %+v", m.peer.n, c.skbs, m)
			case m.passed != m.consumed && !m.left:
				return len(seen), fmt.Sprintf("passed %d, consumed %d at the end", m.passed, m.consumed)
			}
		}
		for _, n := range next {
			if !seen[n] {
				seen[n] = true
				todo = append(todo, n)
			}
		}
	}
	return len(seen), ""
}

func TestModel(t *testing.T) {
	for _, c := range modelCases() {
		states, wrong := check(c, variant{})
		if wrong != "" {
			t.Errorf("%+v: %s", c, wrong)
		}
		t.Logf("%+v: %d states", c, states)
	}
}

func modelCases() (cases []modelCase) {
	for leaves, most := range []int8{6, 5, 4} {
		for skbs := int8(1); skbs <= most; skbs++ {
			for room := int8(1); room <= 3; room++ {
				cases = append(cases, modelCase{skbs, room, int8(leaves)})
			}
		}
	}
	return cases
}

// The model finds what goes wrong without each part of the protocol.
func TestModelFindsBrokenProtocols(t *testing.T) {
	for name, c := range map[string]struct {
		v    variant
		want string
	}{
		"userspace does not wait for the backlog": {variant{noWait: true}, "out of order"},
		"consumed is published before the write":  {variant{earlyPublish: true}, "out of order"},
		"the verdict rings before it adds":        {variant{noRecheck: true}, "asleep"},
		"epoll tells only of what comes later":    {variant{noLevel: true}, "asleep"},
		"the source leaves with unread bytes":     {variant{leaveUnread: true}, ""},
		"userspace does not wait after leaving":   {variant{leaveUnsettled: true}, "out of order"},
		"the source comes back too early":         {variant{comeBackFull: true}, ""},
		"nobody kicks when it is back":            {variant{noKick: true}, "asleep"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, m := range modelCases() {
				if _, wrong := check(m, c.v); wrong != "" {
					if !strings.Contains(wrong, c.want) {
						t.Errorf("found %q instead of %q", wrong, c.want)
					}
					t.Logf("%+v: %s", m, wrong)
					return
				}
			}
			t.Error("nothing was found")
		})
	}
}
