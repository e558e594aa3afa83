package container

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// filter stands between a client and a Docker daemon, as people put one in front of its socket.
type filter struct {
	host string

	mu    sync.Mutex
	rules map[string]*rule // by the first part of the path behind the version, and the second if it is "json"
}

// rule is what becomes of a request.
type rule struct {
	refuse bool          // 403
	hold   chan struct{} // it is passed on, or given up, when that closes
	asked  chan struct{} // gets a value for each request, if there is somebody to take it
}

var apiVersion = regexp.MustCompile(`^/v[0-9.]+`)

// newFilter starts a filter for the daemon at host that refuses the requests named.
func newFilter(t *testing.T, host string, refuse ...string) *filter {
	dir, err := os.MkdirTemp("", "tsflt") // not t.TempDir: the path of a unix socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &filter{host: "unix://" + filepath.Join(dir, "sock"), rules: map[string]*rule{}}
	for _, r := range refuse {
		f.rules[r] = &rule{refuse: true}
	}
	l, err := net.Listen("unix", strings.TrimPrefix(f.host, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	to := &httputil.ReverseProxy{
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "docker" },
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", strings.TrimPrefix(host, "unix://"))
		}},
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		what := strings.Trim(apiVersion.ReplaceAllString(r.URL.Path, ""), "/")
		f.mu.Lock()
		rule := f.rules[what]
		f.mu.Unlock()
		if rule == nil {
			to.ServeHTTP(w, r)
			return
		}
		if rule.refuse {
			http.Error(w, "forbidden by the filter", http.StatusForbidden)
			return
		}
		select {
		case rule.asked <- struct{}{}:
		default:
		}
		select {
		case <-rule.hold:
			to.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return f
}

// hold keeps the requests named unanswered until release is called.
func (f *filter) hold(t *testing.T, what string) (asked <-chan struct{}, release func()) {
	r := &rule{hold: make(chan struct{}), asked: make(chan struct{}, 1)}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules[what] = r
	release = sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.rules, what)
		close(r.hold)
	})
	t.Cleanup(release)
	return r.asked, release
}

// keepUp runs a client of the daemon at host until the test ends.
func keepUp(t *testing.T, host string) (c *Client, labels chan struct{}) {
	c = New(host, slog.New(slog.DiscardHandler))
	labels = make(chan struct{}, 1)
	c.FollowLabels(isTest, func() {
		select {
		case labels <- struct{}{}:
		default:
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return c, labels
}

func isTest(label string) bool { return strings.HasPrefix(label, "test.") }

// await waits for what must come.
func await(t *testing.T, what string, come <-chan struct{}) {
	t.Helper()
	select {
	case <-come:
	case <-time.After(time.Minute):
		t.Fatalf("%s did not come", what)
	}
}

// says reports whether c has a problem that says this; "" is none.
func says(c *Client, want string) error {
	err := c.Problem()
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		return errors.New("the problem is " + errorText(err) + ", want " + want)
	}
	return nil
}

func errorText(err error) string {
	if err == nil {
		return "none"
	}
	return err.Error()
}

// testFilter finds containers behind filters and with daemons that are slow to answer. d has a container called blog.
func testFilter(t *testing.T, d *daemon) {
	at := resolve(t, New(d.host, slog.New(slog.DiscardHandler)), "blog")
	labelled := func(t *testing.T, name string) {
		d.run(name, map[string]string{"test.host": name}, "")
		t.Cleanup(func() { d.remove(name) })
	}
	hasLabels := func(c *Client, name string) bool {
		return slices.ContainsFunc(c.Labelled(), func(l Labelled) bool { return l.Name == name && l.Running })
	}

	for _, hidden := range [][]string{{"info"}, {"info", "events"}, {"events"}} {
		t.Run("without "+strings.Join(hidden, " and "), func(t *testing.T) {
			f := newFilter(t, d.host, hidden...)
			alone := New(f.host, slog.New(slog.DiscardHandler))
			if a := resolve(t, alone, "blog"); !slices.Equal(a, at) {
				t.Errorf("blog is at %s, want %s", a, at)
			}
			if err := alone.Ping(t.Context()); err != nil {
				t.Error(err)
			}
			want := ""
			if hidden[0] == "info" {
				want = "/info"
			}
			if err := says(alone, want); err != nil {
				t.Error(err)
			}
			c, labels := keepUp(t, f.host)
			await(t, "the first list", labels)
			labelled(t, "newcomer")
			for !hasLabels(c, "newcomer") {
				await(t, "a list with the label", labels)
			}
			if a := resolve(t, c, "blog"); !slices.Equal(a, at) {
				t.Errorf("blog is at %s, want %s", a, at)
			}
		})
	}

	t.Run("slow setup", func(t *testing.T) {
		f := newFilter(t, d.host)
		asked, release := f.hold(t, "info")
		c, labels := keepUp(t, f.host)
		await(t, "the first list", labels)
		await(t, "the question for the setup", asked)
		if a := resolve(t, c, "blog"); !slices.Equal(a, at) {
			t.Errorf("blog is at %s, want %s", a, at)
		}
		d.eventually(func() error { return says(c, "takes long to answer /info") })
		release()
		d.eventually(func() error { return says(c, "") })
	})

	for _, events := range []bool{true, false} {
		name := "the list hangs"
		if !events {
			name += " without events"
		}
		t.Run(name, func(t *testing.T) {
			f := newFilter(t, d.host)
			if !events {
				f.rules["events"] = &rule{refuse: true}
			}
			c, labels := keepUp(t, f.host)
			await(t, "the first list", labels)
			asked, release := f.hold(t, "containers/json")
			labelled(t, "newcomer")
			await(t, "the question for a list", asked)
			// Until a request was waited for in vain nobody knows that it hangs.
			if a, err := c.Resolve(t.Context(), "blog"); err != nil || !slices.Equal(a, at) {
				t.Fatalf("blog is at %s, %v; want %s", a, err, at)
			}
			c.mu.Lock()
			c.good = c.good.Add(-time.Hour) // as if it had hung for as long
			c.mu.Unlock()
			// Each of these would take as long as is waited for an answer.
			began := time.Now()
			for range 20 {
				if a, err := c.Resolve(t.Context(), "blog"); err != nil || !slices.Equal(a, at) {
					t.Fatalf("blog is at %s, %v; want %s", a, err, at)
				}
				if a, err := c.Refresh(t.Context(), "blog"); err != nil || !slices.Equal(a, at) {
					t.Fatalf("blog is at %s, %v; want %s", a, err, at)
				}
			}
			if took := time.Since(began); took > 10*askTimeout {
				t.Errorf("40 answers took %s", took)
			}
			if err := says(c, "the list of "); err != nil {
				t.Error(err)
			}
			release()
			for !hasLabels(c, "newcomer") {
				await(t, "a list with the label", labels)
			}
			d.eventually(func() error { return says(c, "") })
		})
	}
}
