package acme

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"time"
)

// What strangers can cause by asking for ever new names below an allowed
// wildcard: so many orders at once, and one more in each interval. Let's Encrypt
// gives 50 new certificates a week to a registered domain, and refills one
// every 202 minutes (https://letsencrypt.org/docs/rate-limits/).
const (
	demandBurst    = 20
	demandInterval = 3 * time.Minute
)

// demandWait is how long a first handshake waits for its certificate. Listeners
// give a handshake 10 s; what takes longer is there for the client's next one.
const demandWait = 9 * time.Second

// budget is a token bucket of names that were never seen.
type budget struct {
	mu     sync.Mutex
	tokens float64
	at     time.Time
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
	if c := s.cert.Load(); c != nil {
		return c, nil
	}
	timer := time.NewTimer(demandWait)
	defer timer.Stop()
	select {
	case <-s.tried:
	case <-timer.C:
	case <-ctx.Done():
	}
	if c := s.cert.Load(); c != nil {
		return c, nil
	}
	return nil, s.missing()
}

// newcomer begins to look after an on-demand name.
func (m *Manager) newcomer(name string, p *policy) (*site, error) {
	if !plausible(name) {
		return nil, fmt.Errorf("no certificate on demand for %q: it is no host name", name)
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
	if found == nil && !m.budget.take(time.Now()) {
		return nil, fmt.Errorf("no certificate on demand for %s: %d new names were asked for in a short time, and one more is allowed every %v: name it in acme.names, or use a wildcard with acme.dns", name, demandBurst, demandInterval)
	}
	s := newSite(m, name, true)
	s.policy.Store(p)
	s.asked.Store(time.Now().Unix())
	if found != nil {
		s.use(found)
	}
	m.dynamic[name] = s
	s.start()
	return s, nil
}

// plausible says whether a server name could be a host's in the public DNS. It
// becomes part of a path and of an order.
func plausible(name string) bool {
	if len(name) > 253 || !strings.Contains(name, ".") {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	return true
}
