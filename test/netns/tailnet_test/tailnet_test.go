package tailnet_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/types/preftype"
)

// TestTailnet is one world, whose netmap and daemons change under a client.
func TestTailnet(t *testing.T) {
	w := lab.Start(t, lab.Options{NoAnycast: true, NoDocker: true, Friend: true})
	c, changes := follow(t, w.Home)
	control := w.Tailnet.Control
	node := func(h *lab.Host) *tailcfg.Node { // control's copy
		for _, n := range control.AllNodes() {
			if n.Addresses[0].Addr() == h.Node.IP4 {
				return n
			}
		}
		t.Fatalf("control doesn't know %s", h.Name)
		return nil
	}
	at := func(name string, want ...netip.Addr) error {
		got, err := c.Resolve(t.Context(), name)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("%s is at %s, want %s", name, got, want)
		}
		return err
	}
	laptop, friend := w.Laptop.Node, w.Friend.Node

	t.Run("resolve", func(t *testing.T) {
		both := []netip.Addr{laptop.IP4, laptop.IP6}
		for name, want := range map[string][]netip.Addr{
			"laptop": both, "LapTop": both, "laptop.": both, "laptop.tn.example": both, "laptop.TN.example.": both,
			laptop.IP4.String():               {laptop.IP4},
			laptop.IP6.String():               {laptop.IP6},
			"::ffff:" + laptop.IP4.String():   {laptop.IP4},
			strings.ToUpper(w.Home.Node.FQDN): {w.Home.Node.IP4, w.Home.Node.IP6},
		} {
			if err := at(name, want...); err != nil {
				t.Error(err)
			}
			if got, err := c.Refresh(t.Context(), name); err != nil || !slices.Equal(got, want) {
				t.Errorf("refreshed, %s is at %s, %v", name, got, err)
			}
		}
		for name, says := range map[string]string{
			"labtop": `did you mean "laptop"?`, "labtop.tn.example": `did you mean "laptop.tn.example"?`,
			"something":    "it has edge-a, edge-b, friend, laptop",
			"100.64.99.99": "no node of this tailnet has the address 100.64.99.99",
			"":             "no node", "laptop.other.example": "no node", "127.0.0.1": "no node",
		} {
			_, err := c.Resolve(t.Context(), name)
			if err := refused(err, tailnet.KindUnknownNode, says); err != nil {
				t.Error(err)
			}
		}
		self, err := c.SelfAddrs(t.Context())
		if err != nil || !slices.Equal(self, []netip.Addr{w.Home.Node.IP4, w.Home.Node.IP6}) {
			t.Errorf("home itself is at %s, %v", self, err)
		}
		if online, _, ok := c.Presence("laptop"); !online || !ok {
			t.Errorf("laptop is online %v, known %v", online, ok)
		}
	})

	t.Run("who is", func(t *testing.T) {
		socket, asked := counting(t, w.Home.Node.Socket)
		c, _ := followAt(t, socket)
		for _, n := range w.Tailnet.Nodes {
			for _, a := range []netip.Addr{n.IP4, n.IP6, netip.AddrFrom16(n.IP4.As16())} {
				id, err := c.WhoIs(t.Context(), a)
				if err != nil {
					t.Fatal(err)
				}
				user := ""
				if n == friend {
					user = lab.TestUser
				}
				if id.Node != n.Name || id.FQDN != n.FQDN || id.User != user ||
					!slices.Equal(id.Tags, n.Tags) || id.Shared ||
					!slices.Equal(id.Addrs, []netip.Addr{n.IP4, n.IP6}) {
					t.Errorf("%s is %+v", a, id)
				}
				for _, p := range []string{n.Name, n.FQDN, n.FQDN + "."} {
					if !id.Matches(p) {
						t.Errorf("%s does not match %q", id, p)
					}
				}
				for _, p := range []string{"tag:edge", "tag:home", "tag:laptop"} {
					if id.Matches(p) != slices.Contains(n.Tags, p) {
						t.Errorf("%s matches %q: %v", id, p, id.Matches(p))
					}
				}
				if id.Matches(lab.TestUser) != (n == friend) || id.Matches("tagged-devices") {
					t.Errorf("%s: its user", id)
				}
			}
		}
		for _, a := range []string{"192.0.2.1", "100.64.99.99", "fd7a:115c:a1e0::9999", "127.0.0.1", "::1"} {
			before := asked.Load()
			if _, err := c.WhoIs(t.Context(), netip.MustParseAddr(a)); !errors.Is(err, tailnet.ErrNotPeer) {
				t.Errorf("%s: %v", a, err)
			}
			if n := asked.Load() - before; n > 1 {
				t.Errorf("to know nothing of %s took %d questions", a, n)
			}
		}
		if asked.Load() == 0 {
			t.Error("the questions are not counted")
		}
		before, began := asked.Load(), time.Now()
		for range 1000 {
			if _, err := c.WhoIs(t.Context(), laptop.IP4); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("a remembered identity takes %s", time.Since(began)/1000)
		if n := asked.Load() - before; n > 1 { // one, if the netmap has changed meanwhile
			t.Errorf("a remembered identity was asked for %d times", n)
		}
		began = time.Now()
		for range 1000 {
			if _, err := c.Resolve(t.Context(), "laptop"); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("a name takes %s", time.Since(began)/1000)
		began = time.Now()
		for range 100 {
			if _, err := c.Refresh(t.Context(), "laptop"); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("a name asked for anew takes %s", time.Since(began)/100)
	})

	t.Run("a node is given a tag", func(t *testing.T) {
		n := node(w.Friend)
		if id, err := c.WhoIs(t.Context(), friend.IP4); err != nil || id.Matches("tag:edge") {
			t.Fatalf("%v, %v", id, err)
		}
		changes.forget()
		n.Tags = []string{"tag:edge"}
		control.UpdateNode(n)
		took := eventually(t, func() error {
			id, err := c.WhoIs(t.Context(), friend.IP4)
			if err == nil && !id.Matches("tag:edge") {
				err = fmt.Errorf("it is still %s", id)
			}
			return err
		})
		t.Logf("known after %s", took)
		changes.wait(t, "the tag")
		n.Tags = nil
		control.UpdateNode(n)
		eventually(t, func() error {
			id, err := c.WhoIs(t.Context(), friend.IP4)
			if err == nil && (id.Matches("tag:edge") || !id.Matches(lab.TestUser)) {
				err = fmt.Errorf("it is still %s", id)
			}
			return err
		})
	})

	t.Run("an address is given to another node", func(t *testing.T) {
		n, m := node(w.Friend), node(w.Laptop)
		give := func(n *tailcfg.Node, a []netip.Prefix) {
			n = n.Clone()
			n.Addresses, n.AllowedIPs = a, a
			control.UpdateNode(n)
		}
		isWho := func(a netip.Addr, who string) error {
			id, err := c.WhoIs(t.Context(), a)
			if err == nil && id.Node != who {
				err = fmt.Errorf("%s is %s, want %s", a, id, who)
			}
			return err
		}
		for a, who := range map[netip.Addr]string{friend.IP4: "friend", laptop.IP4: "laptop"} {
			if err := isWho(a, who); err != nil {
				t.Fatal(err)
			}
		}
		changes.forget()
		give(n, m.Addresses)
		give(m, n.Addresses)
		took := eventually(t, func() error {
			return errors.Join(isWho(friend.IP4, "laptop"), isWho(laptop.IP4, "friend"),
				at("friend", laptop.IP4, laptop.IP6))
		})
		t.Logf("known after %s", took)
		changes.wait(t, "the addresses")
		give(m, m.Addresses)
		give(n, n.Addresses)
		eventually(t, func() error {
			return errors.Join(isWho(friend.IP4, "friend"), at("laptop", laptop.IP4, laptop.IP6))
		})
	})

	t.Run("another tailnet shares a node of the same name", func(t *testing.T) {
		n := node(w.Friend)
		own := n.Name
		n.Name = "edge-a.other.example."
		n.Tags = []string{"tag:edge"}
		control.UpdateNode(n)
		eventually(t, func() error { return at("edge-a.other.example", friend.IP4, friend.IP6) })
		if err := at("edge-a", w.EdgeA.Node.IP4, w.EdgeA.Node.IP6); err != nil {
			t.Error(err)
		}
		_, err := c.Resolve(t.Context(), "friend")
		if err := refused(err, tailnet.KindUnknownNode); err != nil {
			t.Error(err)
		}
		id, err := c.WhoIs(t.Context(), friend.IP4)
		if err != nil {
			t.Fatal(err)
		}
		if !id.Shared || id.Matches("edge-a") || id.Matches("edge-a.tn.example") || id.Matches("tag:edge") ||
			!id.Matches("edge-a.other.example") {
			t.Errorf("a stranger's edge-a passes for ours: %+v", id)
		}
		record(t, w.Home, "shared")
		n.Name, n.Tags = own, nil
		control.UpdateNode(n)
		eventually(t, func() error { return at("friend", friend.IP4, friend.IP6) })
	})

	t.Run("a client without a watch", func(t *testing.T) {
		c := tailnet.New(w.Home.Node.Socket, nil)
		if got, err := c.Resolve(t.Context(), "laptop"); err != nil || got[0] != laptop.IP4 {
			t.Errorf("%s, %v", got, err)
		}
		n := node(w.Laptop)
		n.Name = "phone.tn.example."
		control.UpdateNode(n)
		eventually(t, func() error {
			_, err := c.Resolve(t.Context(), "phone")
			return err
		})
		n.Name = "laptop.tn.example."
		control.UpdateNode(n)
		eventually(t, func() error { // for those who dial it next
			_, err := tailnet.New(w.Home.Node.Socket, nil).Resolve(t.Context(), "laptop")
			return err
		})
	})

	t.Run("dial", func(t *testing.T) {
		echo(t, w.Laptop, "tcp4", "0.0.0.0:7004")
		echo(t, w.Laptop, "tcp", "[::]:7006") // both families
		to := func(host string, port uint16) dial.Target {
			return dial.Target{Scheme: dial.Tailnet, Host: host, Port: port}
		}
		for _, test := range []struct {
			r    request
			peer netip.Addr
		}{
			{request{Target: to("laptop", 7006), Prefer: netip.MustParseAddr("192.0.2.1")}, laptop.IP4},
			{request{Target: to("laptop", 7006), Prefer: netip.MustParseAddr("2001:db8::1")}, laptop.IP6},
			{request{Target: to("laptop.tn.example", 7004), Prefer: netip.MustParseAddr("2001:db8::1")}, laptop.IP4}, // refused by IPv6
			{request{Target: to(laptop.IP6.String(), 7006)}, laptop.IP6},
		} {
			res := dialOn(t, w.Home, test.r)
			if want := netip.AddrPortFrom(test.peer, test.r.Target.Port).String(); res.Peer != want {
				t.Errorf("%s led to %q: %s", test.r.Target, res.Peer, res.Err)
			}
		}
		for _, test := range []struct {
			host string
			port uint16
			want dial.Reason
			says string
		}{
			{"laptop", 7999, dial.Refused, "nothing listens there"},
			{"labtop", 7006, dial.UnknownNode, `did you mean "laptop"?`},
		} {
			res := dialOn(t, w.Home, request{Target: to(test.host, test.port)})
			if res.Reason != test.want || !strings.Contains(res.Err, test.says) {
				t.Errorf("%s:%d: %+v", test.host, test.port, res)
			}
		}
		// A host that has no tailscaled.
		res := dialOn(t, w.Client, request{Target: to("laptop", 7006), Timeout: 10 * patience})
		if res.Reason != dial.NoTailscaled || !strings.Contains(res.Err, "tailscaled.sock") ||
			res.Took > patience {
			t.Errorf("%+v", res)
		}
	})

	t.Run("the peer is switched off", func(t *testing.T) {
		w.EdgeB.Node.Stop()
		target := dial.Target{Scheme: dial.Tailnet, Host: "edge-b", Port: 7000}
		res := dialOn(t, w.Home, request{Target: target, Timeout: 2 * time.Second})
		// The lab's control says so of all.
		if res.Reason != dial.Timeout || !strings.Contains(res.Err, "edge-b is online") {
			t.Errorf("%+v", res)
		}
		if err := w.EdgeB.Node.Start(); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("a way around the tailnet", func(t *testing.T) {
		// Home loses its routes, its firewall is not tailscaled's business, and at
		// its router somebody has the laptop's address.
		filter := &ipn.MaskedPrefs{NetfilterModeSet: true}
		filter.NetfilterMode = preftype.NetfilterOff
		if _, err := w.Home.Node.Local.EditPrefs(t.Context(), filter); err != nil {
			t.Fatal(err)
		}
		if _, err := w.NAT.Sh(t.Context(), "ip addr add "+laptop.IP4.String()+"/32 dev lo"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.NAT.Sh(t.Context(),
			"nft add rule inet filter input tcp dport 7008 accept"); err != nil {
			t.Fatal(err)
		}
		echo(t, w.NAT, "tcp4", "0.0.0.0:7008")
		routes, err := w.Home.Sh(t.Context(), "ip -4 route show table 52")
		if err != nil || !strings.Contains(routes, "tailscale0") {
			t.Fatalf("%v: %q", err, routes)
		}
		if _, err := w.Home.Sh(t.Context(), "ip -4 route flush table 52"); err != nil {
			t.Fatal(err)
		}
		res := dialOn(t, w.Home, request{Target: dial.Target{Scheme: dial.Tailnet, Host: laptop.IP4.String(),
			Port: 7008}})
		if res.Reason != dial.TailscaleDown || !strings.Contains(res.Err, "not through the tailnet") {
			t.Errorf("an impostor was taken for the laptop: %+v", res)
		}
		var back strings.Builder
		for r := range strings.Lines(routes) {
			fmt.Fprintf(&back, "ip route add table 52 %s\n", strings.TrimSpace(r))
		}
		if _, err := w.Home.Sh(t.Context(), back.String()); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("tailscaled restarts", func(t *testing.T) {
		changes.forget()
		w.Home.Node.Stop()
		took := eventually(t, func() error {
			_, err := c.Resolve(t.Context(), "laptop")
			return refused(err, tailnet.KindAbsent, w.Home.Node.Socket, "systemctl")
		})
		t.Logf("gone after %s", took)
		changes.wait(t, "its end")
		if _, err := c.WhoIs(t.Context(), laptop.IP4); refused(err, tailnet.KindAbsent) != nil {
			t.Errorf("an identity is still believed: %v", err)
		}
		if _, err := c.SelfAddrs(t.Context()); refused(err, tailnet.KindAbsent) != nil {
			t.Errorf("%v", err)
		}
		if err := w.Home.Node.Start(); err != nil {
			t.Fatal(err)
		}
		took = eventually(t, func() error { return at("laptop", laptop.IP4, laptop.IP6) })
		t.Logf("back after %s", took)
		changes.wait(t, "its return")
	})

	t.Run("tailscaled hangs", func(t *testing.T) {
		if err := w.Home.Node.Process().Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer w.Home.Node.Process().Signal(syscall.SIGCONT)
		eventually(t, func() error { // its threads stop one by one
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", w.Home.Node.Process().Pid()))
			for _, f := range threads {
				if b, _ := os.ReadFile(f); !strings.Contains(string(b), ") T ") {
					return fmt.Errorf("%s: %s", f, b)
				}
			}
			return err
		})
		quickest := patience
		for try := 0; try < 10 && quickest > time.Second; try++ { // to ask would take seconds each time
			began := time.Now()
			if err := at("laptop", laptop.IP4, laptop.IP6); err != nil {
				t.Error(err)
			}
			quickest = min(quickest, time.Since(began))
		}
		if quickest > time.Second {
			t.Errorf("what is known took %s", quickest)
		}
		_, err := c.WhoIs(t.Context(), netip.MustParseAddr("100.64.77.77"))
		if err := refused(err, tailnet.KindAbsent, "does not answer"); err != nil {
			t.Error(err)
		}
		_, err = tailnet.New(w.Home.Node.Socket, nil).Resolve(t.Context(), "laptop")
		if err := refused(err, tailnet.KindAbsent, "does not answer"); err != nil {
			t.Error(err)
		}
	})

	t.Run("switched off and on", func(t *testing.T) {
		eventually(t, func() error { return at("laptop", laptop.IP4, laptop.IP6) })
		want := func(on bool) {
			t.Helper()
			prefs := &ipn.MaskedPrefs{WantRunningSet: true}
			prefs.WantRunning = on
			if _, err := w.Home.Node.Local.EditPrefs(t.Context(), prefs); err != nil {
				t.Fatal(err)
			}
		}
		changes.forget()
		want(false)
		eventually(t, func() error {
			_, err := c.Resolve(t.Context(), "laptop")
			return refused(err, tailnet.KindDown, "switched off", "tailscale up")
		})
		changes.wait(t, "the switch")
		if _, err := c.WhoIs(t.Context(), laptop.IP4); refused(err, tailnet.KindDown) != nil {
			t.Errorf("an identity is still believed: %v", err)
		}
		want(true)
		took := eventually(t, func() error { return at("laptop", laptop.IP4, laptop.IP6) })
		t.Logf("on again after %s", took)
	})

	t.Run("certificates", func(t *testing.T) {
		domains, err := c.CertDomains(t.Context())
		if err != nil || !slices.Equal(domains, []string{"home.tn.example"}) {
			t.Errorf("%q, %v", domains, err)
		}
	})

	// The last ones leave a tailnet that serves no further test.
	t.Run("a listener follows its node's addresses", func(t *testing.T) {
		n := node(w.Home).Clone()
		listenerFollows(t, w.Home, w.Laptop, n.Addresses, func(a []netip.Prefix) {
			n := n.Clone()
			n.Addresses, n.AllowedIPs = a, a
			control.UpdateNode(n) // for the others; to the node itself testcontrol says always the same
			if !control.AddRawMapResponse(n.Key, &tailcfg.MapResponse{Node: n}) {
				t.Fatal("home has no connection to control")
			}
		})
	})

	t.Run("a peer goes offline", func(t *testing.T) {
		n := node(w.Laptop)
		seen, offline := time.Now().Add(-time.Hour).Truncate(time.Second), false
		changes.forget()
		if !control.AddRawMapResponse(node(w.Home).Key, &tailcfg.MapResponse{
			PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: n.ID, Online: &offline, LastSeen: &seen}},
		}) {
			t.Fatal("home has no connection to control")
		}
		eventually(t, func() error {
			if online, at, ok := c.Presence("laptop"); online || !at.Equal(seen) || !ok {
				return fmt.Errorf("online %v, seen %s, known %v", online, at, ok)
			}
			return nil
		})
		if err := at("laptop", laptop.IP4, laptop.IP6); err != nil {
			t.Errorf("offline, it has no address: %v", err)
		}
		if len(changes.heard) != 0 {
			t.Error("going offline counts as a change of the netmap")
		}
		record(t, w.Home, "offline")
		laptop.Stop()
		res := dialOn(t, w.Home, request{Target: dial.Target{Scheme: dial.Tailnet, Host: "laptop",
			Port: 7004}, Timeout: 10 * patience})
		if res.Reason != dial.NodeOffline || !strings.Contains(res.Err,
			"laptop is offline, last seen 1 h ago") || res.Took > patience {
			t.Errorf("%+v", res)
		}
	})

	t.Run("logged out", func(t *testing.T) {
		c, changes := follow(t, w.Friend)
		changes.forget()
		if err := friend.Local.Logout(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			_, err := c.Resolve(t.Context(), "home")
			return refused(err, tailnet.KindDown, "not logged in", "tailscale up")
		})
		var e *tailnet.Error
		if _, err := c.SelfAddrs(t.Context()); !errors.As(err, &e) || e.State != "NeedsLogin" {
			t.Errorf("%v", err)
		}
	})
}

// record writes a Status down for the unit tests of userspace/tailnet, if RECORD
// names their testdata.
func record(t *testing.T, h *lab.Host, name string) {
	dir := os.Getenv("RECORD")
	if dir == "" {
		return
	}
	st, err := h.Node.Local.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.MarshalIndent(st, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "status-"+name+".json"), append(out, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
