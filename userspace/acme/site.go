package acme

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mholt/acmez/v3/acme"
)

const (
	kickAfter = time.Minute // keeps a daemon that is reloaded often from ordering as often
	lookEvery = time.Hour   // between looks for news from OCSP and from the authority
	// the least lifetime of certificates about which the authority is asked; others go by the clock
	askFrom  = 24 * time.Hour
	askEvery = 6 * time.Hour // between those questions, unless the authority wants more (RFC 9773 4.3.2)
)

// site is one name with its certificate.
type site struct {
	m        *Manager
	name     string
	onDemand atomic.Bool
	policy   atomic.Pointer[policy]
	cert     atomic.Pointer[tls.Certificate]
	asked    atomic.Int64       // when a client last asked for it, Unix seconds; on demand only
	kick     chan struct{}      // try now
	cancel   context.CancelFunc // nil before start; guarded by Manager.mu
	paid     bool               // the token of the first attempt was taken; belongs to run once it is started
	stapling atomic.Bool
	mu       sync.Mutex
	// +checklocks:mu
	progress
}

// progress is what is known of a site's certificate and of the attempts to get it.
type progress struct {
	issuer    *issuer   // of cert, if it is known
	suggested time.Time // when its authority wants it renewed; zero if it doesn't say
	askAt     time.Time // when to ask it (again)
	trying    bool
	tried     chan struct{} // closed when the attempt has ended that is made now, or next
	failures  int
	lastTry   time.Time
	nextTry   time.Time // not before this
	problem   string    // of the last attempt; "" if it went well
}

func newSite(m *Manager, name string, onDemand bool) *site {
	s := &site{m: m, name: name, kick: make(chan struct{}, 1), progress: progress{tried: make(chan struct{})}}
	s.onDemand.Store(onDemand)
	return s
}

// use serves what was found in storage.
func (s *site) use(f *pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.issuer, s.suggested, s.askAt = f.issuer, time.Time{}, time.Time{}
	s.cert.Store(f.cert)
}

// start begins to look after the site, until stop.
//
// +checklocks:m.mu
func (m *Manager) start(s *site) {
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(m.ctx)
	m.tasks.Go(func() { s.run(ctx) })
}

// +checklocks:m.mu
func (m *Manager) stop(s *site) {
	if s.cancel != nil {
		s.cancel()
	}
}

// reloaded tries again at once what has failed, for it may just have been mended; with another policy always.
func (s *site) reloaded(changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if changed {
		s.issuer = nil // is it one of the new policy's? the loop finds out
	}
	if changed || s.failures > 0 && time.Since(s.lastTry) > kickAfter {
		s.failures, s.nextTry = 0, time.Time{}
		select {
		case s.kick <- struct{}{}:
		default:
		}
	}
}

// run looks after the site until ctx ends.
func (s *site) run(ctx context.Context) {
	for {
		s.adopt()
		s.ask(ctx)
		s.staple(ctx)
		if wait := min(time.Until(s.due()), lookEvery); wait > 0 {
			select {
			case <-ctx.Done():
				return
			case <-s.kick:
			case <-time.After(wait):
			}
			continue // what is in storage may have changed as well
		}
		if s.forgotten() {
			return
		}
		if !s.mayAttempt(time.Now()) {
			s.postpone()
		} else if err := s.attempt(ctx); ctx.Err() == nil {
			s.ended(err)
		}
		s.mu.Lock()
		close(s.tried)
		s.tried, s.trying = make(chan struct{}), false
		s.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
	}
}

// due is when the next attempt is to be made.
func (s *site) due() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.renewAt(); at.After(s.nextTry) {
		return at
	}
	return s.nextTry
}

// renewAt is when to renew the certificate: as its authority suggests, else when a third of its time is left.
//
// +checklocks:s.mu
func (s *site) renewAt() time.Time {
	c := s.cert.Load()
	if c == nil || s.issuer == nil { // of an authority that is not configured any more
		return time.Time{}
	}
	life := c.Leaf.NotAfter.Sub(c.Leaf.NotBefore)
	at := c.Leaf.NotAfter.Add(-life / 3)
	if last := c.Leaf.NotAfter.Add(-life / 20); !s.suggested.IsZero() && s.suggested.Before(last) {
		at = s.suggested
	}
	return at
}

// adopt takes from storage what is better than what is served: of this policy, or renewed by another process.
func (s *site) adopt() {
	s.mu.Lock()
	known, at := s.issuer != nil, s.renewAt()
	s.mu.Unlock()
	if known && time.Now().Before(at) {
		return
	}
	f := s.policy.Load().newest(s.name)
	if f == nil {
		return
	}
	if c := s.cert.Load(); known && c != nil && !f.cert.Leaf.NotAfter.After(c.Leaf.NotAfter) {
		return
	}
	s.use(f)
}

// ask asks the authority when it wants the certificate renewed.
func (s *site) ask(ctx context.Context) {
	s.mu.Lock()
	i, c, at := s.issuer, s.cert.Load(), s.askAt
	s.mu.Unlock()
	if time.Now().Before(at) || i == nil || c == nil || c.Leaf.NotAfter.Sub(c.Leaf.NotBefore) < askFrom || time.Now().After(c.Leaf.NotAfter) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	info, err := i.client(&attempt{}).GetRenewalInfo(ctx, c.Leaf) // RFC 9773
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.askAt != at {
		return // about another certificate
	}
	s.askAt = time.Now().Add(askEvery)
	if err != nil {
		s.m.log.Debug("the authority does not say when to renew", "name", s.name, "err", err)
		return
	}
	if info.RetryAfter != nil && info.RetryAfter.Before(s.askAt) {
		s.askAt = *info.RetryAfter
	}
	// Another moment of the same window at each question would never come.
	if w := info.SuggestedWindow; s.suggested.IsZero() || s.suggested.Before(w.Start) || s.suggested.After(w.End) {
		s.suggested = info.SelectedTime
	}
}

// staple has certmagic get the OCSP response in the background: a responder that hangs must stop no renewal.
func (s *site) staple(ctx context.Context) {
	c := s.cert.Load()
	if c == nil || len(c.Leaf.OCSPServer) == 0 || !s.stapling.CompareAndSwap(false, true) {
		return
	}
	cfg := s.policy.Load().config
	s.m.tasks.Go(func() {
		defer s.stapling.Store(false)
		done := make(chan []byte, 1)
		go func() { // may outlive us: certmagic's request to the responder has no end of its own
			defer close(done)
			if got, err := cfg.CacheManagedCertificate(ctx, s.name); err == nil && got.Leaf.Equal(c.Leaf) {
				done <- got.OCSPStaple
			}
		}()
		var staple []byte
		select {
		case <-ctx.Done():
		case staple = <-done:
		}
		for _, other := range s.m.cache().AllMatchingCertificates(s.name) {
			// its maintenance may have a newer one
			switch {
			case len(other.Names) == 0 || other.Names[0] != s.name:
			case other.Leaf.Equal(c.Leaf):
				if len(other.OCSPStaple) > 0 {
					staple = other.OCSPStaple
				}
			default: // that was renewed
				s.m.cache().Remove([]string{other.Hash()})
			}
		}
		if len(staple) > 0 {
			with := *c
			with.OCSPStaple = staple
			s.cert.CompareAndSwap(c, &with)
		}
	})
}

type attemptKey struct{}

// attempt collects what an attempt comes to, from where certmagic and acmez lose it on the way.
type attempt struct {
	replaces   *x509.Certificate
	replacesOf string
	issuer     *issuer
	problems   []acme.Problem // of the authority that is being tried
	failed     []failure
	storage    *StorageError
}

// note keeps a problem, which acmez may report more than once.
func (a *attempt) note(p acme.Problem) {
	isSame := func(other acme.Problem) bool { return other.Type == p.Type && other.Detail == p.Detail }
	if !slices.ContainsFunc(a.problems, isSame) {
		a.problems = append(a.problems, p)
	}
}

// failure is what came of one authority.
type failure struct {
	ca       CA
	problems []acme.Problem
	err      error
}

func attemptOf(ctx context.Context) *attempt {
	a, _ := ctx.Value(attemptKey{}).(*attempt)
	return a
}

// attempt tries once to get a certificate.
func (s *site) attempt(ctx context.Context) error {
	slots := s.m.slots
	if s.onDemand.Load() {
		slots = s.m.demandSlots
	}
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-slots }()
	p := s.policy.Load()
	a := &attempt{}
	s.mu.Lock()
	s.trying, s.lastTry = true, time.Now()
	if c := s.cert.Load(); c != nil && s.issuer != nil {
		a.replaces, a.replacesOf = c.Leaf, s.issuer.IssuerKey()
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, attemptKey{}, a), p.attemptTimeout())
	defer cancel()

	s.m.log.Info("ordering a certificate", "name", s.name, "ca", p.settings.CAs[0].Directory)
	err := p.config.RenewCertSync(ctx, s.name, true) // obtains it, if there is none
	f := p.newest(s.name)
	if err == nil && f == nil {
		err = errors.New("the certificate was stored, and can't be read back")
	}
	if err != nil {
		return &attemptError{attempt: a, settings: &p.settings, name: s.name, err: err}
	}
	s.use(f)
	for _, failed := range a.failed { // the fallback has saved us
		s.m.log.Warn("the certificate came from the fallback", "name", s.name, "err", failed.explain(&p.settings, s.name))
	}
	s.m.log.Info("certificate obtained", "name", s.name, "ca", f.issuer.ca.Directory, "expires", f.cert.Leaf.NotAfter)
	return nil
}

// ended notes how an attempt ended, and when the next one may be.
func (s *site) ended(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.failures, s.problem, s.nextTry = 0, "", time.Time{}
		return
	}
	wait, text := time.Duration(0), err.Error()
	var ae *attemptError
	if errors.As(err, &ae) {
		wait, text = ae.backoff(s.failures), ae.explain()
	}
	serving := "nothing: connections for this name fail"
	if c := s.cert.Load(); c != nil {
		left, end := time.Until(c.Leaf.NotAfter), c.Leaf.NotAfter.UTC().Format("2006-01-02 15:04:05 MST")
		serving = "the certificate that expires " + end
		if left > 0 { // short-lived certificates leave no time for long breaks
			wait = min(wait, max(left/4, 5*time.Second))
		} else {
			serving = "a certificate that expired " + end + ": browsers refuse it"
		}
	}
	if ae != nil {
		wait = max(wait, ae.retryAfter())
	}
	wait += time.Duration(rand.Int64N(int64(wait)/10 + 1))
	s.failures++
	s.problem, s.nextTry = text, time.Now().Add(wait)
	s.m.log.Error("certificate can't be obtained", "name", s.name, "err", text, "serving", serving, "attempt", s.failures, "next_try", s.nextTry.UTC().Truncate(time.Second))
}

// missing is the error of a handshake for which there is no certificate.
func (s *site) missing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.problem != "" {
		return fmt.Errorf("no certificate for %s yet: %s", s.name, s.problem)
	}
	return fmt.Errorf("no certificate for %s yet: it is being obtained", s.name)
}

// forgotten says whether an on-demand name is not wanted any more, and drops it: nobody has asked for it for
// a third of the certificate's life, or, without one, for an hour.
func (s *site) forgotten() bool {
	if !s.onDemand.Load() {
		return false
	}
	keep := time.Hour
	if c := s.cert.Load(); c != nil {
		keep = max(keep, c.Leaf.NotAfter.Sub(c.Leaf.NotBefore)/3)
	}
	if time.Since(time.Unix(s.asked.Load(), 0)) < keep {
		return false
	}
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.m.dynamic[s.name] != s {
		return false
	}
	delete(s.m.dynamic, s.name)
	s.m.log.Info("nobody asks for a certificate on demand any more: it is not renewed", "name", s.name)
	return true
}

// States of a name.
const (
	StateValid     = "valid"     // served, and nothing to do
	StateObtaining = "obtaining" // its first certificate is on its way
	StateRenewing  = "renewing"  // served, and the next one is on its way
	StateFailing   = "failing"   // the last attempt failed: see Problem and NextTry
	StateExpired   = "expired"   // what is served has expired: see Problem
)

// Status is one name's.
type Status struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	OnDemand bool      `json:"on_demand,omitempty"`
	CA       string    `json:"ca,omitempty"` // directory URL that the certificate is from
	NotAfter time.Time `json:"not_after,omitzero"`
	RenewAt  time.Time `json:"renew_at,omitzero"`
	Problem  string    `json:"problem,omitempty"`  // what the last attempt failed for, and what to do
	Attempts int       `json:"attempts,omitempty"` // that failed since the last success
	NextTry  time.Time `json:"next_try,omitzero"`
}

// Status lists the names of a section, and those on demand that were asked for, by name.
func (s *Source) Status() []Status {
	out := []Status{}
	t := s.m.table.Load()
	for name := range s.names {
		if site := t.sites[name]; site != nil {
			out = append(out, site.status())
		}
	}
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	for name, site := range s.m.dynamic {
		if s.demand.allows(name) != nil {
			out = append(out, site.status())
		}
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (s *site) status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Name: s.name, OnDemand: s.onDemand.Load(), Problem: s.problem, Attempts: s.failures, State: StateObtaining}
	if s.failures > 0 {
		st.NextTry = s.nextTry
	}
	c := s.cert.Load()
	if c != nil {
		st.NotAfter, st.RenewAt, st.State = c.Leaf.NotAfter, s.renewAt(), StateValid
		if s.issuer != nil {
			st.CA = s.issuer.ca.Directory
		}
	}
	switch {
	case c != nil && time.Now().After(c.Leaf.NotAfter):
		st.State = StateExpired
	case s.problem != "":
		st.State = StateFailing
	case c != nil && s.trying:
		st.State = StateRenewing
	}
	return st
}
