package sockmap

import (
	"slices"
	"time"
)

// A Rule of the protocol can be switched off by a test, to prove that it is needed. The rules of the programs
// come first: each is a variable there, whose name is "rule_" and the rule's.
type Rule string

const (
	ruleBound  Rule = "bound"  // no more is redirected than the peer takes
	ruleTrim   Rule = "trim"   // what was handled already is cut off
	ruleFIN    Rule = "fin"    // an empty skb is dropped
	ruleMutual Rule = "mutual" // while one way passes, the other one passes, too
	ruleClamp  Rule = "clamp"  // what is charged to nobody is bounded
	ruleLate   Rule = "late"   // a reset waits for what is in front of bytes that were passed before it

	ruleDrain  Rule = "drain"  // an end is passed on when all before it is written
	ruleKick   Rule = "kick"   // the verdict runs for what was queued at insertion
	ruleReset  Rule = "reset"  // the errors of both sockets are looked at
	ruleQuiet  Rule = "quiet"  // no EPOLLIN for spliced sockets
	ruleOrder  Rule = "order"  // what was passed is written after what was redirected before it
	ruleBoth   Rule = "both"   // upstream gets a verdict, too
	ruleEvents Rule = "events" // epoll tells of bytes that can be copied, and of room for them
	ruleSweep  Rule = "sweep"  // the sweep ends stalls
)

// Hooks are a test's. There are none in production, where the pointer to them is nil.
type Hooks struct {
	off      []Rule
	Pressure uint64         // in place of tcpPressure, if it is not 0
	again    func(f func()) // in place of what recheck does
	Slots    int            // so many flows at a time, if it is not 0
	Window   time.Duration  // programs wait so long between a look at a flow and what follows from it
}

// Without gives hooks that switch these rules off, too.
func (h *Hooks) Without(rules ...Rule) *Hooks {
	var with Hooks
	if h != nil {
		with = *h
	}
	with.off = append(slices.Clone(with.off), rules...)
	return &with
}

// Keeps reports whether a rule is in force.
func (h *Hooks) Keeps(r Rule) bool { return h == nil || !slices.Contains(h.off, r) }
