package acme

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"
)

// challenges are those that authorities may ask about now.
type challenges struct {
	mu sync.RWMutex
	// +checklocks:mu
	http map[string]acme.Challenge // by token
	// +checklocks:mu
	hello map[string]*tls.Certificate // by server name
}

// httpSolver presents http-01.
type httpSolver struct{ c *challenges }

func (s httpSolver) Present(_ context.Context, ch acme.Challenge) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.http == nil {
		s.c.http = map[string]acme.Challenge{}
	}
	s.c.http[ch.Token] = ch
	return nil
}

func (s httpSolver) CleanUp(_ context.Context, ch acme.Challenge) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	delete(s.c.http, ch.Token)
	return nil
}

// helloSolver presents tls-alpn-01.
type helloSolver struct{ c *challenges }

func (s helloSolver) Present(_ context.Context, ch acme.Challenge) error {
	cert, err := acmez.TLSALPN01ChallengeCert(ch)
	if err != nil {
		return err
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.hello == nil {
		s.c.hello = map[string]*tls.Certificate{}
	}
	s.c.hello[ch.Identifier.Value] = cert
	return nil
}

func (s helloSolver) CleanUp(_ context.Context, ch acme.Challenge) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	delete(s.c.hello, ch.Identifier.Value)
	return nil
}

// ChallengeConfig returns the configuration that answers an authority's tls-alpn-01 hello, and nil for any
// other hello. It belongs in front of [tls.Config.GetConfigForClient]; the connection ends after the
// handshake (RFC 8737 3), by itself where net/http serves it.
func (m *Manager) ChallengeConfig(hello *tls.ClientHelloInfo) *tls.Config {
	if !slices.Contains(hello.SupportedProtos, acmez.ACMETLS1Protocol) {
		return nil
	}
	m.challenges.mu.RLock()
	cert := m.challenges.hello[strings.ToLower(hello.ServerName)]
	m.challenges.mu.RUnlock()
	if cert == nil {
		return nil
	}
	m.log.Debug("the authority asks by tls-alpn-01", "name", hello.ServerName)
	return &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{acmez.ACMETLS1Protocol},
		MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true}
}

// ChallengePath is where http-01 asks.
const ChallengePath = "/.well-known/acme-challenge/"

// HasChallenge says whether a request for host and path is an authority's for a challenge that is open now.
// Others that look like it are for whoever the routes lead to: another hop may have the same name.
func (m *Manager) HasChallenge(host, path string) bool {
	_, ok := m.answer(host, path)
	return ok
}

func (m *Manager) answer(host, path string) (string, bool) {
	token, ok := strings.CutPrefix(path, ChallengePath)
	if !ok {
		return "", false
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	m.challenges.mu.RLock()
	ch, ok := m.challenges.http[token]
	m.challenges.mu.RUnlock()
	// The name must fit: a page in another's DNS must not get our answer.
	if !ok || !strings.EqualFold(strings.TrimSuffix(host, "."), ch.Identifier.Value) {
		return "", false
	}
	return ch.KeyAuthorization, true
}

// ServeChallenge answers a request of http-01 for a challenge that is open now, and says whether it was one.
// It belongs before routing, on every listener that speaks HTTP.
func (m *Manager) ServeChallenge(w http.ResponseWriter, r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	text, ok := m.answer(r.Host, r.URL.Path)
	if !ok {
		return false
	}
	m.log.Debug("the authority asks by http-01", "name", r.Host)
	w.Header().Set("Content-Type", "application/octet-stream") // RFC 8555 8.3
	w.Header().Set("Cache-Control", "no-store")
	io.WriteString(w, text)
	return true
}
