package loader

import (
	"slices"
	"time"
)

// A rule is one that a test may switch off, to prove that it is needed. The programs have rules of their own, whose
// variables are named so, after "rule_".
type rule string

const (
	ruleBound  rule = "bound"  // no more is redirected than the peer takes
	ruleTrim   rule = "trim"   // what was handled already is cut off
	ruleFIN    rule = "fin"    // an empty skb is dropped
	ruleMutual rule = "mutual" // while one way passes, the other one does
	ruleClamp  rule = "clamp"  // what is charged to nobody is bounded
	ruleLate   rule = "late"   // a reset waits for what is in front of bytes that were passed before it

	ruleDrain  rule = "drain"  // an end is passed on when all before it is written
	ruleKick   rule = "kick"   // the verdict runs for what was queued at insertion
	ruleReset  rule = "reset"  // the errors of both sockets are looked at
	ruleQuiet  rule = "quiet"  // no EPOLLIN for spliced sockets
	ruleOrder  rule = "order"  // only when what was redirected is written, what was passed is
	ruleBoth   rule = "both"   // upstream gets a verdict, too
	ruleEvents rule = "events" // epoll tells of bytes that can be copied, and of room for them
	ruleSweep  rule = "sweep"  // the sweep ends stalls
)

// hooks are a test's. There are none in production, where the pointer to them is nil.
type hooks struct {
	off      []rule
	pressure uint64            // in place of tcpPressure, if it is not 0
	again    func(look func()) // in place of what lookAgain does
	window   time.Duration     // programs wait so long between a look at a flow and what follows from it
}

// without gives hooks that switch these rules off, too.
func (h *hooks) without(rules ...rule) *hooks {
	var with hooks
	if h != nil {
		with = *h
	}
	with.off = append(slices.Clone(with.off), rules...)
	return &with
}

// keeps reports whether a rule is in force.
func (h *hooks) keeps(r rule) bool { return h == nil || !slices.Contains(h.off, r) }
