package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseLabels(t *testing.T) {
	const host, path, port, tls = "tailsplice.host", "tailsplice.path", "tailsplice.port", "tailsplice.tls"
	for _, c := range []struct {
		name   string
		labels map[string]string
		want   Labels
		errs   []string // how the messages begin
	}{
		{name: "host", labels: map[string]string{host: "a.org"}, want: Labels{Host: []string{"a.org"}}},
		{name: "several", labels: map[string]string{host: " A.org, *.b.org,a.org ,", path: "/"},
			errs: []string{`tailsplice.host: "": the name is empty`}},
		{name: "all", labels: map[string]string{host: " A.org, *.b.org,a.org", path: " /x/ ", port: "8080", tls: "true", "com.example": "x"},
			want: Labels{Host: []string{"a.org", "*.b.org"}, Path: "/x/", Port: 8080, TLS: "true"}},
		{name: "no host", labels: map[string]string{port: "80"}, errs: []string{"tailsplice.host: it is missing"}},
		{name: "mistyped", labels: map[string]string{host: "a.org", "tailsplice.pth": "/admin", "tailsplice.hosts": "x", "tailsplice.": "", "tailsplice.frontend": ""},
			errs: []string{"tailsplice.: unknown label, there are tailsplice.host, .path, .port, .tls", "tailsplice.frontend: unknown label, there are",
				`tailsplice.hosts: unknown label, did you mean "tailsplice.host"?`, `tailsplice.pth: unknown label, did you mean "tailsplice.path"?`}},
		{name: "other names", labels: map[string]string{"Tailsplice.Host": "a.org", "tailsplice-port": "80"},
			errs: []string{`Tailsplice.Host: there is no such label, did you mean "tailsplice.host"?`, `tailsplice-port: there is no such label, did you mean "tailsplice.port"?`}},
		{name: "another name of what narrows", labels: map[string]string{host: "a.org", "TAILSPLICE_PATH": "/admin"},
			errs: []string{`TAILSPLICE_PATH: there is no such label, did you mean "tailsplice.path"?`}},
		{name: "somebody else's", labels: map[string]string{host: "a.org", "tailsplice-build": "7", "host": "b.org", "tailscale.host": "c.org", "traefik.http.routers.tailsplice.host": "d.org"},
			want: Labels{Host: []string{"a.org"}}},
		{name: "values", labels: map[string]string{host: "https://a.org/,*,1.2.3.4", path: "x", port: "0", tls: "yes"},
			errs: []string{`tailsplice.host: "https://a.org/": it is a URL`, `tailsplice.host: "*": a wildcard for every name`, `tailsplice.host: "1.2.3.4": it is an IP address`,
				`tailsplice.path: "x": must begin with /`, "tailsplice.port: port 0 is out of range", `tailsplice.tls: "yes": must be true`}},
		{name: "passthrough", labels: map[string]string{host: "a.org", tls: "passthrough"}, want: Labels{Host: []string{"a.org"}, TLS: "passthrough"}},
		{name: "wake", labels: map[string]string{host: "a.org", "tailsplice.wake": "true"}, want: Labels{Host: []string{"a.org"}, Wake: true, Idle: 30 * time.Minute}},
		{name: "wake for a time", labels: map[string]string{host: "a.org", "tailsplice.wake": "90s"}, want: Labels{Host: []string{"a.org"}, Wake: true, Idle: 90 * time.Second}},
		{name: "wake badly", labels: map[string]string{host: "a.org", "tailsplice.wake": "yes"}, errs: []string{`tailsplice.wake: "yes": must be true, or how long`}},
		{name: "path in tls", labels: map[string]string{host: "a.org", tls: "passthrough", path: "/x"}, errs: []string{"tailsplice.path: with tailsplice.tls=passthrough"}},
		// Whoever starts a container has no business with this process's environment.
		{name: "variable", labels: map[string]string{host: "${HOME}.org", port: "${PORT:-80}"},
			errs: []string{`tailsplice.host: "${HOME}.org": '$' cannot be in a name`,
				`tailsplice.port: port "${PORT:-80}" is not a number`}},
		{name: "flood", labels: map[string]string{host: strings.Repeat("a,", 200)}, errs: []string{"tailsplice.host: 201 names, at most 100"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, errs := ParseLabels(c.labels)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("labels (-want +got):\n%s", diff)
			}
			if len(errs) != len(c.errs) {
				t.Fatalf("errors %v, want %q", errs, c.errs)
			}
			for i, e := range errs {
				if !strings.HasPrefix(e.Label+": "+e.Problem, c.errs[i]) {
					t.Errorf("error %q, want %q", e, c.errs[i])
				}
			}
		})
	}
}

func TestDockerAllows(t *testing.T) {
	d := &Docker{Hosts: []string{"a.org", "*.b.org"}}
	for host, want := range map[string]bool{
		"a.org": true, "x.a.org": false, "*.a.org": false, "b.org": false, "x.b.org": true, "x.y.b.org": true, "*.b.org": true, "*.x.b.org": true, "xb.org": false, "*.org": false,
	} {
		if d.Allows(host) != want {
			t.Errorf("Allows(%q) = %v", host, !want)
		}
	}
	if !new(Docker).Allows("any.org") {
		t.Error("without hosts it allows all")
	}
}

// FuzzParseLabels: labels are written by whoever may start containers.
func FuzzParseLabels(f *testing.F) {
	f.Add("a.org, *.b.org", "/x", "80", "true", "tailsplice.x")
	f.Add("A..b,\x00", "/%2e", "99999", "passthrough", "y")
	f.Fuzz(func(t *testing.T, host, path, port, tls, other string) {
		l, errs := ParseLabels(map[string]string{labelHost: host, labelPath: path, labelPort: port, labelTLS: tls, other: ""})
		if len(errs) > 0 {
			if len(l.Host) > 0 {
				t.Fatalf("a route %+v beside errors %v", l, errs)
			}
			return
		}
		if len(l.Host) == 0 || len(l.Host) > maxLabelHosts {
			t.Fatalf("%d hosts", len(l.Host))
		}
		for _, h := range l.Host {
			if again, err := checkPattern(h); err != nil || again != h {
				t.Fatalf("host %q: %q, %v", h, again, err)
			}
		}
		if l.Path != "" {
			if _, err := parsePath(l.Path); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestIsLabel(t *testing.T) {
	for name, want := range map[string]bool{
		"tailsplice.host": true, "tailsplice.anything": true, "Tailsplice.Host": true, "TAILSPLICE.TLS": true, "tailsplice-host": true,
		"tailsplice_path": true, "tailsplice/port": true, "tailsplice:host": true, "tailspliceHost": true, "tail-splice.host": true,
		"tailspice.host": true, "tailsplise.path": true, "tailsplice": false, "tailsplice-build": false, "host": false, "": false,
		"tailscale.host": false, "com.docker.compose.service": false, "org.tailsplice.host": false, strings.Repeat("tailsplice.host", 100000)[1:]: false,
	} {
		if IsLabel(name) != want {
			t.Errorf("IsLabel(%.40q) = %v", name, !want)
		}
	}
}

// TestWakeDefault: a label that says true is what the configuration says without idle.
func TestWakeDefault(t *testing.T) {
	c, err := Parse("test.yaml", []byte(`listeners: [{ listen: ":80", mode: http, default: { forward: "docker://a:80", wake: { docker: true } } }]`))
	if err != nil {
		t.Fatal(err)
	}
	if idle := c.Listeners[0].Default.Wake.Idle; idle != wakeIdle {
		t.Errorf("idle is %s, and a label's is %s", idle, wakeIdle)
	}
}
