package vhost

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
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
	User    string // who it is, for OnRequest. Guards set it.
	// Set are headers for the upstream, Drop names those of the client's, in any spelling, that go.
	Set    http.Header
	Drop   []string
	Answer http.Header // headers that the client gets in any answer, whoever makes it. Names are canonical.
	x      *exchange
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

// setHeaders makes of a copy of the client's header that of the request to the upstream, asked for authority.
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

var (
	errNoClientCertificate = errors.New("the client showed no certificate")
	errOtherName           = errors.New("the connection was made for another name, for which no client certificate is asked")
)

// checkClient says whether a client may use a route that wants a certificate of it. The handshake only asked
// for one, so it is judged here: each route has its own authorities. askedFor is the host of the request.
func checkClient(state *tls.ConnectionState, cas *x509.CertPool, askedFor string) error {
	switch {
	case state == nil:
		return errNoClientCertificate
	case len(state.PeerCertificates) == 0 && routeHost(state.ServerName) != askedFor:
		return errOtherName
	case len(state.PeerCertificates) == 0:
		return errNoClientCertificate
	}
	intermediates := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: cas, Intermediates: intermediates,
		CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err
}

// clientRefused answers a client without a certificate that counts: 421 if a browser reused a connection for
// one more name of the certificate, as with a fresh one it will be asked.
func (s *Server) clientRefused(x *exchange, err error) {
	x.err = err
	if errors.Is(err, errOtherName) {
		s.page(x, http.StatusMisdirectedRequest, fault{title: "This needs a connection of its own",
			text: x.uri.Host + " asks for a client certificate, and the request came on a connection that was made for another name.", hint: "Reload the page."})
		return
	}
	s.page(x, http.StatusForbidden, fault{title: "A client certificate is needed", text: x.uri.Host + " lets in only visitors with a certificate of its own authority: " + whyRefused(err) + ".",
		hint: "If you have one, install it in the browser, and open a new window."})
}

// whyRefused is what a stranger may hear of err, which may name the authority.
func whyRefused(err error) string {
	var invalid x509.CertificateInvalidError
	switch {
	case errors.Is(err, errNoClientCertificate):
		return err.Error()
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the client's certificate has expired, or is not valid yet"
	}
	return "the client's certificate is not one of those"
}
