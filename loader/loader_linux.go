package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/pins"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/skmsg"
	"github.com/tailsplice/tailsplice/loader/sockmap"
)

// Local is the datapath for targets on this host.
type Local = skmsg.Local

// Loader has the programs loaded, and splices flows. Safe for concurrent use. Least kernel: 6.1.
type Loader struct {
	*sockmap.Engine
	log      *slog.Logger
	pins     *pins.Generation
	local    *Local // nil: not asked for, or not possible
	localOff error  // why not
	closing  sync.Once
}

// New loads the programs, pins the maps in BPFFS/tailsplice/INSTANCE/GENERATION, removes what dead daemons
// left below BPFFS/tailsplice, and proves on loopback that this kernel splices rightly. The caller closes the
// Loader.
//
// It fails with an error that says what is lacking: [ErrKnownBad], a [*prove.SelfTestError], an error that
// wraps errors.ErrUnsupported where the kernel can't do it at all, or the system's. [Again] tells whether
// another try makes sense.
func New(o Options) (*Loader, error) {
	if err := host.RefuseKnownBad(o.KnownBad); err != nil {
		return nil, err
	}
	l, err := load(o, nil)
	if err != nil {
		return nil, host.Explain(err)
	}
	if err := prove.Failed(l.SelfTest()); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if o.Local {
		if l.proveLocal(); Again(l.localOff) {
			return nil, errors.Join(l.localOff, l.Close())
		}
	}
	return l, nil
}

// load is New without the proof.
func load(o Options, h *sockmap.Hooks) (_ *Loader, err error) {
	l := &Loader{log: o.Log}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.pins, err = pins.Claim(o.BPFFS, o.Instance, skmsg.HoldsUnread, l.log); err != nil {
		return nil, err
	}
	c := sockmap.Config{MaxFlows: o.MaxFlows, Pin: l.pins.Pin, Log: l.log, Hooks: h}
	if l.Engine, err = sockmap.Load(c); err != nil {
		return nil, err
	}
	if o.Local {
		l.local, l.localOff = skmsg.Load(l.Engine, c)
	}
	if err = l.pins.Publish(); err != nil {
		return nil, err
	}
	if err = l.Start(l.sweep); err != nil {
		return nil, err
	}
	return l, nil
}

// sweep is what is to be done from time to time, and reports whether that is about once a second.
func (l *Loader) sweep(now time.Time) (again bool) {
	if l.local != nil {
		l.local.Sweep()
	}
	again, err := l.pins.Sweep(now)
	if err != nil {
		l.log.Warn("look at what an earlier daemon left for processes to read", "error", err)
	}
	return again || l.local != nil
}

// Close resets the flows that live, and removes the programs, maps and pins, but for a map with bytes that a
// process on this host has not read yet. It may be called twice.
func (l *Loader) Close() (err error) {
	l.closing.Do(func() {
		if l.Engine != nil {
			err = l.Stop()
		}
		if l.local != nil {
			err = errors.Join(err, l.local.Close())
		}
		if l.pins != nil {
			err = errors.Join(err, l.pins.Release())
		}
		if l.Engine != nil {
			err = errors.Join(err, l.Engine.Close())
		}
	})
	return err
}

// Local gives the datapath for local targets, or says why this machine has none. It is part of the Loader,
// and is closed with it.
func (l *Loader) Local() (*Local, error) {
	if l.local == nil && l.localOff == nil {
		return nil, errors.New("it was not requested")
	}
	return l.local, l.localOff
}

// proveLocal tries the part for local targets, and takes it away with a reason if it does not work.
func (l *Loader) proveLocal() (findings []host.Finding) {
	if l.localOff == nil {
		findings, l.localOff = l.local.Prove()
	} else {
		findings = []host.Finding{{Name: skmsg.Name, State: host.StateDegraded, Detail: l.localOff.Error(),
			Advice: "nothing to do unless a route says `datapath: " + skmsg.Name + "`"}}
	}
	if l.localOff != nil {
		l.log.Warn("datapath sk_msg is not available: its flows use sockmap or userspace", "reason", l.localOff)
	}
	return findings
}

// SelfTest loads the programs beside whatever runs, and gives the verdicts of the self-test: what New would
// find. It takes about 0.2 s, and touches loopback only.
func SelfTest(o Options) []host.Finding {
	// Containers may share the BPF file system, and have processes of one number.
	o.Instance, o.MaxFlows = fmt.Sprintf("selftest-%d-%x", os.Getpid(), time.Now().UnixNano()), 64
	if err := host.RefuseKnownBad(o.KnownBad); err != nil {
		return []host.Finding{{Name: "version", State: host.StateMissing, Detail: err.Error(),
			Advice: "use a newer kernel; flows go through userspace meanwhile"}}
	}
	l, err := load(o, nil)
	if err != nil {
		return []host.Finding{{Name: "load", State: host.StateMissing, Detail: host.Explain(err).Error(),
			Advice: "see the findings about the machine"}}
	}
	findings := l.SelfTest()
	if o.Local {
		findings = append(findings, l.proveLocal()...)
	}
	if err := l.Close(); err != nil {
		findings = append(findings, host.Finding{Name: "close", State: host.StateDegraded, Detail: err.Error()})
	}
	return findings
}

// Probe looks at what the datapaths need of this machine, for people. It changes nothing, works without root,
// and says what it could not see. Whether the splice works is SelfTest's to say.
func Probe() []host.Finding {
	return host.Probe(func(privileged bool) host.Finding { return pins.ProbeBPFFS("", privileged) })
}

// RemoveDead removes the pins of daemons and self-tests that were killed, whatever their names, as each [New]
// does, for a process that loads nothing. bpffs is as in [Options].
func RemoveDead(bpffs string, log *slog.Logger) error {
	return pins.RemoveDead(bpffs, skmsg.HoldsUnread, log)
}
