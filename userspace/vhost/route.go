package vhost

import (
	"crypto/x509"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

// Route says what becomes of the requests that it takes. It is not changed once it is in use.
type Route struct {
	Name      string    // the route's name, for OnRequest
	Guard     Guard     // if not nil, decides whether a request may go on
	Upstreams []Choice  // where its requests may go. It needs one, but for a Redirect.
	Redirect  *Redirect // if not nil, the answer
	// StripPrefix is taken off the path, and then AddPrefix put before it.
	StripPrefix, AddPrefix string
	// RequestHeader is changed after the forwarding headers were made, ResponseHeader in whatever an upstream
	// answers.
	RequestHeader, ResponseHeader HeaderChange
	MaxBody                       int64 // bounds a request's body, in bytes; 0 doesn't
	// AnswerTimeout and BodyTimeout (Options.StallTimeout for the request's body), if not 0, take the place
	// of the server's.
	AnswerTimeout, BodyTimeout time.Duration
	Compress                   bool // answers with gzip where that is asked for and of use
	// ClientCAs, if not nil, says what a client's certificate must come from, for each request anew. The TLS
	// configuration has to ask for one.
	ClientCAs func() *x509.CertPool
}

// Choice is one of a route's upstreams.
type Choice struct {
	*Upstream
	Weight int // its share of the requests; with 0 it gets those that all others failed
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

// avoidFor is how long an upstream that could not be reached is asked only if there is no other.
const avoidFor = 10 * time.Second

// health is what is known of an upstream from the last requests.
type health struct{ failed atomic.Int64 } // when it could last not be reached, Unix ns; 0 if it was since

func (h *health) good(now time.Time) bool { return now.UnixNano()-h.failed.Load() > int64(avoidFor) }

// pick chooses an upstream that is not in tried, or nil: by weight among those that could be reached lately,
// else among the others, and those without a weight last.
func (r *Route) pick(tried []*Upstream) *Upstream {
	if len(r.Upstreams) == 1 && len(tried) == 0 {
		return r.Upstreams[0].Upstream
	}
	now := time.Now()
	for _, wanted := range [...]func(Choice) bool{
		func(c Choice) bool { return c.Weight > 0 && c.health.good(now) },
		func(c Choice) bool { return c.Weight == 0 && c.health.good(now) },
		func(c Choice) bool { return true },
	} {
		total, fit := 0, []Choice(nil)
		for _, c := range r.Upstreams {
			if wanted(c) && !slices.Contains(tried, c.Upstream) {
				total, fit = total+max(c.Weight, 1), append(fit, c)
			}
		}
		n := rand.IntN(max(total, 1))
		for _, c := range fit {
			if n -= max(c.Weight, 1); n < 0 {
				return c.Upstream
			}
		}
	}
	return nil
}
