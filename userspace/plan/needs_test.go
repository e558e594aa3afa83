package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/config"
)

func parse(t *testing.T, listeners string) *config.Config {
	t.Helper()
	cfg, err := config.Parse("test.yaml", []byte("node: here\n"+listeners))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestThings: each file of denied prefixes is looked at once.
func TestThings(t *testing.T) {
	n := NeedsOf(parse(t, `listeners:
  - { listen: ":1", mode: tcp, deny: [192.0.2.1, { file: /a.txt }], default: { forward: "192.0.2.1:1" } }
  - { listen: ":2", mode: http, deny: [{ file: /a.txt }, { file: /b.txt }], default: { forward: "192.0.2.1:1" } }`))
	var got []string
	for _, thing := range n.Things {
		if thing.Kind == ThingFile && thing.Use == UseDeny {
			got = append(got, fmt.Sprintf("%s:%d", thing.Name, thing.At.Line))
		}
	}
	if s := strings.Join(got, " "); s != "/a.txt:3 /b.txt:4" {
		t.Errorf("%s", s)
	}
}

// TestNeeds: each need is found wherever a configuration may have it, and nowhere else.
func TestNeeds(t *testing.T) {
	for _, c := range []struct{ what, listener, want string }{
		{"nothing", `{ listen: ":1", mode: sni, default: { forward: "192.0.2.1:1" } }`, "flows [auto]"},
		{"requests", `{ listen: ":1", mode: http, default: { forward: "192.0.2.1:1" } }`, "requests []"},
		{"an address", `{ listen: ["tailnet:1", ":2"], mode: tcp, default: { forward: "192.0.2.1:1", datapath: userspace } }`,
			"tailnet flows tailnet:1 [userspace]"},
		{"a node", `{ listen: ":1", mode: sni, routes: [{ sni: a.test, forward: "tailnet://a:1", datapath: sockmap }], default: { reject: true } }`,
			"tailnet flows [sockmap]"},
		{"a container", `{ listen: ":1", mode: http, default: { forward: "docker://a:1" } }`, "docker requests []"},
		{"labels", `{ listen: ":1", mode: http, docker: { enabled: true } }`, "docker requests []"},
		{"labels alone, for flows", `{ listen: ":1", mode: sni, docker: { enabled: true } }`, "docker flows [auto]"},
		{"no labels", `{ listen: ":1", mode: http, docker: { enabled: false }, default: { forward: "192.0.2.1:1" } }`, "requests []"},
		{"identities", `{ listen: ":1", mode: sni, allow: [a@vsq.cz], default: { forward: "192.0.2.1:1" } }`, "tailnet flows [auto]"},
		{"a route's", `{ listen: ":1", mode: sni, routes: [{ sni: a.test, allow: [tag:a], forward: "192.0.2.1:1" }] }`, "tailnet flows [auto]"},
		{"a hop's", `{ listen: ":1", mode: tcp, accept_proxy: { from: [edge] }, default: { forward: "192.0.2.1:1" } }`, "tailnet flows [auto]"},
		{"prefixes", `{ listen: ":1", mode: sni, allow: [192.0.2.0/24], default: { forward: "192.0.2.1:1" } }`, "flows [auto]"},
		{"an auth server", `{ listen: ":1", mode: http, default: { forward: "192.0.2.1:1", forward_auth: { address: "docker://auth:1/" } } }`, "docker requests []"},
		{"a certificate of tailscaled", `{ listen: ":1", mode: https, certificates: [{ tailscale: true }], default: { forward: "192.0.2.1:1" } }`,
			"tailnet requests []"},
		{"transparent", `{ listen: ":1", mode: sni, default: { forward: "192.0.2.1:1", transparent: true } }`, "transparent flows [auto]"},
	} {
		n := NeedsOf(parse(t, "listeners: ["+c.listener+"]"))
		var got []string
		for i, needed := range []bool{n.Tailnet, n.Docker, n.Transparent, n.Flows, n.Requests} {
			if needed {
				got = append(got, []string{"tailnet", "docker", "transparent", "flows", "requests"}[i])
			}
		}
		got = append(got, n.Listens...)
		got = append(got, fmt.Sprint(slices.Sorted(maps.Keys(n.Datapaths))))
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %s, want %s", c.what, s, c.want)
		}
	}
	if !NeedsOf(parse(t, `control: { health: "tailnet:9" }`+"\nlisteners: [{ listen: \":1\", mode: tcp, default: { forward: \"192.0.2.1:1\" } }]")).Tailnet {
		t.Error("health on the tailnet: tailscaled is not needed")
	}
}
