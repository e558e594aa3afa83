package auth

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
)

func asking(t *testing.T, h http.HandlerFunc, change ...func(*ForwardOptions)) *Forward {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	u, _ := url.Parse(s.URL + "/verify?rd=x")
	o := ForwardOptions{URL: u, Timeout: time.Minute, Copy: []string{"remote-user"}}
	for _, f := range change {
		f(&o)
	}
	f := NewForward(o)
	t.Cleanup(f.Close)
	return f
}

func TestAsk(t *testing.T) {
	var got *http.Request
	f := asking(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Clone(context.Background())
		w.Header().Set("Remote-User", "me")
		w.Header().Set("Other", "x")
		w.Header().Set("Connection", "Hop")
		w.Header().Set("Hop", "y")
		w.Header().Set("Location", "/login")
		w.WriteHeader(302)
		io.WriteString(w, "go there")
	})
	res, err := f.Ask(t.Context(), "POST", "/a%2Fb?c=d", http.Header{"Cookie": {"s=1"}, "Authorization": {"Bearer x"}, "Content-Length": {"5"}, "Expect": {"100-continue"},
		"If-None-Match": {"*"}, "If_Modified_Since": {"x"}, "Range": {"bytes=0-1"},
		"X_forwarded_uri": {"/forged"}, "X-Forwarded-Method": {"forged"}, "X-Forwarded-For": {"192.0.2.7"}})
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if res.StatusCode != 302 || string(body) != "go there" || res.Header.Get("Location") != "/login" || res.Header.Get("Hop") != "" {
		t.Errorf("%d %q %v", res.StatusCode, body, res.Header)
	}
	if c := f.Copied(res.Header); len(c) != 1 || c.Get("Remote-User") != "me" {
		t.Errorf("copied: %v", c)
	}
	if got.Method != "GET" || got.URL.String() != "/verify?rd=x" || got.ContentLength != 0 {
		t.Errorf("%s %s, %d bytes", got.Method, got.URL, got.ContentLength)
	}
	for name, want := range map[string]string{"X-Forwarded-Method": "POST", "X-Forwarded-Uri": "/a%2Fb?c=d", "X-Forwarded-For": "192.0.2.7", "Cookie": "s=1",
		"Authorization": "Bearer x", "X_forwarded_uri": "", "Expect": "", "If-None-Match": "", "If_Modified_Since": "", "Range": "", "User-Agent": "", "Accept-Encoding": ""} {
		if v := got.Header.Get(name); v != want {
			t.Errorf("%s is %q, want %q", name, v, want)
		}
	}
}

func TestNoAnswer(t *testing.T) {
	nonsense, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer nonsense.Close()
	go func() {
		for {
			c, err := nonsense.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "SSH-2.0-x\r\n\r\n")
			c.Close()
		}
	}()
	stop := make(chan struct{})
	defer close(stop)
	hang := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/upgrade" {
			w.WriteHeader(http.StatusSwitchingProtocols)
			return
		}
		select {
		case <-stop:
		case <-r.Context().Done():
		}
	}
	at := func(addr string) func(*ForwardOptions) {
		return func(o *ForwardOptions) { o.URL.Host = addr }
	}
	for _, c := range []struct {
		name     string
		change   func(*ForwardOptions)
		noAnswer bool
	}{
		{"nobody listens", at(freeaddr.Get(t)), true},
		{"too slow", func(o *ForwardOptions) { o.Timeout = 50 * time.Millisecond }, true},
		{"its dialer fails", func(o *ForwardOptions) {
			o.Dial = func(context.Context) (net.Conn, error) { return nil, DialError(errors.New("asleep")) }
		}, true},
		{"not HTTP", at(nonsense.Addr().String()), false},
		{"another protocol", func(o *ForwardOptions) { o.URL.Path = "/upgrade" }, false},
	} {
		_, err := asking(t, hang, c.change).Ask(t.Context(), "GET", "/", http.Header{})
		if err == nil || errors.Is(err, ErrNoAnswer) != c.noAnswer {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := asking(t, hang).Ask(ctx, "GET", "/", http.Header{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a client that left: %v", err)
	}
}

// TestEndlessBody closes an answer that does not end.
func TestEndlessBody(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	f := asking(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		select {
		case <-stop:
		case <-r.Context().Done():
		}
	})
	res, err := f.Ask(t.Context(), "GET", "/", http.Header{})
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close() // a test that hangs fails
}

// TestDialEnds leaves while the server is dialled, or does not answer in TLS: no
// connection stays behind.
func TestDialEnds(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	begun, ended := make(chan struct{}), make(chan struct{})
	hang := func(ctx context.Context) (net.Conn, error) {
		close(begun)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}
	accepted := func(context.Context) (net.Conn, error) {
		c, err := net.Dial("tcp", silent.Addr().String())
		close(begun)
		return &closing{Conn: c, closed: ended}, err
	}
	for scheme, dial := range map[string]func(context.Context) (net.Conn, error){"http": hang, "https": accepted} {
		begun, ended = make(chan struct{}), make(chan struct{})
		f := asking(t, func(http.ResponseWriter, *http.Request) {}, func(o *ForwardOptions) { o.URL.Scheme, o.Dial = scheme, dial })
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-begun
			cancel()
		}()
		if _, err := f.Ask(ctx, "GET", "/", http.Header{}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", scheme, err)
		}
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Errorf("%s: dialling goes on after the client has left", scheme)
		}
	}
}

// closing tells when it is closed.
type closing struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *closing) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// TestNotBelieved asks a server whose certificate is not believed.
func TestNotBelieved(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	u, _ := url.Parse(s.URL)
	f := NewForward(ForwardOptions{URL: u, Timeout: time.Minute})
	defer f.Close()
	if _, err := f.Ask(t.Context(), "GET", "/", http.Header{}); err == nil || errors.Is(err, ErrNoAnswer) {
		t.Errorf("a certificate of nobody: %v", err)
	}
}
