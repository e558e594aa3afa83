package server

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestReloadOverlappingAddresses: an address may give way to one that overlaps
// it, though the kernel does not let both be bound, and stays when the reload
// fails.
func TestReloadOverlappingAddresses(t *testing.T) {
	_, port, _ := net.SplitHostPort(freeAddr(t))
	one, two := backend(t, speak("1")), backend(t, speak("2"))
	yaml := func(to string, addrs ...string) string {
		for i, a := range addrs {
			addrs[i] = fmt.Sprintf("%q", a+":"+port)
		}
		return fmt.Sprintf(`listeners: [ { name: web, listen: [%s], mode: tcp, default: { forward: %q } } ]`, strings.Join(addrs, ", "), to)
	}
	d := start(t, yaml(one, ""))
	answer := func() string {
		c, err := net.DialTimeout("tcp", "127.0.0.1:"+port, patience)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		b := make([]byte, 1)
		io.ReadFull(c, b)
		return string(b)
	}
	for _, step := range []struct{ yaml, want string }{
		{yaml(two, "127.0.0.1"), "2"},
		{yaml(one, ""), "1"},
		{yaml(two, "0.0.0.0"), "2"},
		{yaml(one, "127.0.0.1", "127.0.0.2"), "1"},
		{yaml(two, "0.0.0.0", "[::]"), "2"},
	} {
		if err := d.Reload(parse(t, step.yaml)); err != nil {
			t.Fatalf("%s: %v", step.yaml, err)
		}
		if got := answer(); got != step.want {
			t.Fatalf("%s: got %q, want %q", step.yaml, got, step.want)
		}
	}
	// 192.0.2.0/24 is nobody's: the whole reload fails, after 127.0.0.1 was bound.
	if err := d.Reload(parse(t, yaml(one, "127.0.0.1", "192.0.2.1"))); err == nil {
		t.Fatal("an address that nobody has was bound")
	}
	if got := answer(); got != "2" {
		t.Errorf("after a reload that failed: %q, want %q", got, "2")
	}
	// Sharing a port for a moment must not let a second daemon in.
	for _, host := range []string{"127.0.0.1", "", "[::1]"} {
		if f, err := New(parse(t, yaml(one, host)), discard()); err == nil {
			f.Close()
			t.Errorf("a second daemon took %q on the same port", host)
		}
	}
}

// speak says word to each connection, and waits for its end.
func speak(word string) func(net.Conn) {
	return func(c net.Conn) {
		io.WriteString(c, word)
		io.Copy(io.Discard, c)
		c.Close()
	}
}

// TestTailscaledInTheWay: what tailscaled's own settings keep from a tailnet listener is in the log of the start, and
// of a reload that adds one.
func TestTailscaledInTheWay(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	answers := map[string]string{"prefs": `{"ShieldsUp":true}`, "serve-config": `{"TCP":{"443":{"HTTPS":true}}}`}
	tailscaled := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a, ok := answers[path.Base(r.URL.Path)]; ok {
			io.WriteString(w, a)
		} else {
			http.Error(w, "no", http.StatusForbidden)
		}
	})}
	go tailscaled.Serve(ln)
	defer tailscaled.Close()
	t.Setenv("TAILSPLICE_TAILSCALED_SOCKET", socket)
	d := start(t, `listeners: [{ listen: ["tailnet:443"], mode: tcp, default: { forward: "127.0.0.1:1" } }]`)
	says := func(want ...string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			log := d.log.String()
			if !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(log, w) }) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the log does not say all of %q:\n%s", want, log)
			}
		}
	}
	says("a tailnet listener gets no connections", "listen=tailnet:443", "`tailscale serve` has port 443")
	if err := d.Reload(parse(t, `listeners: [{ listen: ["tailnet:444"], mode: tcp, default: { forward: "127.0.0.1:1" } }]`)); err != nil {
		t.Fatal(err)
	}
	says("listen=tailnet:444", "shields are up")
}
