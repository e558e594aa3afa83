package lab

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"
)

// Both edges originate the anycast prefixes from one AS, as two sites of one operator do; the router is
// another AS.
const (
	edgeAS   = 64511
	routerAS = 64500
)

var anycastPrefixes = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("2001:db8:80::/48")}

// bfd finds a silent cut in under a second. Slower than routers do it, so that a busy test machine is not a
// cut. Without it a cut would be found when BGP's hold time is over, for which no test waits.
const bfdConf = `
protocol device { scan time 10; }
protocol bfd {
	interface "*" { min rx interval 150 ms; min tx interval 150 ms; idle tx interval 500 ms; multiplier 6; };
}
template bgp session {
	direct;
	bfd on;
	hold time 240; keepalive time 80;
	connect delay time 1; connect retry time 1; error wait time 1, 2; error forget time 5;
}
`

// anycast is the routing daemons of a world.
type anycast struct {
	world *World
	birds map[*Host]*Process
}

// startAnycast announces the anycast prefixes of both edges, edge A preferred, and waits until the router
// follows.
func (w *World) startAnycast(ctx context.Context) error {
	if w.options.NoAnycast {
		return w.Prefer(ctx, w.EdgeA)
	}
	a := &anycast{world: w, birds: map[*Host]*Process{}}
	w.bird = a
	var router strings.Builder
	fmt.Fprintf(&router, "router id %v;\n%s", Control4, bfdConf)
	router.WriteString(`
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }
protocol kernel { ipv6 { import none; export where source = RTS_BGP; }; }
`)
	for _, e := range w.Edges() {
		u := e.current
		for i, p := range []netip.Prefix{u.ip4, u.ip6} {
			fmt.Fprintf(&router, `
protocol bgp %s%d from session {
	local %v as %d; neighbor %v as %d;
	ipv%[2]d { import where net = %[7]v; export none; };
}
`, strings.ReplaceAll(e.Name, "-", "_"), 4+2*i, gateway(p).Addr(), routerAS, p.Addr(), edgeAS, anycastPrefixes[i])
		}
	}
	if err := a.start(ctx, w.Inet, router.String()); err != nil {
		return err
	}
	for _, e := range w.Edges() {
		if err := a.start(ctx, e, edgeConf(e, e == w.EdgeA)); err != nil {
			return err
		}
	}
	if err := w.waitRoute(ctx, w.EdgeA); err != nil {
		return err
	}
	w.options.Progress("lab: both edges announce %v and %v", anycastPrefixes[0], anycastPrefixes[1])
	return nil
}

// edgeConf announces the prefixes; an edge that is not preferred makes its AS path longer.
func edgeConf(e *Host, preferred bool) string {
	export := "accept;"
	if !preferred {
		export = fmt.Sprintf("bgp_path.prepend(%d); bgp_path.prepend(%[1]d); accept;", edgeAS)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "router id %v;\n%s", e.current.ip4.Addr(), bfdConf)
	for i, p := range []netip.Prefix{e.current.ip4, e.current.ip6} {
		fmt.Fprintf(&b, `
protocol static { ipv%[1]d; route %[2]v blackhole; }
protocol bgp router%[1]d from session {
	local %[3]v as %[4]d; neighbor %[5]v as %[6]d;
	ipv%[1]d { import none; export filter { if net = %[2]v then { %[7]s } reject; }; };
}
`, 4+2*i, anycastPrefixes[i], p.Addr(), edgeAS, gateway(p).Addr(), routerAS, export)
	}
	return b.String()
}

// BirdConfig is the configuration of a host's bird, where Debian's package has it. Its control socket is
// where birdc looks for it.
const BirdConfig = "/etc/bird/bird.conf"

func (a *anycast) start(ctx context.Context, h *Host, conf string) error {
	if err := h.WriteFile(BirdConfig, []byte("log stderr all;\n"+conf), 0o644); err != nil {
		return err
	}
	if _, err := h.Sh(ctx, "mkdir -p /run/bird"); err != nil {
		return err
	}
	p, err := h.StartProcess("bird", []string{"bird", "-f"}, nil)
	if err != nil {
		return err
	}
	a.birds[h] = p
	return p.waitFor(ctx, "ready", func() error {
		_, err := h.Command(ctx, "birdc", "show", "status").Output()
		return err
	})
}

// Prefer has the client's traffic to the anycast addresses go to the given edge, without cutting the other
// off: the other one announces a longer path. It waits until the router has changed its mind. Established
// connections that went through the other edge break, as in the real world.
func (w *World) Prefer(ctx context.Context, edge *Host) error {
	if w.bird == nil {
		for i, p := range []netip.Prefix{edge.current.ip4, edge.current.ip6} {
			if err := w.Inet.route(anycastPrefixes[i], edge.current.routerDev, p.Addr()); err != nil {
				return err
			}
		}
		return nil
	}
	for _, e := range w.Edges() {
		if err := e.WriteFile(BirdConfig, []byte("log stderr all;\n"+edgeConf(e, e == edge)),
			0o644); err != nil {
			return err
		}
		if _, err := e.Command(ctx, "birdc", "configure").Output(); err != nil {
			return fmt.Errorf("%s: change the announcement: %w", e.Name, err)
		}
	}
	return w.waitRoute(ctx, edge)
}

// Route says which edge the router would send a packet for the anycast address to; nil if none.
func (w *World) Route(a netip.Addr) *Host {
	routes, err := w.Inet.nl.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return nil
	}
	for _, e := range w.Edges() {
		link, err := w.Inet.nl.LinkByName(e.uplinks[0].routerDev)
		if err == nil && link.Attrs().Index == routes[0].LinkIndex {
			return e
		}
	}
	return nil
}

func (w *World) waitRoute(ctx context.Context, edge *Host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for w.Route(Anycast4) != edge || w.Route(Anycast6) != edge {
		if sleep(ctx, pollInterval/2) != nil {
			state, _ := w.Inet.Command(context.Background(), "birdc", "show", "protocols",
				"all").Output()
			return fmt.Errorf("the router does not route %v to %s\n%s\n%s", Anycast4, edge.Name, state,
				(&Process{Log: filepath.Join(edge.Dir, "log", "bird.log")}).tail(30))
		}
	}
	return nil
}
