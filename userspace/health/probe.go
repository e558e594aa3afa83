package health

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// answerBytes bounds the header of an answer. Nothing more of it is read.
const answerBytes = 64 << 10

// userAgent is how a request of a check says what it is.
const userAgent = "tailsplice-health"

// Probe returns what checks a target once, as spec says. dial connects to it, and takes no longer than its
// context. roots, if not nil, are the authorities in spec.CA.
func Probe(spec Spec, dial func(context.Context) (net.Conn, error), roots func() *x509.CertPool) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := dial(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		// Whatever waits for the target waits no longer than ctx.
		defer context.AfterFunc(ctx, func() { c.Close() })()
		if spec.Kind == Connect {
			return nil
		}
		err = spec.speak(ctx, c, roots)
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("%s: no answer within %s", spec.what(), spec.Timeout)
		}
		return err
	}
}

// what is what a check does, for people.
func (s *Spec) what() string {
	if s.Kind == TLS {
		return "TLS handshake"
	}
	return "GET " + s.Path
}

// speak does what follows the connect.
func (s *Spec) speak(ctx context.Context, c net.Conn, roots func() *x509.CertPool) error {
	if s.Preface != "" {
		if _, err := io.WriteString(c, s.Preface); err != nil {
			return fmt.Errorf("send the PROXY header: %w", err)
		}
	}
	handshake := func(protocols ...string) (*tls.Conn, error) {
		config := &tls.Config{ServerName: s.ServerName, InsecureSkipVerify: !s.Verify, NextProtos: protocols}
		if roots != nil {
			config.RootCAs = roots()
		}
		tc := tls.Client(c, config)
		if err := tc.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		return tc, nil
	}
	if s.Kind == TLS {
		_, err := handshake()
		return err
	}
	return s.get(ctx, c, handshake)
}

// get makes the request.
func (s *Spec) get(ctx context.Context, c net.Conn, handshake func(...string) (*tls.Conn, error)) error {
	u := &url.URL{Scheme: "http", Host: s.Host, Path: s.Path}
	r := &http.Request{Method: http.MethodGet, URL: u, Host: s.Host, Header: http.Header{"User-Agent": {userAgent}}, Close: true}
	isHTTP2 := s.H2C
	if s.TLS {
		tc, err := handshake("h2", "http/1.1")
		if err != nil {
			return err
		}
		u.Scheme, c, isHTTP2 = "https", tc, tc.ConnectionState().NegotiatedProtocol == "h2"
	}
	ask := ask1
	if isHTTP2 {
		ask = ask2
	}
	code, err := ask(c, r.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("%s: %w", s.what(), err)
	}
	if !expects(s.Expect, code) {
		return &StatusError{What: s.what(), Got: code, Want: s.Expect}
	}
	return nil
}

// ask1 makes a request by HTTP/1.1, and returns the status of its answer. net/http's transport would log what
// a target says unasked.
func ask1(c net.Conn, r *http.Request) (code int, err error) {
	if err := r.Write(c); err != nil {
		return 0, err
	}
	limited := &io.LimitedReader{R: c, N: answerBytes}
	answer := bufio.NewReader(limited)
	for {
		res, err := http.ReadResponse(answer, r)
		switch {
		case err != nil && limited.N <= 0:
			return 0, fmt.Errorf("the header of the answer exceeds %d bytes", answerBytes)
		case err != nil:
			return 0, err
		case res.StatusCode/100 != 1 || res.StatusCode == http.StatusSwitchingProtocols:
			return res.StatusCode, nil
		}
	}
}

// ask2 is ask1 by HTTP/2.
func ask2(c net.Conn, r *http.Request) (code int, err error) {
	var speaks http.Protocols
	speaks.SetHTTP2(true)
	speaks.SetUnencryptedHTTP2(true)
	connected := func(context.Context, string, string) (net.Conn, error) { return c, nil }
	t := &http.Transport{DialContext: connected, DialTLSContext: connected, Protocols: &speaks, DisableCompression: true,
		MaxResponseHeaderBytes: answerBytes}
	defer t.CloseIdleConnections()
	res, err := t.RoundTrip(r)
	if err != nil {
		return 0, err
	}
	res.Body.Close()
	return res.StatusCode, nil
}

// StatusError is that a target answers, and not as it should.
type StatusError struct {
	What string
	Got  int
	Want string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: the answer is %d, and expect is %s", e.What, e.Got, strings.Join(strings.Fields(e.Want), " or "))
}

// expects reports whether a status code is one of want, such as "2xx 304".
func expects(want string, code int) bool {
	got := strconv.Itoa(code)
	for w := range strings.FieldsSeq(want) {
		if w == got || strings.HasSuffix(w, "xx") && w[0] == got[0] {
			return true
		}
	}
	return false
}
