package vhost

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestGuard checks the answers of guards, and that a trailer is no way around
// what they drop.
func TestGuard(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		up := upstream(t, func(w http.ResponseWriter, r *http.Request) {
			http.MaxBytesReader(w, r.Body, 10).Read(make([]byte, 10))
			for r.Body != http.NoBody {
				if _, err := r.Body.Read(make([]byte, 10)); err != nil {
					break
				}
			}
			w.Header().Set("Got", strings.Join(slices.Concat(r.Header["Remote-User"], r.Header["Remote_user"], r.Trailer["Remote-User"]), ","))
		})
		guard := func(w http.ResponseWriter, v *Visit) error {
			switch v.Request.URL.Path {
			case "/no":
				return &Refusal{Status: 401, Title: "No", Text: "Not you.", Header: http.Header{"Www-Authenticate": {"Basic"}}, Err: errors.New("because")}
			case "/own":
				w.WriteHeader(http.StatusTeapot)
				return ErrAnswered
			case "/broken":
				return errors.New("oh")
			}
			v.User = "me"
			v.SetHeader("Remote-User", "me")
			return nil
		}
		route := &Route{Guard: guard, Upstreams: []Choice{{Upstream: up, Weight: 1}}}
		h := p.hop(t, up, func(c *config) {
			c.Route = func(*http.Request, string, string) (*Route, error) { return route, nil }
		})
		c := p.client(t, h)
		for i, q := range []struct {
			path   string
			status int
			err    string
		}{{"/no", 401, "because"}, {"/own", 418, ""}, {"/broken", 500, "oh"}, {"/", 200, ""}} {
			res, body := get(t, c, p.url(q.path), func(r *http.Request) {
				r.Header.Set("Remote-User", "root")
				r.Header["remote_user"] = []string{"root"}
			})
			report := h.request(t, i+1)
			if res.StatusCode != q.status || report.Status != q.status || q.err == "" && report.Err != nil || q.err != "" && (report.Err == nil || report.Err.Error() != q.err) {
				t.Errorf("%s: %d, reported %d, %v", q.path, res.StatusCode, report.Status, report.Err)
			}
			if q.path == "/no" && (!strings.Contains(body, "Not you.") || res.Header.Get("WWW-Authenticate") != "Basic") {
				t.Errorf("%v %s", res.Header, body)
			}
			if q.path == "/" && (res.Header.Get("Got") != "me" || report.User != "me" || report.URI != "/" || !validID(report.RequestID)) {
				t.Errorf("the upstream got %q; %+v", res.Header.Get("Got"), report)
			}
		}
		req, _ := http.NewRequest("POST", p.url("/"), struct{ *strings.Reader }{strings.NewReader("x")})
		req.ContentLength = -1
		req.Trailer = http.Header{"Remote-User": {"root"}}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got := res.Header.Get("Got"); got != "me" {
			t.Errorf("by a trailer the upstream got %q", got)
		}
	})
}

func TestLastSeen(t *testing.T) {
	up := wayTo("127.0.0.1:1")
	up.Name = "laptop"
	up.Dial = failing(FailAbsent(time.Now().Add(-5*time.Minute-time.Second), errors.New("no answer")))
	h := newHop(t, up)
	res, body := get(t, protocols[0].client(t, h), protocols[0].url("/"), func(r *http.Request) { r.Header.Set("Accept", "application/json") })
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "last seen 5 minutes ago.") {
		t.Errorf("%d %v %s", res.StatusCode, res.Header, body)
	}
	for d, want := range map[time.Duration]string{0: "just now", time.Second: "1 second ago", 59 * time.Second: "59 seconds ago", 90 * time.Minute: "1 hour ago", 72 * time.Hour: "3 days ago"} {
		if got := ago(d); got != want {
			t.Errorf("%s: %q", d, got)
		}
	}
}

func failing(err error) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) { return nil, err }
}
