package vhost

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"time"
)

var (
	errNoClientCertificate = errors.New("the client showed no certificate")
	errOtherName           = errors.New("the connection was made for another name, for which no client certificate is asked")
)

// checkClient says whether a client may use a route that wants a certificate of it. The handshake only asked
// for one, so it is judged here: each route has its own authorities. askedFor is the host of the request.
func checkClient(state *tls.ConnectionState, cas *x509.CertPool, askedFor string) error {
	if state == nil {
		return errNoClientCertificate
	}
	if len(state.PeerCertificates) == 0 {
		if routeHost(state.ServerName) != askedFor {
			return errOtherName
		}
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
