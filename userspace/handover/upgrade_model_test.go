package handover

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// upgrading is two processes in the middle of an upgrade, the messages between them, the service manager, if there is
// one, with what it keeps, and a flow that the old process moves at first.
type upgrading struct {
	oldLives, newLives bool
	old, new           state
	toNew, toOld       string // messages in their order, a byte each: what they say

	isManaged bool
	main      party
	mail      string // what the manager is to read, two bytes each: who sends it, and what
	isRead    bool   // it has read all that old has told it before it waited for that
	isLate    bool   // old did not wait for that
	wasNamed  bool   // new was the main one
	endedWell bool   // by old's exit status
	isDown    bool   // the main one has ended well, and none is started

	flow     party // who moves it
	isQueued bool  // it is in flight
	isKept   bool  // the manager has the ends of the queue, which gives the flow to the process that it starts
	newHas   bool  // new has them, too
}

// party is a process.
type party byte

const (
	nobody   party = iota // a flow that nobody moves is reset, unless its sockets are in a queue that somebody has
	oldOne                // the process that is upgraded
	newOne                // the one that takes over
	thirdOne              // that which the manager starts
)

// What the manager is told.
const (
	mNewIsMain = 'n'
	mOldIsMain = 'o'
	mForget    = 'f' // the ends of old's queue
	mBarrier   = 'b'
)

// upgradeModel is what both act by.
type upgradeModel struct {
	old, new rules
	// blind: old does not look whether new lives when the manager has heard of it.
	blind bool
	// endsWell: the exit status of old does not tell that new has failed.
	endsWell bool
	// hurries: old waits for nobody when new serves, and has the manager forget the queue itself.
	hurries bool
	// keeps: new, which is not left alone, has the manager keep old's queue for ever.
	keeps bool
	// empties: new ends the queue when it has taken the flow, and the manager may not listen to it.
	empties bool
}

type upgradeStep struct {
	name string
	to   upgrading
}

// kill has a process end.
func (u *upgrading) kill(p party) {
	if p == oldOne {
		u.oldLives, u.toOld = false, ""
	} else {
		u.newLives, u.toNew, u.newHas = false, "", false
	}
	if u.flow == p {
		u.flow = nobody
	}
}

// tell sends the manager what it takes from the main process only, and from nobody who has ended.
func (u *upgrading) tell(from party, what ...byte) {
	for _, w := range what {
		if u.isManaged {
			u.mail += string([]byte{byte(from), w})
		}
	}
}

// heard is what the manager does with the next that it was told.
func (u *upgrading) heard() (name string) {
	from, what := party(u.mail[0]), u.mail[1]
	u.mail = u.mail[2:]
	switch {
	case what == mBarrier: // from whoever
		u.isRead = true
	case from != u.main:
		return fmt.Sprintf("the manager refuses %c of who is not the main one", what)
	case what == mNewIsMain && u.newLives:
		u.main, u.wasNamed = newOne, true
	case what == mOldIsMain && u.oldLives:
		u.main = oldOne
	case what == mForget:
		u.isKept = false
	}
	return fmt.Sprintf("the manager reads %c", what)
}

// start has the manager end all that is left, and start another process, which takes what is kept.
func (u *upgrading) start() {
	u.kill(oldOne)
	u.kill(newOne)
	u.mail, u.main = "", thirdOne
	if u.isKept && u.isQueued {
		u.flow = thirdOne
	}
	u.isQueued, u.isKept = false, false
}

// steps are what may follow u. wrong is what must not.
func (m *upgradeModel) steps(u upgrading) (all []upgradeStep, wrong string) {
	add := func(name string, to upgrading) { all = append(all, upgradeStep{name, to}) }
	say := map[action]event{sendYours: saysYours, sendServing: saysServing, sendMain: saysMain}
	at := func(name string, to upgrading, who party, e event) {
		r, s, send, hears := m.new, &to.new, &to.toOld, to.oldLives
		if who == oldOne {
			r, s, send, hears = m.old, &to.old, &to.toNew, to.newLives
			if !to.newLives && !m.blind && (e == lasts || e == isHeard) {
				e = isLost
			}
		}
		next, do := r.at(*s, e)
		switch *s = next; do {
		case sendYours:
			to.newHas = to.newLives && to.isQueued && to.isManaged
		case nameNew:
			to.tell(oldOne, mNewIsMain, mBarrier)
		case sendMain:
			if m.hurries {
				to.tell(oldOne, mForget, mNewIsMain)
				killed := to
				killed.kill(oldOne)
				add(name+", and is killed as it says it", killed)
			}
			to.isQueued = false
		case nameOldAndAccept:
			to.tell(oldOne, mOldIsMain)
		case killAndAccept, giveUp:
			to.kill(newOne)
		case endWithError:
			to.kill(oldOne)
			to.endedWell = m.endsWell
		case beMain:
			if e == saysMain {
				if !m.keeps {
					to.tell(newOne, mForget)
				}
				break
			}
			to.tell(newOne, mNewIsMain)
			if to.newHas && to.isQueued {
				if to.flow != nobody {
					wrong = "two processes move the flow"
				}
				to.flow, to.isQueued = newOne, !m.empties
			}
		}
		if what, ok := say[do]; ok && hears {
			*send += string([]byte{byte(what)})
		}
		add(name, to)
	}
	pop := func(q *string) event {
		e := event((*q)[0])
		*q = (*q)[1:]
		return e
	}
	if u.oldLives {
		switch to := u; {
		case u.toOld != "":
			e := pop(&to.toOld)
			at(fmt.Sprintf("old reads %d", e), to, oldOne, e)
		case !u.newLives && u.old != names:
			at("old loses new", to, oldOne, isLost)
		}
		switch to := u; u.old {
		case rests:
			at("old is tired", u, oldOne, isLate)
		case proves:
			at("old has waited", u, oldOne, lasts)
		case names:
			if u.isRead || !u.isManaged {
				at("old knows that the manager has heard", u, oldOne, isHeard)
			} else {
				to.isLate = true
				at("old waits for the manager no more", to, oldOne, isHeard)
			}
		}
		to := u
		to.kill(oldOne)
		add("old is killed", to)
	}
	if u.newLives {
		if to := u; u.toNew != "" {
			e := pop(&to.toNew)
			at(fmt.Sprintf("new reads %d", e), to, newOne, e)
		} else if !u.oldLives {
			at("new loses old", to, newOne, isLost)
		}
		to := u
		to.kill(newOne)
		add("new is killed", to)
	}
	if to := u; u.mail != "" {
		add(to.heard(), to)
	} else if u.isManaged && !u.isDown && (u.main == oldOne && !u.oldLives || u.main == newOne && !u.newLives) {
		if u.main == oldOne && u.endedWell {
			to.kill(newOne)
			to.isDown = true
		} else {
			to.start()
		}
		add("the manager, which has read what it was told before, sees the end of the main one", to)
	}
	return slices.DeleteFunc(all, func(s upgradeStep) bool { return s.to == u }), wrong // for which there is no rule
}

// wrong says what is wrong with u, in which nothing is left to happen if it isOver.
func (u *upgrading) wrong(isOver bool) string {
	oldAccepts := u.oldLives && u.old == serves
	newAccepts := u.newLives && (u.new == accepts || u.new == isMain)
	hasQueue := u.isQueued && (u.isKept || u.newHas)
	switch {
	case oldAccepts && newAccepts:
		return "both accept"
	case u.oldLives && u.old != hasHanded && u.newLives && u.new == isMain:
		return "both are the main one"
	case !isOver:
	case u.newLives && u.new != isMain:
		return "new is left, and is not the main one"
	case u.newLives && u.isManaged && u.main != newOne:
		return "the manager knows nothing of new"
	case u.oldLives && u.old == rests:
		return "old accepts nothing"
	case u.oldLives && u.newLives && u.old != hasHanded:
		return "old goes on for ever"
	case u.isDown, u.isManaged && !oldAccepts && !newAccepts && u.main != thirdOne:
		return "nobody accepts, and no other process is started"
	case u.oldLives && !oldAccepts && !u.newLives:
		return "old goes on, and nobody accepts"
	case u.flow == nobody && hasQueue:
		return "the flow is stuck"
	case u.flow == nobody && u.isManaged && !u.wasNamed && !u.isLate:
		return "the flow is lost, and new was never the main one"
	case u.main == newOne && u.isKept && u.flow != newOne:
		return "the queue is kept for ever"
	}
	return ""
}

// explore looks at all that can be reached, and returns how much that is, and a way to each thing that is wrong.
func (m *upgradeModel) explore(isManaged bool) (reached int, wrong []string) {
	isKnown := map[string]bool{}
	first := upgrading{oldLives: true, newLives: true, old: serves, new: starts, toOld: string([]byte{byte(saysReady)}),
		isManaged: isManaged, main: oldOne, flow: oldOne, isQueued: isManaged, isKept: isManaged}
	came := map[upgrading][]string{first: nil}
	for todo := []upgrading{first}; len(todo) > 0; {
		u := todo[0]
		todo = todo[1:]
		all, what := m.steps(u)
		isOver := !slices.ContainsFunc(all, func(s upgradeStep) bool { return !strings.HasSuffix(s.name, "killed") })
		if what == "" {
			what = u.wrong(isOver)
		}
		if what != "" {
			if !isKnown[what] {
				wrong = append(wrong, strings.Join(append(slices.Clone(came[u]), what), "; "))
			}
			isKnown[what] = true
			continue
		}
		for _, s := range all {
			if _, known := came[s.to]; !known {
				came[s.to] = append(slices.Clone(came[u]), s.name)
				todo = append(todo, s.to)
			}
		}
	}
	return len(came), wrong
}

// TestUpgradeModel: whichever process is killed at whatever step of an upgrade, never do both accept, nor are both
// the main one, and who is left accepts, and is the main one for the service manager as well, or another one is
// started. Nobody moves a flow that another one moves, and none is stuck. A new process that was never the main one
// takes nothing with it; that an old one has handed over to one that is killed then is a crash like any other.
func TestUpgradeModel(t *testing.T) {
	find := func(m upgradeModel) (wrong []string) {
		for _, isManaged := range []bool{true, false} {
			reached, some := m.explore(isManaged)
			t.Logf("%d are reached", reached)
			wrong = append(wrong, some...)
		}
		return wrong
	}
	for _, wrong := range find(upgradeModel{old: oldProcess, new: newProcess}) {
		t.Error(wrong)
	}
	replace := func(r rules, in state, at event, by rules) rules {
		r = slices.Clone(r)
		for i := range r {
			if r[i].in == in && r[i].at == at {
				return append(append(r[:i:i], by...), r[i+1:]...)
			}
		}
		t.Fatalf("there is no rule for %v in %v", at, in)
		return nil
	}
	hurries := replace(oldProcess, rests, saysServing, rules{{rests, saysServing, hasHanded, sendMain}})
	for _, c := range []struct {
		name  string
		m     upgradeModel
		wants string
	}{
		{"new waits for main of the dead",
			upgradeModel{old: oldProcess, new: replace(newProcess, accepts, isLost, nil)}, "is not the main one"},
		{"new waits for yours of the dead",
			upgradeModel{old: oldProcess, new: replace(newProcess, starts, isLost, nil)}, "is not the main one"},
		{"new is the main one as soon as it accepts",
			upgradeModel{old: oldProcess, new: replace(newProcess, starts, saysYours, rules{{starts, saysYours, isMain, sendServing}})},
			"both are the main one"},
		{"old does not kill who is late",
			upgradeModel{old: replace(oldProcess, rests, isLate, rules{{rests, isLate, serves, acceptAgain}}), new: newProcess},
			"both accept"},
		{"old waits for the dead",
			upgradeModel{old: replace(replace(oldProcess, rests, isLost, nil), rests, isLate, nil), new: newProcess},
			"old accepts nothing"},
		{"old goes on as it says yours",
			upgradeModel{old: replace(oldProcess, serves, saysReady, rules{{serves, saysReady, serves, sendYours}}), new: newProcess},
			"both accept"},
		{"old hands over as soon as new serves, and ends well",
			upgradeModel{old: hurries, new: newProcess, hurries: true, endsWell: true}, "no other process is started"},
		{"old hands over as soon as new serves",
			upgradeModel{old: hurries, new: newProcess, hurries: true}, "new was never the main one"},
		{"old does not look whether new lives",
			upgradeModel{old: oldProcess, new: newProcess, blind: true}, "new was never the main one"},
		{"old goes on after the end of new",
			upgradeModel{old: replace(oldProcess, hasHanded, isLost, nil), new: newProcess}, "nobody accepts"},
		{"old is the main one after the end of new, and ends well",
			upgradeModel{old: oldProcess, new: newProcess, endsWell: true}, "no other process is started"},
		{"new keeps what is not its own", upgradeModel{old: oldProcess, new: newProcess, keeps: true}, "kept for ever"},
		{"new ends the queue at once", upgradeModel{old: oldProcess, new: newProcess, empties: true}, "new was never the main one"},
	} {
		wrong := find(c.m)
		if !slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, c.wants) }) {
			t.Errorf("%s: it leads to %q, want %q", c.name, wrong, c.wants)
		}
	}
}
