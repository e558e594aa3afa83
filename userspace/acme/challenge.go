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
	http  sync.Map // an acme.Challenge by token
	hello sync.Map // a *tls.Certificate by server name
}

// httpSolver presents http-01.
type httpSolver struct{ c *challenges }

func (s httpSolver) Present(_ context.Context, ch acme.Challenge) error {
	s.c.http.Store(ch.Token, ch)
	return nil
}

func (s httpSolver) CleanUp(_ context.Context, ch acme.Challenge) error {
	s.c.http.Delete(ch.Token)
	return nil
}

// helloSolver presents tls-alpn-01.
type helloSolver struct{ c *challenges }

func (s helloSolver) Present(_ context.Context, ch acme.Challenge) error {
	cert, err := acmez.TLSALPN01ChallengeCert(ch)
	if err == nil {
		s.c.hello.Store(ch.Identifier.Value, cert)
	}
	return err
}

func (s helloSolver) CleanUp(_ context.Context, ch acme.Challenge) error {
	s.c.hello.Delete(ch.Identifier.Value)
	return nil
}

// ChallengeConfig returns the configuration that answers an authority's tls-alpn-01 hello, and nil for any
// other hello. It belongs in front of [tls.Config.GetConfigForClient]; the connection ends after the
// handshake (RFC 8737 3), by itself where net/http serves it.
func (m *Manager) ChallengeConfig(hello *tls.ClientHelloInfo) *tls.Config {
	if !slices.Contains(hello.SupportedProtos, acmez.ACMETLS1Protocol) {
		return nil
	}
	cert, ok := m.challenges.hello.Load(strings.ToLower(hello.ServerName))
	if !ok {
		return nil
	}
	m.log.Debug("the authority asks by tls-alpn-01", "name", hello.ServerName)
	return &tls.Config{Certificates: []tls.Certificate{*cert.(*tls.Certificate)}, NextProtos: []string{acmez.ACMETLS1Protocol},
		MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true}
}

// ChallengePath is where http-01 asks.
const ChallengePath = "/.well-known/acme-challenge/"

// answer is what an open challenge wants to hear at host and path. Other requests that look like an
// authority's are for whoever the routes lead to: another hop may have the same name.
func (m *Manager) answer(host, path string) (string, bool) {
	token, ok := strings.CutPrefix(path, ChallengePath)
	if !ok {
		return "", false
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	open, _ := m.challenges.http.Load(token)
	ch, ok := open.(acme.Challenge)
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
