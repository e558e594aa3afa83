package server

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"

	"github.com/tailsplice/tailsplice/userspace/container"
)

// TestLabelsTakeNothingGuarded: no label opens a part of what the configuration guards, unless docker.hosts
// says so.
func TestLabelsTakeNothingGuarded(t *testing.T) {
	t.Setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	ca, _ := certificate(t, "ca")
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	writeCA(t, caFile, ca)
	allow, basic := "allow: [192.0.2.7]", fmt.Sprintf("basic_auth: { users: { me: %q } }", hash)
	forward, clients := `forward_auth: { address: "http://127.0.0.1:1/" }`, fmt.Sprintf("client_certificates: { ca: %q }", caFile)
	to := `forward: "127.0.0.1:1"`
	bank := func(more string) string { return "routes: [{ host: bank.test, " + to + ", " + more + " }]" }
	wild := func(more string) string {
		return `routes: [{ host: "*.bank.test", ` + to + ", " + more + ` }, { host: "*.open.test", ` + to + ` }]`
	}
	for _, c := range []struct {
		mode, hosts, config, labels string
		problem                     string // "": the label gets what it wants
	}{
		{"http", "", bank(allow), "host=bank.test path=/login", "bank.test, which has allow 192.0.2.7"},
		{"http", "", bank(basic), "host=bank.test path=/login", "bank.test, which has basic_auth"},
		{"http", "", bank(forward), "host=bank.test path=/login", "bank.test, which has forward_auth http://127.0.0.1:1/"},
		{"https", "", bank(clients), "host=bank.test path=/login", "bank.test, which has client_certificates"},
		{"http", "", `routes: [{ host: bank.test, reject: true }]`, "host=bank.test path=/login", "bank.test, which rejects"},
		{"http", "", bank(allow + ", path: /admin"), "host=bank.test path=/admin/x", "bank.test, which has allow"},
		{"http", "", bank(allow + ", path: /admin, methods: [GET]"), "host=bank.test path=/admin/x", "bank.test, which has allow"},
		{"http", "", bank(allow), "host=Bank.Test. path=/login", "bank.test, which has allow"},
		{"http", "", wild(allow), "host=x.bank.test", "*.bank.test, which has allow"},
		{"http", "", wild(allow), "host=x.y.bank.test path=/z", "*.bank.test, which has allow"},
		{"http", "", wild(allow), "host=*.x.bank.test", "*.bank.test, which has allow"},
		{"http", "", wild(allow), "host=*.bank.test path=/z", "*.bank.test, which has allow"},
		{"http", "", wild(allow + ", path: /admin"), "host=x.bank.test", "*.bank.test, which has allow"},
		{"http", "", "default: { " + to + ", " + allow + " }", "host=app.test", "default, which has allow"},
		{"http", "", "default: { " + to + ", " + allow + " }", "host=*.test path=/x", "default, which has allow"},
		{"sni", "", `routes: [{ sni: "*.bank.test", ` + to + ", " + allow + ` }]`, "host=x.bank.test tls=passthrough", "*.bank.test, which has allow"},
		{"sni", "", `routes: [{ sni: "*.bank.test", reject: true }]`, "host=x.bank.test tls=passthrough", "*.bank.test, which rejects"},
		{"sni", "", `default: { ` + to + " }", "host=secret.test tls=passthrough", "secret.test, which has allow"},
		{"sni", "", `default: { ` + to + " }", "host=*.test tls=passthrough", "secret.test, which has allow"},
		{"http", "", "default: { " + to + " }", "host=secret.test", "write secret.test into docker.hosts (listener tls)"},
		{"http", "", "default: { " + to + " }", "host=secret.test path=/x", "secret.test, which has allow"},
		{"http", "", "default: { " + to + " }", "host=*.test", "secret.test, which has allow"},
		{"https", "", "default: { " + to + " }", "host=secret.test", "secret.test, which has allow"},
		{"http", "", "default: { " + to + " }", "host=part.test", "part.test, which has allow"},
		{"http", "", "default: { " + to + " }", "host=part.test path=/Admin/x", "part.test, which has allow"},
		{"http", "", bank(allow + ", path: /admin"), "host=bank.test path=/Admin/x", "bank.test, which has allow"},
		// docker.hosts that are broader bound labels, and open nothing.
		{"http", `"*.test"`, bank(allow), "host=bank.test path=/login", "bank.test, which has allow"},
		{"http", `"*.test", x.test`, wild(allow), "host=x.bank.test", "*.bank.test, which has allow"},
		{"http", `"*.bank.test", y.bank.test`, bank(allow), "host=x.bank.test", ""},
		// What it names is open.
		{"http", "bank.test", bank(allow), "host=bank.test path=/login", ""},
		{"http", `"*.test", bank.test`, bank(allow), "host=bank.test path=/login", ""},
		{"http", `"*.bank.test"`, wild(allow), "host=x.bank.test", ""},
		{"http", "x.bank.test", wild(allow), "host=x.bank.test", ""},
		{"http", `"*.x.bank.test"`, wild(allow), "host=y.x.bank.test", ""},
		{"http", "app.test", "default: { " + to + ", " + allow + " }", "host=app.test", ""},
		{"http", `"*.test"`, "default: { " + to + ", " + allow + " }", "host=app.test", ""},
		{"sni", "secret.test", `default: { ` + to + " }", "host=secret.test tls=passthrough", ""},
		{"http", "secret.test", `default: { ` + to + " }", "host=secret.test", ""},
		{"http", "", `default: { ` + to + " }", "host=part.test path=/open", ""},
		// What stands behind the guarded route itself.
		{"http", "", `default: { ` + to + " }", "host=behind.test", ""},
		// What a guarded route leaves, or never had, is anybody's.
		{"http", "", bank(allow + ", path: /admin"), "host=bank.test path=/adm", ""},
		{"http", "", bank(allow + ", path: /admin"), "host=bank.test path=/open", ""},
		{"http", "", bank(allow + ", path: /admin"), "host=bank.test", ""},
		{"http", "", bank(allow), "host=other.test path=/login", ""},
		{"http", "", bank(allow), "host=x.bank.test", ""},
		{"http", "", strings.Replace(bank(allow), "bank.test", "bank.example", 1), "host=*.example", ""},
		{"http", "", wild(allow), "host=bank.test", ""},
		{"http", "", wild(allow), "host=x.open.test path=/y", ""},
		{"http", "", `routes: [{ host: bank.test, ` + to + ` }]`, "host=bank.test path=/login", ""},
		{"http", "", `routes: [{ host: bank.test, ` + to + ` }], default: { ` + to + ", " + allow + ` }`, "host=bank.test path=/login", ""},
		{"http", "", `routes: [{ host: bank.test, methods: [GET], ` + to + ` }], default: { ` + to + ", " + allow + ` }`, "host=bank.test path=/login", "default, which has allow"},
		{"http", "", "allow: [192.0.2.7], routes: [{ host: bank.test, " + to + " }]", "host=bank.test path=/login", ""}, // the listener's list is everybody's
		{"http", "", `routes: [{ host: bank.test, ` + to + ` }], default: { reject: true }`, "host=app.test", ""},
	} {
		certs := ""
		if c.mode == "https" {
			certs, _ = protocol{tls: true}.certificateYAML(t)
		}
		hosts := ""
		if c.hosts != "" {
			hosts = ", hosts: [" + c.hosts + "]"
		}
		other, _ := protocol{tls: true}.certificateYAML(t)
		web := freeAddr(t)
		d := start(t, fmt.Sprintf(`
listeners:
  - { name: web, listen: [%[1]q], mode: %[2]s, %[3]sdocker: { enabled: true%[4]s }, %[5]s }
  - { name: tls, listen: [%[6]q], mode: https, %[7]sroutes: [
      { host: secret.test, %[8]s, %[9]s }, { host: part.test, path: /admin, %[8]s, %[9]s },
      { host: behind.test, forward: %[1]q, %[9]s } ] }
`, web, c.mode, certs, hosts, c.config, freeAddr(t), other, to, allow))
		d.mu.Lock()
		d.useLabels([]container.Labelled{box("c", strings.Fields(c.labels)...)})
		rules := d.plan.Services["web"].Rules
		d.mu.Unlock()
		got := false
		for _, r := range rules {
			got = got || r.Label != nil
		}
		var problems []string
		for _, p := range d.Status().Labels {
			problems = append(problems, p.Problem)
		}
		said := strings.Join(problems, "; ")
		if got != (c.problem == "") || !strings.Contains(said, c.problem) || c.problem == "" && said != "" ||
			c.problem != "" && (!strings.Contains(said, "docker.hosts") || !strings.Contains(d.log.String(), "a container's label is ignored")) {
			t.Errorf("%s, hosts [%s], %s, labels %s: has its route: %v, problems %q, want %q", c.mode, c.hosts, c.config, c.labels, got, said, c.problem)
		}
		d.Close()
	}
}

// TestGuardedStaysShut: who asks for the path that a label wants is refused as for the rest of the host,
// however he asks.
func TestGuardedStaysShut(t *testing.T) {
	t.Setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
	app := headers(t)
	for _, p := range protocols {
		for _, local := range []string{"127.0.0.1", "::1"} {
			certs, pool := p.certificateYAML(t)
			addr := freeAddrAt(t, local)
			d := start(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: %s, %sdocker: { enabled: true }, routes: [{ host: [app.test, "*.app.test"], forward: %q, allow: [192.0.2.7] }] }]`, addr, p.mode(), certs, app))
			d.mu.Lock()
			d.useLabels([]container.Labelled{box("c", "host=app.test,x.app.test", "path=/login")})
			d.mu.Unlock()
			client := p.client(t, pool, func() net.Conn { return dialTCP(t, addr) })
			for _, path := range []string{"/", "/login", "/login/x"} {
				if res, _, body := p.get(t, client, path); res.StatusCode != 403 {
					t.Errorf("%s at %s, %s: %d %s", p.name, addr, path, res.StatusCode, body)
				}
			}
		}
	}
}
