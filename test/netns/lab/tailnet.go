package lab

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/client/local"
	"tailscale.com/derp/derpserver"
	"tailscale.com/ipn"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// MagicDNSDomain ends the nodes' full names: "home.tn.example".
const MagicDNSDomain = "tn.example"

// Tailnet is the private tailnet of a world: control, DERP and STUN in this process, on the router.
type Tailnet struct {
	Control *testcontrol.Server
	Nodes   []*Node

	world *World
	bin   string // tailscaled

	mu     sync.Mutex
	tagged map[key.NodePublic]bool
}

// Node is a host's tailscaled.
type Node struct {
	Name     string // "edge-a"
	FQDN     string // "edge-a.tn.example"
	IP4, IP6 netip.Addr
	Tags     []string // empty: the node belongs to TestUser
	Local    *local.Client
	Socket   string // of the LocalAPI, seen from outside; on the host it is tailscaled's default

	host *Host
	proc *Process
}

const (
	taggedDevices tailcfg.UserID = 9000 // as control names the owner of all tagged nodes
	friendUser    tailcfg.UserID = 9001
)

// nodeTags is who is in the tailnet. A node that asks for tags gets these instead.
var nodeTags = map[string][]string{
	"edge-a": {"tag:edge"}, "edge-b": {"tag:edge"}, "home": {"tag:home"}, "laptop": {"tag:laptop"}, "friend": nil,
}

func (w *World) startTailnet(ctx context.Context, tailscaled string) error {
	t := &Tailnet{world: w, bin: tailscaled, tagged: map[key.NodePublic]bool{}}
	w.Tailnet = t
	if err := t.startControl(); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	for _, h := range w.hosts {
		if tags, ok := nodeTags[h.Name]; ok {
			h.Node = &Node{
				Name: h.Name, FQDN: h.Name + "." + MagicDNSDomain, Tags: tags, host: h,
				Socket: filepath.Join(h.Dir, "run/tailscale/tailscaled.sock"),
			}
			h.Node.Local = &local.Client{Socket: h.Node.Socket, UseSocketOnly: true}
			t.Nodes = append(t.Nodes, h.Node)
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range t.Nodes {
		g.Go(func() error {
			if err := n.Start(); err != nil {
				return err
			}
			return n.Wait(gctx)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	w.options.Progress("lab: tailnet of %d nodes is up", len(t.Nodes))
	return nil
}

// startControl serves control on :8080, DERP on :8443 and STUN on :3478 of Control4, which no other namespace
// reaches.
func (t *Tailnet) startControl() error {
	w, addr := t.world, Control4.String()
	controlLn, err := w.Inet.Listen("tcp", addr+":8080")
	if err != nil {
		return err
	}
	derpLn, err := w.Inet.Listen("tcp", addr+":8443")
	if err != nil {
		controlLn.Close()
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	stun := stunserver.New(ctx)
	if err := w.Inet.inNet(func() error { return stun.Listen(addr + ":3478") }); err != nil {
		cancel()
		controlLn.Close()
		derpLn.Close()
		return err
	}
	go stun.Serve()

	quiet := log.New(io.Discard, "", 0)
	derp := derpserver.New(key.NewNode(), logger.Discard)
	derpHTTP := httptest.NewUnstartedServer(derpserver.AddWebSocketSupport(derp, derpserver.Handler(derp)))
	derpHTTP.Listener.Close()
	derpHTTP.Listener = derpLn
	derpHTTP.Config.ErrorLog = quiet
	// DERP upgrades HTTP/1.1 only
	derpHTTP.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	derpHTTP.StartTLS()

	t.Control = &testcontrol.Server{
		Logf:            logger.Discard,
		ExplicitBaseURL: "http://" + addr + ":8080",
		MagicDNSDomain:  MagicDNSDomain,
		AllOnline:       true,
		DNSConfig:       &tailcfg.DNSConfig{Proxied: true, Domains: []string{MagicDNSDomain}},
		DERPMap: &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{1: {
			RegionID: 1, RegionCode: "lab", RegionName: "Lab", Nodes: []*tailcfg.DERPNode{{
				Name: "1a", RegionID: 1, HostName: addr, IPv4: addr, IPv6: "none",
				DERPPort: 8443, STUNPort: 3478, STUNTestIP: addr, InsecureForTests: true,
			}},
		}}},
		DefaultNodeCapabilities: &tailcfg.NodeCapMap{
			tailcfg.CapabilityHTTPS: nil, tailcfg.CapabilityFileSharing: nil, tailcfg.NodeAttrMagicDNSPeerAAAA: nil,
		},
		HoldMapRequest:         t.tag,
		ModifyFirstMapResponse: addProfiles,
	}
	// testcontrol makes its noise key at the first GET of /key; a node that comes before makes it panic.
	t.Control.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/key?v=1", nil))
	control := &http.Server{Handler: t.Control, ErrorLog: quiet}
	go control.Serve(controlLn)
	w.onClose(func() {
		control.Close()
		derpHTTP.CloseClientConnections()
		derpHTTP.Close()
		derp.Close()
		cancel()
	})
	return nil
}

// tag gives a node its tags or its user. testcontrol calls it for each map request before it looks at the
// node, and the first request of a node comes before anyone else touches that node, so nothing is
// overwritten.
func (t *Tailnet) tag(req *tailcfg.MapRequest) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.Control.Node(req.NodeKey)
	if n == nil || t.tagged[req.NodeKey] {
		return nil
	}
	t.tagged[req.NodeKey] = true
	name, _, _ := strings.Cut(n.Name, ".")
	n.Tags, n.User = nodeTags[name], friendUser
	if n.Hostinfo.RequestTags().Len() > 0 { // tailscale up --advertise-tags
		n.Tags = n.Hostinfo.RequestTags().AsSlice()
	}
	if len(n.Tags) > 0 {
		n.User = taggedDevices
	}
	t.Control.UpdateNode(n)
	return nil
}

// addProfiles tells a client about the users that tag assigns; clients remember profiles.
func addProfiles(res *tailcfg.MapResponse, _ *tailcfg.MapRequest) {
	res.UserProfiles = append(res.UserProfiles,
		tailcfg.UserProfile{ID: taggedDevices, LoginName: "tagged-devices", DisplayName: "Tagged Devices"},
		tailcfg.UserProfile{ID: friendUser, LoginName: TestUser, DisplayName: "A Friend"})
}

// Start starts the node's tailscaled, at first or again after [Node.Stop]; it keeps its identity.
func (n *Node) Start() error {
	state := filepath.Join(n.host.Dir, "tailscale")
	if err := errors.Join(os.MkdirAll(state, 0o700), os.MkdirAll(filepath.Dir(n.Socket), 0o755)); err != nil {
		return err
	}
	conf, err := json.Marshal(map[string]any{
		"version": "alpha0", "Locked": false, "ServerURL": n.host.world.Tailnet.Control.ExplicitBaseURL,
		"AuthKey": "tskey-auth-lab", "Hostname": n.Name, "acceptDNS": true,
	})
	if err != nil {
		return err
	}
	confFile := filepath.Join(state, "conf.json")
	if err := os.WriteFile(confFile, conf, 0o600); err != nil {
		return err
	}
	argv := []string{
		n.host.world.Tailnet.bin, "--tun=tailscale0", "--statedir=" + state, "--socket=/run/tailscale/tailscaled.sock",
		"--port=41641", "--no-logs-no-support", "--config=" + confFile,
	}
	prepare := func(c *Cmd) {
		c.Env = append(c.Env, "TS_LOGS_DIR="+state, "TS_DEBUG_FIREWALL_MODE=nftables", "TS_DISABLE_PORTMAPPER=1",
			"TS_PANIC_IF_HIT_MAIN_CONTROL=1")
	}
	if n.proc != nil {
		return n.proc.start(argv, prepare)
	}
	n.proc, err = n.host.StartProcess("tailscaled", argv, prepare)
	return err
}

// Stop ends the node's tailscaled; the others still have the node in their netmap.
func (n *Node) Stop() { n.proc.Stop(pollInterval * 100) }

// Process is the node's tailscaled, for its log and signals.
func (n *Node) Process() *Process { return n.proc }

// Wait waits until the node is running and knows every other node with its tags.
func (n *Node) Wait(ctx context.Context) error {
	return n.proc.waitFor(ctx, "in the tailnet", func() error {
		st, err := n.Local.Status(ctx)
		if err != nil {
			return err
		}
		if st.BackendState != ipn.Running.String() {
			return fmt.Errorf("state is %s: %v", st.BackendState, st.Health)
		}
		for _, other := range n.host.world.Tailnet.Nodes {
			if other == n {
				continue
			}
			known := false
			for _, p := range st.Peer {
				known = known || strings.TrimSuffix(p.DNSName, ".") == other.FQDN &&
					(p.Tags == nil && len(other.Tags) == 0 || p.Tags != nil && slices.Equal(p.Tags.AsSlice(), other.Tags))
			}
			if !known {
				return fmt.Errorf("does not see %s %v", other.FQDN, other.Tags)
			}
		}
		n.IP4, n.IP6 = st.TailscaleIPs[0], st.TailscaleIPs[1]
		return nil
	})
}

// WaitDirect waits until packets to the other node go directly, not by DERP, and returns the endpoint that
// they go to.
func (n *Node) WaitDirect(ctx context.Context, other *Node) (netip.AddrPort, error) {
	var direct netip.AddrPort
	err := n.proc.waitFor(ctx, "directly connected to "+other.Name, func() error {
		// a ping that is lost, tailscaled never answers
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		pr, err := n.Local.Ping(ctx, other.IP4, tailcfg.PingDisco)
		if err != nil {
			return err
		}
		if pr.Err != "" {
			return errors.New(pr.Err)
		}
		if pr.Endpoint == "" {
			return fmt.Errorf("the path is by DERP %s", pr.DERPRegionCode)
		}
		direct, err = netip.ParseAddrPort(pr.Endpoint)
		return err
	})
	return direct, err
}
