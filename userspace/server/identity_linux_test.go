package server

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// Who they are in the chains below. A hop at each place may belong to the victim, to a friend, or have a tag;
// proxy is one that is none of ours, before the first place.
var (
	me, friend, server = netip.MustParseAddr("100.64.0.5"), netip.MustParseAddr("100.64.0.6"), netip.MustParseAddr("100.64.0.7")
	public, lan, gone  = netip.MustParseAddr("203.0.113.66"), netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("100.64.0.99")
	proxies            = []netip.Addr{netip.MustParseAddr("100.64.1.9"), netip.MustParseAddr("fd7a:115c:a1e0::1:9"), netip.MustParseAddr("192.0.2.33")}
)

const maxPlaces = 4

// hopAddr is the address of the hop at a place, from 0, by who owns it: me, a friend, a tag.
func hopAddr(place, owner int, v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd7a:115c:a1e0:%d::%d", place+1, owner+1))
	}
	return netip.MustParseAddr(fmt.Sprintf("100.64.%d.%d", 10+place, owner+1))
}

func chainNodes() map[string]node {
	nodes := map[string]node{
		"phone": {"me@vsq.cz", nil, []string{me.String()}}, "friend": {"friend@vsq.cz", nil, []string{friend.String()}},
		"server": {"", []string{"tag:server"}, []string{server.String()}}, "proxy": {"me@vsq.cz", nil, []string{proxies[0].String(), proxies[1].String()}},
	}
	for p := range maxPlaces {
		for owner, n := range map[int]node{0: {user: "me@vsq.cz"}, 1: {user: "friend@vsq.cz"}, 2: {tags: []string{"tag:hop"}}} {
			n.addrs = []string{hopAddr(p, owner, false).String(), hopAddr(p, owner, true).String()}
			nodes[fmt.Sprintf("hop%d-%d", p, owner)] = n
		}
	}
	return nodes
}

// identity is what a tailscaled that answers says of an address: the zero one of an address that nobody has.
type identity struct {
	name, user string
	tags       []string
}

// who is nil if h's tailscaled does not answer.
func (h *hop) who(a netip.Addr) *identity {
	h.view.mu.Lock()
	defer h.view.mu.Unlock()
	if h.view.server == nil || h.view.deaf || h.view.state != "Running" {
		return nil
	}
	for name, n := range h.view.nodes {
		if slices.Contains(n.addrs, a.String()) {
			return &identity{name, n.user, n.tags}
		}
	}
	return &identity{}
}

// The guards that the last hop of a chain has, by the first label of the host.
var chainGuards = map[string][]string{
	"me":    {"me@vsq.cz"},
	"hops":  append([]string{"proxy", "192.0.2.33", "hop0-0", "hop0-1", "hop1-0", "hop1-1", "hop2-0", "hop2-1", "hop3-0", "hop3-1", "tag:hop"}, proxies[0].String()),
	"net":   {"100.64.0.0/10", "fd7a:115c:a1e0::/48"},
	"world": {"203.0.113.0/24", "10.0.0.0/8"},
}

var chainHosts = []string{"open", "me", "hops", "net", "world"}

// chain is a path of hops, each of which forwards to the next.
type chain struct {
	hops  []*hop
	guard string                      // of a last hop that sees no names
	wire  string                      // where a client connects
	enter *atomic.Pointer[netip.Addr] // the address of who connects
}

func (c *chain) String() string {
	var b strings.Builder
	for i, h := range c.hops {
		fmt.Fprintf(&b, "\n  hop %d at %s: %s", i, h.addr, h.mode)
		if h.trusts != nil {
			fmt.Fprintf(&b, ", accept_proxy from %v", h.trusts)
		}
		fmt.Fprintf(&b, ", required %v, send_proxy %v, TLS to the next %v", h.required, h.sends, h.tlsUp)
	}
	return b.String() + "\n  guard of tcp: " + c.guard
}

// kinds of hops: what comes over a connection that one can read, and what it makes of it.
type kind struct {
	mode  string
	tlsUp bool
}

var kinds = []kind{{"tcp", false}, {"sni", false}, {"http", false}, {"http", true}, {"https", false}, {"https", true}}

// follows says whether b can read what a sends.
func (a kind) follows(b kind) bool {
	tcp := a.mode == "tcp" || a.mode == "sni" && b.mode != "http"
	return tcp || a.mode != "sni" && (b.mode == "tcp" || a.tlsUp == (b.mode != "http"))
}

// trusts are the ways in which the hop at a place can name those before it.
const trusts = 8

func (h *hop) trust(place, way int) {
	last := []string{"proxy", "192.0.2.33"}
	all := []string{"100.64.1.0/24", "fd7a:115c:a1e0::1:0/112", "192.0.2.0/24"}
	if place > 0 {
		last = []string{fmt.Sprintf("hop%d-0", place-1), fmt.Sprintf("hop%d-1", place-1), "tag:hop"}
	}
	for p := range place {
		all = append(all, fmt.Sprintf("100.64.%d.0/24", 10+p), fmt.Sprintf("fd7a:115c:a1e0:%d::/64", p+1))
	}
	h.trusts = [trusts][]string{nil, {"nas", "203.0.113.200"}, {"nas", "203.0.113.200"}, last, last, all, all, {"me@vsq.cz"}}[way]
	h.required = way == 2 || way == 4 || way == 6
}

// visit is what somebody sends into a chain.
type visit struct {
	name    string
	by      netip.Addr // the other end of the connection to the first hop
	truth   netip.Addr // who it is
	honest  bool       // by is a hop that says so
	proxy   []said
	first   []byte // the same, as bytes
	forward []string
	header  string // lines
}

func v1(a netip.Addr) []byte {
	if !a.IsValid() {
		return []byte("PROXY UNKNOWN\r\n")
	}
	return fmt.Appendf(nil, "PROXY TCP4 %s 192.0.2.1 1234 443\r\n", a)
}

func v2(a netip.Addr) []byte { return from(netip.AddrPortFrom(a, 1234).String()) }

// visits are all that are sent into chains.
func visits() (all []visit) {
	local := proxyheader.Header{Local: true}.Append(nil)
	add := func(v visit, first ...[]byte) {
		v.first = slices.Concat(first...)
		name := v.name
		for _, forged := range []string{"", me.String(), me.String() + ", " + public.String(), "unknown"} {
			if forged != "" {
				v.name = name + ", X-Forwarded-For: " + forged
				v.forward = strings.Split(forged, ", ")
				v.header = "X-Forwarded-For: " + forged + "\r\nForwarded: for=" + me.String() + "\r\nX-Real-IP: " + me.String() +
					"\r\nTailscale-User-Login: me@vsq.cz\r\nTailscale.User.Login: me@vsq.cz\r\n"
			}
			all = append(all, v)
		}
	}
	type end struct {
		name  string
		by    netip.Addr
		truth netip.Addr
	}
	ends := []end{{"me", me, me}, {"a friend", friend, friend}, {"a tagged node", server, server}, {"a stranger", public, public}, {"somebody of the LAN", lan, lan}, {"an address of no node", gone, gone}}
	for _, p := range proxies {
		ends = append(ends, end{"a stranger through a proxy that says nothing", p, public})
	}
	for _, e := range ends {
		v := visit{by: e.by, truth: e.truth}
		named := func(what string, proxy ...said) visit { v.name, v.proxy = e.name+what, proxy; return v }
		add(named(""))
		add(named(", PROXY v1 of me", said{addr: me}), v1(me))
		add(named(", PROXY v2 of me", said{addr: me}), v2(me))
		add(named(", PROXY v2 of me twice", said{addr: me}, said{addr: me}), v2(me), v2(me))
		add(named(", PROXY LOCAL", said{local: true}), local)
		add(named(", PROXY UNKNOWN", said{}), v1(netip.Addr{}))
	}
	for _, p := range proxies {
		for _, who := range []netip.Addr{me, friend, server, public, gone, p, hopAddr(0, 0, false)} {
			v := visit{by: p, truth: who, honest: true, proxy: []said{{addr: who}}}
			v.name = "PROXY v2 of " + who.String() + " by a proxy that is right"
			add(v, v2(who))
			if who.Is4() {
				v.name = "PROXY v1 of " + who.String() + " by a proxy that is right"
				add(v, v1(who))
			}
		}
	}
	return all
}

// world has daemons for chains, and a target behind all.
type world struct {
	t         *testing.T
	target    string
	cert      tls.Certificate
	file, key string

	fronts  []*Server
	closers []func()
}

var loopbacks = struct {
	sync.Mutex
	n int
}{}

// loopback is an address that is given once.
func loopback() string {
	loopbacks.Lock()
	defer loopbacks.Unlock()
	loopbacks.n++
	return fmt.Sprintf("127.%d.%d.%d:4443", 16+loopbacks.n/62500, loopbacks.n/250%250, 1+loopbacks.n%250)
}

func newWorld(t *testing.T) *world {
	var names []string
	for _, h := range chainHosts {
		names = append(names, h+".test")
	}
	w := &world{t: t, cert: selfsigned.Certificate(t, names...)}
	w.file, w.key = writePair(t, w.cert)
	w.target = backend(t, w.answer)
	t.Cleanup(w.close)
	return w
}

func (w *world) close() {
	for _, c := range slices.Backward(w.closers) {
		c()
	}
	w.closers = nil
}

// heard is what the target hears.
type heard struct {
	Proxy  []string
	Header http.Header
}

func (w *world) answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	got := heard{Proxy: []string{}}
	ahead := &stream{TCPConn: c.(*net.TCPConn), conn: new(conn)}
	for {
		h, rest, err := proxyheader.Read(ahead, nil, 4096, patience)
		ahead.ahead = rest
		if err != nil {
			return
		}
		if h == nil {
			break
		}
		got.Proxy = append(got.Proxy, said{h.Source.Addr(), h.Local}.String())
	}
	var conn net.Conn = ahead
	if len(ahead.ahead) > 0 && ahead.ahead[0] == 0x16 {
		conn = tls.Server(ahead, &tls.Config{Certificates: []tls.Certificate{w.cert}, NextProtos: []string{"http/1.1"}})
	}
	for r := bufio.NewReader(conn); ; {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		got.Header = req.Header
		body, _ := json.Marshal(got)
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
}

func (s said) String() string {
	switch {
	case s.local:
		return "local"
	case !s.addr.IsValid():
		return "unknown"
	}
	return s.addr.String()
}

// start runs the daemons of chains: one for all hops of a place that have the same tailscaled.
func (w *world) start(chains []*chain) {
	next := make([]string, len(chains)) // where the hop before connects to
	for i := range next {
		next[i] = w.target
	}
	for place := maxPlaces - 1; place >= 0; place-- {
		configs := map[*tailscaled]*strings.Builder{}
		type entry struct {
			chain    int
			listener string
		}
		entries := map[*tailscaled][]entry{}
		for i, c := range chains {
			if place >= len(c.hops) {
				continue
			}
			h := c.hops[place]
			b := configs[h.daemon]
			if b == nil {
				b = &strings.Builder{}
				fmt.Fprintf(b, "node: hop%d\nlimits: { connections_per_source: 4096, requests_per_source: 4096, hello_timeout: 1m }\nlisteners:\n", place)
				configs[h.daemon] = b
			}
			name := fmt.Sprintf("c%d", i)
			entries[h.daemon] = append(entries[h.daemon], entry{i, name})
			w.listenerYAML(b, c, place, name, next[i])
		}
		for ts, b := range configs {
			w.t.Setenv("TAILSPLICE_TAILSCALED_SOCKET", ts.socket)
			f, err := New(parse(w.t, b.String()), discard())
			if err != nil {
				w.t.Fatal(err)
			}
			w.fronts = append(w.fronts, f)
			w.closers = append(w.closers, f.Close)
			for _, e := range entries[ts] {
				next[e.chain], chains[e.chain].enter = w.connect(f, e.listener, chains[e.chain], place)
			}
		}
	}
	for i, c := range chains {
		c.wire = next[i]
	}
}

func (w *world) listenerYAML(b *strings.Builder, c *chain, place int, name, to string) {
	h := c.hops[place]
	fmt.Fprintf(b, "- { name: %s, listen: %q, mode: %s", name, loopback(), h.mode)
	if h.mode == "https" {
		fmt.Fprintf(b, ", certificates: [{ files: { cert: %q, key: %q } }]", w.file, w.key)
	}
	if h.trusts != nil {
		fmt.Fprintf(b, ", accept_proxy: { from: [%s]", strings.Join(quotedAll(h.trusts), ", "))
		if h.required {
			b.WriteString(", required: true")
		}
		b.WriteString(" }")
	}
	action := fmt.Sprintf("forward: %q", to)
	if h.sends {
		action += ", send_proxy: v2"
	}
	last := place == len(c.hops)-1
	names := "host"
	if h.mode == "sni" {
		names = "sni"
	}
	if h.mode != "tcp" && (last || h.tlsUp) {
		b.WriteString(", routes: [")
		for _, host := range chainHosts {
			fmt.Fprintf(b, "{ %s: %s.test, %s", names, host, action)
			if h.tlsUp {
				fmt.Fprintf(b, ", upstream: { protocol: https, insecure: true, server_name: %s.test }", host)
			}
			if allow := chainGuards[host]; last && allow != nil {
				fmt.Fprintf(b, ", allow: [%s]", strings.Join(quotedAll(allow), ", "))
			}
			b.WriteString(" }, ")
		}
		b.WriteString("]")
	} else {
		fmt.Fprintf(b, ", default: { %s", action)
		if allow := chainGuards[c.guard]; last && allow != nil {
			fmt.Fprintf(b, ", allow: [%s]", strings.Join(quotedAll(allow), ", "))
		}
		b.WriteString(" }")
	}
	b.WriteString(" }\n")
}

func quotedAll(list []string) (out []string) {
	for _, s := range list {
		out = append(out, fmt.Sprintf("%q", s))
	}
	return out
}

// connect makes what stands for the tailnet between two hops: what connects to addr arrives at the listener
// from the address of the hop before, or, at the first hop, from the one that peer has.
func (w *world) connect(f *Server, listener string, c *chain, place int) (addr string, peer *atomic.Pointer[netip.Addr]) {
	peer = &atomic.Pointer[netip.Addr]{}
	peer.Store(&public) // of whoever else finds this port
	if place > 0 {
		peer.Store(&c.hops[place-1].addr)
	}
	d := socketTo(w.t, f, listener, false, func() netip.AddrPort { return netip.AddrPortFrom(*peer.Load(), 1234) },
		func() {})
	d.accept()
	w.closers = append(w.closers, d.Close)
	return d.addr.String(), peer
}

// session is a connection into a chain, for a host.
type session struct {
	net.Conn
	reader *bufio.Reader
	host   string
	visit  *visit
}

// open begins one with what v sends first.
func (w *world) open(c *chain, v *visit, host string) (*session, error) {
	c.enter.Store(&v.by)
	conn, err := net.DialTimeout("tcp", c.wire, patience)
	if err != nil {
		return nil, err // refused that early
	}
	conn.SetDeadline(time.Now().Add(patience))
	conn.Write(v.first)
	if c.tls() {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: host + ".test"})
	}
	return &session{conn, bufio.NewReader(conn), host, v}, nil
}

// ask makes a request. The error says how it was refused.
func (s *session) ask() (*heard, error) {
	if _, err := fmt.Fprintf(s, "GET / HTTP/1.1\r\nHost: %s.test\r\n%s\r\n", s.host, s.visit.header); err != nil {
		return nil, err
	}
	res, err := http.ReadResponse(s.reader, nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode != http.StatusOK:
		return nil, errors.New(res.Status)
	}
	got := &heard{}
	return got, json.Unmarshal(body, got)
}

// tls says whether the first hop that reads anything wants TLS.
func (c *chain) tls() bool {
	for _, h := range c.hops {
		if h.mode != "tcp" {
			return h.mode != "http"
		}
	}
	return c.guard != "open" // as well as not
}

// expected is what the model says of v in c.
type expected struct {
	ok     bool       // the last hop takes it
	client netip.Addr // that the last hop knows
	out    words
	free   bool // some hop's configuration lets strangers speak for others: see docs/access.md
	unlike []netip.Addr
}

func (c *chain) expect(v *visit) (e expected) {
	in := words{by: v.by, proxy: v.proxy, tls: c.tls(), forward: v.forward}
	strangers := !v.honest // what came last was written by somebody, and no hop has said by whom
	for _, h := range c.hops {
		if strangers && h.names(h.trusts, in.by) == yes {
			e.free = true
		}
		e.unlike = append(e.unlike, in.by)
		if e.client, e.out, e.ok = h.pass(in); !e.ok {
			return e
		}
		strangers = (h.mode == "tcp" || h.mode == "sni") && !h.sends
		in = e.out
	}
	return e
}

// check sends v into c and compares. It reports whether it got through. Where tailscaled may be late, nobody
// may know more than the model does.
func (w *world) check(c *chain, v *visit, host string, late bool) bool {
	var got *heard
	s, err := w.open(c, v, host)
	if err == nil {
		defer s.Close()
		got, err = s.ask()
	}
	w.compare(c, v, host, got, err, late)
	return got != nil
}

func (w *world) compare(c *chain, v *visit, host string, got *heard, err error, late bool) {
	e := c.expect(v)
	last := c.hops[len(c.hops)-1]
	guard := host
	if last.mode == "tcp" {
		guard = c.guard
	}
	allow := chainGuards[guard]
	pass := e.ok && (allow == nil || e.client.IsValid() && last.names(allow, e.client) == yes)
	fail := func(format string, args ...any) {
		w.t.Errorf("%s, for %s.test (it is %s, at %s)%s\n  %s", v.name, host, v.truth, v.by, c, fmt.Sprintf(format, args...))
	}
	// Nobody is taken for whom he is not, whatever the model says of how that comes.
	if e.ok && e.client.IsValid() && !e.free && e.client != v.truth {
		hop := slices.Contains(e.unlike, e.client) // that says nothing, and that the last doesn't know as one
		if !hop || last.names(last.trusts, e.client) != no {
			fail("the model itself takes it for %s", e.client)
		}
	}
	if got != nil && !pass || got == nil && pass && !late {
		fail("got through: %v (%v), want %v: the last hop should know the client as %v", got != nil, err, pass, e.client)
	}
	if got == nil || !pass {
		return
	}
	same := func(got, want string) bool { return got == want || late && (got == "unknown" || got == "") }
	var proxy []string
	for _, s := range e.out.proxy {
		proxy = append(proxy, s.String())
	}
	if !slices.EqualFunc(got.Proxy, proxy, same) {
		fail("PROXY headers %v reach the target, want %v", got.Proxy, proxy)
	}
	if last.mode != "http" && last.mode != "https" {
		return
	}
	if heard := strings.Split(got.Header.Get("X-Forwarded-For"), ", "); !slices.EqualFunc(heard, e.out.forward, same) &&
		!(late && len(heard) < len(e.out.forward)) { // a hop that is not known is not believed
		fail("the target hears of %q, want %q", heard, e.out.forward)
	}
	login := ""
	if id := last.who(e.client); e.client.IsValid() && inTailnet(e.client) && id != nil && len(id.tags) == 0 {
		login = id.user
	}
	if user := got.Header.Get("Tailscale-User-Login"); !same(user, login) || got.Header.Get("Tailscale.User.Login") != "" {
		fail("the target hears of the user %q, want %q: %v", user, login, got.Header)
	}
	if !e.free && got.Header.Get("X-Real-Ip") != "" {
		fail("the target gets a stranger's word: %v", got.Header)
	}
}

// chainMaker makes chains by chance.
type chainMaker struct {
	*rand.Rand
	daemons []*tailscaled // that hops may have
}

func (m *chainMaker) hop(place int, k kind, way int, sends bool) *hop {
	h := &hop{mode: k.mode, tlsUp: k.tlsUp, sends: sends, addr: hopAddr(place, m.IntN(3), m.IntN(2) == 0), daemon: m.daemons[m.IntN(len(m.daemons))]}
	h.view = h.daemon
	h.trust(place, way)
	return h
}

func (m *chainMaker) chain(length int) *chain {
	c := &chain{guard: chainHosts[m.IntN(len(chainHosts))]}
	for len(c.hops) < length {
		k := kinds[m.IntN(len(kinds))]
		if n := len(c.hops); n == 0 || (kind{c.hops[n-1].mode, c.hops[n-1].tlsUp}).follows(k) {
			c.hops = append(c.hops, m.hop(n, k, m.IntN(trusts), m.IntN(2) == 0))
		}
	}
	return c
}

// visit draws what somebody sends into c, one that goes all the way if one of a few does.
func (m *chainMaker) visit(c *chain, all []visit) *visit {
	for n := 0; ; n++ {
		if v := &all[m.IntN(len(all))]; n == 8 || c.expect(v).ok {
			return v
		}
	}
}

// TestIdentity sends what strangers and hops may send into all chains of one and two hops, and into some of
// three and four, of real daemons. What they know must be what they can know, and nobody be taken for
// somebody else.
func TestIdentity(t *testing.T) {
	ts := startTailscaled(t)
	ts.nodes = chainNodes()
	random := &chainMaker{rand.New(rand.NewPCG(1, 2)), []*tailscaled{ts}}
	var chains []*chain
	add := func(hops ...*hop) {
		chains = append(chains, &chain{hops: hops, guard: chainHosts[len(chains)%len(chainHosts)]})
	}
	variants := func(place int, each func(kind, *hop)) {
		for _, k := range kinds {
			for way := range trusts {
				each(k, random.hop(place, k, way, false))
				each(k, random.hop(place, k, way, true))
			}
		}
	}
	variants(0, func(_ kind, h *hop) { add(h) })
	variants(0, func(a kind, first *hop) {
		variants(1, func(b kind, second *hop) {
			if a.follows(b) && !b.tlsUp {
				add(first, second)
			}
		})
	})
	for range identityLong {
		chains = append(chains, random.chain(3+random.IntN(2)))
	}
	random.Shuffle(len(chains), func(i, j int) { chains[i], chains[j] = chains[j], chains[i] })
	all := visits()
	var asked, passed, known int
	for batch := range slices.Chunk(chains, 150) {
		if t.Failed() {
			break
		}
		w := newWorld(t)
		w.start(batch)
		var wg sync.WaitGroup
		var mu sync.Mutex
		for part := range slices.Chunk(batch, 8) {
			seed := random.Uint64()
			wg.Go(func() {
				random := chainMaker{rand.New(rand.NewPCG(seed, 0)), nil}
				for _, c := range part {
					for range identityVisits {
						v := random.visit(c, all)
						host := chainHosts[max(0, random.IntN(2*len(chainHosts)-2)-len(chainHosts)+2)] // open for half
						through := w.check(c, v, host, false)
						mu.Lock()
						asked++
						if through {
							passed++
							if c.expect(v).client.IsValid() {
								known++
							}
						}
						mu.Unlock()
					}
				}
			})
		}
		wg.Wait()
		w.close()
	}
	t.Logf("%d chains, %d requests, %d got through, of %d the client was known", len(chains), asked, passed, known)
	if passed < asked/20 || known < passed/10 {
		t.Error("next to nothing gets through: nothing is tested")
	}
}

// TestIdentityTailscaled does it while hops can't find out who somebody is, or not in time: that is a
// stranger then, and no other.
func TestIdentityTailscaled(t *testing.T) {
	all := visits()
	const perState = 120
	known := &tailscaled{nodes: chainNodes(), state: "Running", server: &http.Server{}} // what one that is well says
	var wg, restarts sync.WaitGroup
	var through atomic.Int64
	stop := make(chan struct{})
	for i, how := range []string{"gone", "hangs", "starts", "is slow", "comes and goes"} {
		ts, fine := startTailscaled(t), startTailscaled(t)
		ts.nodes, fine.nodes = chainNodes(), chainNodes()
		random := &chainMaker{rand.New(rand.NewPCG(3, uint64(i))), []*tailscaled{ts, ts, fine}}
		late, longest := false, 3
		switch how {
		case "gone":
			ts.stop()
		case "hangs":
			ts.deaf, longest = true, 2 // it takes 10 s at each hop
		case "starts":
			ts.state, longest = "Starting", 2
		case "is slow":
			ts.noBus, ts.slow, late = true, 1200*time.Millisecond, true
		case "comes and goes":
			late = true
			restarts.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(50 * time.Millisecond):
					}
					ts.stop()
					ts.start()
				}
			})
		}
		var chains []*chain
		var sent []*visit
		for len(chains) < perState {
			c := random.chain(1 + random.IntN(longest))
			for _, h := range c.hops {
				h.view = known
			}
			v := random.visit(c, all)
			if !c.expect(v).ok || !slices.ContainsFunc(c.hops, func(h *hop) bool { return h.daemon == ts && h.trusts != nil }) {
				continue
			}
			for _, h := range c.hops {
				if how != "comes and goes" {
					h.view = h.daemon
				}
			}
			chains, sent = append(chains, c), append(sent, v)
		}
		w := newWorld(t)
		w.start(chains)
		for i, c := range chains {
			host := chainHosts[random.IntN(len(chainHosts))]
			wg.Go(func() {
				if w.check(c, sent[i], host, late) {
					through.Add(1)
				}
			})
		}
	}
	wg.Wait()
	close(stop)
	restarts.Wait()
	t.Logf("%d of %d requests got through", through.Load(), 5*perState)
	if through.Load() < perState/2 {
		t.Error("next to nothing gets through: nothing is tested")
	}
}

// TestIdentityNetmap changes the netmap between two requests on a connection: addresses get other owners,
// hops lose their tags and names. From then on nobody is who had his address, and no hop is what it was.
func TestIdentityNetmap(t *testing.T) {
	ts := startTailscaled(t)
	ts.nodes = chainNodes()
	all := visits()
	random := &chainMaker{rand.New(rand.NewPCG(5, 6)), []*tailscaled{ts}}
	var chains []*chain
	var sent []*visit
	for len(chains) < 300 {
		c := random.chain(1 + random.IntN(3))
		// Flows that are not looked into keep what was decided at their beginning, and a hop that speaks HTTP
		// keeps its own.
		splices := func(h *hop) bool { return h.mode == "tcp" || h.mode == "sni" }
		first := slices.IndexFunc(c.hops, func(h *hop) bool { return !splices(h) })
		if first >= 0 && slices.ContainsFunc(c.hops[first:], splices) {
			continue
		}
		if v := random.visit(c, all); c.expect(v).ok {
			chains, sent = append(chains, c), append(sent, v)
		}
	}
	w := newWorld(t)
	w.start(chains)
	hosts, kept := make([]string, len(chains)), make([]*session, len(chains))
	for i, c := range chains {
		hosts[i] = chainHosts[random.IntN(len(chainHosts))]
		var got *heard
		s, err := w.open(c, sent[i], hosts[i])
		if err == nil {
			defer s.Close()
			got, err = s.ask()
		}
		w.compare(c, sent[i], hosts[i], got, err, false)
		if got != nil && !slices.ContainsFunc(c.hops, func(h *hop) bool { return h.mode == "tcp" || h.mode == "sni" }) {
			kept[i] = s
		}
	}
	ts.change(func() {
		ts.nodes["phone"], ts.nodes["friend"] = node{"me@vsq.cz", nil, []string{friend.String()}}, node{"friend@vsq.cz", nil, []string{me.String()}}
		for p := range maxPlaces {
			name := func(owner int) string { return fmt.Sprintf("hop%d-%d", p, owner) }
			ts.nodes[name(0)+"-old"] = node{"friend@vsq.cz", nil, ts.nodes[name(0)].addrs}
			ts.nodes[name(2)] = node{"me@vsq.cz", nil, ts.nodes[name(2)].addrs}
			delete(ts.nodes, name(0))
		}
	})
	for _, f := range w.fronts {
		eventually(t, "the change is heard of", func() bool {
			id, err := f.tailnet.WhoIs(t.Context(), me)
			return err == nil && id.User == "friend@vsq.cz"
		})
	}
	var still int
	for i, c := range chains {
		w.check(c, sent[i], hosts[i], false)
		if kept[i] == nil {
			continue
		}
		got, err := kept[i].ask()
		w.compare(c, sent[i], hosts[i], got, err, true)
		if got != nil {
			still++
		}
	}
	t.Logf("%d chains, %d kept connections got through again", len(chains), still)
	if still < len(chains)/50 {
		t.Error("next to nothing gets through: nothing is tested")
	}
}
