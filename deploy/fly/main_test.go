package main

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestIDToken: the machine's API is asked by its socket for a token for the audience, and what it refuses is said.
func TestIDToken(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api")
	t.Setenv("FLY_API_SOCKET", socket)
	if _, err := idToken(t.Context(), "x"); err == nil {
		t.Error("a token without an API")
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	api := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var asked struct{ Aud string }
		err := json.NewDecoder(r.Body).Decode(&asked)
		if err != nil || r.Method != "POST" || r.URL.Path != "/v1/tokens/oidc" || asked.Aud == "unknown" {
			http.Error(w, "no such audience", http.StatusBadRequest)
			return
		}
		w.Write([]byte("token for " + asked.Aud + "\n"))
	})}
	go api.Serve(ln)
	defer api.Close()
	if token, err := idToken(t.Context(), `api.tailscale.com/"1"`); err != nil || token != `token for api.tailscale.com/"1"` {
		t.Errorf("%q, %v", token, err)
	}
	if _, err := idToken(t.Context(), "unknown"); err == nil || !strings.Contains(err.Error(), "no such audience") {
		t.Errorf("a refusal is %v", err)
	}
}

func TestKillTimeout(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"":                                  5 * time.Second,
		"app = \"x\"\n# kill_timeout = 9\n": 5 * time.Second,
		"kill_timeout = 300\n":              300 * time.Second,
		"kill_signal='SIGTERM'\nkill_timeout='5'": 5 * time.Second,
		"kill_timeout = \"2m\"\n":                 2 * time.Minute,
		"x = 1\n  kill_timeout = \"120s\" # wait": 2 * time.Minute,
	} {
		if had := killTimeout(text); had != want {
			t.Errorf("%q: %v, want %v", text, had, want)
		}
	}
}
