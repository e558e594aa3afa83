package server

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLookHere: with tailscaled and dockerd up, what they know is fine, and what they don't know is said with its place.
// So is what is wrong with files.
func TestLookHere(t *testing.T) {
	ts := startTailscaled(t)
	ts.lists = true
	dir := t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(dir, "docker"))
	if err != nil {
		t.Fatal(err)
	}
	docker := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/_ping":
		case strings.HasSuffix(r.URL.Path, "/containers/json"):
			fmt.Fprintf(w, `[{"Id":%q,"Names":["/blog"],"State":"running","Status":"Up 1 minute",
				"NetworkSettings":{"Networks":{"bridge":{"IPAddress":"127.0.0.1"}}}}]`, strings.Repeat("1", 64))
		case strings.HasSuffix(r.URL.Path, "/events"):
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			io.WriteString(w, "{}")
		}
	})}
	go docker.Serve(ln)
	t.Cleanup(func() { docker.Close() })
	t.Setenv("DOCKER_HOST", "unix://"+ln.Addr().String())

	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	other, _ := certificate(t, "b.test")
	_, otherKey := writePair(t, other)
	for name, text := range map[string]string{"deny.txt": "192.0.2.1\n", "none.txt": "# none\n", "bad.txt": "192.0.2.1\n\n x\n", "empty.txt": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	https := func(cert, key string) string {
		return fmt.Sprintf("mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: \"127.0.0.1:1\" }", cert, key)
	}
	denied := func(file string) string {
		return fmt.Sprintf("mode: tcp, deny: [ { file: %q } ], default: { forward: \"127.0.0.1:1\" }", filepath.Join(dir, file))
	}
	for _, c := range []struct{ listener, want string }{ // want: the only line, from its place on; "" is none
		{`mode: tcp, default: { forward: "tailnet://home:80" }`, ""},
		{`mode: tcp, default: { forward: "tailnet://nowhere:80" }`, `node nowhere: `},
		{`mode: tcp, allow: [phone, "tag:nobody"], default: { forward: "127.0.0.1:1" }`, ""},
		{`mode: tcp, allow: [phone, nobody], default: { forward: "127.0.0.1:1" }`, `node nobody: `},
		{`mode: tcp, default: { forward: "docker://blog:80" }`, ""},
		{`mode: tcp, default: { forward: "docker://shop:80" }`, `container shop: `},
		{https(certFile, keyFile), ""},
		{https(certFile, otherKey), "file " + certFile + ": "},
		{https(certFile, keyFile+".none"), "file " + certFile + ": "},
		{denied("deny.txt"), ""},
		{denied("none.txt"), ""},
		{denied("no.txt"), "file " + filepath.Join(dir, "no.txt") + ": no such file"},
		{denied("bad.txt"), "file " + filepath.Join(dir, "bad.txt") + ": " + filepath.Join(dir, "bad.txt") + `:3:2: "x": `},
		{denied("empty.txt"), `write "# none" into it`},
	} {
		cfg := parse(t, fmt.Sprintf("listeners:\n  - { listen: [%q], %s }", freeAddr(t), c.listener))
		found := LookHere(t.Context(), cfg, nil)
		switch {
		case c.want == "" && len(found) == 0:
		case c.want == "" || len(found) != 1 || !strings.HasPrefix(found[0].Error(), "test.yaml:2:") || !strings.Contains(found[0].Error(), c.want):
			t.Errorf("%s: found %q, want %q", c.listener, found, c.want)
		}
	}
}
