package acme

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mholt/acmez/v3/acme"

	"github.com/tailsplice/tailsplice/userspace/hook"
)

// attemptError is an attempt that failed.
type attemptError struct {
	*attempt
	settings *Section
	name     string
	err      error // certmagic's
}

func (e *attemptError) Error() string { return e.explain() }
func (e *attemptError) Unwrap() error { return e.err }

// explain says what happened and what to do, in one line.
func (e *attemptError) explain() string {
	if e.storage != nil {
		return e.storage.Error()
	}
	if len(e.failed) == 0 {
		return e.err.Error()
	}
	var parts []string
	for _, f := range e.failed {
		parts = append(parts, f.explain(e.settings, e.name))
	}
	return strings.Join(parts, "; then ")
}

// explain says what came of one authority.
func (f failure) explain(s *Section, name string) string {
	host := f.ca.Directory
	if u, err := url.Parse(host); err == nil {
		host = u.Host
	}
	problems := f.problems
	if p, ok := errors.AsType[acme.Problem](f.err); ok && len(problems) == 0 {
		problems = []acme.Problem{p}
	}
	if len(problems) == 0 {
		return fmt.Sprintf("%s: %s", host, transport(f.ca, f.err))
	}
	var parts []string
	for _, p := range problems {
		text := strings.TrimPrefix(p.Type, acme.ProblemTypeNamespace) + ": " + p.Detail
		if kind := challengeOf(p); kind != "" {
			text = kind + ": " + text
		}
		if a := advice(p, s, name); a != "" {
			text += ": " + a
		}
		parts = append(parts, text)
	}
	return host + ": " + strings.Join(parts, "; ")
}

// challengeOf is the challenge that a problem came of, or "".
func challengeOf(p acme.Problem) string {
	authz, ok := p.Resource.(acme.Authorization)
	if !ok {
		return ""
	}
	for _, c := range authz.Challenges {
		if c.Error != nil {
			return c.Type
		}
	}
	return ""
}

// advice is what to do about a problem that an authority reports.
func advice(p acme.Problem, s *Section, name string) string {
	bare := strings.TrimPrefix(name, "*.")
	kind := challengeOf(p)
	if p.Type == acme.ProblemTypeUnauthorized && strings.HasPrefix(p.Detail, "Failed to connect") {
		// as pebble has it
		p.Type = acme.ProblemTypeConnection
	}
	if p.Type == acme.ProblemTypeConnection && strings.Contains(p.Detail, "could not resolve") {
		// as pebble has it, too
		p.Type = acme.ProblemTypeDNS
	}
	switch p.Type {
	case acme.ProblemTypeDNS:
		if kind == DNS01 {
			return fmt.Sprintf("the authority can't look up the TXT record of _acme-challenge.%s: see with `dig TXT _acme-challenge.%s` what the zone's servers answer", bare, bare)
		}
		return fmt.Sprintf("the authority can't look up %s: make its A or AAAA record in the public DNS point to your edges", name)
	case acme.ProblemTypeConnection, acme.ProblemTypeTLS:
		switch kind {
		case HTTP01:
			return fmt.Sprintf("the authority can't reach port 80 of %s: an edge must listen there and pass it on (mode tcp or http) to an http listener of this node; or leave http-01 out of challenges", name)
		case TLSALPN01:
			return fmt.Sprintf("the authority can't reach this node through port 443 of %s: the edge must pass TLS on untouched (mode sni) to an https listener here, and its firewall let it in; does the DNS point to the edges?", name)
		}
		return fmt.Sprintf("the authority can't reach %s: does its DNS record point to your edges, and do they pass ports 80 and 443 on to this node?", name)
	case acme.ProblemTypeUnauthorized, acme.ProblemTypeIncorrectResponse:
		if kind == DNS01 {
			return fmt.Sprintf("the authority sees another TXT record at _acme-challenge.%s: the dns hook must return only when all of the zone's servers answer with the new one; acme.dns.wait gives it time", bare)
		}
		return fmt.Sprintf("something else answers for %s: its DNS record points to another server, or an edge routes the name elsewhere", name)
	case acme.ProblemTypeCAA:
		return fmt.Sprintf("the CAA record of %s or of a domain above it forbids this authority: add it there", bare)
	case acme.ProblemTypeRateLimited:
		return "too many orders or failures lately: it is tried again when the authority allows it; meanwhile do not delete the storage, and try changes with the authority's staging directory"
	case acme.ProblemTypeRejectedIdentifier, acme.ProblemTypeUnsupportedIdentifier:
		return fmt.Sprintf("this authority issues no certificate for %s: is it a public name, and spelled correctly?", name)
	case acme.ProblemTypeExternalAccountRequired:
		return "this authority requires external account binding: get a key id and a MAC key from it, and set acme.eab"
	case acme.ProblemTypeInvalidContact, acme.ProblemTypeUnsupportedContact:
		return fmt.Sprintf("the authority does not accept the address %q: change acme.email, or leave it out", s.Email)
	case acme.ProblemTypeUserActionRequired:
		return "its terms have changed, or it requires an action by you: see the address in the message"
	case acme.ProblemTypeServerInternal:
		return "the authority has an internal problem: it is tried again"
	case acme.ProblemTypeMalformed:
		if s.DNS == nil && strings.HasPrefix(name, "*.") {
			return "a wildcard needs dns-01: set acme.dns"
		}
	}
	return ""
}

// transport explains an error of talking to the authority.
func transport(ca CA, err error) string {
	if failed, ok := errors.AsType[*hook.Error](err); ok {
		return "dns hook " + failed.Error()
	}
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Sprintf("its directory has a certificate of an unknown authority: set acme.ca to a file with its root certificate: %v", err)
	case errors.As(err, new(x509.HostnameError)), errors.As(err, new(x509.CertificateInvalidError)):
		return fmt.Sprintf("its directory's certificate can't be verified: is the URL %s right, and this machine's clock? %v", ca.Directory, err)
	case errors.As(err, new(*net.DNSError)):
		return fmt.Sprintf("this machine can't look up its directory's name: is the URL %s right, and does DNS work here? %v", ca.Directory, err)
	case errors.Is(err, syscall.ECONNREFUSED): // its own text would look as if we had refused a connection
		return "this machine can't reach the authority: it refuses connections to " + peer(err) + ": it may be down; is the URL " + ca.Directory + " right?"
	case errors.Is(err, context.DeadlineExceeded), unreachable(err):
		return fmt.Sprintf("this machine can't reach the authority: it may be down; if it stays so, see whether a firewall lets this machine out to it: %v", err)
	}
	return err.Error()
}

// peer is where err, of the network, says that nobody was reached.
func peer(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Addr != nil {
		return op.Addr.String()
	}
	return "it"
}

// unreachable says whether err is of the network, and not of what was said.
func unreachable(err error) bool {
	return errors.As(err, new(net.Error))
}

// backoff is the pause after so many failures before this one. An authority counts failed validations (Let's
// Encrypt: 5 an hour, name and account), of which an attempt makes one for each challenge; that it can't be
// reached costs nothing, nor does a disk that is full.
func (e *attemptError) backoff(failures int) time.Duration {
	steps := []time.Duration{2 * time.Minute, 10 * time.Minute, 30 * time.Minute, time.Hour, 2 * time.Hour, 6 * time.Hour}
	if e.cheap() {
		steps = []time.Duration{10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute}
	}
	return steps[min(failures, len(steps)-1)]
}

// cheap says whether the attempt failed before an authority had work with it.
func (e *attemptError) cheap() bool {
	if e.storage != nil {
		return len(e.failed) == 0 && e.issuer == nil
	}
	return !slices.ContainsFunc(e.failed, func(f failure) bool { return len(f.problems) > 0 || !unreachable(f.err) })
}

// retryTime is how Let's Encrypt allows the next order; acmez does not pass the Retry-After header on.
var retryTime = regexp.MustCompile(`retry after (\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)`)

// retryAfter is how long an authority wants to be left alone.
func (e *attemptError) retryAfter() time.Duration {
	var wait time.Duration
	for _, f := range e.failed {
		p, ok := errors.AsType[acme.Problem](f.err)
		if !ok || p.Type != acme.ProblemTypeRateLimited {
			return 0 // another authority may be asked sooner
		}
		d := time.Hour
		if m := retryTime.FindStringSubmatch(p.Detail); m != nil {
			if at, err := time.Parse(time.DateTime, strings.Replace(m[1], "T", " ", 1)); err == nil {
				d = max(time.Until(at), time.Minute)
			}
		}
		if wait == 0 || d < wait {
			wait = d
		}
	}
	return min(wait, 24*time.Hour)
}
