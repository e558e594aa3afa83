package memory

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// victims are those of all that have stood still since until, in the order in which they are to be ended:
// again and again the one of the owner that holds most then which has stood still for longest. It takes the
// time of two sorts.
func victims(all []stalled, until time.Time) []stalled {
	type victim struct {
		stalled
		most int64 // that its owner holds when its turn has come
	}
	var order []victim
	sum := map[owner]int64{}
	for _, s := range all {
		if !s.since.After(until) {
			order = append(order, victim{stalled: s})
			sum[s.owner] += s.held
		}
	}
	slices.SortFunc(order, func(a, b victim) int {
		return cmp.Or(a.since.Compare(b.since), a.peer.Compare(b.peer))
	})
	for i := range order {
		v := &order[i]
		v.most = sum[v.owner]
		sum[v.owner] -= v.held
	}
	slices.SortStableFunc(order, func(a, b victim) int { return cmp.Compare(b.most, a.most) })
	out := make([]stalled, len(order))
	for i, v := range order {
		out[i] = v.stalled
	}
	return out
}

// errShort is why a flow ends.
var errShort = errors.New("memory is short (limits.memory, net.ipv4.tcp_mem), and the flow makes no progress")

// end resets connections of all that have stood still for long enough, in the order of victims, until so much
// is given back that u is over no more. Both sides of their flows are reset at once, since what is held for
// the one is in the socket of the other as well. The error is the last one of sockets that the kernel did not
// reset: without CAP_NET_ADMIN those are left alone that no flow has.
func (w *Watch) end(now time.Time, u Use, all []stalled, sockets tcpsock.Sockets,
	diag *tcpsock.Diag) (err error) {
	until, enough, least := now.Add(-stoppedFor), u.Total/4*3, int64(stoppedMin)
	if u.What != OfBudget {
		least = stoppedLeast
	}
	if u.over(7, 8) || u.What != OfBudget && u.isTCPShort {
		until = now.Add(-stoppedForShort)
		if u.What != OfBudget {
			enough = u.Total / 2 // it is short until less than 3/4 are taken
		}
	}
	var first owner
	n, freed := 0, int64(0)
	// What a connection holds at its other side is not known for each.
	both := 1.0
	if accepted := u.sockets.Held(); accepted > 0 {
		both += float64(u.dialled) / float64(accepted)
	}
	for _, v := range victims(all, until) {
		socket, ok := sockets[v.peer]
		if !ok || v.held < least || socket.IsOrphan && !tcpsock.CanEndOrphans() {
			continue // it has ended by itself, or is left alone
		}
		if freed > u.Used-enough {
			break
		}
		isKilled := v.kill()
		if derr := diag.Destroy(socket); derr != nil {
			if err = derr; !isKilled {
				continue
			}
		}
		if n == 0 {
			first = v.owner
		}
		n++
		freed += max(v.held, int64(float64(socket.Held)*both))
	}
	if n > 0 {
		w.opts.Ended(u.What, n)
		w.limited.Warn("memory_ended", "memory is short: flows that make no progress are ended, "+
			"those of the source that holds most first",
			"flows", n, "source", first.String(), "what", u.What, "used", u.Used, "total", u.Total)
	}
	return err
}

// kill ends the flows of s, as far as there is somebody who can, and reports whether one is.
func (s stalled) kill() (isKilled bool) {
	for _, fl := range s.flows {
		if fl.Killer != nil {
			fl.Killer.Kill(errShort)
			isKilled = true
		}
	}
	return isKilled
}
