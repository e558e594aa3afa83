package memory

import (
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
)

// A stalled connection holds bytes for a reader who has no room for them.
type stalled struct {
	peer  netip.AddrPort
	owner owner
	since time.Time
	held  int64
	flows []*flow.Flow
}

// An owner is whose connections are counted together: those of a source, or one alone where many clients may
// be behind its address.
type owner struct {
	source netip.Prefix
	alone  netip.AddrPort // the peer
}

func (o owner) String() string {
	if o.source.IsValid() {
		return o.source.String()
	}
	return o.alone.String() + " (one of a hop's)"
}

// A connection is one of a client, with all of its flows: requests of HTTP are several.
type connection struct {
	owner owner
	flows []*flow.Flow
	bytes int64     // that have moved
	down  int64     // to the client alone
	held  int64     // that the relay has found to be held for readers without room
	since time.Time // when it was last seen that these took anything
}

// stalled are the connections that hold something, and since when nothing of theirs has moved.
func (w *Watch) stalled(now time.Time, sockets tcpsock.Sockets) (all []stalled) {
	connections := w.connections()
	w.addOrphans(connections, sockets)
	last := w.progress
	w.progress = make(map[netip.AddrPort]progress, len(connections))
	for peer, c := range connections {
		socket := sockets[peer]
		held := max(c.held, socket.Held)
		before, known := last[peer]
		p := before
		isFree := sockets != nil && held < stoppedLeast
		if !known || !before.isOf(c.bytes) || isFree || before.goesOn(c.bytes, held, now) {
			p = progress{bytes: c.bytes, since: now}
		}
		p.down = c.down
		w.progress[peer] = p
		if held < stoppedLeast {
			continue
		}
		// Since the last look; who is far and fast has a lot on the way.
		takes := !known || before.down != c.down
		if since, stands := c.standsSince(p, socket, takes, now); stands {
			all = append(all, stalled{peer, c.owner, since, held, c.flows})
		}
	}
	return all
}

// standsSince is since when nothing of c has moved, which holds something, and whether it counts as stalled.
// takes says that the client has taken something since the last look.
func (c connection) standsSince(p progress, socket tcpsock.Socket, takes bool, now time.Time) (
	since time.Time, stands bool) {
	if c.held > 0 {
		if p.since.Before(c.since) {
			return p.since, true
		}
		return c.since, true
	}
	// The kernel moves the flow, or these are requests, or the flow has ended.
	return p.since, !socket.IsEmpty && (!takes || now.Sub(p.since) >= stoppedForShort)
}

// connections are those that have a flow, by the peer's address.
func (w *Watch) connections() map[netip.AddrPort]connection {
	flows := w.opts.Flows.Live()
	all := make(map[netip.AddrPort]connection, len(flows))
	for _, fl := range flows {
		peer, err := netip.ParseAddrPort(fl.Downstream)
		client, cerr := netip.ParseAddrPort(fl.Client)
		if err != nil || cerr != nil {
			continue
		}
		c := all[peer]
		c.flows = append(c.flows, fl)
		if c.owner.source = limit.PrefixOf(client.Addr()); fl.Shared {
			c.owner = owner{alone: peer}
		}
		up, down := fl.Bytes()
		c.bytes += up + down
		c.down += down
		if fl.Held != nil {
			held, since := fl.Held()
			if c.held += held; held > 0 {
				c.since = since
			}
		}
		all[peer] = c
	}
	return all
}

// addOrphans adds what flows that have ended left to the kernel.
func (w *Watch) addOrphans(all map[netip.AddrPort]connection, sockets tcpsock.Sockets) {
	for peer, s := range sockets {
		if _, hasFlow := all[peer]; hasFlow || !s.IsOrphan || !w.opts.IsListeningAt(s.Local) {
			continue
		}
		o := owner{source: limit.PrefixOf(peer.Addr())}
		if w.opts.MayBeMany(peer.Addr()) {
			o = owner{alone: peer}
		}
		all[peer] = connection{bytes: -s.Held, down: -s.Held, owner: o} // more when it reads
	}
}

// A progress is how far a connection was at the last look.
type progress struct {
	down  int64     // bytes that its flows had moved to the client
	bytes int64     // all that they had moved when it was last seen to go on
	since time.Time // when that was
}

// isOf reports whether bytes goes on from what p counts: a flow moves more and more, and what one that has
// ended leaves to the kernel counts up from below zero.
func (p progress) isOf(bytes int64) bool {
	if bytes < 0 {
		return p.bytes < 0
	}
	return p.bytes >= 0 && bytes >= p.bytes
}

// goesOn reports whether a connection that holds so much has moved enough by now: a byte now and then would
// keep any amount for ever.
func (p progress) goesOn(bytes, held int64, now time.Time) bool {
	moved := bytes - p.bytes
	return moved > 0 && float64(moved) >= float64(held)*min(1, now.Sub(p.since).Seconds()/slowFor.Seconds())
}
