package server

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAccessLogReload(t *testing.T) {
	addr, app := freeAddr(t), headers(t)
	dir := t.TempDir()
	yaml := func(file string) string {
		return fmt.Sprintf(`
listeners: [{ listen: %q, mode: http, access_log: { file: %q }, default: { forward: %q } }]`, addr, filepath.Join(dir, file), app)
	}
	d := start(t, yaml("a.log"))
	get := func() { ask(t, addr, "GET", "a.test", "/x?y=z", nil, "User-Agent: \xc3\xa9") }
	has := func(file string, n int) func() bool {
		return func() bool {
			b, _ := os.ReadFile(filepath.Join(dir, file))
			return strings.Count(string(b), "\n") == n
		}
	}
	get()
	eventually(t, "a line", has("a.log", 1))
	b, _ := os.ReadFile(filepath.Join(dir, "a.log"))
	var line map[string]any
	if err := json.Unmarshal(b, &line); err != nil || line["uri"] != "/x?y=z" || line["client"] != "127.0.0.1" || line["status"] != 200.0 || line["target"] != app || line["request_id"] == nil {
		t.Errorf("%v: %s", err, b)
	}
	if err := d.Reload(parse(t, yaml("no/b.log"))); err == nil || !strings.Contains(err.Error(), "access_log") || !strings.Contains(err.Error(), "test.yaml:2:") {
		t.Errorf("a folder that is not there: %v", err)
	}
	get()
	eventually(t, "a line after the failed reload", has("a.log", 2))
	if err := d.Reload(parse(t, yaml("b.log"))); err != nil {
		t.Fatal(err)
	}
	get()
	eventually(t, "a line in the new file", has("b.log", 1))
	os.Rename(filepath.Join(dir, "b.log"), filepath.Join(dir, "b.log.1"))
	d.ReopenLogs()
	eventually(t, "the new file", has("b.log", 0))
	get()
	eventually(t, "a line in it", has("b.log", 1))
}

// TestOneLine: a request has one line, and not one in each of two logs.
func TestOneLine(t *testing.T) {
	addr, bare, app := freeAddr(t), freeAddr(t), headers(t)
	file := filepath.Join(t.TempDir(), "a.log")
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: with, listen: %q, mode: http, access_log: { file: %q }, default: { forward: %q } }
  - { name: without, listen: %q, mode: http, default: { forward: %q } }`, addr, file, app, bare, app))
	ask(t, addr, "GET", "a.test", "/with", nil)
	eventually(t, "a line of access", func() bool { b, _ := os.ReadFile(file); return strings.Contains(string(b), "/with") })
	ask(t, bare, "GET", "a.test", "/without", nil)
	eventually(t, "a line of the log", func() bool { return d.log.Count("path=/without") == 1 })
	if n := d.log.Count("path=/with "); n != 0 {
		t.Errorf("the access log has the request, and the log has it %d times", n)
	}
}

// TestErrorsAreLogged: whoever reads the id on an error page finds it in a log, with what went wrong, whatever the access
// log's format is.
func TestErrorsAreLogged(t *testing.T) {
	for _, format := range []string{"json", "common", "combined"} {
		t.Run(format, func(t *testing.T) {
			addr := freeAddr(t)
			file := filepath.Join(t.TempDir(), "a.log")
			d := start(t, fmt.Sprintf(`
access_log: { file: %q, format: %s }
listeners:
  - name: web
    listen: %q
    mode: http
    routes: [ { host: good.test, forward: %q }, { host: dead.test, forward: %q } ]`, file, format, addr, headers(t), freeAddr(t)))
			for range 2 {
				res, _ := ask(t, addr, "GET", "dead.test", "/dead", nil)
				id := res.Header.Get("X-Tailsplice-Id")
				eventually(t, "the id and the reason are logged", func() bool {
					b, _ := os.ReadFile(file)
					for line := range strings.Lines(string(b) + d.log.String()) {
						if strings.Contains(line, id) && strings.Contains(line, "/dead") && strings.Contains(line, "refused") {
							return true
						}
					}
					return false
				})
			}
			ask(t, addr, "GET", "good.test", "/good", nil)
			eventually(t, "a line of access", func() bool { b, _ := os.ReadFile(file); return strings.Contains(string(b), "/good") })
			ask(t, addr, "GET", "dead.test", "/last", nil) // whose end comes after that of the one before
			if d.log.Count("path=/good") > 0 || format == "json" && d.log.Count("path=/dead") > 0 {
				t.Errorf("a request has two lines:\n%s", d.log)
			}
		})
	}
}

// TestWhoRefused: only what this daemon refuses is "refused" in its log.
func TestWhoRefused(t *testing.T) {
	edge, web := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - { listen: %q, mode: sni, default: { forward: %q } }
  - { listen: %q, mode: http, default: { forward: %q } }`, edge, freeAddr(t), web, freeAddr(t)))
	dialTLS(edge, &tls.Config{ServerName: "a.test"})
	ask(t, web, "GET", "a.test", "/", nil)
	conn := dialTCP(t, edge)
	conn.Write([]byte("\x16\x03\x01\x02\x00\x01"))
	conn.CloseWrite()
	conn.Read(make([]byte, 1))
	for msg, n := range map[string]int{"the target refused the connection": 2, "the client left before its TLS hello was complete": 1} {
		eventually(t, msg, func() bool { return d.log.Count(msg) >= n })
	}
	if d.log.Count("connection refused") > 0 {
		t.Error("nothing was refused here")
	}
}
