// Package health checks whether targets work, so that connections go to those that do.
//
//	health.go  the checks that run: each target once, however many routes want it checked so
//	state.go   when a target is down, and when it is taken back
//	record.go  what is known of a target goes to another process, or comes from one
//	probe.go   one check: a connect, a TLS handshake, or a request
package health

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/balance"
)

// Spec says how a target is checked. Routes whose specs are equal share one [Check]. It is part of a
// [Record]: in a field that is added, the zero value stands for what was done before.
type Spec struct {
	Target string `json:"target"` // as the configuration writes it
	Kind   string `json:"kind"`   // Connect, TLS or HTTP

	// from the beginning of one check to that of the next, a tenth more or less
	Every   time.Duration `json:"every"`
	Timeout time.Duration `json:"timeout"` // of one check, names and all
	// checks in a row that must succeed until a target that is down is up
	Rise int `json:"rise"`
	// checks in a row that must fail until a target that is up is down
	Fall int `json:"fall"`
	// until a target that is up again has its whole share; 0: at once
	SlowStart time.Duration `json:"slow_start,omitempty"`

	// sent before anything else, but by Connect, which sends nothing: a PROXY header
	Preface    string `json:"preface,omitempty"`
	TLS        bool   `json:"tls,omitempty"`         // of HTTP: the request goes by TLS
	H2C        bool   `json:"h2c,omitempty"`         // of HTTP: it is one of HTTP/2 in the clear
	ServerName string `json:"server_name,omitempty"` // in the TLS hello; "" for none
	Verify     bool   `json:"verify,omitempty"`      // whether the certificate must be good for ServerName
	// the file of the authorities that count then; "" for the system's
	CA string `json:"ca,omitempty"`

	Host   string `json:"host,omitempty"` // of the request
	Path   string `json:"path,omitempty"`
	Expect string `json:"expect,omitempty"` // status codes and classes that are good, as "2xx 304"
}

// The kinds of checks.
const (
	Connect = "connect"
	TLS     = "tls"
	HTTP    = "http"
)

// Check is a target, and what its checks have found. Make it with [Set.Of].
type Check struct {
	Spec
	balance.Checked // what connections go by

	probe func(context.Context) error

	mu sync.Mutex
	// +checklocks:mu
	state

	// Counts of checks by how they went. One that is unclear failed for want of something here.
	Succeeded, Failed, Unclear atomic.Int64
}

// Status is what is known of a target.
type Status struct {
	Down  bool
	Since time.Time // when it went down, or came back, or when it was checked first; zero before
	Err   error     // how the last check failed, or nil
	Until time.Time // it is down until then at least, because it has gone down again and again; or zero
	Share int       // percent of its weight that it has now
}

// Status describes what is known now.
func (c *Check) Status() Status {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Status{Down: c.isDown, Since: c.since, Err: c.last, Share: c.Share(now)}
	if c.isDown && c.falls > 1 && c.until.After(now) {
		s.Until = c.until
	}
	return s
}

// Set are the checks that run. The zero Set has none. It is safe for concurrent use.
type Set struct {
	Log *slog.Logger
	// Tells reports whether an error of a check says something of the target; nil: each does.
	Tells func(error) bool
	// Down hears of each target that goes down, and why, on a goroutine that waits for nothing else; or nil.
	Down func(c *Check, why error)
	// Moved is called when what Records returns has changed so that a process after a crash should know it,
	// or would soon be too old for that; or nil. It must not block.
	Moved func()

	mu sync.Mutex
	// +checklocks:mu
	running map[Spec]*running
	// +checklocks:mu
	found map[Spec]*Record // by another process, for the next Use
}

type running struct {
	*Check
	cancel context.CancelFunc
}

// Of returns the check that runs by spec, or a new one that does not run yet. probe checks the target once,
// until ctx ends. A nil Set has none that run.
func (s *Set) Of(spec Spec, probe func(ctx context.Context) error) *Check {
	if s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if r := s.running[spec]; r != nil {
			return r.Check
		}
	}
	return &Check{Spec: spec, probe: probe}
}

// Use starts those of checks that do not run yet, until ctx ends, and stops all others. What was known of
// those that go on stays; the first Use after Inherit goes on with what that was given.
func (s *Set) Use(ctx context.Context, checks []*Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := map[Spec]*running{}
	for _, c := range checks {
		if next[c.Spec] = s.running[c.Spec]; next[c.Spec] == nil {
			own, cancel := context.WithCancel(ctx)
			next[c.Spec] = &running{c, cancel}
			if r := s.found[c.Spec]; r != nil {
				c.takeOver(r, time.Now())
			}
			go s.run(own, c)
		}
	}
	for spec, r := range s.running {
		if next[spec] == nil {
			r.cancel()
		}
	}
	s.running, s.found = next, nil
}

// Running are the checks that run, in no order.
func (s *Set) Running() (all []*Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.running {
		all = append(all, r.Check)
	}
	return all
}

// soon is when the first check begins, at the latest.
const soon = time.Second

// run checks c's target again and again. The times vary, so that the checks of many targets, and of many
// daemons, do not come at one moment.
func (s *Set) run(ctx context.Context, c *Check) {
	next := time.NewTimer(rand.N(min(c.Every, soon)))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		next.Reset(c.Every*9/10 + rand.N(c.Every/5))
		err := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		s.note(c, err)
	}
}

// once makes one check.
func (c *Check) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	return c.probe(ctx)
}

// note counts a check that went so, and says what follows for connections.
func (s *Set) note(c *Check, err error) {
	if err != nil && s.Tells != nil && !s.Tells(err) {
		c.Unclear.Add(1)
		return
	}
	now := time.Now()
	c.mu.Lock()
	before := c.since
	changed := c.state.note(&c.Spec, now, err)
	isDown, until, again := c.isDown, c.until, c.falls > 1
	isNews := c.isNews(&c.Spec, now, changed)
	if changed && isDown {
		c.SetDown()
	} else if changed {
		c.SetUp(now, c.SlowStart)
	}
	c.mu.Unlock()
	if err == nil {
		c.Succeeded.Add(1)
	} else {
		c.Failed.Add(1)
	}
	if isNews && s.Moved != nil {
		s.Moved()
	}
	switch {
	case !changed:
	case !isDown:
		s.Log.Info("a target is up again: its health checks succeed", "target", c.Target, "check", c.Kind,
			"duration", now.Sub(before).Round(time.Millisecond).Seconds())
	default:
		log := s.Log
		if again {
			log = log.With(slog.Any("until", until))
		}
		log.Warn("a target is down: its health checks fail", "target", c.Target, "check", c.Kind, "err", err)
		if s.Down != nil {
			s.Down(c, err)
		}
	}
}
