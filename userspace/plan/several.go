package plan

import (
	"net/netip"
	"slices"

	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
)

// withTarget is r with one of its targets alone.
func (r *Rule) withTarget(to *config.Forward) *Rule {
	one := *r
	one.To, one.All, one.Several = dial.Target(to.To), []*config.Forward{to}, nil
	one.Literal, _ = one.To.Literal()
	if r.Label == nil {
		one.Written = to.To.String()
	}
	return &one
}

// addTarget adds one of r's targets: if there is no other, what checks it is r's. h is what is known of it.
func (r *Rule) addTarget(one *Rule, h *balance.Health) {
	if len(r.All) == 1 {
		r.Check = one.Check
		return
	}
	one.Health = h
	r.Several = append(r.Several, one)
}

// Pick chooses one of r's targets for a client, whose address is zero where it is not known, that is not in
// tried, as a rule that has only that one, or nil where all are. A rule with a single target is its own
// choice.
func (r *Rule) Pick(client netip.Addr, tried []*Rule) *Rule {
	if r.Several == nil {
		if len(tried) > 0 {
			return nil
		}
		return r
	}
	i := balance.Pick(len(r.Several), func(i int) balance.Option {
		one := r.Several[i]
		var key uint64
		if r.BySource {
			key = balance.Key(client, one.Written)
		}
		return balance.Option{Key: key, Weight: one.All[0].Weight, Backup: one.All[0].Backup, Tried: slices.Contains(tried, one),
			Offline: one.IsOffline(), Off: one.Dialer.Disabled.Has(one.Written), Health: one.Health, Checked: one.checked()}
	})
	if i < 0 {
		return nil
	}
	return r.Several[i]
}
