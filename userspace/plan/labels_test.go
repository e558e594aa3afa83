package plan

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
)

// labelled is a plan with listeners that take labels, and one that doesn't.
func labelled(t *testing.T) *Plan {
	p, err := Compile(parse(t, `
listeners:
  - { name: web, listen: [":1"], mode: http, docker: { enabled: true }, routes: [{ host: [fixed.org], path: /api/, forward: "127.0.0.1:1" }], default: { forward: "127.0.0.1:2" } }
  - { name: some, listen: [":2"], mode: http, docker: { enabled: true, hosts: ["*.some.org"] } }
  - { name: tls, listen: [":3"], mode: sni, docker: { enabled: true } }
  - { name: off, listen: [":4"], mode: http, routes: [{ host: [a.org], forward: "127.0.0.1:1" }] }
`), NewDeps(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// box is a running container; its id is its name.
func box(name string, labels ...string) container.Labelled {
	c := container.Labelled{ID: name, Name: name, Labels: map[string]string{}, Ports: []uint16{80}, Running: true}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		c.Labels["tailsplice."+k] = v
	}
	return c
}

// other gives c a label that does not begin as ours do.
func other(c container.Labelled, label string) container.Labelled {
	k, v, _ := strings.Cut(label, "=")
	c.Labels[k] = v
	return c
}

// TestLabelRoutes goes through what containers may ask for, one step after the
// other as they come and go.
func TestLabelRoutes(t *testing.T) {
	p := labelled(t)
	stopped := func(c container.Labelled) container.Labelled { c.Running = false; return c }
	younger := func(c container.Labelled) container.Labelled { c.Created = time.Unix(1, 0); return c }
	exposing := func(port uint16, c container.Labelled) container.Labelled { c.Ports = []uint16{port}; return c }
	replica := func(c container.Labelled) container.Labelled { c.Replicas = "shop/web"; return c }
	for _, step := range []struct {
		name     string
		after    bool // what was there in the step before is remembered
		seen     []container.Labelled
		routes   []string // LISTENER MATCH→IDS:PORT, STATE if not running; sorted
		problems []string // how they begin
	}{
		{"appears", false, []container.Labelled{box("a", "host=a.org, *.b.org", "path=/x", "port=8080")}, []string{"web a.org,*.b.org/x→a:8080"}, []string{`a tailsplice.host some: "a.org" is not among`, `a tailsplice.host some: "*.b.org" is not among`}},
		{"stops", true, []container.Labelled{stopped(box("a", "host=a.org", "port=8080"))}, []string{"web a.org→a:8080 stopped"}, nil},
		{"is removed", true, nil, []string{"web a.org→a:8080 removed"}, nil},
		{"comes back under another id", true, []container.Labelled{younger(box("a2", "host=a.org"))}, []string{"web a.org→a2:80"}, nil},
		{"an older one wants the same", false, []container.Labelled{younger(box("a2", "host=a.org")), box("b", "host=a.org,b.org")},
			[]string{"web a.org→a2:80", "web b.org→b:80"}, []string{`b tailsplice.host web: "a.org" belongs to container a2 already`}},
		{"the holder stops", false, []container.Labelled{stopped(younger(box("a2", "host=a.org"))), box("b", "host=a.org,b.org")}, []string{"web a.org,b.org→b:80"}, nil},
		{"and is back", false, []container.Labelled{younger(box("a2", "host=a.org")), box("b", "host=a.org,b.org")},
			[]string{"web a.org,b.org→b:80"}, []string{`a2 tailsplice.host web: "a.org" belongs to container b already`}},
		{"the config wins", false, []container.Labelled{box("c", "host=fixed.org", "path=/api"), box("d", "host=fixed.org"), box("b", "host=b.org"), box("a2", "host=a2.org")},
			[]string{"web a2.org→a2:80", "web b.org→b:80", "web fixed.org→d:80"}, []string{`c tailsplice.host web: "fixed.org/api" belongs to a configured route already`}},
		{"bad labels harm nobody", false, []container.Labelled{box("c", "host=c.org", "pth=/admin"), box("d", "host=d.org"), box("b", "host=d.org:80"), box("a2", "host=a2.org", "port=http")},
			[]string{"web d.org→d:80"}, []string{`c tailsplice.pth : unknown label, did you mean "tailsplice.path"?`, `b tailsplice.host : "d.org:80": it has a port`, `a2 tailsplice.port : port "http" is not a number`}},
		{"modes", false, []container.Labelled{box("c", "host=x.some.org"), box("d", "host=d.org", "tls=passthrough"), box("b", "host=b.org", "tls=true"), box("a2", "host=y.some.org", "tls=false")},
			[]string{"some x.some.org→c:80", "some y.some.org→a2:80", "tls d.org→d:80", "web x.some.org→c:80", "web y.some.org→a2:80"}, []string{"b tailsplice.tls : no listener for it"}},
		{"replicas", false, []container.Labelled{replica(box("b", "host=b.org")), replica(box("c", "host=b.org")), stopped(replica(box("d", "host=b.org"))), replica(box("a2", "host=b.org", "path=/other"))},
			[]string{"web b.org/other→a2:80", "web b.org→b,c:80"}, nil},
		{"replicas of two images", false, []container.Labelled{exposing(80, replica(box("b", "host=b.org"))), exposing(81, replica(box("c", "host=b.org")))}, []string{"web b.org→c:81"}, nil},
		{"a replica that is stopped, and one that runs", false, []container.Labelled{stopped(replica(box("b", "host=b.org"))), replica(box("c", "host=b.org"))}, []string{"web b.org→c:80"}, nil},
		{"no replicas", false, []container.Labelled{box("e", "host=e.org"), box("f", "host=e.org")}, []string{"web e.org→e:80"}, []string{`f tailsplice.host web: "e.org" belongs to container e already`}},
		{"two new ones, of which the older goes first", false, []container.Labelled{younger(box("g", "host=new.org")), box("h", "host=new.org")}, []string{"web new.org→h:80"}, []string{`g tailsplice.host web: "new.org" belongs to container h already`}},
		{"a bad one", false, []container.Labelled{box("b", "hst=b.org"), box("c", "host=c.org")}, []string{"web c.org→c:80"}, []string{"b tailsplice.hst : unknown label"}},
		{"and gone", true, []container.Labelled{box("c", "host=c.org")}, []string{"web c.org→c:80"}, nil},
		{"replicas again", false, []container.Labelled{replica(box("b", "host=b.org")), replica(box("c", "host=b.org")), replica(box("a2", "host=b.org", "path=/other"))}, []string{"web b.org/other→a2:80", "web b.org→b,c:80"}, nil},
		{"a replica is replaced", true, []container.Labelled{replica(box("e", "host=b.org"))}, []string{"web b.org/other→a2:80 removed", "web b.org→e:80"}, nil},
		{"a name that is nearly right", false, []container.Labelled{other(box("b"), "Tailsplice.Host=b.org"), other(box("c", "host=c.org"), "tailsplice-path=/x"), box("d", "host=d.org")},
			[]string{"web d.org→d:80"}, []string{`b Tailsplice.Host : there is no such label, did you mean "tailsplice.host"?`, `c tailsplice-path : there is no such label, did you mean "tailsplice.path"?`}},
	} {
		if !step.after {
			p.Labels.seen, p.Labels.gone = nil, nil
		}
		p = p.WithLabels(p.Labels, step.seen)
		var routes []string
		for name, s := range p.Services {
			for _, r := range s.Rules {
				if r.Label != nil {
					state := strings.TrimSuffix(" "+r.Label.State, " running")
					routes = append(routes, fmt.Sprintf("%s %s→%s:%d%s", name, r.Name, r.To.Host, r.To.Port, state))
				}
			}
		}
		slices.Sort(routes)
		if !slices.Equal(routes, step.routes) {
			t.Errorf("%s: routes %q, want %q", step.name, routes, step.routes)
		}
		var problems []string
		for _, l := range p.Labels.Problems {
			if l.Listener == "some" && strings.Contains(l.Problem, "is not among docker.hosts") && step.name != "appears" {
				continue
			}
			problems = append(problems, fmt.Sprintf("%s %s %s: %s", l.Container, l.Label, l.Listener, l.Problem))
		}
		for _, want := range step.problems {
			if !slices.ContainsFunc(problems, func(p string) bool { return strings.HasPrefix(p, want) }) {
				t.Errorf("%s: no problem %q in %q", step.name, want, problems)
			}
		}
		if len(step.problems) == 0 && len(problems) > 0 {
			t.Errorf("%s: problems %q", step.name, problems)
		}
	}
}

// TestLabelsOfTheHost: a container in the host's network can't claim the ports
// of other programs, and one with several ports says which.
func TestLabelsOfTheHost(t *testing.T) {
	p := labelled(t)
	host, two := box("host", "host=a.org", "port=22"), box("two", "host=b.org")
	host.HostNetwork, two.Ports = true, []uint16{80, 443}
	p = p.WithLabels(nil, []container.Labelled{host, two})
	if n := len(p.Services["web"].Rules); n != 2 {
		t.Errorf("%d rules, want the two of the configuration", n)
	}
	said := fmt.Sprint(p.Labels.Problems)
	for _, want := range []string{"{host tailsplice.host  the container is in the host's network", "{two tailsplice.port  it is missing, and the container exposes 80 443"} {
		if !strings.Contains(said, want) {
			t.Errorf("%s does not say %s", said, want)
		}
	}
}

// TestLabelsLookup: a label's route is found beside the configured ones, by the
// longest path, and the default still takes the rest.
func TestLabelsLookup(t *testing.T) {
	p := labelled(t)
	p = p.WithLabels(nil, []container.Labelled{box("a", "host=fixed.org", "path=/api/deep"), box("b", "host=*.org")})
	for request, want := range map[string]string{"fixed.org/api/deep/x": "container a", "fixed.org/api/x": "config", "fixed.org/y": "container b", "x.net/": "config"} {
		host, path, _ := strings.Cut(request, "/")
		to, _, err := p.Services["web"].ByRequest(new(http.Request), host, "/"+path)
		if err != nil {
			t.Fatal(err)
		}
		if got := to.Source(); got != want {
			t.Errorf("%s goes to %s, want %s", request, got, want)
		}
	}
}

// TestLabelsWake: labels wake containers where the listener lets them.
func TestLabelsWake(t *testing.T) {
	p, err := Compile(parse(t, `
listeners:
  - { name: may, listen: [":80"], mode: http, docker: { enabled: true, wake: true } }
  - { name: not, listen: [":81"], mode: http, docker: { enabled: true } }
`), NewDeps(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	p = p.WithLabels(nil, []container.Labelled{box("a", "host=a.org", "wake=90s"), box("b", "host=b.org")})
	for listener, want := range map[string][]string{"may": {"a.org 1m30s 30s", "b.org"}, "not": {"a.org", "b.org"}} {
		var got []string
		for _, r := range p.Services[listener].Rules {
			if r.Label == nil {
				continue
			}
			is := r.Name
			if r.Wake.IsDocker() {
				is += fmt.Sprint(" ", r.Wake.Idle, " ", r.Hold)
			}
			got = append(got, is)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s has %q, want %q", listener, got, want)
		}
	}
	if said := fmt.Sprint(p.Labels.Problems); !strings.Contains(said, "{a tailsplice.wake not the listener does not let labels wake containers") {
		t.Errorf("problems: %s", said)
	}
}
