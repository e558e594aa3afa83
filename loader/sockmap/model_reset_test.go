package sockmap

import "testing"

// A model of the queue of one socket, A, whose other end sends bytes that A passes, and then a reset, while
// bytes come for it from its peer: over all interleavings of the peer's verdict, the worker, what comes to A,
// and userspace. Each skb is one byte. It leaves out that something may come while A's socket is locked, and
// waits for the lock behind the filter: a reset that comes there just after the worker has sent the last byte
// may still find a new one in front.
type resetModel struct {
	queue                    string // of the psock: r was redirected to A, p was passed by it
	toRedirect, toSend       int8   // what both ends still send
	redirected, written      int8
	counted                  bool // the verdict has counted what it will put into the queue
	passed, source, consumed int8
	at                       int8 // of the worker: 0 looks, 1 has sent the first, and will unqueue it
	reset                    bool // a reset is on its way to A
	dead                     bool // A's TCP knows
	told                     bool // userspace does
	stopped                  bool // the worker, for good
}

const resetModelBytes = 2

func (m resetModel) next(late bool) (next []resetModel) {
	can := func(when bool, change func(*resetModel)) {
		if n := m; when {
			change(&n)
			next = append(next, n)
		}
	}
	// The verdict on the peer.
	can(m.toRedirect > 0 && !m.counted && !m.dead,
		func(n *resetModel) { n.toRedirect--; n.redirected++; n.counted = true })
	can(m.counted, func(n *resetModel) {
		n.counted = false
		if !m.stopped {
			n.queue += "r"
		}
	})
	// The worker.
	first := byte(0)
	if m.queue != "" && !m.stopped {
		first = m.queue[0]
	}
	can(m.at == 0 && first == 'r', func(n *resetModel) {
		if m.dead {
			n.stopped = true
			return
		}
		n.written++
		n.at = 1
	})
	can(m.at == 0 && first == 'p', func(n *resetModel) { n.source++; n.at = 1 })
	can(m.at == 1, func(n *resetModel) { n.queue, n.at = m.queue[1:], 0 })
	// What comes to A.
	can(m.toSend > 0, func(n *resetModel) {
		n.toSend--
		n.reset = n.toSend == 0
		n.passed++
		if m.queue == "" {
			n.source++
		} else {
			n.queue += "p"
		}
	})
	can(m.reset, func(n *resetModel) {
		n.reset = false
		if late && m.redirected > m.written && m.passed != m.consumed {
			n.told = true
			return
		}
		n.dead, n.told = true, true
	})
	// An answer to what was sent to who is gone.
	can(m.toSend == 0 && m.told && !m.dead && m.written > 0 && !m.reset,
		func(n *resetModel) { n.reset = true })
	// Userspace.
	can(m.source > 0, func(n *resetModel) { n.source--; n.consumed++ })
	return next
}

// What a side has sent before a reset is delivered in every case, and the reset is known; without the rule it
// is not.
func TestModelReset(t *testing.T) {
	for _, late := range []bool{true, false} {
		seen, lost := map[resetModel]bool{}, 0
		for todo := []resetModel{{toRedirect: resetModelBytes, toSend: resetModelBytes}}; len(todo) > 0; {
			m := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			if seen[m] {
				continue
			}
			seen[m] = true
			next := m.next(late)
			stuck := len(next) == 0
			if m.stopped && m.passed != m.consumed+m.source ||
				m.told && stuck && m.consumed != resetModelBytes {
				if lost++; late && lost == 1 {
					t.Errorf("lost: %+v", m)
				}
			}
			if !m.told && stuck {
				t.Fatalf("nobody knows of the reset: %+v", m)
			}
			todo = append(todo, next...)
		}
		t.Logf("late %v: %d states, %d with a loss", late, len(seen), lost)
		if !late && lost == 0 {
			t.Error("the model loses nothing without the rule: it proves nothing")
		}
	}
}
