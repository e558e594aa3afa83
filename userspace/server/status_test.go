package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// namedPath is a datapath that has a name.
type namedPath struct {
	datapath.Datapath
	name string
}

func (n namedPath) Name() string { return n.name }

// TestVia: status says which datapath a route's flows begin with, and why it is not the one that was asked for.
func TestVia(t *testing.T) {
	on, off := DatapathStatus{Name: "sockmap", Available: true}, DatapathStatus{Name: "sockmap", Reason: "it failed"}
	local := DatapathStatus{Name: "sk_msg", Reason: "no such map"}
	sockmap, both := []datapath.Datapath{namedPath{name: "sockmap"}}, []datapath.Datapath{namedPath{name: "sk_msg"}, namedPath{name: "sockmap"}}
	auto, none := plan.Rule{Policy: plan.Policy{Datapath: plan.Auto}}, plan.Rule{Policy: plan.Policy{Datapath: userspace}}
	named := plan.Rule{Policy: plan.Policy{Datapath: "its name"}}
	for _, c := range []struct {
		name      string
		rule      plan.Rule
		named     []datapath.Datapath
		all       []DatapathStatus
		want, why string
	}{
		{"http", plan.Rule{HTTP: new(plan.HTTP)}, nil, []DatapathStatus{on}, userspace, "HTTP"},
		{"auto", auto, nil, []DatapathStatus{on}, userspace, "go on by sockmap"},
		{"auto without", auto, nil, []DatapathStatus{off}, userspace, "sockmap is not there: it failed"},
		{"userspace", none, nil, []DatapathStatus{on}, userspace, "the configuration says so"},
		{"sockmap", named, sockmap, []DatapathStatus{on}, "sockmap", ""},
		{"sockmap is off", named, sockmap, []DatapathStatus{off}, userspace, "sockmap takes no flows: it failed"},
		{"sk_msg is off", named, both, []DatapathStatus{local, on}, "sockmap", "sk_msg takes no flows: no such map"},
		{"both are off", named, both, []DatapathStatus{local, off}, userspace, "sk_msg takes no flows"},
	} {
		if got, why := via(&c.rule, c.named, c.all); got != c.want || !strings.Contains(why, c.why) || c.why == "" && why != "" {
			t.Errorf("%s: %s, since %q", c.name, got, why)
		}
	}
}

func TestStatusOfRoutes(t *testing.T) {
	dead, web, raw := freeAddr(t), freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: %q
    mode: http
    deny: [192.0.2.0/24]
    routes:
      - { host: [a.test], forward: %q, allow: [127.0.0.1], methods: [GET], max_body: 5 }
  - { name: raw, listen: %q, mode: tcp, default: { forward: %q } }
`, web, dead, raw, dead))
	ask(t, web, "GET", "a.test", "/", nil)
	s := d.Status()
	r := s.Listeners[0].Routes[0]
	if got := strings.Join(r.Asks, "; "); got != "allow 127.0.0.1; methods GET; max_body 5" || !slices.Equal(s.Listeners[0].Deny, []string{"192.0.2.0/24"}) {
		t.Errorf("restrictions: %q, and not for %v", got, s.Listeners[0].Deny)
	}
	if len(r.Down) != 1 || !strings.Contains(r.Down[0], "the target refused the connection") {
		t.Errorf("down: %q", r.Down)
	}
	if r := s.Listeners[1].Routes[0]; r.Wanted != "auto" || r.Datapath != userspace || r.Why == "" {
		t.Errorf("the datapath: %+v", r)
	}
}
