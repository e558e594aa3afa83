package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// A load is what is wanted of all sources together.
type load struct {
	idle, stopped int
	hellos        float64 // halves a second
}

// An outcome is all that is judged.
type outcome struct {
	wanted   load
	mostIdle int         // of wanted.idle, that limits.connections_per_source lets in
	seen     sourceCount // before the sources were ended
	scale    float64     // how many times slower than here the machine is
	line     float64     // of the good client, in bytes a second

	able          float64 // halves of hellos that the machine takes, a second
	rate, reached float64 // that were to be sent, and were, a second, while the good client is judged
	flood         float64 // that were tried, a second, while it is not
	flooded       time.Duration

	trouble      []string
	budget       int64
	before, most sample
	phases       []phase // the first without load
}

// flood is the phase in which all hellos are offered that are wanted, whatever the machine takes. What the
// kernel does for more connections than anybody accepts leaves nothing for a good client: the daemon is to
// live, to keep within its budget, and to keep what it has let in.
const flood = "flood"

// judge says what held, a line each. The error is that something did not.
func (o *outcome) judge(w io.Writer) error {
	ok := true
	say := func(good bool, format string, a ...any) {
		verdict := "ok  "
		if !good {
			verdict, ok = "FAIL", false
		}
		fmt.Fprintln(w, verdict, fmt.Sprintf(format, a...))
	}
	say(len(o.trouble) == 0, "alive: %s", orElse(strings.Join(o.trouble, "; "), "the daemon runs, and the kernel has not been out of memory"))
	taken, parts := o.most.Taken-o.before.Taken, o.most.RSS+o.most.TCP+o.most.Slab-o.before.Slab
	say(taken <= o.budget, "within the budget: %s MB more taken than before the daemon began, of %s", mb(taken), mb(o.budget))
	say(parts <= o.budget, "within the budget: RSS %s + TCP %s + slab %s = %s MB, of %s", mb(o.most.RSS), mb(o.most.TCP), mb(o.most.Slab-o.before.Slab), mb(parts), mb(o.budget))
	if n := o.seen; o.wanted.idle > 0 {
		say(n.Idle+n.IdleRefused >= int64(o.wanted.idle) && n.Idle >= int64(o.mostIdle)*95/100,
			"idle: of %d that were to be tried %d were let in and %d refused; limits let in %d", o.wanted.idle, n.Idle, n.IdleRefused, o.mostIdle)
		if at := slices.IndexFunc(o.phases, func(p phase) bool { return p.name == "idle" }); at >= 0 {
			p := o.phases[at]
			say(p.used >= p.most.Taken/5*4, "idle: %s of %s MB that are taken are in the daemon's account", mb(p.used), mb(p.most.Taken))
		}
		say(n.IdleAlive == n.Idle, "idle: %d of %d that were let in are open at the end", n.IdleAlive, n.Idle)
	}
	if n := o.seen; o.wanted.stopped > 0 {
		say(n.Stopped+n.StoppedReset >= int64(o.wanted.stopped)/10 && n.Stopped+n.StoppedReset+n.StoppedRefuse >= int64(o.wanted.stopped),
			"stopped: %d were to be kept open: %d stand still, %d were reset, %d refused", o.wanted.stopped, n.Stopped, n.StoppedReset, n.StoppedRefuse)
	}
	if o.wanted.hellos > 0 {
		say(o.reached >= 0.8*o.rate, "hellos: %.0f halves a second, of %.0f; the machine takes %.0f. A good client beside %.0f a second is %s",
			o.reached, o.rate, o.able, o.wanted.hellos, map[bool]string{true: "judged", false: "NOT SHOWN: it takes a faster machine"}[o.rate == o.wanted.hellos])
		say(o.flood >= 0.8*o.wanted.hellos && o.flooded >= hellosFor, "%s: %.0f halves a second were tried for %.0f s, of %.0f for %.0f s",
			flood, o.flood, o.flooded.Seconds(), o.wanted.hellos, hellosFor.Seconds())
	}
	unloaded := o.phases[0]
	bound := time.Duration(float64(firstByteBound) * o.scale)
	for _, p := range o.phases[1:] {
		if p.name == flood {
			continue
		}
		say(p.probe.failed == 0 && p.probe.p99 <= bound, "%s: first byte p99 %.0f ms, at most %.0f (100 ms, %.1f times as slow), %.0f unloaded; %d of %d failed",
			p.name, ms(p.probe.p99), ms(bound), o.scale, ms(unloaded.probe.p99), p.probe.failed, p.probe.tried)
		say(p.probe.paced >= leastBulk*unloaded.probe.paced && p.probe.bulkFailed == 0, "%s: throughput of a client with a line of %.1f MB/s %.2f of unloaded, at least %.1f; %d transfers failed%s",
			p.name, o.line/(1<<20), p.probe.paced/unloaded.probe.paced, leastBulk, p.probe.bulkFailed, p.probe.fault)
		least := leastBulk * p.spare
		say(p.bulk() >= least*unloaded.bulk(), "%s: without a line %.2f of unloaded, at least %.2f (%.1f of what the connections of others leave of the processor)",
			p.name, p.bulk()/unloaded.bulk(), least, leastBulk)
	}
	if !ok {
		return errors.New("something did not hold: see FAIL above")
	}
	return nil
}
