package tailnet

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"tailscale.com/ipn"
)

// localAPI runs a stand-in for tailscaled that answers with these values by path, and returns its socket.
func localAPI(t *testing.T, answers map[string]any) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, ok := answers[strings.TrimPrefix(r.URL.Path, "/localapi/v0/")]
		if !ok {
			http.Error(w, "denied", http.StatusForbidden)
			return
		}
		json.NewEncoder(w).Encode(v)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return path
}

// TestInbound: what takes the connections of a tailnet listener is told, for that listener's port.
func TestInbound(t *testing.T) {
	web := func(ports ...uint16) map[uint16]*ipn.TCPPortHandler {
		out := map[uint16]*ipn.TCPPortHandler{}
		for _, p := range ports {
			out[p] = &ipn.TCPPortHandler{HTTPS: true}
		}
		return out
	}
	for _, c := range []struct {
		name  string
		prefs ipn.Prefs
		serve *ipn.ServeConfig
		want  map[uint16]string // how the problem of a port begins
	}{
		{"nothing", ipn.Prefs{}, nil, map[uint16]string{443: ""}},
		{"serve", ipn.Prefs{}, &ipn.ServeConfig{TCP: web(443)}, map[uint16]string{443: "`tailscale serve` has port 443", 8443: ""}},
		{"serve of TCP", ipn.Prefs{}, &ipn.ServeConfig{TCP: map[uint16]*ipn.TCPPortHandler{22: {TCPForward: "localhost:22"}}}, map[uint16]string{22: "`tailscale serve` has port 22", 443: ""}},
		{"funnel", ipn.Prefs{}, &ipn.ServeConfig{TCP: web(443, 8443), AllowFunnel: map[ipn.HostPort]bool{"home.tail1234.ts.net:443": true, "home.tail1234.ts.net:8443": false}},
			map[uint16]string{443: "`tailscale funnel` has port 443", 8443: "`tailscale serve` has port 8443"}},
		{"in a terminal", ipn.Prefs{}, &ipn.ServeConfig{Foreground: map[string]*ipn.ServeConfig{"a": {TCP: web(443), AllowFunnel: map[ipn.HostPort]bool{"home.tail1234.ts.net:443": true}}, "b": nil}},
			map[uint16]string{443: "`tailscale funnel` has port 443"}},
		{"shields up", ipn.Prefs{ShieldsUp: true}, &ipn.ServeConfig{}, map[uint16]string{443: "shields are up", 80: "shields are up"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in, err := New(localAPI(t, map[string]any{"prefs": c.prefs, "serve-config": c.serve}), quiet).Inbound(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for port, want := range c.want {
				if got := in.Problem(port); !strings.HasPrefix(got, want) || want == "" && got != "" {
					t.Errorf("port %d: %q, want %q", port, got, want)
				}
			}
		})
	}
	_, err := New(localAPI(t, nil), quiet).Inbound(t.Context())
	wantAbsent(t, err, "refuses user", "--operator=USER")
}
