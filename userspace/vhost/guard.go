package vhost

import (
	"errors"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Guard decides whether a request may go on. Nil lets it; ErrAnswered says that the guard has answered by w;
// a *Refusal makes a page; any other error is an internal one (500). It must not read the request's body.
type Guard func(w http.ResponseWriter, v *Visit) error

// ErrAnswered is a guard's word for having answered the request itself.
var ErrAnswered = errors.New("answered")

// Visit is a request before its guards.
type Visit struct {
	Request *http.Request // as it came in, but for headers that are not believed; not to be changed
	URI     URI           // what it is for
	Conn    ConnInfo
	ID      string
	Client  netip.AddrPort // as Request.Client in OnRequest. Unknown is as in ConnInfo, of the request.
	Unknown error

	User string // who it is, for OnRequest. Guards set it.
	// Set are headers that the upstream gets, Drop names headers that it gets only so: whatever the client
	// sent in them, however it wrote them, is dropped.
	Set  http.Header
	Drop []string
	// Answer are headers that the client gets beside those of the answer, whoever makes that. Names are
	// canonical.
	Answer http.Header

	x *exchange
}

// SetHeader gives the upstream a header, in place of the client's.
func (v *Visit) SetHeader(name, value string) {
	if v.Set == nil {
		v.Set = http.Header{}
	}
	v.Set.Set(name, value)
	v.Drop = append(v.Drop, name)
}

// Apply makes a copy of the client's header, without what is hop-by-hop, the header that the upstream would
// get as things stand, but for the host: that is URI.HostPort.
func (v *Visit) Apply(h http.Header) { v.x.setHeaders(h, v.URI.HostPort()) }

// Refusal is a guard's no.
type Refusal struct {
	Status            int
	Title, Text, Hint string // of the page, for people; Hint may be empty
	Header            http.Header
	Err               error // why, for OnRequest
}

func (r *Refusal) Error() string { return r.Err.Error() }
func (r *Refusal) Unwrap() error { return r.Err }

// guard asks g and reports whether the request goes on. If not, it is answered.
func (s *Server) guard(x *exchange, g Guard) bool {
	if g == nil {
		return true
	}
	err := g(x.resp, &x.visit)
	var no *Refusal
	switch {
	case err == nil:
		return true
	case errors.Is(err, ErrAnswered):
	case x.req.Context().Err() != nil:
		x.resp.status, x.err = statusClientLeft, errClientLeft
		panic(http.ErrAbortHandler) // nobody is there to read a page
	case errors.As(err, &no):
		x.err = no.Err
		maps.Copy(x.resp.Header(), no.Header)
		s.page(x, no.Status, fault{title: no.Title, text: no.Text, hint: no.Hint})
	default:
		x.err = err
		s.log.Error("http: a request could not be checked", "host", x.uri.Host, "path", x.uri.Path, "id", x.id, "err", err)
		s.page(x, http.StatusInternalServerError, fault{title: "Something went wrong here",
			text: "Your request came to " + s.opts.Node + ", which could not find out whether it is allowed.", hint: tryAgain})
	}
	return false
}

// setHeaders makes a copy of the client's header that of the request which goes out. It says that the client
// has asked for authority.
func (x *exchange) setHeaders(out http.Header, authority string) {
	setForwarded(x.req, authority, out, x.visit.Conn, MayTell(x.visit.Client.Addr(), x.visit.Unknown), x.id)
	out[PathHeader] = []string{strings.Join(append(x.passed(), x.conn.server.opts.Node), ", ")}
	dropHeader(out, "X-Request-Id")
	out["X-Request-Id"] = []string{x.requestID}
	maps.DeleteFunc(out, func(name string, _ []string) bool { return x.visit.drops(name) })
	maps.Copy(out, x.visit.Set)
}

// drops says whether a header of the client's is not for the upstream.
func (v *Visit) drops(name string) bool {
	return slices.ContainsFunc(v.Drop, func(d string) bool { return sameHeader(name, d) })
}
