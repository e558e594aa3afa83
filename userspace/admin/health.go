package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// aliveWait bounds how long /healthz waits: most clients give up after a second or a few.
const aliveWait = 2 * time.Second

// Health is what machines ask to know whether to send connections here, or to start the daemon anew.
type Health struct {
	// Alive is an error where the process runs, and what moves connections does not go on.
	Alive func(ctx context.Context) error
	// Ready says whether connections are taken. answer is what encoding/json can write, and its String is for
	// people.
	Ready func() (ready bool, answer fmt.Stringer)
}

// Handler serves h: GET /healthz and GET /readyz, with status 200 or 503. Answers are text, or JSON where the
// request has ?json or asks for application/json.
func (h Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), aliveWait)
		defer cancel()
		err := h.Alive(ctx)
		a := Liveness{Format: formatVersion, Alive: err == nil}
		if err != nil {
			a.Problem = err.Error()
		}
		answer(w, r, a.Alive, a)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ready, a := h.Ready()
		answer(w, r, ready, a)
	})
	return mux
}

// formatVersion is raised as flow.FormatVersion is, whose value it has.
const formatVersion = 1

// Liveness is the answer of /healthz.
type Liveness struct {
	Format  int    `json:"format_version"`
	Alive   bool   `json:"alive"`
	Problem string `json:"problem,omitempty"`
}

// String is the answer for people.
func (a Liveness) String() string {
	if a.Alive {
		return "alive\n"
	}
	return a.Problem + "\n"
}

func answer(w http.ResponseWriter, r *http.Request, ok bool, a fmt.Stringer) {
	asJSON := r.URL.Query().Has("json") || strings.Contains(r.Header.Get("Accept"), "application/json")
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if asJSON {
		w.Header().Set("Content-Type", "application/json")
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff") // names in it are others'
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	if asJSON {
		json.NewEncoder(w).Encode(a)
		return
	}
	fmt.Fprint(w, a)
}
