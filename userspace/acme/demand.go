package acme

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// What strangers can cause by asking for ever new names below an allowed wildcard: so many attempts at once,
// and one more in each interval; as many again for renewals, which must not wait for strangers. An attempt
// that fails is an order for each challenge: 240 in the first three hours. Let's Encrypt takes 300 orders of
// an account in that time, gives 50 new certificates a week to a registered domain, and refills one every 202
// minutes (https://letsencrypt.org/docs/rate-limits/).
const (
	demandBurst    = 20
	demandInterval = 3 * time.Minute
)

const (
	demandAtOnce = 2 // attempts for on-demand names at a time, beside those for configured ones
	// demandNames is how many on-demand names are looked after. Of more, the one that nobody has asked for
	// longest is dropped: its certificate stays in storage, and is served from there when somebody does.
	demandNames = 1000
	// demandWait is how long a first handshake waits for its certificate, within the 10 s of listeners.
	demandWait = 9 * time.Second
)

// budget is a token bucket of attempts.
type budget struct {
	mu sync.Mutex
	// +checklocks:mu
	tokens float64
	// +checklocks:mu
	at time.Time
}

func newBudget() budget { return budget{tokens: demandBurst} }

func (b *budget) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.at.IsZero() {
		b.tokens = min(demandBurst, b.tokens+float64(now.Sub(b.at))/float64(demandInterval))
	}
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// demand returns the certificate of a name that p gives one on demand.
func (m *Manager) demand(ctx context.Context, name string, p *policy) (*tls.Certificate, error) {
	m.mu.Lock()
	s := m.dynamic[name]
	m.mu.Unlock()
	if s == nil {
		var err error
		if s, err = m.newcomer(name, p); err != nil {
			return nil, err
		}
	}
	s.asked.Store(time.Now().Unix())
	if c := s.valid(); c != nil {
		return c, nil
	}
	s.await(ctx)
	if c := s.cert.Load(); c != nil {
		return c, nil // expired, perhaps: it is what there is
	}
	return nil, s.missing()
}

// valid is the site's certificate, unless that has expired.
func (s *site) valid() *tls.Certificate {
	if c := s.cert.Load(); c != nil && time.Now().Before(c.Leaf.NotAfter) {
		return c
	}
	return nil
}

// await waits for the attempt that is made now, or is due.
func (s *site) await(ctx context.Context) {
	s.mu.Lock()
	tried, later := s.tried, time.Now().Before(s.nextTry)
	s.mu.Unlock()
	if later || s.valid() != nil { // of an attempt that has ended meanwhile
		return
	}
	select {
	case s.kick <- struct{}{}: // a machine that has slept may not know yet
	default:
	}
	select {
	case <-tried:
	case <-time.After(demandWait):
	case <-ctx.Done():
	}
}

// newcomer begins to look after an on-demand name.
func (m *Manager) newcomer(name string, p *policy) (*site, error) {
	if !plausible(name) {
		return nil, fmt.Errorf("no certificate on demand for %q: it is not a host name", name)
	}
	found := p.newest(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.dynamic[name]; s != nil {
		return s, nil
	}
	if m.closed {
		return nil, fmt.Errorf("no certificate on demand for %s: the daemon is shutting down", name)
	}
	valid := found != nil && time.Now().Before(found.cert.Leaf.NotAfter)
	if !valid && !m.budget.take(time.Now()) {
		return nil, fmt.Errorf("no certificate on demand for %s: %d new names were asked for in a short time, and one more is allowed every %v: name it in acme.names, or use a wildcard with acme.dns", name, demandBurst, demandInterval)
	}
	if len(m.dynamic) >= m.demandNames {
		m.dropOldest()
	}
	s := newSite(m, name, true)
	s.paid = !valid
	s.policy.Store(p)
	s.asked.Store(time.Now().Unix())
	if found != nil {
		s.use(found)
	}
	m.dynamic[name] = s
	m.start(s)
	return s, nil
}

// dropOldest ends looking after the name that nobody has asked for longest.
//
// +checklocks:m.mu
func (m *Manager) dropOldest() {
	var oldest *site
	for _, s := range m.dynamic {
		if oldest == nil || s.asked.Load() < oldest.asked.Load() {
			oldest = s
		}
	}
	m.stop(oldest)
	delete(m.dynamic, oldest.name)
	m.log.Debug("too many names on demand: one is not renewed any more until somebody asks for it", "name", oldest.name)
}

// mayAttempt takes the token that an attempt costs: none for a configured name. It is called by run alone.
func (s *site) mayAttempt(now time.Time) bool {
	switch {
	case !s.onDemand.Load():
		return true
	case s.paid:
		s.paid = false
		return true
	case s.valid() != nil:
		return s.m.renewals.take(now)
	}
	return s.m.budget.take(now)
}

// postpone has an attempt wait for a token.
func (s *site) postpone() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextTry = time.Now().Add(demandInterval + rand.N(demandInterval))
	if s.problem == "" {
		s.problem = "too many certificates on demand are asked for: it waits for its turn"
	}
}

// plausible says whether name, which becomes a part of a path and of an order, could be in the public DNS.
func plausible(name string) bool {
	isLong := func(label string) bool { return len(label) > 63 }
	around := "." + name + "."
	return len(name) <= 253 && strings.Contains(name, ".") && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-.") == "" &&
		!strings.Contains(around, "..") && !strings.Contains(around, ".-") && !strings.Contains(around, "-.") &&
		!slices.ContainsFunc(strings.Split(name, "."), isLong)
}
