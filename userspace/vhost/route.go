package vhost

import (
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tailsplice/tailsplice/userspace/balance"
)

// Route says what becomes of the requests that it takes. It is not changed once it is in use.
type Route struct {
	Name      string    // the route's name, for OnRequest
	Guard     Guard     // if not nil, decides whether a request may go on
	Upstreams []Choice  // where its requests may go. It needs one, but for a Redirect.
	BySource  bool      // a client has the same upstream each time
	Redirect  *Redirect // if not nil, the answer
	// StripPrefix is taken off the path, and then AddPrefix put before it.
	StripPrefix, AddPrefix string
	// RequestHeader is applied behind the forwarding headers, ResponseHeader to whatever an upstream answers.
	RequestHeader, ResponseHeader HeaderChange
	MaxBody                       int64 // bounds a request's body, in bytes; 0 doesn't
	// AnswerTimeout and BodyTimeout, if not 0, replace Options.AnswerTimeout and Options.StallTimeout.
	AnswerTimeout, BodyTimeout time.Duration
	Compress                   bool // answers with gzip where that is asked for and of use
	// Wait, if not nil, is called where none of the upstreams could be reached for a request, with the errors
	// of all. It waits until one may take it, and reports whether they are tried once more. since is when the
	// first was tried. ctx is as for Upstream.Dial.
	Wait func(ctx context.Context, since time.Time, errs []error) bool
	// ClientCAs, if not nil, gives each request its roots of client certificates, for which TLS has to ask.
	ClientCAs func() *x509.CertPool
}

// Choice is one of a route's upstreams.
type Choice struct {
	*Upstream
	Weight int  // its share of the requests; with 0 it is a Backup
	Backup bool // it gets the requests that all others failed

	Written string           // names it where Route.BySource chooses
	Checked *balance.Checked // what health checks have found of it; nil: there are none
	Offline func() bool      // reports whether its machine is said to be; nil: that is not known
	// DownSince is since when health checks have found it down; zero: they have not. nil: there are none.
	DownSince func() time.Time
}

// downSince is since when all upstreams are down by their health checks; zero: they are not.
func (r *Route) downSince() (since time.Time) {
	for _, c := range r.Upstreams {
		if c.DownSince == nil {
			return time.Time{}
		}
		down := c.DownSince()
		if down.IsZero() {
			return time.Time{}
		}
		if down.After(since) {
			since = down
		}
	}
	return since
}

// HeaderChange removes headers and then sets others. Names are canonical.
type HeaderChange struct {
	Remove []string
	Set    map[string]string
}

// applyFolded is apply for a request, whose target may read a header by other writings of its name.
func (c *HeaderChange) applyFolded(h http.Header) {
	for _, name := range slices.AppendSeq(slices.Clone(c.Remove), maps.Keys(c.Set)) {
		dropHeader(h, name)
	}
	c.apply(h)
}

func (c *HeaderChange) apply(h http.Header) {
	for _, name := range c.Remove {
		h.Del(name)
	}
	for name, value := range c.Set {
		h[name] = []string{value}
	}
}

// refuses is Refuses, where that is not nil.
func (up *Upstream) refuses() error {
	if up.Refuses == nil {
		return nil
	}
	return up.Refuses()
}

// pick chooses an upstream for a client that is not in tried, or nil.
func (r *Route) pick(client netip.Addr, tried []*Upstream) *Upstream {
	if len(r.Upstreams) == 1 && len(tried) == 0 {
		return r.Upstreams[0].Upstream
	}
	i := balance.Pick(len(r.Upstreams), func(i int) balance.Option {
		c := r.Upstreams[i]
		var key uint64
		if r.BySource {
			key = balance.Key(client, c.Written)
		}
		return balance.Option{Key: key, Weight: c.Weight, Backup: c.Backup, Tried: slices.Contains(tried, c.Upstream),
			Offline: c.Offline != nil && c.Offline(), Off: c.refuses() != nil, Health: &c.Health, Checked: c.Checked}
	})
	if i < 0 {
		return nil
	}
	return r.Upstreams[i].Upstream
}

// Match is what narrows a host's routes. The zero Match takes every request.
type Match struct {
	Path    string            // see PathMatches
	Methods []string          // nil for any; GET takes HEAD too
	Headers map[string]string // by canonical name; "*" is any value
	AnyCase bool              // Path is in upper or lower case: servers may take both for the same
}

// Takes says whether m takes a request for path, as Options.Route got it; or if only the method is wrong.
func (m *Match) Takes(r *http.Request, path string) (ok, otherMethod bool) {
	if !m.TakesPath(path) {
		return false, false
	}
	for name, want := range m.Headers {
		values := valuesOf(r.Header, name)
		if len(values) == 0 || want != "*" && !slices.Contains(values, want) {
			return false, false
		}
	}
	// WSGI's frameworks take post for POST, so a rule for one is a rule for both.
	method := strings.ToUpper(r.Method)
	if m.Methods == nil || slices.Contains(m.Methods, method) || method == http.MethodHead && slices.Contains(m.Methods, http.MethodGet) {
		return true, false
	}
	return false, true
}

// TakesPath says whether m takes this path.
func (m *Match) TakesPath(path string) bool {
	if !m.AnyCase {
		return PathMatches(m.Path, path)
	}
	for _, want := range strings.TrimSuffix(m.Path, "/") {
		got, size := utf8.DecodeRuneInString(path)
		if size == 0 || got != want && anyCase(got) != anyCase(want) {
			return false
		}
		path = path[size:]
	}
	return path == "" || path[0] == '/'
}

// valuesOf are the values of a header, however its name is written: the target may read all of them as one.
func valuesOf(h http.Header, name string) (all []string) {
	for other, values := range h {
		if sameHeader(other, name) {
			all = append(all, values...)
		}
	}
	return all
}

// PathMatches says whether a route's path covers path: the same, or followed by more segments. "/api/" and
// "/api" both cover /api, /api/ and /api/x, and not /apis; "" and "/" cover everything.
func PathMatches(route, path string) bool {
	route = strings.TrimSuffix(route, "/")
	rest, ok := strings.CutPrefix(path, route)
	return ok && (rest == "" || rest[0] == '/')
}

// anyCase makes one of the letters that Express, Caddy, IIS, Java and what is like them take for the same.
func anyCase(r rune) rune { return unicode.ToLower(unicode.ToUpper(r)) }

// MethodError says that there are routes for the path, and none for the method: 405.
type MethodError struct{ Allow []string }

func (e *MethodError) Error() string {
	return fmt.Sprintf("no route for this method, only for %s", strings.Join(e.Allow, ", "))
}
