// Package acme obtains certificates from ACME authorities, keeps them renewed, and answers challenges from
// the listeners that exist anyway: it binds nothing, so that a host behind edges which pass bytes on gets
// some.
//
//   - tls-alpn-01 (RFC 8737): [Manager.ChallengeConfig] answers hellos with ALPN
//     acme-tls/1 on any listener that terminates TLS.
//   - http-01 (RFC 8555 8.3): [Manager.ServeChallenge] answers requests below
//     /.well-known/acme-challenge/ on any listener that speaks HTTP.
//   - dns-01 (RFC 8555 8.4): a [Hook], a program of the administrator's, sets and
//     removes the TXT record. It is the only way to wildcards.
//
// Issuing is in the background and never in the way: what is in storage is served at once, an attempt that
// fails is repeated later ([Status] says when and why), and the certificate that there is stays in use
// meanwhile, whatever happens to the authority, the network or the disk.
//
// It stands on certmagic (storage layout, keys, requests, fallback from one authority to the next, OCSP) and
// on acmez, certmagic's protocol client. certmagic's own scheduler and listeners are not used: it binds ports
// 80 and 443 where they are free, and looks at certificates too seldom (10 minutes) for short-lived ones.
//
// Its files:
//
//	acme.go       the manager: which names, from which authority
//	policy.go     how certificates are obtained: a section without its names
//	site.go       a name: when its certificate is obtained and renewed, and what is seen of it from outside
//	demand.go     names that are found out by hellos, and how many
//	issuer.go     an attempt at one authority
//	challenge.go  tls-alpn-01 and http-01
//	hook.go       dns-01, by a program
//	storage.go    certificates, keys and accounts on disk
//	advice.go     an authority's error, in words that help
//	log.go        certmagic's log lines become ours
package acme

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

// DefaultStorage is where certificates and accounts are kept.
const DefaultStorage = "/var/lib/tailsplice/acme"

// The challenges that a Section may allow.
const (
	HTTP01    = "http-01"
	TLSALPN01 = "tls-alpn-01"
	DNS01     = "dns-01"
)

// Section says which names get certificates, and from whom.
type Section struct {
	Names []string // obtained at once, each for itself: exact, or "*.example.org" (one label, dns-01 only)
	// OnDemand names get theirs when a client first asks: exact, or "*.example.org" (one label or more).
	OnDemand []string

	Email      string   // whom the authority writes to; may be empty
	CAs        []CA     // tried in this order
	Challenges []string // empty: dns-01 where DNS is set, else http-01 and tls-alpn-01
	DNS        *Hook    // sets records for dns-01
	Storage    string   // folder; empty means DefaultStorage
}

// CA is an authority. Naming it is agreeing to its terms of service.
type CA struct {
	Directory string // URL
	RootFile  string // PEM file with roots to believe for the directory, beside the system's; may be empty
	EABKeyID  string // external account binding (RFC 8555 7.3.4); may be empty
	EABMACKey string // base64url
}

// Manager obtains, keeps and serves all sections' certificates. It is safe for concurrent use. Close ends it.
type Manager struct {
	log         *slog.Logger
	zap         *zap.Logger
	cache       func() *certmagic.Cache // keeps OCSP staples fresh; made when first needed
	challenges  challenges
	budget      budget // of on-demand names without a certificate
	renewals    budget // of on-demand names with one
	slots       chan struct{}
	demandSlots chan struct{}
	demandNames int
	ctx         context.Context
	cancel      context.CancelFunc
	tasks       sync.WaitGroup
	table       atomic.Pointer[table]
	mu          sync.Mutex // held for changes of table; it is taken before site.mu and budget.mu
	// +checklocks:mu
	dynamic map[string]*site // on-demand names that somebody asked for
	// +checklocks:mu
	closed bool
}

// table is what a Manager knows by configuration. It is immutable.
type table struct {
	sites    map[string]*site   // by name, "*.example.org" among them
	exact    map[string]*policy // on demand
	wildcard map[string]*policy // on demand, without "*."
	policies []*policy
}

// atOnce is how many certificates are ordered at a time: a first start must not look like an attack.
const atOnce = 4

// never is the interval of those of certmagic's duties that this package does.
const never = 365 * 24 * time.Hour

// New makes a Manager without names. What it logs tells what to do.
func New(log *slog.Logger) *Manager {
	m := &Manager{log: log, zap: newZap(log), slots: make(chan struct{}, atOnce), demandSlots: make(chan struct{}, demandAtOnce),
		dynamic: map[string]*site{}, demandNames: demandNames, budget: newBudget(), renewals: newBudget()}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.table.Store(&table{})
	m.cache = sync.OnceValue(func() *certmagic.Cache {
		c := certmagic.NewCache(certmagic.CacheOptions{GetConfigForCert: m.configFor, RenewCheckInterval: never, Logger: m.zap})
		m.tasks.Go(func() {
			<-m.ctx.Done()
			c.Stop()
		})
		return c
	})
	return m
}

// configFor says how certmagic may renew a certificate, which it does when OCSP says that it was revoked.
func (m *Manager) configFor(c certmagic.Certificate) (*certmagic.Config, error) {
	for _, name := range c.Names {
		if s := m.site(name); s != nil {
			return s.policy.Load().config, nil
		}
	}
	return nil, fmt.Errorf("acme: no section has %v any more", c.Names)
}

// site finds what is responsible for exactly this name, or nil.
func (m *Manager) site(name string) *site {
	if s := m.table.Load().sites[name]; s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dynamic[name]
}

// Close ends what goes on in the background.
func (m *Manager) Close() {
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	if closed {
		return
	}
	m.cancel()
	m.tasks.Wait()
}

// Prepare checks sections and reads from storage what they already have. Nothing changes before apply is
// called, which can't fail. Names whose section is as it was go on undisturbed; a name whose authority
// changed keeps its certificate until the new one is there. An error is a mistake in the sections, not in
// storage or an authority.
func (m *Manager) Prepare(sections []Section) (apply func(), err error) {
	next := &table{sites: map[string]*site{}, exact: map[string]*policy{}, wildcard: map[string]*policy{}}
	old := m.table.Load()
	var errs []error
	wanted := map[string]*policy{}
	for _, s := range sections {
		s = s.withDefaults()
		if err := s.check(); err != nil {
			errs = append(errs, err)
			continue
		}
		p, err := m.policyFor(s, old, next)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, name := range s.Names {
			if other := wanted[name]; other != nil && other != p {
				errs = append(errs, fmt.Errorf("acme: %s is in two sections with different settings: leave it in one", name))
			}
			wanted[name] = p
		}
		for _, name := range s.OnDemand {
			m, name := next.exact, name
			if rest, wild := strings.CutPrefix(name, "*."); wild {
				m, name = next.wildcard, rest
			}
			if other := m[name]; other != nil && other != p {
				errs = append(errs, fmt.Errorf("acme: %s is on demand in two sections with different settings: leave it in one", name))
			}
			m[name] = p
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	// A certificate that is on disk is served from the first handshake on.
	found := map[string]*pair{}
	for name, p := range wanted {
		if s := old.sites[name]; s == nil || s.policy.Load() != p {
			found[name] = p.newest(name)
		}
	}
	return func() { m.apply(next, wanted, found) }, nil
}

func (m *Manager) apply(next *table, wanted map[string]*policy, found map[string]*pair) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	old := m.table.Load()
	for name, p := range wanted {
		s := old.sites[name]
		if s == nil {
			s = m.dynamic[name] // was on demand before
			delete(m.dynamic, name)
		}
		if s == nil {
			s = newSite(m, name, false)
		}
		s.onDemand.Store(false)
		if f := found[name]; f != nil {
			s.use(f)
		}
		changed := s.policy.Swap(p) != p
		next.sites[name] = s
		if s.cancel == nil {
			m.start(s)
		} else {
			s.reloaded(changed)
		}
	}
	for name, s := range old.sites {
		if next.sites[name] == nil {
			m.stop(s)
		}
	}
	for name, s := range m.dynamic {
		p := next.allows(name)
		if p == nil {
			m.stop(s)
			delete(m.dynamic, name)
			continue
		}
		s.reloaded(s.policy.Swap(p) != p)
	}
	m.table.Store(next)
	for _, p := range next.policies {
		p.checkStorage(m.log)
	}
}

// policyFor finds the policy of a section that is as it was, or makes one.
func (m *Manager) policyFor(s Section, old, next *table) (*policy, error) {
	s.Names, s.OnDemand = nil, nil
	same := func(p *policy) bool { return reflect.DeepEqual(p.settings, s) }
	if i := slices.IndexFunc(next.policies, same); i >= 0 {
		return next.policies[i], nil
	}
	var p *policy
	if i := slices.IndexFunc(old.policies, same); i >= 0 {
		p = old.policies[i]
	} else {
		var err error
		if p, err = newPolicy(m, s); err != nil {
			return nil, err
		}
	}
	next.policies = append(next.policies, p)
	return p, nil
}

func (s Section) withDefaults() Section {
	s.Storage = cmp.Or(s.Storage, DefaultStorage)
	if len(s.Challenges) == 0 {
		if s.Challenges = []string{HTTP01, TLSALPN01}; s.DNS != nil {
			s.Challenges = []string{DNS01}
		}
	}
	return s
}

// check refuses what no authority could do. Configuration says it earlier, with file and line.
func (s Section) check() error {
	if len(s.CAs) == 0 {
		return errors.New("acme: no authority")
	}
	for _, c := range s.Challenges {
		switch {
		case c == DNS01 && s.DNS == nil:
			return errors.New("acme: challenge dns-01 needs dns: the program that sets the record")
		case c != DNS01 && c != HTTP01 && c != TLSALPN01:
			return fmt.Errorf("acme: no challenge %q", c)
		}
	}
	for _, name := range s.Names {
		if strings.HasPrefix(name, "*.") && !slices.Contains(s.Challenges, DNS01) {
			return fmt.Errorf("acme: %s: a wildcard is only given for challenge dns-01: set dns", name)
		}
	}
	return nil
}

// allows finds the policy that gives name a certificate on demand, or nil.
func (t *table) allows(name string) *policy {
	if p := t.exact[name]; p != nil {
		return p
	}
	for _, rest, ok := strings.Cut(name, "."); ok && len(t.wildcard) > 0; _, rest, ok = strings.Cut(rest, ".") {
		if p := t.wildcard[rest]; p != nil {
			return p
		}
	}
	return nil
}

// lookup finds the site that has a certificate for name: its own, or that of a wildcard one label up.
func (t *table) lookup(name string) *site {
	_, parent, _ := strings.Cut(name, ".")
	return cmp.Or(t.sites[name], t.sites["*."+parent])
}

// Source is a section as a place to get certificates from.
type Source struct {
	m       *Manager
	section Section
	names   map[string]bool
	demand  table
}

// Source returns the certificates of a section, from the apply on that has the section.
func (m *Manager) Source(s Section) *Source {
	src := &Source{m: m, section: s, names: map[string]bool{}, demand: table{exact: map[string]*policy{}, wildcard: map[string]*policy{}}}
	for _, n := range s.Names {
		src.names[n] = true
	}
	for _, n := range s.OnDemand {
		if rest, wild := strings.CutPrefix(n, "*."); wild {
			src.demand.wildcard[rest] = &policy{}
		} else {
			src.demand.exact[n] = &policy{}
		}
	}
	return src
}

// String names the source in status.
func (s *Source) String() string {
	return "acme: " + strings.Join(slices.Concat(s.section.Names, s.section.OnDemand), ", ")
}

// Covers says whether name (lower case, no trailing dot) is one of the section's.
func (s *Source) Covers(name string) bool {
	_, parent, _ := strings.Cut(name, ".")
	return s.names[name] || s.names["*."+parent] || s.demand.allows(name) != nil
}

// GetCertificate returns the certificate for the hello's name, or without a name the section's first. It
// waits only for a first one on demand. Without certificate and error the name is not the section's.
func (s *Source) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
	if name == "" && len(s.section.Names) > 0 {
		if site := s.m.table.Load().sites[s.section.Names[0]]; site != nil {
			return site.cert.Load(), nil
		}
	}
	if !s.Covers(name) {
		return nil, nil
	}
	t := s.m.table.Load()
	if site := t.lookup(name); site != nil {
		if c := site.cert.Load(); c != nil {
			return c, nil
		}
		return nil, site.missing()
	}
	p := t.allows(name)
	if p == nil {
		return nil, nil
	}
	ctx := hello.Context()
	if ctx == nil { // a hello that crypto/tls did not make
		ctx = context.Background()
	}
	return s.m.demand(ctx, name, p)
}
