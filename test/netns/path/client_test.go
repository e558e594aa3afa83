package path

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestClientAddress: a container at the end of the path gets the client's own address in headers, in a PROXY
// header, and with transparent on its socket: by IPv4 and IPv6, for requests and for plain TCP in userspace
// and by sockmap, for the public and for the tailnet's users. Where that can't be the reason is counted.
// Nothing of it outlives the daemon, and what a killed one leaves is not doubled.
func TestClientAddress(t *testing.T) {
	s := world(t)
	remove, err := s.Docker.Network(t.Context(), "both", netip.MustParsePrefix("172.30.0.0/24"),
		netip.MustParsePrefix("fd30::/64"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	if _, err := s.Docker.RunBlogIn(t.Context(), "both", "both", nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Docker.Remove(context.Background(), "both") })
	if _, err := s.Laptop.Sh(t.Context(), "mount -t bpf bpf /sys/fs/bpf"); err != nil { // pins of its own
		t.Fatal(err)
	}
	second := netip.MustParsePrefix("203.0.113.8/28")
	if err := s.Client.AddAddress(second); err != nil {
		t.Fatal(err)
	}
	routes := `    routes:
      - { host: [` + lab.Site + `], path: /proxy/, strip_prefix: true, forward: "docker://both:8081", send_proxy: v2 }
      - { host: [` + lab.Site + `], path: /transparent/, strip_prefix: true, forward: "docker://both:8080", transparent: true }
      - { host: [` + lab.Site + `], path: /both/, strip_prefix: true, forward: "docker://both:8081", transparent: true, send_proxy: v2 }
      - { host: [` + lab.Site + `], path: /ipv4/, strip_prefix: true, forward: "docker://blog:8080", transparent: true }
`
	routes += `      - { host: [` + lab.Site + `], path: /lost/, forward: "docker://both:8080", transparent: true, timeouts: { connect: 1s } }
`
	config := strings.Replace(laptopConfig, "    routes:\n", routes, 1)
	config = strings.Replace(config, `default: { forward: "127.0.0.1:9000" }`,
		`default: { forward: "docker://both:8080", transparent: true, datapath: sockmap }`, 1)
	config = strings.Replace(config, limits, `  - name: here
    listen: ["127.0.0.1:8082"]
    mode: tcp
    default: { forward: "docker://both:8080", transparent: true }
access_log: { file: /var/log/access.log }
`+limits, 1)
	restart := func(config string) {
		t.Helper()
		if err := s.laptop.SetConfig(config); err != nil {
			t.Fatal(err)
		}
		if err := s.laptop.Restart(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	before := rules(t, s.Laptop)
	restart(strings.ReplaceAll(config, ", transparent: true", ""))
	t.Cleanup(func() {
		restart(laptopConfig)
		if after := rules(t, s.Laptop); after != before {
			t.Errorf("after the daemon's end:\n%s\nwant, as before:\n%s", after, before)
		}
		s.Laptop.Sh(context.Background(), "umount /sys/fs/bpf")
		eventually(t, "the path after all",
			func() error { _, err := s.page(context.Background(), "tcp4"); return err })
	})
	// A reload brings it into force.
	eventually(t, "the daemon without transparent",
		func() error { _, err := s.page(t.Context(), "tcp4"); return err })
	if got := rules(t, s.Laptop); got != before {
		t.Errorf("a daemon that needs none of it has added\n%s\nto\n%s", got, before)
	}
	if err := s.laptop.SetConfig(config); err != nil {
		t.Fatal(err)
	}
	if _, err := s.laptop.CLI(t.Context(), "reload"); err != nil {
		t.Fatal(err)
	}

	type seen struct {
		facts
		Peer string
		XFF  string `json:"x_forwarded_for"`
	}
	// ask requests what the container saw of the request.
	ask := func(web *http.Client, url string) (f seen, err error) {
		res, err := web.Get(url)
		if err != nil {
			return f, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != 200 {
			err = fmt.Errorf("%s: %s", res.Status, b)
		}
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		return f, err
	}
	// want asks until the container says so: its IPv6 address may be a moment old.
	want := func(web *http.Client, url, peer string) (got seen) {
		t.Helper()
		eventually(t, url+" seen from "+peer, func() (err error) {
			if got, err = ask(web, url); err == nil && hostOf(got.Peer) != peer {
				err = fmt.Errorf("the other end of the socket was %s", got.Peer)
			}
			return err
		})
		web.CloseIdleConnections()
		return got
	}
	site, raw := "https://"+lab.Site, "http://"+lab.Site+":9000/headers"
	check := func(t *testing.T) {
		for _, c := range []struct{ network, client string }{
			{"tcp4", "203.0.113.7"}, {"tcp6", "2001:db8:c::7"},
		} {
			web := s.browser(s.Client, c.network, false)
			for _, path := range []string{"/proxy", "/transparent", "/both"} {
				if f := want(web, site+path+"/headers", c.client); f.Client != c.client ||
					!strings.HasPrefix(f.XFF, c.client+", ") {
					t.Errorf("%s: the headers say %q, %q: want %s", path, f.Client, f.XFF, c.client)
				}
			}
			want(web, raw, c.client)
		}
	}
	check(t)
	inForce := rules(t, s.Laptop)
	if inForce == before {
		t.Error("nothing is to be seen of transparent in rules and routes")
	}

	// One connection from home carries the requests of both: they stay apart.
	var all sync.WaitGroup
	for _, from := range []string{"203.0.113.7", second.Addr().String()} {
		web := s.browser(s.Client, "tcp4", true)
		defer web.CloseIdleConnections()
		web.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			return s.Client.DialFrom(ctx, "tcp4", from+":0", addr)
		}
		for range 4 {
			all.Go(func() {
				for i := range 10 {
					path := []string{"/proxy", "/transparent"}[i%2]
					if f, err := ask(web, site+path+"/headers"); err != nil || hostOf(f.Peer) != from {
						t.Errorf("%s from %s: the container saw %q, %v", path, from, f.Peer, err)
					}
				}
			})
		}
	}
	all.Wait()

	friend := s.browser(s.Friend, "tcp4", false)
	friend.Transport = directTo(s, s.Friend, net.JoinHostPort(s.Home.Node.IP4.String(), "443"))
	want(friend, site+"/transparent/headers", s.Friend.Node.IP4.String())

	// Where it can't be: another family; a client that is loopback.
	ipv6 := s.browser(s.Client, "tcp6", false)
	if f, err := ask(ipv6, site+"/ipv4/headers"); err != nil || f.Client != "2001:db8:c::7" ||
		strings.Contains(hostOf(f.Peer), ":") {
		t.Errorf("a container without IPv6 saw %+v, %v", f, err)
	}
	here := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: s.Laptop.Dial,
		DisableKeepAlives: true}}
	want(here, "http://127.0.0.1:8082/headers", "172.30.0.1")
	out, err := s.laptop.CLI(t.Context(), "status", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var st struct {
		Not map[string]int `json:"not_transparent"`
	}
	if err := json.Unmarshal(out, &st); err != nil || st.Not["family"] == 0 ||
		st.Not["client_address"] == 0 || len(st.Not) != 2 {
		t.Errorf("not transparent were %v, %v: want both reasons, and no other", st.Not, err)
	}
	eventually(t, "the access log", func() error {
		log, err := s.Laptop.ReadFile("/var/log/access.log")
		if err == nil && !contains(string(log), `"client":"203.0.113.7"`, `"client":"203.0.113.8"`,
			`"client":"2001:db8:c::7"`) {
			err = fmt.Errorf("it says\n%s", log)
		}
		return err
	})
	// A flow that ends while it is being taken over stays in userspace.
	eventually(t, "a flow through sockmap", func() error {
		want(s.browser(s.Client, "tcp4", false), raw, "203.0.113.7")
		for _, l := range s.laptop.LogLines() {
			if l["msg"] == "flow ended" && l["listener"] == "raw" && l["datapath"] == "sockmap" {
				return nil
			}
		}
		return errors.New("none has ended")
	})

	// A container that can't answer costs the connection, and the log says what it lacks.
	inContainer := func(command string) {
		t.Helper()
		if out, err := s.Laptop.Sh(t.Context(), `for p in /proc/[0-9]*; do
			if [ "$(tr -d '\0' <$p/cmdline)" = /blog ] && nsenter --net=$p/ns/net ip -4 addr | grep -q 172.30.0; then nsenter --net=$p/ns/net `+command+`; exit; fi
		done; exit 1`); err != nil {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	inContainer("ip route del default")
	public := s.browser(s.Client, "tcp4", false)
	if _, err := ask(public, site+"/lost/headers"); err == nil || !strings.Contains(err.Error(), "504") {
		t.Errorf("a container without a way to the client: %v", err)
	}
	if !contains(s.laptop.Output(), "only if this host is its default gateway") {
		t.Error("the log does not say what a container lacks that does not answer")
	}
	inContainer("ip route add default via 172.30.0.1")

	s.laptop.Kill()
	<-s.laptop.Done()
	if left := rules(t, s.Laptop); left != inForce {
		t.Errorf("a killed daemon leaves\n%s\nwant\n%s", left, inForce)
	}
	if err := s.laptop.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(t)
	if again := rules(t, s.Laptop); again != inForce {
		t.Errorf("after a kill and a start:\n%s\nwant\n%s", again, inForce)
	}
}

// rules are a host's policy rules, its routes in tables of nobody else, and the names of its nftables tables.
func rules(t *testing.T, h *lab.Host) string {
	t.Helper()
	out, err := h.Sh(context.Background(), "ip rule; ip -6 rule; ip -4 route show table all proto 116; "+
		"ip -6 route show table all proto 116; nft list tables | sort")
	if err != nil {
		t.Error(err)
	}
	return out
}
