package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"testing"
)

type readiness struct {
	Ready bool `json:"ready"`
}

func (r readiness) String() string { return fmt.Sprintf("ready %t\n", r.Ready) }

func TestHealth(t *testing.T) {
	var stuck error
	var ready readiness
	h := Health{Alive: func(context.Context) error { return stuck }, Ready: func() (bool, fmt.Stringer) { return ready.Ready, ready }}.Handler()
	for _, c := range []struct {
		stuck        error
		ready        bool
		path, accept string
		status       int
		want         string
	}{
		{nil, true, "/healthz", "", 200, "alive\n"},
		{nil, false, "/healthz", "*/*", 200, "alive\n"},
		{errors.New("it hangs"), true, "/healthz", "", 503, "it hangs\n"},
		{errors.New("it hangs"), true, "/healthz?json", "", 503, `{"format_version":1,"alive":false,"problem":"it hangs"}` + "\n"},
		{nil, true, "/readyz", "", 200, "ready true\n"},
		{nil, false, "/readyz", "", 503, "ready false\n"},
		{nil, false, "/readyz", "application/json", 503, `{"ready":false}` + "\n"},
		{nil, true, "/readyz?json", "text/html", 200, `{"ready":true}` + "\n"},
		{nil, true, "/", "", 404, "404 page not found\n"},
	} {
		stuck, ready.Ready = c.stuck, c.ready
		r, w := httptest.NewRequest("GET", c.path, nil), httptest.NewRecorder()
		if c.accept != "" {
			r.Header.Set("Accept", c.accept)
		}
		h.ServeHTTP(w, r)
		if w.Code != c.status || w.Body.String() != c.want {
			t.Errorf("%s, accepting %q: %d %q, want %d %q", c.path, c.accept, w.Code, w.Body, c.status, c.want)
		}
	}
}
