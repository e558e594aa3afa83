package server

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// has says whether d has a problem of a part whose name and text have these words in them.
func (d *daemon) has(part, name, text string) bool {
	return slices.ContainsFunc(d.Problems(), func(p Problem) bool {
		return p.Part == part && strings.Contains(p.Name, name) && strings.Contains(p.Problem, text)
	})
}

// scrape is the value of a metric, as it is written.
func (d *daemon) scrape(metric string) string {
	w := httptest.NewRecorder()
	d.Metrics().Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	_, after, _ := strings.Cut(w.Body.String(), "\n"+metric+" ")
	value, _, _ := strings.Cut(after, "\n")
	return value
}

// TestOneBadPart starts a daemon whose certificates, log and address are each wrong beside one that is right:
// that one serves, all else is said where people look, and comes back once it is mended.
func TestOneBadPart(t *testing.T) {
	dir := t.TempDir()
	good, pool := certificate(t, "good.test")
	goodCert, goodKey := writePair(t, good)
	late, latePool := certificate(t, "late.test")
	lateCert, lateKey := writePair(t, late)
	_, otherKey := writePair(t, good)
	taken, err := net.Listen("tcp", freeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	t.Setenv("TAILSPLICE_TAILSCALED_SOCKET", filepath.Join(dir, "no-tailscaled"))
	web, lateWeb, passthrough, app := freeAddr(t), freeAddr(t), freeAddr(t), httpBackend(t, nil)
	// late.pem belongs to another key at first.
	if err := os.Rename(lateKey, lateKey+".kept"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(otherKey, lateKey); err != nil {
		t.Fatal(err)
	}
	yaml := func(more string) string {
		return fmt.Sprintf(`
access_log: { file: %q }
listeners:
  - name: web
    listen: [%q, %q, "tailnet:8443"]
    mode: https
    certificates:
      - { files: { cert: %q, key: %q } }
      - { files: { cert: %q, key: %q } }
    default: { forward: %q }
  - { name: late, listen: [%q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: %q } }
  - { name: passthrough, listen: [%q], mode: sni, default: { forward: %q } }
%s`, filepath.Join(dir, "logs", "a.log"), web, taken.Addr(), filepath.Join(dir, "none.pem"), filepath.Join(dir, "none.key"), goodCert, goodKey, app,
			lateWeb, lateCert, lateKey, app, passthrough, tlsBackend(t, "behind", good), more)
	}
	d := start(t, yaml(""))
	for _, c := range []struct{ part, name, text string }{
		{PartAddress, taken.Addr().String(), "the port is in use"},
		{PartAddress, "tailnet:8443", "tailscaled"},
		{PartCertificate, "none.pem", "no such file"},
		{PartCertificate, lateCert, "does not match"},
		{PartAccessLog, "a.log", "no such file"},
	} {
		if !d.has(c.part, c.name, c.text) {
			t.Errorf("no problem of %s %s says %q: %q", c.part, c.name, c.text, d.Problems())
		}
		if !strings.Contains(d.log.String(), c.text) {
			t.Errorf("the log does not say %q", c.text)
		}
	}
	if len(d.Problems()) != 5 || len(d.Status().Problems) != 5 {
		t.Errorf("want 5 problems: %q", d.Problems())
	}
	for part, want := range map[string]string{PartAddress: "2", PartCertificate: "2", PartAccessLog: "1", PartDefault: "0"} {
		if got := d.scrape(fmt.Sprintf("tailsplice_problems{part=%q}", part)); got != want {
			t.Errorf("the metrics count %q problems of part %s, want %s", got, part, want)
		}
	}
	if r := d.Ready(); r.Ready || !strings.HasPrefix(r.String(), "not ready\n") || strings.Count(r.String(), "\n") != 6 ||
		strings.Count(r.String(), "all the same") != 1 {
		t.Errorf("ready: %+v\n%s", r, r)
	}
	serves := func(addr, name string, c *tls.Config) error {
		c.ServerName = name
		conn, err := tls.Dial("tcp", addr, c)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := serves(web, "good.test", &tls.Config{RootCAs: pool}); err != nil {
		t.Errorf("the good certificate: %v", err)
	}
	if err := serves(passthrough, "good.test", &tls.Config{RootCAs: pool}); err != nil {
		t.Errorf("the other listener: %v", err)
	}
	if err := serves(lateWeb, "late.test", &tls.Config{RootCAs: latePool}); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("a certificate without its key: %v", err)
	}

	// What the daemon does without already is no reason against a change, and a new one is.
	if err := d.Reload(parse(t, yaml("limits: { connections: 1000 }\n"))); err != nil {
		t.Errorf("reload: %v", err)
	}
	for _, more := range []string{
		fmt.Sprintf("  - { name: more, listen: [%q], mode: tcp, default: { forward: %q } }\n", app, app),
		fmt.Sprintf("  - { name: more, listen: [%q], mode: https, certificates: [ { files: { cert: no.pem, key: no.key } } ], default: { forward: %q } }\n",
			freeAddr(t), app),
		fmt.Sprintf("  - { name: more, listen: [%q], mode: http, access_log: { file: %q }, default: { forward: %q } }\n",
			freeAddr(t), filepath.Join(dir, "no", "a.log"), app),
	} {
		if err := d.Reload(parse(t, yaml(more))); err == nil {
			t.Errorf("a reload with something that is newly wrong: %s", more)
		}
	}

	if err := os.Mkdir(filepath.Join(dir, "logs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(lateKey+".kept", lateKey); err != nil {
		t.Fatal(err)
	}
	certPEM, keyPEM := selfsigned.PEM(t, good)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "none.pem"), certPEM, 0o600), os.WriteFile(filepath.Join(dir, "none.key"), keyPEM, 0o600)); err != nil {
		t.Fatal(err)
	}
	taken.Close()
	eventually(t, "only the tailnet is lacking", func() bool { return len(d.Problems()) == 1 && d.has(PartAddress, "tailnet:8443", "") })
	if err := serves(lateWeb, "late.test", &tls.Config{RootCAs: latePool}); err != nil {
		t.Errorf("after it was mended: %v", err)
	}
	if err := serves(taken.Addr().String(), "good.test", &tls.Config{RootCAs: pool}); err != nil {
		t.Errorf("the address that was taken: %v", err)
	}
	if err := d.Reload(parse(t, strings.Replace(yaml(""), `, "tailnet:8443"`, "", 1))); err != nil {
		t.Fatal(err)
	}
	if r := d.Ready(); !r.Ready || r.String() != "ready\n" {
		t.Errorf("ready: %+v", r)
	}
	if b, err := json.Marshal(d.Ready()); err != nil || string(b) != `{"format_version":1,"ready":true}` {
		t.Errorf("%s, %v", b, err)
	}
	d.stopAccepting()
	if r := d.Ready(); r.Ready || !r.Draining {
		t.Errorf("while it ends: %+v", r)
	}
}

// TestNothingServes: a daemon that could serve nobody does not start, and says all that is wrong.
func TestNothingServes(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	taken := backend(t, echo)
	for _, c := range []struct {
		name, yaml string
		want       []string
	}{
		{"each address is taken", fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } },
  { name: b, listen: ["192.0.2.1:443"], mode: tcp, default: { forward: "127.0.0.1:9" } } ]`, taken),
			[]string{`listener "a": listen on ` + taken, `listener "b": listen on 192.0.2.1:443`}},
		{"no certificate", fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: https, certificates: [ { files: { cert: /none.pem, key: /none.key } } ],
  default: { forward: "127.0.0.1:9" } } ]`, freeAddr(t)), []string{`listener "a": /none.pem: no such file`}},
		{"one of each", fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ],
  default: { forward: "127.0.0.1:9" } }, { name: b, listen: [%q], mode: https, certificates: [ { files: { cert: /none.pem, key: /none.key } } ],
  default: { forward: "127.0.0.1:9" } } ]`, taken, certFile, keyFile, freeAddr(t)), []string{`listener "a": listen on`, `listener "b": /none.pem`}},
		{"no file of denied prefixes", fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: tcp, deny: [ { file: /none.txt } ],
  default: { forward: "127.0.0.1:9" } } ]`, freeAddr(t)), []string{`deny /none.txt of listener a: everybody is denied until it can be read: no such file`}},
	} {
		f, err := New(parse(t, c.yaml), discard())
		if err == nil {
			f.Close()
			t.Errorf("%s: it starts", c.name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v\nwant %q in it", c.name, err, want)
			}
		}
	}
}

// TestExpiredCertificate: a daemon starts with an old certificate, serves it, and says so.
func TestExpiredCertificate(t *testing.T) {
	cert := selfsigned.Expired(t, "old.test")
	certFile, keyFile := writePair(t, cert)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ],
  default: { forward: "127.0.0.1:9" } } ]`, addr, certFile, keyFile))
	if !d.has(PartCertificate, certFile, "expired on") || d.Ready().Ready {
		t.Errorf("%q", d.Problems())
	}
	c, err := tls.Dial("tcp", addr, &tls.Config{ServerName: "old.test", InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestGuardsStayStrict: what would let in whom nobody has named keeps the daemon from starting, though
// another listener could serve.
func TestGuardsStayStrict(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	none := filepath.Join(t.TempDir(), "none")
	for _, guard := range []string{
		fmt.Sprintf("basic_auth: { file: %q }", none),
		fmt.Sprintf("client_certificates: { ca: %q }", none),
		fmt.Sprintf("upstream: { protocol: https, ca: %q }", none),
	} {
		f, err := New(parse(t, fmt.Sprintf(`
listeners:
  - { name: open, listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } }
  - { name: web, listen: [%q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: "127.0.0.1:9", %s } }
`, freeAddr(t), freeAddr(t), certFile, keyFile, guard)), discard())
		if err == nil {
			f.Close()
			t.Errorf("it starts with %s", guard)
		} else if !strings.Contains(err.Error(), none) {
			t.Errorf("%s: %v", guard, err)
		}
	}
}
