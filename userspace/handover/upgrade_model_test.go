package handover

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// upgrading is two processes in the middle of an upgrade, the messages between them, and what the service
// manager knows.
type upgrading struct {
	oldLives, newLives bool
	old, new           state
	toNew, toOld       string // messages in their order, a byte each: what they say
	isKnown            bool   // the manager knows that new is the main one
}

// upgradeModel is what both act by.
type upgradeModel struct{ old, new rules }

type upgradeStep struct {
	name string
	to   upgrading
}

// steps are what may follow u.
func (m *upgradeModel) steps(u upgrading) (all []upgradeStep) {
	add := func(name string, to upgrading) { all = append(all, upgradeStep{name, to}) }
	say := map[action]event{sendYours: saysYours, sendServing: saysServing, sendMain: saysMain}
	at := func(name string, to upgrading, isOld bool, e event) {
		r, s, send, hears := m.new, &to.new, &to.toOld, to.oldLives
		if isOld {
			r, s, send, hears = m.old, &to.old, &to.toNew, to.newLives
		}
		next, do := r.at(*s, e)
		switch *s = next; do {
		case sendMain: // who tells the manager first
			to.isKnown = true
			killed := to
			killed.oldLives, killed.toOld = false, ""
			add(name+", and is killed as it says it", killed)
		case beMain:
			to.isKnown = true
		case killAndAccept, giveUp:
			to.newLives, to.toNew = false, ""
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
		if to := u; u.toOld != "" {
			e := pop(&to.toOld)
			at(fmt.Sprintf("old reads %d", e), to, true, e)
		} else if !u.newLives {
			at("old loses new", to, true, isLost)
		}
		if u.old == rests {
			at("old is tired", u, true, isLate)
		}
		to := u
		to.oldLives, to.toOld = false, ""
		add("old is killed", to)
	}
	if u.newLives {
		if to := u; u.toNew != "" {
			e := pop(&to.toNew)
			at(fmt.Sprintf("new reads %d", e), to, false, e)
		} else if !u.oldLives {
			at("new loses old", to, false, isLost)
		}
		to := u
		to.newLives, to.toNew = false, ""
		add("new is killed", to)
	}
	return slices.DeleteFunc(all, func(s upgradeStep) bool { return s.to == u }) // for which there is no rule
}

// wrong says what is wrong with u, in which nothing is left to happen if it isOver.
func (u *upgrading) wrong(isOver bool) string {
	newAccepts := u.newLives && (u.new == accepts || u.new == isMain)
	switch {
	case u.oldLives && u.old == serves && newAccepts:
		return "both accept"
	case u.oldLives && u.old != hasHanded && u.newLives && u.new == isMain:
		return "both are the main one"
	case !isOver:
	case u.newLives && u.new != isMain:
		return "new is left, and is not the main one"
	case u.newLives && !u.isKnown:
		return "the manager knows nothing of new"
	case u.oldLives && u.old == rests:
		return "old accepts nothing"
	case u.oldLives && u.newLives && u.old != hasHanded:
		return "old goes on for ever"
	}
	return ""
}

// explore looks at all that can be reached, and returns how much that is, and the way to what is wrong.
func (m *upgradeModel) explore() (reached int, wrong string) {
	first := upgrading{oldLives: true, newLives: true, old: serves, new: starts, toOld: string([]byte{byte(saysReady)})}
	came := map[upgrading][]string{first: nil}
	for todo := []upgrading{first}; len(todo) > 0; {
		u := todo[0]
		todo = todo[1:]
		all := m.steps(u)
		isOver := !slices.ContainsFunc(all, func(s upgradeStep) bool { return !strings.HasSuffix(s.name, "killed") })
		if wrong := u.wrong(isOver); wrong != "" {
			return len(came), strings.Join(append(came[u], wrong), "; ")
		}
		for _, s := range all {
			if _, known := came[s.to]; !known {
				came[s.to] = append(slices.Clone(came[u]), s.name)
				todo = append(todo, s.to)
			}
		}
	}
	return len(came), ""
}

// TestUpgradeModel: whichever process is killed at whatever step of an upgrade, never do both accept, nor are
// both the main one, and who is left accepts, and is the main one for the service manager as well. That an
// old process has handed over to a new one which is killed then is a crash like any other.
func TestUpgradeModel(t *testing.T) {
	reached, wrong := (&upgradeModel{oldProcess, newProcess}).explore()
	if wrong != "" {
		t.Error(wrong)
	}
	t.Logf("%d are reached", reached)
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
	for _, c := range []struct {
		name     string
		old, new rules
		wants    string
	}{
		{"new waits for main of the dead", oldProcess, replace(newProcess, accepts, isLost, nil), "is not the main one"},
		{"new waits for yours of the dead", oldProcess, replace(newProcess, starts, isLost, nil), "is not the main one"},
		{"new does not tell the manager", oldProcess,
			replace(newProcess, accepts, isLost, rules{{accepts, isLost, isMain, nothing}}), "knows nothing of new"},
		{"new is the main one as soon as it accepts", oldProcess,
			replace(newProcess, starts, saysYours, rules{{starts, saysYours, isMain, sendServing}}), "both are the main one"},
		{"old does not kill who is late", replace(oldProcess, rests, isLate, rules{{rests, isLate, serves, acceptAgain}}),
			newProcess, "both accept"},
		{"old waits for the dead", replace(replace(oldProcess, rests, isLost, nil), rests, isLate, nil), newProcess,
			"old accepts nothing"},
		{"old goes on as it says yours", replace(oldProcess, serves, saysReady, rules{{serves, saysReady, serves, sendYours}}),
			newProcess, "both accept"},
	} {
		if _, wrong := (&upgradeModel{c.old, c.new}).explore(); !strings.Contains(wrong, c.wants) {
			t.Errorf("%s: it leads to %q, want %q", c.name, wrong, c.wants)
		}
	}
}
