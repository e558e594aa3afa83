package auth

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	idleFor  = 30 * time.Second // an unused connection's life
	idleMost = 32
	// drainBytes is how much of an answer that nobody reads is read, so that its
	// connection can be used again.
	drainBytes = 64 << 10
	drainFor   = time.Second
)

// Forward is a server that is asked about each request, as Authelia and oauth2-proxy are. Make it with
// [NewForward]; its methods may be called from any goroutine.
type Forward struct {
	url       *url.URL
	timeout   time.Duration
	transport *http.Transport
	copied    []string
	id        string // in what it asks
}

// ForwardOptions says whom to ask and how. All fields are needed but Dial and Copy.
type ForwardOptions struct {
	URL     *url.URL                                // http or https
	Timeout time.Duration                           // bounds the time until the header of an answer
	Dial    func(context.Context) (net.Conn, error) // connects to the server. Nil dials the URL's host.
	// the headers that [Forward.Copied] takes out of an answer
	Copy []string
}

// NewForward makes a Forward. It connects to nothing yet. [Forward.Close] closes idle connections.
func NewForward(o ForwardOptions) *Forward {
	dial := (&net.Dialer{}).DialContext
	if o.Dial != nil {
		dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return o.Dial(ctx) }
	}
	t := &http.Transport{MaxIdleConns: idleMost, MaxIdleConnsPerHost: idleMost, IdleConnTimeout: idleFor, DisableCompression: true,
		DialContext: whileAsked(dial), DialTLSContext: whileAsked(overTLS(dial)), ForceAttemptHTTP2: true}
	f := &Forward{url: o.URL, timeout: o.Timeout, transport: t, id: rand.Text()}
	for _, name := range o.Copy {
		f.copied = append(f.copied, textproto.CanonicalMIMEHeaderKey(name))
	}
	return f
}

// askedHeader says in a question whose it is, and keeps those of the questions that led to it.
const askedHeader = "X-Tailsplice-Asked"

// IsOwn says whether a request with this header is one of f's own questions, or comes of one: the way to the
// server leads back here, and asking again would never end.
func (f *Forward) IsOwn(header http.Header) bool { return slices.Contains(header[askedHeader], f.id) }

type askKey struct{}

// whileAsked makes dialling end with the Ask that wants the connection. The transport goes on with it else,
// and clients that come and leave again while the server does not answer would use up all files.
func whileAsked(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		asked := ctx.Value(askKey{}).(context.Context)
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(asked, func() { cancel(context.Cause(asked)) })()
		return dial(ctx, network, addr)
	}
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// overTLS is what the transport does by itself, within the dialling.
func overTLS(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		tc := tls.Client(c, &tls.Config{ServerName: host, NextProtos: []string{"h2", "http/1.1"}})
		if err := tc.HandshakeContext(ctx); err != nil {
			c.Close()
			return nil, err
		}
		return tc, nil
	}
}

// Close closes idle connections; those in use go on.
func (f *Forward) Close() { f.transport.CloseIdleConnections() }

// ErrNoAnswer is wrapped by errors of [Forward.Ask] for a server that could not
// be reached or took too long; all others are for one whose answer is not HTTP.
var ErrNoAnswer = errors.New("no answer")

// Ask asks about a request with a GET that has its headers. header is the request's as it would go on, with
// its X-Forwarded-For, -Host and -Proto, and without hop-by-hop headers. Ask adds X-Forwarded-Method and
// -Uri. It leaves out headers about the body, and ranges and conditions, which are about the target's answer:
// a 304 of the auth server must not let a request on.
//
// The caller closes the answer's body. Redirects are answers like any other.
func (f *Forward) Ask(ctx context.Context, method, uri string, header http.Header) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(f.timeout, func() { cancel(errTooSlow) })
	ctx = context.WithValue(ctx, askKey{}, ctx)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	r.Header = header.Clone()
	for name := range r.Header {
		switch fold(name) {
		case "content-length", "content-encoding", "content-type", "expect", "x-forwarded-method", "x-forwarded-uri",
			"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range":
			delete(r.Header, name)
		}
	}
	r.Header.Add(askedHeader, f.id)
	r.Header.Set("X-Forwarded-Method", method)
	r.Header.Set("X-Forwarded-Uri", uri)
	if r.Header["User-Agent"] == nil {
		r.Header["User-Agent"] = nil // none, instead of Go's
	}
	res, err := f.transport.RoundTrip(r)
	timer.Stop()
	if err != nil {
		cause := context.Cause(ctx)
		cancel(nil)
		var op *net.OpError
		var timeout net.Error
		switch {
		case errors.Is(cause, errTooSlow):
			return nil, fmt.Errorf("%w within %s", ErrNoAnswer, f.timeout)
		case errors.As(err, &op), errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, errDial), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		return nil, err
	}
	switch c := res.StatusCode; {
	case c < 200, // no final answer: what follows one has no end, or it can't be passed on
		c == http.StatusNotModified, c == http.StatusPreconditionFailed,
		c == http.StatusRequestedRangeNotSatisfiable:
		// nobody asked for that
		res.Body.Close()
		cancel(nil)
		return nil, fmt.Errorf("it answers %s", res.Status)
	}
	RemoveHopByHop(res.Header)
	res.Body = &answerBody{ReadCloser: res.Body, cancel: func() { cancel(nil) }}
	return res, nil
}

// fold makes one of names that become one variable in CGI and WSGI: X_Forwarded_Uri, X.Forwarded.Uri.
func fold(name string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(name))
}

var (
	errTooSlow = errors.New("too slow")
	errDial    = errors.New("dial")
)

// DialError marks an error of ForwardOptions.Dial, which is then one of no answer.
func DialError(err error) error { return fmt.Errorf("%w: %w", errDial, err) }

// answerBody is drained, within bounds, and ends its request's context.
type answerBody struct {
	io.ReadCloser
	cancel func()
}

func (b *answerBody) Close() error {
	defer time.AfterFunc(drainFor, b.cancel).Stop() // an answer need not end
	io.CopyN(io.Discard, b.ReadCloser, drainBytes)
	err := b.ReadCloser.Close()
	b.cancel()
	return err
}

// Copies lists the headers that the target gets from the server, never from the client.
func (f *Forward) Copies() []string { return f.copied }

// Copied are those of an answer that are to be copied.
func (f *Forward) Copied(answer http.Header) http.Header {
	out := http.Header{}
	for _, name := range f.copied {
		if v := answer[name]; len(v) > 0 {
			out[name] = v
		}
	}
	return out
}

// RemoveHopByHop removes from h what is for one connection only (RFC 9110 7.6.1).
func RemoveHopByHop(h http.Header) {
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			h.Del(textproto.TrimString(name))
		}
	}
	for _, name := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		h.Del(name)
	}
}
