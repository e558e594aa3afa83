package dial

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
)

// names is a Resolver of fixed addresses.
type names map[string][]netip.Addr

func (n names) Resolve(_ context.Context, name string) ([]netip.Addr, error) {
	if a := n[name]; len(a) > 0 {
		return a, nil
	}
	return nil, &told{reason: "unknown_node", msg: `no node "` + name + `"`}
}

// told is a resolver's error.
type told struct {
	reason, msg string
	temporary   bool
}

func (e *told) Error() string   { return e.msg }
func (e *told) Reason() string  { return e.reason }
func (e *told) Temporary() bool { return e.temporary }

var (
	v4 = netip.MustParseAddr("127.0.0.1")
	v6 = netip.MustParseAddr("::1")
)

// listen serves on addr, and counts the connections that stay.
func listen(t *testing.T, network, addr string) (net.Listener, *atomic.Int32) {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var open atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Add(1)
			go func() {
				io.Copy(io.Discard, c)
				c.Close()
				open.Add(-1)
			}()
		}
	}()
	return l, &open
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// wait waits until n connections are open.
func wait(t *testing.T, open *atomic.Int32, n int32) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for ; open.Load() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are open, want %d", open.Load(), n)
		}
	}
}

func port(a net.Addr) uint16 { return a.(*net.TCPAddr).AddrPort().Port() }

// freePort is one that nothing listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	return uint16(freeaddr.Ports(t, "127.0.0.1", 1))
}

// fails dials, and returns the error that must come, of that reason.
func fails(t *testing.T, d *Dialer, to Target, want Reason, says ...string) *Error {
	t.Helper()
	c, err := d.Dial(t.Context(), to, v4)
	if err == nil {
		c.Close()
		t.Fatalf("%s answered", to)
	}
	var e *Error
	if !errors.As(err, &e) || e.Reason != want {
		t.Fatalf("%s: %v (%s), want %s", to, err, e.Reason, want)
	}
	for _, s := range append(says, to.String()) {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
	return e
}

func TestKinds(t *testing.T) {
	l4, _ := listen(t, "tcp4", "127.0.0.1:0")
	l6, _ := listen(t, "tcp6", "[::1]:0")
	path := filepath.Join(t.TempDir(), "s")
	listen(t, "unix", path)
	d := &Dialer{
		Tailnet:   names{"home": {v4}, "six": {v6}},
		Container: names{"shop/api": {v4}},
		DNS:       serveDNS(t, map[string][]netip.Addr{"both.example.": {v4, v6}}),
	}
	for _, c := range []struct {
		target Target
		prefer netip.Addr
		peer   string
	}{
		{Target{Scheme: TCP, Host: "127.0.0.1", Port: port(l4.Addr())}, v6, l4.Addr().String()},
		{Target{Scheme: TCP, Host: "::1", Port: port(l6.Addr())}, v4, l6.Addr().String()},
		{Target{Scheme: TCP, Host: "::ffff:127.0.0.1", Port: port(l4.Addr())}, v6, l4.Addr().String()},
		{Target{Scheme: TCP, Host: "both.example", Port: port(l4.Addr())}, v4, l4.Addr().String()},
		{Target{Scheme: TCP, Host: "both.example", Port: port(l6.Addr())}, v6, l6.Addr().String()},
		{Target{Scheme: TCP, Host: "both.example", Port: port(l6.Addr())}, v4, l6.Addr().String()}, // refused on the preferred
		{Target{Scheme: TCP, Host: "both.example", Port: port(l4.Addr())}, netip.Addr{}, l4.Addr().String()},
		{Target{Scheme: Tailnet, Host: "home", Port: port(l4.Addr())}, v6, l4.Addr().String()},
		{Target{Scheme: Tailnet, Host: "six", Port: port(l6.Addr())}, v4, l6.Addr().String()},
		{Target{Scheme: Docker, Host: "shop/api", Port: port(l4.Addr())}, v4, l4.Addr().String()},
		{Target{Scheme: Unix, Path: path}, v4, path},
	} {
		conn, err := d.Dial(t.Context(), c.target, c.prefer)
		if err != nil {
			t.Errorf("%s: %v", c.target, err)
			continue
		}
		defer conn.Close()
		if got := conn.RemoteAddr().String(); got != c.peer {
			t.Errorf("%s led to %s, want %s", c.target, got, c.peer)
		}
		switch conn.(type) {
		case *net.TCPConn:
		case *net.UnixConn:
			if c.target.Scheme != Unix {
				t.Errorf("%s is a %T", c.target, conn)
			}
		default:
			t.Errorf("%s is a %T, which can't be spliced", c.target, conn)
		}
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	closed := freePort(t)
	d := &Dialer{
		Tailnet: names{"home": {v4, v6}},
		DNS:     serveDNS(t, map[string][]netip.Addr{"silent.example.": nil}),
		Timeout: patience,
	}
	short := &Dialer{DNS: d.DNS, Timeout: 500 * time.Millisecond}
	fails(t, d, Target{Scheme: TCP, Host: "127.0.0.1", Port: closed}, Refused, "nothing listens there")
	e := fails(t, d, Target{Scheme: Tailnet, Host: "home", Port: closed}, Refused, "127.0.0.1:", "nothing listens there")
	if e.Timeout() {
		t.Error("refused counts as a timeout")
	}
	fails(t, d, Target{Scheme: Tailnet, Host: "hone", Port: 1}, UnknownNode, `no node "hone"`)
	fails(t, d, Target{Scheme: Docker, Host: "blog", Port: 1}, Failed, "not available here")
	fails(t, d, Target{Scheme: "http", Host: "x", Port: 1}, Failed, `unknown kind of target "http"`)
	fails(t, d, Target{Scheme: TCP, Host: "missing.example", Port: 1}, DNS, "the host name missing.example has no address")
	fails(t, d, Target{Scheme: TCP, Host: "nas.local", Port: 1}, DNS, "the host name nas.local has no address", "multicast DNS", "/etc/hosts")
	fails(t, short, Target{Scheme: TCP, Host: "silent.example", Port: 1}, DNS, "did not answer")
	fails(t, d, Target{Scheme: Unix, Path: dir + "/none"}, NoSocket, "no such socket")
	fails(t, d, Target{Scheme: Unix, Path: dead}, Refused, "nothing listens there")

	silent, began := blackHole(t, "tcp4", "127.0.0.1:0"), time.Now()
	e = fails(t, short, Target{Scheme: TCP, Host: "127.0.0.1", Port: silent}, Timeout, "no answer")
	took := time.Since(began).Round(100 * time.Millisecond) // a busy machine lets more pass than short.Timeout
	_, within, _ := strings.Cut(e.Error(), " within ")
	if waited, err := time.ParseDuration(within); err != nil || waited < short.Timeout || waited > took {
		t.Errorf("%q after %s, with a timeout of %s", e, took, short.Timeout)
	}
}

// TestLocalhost: what ends in localhost is this host, and no name server is asked.
func TestLocalhost(t *testing.T) {
	l4, _ := listen(t, "tcp4", "127.0.0.1:0")
	l6, _ := listen(t, "tcp6", "[::1]:0")
	d := &Dialer{DNS: serveDNS(t, map[string][]netip.Addr{"app.localhost.": {netip.MustParseAddr("127.0.0.9")}, "notlocalhost.": nil})}
	for _, host := range []string{"localhost", "localhost.", "app.localhost", "App.LOCALHOST", "a.b.localhost."} {
		for _, l := range []net.Listener{l4, l6} {
			for _, prefer := range []netip.Addr{v4, v6, {}} {
				conn, err := d.Dial(t.Context(), Target{Scheme: TCP, Host: host, Port: port(l.Addr())}, prefer)
				if err != nil {
					t.Error(err)
					continue
				}
				if got := conn.RemoteAddr().String(); got != l.Addr().String() {
					t.Errorf("%s led to %s, want %s", host, got, l.Addr())
				}
				conn.Close()
			}
		}
	}
	d.Timeout = 100 * time.Millisecond
	fails(t, d, Target{Scheme: TCP, Host: "notlocalhost", Port: 1}, DNS)
}

// TestFallback: an address that swallows packets costs a second, not the
// timeout, and the connection that lost the race does not stay open.
func TestFallback(t *testing.T) {
	hole := blackHole(t, "tcp4", "127.0.0.1:0")
	_, open := listen(t, "tcp6", netip.AddrPortFrom(v6, hole).String())
	d := &Dialer{Tailnet: names{"home": {v4, v6}}, Timeout: patience}
	began := time.Now()
	c, err := d.Dial(t.Context(), Target{Scheme: Tailnet, Host: "home", Port: hole}, v4)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < tailnetDelay {
		t.Errorf("the other address came after %s", took)
	}
	if got := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != v6 {
		t.Errorf("it led to %s", got)
	}
	wait(t, open, 1)
	c.Close()
	wait(t, open, 0)
}

// TestRetry: an upstream that listens again within the pause is reached, with
// the name resolved anew.
func TestRetry(t *testing.T) {
	free := freePort(t)
	r := &moving{at: []netip.Addr{v6, v4}, back: func() { listen(t, "tcp4", netip.AddrPortFrom(v4, free).String()) }}
	c, err := (&Dialer{Container: r}).Dial(t.Context(), Target{Scheme: Docker, Host: "blog", Port: free}, v4)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if r.resolved != 1 || r.refreshed != 1 {
		t.Errorf("resolved %d times, refreshed %d times", r.resolved, r.refreshed)
	}
}

// moving is a Resolver whose answer is the next address each time; at the second one something listens.
type moving struct {
	at                  []netip.Addr
	back                func()
	resolved, refreshed int
}

func (m *moving) Resolve(context.Context, string) ([]netip.Addr, error) {
	m.resolved++
	return m.at[:1], nil
}

func (m *moving) Refresh(context.Context, string) ([]netip.Addr, error) {
	m.refreshed++
	m.back()
	return m.at[1:2], nil
}

func TestTemporary(t *testing.T) { synctest.Test(t, testTemporary) }

func testTemporary(t *testing.T) {
	for _, temporary := range []bool{true, false} {
		var asked atomic.Int32
		r := resolverFunc(func() ([]netip.Addr, error) {
			asked.Add(1)
			return nil, &told{reason: "container_stopped", msg: "it stopped", temporary: temporary}
		})
		fails(t, &Dialer{Container: r}, Target{Scheme: Docker, Host: "blog", Port: 1}, ContainerStopped, "it stopped")
		want := int32(1)
		if temporary {
			want = 2
		}
		if asked.Load() != want {
			t.Errorf("temporary %v: asked %d times", temporary, asked.Load())
		}
	}
}

// TestRefusedAgain: a container that refuses, since it may just have been started, is tried once more than others.
func TestRefusedAgain(t *testing.T) {
	refuses := netip.MustParseAddrPort(freeaddr.Get(t))
	for scheme, want := range map[string]int32{Docker: 3, Tailnet: 2} {
		var asked atomic.Int32
		r := resolverFunc(func() ([]netip.Addr, error) {
			asked.Add(1)
			return []netip.Addr{refuses.Addr()}, nil
		})
		fails(t, &Dialer{Container: r, Tailnet: r}, Target{Scheme: scheme, Host: "blog", Port: refuses.Port()}, Refused, "refused")
		if asked.Load() != want {
			t.Errorf("%s: tried %d times, want %d", scheme, asked.Load(), want)
		}
	}
}

type resolverFunc func() ([]netip.Addr, error)

func (f resolverFunc) Resolve(context.Context, string) ([]netip.Addr, error) { return f() }

// known is a Resolver that knows more.
type known struct {
	names
	online bool
	seen   time.Time
	path   error
	other  string
}

func (k known) Presence(string) (bool, time.Time, bool)  { return k.online, k.seen, true }
func (k known) Namesake(string) string                   { return k.other }
func (k known) CheckPath(local, remote netip.Addr) error { return k.path }

func TestPresence(t *testing.T) {
	hole := blackHole(t, "tcp4", "127.0.0.1:0")
	home := Target{Scheme: Tailnet, Host: "home", Port: hole}
	at := names{"home": {v4}}
	for _, c := range []struct {
		name    string
		r       known
		timeout time.Duration
		reason  Reason
		says    string
		took    time.Duration
	}{
		{"online", known{names: at, online: true}, time.Second, Timeout, "home is online", time.Second},
		{"offline for long", known{names: at, seen: time.Now().Add(-3 * time.Hour)}, 10 * time.Minute, NodeOffline, "home is offline, last seen 3 h ago", offlineTimeout},
		{"just moving", known{names: at, seen: time.Now().Add(-30 * time.Second)}, offlineTimeout + time.Second, NodeOffline, "last seen", offlineTimeout + time.Second},
		{"offline", known{names: at}, time.Second, NodeOffline, "home is offline", time.Second},
		{"set up anew", known{names: at, other: "home-1"}, time.Second, NodeOffline, "home is offline; home-1 is online", time.Second},
		{"set up anew, seen once", known{names: at, seen: time.Now(), other: "home-1"}, time.Second, NodeOffline, "ago; home-1 is online", time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			e := fails(t, &Dialer{Tailnet: c.r, Timeout: c.timeout}, home, c.reason, c.says)
			if !e.Timeout() {
				t.Error("it doesn't count as a timeout")
			}
			if took := time.Since(began); took < c.took || took > c.took+patience {
				t.Errorf("it took %s, want %s and little more", took, c.took)
			}
		})
	}
}

// TestPath: a connection that went the wrong way is closed, not used.
func TestPath(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := known{names: names{"home": {v4}}, path: &told{reason: "tailscale_down", msg: "past the tailnet"}}
	fails(t, &Dialer{Tailnet: r}, Target{Scheme: Tailnet, Host: "home", Port: port(l.Addr())}, TailscaleDown, "past the tailnet")
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection is not closed: %v", err)
	}
}

func TestCanceled(t *testing.T) {
	hole := blackHole(t, "tcp4", "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	began := time.Now()
	_, err := (&Dialer{Timeout: 10 * time.Minute}).Dial(ctx, Target{Scheme: TCP, Host: "127.0.0.1", Port: hole}, v4)
	var e *Error
	if !errors.As(err, &e) || e.Reason != Canceled || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > patience {
		t.Errorf("it took %s", took)
	}
}

func TestTargetString(t *testing.T) {
	for want, target := range map[string]Target{
		"127.0.0.1:80":          {Scheme: TCP, Host: "127.0.0.1", Port: 80},
		"[fd00::1]:80":          {Scheme: TCP, Host: "fd00::1", Port: 80},
		"tailnet://home:443":    {Scheme: Tailnet, Host: "home", Port: 443},
		"docker://shop/api:443": {Scheme: Docker, Host: "shop/api", Port: 443},
		"unix:///run/x.sock":    {Scheme: Unix, Path: "/run/x.sock"},
	} {
		if got := target.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
