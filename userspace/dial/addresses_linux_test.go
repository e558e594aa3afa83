package dial

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/balance"
)

func addresses(s string) (out []netip.Addr) {
	for _, a := range strings.Fields(s) {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// attempts makes d record the addresses that it tries.
//
// +checklocksignore
func attempts(d *Dialer) func() string {
	var mu sync.Mutex
	var tried []netip.Addr
	d.From = func(_ *net.Dialer, to netip.Addr) {
		mu.Lock()
		defer mu.Unlock()
		tried = append(tried, to)
	}
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		defer func() { tried = nil }()
		return strings.Trim(fmt.Sprint(tried), "[]")
	}
}

// TestAllAddresses: however many addresses of a target are dead, and however they are dead, the one that lives is
// reached, and the next connection begins with it.
func TestAllAddresses(t *testing.T) {
	type state int
	const refuses, silent, lives state = 0, 1, 2
	for _, c := range []struct {
		name   string
		addrs  string
		states []state
		prefer netip.Addr
		learns int // connections until it is known which address lives
	}{
		{"two refuse", "127.0.0.2 127.0.0.3 127.0.0.4", []state{refuses, refuses, lives}, v4, 1},
		{"two refuse, the client's family", "127.0.0.2 127.0.0.3 ::1", []state{refuses, refuses, lives}, v4, 2},
		{"both families refuse", "::1 127.0.0.2 127.0.0.3", []state{refuses, refuses, lives}, v6, 1},
		{"two are silent", "127.0.0.2 127.0.0.3 127.0.0.4", []state{silent, silent, lives}, v4, 1},
		{"both families are silent", "::1 127.0.0.2 127.0.0.3 127.0.0.4", []state{silent, silent, silent, lives}, v6, 1},
		{"one of each", "127.0.0.2 127.0.0.3 127.0.0.4 ::1", []state{silent, refuses, silent, lives}, v4, 3},
	} {
		addrs := addresses(c.addrs)
		for scheme, d := range map[string]*Dialer{
			TCP:     {DNS: serveDNS(t, map[string][]netip.Addr{"blog.example.": addrs})},
			Docker:  {Container: names{"blog.example": addrs}},
			Tailnet: {Tailnet: names{"blog.example": addrs}},
		} {
			t.Run(c.name+" "+scheme, func(t *testing.T) {
				t.Parallel()
				p := uint16(0)
				for i, a := range slices.Backward(addrs) { // the last lives
					at := netip.AddrPortFrom(a, p).String()
					switch c.states[i] {
					case lives:
						l, _ := listen(t, "tcp", at)
						p = port(l.Addr())
					case silent:
						blackHole(t, "tcp", at)
					}
				}
				want := addrs[len(addrs)-1]
				d.Timeout, d.Past = time.Minute, new(Past)
				tried := attempts(d)
				dial := func() {
					t.Helper()
					conn, err := d.Dial(t.Context(), Target{Scheme: scheme, Host: "blog.example", Port: p}, c.prefer)
					if err != nil {
						t.Fatalf("after trying %s: %v", tried(), err)
					}
					defer conn.Close()
					if got := addrOf(conn.RemoteAddr()); got != want {
						t.Errorf("it led to %s, want %s", got, want)
					}
				}
				for range c.learns {
					dial()
				}
				tried()
				dial()
				if got := tried(); got != want.String() {
					t.Errorf("once it is known which address works, %s were tried, want %s alone", got, want)
				}
			})
		}
	}
}

// TestManySilent: an address that lives is reached behind many that are silent, and few connections are under
// way meanwhile.
func TestManySilent(t *testing.T) {
	const silent = 12
	addrs := []netip.Addr{}
	for i := range silent + 1 {
		addrs = append(addrs, netip.AddrFrom4([4]byte{127, 0, 7, byte(i + 2)}))
	}
	l, _ := listen(t, "tcp", netip.AddrPortFrom(addrs[silent], 0).String())
	p := port(l.Addr())
	for _, a := range addrs[:silent] {
		blackHole(t, "tcp", netip.AddrPortFrom(a, p).String())
	}
	var mu sync.Mutex
	most := 0
	d := Dialer{Container: names{"blog.example": addrs}, Timeout: time.Minute}
	d.From = func(*net.Dialer, netip.Addr) {
		table, err := os.ReadFile("/proc/self/net/tcp")
		if err != nil {
			t.Error(err)
		}
		n := strings.Count(string(table), fmt.Sprintf(":%04X 02 ", p)) // SYN_SENT
		mu.Lock()
		defer mu.Unlock()
		most = max(most, n)
	}
	conn, err := d.Dial(t.Context(), Target{Scheme: Docker, Host: "blog.example", Port: p}, v4)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := addrOf(conn.RemoteAddr()); got != addrs[silent] {
		t.Errorf("it led to %s, want %s", got, addrs[silent])
	}
	if most < balance.MaxBeside-1 || most > balance.MaxBeside {
		t.Errorf("%d were under way at a time, want %d at most", most, balance.MaxBeside)
	}

	// Where none lives, it is no answer that is told, and not that somebody has given up.
	d.Container, d.Timeout = names{"blog.example": addrs[:silent]}, 5*time.Second
	_, err = d.Dial(t.Context(), Target{Scheme: Docker, Host: "blog.example", Port: p}, v4)
	var de *Error
	if !errors.As(err, &de) || de.Reason != Timeout {
		t.Errorf("where none lives: %v", err)
	}
}

// TestLocalFirst: a container on several networks is reached on the one that this host is on, whatever the order.
func TestLocalFirst(t *testing.T) {
	for _, c := range []struct {
		network, addrs, want string
	}{
		{"tcp4", "203.0.113.1 198.51.100.1 127.0.0.1", "127.0.0.1"},
		{"tcp6", "203.0.113.1 2001:db8:ffff::1 ::1", "::1"},
	} {
		l, _ := listen(t, c.network, net.JoinHostPort(c.want, "0"))
		d := &Dialer{Container: names{"blog": addresses(c.addrs)}, Past: new(Past)}
		tried := attempts(d)
		conn, err := d.Dial(t.Context(), Target{Scheme: Docker, Host: "blog", Port: port(l.Addr())}, v4)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if got := tried(); got != c.want {
			t.Errorf("of %s %s were tried, want %s alone", c.addrs, got, c.want)
		}
	}
}

func TestOrder(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:192.0.2.1")
	for _, c := range []struct {
		addrs    string
		prefer   netip.Addr
		networks string
		refused  string
		silent   string
		want     string
	}{
		{addrs: "10.0.0.1", prefer: v6, want: "10.0.0.1"},
		{addrs: "10.0.0.1 fd00::1", prefer: v4, want: "10.0.0.1 fd00::1"},
		{addrs: "10.0.0.1 fd00::1", prefer: v6, want: "fd00::1 10.0.0.1"},
		{addrs: "10.0.0.1 fd00::1", prefer: mapped, want: "10.0.0.1 fd00::1"},
		{addrs: "fd00::1 fd00::2 10.0.0.1", want: "fd00::1 10.0.0.1 fd00::2"},
		{addrs: "10.0.0.1 10.0.0.2 10.0.0.3", prefer: v4, want: "10.0.0.1 10.0.0.2 10.0.0.3"},
		{addrs: "10.0.0.1 10.0.0.2 10.0.0.3", prefer: v6, want: "10.0.0.1 10.0.0.2 10.0.0.3"},
		{addrs: "10.0.0.1 10.1.0.1 10.1.0.2", prefer: v4, networks: "10.1.0.0/24", want: "10.1.0.1 10.1.0.2 10.0.0.1"},
		{addrs: "fd00::1 10.1.0.1 fd01::1", prefer: v6, networks: "10.1.0.0/24 fd01::/64", want: "fd01::1 10.1.0.1 fd00::1"},
		{addrs: "fd00::1 10.1.0.1", prefer: v6, networks: "10.1.0.0/24", want: "10.1.0.1 fd00::1"},
		{addrs: "10.0.0.1 10.0.0.2 10.1.0.1", prefer: v4, networks: "10.1.0.0/24", silent: "10.1.0.1", want: "10.0.0.1 10.0.0.2 10.1.0.1"},
		{addrs: "10.0.0.1 10.0.0.2 10.0.0.3", prefer: v4, refused: "10.0.0.1", silent: "10.0.0.2", want: "10.0.0.3 10.0.0.1 10.0.0.2"},
		{addrs: "10.0.0.1 10.0.0.2", prefer: v4, refused: "10.0.0.1 10.0.0.2", want: "10.0.0.1 10.0.0.2"},
	} {
		p := &Past{listed: time.Now().Add(time.Hour)} // so that this host's networks are never looked up
		for _, n := range strings.Fields(c.networks) {
			p.networks = append(p.networks, netip.MustParsePrefix(n))
		}
		for _, a := range addresses(c.refused) {
			p.noteFailed(netip.AddrPortFrom(a, 80), Refused)
		}
		for _, a := range addresses(c.silent) {
			p.noteFailed(netip.AddrPortFrom(a, 80), Timeout)
		}
		if got := p.order(addresses(c.addrs), 80, c.prefer); !slices.Equal(got, addresses(c.want)) {
			t.Errorf("of %s for %s: %s, want %s", c.addrs, c.prefer, got, c.want)
		}
		if got := p.order(addresses(c.addrs), 81, c.prefer); c.networks == "" && c.addrs != c.want && c.silent+c.refused != "" && !slices.Equal(got, addresses(c.addrs)) {
			t.Errorf("what failed at one port moves another's: %s", got)
		}
		p.listed = time.Now()
		for a := range p.bad { // time passes, or it works again
			p.bad[a] = time.Now().Add(-time.Second)
		}
		fresh := (&Past{networks: p.networks, listed: p.listed}).order(addresses(c.addrs), 80, c.prefer)
		if got := p.order(addresses(c.addrs), 80, c.prefer); !slices.Equal(got, fresh) {
			t.Errorf("an old failure still counts: %s, want %s", got, fresh)
		}
	}
}
