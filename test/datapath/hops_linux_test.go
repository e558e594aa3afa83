package datapath

import (
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestHops: the table, with flows that leave their relay for another one at random moments, also out of the
// sockmap, and may come there again.
func TestHops(t *testing.T) {
	for _, c := range []struct {
		name   string
		atOnce bool
		within time.Duration
	}{
		{"at once", true, 30 * time.Millisecond},
		{"preferred", false, 5 * time.Millisecond}, // mostly by the relay: few are quiet for so long
	} {
		t.Run(c.name, func(t *testing.T) {
			l := load(t)
			d := datapath.Datapath(l)
			if c.atOnce {
				d = atOnce{d}
			}
			hops := &relaytest.Hops{Within: c.within}
			at := relaytest.Loopback{Hops: hops, Options: relay.Options{Datapaths: []datapath.Datapath{d}}}
			p := at.Path(t)
			p.Skip = append(p.Skip, "idle timeout", "idle timeout of a stalled flow") // a datapath counts from when it gets a flow
			relaytest.Run(t, p, relaytest.SmallSize())
			left, stayed := hops.Counts()
			s := l.count()
			_, stalls := l.Health()
			t.Logf("flows left %d times, and stayed %v; %+v, %v", left, stayed, s, l.reasons())
			if left < 20 || c.atOnce && (s.HandedOff == 0 || s.Returned == 0) || stalls > 0 || s.Faults > 0 {
				t.Errorf("they hardly leave, or something went wrong; %d stalls", stalls)
			}
		})
	}
}

// TestLocalHops: the same of flows that go past TCP to a process on this host.
func TestLocalHops(t *testing.T) {
	needRoot(t)
	l, local := loadLocal(t, "hops")
	server, _ := cgroup.Listen(t, "tcp4")
	hops := &relaytest.Hops{Within: 30 * time.Millisecond}
	at := relaytest.Loopback{Server: server, Hops: hops,
		Options: relay.Options{Datapaths: []datapath.Datapath{local, l}}}
	p := at.Path(t)
	becomeKnown(t, local, p)
	p.Skip = append(p.Skip, "idle timeout", "idle timeout of a stalled flow") // as above
	relaytest.Run(t, p, relaytest.SmallSize())
	left, stayed := hops.Counts()
	s := local.count()
	off, stalls := local.Health()
	t.Logf("flows left %d times, and stayed %v; %+v, %v", left, stayed, s, local.reasons())
	if left < 20 || s.Returned == 0 || off != "" || stalls > 0 || s.Faults > 0 {
		t.Errorf("they hardly leave, or something went wrong: %q, %d stalls", off, stalls)
	}
}
