package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// Addresses of the world. They are the documentation ranges, and mean nothing outside the namespaces.
var (
	Anycast4 = netip.MustParseAddr("192.0.2.80")      // both edges, by BGP
	Anycast6 = netip.MustParseAddr("2001:db8:80::80") // both edges, by BGP
	Control4 = netip.MustParseAddr("10.99.0.1")       // control, DERP and STUN on the router
	Home4    = netip.MustParseAddr("192.168.50.2")    // home, behind its NAT
	Site     = siteName                               // the site of the story
	Domain   = "vsq.cz"                               // the lab CA's certificates are for this and *.this
	TestUser = "friend@vsq.cz"                        // owner of the friend node
)

// Options chooses the parts of a world. The zero value is the whole world but for the friend.
type Options struct {
	NoTailnet bool // no control, no tailscaled
	NoAnycast bool // no BIRD: a static route leads to the edge that World.Prefer names (edge A at first)
	NoDocker  bool // no dockerd, no container, no cloud
	Friend    bool // one more node in the tailnet: without tags, owned by TestUser

	// Cables names hosts whose uplinks can have a delay: they are then TUN relays, slower than veth pairs
	// (about 1 Gbit/s, and one CPU of this process when busy).
	Cables []string

	// Progress is told of each step; nil is silent.
	Progress func(format string, args ...any)
}

// World is the running world. Fields that the options leave out are nil.
type World struct {
	Inet, Client, EdgeA, EdgeB, NAT, Home, Laptop, Cloud, Friend *Host

	Names   map[string][]netip.Addr // what names mean to Host.Dial and to the client's /etc/hosts
	CA      *CA
	Tailnet *Tailnet
	Docker  *Docker // in the laptop
	Dir     string  // every file of the world; removed at the end

	run     *run
	options Options
	hosts   []*Host
	bird    *anycast

	mu       sync.Mutex
	closers  []func() // run in reverse order by Close, before the hosts go
	isClosed bool
	closeErr error
	closed   chan struct{}
}

// Start brings a world up for a test, and takes it down when the test ends; if the test failed, it then
// prints the end of every log. It skips, or under CI=true fails, where the machine lacks something: see
// [Require].
func Start(tb testing.TB, o Options) *World {
	tb.Helper()
	Require(tb, o)
	if o.Progress == nil {
		o.Progress = tb.Logf
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Minute) // tailscaled's first build takes long
	defer cancel()
	if !o.NoTailnet {
		// go test shows what a test logs when it is over: say at once why it takes so long.
		if _, err := BuildTailscaled(ctx, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }); err != nil {
			tb.Fatal(err)
		}
	}
	w, err := New(ctx, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Logf("lab: %s up after %.1f s", w.run.id, time.Since(begin).Seconds())
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Log(w.Logs(60))
		}
		if err := w.Close(); err != nil {
			tb.Errorf("lab: take the world down: %v", err)
		}
	})
	return w
}

// New brings a world up. The caller closes it. On an error nothing is left, and the error carries the end of
// the log of the part that failed. ctx bounds the start only.
func New(ctx context.Context, o Options) (_ *World, err error) {
	if o.Progress == nil {
		o.Progress = func(string, ...any) {}
	}
	r, err := newRun()
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	w := &World{run: r, Dir: r.dir, options: o, closed: make(chan struct{})}
	w.register()
	defer func() {
		if err != nil {
			w.Close()
			err = fmt.Errorf("lab: %w", err)
		}
	}()
	if w.CA, err = newCA(); err != nil {
		return nil, err
	}
	w.Names = map[string][]netip.Addr{
		Site: {Anycast4, Anycast6}, "cloud.example": {cloud4, cloud6}, "control.example": {Control4},
	}

	// What must be built may take long once; the hosts are there at once.
	var tailscaled, blog string
	build, bctx := errgroup.WithContext(ctx)
	if !o.NoTailnet {
		build.Go(func() (err error) { tailscaled, err = BuildTailscaled(bctx, o.Progress); return })
	}
	if !o.NoDocker {
		build.Go(func() (err error) { blog, err = buildBlog(bctx); return })
	}
	topologyErr := w.topology()
	if err := errors.Join(topologyErr, build.Wait()); err != nil {
		return nil, err
	}

	o.Progress("lab: %s: %d hosts", r.id, len(w.hosts))
	up, uctx := errgroup.WithContext(ctx)
	uctx, cancel := context.WithTimeout(uctx, time.Minute)
	defer cancel()
	up.Go(func() error { return w.startAnycast(uctx) })
	if !o.NoTailnet {
		up.Go(func() error { return w.startTailnet(uctx, tailscaled) })
	}
	if !o.NoDocker {
		up.Go(func() error {
			if err := w.startCloud(); err != nil {
				return err
			}
			return w.startDocker(uctx, blog)
		})
	}
	if err := up.Wait(); err != nil {
		return nil, err
	}
	return w, nil
}

// literal replaces a name in addr by one of its addresses that fits the network.
func (w *World) literal(network, addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return addr, nil
	}
	for _, a := range w.Names[host] {
		if !(strings.HasSuffix(network, "4") && a.Is6() || strings.HasSuffix(network, "6") && a.Is4()) {
			return net.JoinHostPort(a.String(), port), nil
		}
	}
	return "", fmt.Errorf("lab: no address for %s over %s in World.Names", host, network)
}

// Edges are edge A and edge B.
func (w *World) Edges() []*Host { return []*Host{w.EdgeA, w.EdgeB} }

// Host finds a host by name; nil if there is none.
func (w *World) Host(name string) *Host {
	for _, h := range w.hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// Logs is the end of every log of the world, with a heading each.
func (w *World) Logs(lines int) string {
	var b strings.Builder
	for _, h := range w.hosts {
		h.mu.Lock()
		procs := slices.Clone(h.procs)
		h.mu.Unlock()
		for _, p := range procs {
			fmt.Fprintf(&b, "\n=== %s: %s\n%s\n", h.Name, p.Name, p.tail(lines))
		}
	}
	if w.Docker != nil {
		b.WriteString(w.Docker.logs(lines))
	}
	return b.String()
}

// onClose has f run when the world ends, before its hosts go.
func (w *World) onClose(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closers = append(w.closers, f)
}

// Close takes the world down: its processes, its namespaces, its files. It may be called more than once, also
// at once.
func (w *World) Close() error {
	w.mu.Lock()
	if w.isClosed {
		w.mu.Unlock()
		<-w.closed
		return w.closeErr
	}
	w.isClosed = true
	closers := w.closers
	w.mu.Unlock()
	defer w.unregister()
	defer close(w.closed)

	var all sync.WaitGroup
	for _, h := range w.hosts {
		h.mu.Lock()
		procs := slices.Clone(h.procs)
		h.mu.Unlock()
		all.Go(func() {
			for _, p := range slices.Backward(procs) {
				p.Stop(3 * time.Second)
			}
		})
	}
	all.Wait()
	for _, f := range slices.Backward(closers) {
		f()
	}
	for _, h := range w.hosts {
		h.close()
	}
	w.closeErr = w.run.end()
	if _, err := os.Stat(w.Dir); err == nil {
		w.closeErr = errors.Join(w.closeErr, fmt.Errorf("%s could not be removed", w.Dir))
	}
	if left, _ := filepath.Glob("/run/netns/" + w.run.id + "-*"); left != nil {
		w.closeErr = errors.Join(w.closeErr, fmt.Errorf("namespaces are left: %v", left))
	}
	return w.closeErr
}
