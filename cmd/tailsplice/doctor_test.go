package main

import (
	"io"
	"net"
	"net/http"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/loader"
)

// answering listens on a unix socket and answers requests by the last part of their path.
func answering(t *testing.T, answers map[string]string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a, ok := answers[path.Base(r.URL.Path)]; ok {
			io.WriteString(w, a)
		} else {
			http.Error(w, "no", http.StatusForbidden)
		}
	})}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return socket
}

// TestFindInbound: doctor says what tailscaled's settings keep from the tailnet listeners that there are.
func TestFindInbound(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	daemon := answering(t, map[string]string{"status": `{"listeners":[{"name":"web","mode":"tcp","listen":["tailnet:443",":80"],"bound":[],"routes":[]}]}`})
	for _, c := range []struct {
		name, prefs, serve, control string
		state                       loader.State
		says                        string // "" is nothing
	}{
		{"nothing", `{}`, `{}`, daemon, loader.StateOK, ""},
		{"serve", `{}`, `{"TCP":{"443":{"HTTPS":true}}}`, daemon, loader.StateDegraded, "a tailnet listener gets no connections: `tailscale serve` has port 443"},
		{"funnel", `{}`, `{"TCP":{"443":{"HTTPS":true}},"AllowFunnel":{"home.tail1234.ts.net:443":true}}`, daemon, loader.StateDegraded, "`tailscale funnel` has port 443"},
		{"serve on another port", `{}`, `{"TCP":{"8443":{"HTTPS":true}}}`, daemon, loader.StateOK, ""},
		{"shields up", `{"ShieldsUp":true}`, `{}`, daemon, loader.StateDegraded, "shields are up"},
		{"serve, no daemon", `{}`, `{"TCP":{"8443":{"HTTPS":true}}}`, none, loader.StateOK, "no connection would come to some tailnet listeners: `tailscale serve` has port 8443"},
		{"shields up, no daemon", `{"ShieldsUp":true}`, `{}`, none, loader.StateOK, "shields are up"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("TAILSPLICE_TAILSCALED_SOCKET", answering(t, map[string]string{"prefs": c.prefs, "serve-config": c.serve}))
			f := loader.Finding{State: loader.StateOK}
			findInbound(t.Context(), c.control, &f)
			if f.State != c.state || !strings.Contains(f.Detail, c.says) || c.says == "" && f.Detail != "" {
				t.Errorf("%s: %q, want %s: %q", f.State, f.Detail, c.state, c.says)
			}
		})
	}
}
