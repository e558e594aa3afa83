package handover

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A world is two processes, what they know of each flow, and the messages between them.
type world struct {
	oldLives, newLives bool
	flows              string // a modelled for each
	toNew, toOld       string // messages in their order, two bytes each: step and flow
}

// modelled is a flow in a world. A world must be comparable: it is kept as bytes.
type modelled struct {
	old, new state
	offers   byte // made so far: the number in messages
	took     byte // the offer that new has registered
	moved    byte // the offer after which old has moved bytes again
	wasTaken bool // new has had its record
	killed   bool // old was told to end it
}

const flowBytes = 6

func (w *world) get(i int) (m modelled) {
	b := w.flows[i*flowBytes:]
	return modelled{state(b[0]), state(b[1]), b[2], b[3], b[4], b[5]&1 != 0, b[5]&2 != 0}
}

func (w *world) set(i int, m modelled) {
	b := []byte(w.flows)
	copy(b[i*flowBytes:], []byte{byte(m.old), byte(m.new), m.offers, m.took, m.moved, 0})
	if m.wasTaken {
		b[i*flowBytes+5] |= 1
	}
	if m.killed {
		b[i*flowBytes+5] |= 2
	}
	w.flows = string(b)
}

// The messages, in bytes.
const (
	mFlow, mTaken, mRefused, mBegin, mKeep = 'f', 't', 'r', 'b', 'k'
)

// A model is two sets of rules, and what is known to be wrong with how they are acted by.
type model struct {
	old, new rules
	// movesAtOnce: new moves bytes when it says taken, and does not wait for begin.
	movesAtOnce bool
	// deaf: new takes the other's end for lost before it has read what that had sent.
	deaf bool
	// silent: old goes on without saying keep.
	silent bool
	// heedless: old does not look whether a flow that is taken was killed.
	heedless bool
	offers   byte // how often a flow is offered
}

type modelStep struct {
	name string
	to   world
}

// steps are the worlds that may follow w. wrong is a rule of the model that w breaks.
func (m *model) steps(w world, flows int) (all []modelStep, wrong string) {
	add := func(name string, to world) { all = append(all, modelStep{name, to}) }
	send := func(q *string, step byte, flow int, offer byte) { *q += string([]byte{step, byte(flow), offer}) }
	pop := func(q *string) (step byte, flow int, offer byte) {
		step, flow, offer = (*q)[0], int((*q)[1]), (*q)[2]
		*q = (*q)[3:]
		return
	}
	// oldAt lets an event happen at the old process.
	oldAt := func(name string, to world, i int, e event) {
		f := to.get(i)
		next, do := m.old.at(f.old, e)
		if !to.newLives && (do == sendFlow || do == sendBegin || do == sendKeepAndMove) {
			if do == sendFlow {
				return // it is known not to be there, or will be
			}
			next, do = m.old.at(f.old, isLost)
		}
		switch do {
		case sendFlow:
			f.offers++
			send(&to.toNew, mFlow, i, f.offers)
		case sendBegin:
			send(&to.toNew, mBegin, i, f.offers)
		case sendKeepAndMove:
			if !m.silent {
				send(&to.toNew, mKeep, i, f.offers)
			}
			f.moved = f.offers
		case move:
			f.moved = f.offers
		}
		f.old = next
		to.set(i, f)
		add(name, to)
	}
	newAt := func(name string, to world, i int, offer byte, e event) {
		f := to.get(i)
		if e == saysFlow {
			f.new, f.took = none, offer // another offer is another record
		} else if offer != f.took {
			add(name, to)
			return
		}
		next, do := m.new.at(f.new, e)
		switch do {
		case sendTaken:
			f.wasTaken = true
			if to.oldLives {
				send(&to.toOld, mTaken, i, offer)
			}
			if m.movesAtOnce {
				next, do = begun, move
			}
		}
		if do == move && (f.moved >= f.took && f.took > 0) {
			wrong = fmt.Sprintf("new moves flow %d from a record after which old has moved bytes", i)
		}
		if do == move && e == saysBegin && f.killed {
			wrong = fmt.Sprintf("new begins flow %d, which was killed", i)
		}
		f.new = next
		to.set(i, f)
		add(name, to)
	}
	if w.oldLives {
		for i := range flows {
			f := w.get(i)
			if f.old == kept && f.offers < m.offers && !f.killed {
				oldAt(fmt.Sprintf("old offers %d", i), w, i, hasLeft)
			}
			if f.old == offered {
				oldAt(fmt.Sprintf("old is tired of %d", i), w, i, isLate)
			}
			if f.old != given && !f.killed {
				to := w
				f.killed = true
				to.set(i, f)
				add(fmt.Sprintf("flow %d is killed by old's word", i), to)
			}
		}
		switch {
		case w.toOld != "":
			to := w
			step, i, offer := pop(&to.toOld)
			e := saysTaken
			if step == mRefused {
				e = saysRefused
			}
			if f := to.get(i); f.killed && e == saysTaken && !m.heedless {
				e = isKilled
			}
			if f := to.get(i); f.offers == offer {
				oldAt(fmt.Sprintf("old reads %c of %d", step, i), to, i, e)
			} else {
				add("old reads what is over", to)
			}
		case !w.newLives:
			for i := range flows {
				if w.get(i).old == offered {
					oldAt(fmt.Sprintf("old loses %d", i), w, i, isLost)
				}
			}
		}
		to := w
		to.oldLives, to.toOld = false, ""
		add("old is killed", to)
	}
	if w.newLives {
		if w.toNew != "" {
			to := w
			step, i, offer := pop(&to.toNew)
			name := fmt.Sprintf("new reads %c of %d", step, i)
			switch step {
			case mFlow:
				newAt(name, to, i, offer, saysFlow)
				refused := to
				if refused.oldLives {
					send(&refused.toOld, mRefused, i, offer)
				}
				add(name+", and refuses", refused)
			case mBegin:
				newAt(name, to, i, offer, saysBegin)
			case mKeep:
				newAt(name, to, i, offer, saysKeep)
			}
		}
		if !w.oldLives && (w.toNew == "" || m.deaf) {
			for i := range flows {
				if f := w.get(i); f.new == registered {
					newAt(fmt.Sprintf("new loses old, with %d", i), w, i, f.took, isLost)
				}
			}
		}
		to := w
		to.newLives, to.toNew = false, ""
		add("new is killed", to)
	}
	return all, wrong
}

// check says what is wrong with w, in which nothing is left to happen if it isOver.
func (m *model) check(w world, flows int, isOver bool) string {
	for i := range flows {
		f := w.get(i)
		movers := 0
		if w.oldLives && f.old == kept {
			movers++
		}
		if w.newLives && f.new == begun {
			movers++
		}
		holds := w.oldLives && f.old != given || w.newLives && (f.new == begun || f.new == registered)
		switch {
		case movers > 1:
			return fmt.Sprintf("both move flow %d", i)
		case !isOver || movers == 1:
		case holds:
			return fmt.Sprintf("nobody moves flow %d, and its sockets are open", i)
		case w.oldLives && w.newLives:
			return fmt.Sprintf("flow %d is lost, and nobody has died", i)
		case w.newLives && f.old == offered && f.wasTaken && f.took == f.offers:
			return fmt.Sprintf("flow %d is lost with old, though new had registered it", i)
		case w.oldLives && f.old != given:
			return fmt.Sprintf("flow %d is lost with new, though old had not let it go", i)
		}
	}
	return ""
}

// explore looks at all worlds that can be reached, and returns how many there are, and the way to one that is
// wrong.
func (m *model) explore(flows int) (worlds int, wrong string) {
	first := world{oldLives: true, newLives: true, flows: strings.Repeat("\x00", flows*flowBytes)}
	for i := range flows {
		first.set(i, modelled{old: kept, new: none})
	}
	type origin struct {
		from world
		step string
	}
	came := map[world]origin{first: {}}
	way := func(w world, last string) string {
		steps := []string{last}
		for o := came[w]; o.step != ""; o = came[w] {
			steps, w = append(steps, o.step), o.from
		}
		slices.Reverse(steps)
		return strings.Join(steps, "; ")
	}
	for todo := []world{first}; len(todo) > 0; {
		w := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		all, wrong := m.steps(w, flows)
		all = slices.DeleteFunc(all, func(s modelStep) bool { return s.to == w }) // for which there is no rule
		isOver := !slices.ContainsFunc(all, func(s modelStep) bool {
			return !strings.HasSuffix(s.name, "killed") && !strings.Contains(s.name, "offers")
		})
		if wrong == "" {
			wrong = m.check(w, flows, isOver)
		}
		if wrong != "" {
			return len(came), way(w, wrong)
		}
		for _, s := range all {
			if _, known := came[s.to]; !known {
				came[s.to] = origin{w, s.name}
				todo = append(todo, s.to)
			}
		}
	}
	return len(came), ""
}

// TestModel: in whatever order two processes act by the rules, and whichever is killed when, nobody moves what
// another moves or has moved, and no flow is left that nobody moves while its sockets are open.
func TestModel(t *testing.T) {
	without := func(r rules, in state, at event) rules {
		return slices.DeleteFunc(slices.Clone(r), func(x struct {
			in   state
			at   event
			next state
			do   action
		}) bool {
			return x.in == in && x.at == at
		})
	}
	for _, c := range []struct {
		flows  int
		offers byte
	}{{1, 3}, {2, 1}} {
		m := model{old: oldRules, new: newRules, offers: c.offers}
		worlds, wrong := m.explore(c.flows)
		if wrong != "" {
			t.Errorf("%d flows: %s", c.flows, wrong)
		}
		t.Logf("%d flows that are offered %d times: %d worlds", c.flows, c.offers, worlds)
	}
	for _, c := range []struct {
		name   string
		breaks func(*model)
		wants  string
	}{
		{"new moves bytes before it is told to", func(m *model) { m.movesAtOnce = true }, "both move"},
		{"new does not read to the end", func(m *model) { m.deaf = true }, "after which old has moved"},
		{"old goes on, and does not say it", func(m *model) { m.silent = true }, "new moves flow"},
		{"old does not look whether it was killed", func(m *model) { m.heedless = true }, "which was killed"},
		{"old lets go what was killed", func(m *model) {
			m.old = append(without(oldRules, offered, isKilled), rules{{offered, isKilled, given, sendBegin}}...)
		}, "which was killed"},
		{"old has no rule for what was killed", func(m *model) {
			m.old = without(without(oldRules, offered, isKilled), offered, isLate)
		}, "nobody moves"},
		{"old forgets what nobody took", func(m *model) { m.old = without(without(oldRules, offered, isLost), offered, isLate) }, "nobody moves"},
		{"old ignores a refusal", func(m *model) {
			m.old = without(without(oldRules, offered, saysRefused), offered, isLate)
		}, "nobody moves"},
		{"new waits for the dead", func(m *model) { m.new = without(newRules, registered, isLost) }, "nobody moves"},
		{"new drops what the dead had", func(m *model) {
			m.new = append(without(newRules, registered, isLost), rules{{registered, isLost, dropped, forget}}...)
		}, "though new had registered it"},
		{"new ignores begin", func(m *model) { m.new = without(newRules, registered, saysBegin) }, "nobody moves"},
		{"old lets go before it is taken", func(m *model) {
			m.old = append(without(oldRules, offered, saysRefused), rules{{offered, saysRefused, given, sendBegin}}...)
		}, "is lost"},
	} {
		m := model{old: oldRules, new: newRules, offers: 2}
		c.breaks(&m)
		if _, wrong := m.explore(1); !strings.Contains(wrong, c.wants) {
			t.Errorf("%s: it leads to %q, want %q", c.name, wrong, c.wants)
		}
	}
}
