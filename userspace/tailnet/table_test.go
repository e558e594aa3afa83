package tailnet

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// recorded is what tailscaled answered on "home" in the lab; RECORD=... in
// test/netns/tailnet_test writes it anew. "shared" has a node edge-a of another
// tailnet, which has tag:edge there; in "offline" that node is our friend, who
// belongs to a user, and the laptop is offline.
func recorded(t *testing.T, name string) *ipnstate.Status {
	t.Helper()
	data, err := os.ReadFile("testdata/status-" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	st := new(ipnstate.Status)
	if err := json.Unmarshal(data, st); err != nil {
		t.Fatal(err)
	}
	return st
}

func TestResolve(t *testing.T) {
	for _, c := range []struct {
		status, name string
		node         string // FQDN, "" for an error
		says         string
	}{
		{"offline", "laptop", "laptop.tn.example", ""},
		{"offline", "LAPTOP.", "laptop.tn.example", ""},
		{"offline", "Laptop.Tn.Example.", "laptop.tn.example", ""},
		{"offline", "home", "home.tn.example", ""},
		{"offline", "edge-a", "edge-a.tn.example", ""},
		{"shared", "edge-a", "edge-a.tn.example", ""}, // never the other tailnet's
		{"shared", "edge-a.other.example", "edge-a.other.example", ""},
		{"shared", "edge-a.tn.example", "edge-a.tn.example", ""},
		{"offline", "edge-a.other.example", "", "no node"},
		{"offline", "edge_a", "", `did you mean "edge-a"?`},
		{"offline", "lpatop", "", `did you mean "laptop"?`},
		{"offline", "laptop.tn", "", "no node"},
		{"offline", "tn.example", "", "no node"},
		{"offline", "unlike-any", "", "it has edge-a, edge-b, friend, laptop"},
		{"offline", "", "", "no node"},
		{"offline", ".", "", "no node"},
		{"offline", "100.64.200.200", "", "has the address 100.64.200.200"},
	} {
		tab := newTable(recorded(t, c.status), time.Now())
		if err := tab.usable("sock"); err != nil {
			t.Fatal(err)
		}
		n, err := tab.lookup(c.name)
		var e *Error
		switch {
		case c.node != "" && (err != nil || n.fqdn != c.node):
			t.Errorf("%s: %q is %+v, %v; want %s", c.status, c.name, n, err, c.node)
		case c.node == "" && (!errors.As(err, &e) || e.Kind != KindUnknownNode || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %q: %v; want an error that says %q", c.status, c.name, err, c.says)
		}
	}
	// Every address leads to its node, and a name to all addresses, IPv4 first.
	tab := newTable(recorded(t, "offline"), time.Now())
	for _, n := range tab.nodes() {
		addrs, err := tab.resolve(n.short)
		if err != nil || len(addrs) != 2 || !addrs[0].Is4() || !addrs[1].Is6() {
			t.Errorf("%s is at %s, %v", n.short, addrs, err)
		}
		for _, a := range n.addrs {
			if one, err := tab.resolve(a.String()); err != nil || !slices.Equal(one, []netip.Addr{a}) {
				t.Errorf("%s is at %s, %v", a, one, err)
			}
		}
	}
	if l, _ := tab.lookup("laptop"); l.online || l.seen.IsZero() {
		t.Errorf("laptop is online %v, seen %s", l.online, l.seen)
	}
	// A short name that only another tailnet has is no name here, but said.
	st := recorded(t, "shared")
	for k, p := range st.Peer {
		if p.DNSName == "edge-a.tn.example." {
			delete(st.Peer, k)
		}
	}
	_, err := newTable(st, time.Now()).lookup("edge-a")
	if err == nil || !strings.Contains(err.Error(), `did you mean "edge-a.other.example", which another tailnet shares`) {
		t.Errorf("%v", err)
	}
}

// TestStates: each state that has no answer says what to do.
func TestStates(t *testing.T) {
	for _, c := range []struct {
		state, says string
		change      func(*ipnstate.Status)
		temporary   bool
	}{
		{"NeedsLogin", "tailscale up", nil, false},
		{"Stopped", "switched off", nil, false},
		{"NeedsMachineAuth", "admin", nil, false},
		{"InUseOtherUser", "another user", nil, false},
		{"Starting", "still starting", nil, true},
		{"NoState", "still starting", nil, true},
		{"Running", "userspace-networking", func(st *ipnstate.Status) { st.TUN = false }, false},
		{"Running", "no tailnet address", func(st *ipnstate.Status) { st.Self.TailscaleIPs = nil }, false},
	} {
		st := recorded(t, "offline")
		st.BackendState = c.state
		if c.change != nil {
			c.change(st)
		}
		var e *Error
		err := newTable(st, time.Now()).usable("sock")
		if !errors.As(err, &e) || e.Kind != KindDown || e.State != c.state || e.Temporary() != c.temporary || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.state, err)
		}
	}
}

func TestSameAs(t *testing.T) {
	peer := func(st *ipnstate.Status) *ipnstate.PeerStatus {
		for _, p := range st.Peer {
			if p.DNSName == "friend.tn.example." {
				return p
			}
		}
		return nil
	}
	for _, c := range []struct {
		name   string
		change func(*ipnstate.Status)
		same   bool
	}{
		{"nothing", func(*ipnstate.Status) {}, true},
		{"online", func(st *ipnstate.Status) { peer(st).Online = false }, true},
		{"state", func(st *ipnstate.Status) { st.BackendState = "Stopped" }, false},
		{"name", func(st *ipnstate.Status) { peer(st).DNSName = "foe.tn.example." }, false},
		{"address", func(st *ipnstate.Status) { peer(st).TailscaleIPs = peer(st).TailscaleIPs[:1] }, false},
		{"owner", func(st *ipnstate.Status) { peer(st).UserID = 77; st.User[77] = tailcfg.UserProfile{ID: 77} }, false},
		{"own address", func(st *ipnstate.Status) { st.Self.TailscaleIPs = st.Self.TailscaleIPs[1:] }, false},
		{"gone", func(st *ipnstate.Status) { delete(st.Peer, peer(st).PublicKey) }, false},
	} {
		st := recorded(t, "offline")
		c.change(st)
		if got := newTable(st, time.Now()).sameAs(newTable(recorded(t, "offline"), time.Time{})); got != c.same {
			t.Errorf("%s: same %v", c.name, got)
		}
	}
}

// whois is what tailscaled would say of a node; the JSON of both says the same.
func whois(t *testing.T, st *ipnstate.Status, fqdn string) *apitype.WhoIsResponse {
	t.Helper()
	for _, p := range st.Peer {
		if p.DNSName != fqdn {
			continue
		}
		user := st.User[p.UserID]
		n := &tailcfg.Node{Name: p.DNSName, User: p.UserID}
		if p.Tags != nil {
			n.Tags = p.Tags.AsSlice()
		}
		for _, a := range p.TailscaleIPs {
			n.Addresses = append(n.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		return &apitype.WhoIsResponse{Node: n, UserProfile: &user}
	}
	t.Fatalf("no %s", fqdn)
	return nil
}

func TestMatches(t *testing.T) {
	offline, shared := recorded(t, "offline"), recorded(t, "shared")
	edge := identityOf(whois(t, offline, "edge-a.tn.example."), "tn.example")
	friend := identityOf(whois(t, offline, "friend.tn.example."), "tn.example")
	stranger := identityOf(whois(t, shared, "edge-a.other.example."), "tn.example")
	// As Headscale names users that have no domain.
	bare := friend
	bare.User = "friend"
	for _, c := range []struct {
		id      Identity
		pattern string
		want    bool
	}{
		{edge, "tag:edge", true},
		{edge, "TAG:Edge", true},
		{edge, " tag:edge ", true},
		{edge, "tag:edg", false},
		{edge, "tag:", false},
		{edge, "edge", false},
		{edge, "edge-a", true},
		{edge, "Edge-A", true},
		{edge, "edge-a.tn.example", true},
		{edge, "edge-a.tn.example.", true},
		{edge, "edge-a.", false},
		{edge, "edge-b", false},
		{edge, ".tn.example", false},
		{edge, "tn.example", false},
		{edge, "", false},
		{edge, " ", false},
		{edge, ".", false},
		{edge, "@", false},
		{edge, "tagged-devices", false},
		{edge, "tagged-devices@", false},
		{edge, "friend@vsq.cz", false},
		{friend, "friend@vsq.cz", true},
		{friend, "Friend@VSQ.cz", true},
		{friend, "friend@vsq.c", false},
		{friend, "@vsq.cz", false},
		{friend, "friend@", false},
		{friend, "friend", true}, // the node's name
		{friend, "tag:edge", false},
		{bare, "friend@", true},
		{bare, "friend@vsq.cz", false},
		{stranger, "edge-a", false},
		{stranger, "edge-a.tn.example", false},
		{stranger, "tag:edge", false},
		{stranger, "edge-a.other.example", true},
		{Identity{}, "", false},
		{Identity{}, ".", false},
		{Identity{}, "@", false},
		{Identity{}, "tag:", false},
	} {
		if got := c.id.Matches(c.pattern); got != c.want {
			t.Errorf("%s matches %q: %v", c.id, c.pattern, got)
		}
	}
	if edge.User != "" || edge.DisplayName != "" {
		t.Errorf("a tagged node has a user: %+v", edge)
	}
	if s := edge.String(); s != "edge-a (tag:edge)" {
		t.Error(s)
	}
	if s := stranger.String(); s != "edge-a.other.example (tag:edge)" {
		t.Error(s)
	}
}

func TestContains(t *testing.T) {
	for a, want := range map[string]bool{
		"100.64.0.0": true, "100.127.255.255": true, "100.63.255.255": false, "100.128.0.0": false, "::ffff:100.64.0.1": true,
		"fd7a:115c:a1e0::": true, "fd7a:115c:a1e0:ffff::1": true, "fd7a:115c:a1e1::": false, "127.0.0.1": false, "::1": false,
	} {
		if got := Contains(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	if Contains(netip.Addr{}) {
		t.Error("no address is contained")
	}
}

// TestNamesake: of a machine that was set up anew, and so got a name with a number, the one that is online is found.
//
// +checklocksignore
func TestNamesake(t *testing.T) {
	for _, c := range []struct {
		asked string
		nodes string // besides those of the record, ! before one that is offline
		want  string
	}{
		{"laptop", "laptop-1", "laptop-1"},
		{"laptop.tn.example", "laptop-12", "laptop-12"},
		{"laptop", "!laptop-1 laptop-2", "laptop-2"},
		{"laptop", "!laptop-1", ""},
		{"laptop", "laptop-x laptop2 laptops laptop- old-laptop", ""},
		{"laptop-1", "!laptop-1 laptop-3", "laptop-3"},
		{"home", "home-1", ""}, // it is online itself
		{"laptop", "laptop-1.other.example", ""},
		{"nobody", "nobody-1", ""},
	} {
		st := recorded(t, "offline")
		var some ipnstate.PeerStatus
		for _, p := range st.Peer {
			some = *p
		}
		for i, name := range strings.Fields(c.nodes) {
			p := some
			name, offline := strings.CutPrefix(name, "!")
			if !strings.Contains(name, ".") {
				name += ".tn.example"
			}
			p.ID, p.NodeID, p.DNSName, p.Online, p.TailscaleIPs = "", tailcfg.NodeID(1000+i), name+".", !offline, nil
			st.Peer[key.NewNode().Public()] = &p
		}
		cl := New("none", slog.New(slog.DiscardHandler))
		if got := cl.Namesake(c.asked); got != "" {
			t.Errorf("it knows %q without a table", got)
		}
		cl.table = newTable(st, time.Now())
		if got := cl.Namesake(c.asked); got != c.want {
			t.Errorf("of %s beside %s: %q, want %q", c.asked, c.nodes, got, c.want)
		}
	}
}
