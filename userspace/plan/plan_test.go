package plan

import (
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

const edge = `
datapath: sockmap
listeners:
  - { name: edge, listen: ":1", mode: sni, allow: [192.0.2.0/24, a@vsq.cz], routes: [
      { sni: a.test, alpn: [h2], forward: "192.0.2.1:1", datapath: sk_msg },
      { sni: "*.b.test", forward: "tailnet://b:1", allow: [192.0.2.9, b@vsq.cz] },
      { sni: no.test, reject: true } ] }
  - { name: raw, listen: ":2", mode: tcp, allow: [192.0.2.0/24], default: { forward: "192.0.2.1:1" } }
  - { name: shut, listen: ":3", mode: tcp, allow: [192.0.2.0/24], default: { reject: true } }
`

// TestCompileIsPure: a configuration is left as it is, also by those to whom datapaths are not the question.
func TestCompileIsPure(t *testing.T) {
	cfg, same := parse(t, edge), parse(t, edge)
	deps := NewDeps(slog.New(slog.DiscardHandler))
	p, err := Compile(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	p.WithLabels(nil, nil)
	if !reflect.DeepEqual(cfg, same) {
		t.Errorf("the configuration has become %+v", cfg)
	}
	missing := errors.New("there is no such datapath")
	deps.Datapath = func(word string) error {
		if word == "sk_msg" {
			return missing
		}
		return nil
	}
	p, err = Compile(cfg, deps)
	if err == nil || !strings.Contains(err.Error(), "test.yaml:6:") || !strings.Contains(err.Error(), missing.Error()) {
		t.Errorf("without sk_msg: %v", err)
	}
	if p.Services["edge"] != nil || p.Services["raw"] == nil {
		t.Errorf("the services are %v", p.Services)
	}
}

// known are identities by address; who has others does not come from a node.
type known map[string]string

var errAway = errors.New("tailscaled is away")

func (k known) WhoIs(a netip.Addr) (id tailnet.Identity, err error) {
	switch user, ok := k[a.String()]; {
	case user == "away":
		return id, &NotIdentifiedError{a, errAway}
	case ok:
		return tailnet.Identity{User: user}, nil
	}
	return id, tailnet.ErrNotPeer
}

func (k known) Describe(a netip.Addr) string { return a.String() + " " + k[a.String()] }

// TestDecide: what becomes of a connection depends on its hello, on who it is, and on the answers of the
// asker, and on nothing else.
func TestDecide(t *testing.T) {
	p, err := Compile(parse(t, edge), NewDeps(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	q := known{"100.64.0.1": "a@vsq.cz", "100.64.0.2": "b@vsq.cz", "100.64.0.3": "away"}
	for _, c := range []struct{ listener, name, client, rule, why string }{
		{"edge", "a.test", "192.0.2.1", "a.test", ""},
		{"edge", "a.test", "100.64.0.1", "a.test", ""},
		{"edge", "a.test", "100.64.0.2", "", "allow does not name 100.64.0.2 b@vsq.cz"},
		{"edge", "a.test", "100.64.0.3", "", "tailscaled did not answer who 100.64.0.3 is"},
		{"edge", "a.test", "100.64.0.4", "", "allow does not name 100.64.0.4 "},
		{"edge", "a.test", "unknown", "", "allow does not name unknown: a hop"},
		{"edge", "x.b.test", "192.0.2.9", "*.b.test", ""},
		{"edge", "x.b.test", "192.0.2.1", "", "allow does not name 192.0.2.1  (route *.b.test)"},
		{"edge", "no.test", "192.0.2.1", "", "the configuration rejects this name (route no.test)"},
		{"edge", "c.test", "192.0.2.1", "", "no route and no default matches this name"},
		{"edge", "c.test", "198.51.100.1", "", "allow does not name 198.51.100.1"}, // before it is told what there is
		{"raw", "", "192.0.2.1", "default", ""},
		{"raw", "", "198.51.100.1", "", "allow does not name 198.51.100.1"},
		{"shut", "", "192.0.2.1", "", "the configuration rejects all connections"},
		{"shut", "", "198.51.100.1", "", "allow does not name 198.51.100.1"},
	} {
		v := Visitor{}
		if c.client == "unknown" {
			v.Unknown = errors.New("a hop that does not say for whom it speaks")
		} else {
			v.Client = netip.MustParseAddr(c.client)
		}
		var hello *sni.Hello
		if c.listener == "edge" {
			hello = &sni.Hello{ServerName: c.name, ALPN: []string{"h2"}}
		}
		for range 2 {
			r, err := p.Services[c.listener].Decide(hello, v, q)
			switch {
			case c.why == "" && (err != nil || r.Name != c.rule):
				t.Errorf("%s, %s from %s: %v, %v, want %s", c.listener, c.name, c.client, r, err, c.rule)
			case c.why != "" && (r != nil || err == nil || !strings.HasPrefix(err.Error(), c.why)):
				t.Errorf("%s, %s from %s: %v, %v, want %q", c.listener, c.name, c.client, r, err, c.why)
			}
		}
	}
	if _, err := p.Services["edge"].Decide(&sni.Hello{ServerName: "a.test"}, Visitor{Client: netip.MustParseAddr("192.0.2.1")}, q); !errors.Is(err, ErrNobodyServes) {
		t.Errorf("without its protocol: %v", err)
	}
}
