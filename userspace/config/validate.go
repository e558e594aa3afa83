package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// validator checks what no single value shows: how keys, routes and listeners fit together. It leaves alone
// what the decoder has already complained about.
type validator struct {
	*reporter
	bound     map[uint16][]bound // by port
	announced map[string]Pos     // files of announce
}

// bound is an address that something listens on.
type bound struct {
	text string
	host string     // "" for all, or tailnet, or what has to be looked up
	ip   netip.Addr // if host is an IP address
	pos  Pos
	by   string

	listener *Listener // that listens on it; nil for metrics
}

func (v *validator) config(c *Config) {
	if c.Node == "" && !c.has("node") {
		c.Node = hostName()
	}
	v.listenerNames(c.Listeners)
	for _, l := range c.Listeners {
		v.addresses(l)
		v.listener(l)
	}
	v.accessLogs(c)
	v.limits(&c.Limits)
	v.control(&c.Control)
	v.circles(c)
	v.questions(c)
}

// hostName is how a node is called that the configuration does not name.
func hostName() string {
	if h, err := os.Hostname(); err == nil && h != "" {
		return h
	}
	return "localhost"
}

// listenerNames refuses names that are used twice, and names the listeners that have none.
func (v *validator) listenerNames(ls []*Listener) {
	taken := map[string]Pos{}
	for _, l := range ls {
		first, dup := taken[l.Name]
		v.errorIf(dup, l.At("name"), "name %q is that of another listener already, on line %d", l.Name, first.Line)
		if l.Name != "" && !dup {
			taken[l.Name] = l.At("name")
		}
	}
	for _, l := range ls {
		if l.Name != "" || len(l.Listen) == 0 {
			continue
		}
		_, port, _ := cutPort(l.Listen[0])
		name := fmt.Sprintf("%s-%d", l.Mode, port)
		for n := 2; taken[name].IsValid(); n++ {
			name = fmt.Sprintf("%s-%d-%d", l.Mode, port, n)
		}
		l.Name, taken[name] = name, l.Pos
	}
}

// cutPort splits an address that parseListen returned.
func cutPort(addr string) (host string, port uint16, ip netip.Addr) {
	if ap, err := netip.ParseAddrPort(addr); err == nil {
		return "", ap.Port(), ap.Addr()
	}
	host, p, _ := strings.Cut(addr, ":")
	port, _ = parsePort(p)
	return host, port, netip.Addr{}
}

// addresses refuses addresses that the kernel would refuse because another one is in the way.
func (v *validator) addresses(l *Listener) {
	for i, addr := range l.Listen {
		v.bind(addr, l.At("listen", i), fmt.Sprintf("listener %q", l.Name), l)
	}
}

func (v *validator) bind(addr string, pos Pos, by string, l *Listener) {
	host, port, ip := cutPort(addr)
	b := bound{text: addr, host: host, ip: ip, pos: pos, by: by, listener: l}
	near := nearest(host, []string{"tailnet"})
	v.warnIf(host != "tailnet" && near != "", pos, "listen address %q is an interface or a host of that name, did you mean %q?", addr, fmt.Sprintf("%s:%d", near, port))
	for _, o := range v.bound[port] {
		switch {
		case o.text == b.text:
			v.errorf(pos, "listen address %q is taken by %s already, on line %d", addr, o.by, o.pos.Line)
			return
		case b.covers(o) || o.covers(b):
			v.errorf(pos, "listen address %q overlaps %q of %s, on line %d", addr, o.text, o.by, o.pos.Line)
			return
		case b.host == "tailnet" && inTailnet(o.ip), o.host == "tailnet" && inTailnet(b.ip):
			v.warnf(pos, "listen address %q conflicts with %q of %s, on line %d, if it is this node's", addr, o.text, o.by, o.pos.Line)
		}
	}
	v.bound[port] = append(v.bound[port], b)
}

// all reports whether b is every address of this host.
func (b bound) all() bool { return b.host == "" && !b.ip.IsValid() }

// covers reports whether listening on b takes all connections that could reach o.
func (b bound) covers(o bound) bool {
	switch {
	case b.host == "tailnet":
		return o.host == "tailnet"
	case !b.ip.IsValid():
		return b.all() // ":443"; where a name leads is known only where it is bound
	case b.ip.IsUnspecified():
		return o.host == "tailnet" || o.ip.IsValid() && o.ip.Is4() == b.ip.Is4()
	}
	return b.ip == o.ip
}

func (v *validator) listener(l *Listener) {
	mode := l.Mode
	if mode == "" {
		v.routesOf("", l)
		return // the decoder said so
	}
	v.errorIf(mode == "https" && !l.has("certificates"), l.Pos, "certificates is missing in a listener: mode https needs at least one, mode sni passes TLS on without")
	v.errorIf(mode != "https" && l.sets("certificates"), l.keyAt("certificates"), "certificates belongs on an https listener, this one's mode is %s and never decrypts", mode)
	for _, c := range l.Certificates {
		v.certificate(c)
	}
	switch {
	case mode == "tcp":
		if l.has("routes") {
			v.errorf(l.keyAt("routes"), "routes on a tcp listener: it reads nothing that could be matched, use default, or mode sni, http or https")
		} else if !l.has("default") {
			v.errorf(l.Pos, "default is missing in a listener: mode tcp sends every connection there")
		}
	case l.has("docker") && (l.unclear("docker") || l.Docker.Enabled):
	case !l.has("default") && !l.has("routes"):
		v.errorf(l.Pos, "a listener without routes and default would refuse everything: add default: { forward: %s }", "HOST:PORT")
	case !l.has("default") && len(l.Routes) == 0 && !l.unclear("routes"):
		v.errorf(l.keyAt("routes"), "a listener without routes and default would refuse everything: add default: { forward: %s }", "HOST:PORT")
	}
	v.errorIf(l.Docker != nil && mode == "tcp", l.keyAt("docker"), "docker on a tcp listener: it reads nothing that labels could match, use mode http, https or sni")
	if l.AcceptProxy != nil {
		v.acceptProxy(l.AcceptProxy)
	}
	v.deny(l)
	v.routesOf(mode, l)
	if l.Default != nil {
		v.action(l.Default, "default")
		v.local(mode, l.Default)
		v.http(mode, l.Default, "", "default")
		v.access(mode, l, l.Default)
		v.balance(mode, l.Default, nil)
	}
	v.listenerHTTP(l)
	v.whileDown(l)
	if l.Announce != nil {
		v.announce(l.Announce)
	}
}

// announce refuses what would tell nobody, or half: a command for one of both states leaves the other one as
// it was.
func (v *validator) announce(a *Announce) {
	if f := a.File; f != "" {
		a.File = v.path(f)
		if before, twice := v.announced[a.File]; twice {
			v.errorf(a.At("file"), "announce.file %q is that of another listener, on line %d: each needs a file of its own", f, before.Line)
		} else {
			v.announced[a.File] = a.At("file")
		}
	}
	for _, argv := range [][]string{a.Up, a.Down} {
		if len(argv) > 0 && strings.Contains(argv[0], "/") {
			argv[0] = v.path(argv[0])
		}
	}
	v.errorIf(!a.has("file") && !a.has("up") && !a.has("down"), a.Pos, "announce tells nobody: add file: FILE, or up and down, such as { up: [birdc, enable, anycast], down: [birdc, disable, anycast] }")
	v.errorIf(a.has("up") && !a.has("down"), a.keyAt("up"), "up without down: nothing would withdraw what it announces: add down: [PROGRAM]")
	v.errorIf(a.has("down") && !a.has("up"), a.keyAt("down"), "down without up: nothing would announce again what it withdraws: add up: [PROGRAM]")
}

// whileDown refuses to watch a default that is not there, or where it would close a listener for its pages,
// too.
func (v *validator) whileDown(l *Listener) {
	if l.WhileDown != "close" || l.unclear("while_down") {
		return
	}
	switch {
	case l.Mode != "sni" && l.Mode != "tcp":
		v.errorf(l.keyAt("while_down"), "while_down: close belongs on an sni or tcp listener: one of mode %s answers with a page that says what is wrong", l.Mode)
	case !l.unclear("default") && (l.Default == nil || l.Default.Reject):
		v.errorf(l.keyAt("while_down"), "while_down: close looks at the targets of default, and there are none: add default: { forward: %s }", "HOST:PORT")
	case !l.unclear("default") && l.Default.Wake != nil:
		v.errorf(l.Default.keyAt("wake"), "wake in the default of a listener with while_down: close: it is closed while the target sleeps, so nobody could wake that: remove one of the two")
	}
}

func (v *validator) acceptProxy(a *AcceptProxy) {
	for i, from := range a.From {
		if p, err := netip.ParsePrefix(from); err == nil && p.Bits() == 0 {
			v.warnf(a.At("from", i), "from %q trusts PROXY headers from everybody: any client can then claim any address", from)
		}
	}
}

func (v *validator) deny(l *Listener) {
	for _, d := range l.Deny {
		v.errorIf(d.has("from") && d.has("file"), d.keyAt("file"), "from and file in one item of deny: make file an item of its own")
		v.errorIf(!d.has("from") && !d.has("file"), d.Pos, "it is empty: write a CIDR, an IP address, or { file: FILE } in deny")
		v.warnIf(strings.HasSuffix(d.From, "/0"), d.At("from"), "deny %q refuses everybody", d.From)
		d.File = v.path(d.File)
	}
}

func (v *validator) certificate(c *Certificate) {
	set := c.among("files", "acme", "tailscale")
	v.errorIf(len(set) == 0, c.Pos, "a certificate has one of files, acme and tailscale")
	if len(set) > 1 {
		v.errorf(c.keyAt(set[1]), "a certificate has one of files, acme and tailscale: make %s an item of its own", set[1])
	}
	if f := c.Files; f != nil {
		f.Cert, f.Key = v.path(f.Cert), v.path(f.Key)
	}
	if c.ACME != nil {
		v.acme(c.ACME)
	}
}

// acme checks what no authority could do.
func (v *validator) acme(a *ACME) {
	v.errorIf(!a.has("names") && !a.has("on_demand"), a.Pos, "names is missing in acme: the names to get certificates for; or on_demand")
	a.CA, a.Storage = v.path(a.CA), v.path(a.Storage)
	if a.DNS != nil && len(a.DNS.Exec) > 0 && strings.Contains(a.DNS.Exec[0], "/") {
		a.DNS.Exec[0] = v.path(a.DNS.Exec[0])
	}
	at := slices.Index(a.Challenges, "dns-01")
	excluded := a.sets("challenges") && at < 0
	v.errorIf(at >= 0 && !a.has("dns"), a.At("challenges", at), "challenge dns-01 needs dns: the program that sets the record, such as dns: { exec: [/etc/tailsplice/dns-hook] }")
	v.errorIf(a.DNS != nil && excluded, a.keyAt("dns"), "dns is never used: add dns-01 to challenges, or remove challenges")
	for i, name := range a.Names {
		v.errorIf(strings.HasPrefix(name, "*.") && (!a.has("dns") || excluded), a.At("names", i),
			"names %q: certificates for wildcards are only given for challenge dns-01: add dns: { exec: [PROGRAM] }, or list the names, or move it to on_demand", name)
	}
	if f := a.Fallback; f != nil {
		f.CA = v.path(f.CA)
		v.errorIf(f.Directory != "" && f.Directory == a.Directory, f.At("directory"), "directory %q: the fallback must be another authority", f.Directory)
	}
}

// path makes a relative path start at the configuration file's folder.
func (v *validator) path(p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(filepath.Dir(v.file), p)
}

// routesOf checks the routes of a listener. With no mode (it was wrong) only what is so in every mode.
func (v *validator) routesOf(mode string, l *Listener) {
	seen := map[match][]taken{}
	for _, r := range l.Routes {
		v.action(&r.Action, "a route")
		v.local(mode, &r.Action)
		v.access(mode, l, &r.Action)
		v.balance(mode, &r.Action, slices.Concat(r.SNI, r.Host))
		switch mode {
		case "sni":
			v.foreign(r, "host", "write sni: an sni listener sees only the server name")
			for _, key := range []string{"path", "methods", "headers"} {
				v.foreign(r, key, "it is inside TLS, only mode https sees it")
			}
			v.errorIf(!r.has("sni") && !r.has("host"), r.Pos, "sni is missing in a route: which server names it takes; default takes the rest")
		case "http", "https":
			v.foreign(r, "sni", "write host: an "+mode+" listener routes by host and path")
			v.foreign(r, "alpn", "it belongs on an sni listener")
			v.errorIf(!r.has("host") && !r.has("sni"), r.Pos, "host is missing in a route: which host names it takes; default takes the rest")
		default:
			continue
		}
		v.http(mode, &r.Action, r.Path, "this route")
		v.reachable(seen, r, "sni", r.SNI)
		v.reachable(seen, r, "host", r.Host)
		for j, p := range r.ALPN {
			known := []string{"h2", "http/1.1", "http/1.0", "acme-tls/1"}
			n := nearest(p, known)
			v.warnIf(n != "" && !slices.Contains(known, p), r.At("alpn", j), "alpn %q is not a protocol that clients are known to offer, did you mean %q?", p, n)
		}
	}
}

// foreign refuses a key of another mode.
func (v *validator) foreign(r *Route, key, why string) {
	v.errorIf(r.sets(key), r.keyAt(key), "%s does not fit the listener's mode: %s", key, why)
}

// match is what decides between routes: a name, with a path on http and https.
type match struct{ key, name, path string }

// taken is an earlier route for the same match.
type taken struct {
	*Route
	line int
}

// reachable refuses names for which an earlier route takes every connection.
func (v *validator) reachable(seen map[match][]taken, r *Route, key string, names []string) {
	if r.unclear("alpn") || r.unclear("path") || r.unclear("methods") || r.unclear("headers") {
		return
	}
	for i, name := range names {
		// /api and /api/ take the same, and / takes all
		m := match{key, name, strings.TrimSuffix(r.Path, "/")}
		at := r.At(key, i)
		all, rest := takers(seen[m], r)
		switch {
		case all > 0 && len(r.ALPN) > 0:
			v.errorf(at, "this route is unreachable: the one on line %d takes %s %q whatever its alpn, move that one behind this one", all, key, name)
		case all > 0 && (r.Methods != nil || r.Headers != nil):
			v.errorf(at, "this route is unreachable: the one on line %d takes all its requests, move that one behind this one", all)
		case all > 0 && r.Path != "":
			v.errorf(at, "duplicate route: the one on line %d takes host %q with path %q already", all, name, r.Path)
		case all > 0:
			v.errorf(at, "duplicate route: the one on line %d takes %s %q already", all, key, name)
		case rest > 0:
			v.errorf(at, "this route is unreachable: the routes up to line %d take %s %q with every alpn in it", rest, key, name)
		default:
			seen[m] = append(seen[m], taken{r, at.Line})
		}
	}
}

// takers finds among earlier routes for the same match the line of the one that takes all that r could,
// whatever its ALPN, or else of the one that takes the last of r's protocols. A line is 0 if there is none.
func takers(earlier []taken, r *Route) (all, rest int) {
	left := slices.Clone(r.ALPN)
	for _, t := range earlier {
		switch {
		case !methodsCover(t.Methods, r.Methods) || !headersCover(t.Headers, r.Headers):
		case t.ALPN == nil:
			return t.line, 0
		case len(left) > 0:
			left = slices.DeleteFunc(left, func(p string) bool { return slices.Contains(t.ALPN, p) })
			if len(left) == 0 {
				rest = t.line
			}
		}
	}
	return 0, rest
}

// local refuses sk_msg where the target can't be a process that this host has a TCP connection to.
func (v *validator) local(mode string, a *Action) {
	if a.Datapath != "sk_msg" || a.unclear("datapath") || a.unclear("forward") {
		return
	}
	at := a.At("datapath")
	if mode == "http" || mode == "https" {
		v.errorf(at, "datapath sk_msg moves bytes past this process, and a listener of mode %s has to see them: use mode sni or tcp, or leave it out", mode)
		return
	}
	for _, f := range a.Forward {
		switch t := f.To; t.Scheme {
		case "tailnet":
			v.errorf(at, "datapath sk_msg needs a target on this host, and %s is reached over the tailnet: leave it out, or use it on %s itself", t, t.Host)
		case "unix":
			v.errorf(at, "datapath sk_msg bypasses TCP, which %s does not use anyway: leave it out", t)
		}
	}
}

// proxyKeys are about connections to a target, in every mode.
var proxyKeys = []string{"send_proxy", "transparent", "datapath"}

func (v *validator) action(a *Action, noun string) {
	switch does := a.among("forward", "reject", "redirect"); {
	case len(does) == 0:
		v.errorf(a.Pos, "forward is missing in %s: %s; or reject: true", noun, targetNoun)
		return
	case len(does) > 1:
		v.errorf(a.keyAt(does[1]), "%s and %s in %s: it does one or the other", does[0], does[1], noun)
		return
	case does[0] == "reject":
		v.meaningless(a, "rejected", proxyKeys, httpKeys, accessKeys, balanceKeys)
	case does[0] == "redirect":
		v.meaningless(a, "redirected", proxyKeys, forwardKeys, balanceKeys)
	}
	v.targets(a)
	if a.Transparent {
		v.transparent(a)
	}
}

// targets refuses lists in which no target is for every day.
func (v *validator) targets(a *Action) {
	weighs := func(f *Forward) bool { return f.Weight > 0 }
	isMain := func(f *Forward) bool { return f.Weight > 0 && !f.Backup }
	switch {
	case !a.sets("forward") || slices.ContainsFunc(a.Forward, isMain):
	case !slices.ContainsFunc(a.Forward, weighs):
		v.errorf(a.At("forward"), "no target in forward has a weight: at least one must be above 0")
	default:
		v.errorf(a.At("forward"), "every target in forward is a backup: at least one must not be")
	}
}

// transparent refuses targets whose answers to a client's address would never come back to this host.
func (v *validator) transparent(a *Action) {
	for _, f := range a.Forward {
		t, why := f.To, ""
		ip, _ := netip.ParseAddr(t.Host)
		switch {
		case t.Scheme == "tailnet":
			why = "the node would answer the client directly, not over the tailnet: write send_proxy: v2, and transparent on the last hop"
		case t.Scheme == "unix":
			why = "a unix socket has no addresses: write send_proxy: v2, if the target can read it"
		case t.Host == "localhost", ip.IsLoopback():
			why = "a process on loopback can't answer the client: forward to the container itself (docker://CONTAINER:PORT), or write send_proxy: v2"
		default:
			continue
		}
		v.errorf(a.keyAt("transparent"), "transparent cannot reach %q: %s", t, why)
	}
}

// meaningless refuses keys about what is not done.
func (v *validator) meaningless(a *Action, done string, keys ...[]string) {
	for _, key := range slices.Concat(keys...) {
		v.errorIf(a.sets(key), a.keyAt(key), "%s has no meaning where connections are %s", key, done)
	}
}

// leads is a target that is a listener of this very daemon.
type leads struct {
	from, to *Listener
	forward  *Forward
	bound    bound
}

// circles warns of targets by which a connection may come back to the listener that it came from.
func (v *validator) circles(c *Config) {
	var all []leads
	for l, a := range c.Actions() {
		for _, f := range a.Forward {
			v.multicastName(f)
			if b, ok := v.ownAddress(c.Node, f.To); ok && b.listener != nil {
				all = append(all, leads{l, b.listener, f, b})
			}
		}
	}
	next := map[*Listener][]*Listener{} // each once
	for _, e := range all {
		if !slices.Contains(next[e.from], e.to) {
			next[e.from] = append(next[e.from], e.to)
		}
	}
	known := map[[2]*Listener]bool{}
	for _, e := range all {
		pair := [2]*Listener{e.to, e.from}
		if _, ok := known[pair]; !ok {
			known[pair] = reaches(next, e.to, e.from, map[*Listener]bool{})
		}
		v.warnIf(known[pair], e.forward.At("to"), "forward %q is %q of %s itself: connections would loop, unless another route matches them", e.forward.To, e.bound.text, e.bound.by)
	}
}

// reaches says whether connections to one listener may come to another one.
func reaches(next map[*Listener][]*Listener, from, to *Listener, seen map[*Listener]bool) bool {
	if from == to {
		return true
	}
	seen[from] = true
	return slices.ContainsFunc(next[from], func(l *Listener) bool { return !seen[l] && reaches(next, l, to, seen) })
}

// ownAddress is the address that this daemon listens on and a target leads to, if there is one.
func (v *validator) ownAddress(node string, t Target) (bound, bool) {
	for _, b := range v.bound[t.Port] {
		onTailnet := t.Scheme == "tailnet" && strings.EqualFold(t.Host, node) && (b.host == "tailnet" || b.all())
		if onTailnet || t.Scheme == "tcp" && b.takes(t.Host) {
			return b, true
		}
	}
	return bound{}, false
}

// takes reports whether connections of this host to a host or an address come to b.
func (b bound) takes(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") { // 127.0.0.1 or ::1
		return b.all() || b.ip.IsUnspecified() || b.ip.IsLoopback()
	}
	ip, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		return false
	case ip.IsLoopback() && b.ip.IsUnspecified():
		return ip.Is4() == b.ip.Is4()
	}
	return ip == b.ip || ip.IsLoopback() && b.all()
}

// multicastName warns of a target such as nas.local:80. Names of more labels, such as svc.cluster.local, are
// mostly ones of a name server.
func (v *validator) multicastName(f *Forward) {
	name, local := strings.CutSuffix(f.To.Host, ".local")
	v.warnIf(f.To.Scheme == "tcp" && local && !strings.Contains(name, "."), f.At("to"),
		"forward %q: names in .local use multicast DNS, which is not supported: unless the name server or /etc/hosts has it, use its address", f.To)
}

func (v *validator) limits(l *Limits) {
	v.share(l, "connections", l.Connections, &l.ConnectionsPerSource)
	v.share(l, "requests", l.Requests, &l.RequestsPerSource)
	if r := l.NewConnectionsPerSource; r != nil && r.Burst == 0 {
		r.Burst, _ = cutRate(r.Rate)
	}
}

// share sees that a source's share of a limit is no more than all.
func (v *validator) share(l *Limits, key string, all int, perSource *int) {
	sourceKey := key + "_per_source"
	if l.unclear(key) || l.unclear(sourceKey) || *perSource <= all {
		return
	}
	if l.has(sourceKey) {
		v.warnf(l.At(sourceKey), "%s %d is never reached, %s is %d", sourceKey, *perSource, key, all)
	} else {
		*perSource = all // the default is a bound below a bound, not a mistake
	}
}

func (v *validator) control(c *Control) {
	if c.sets("socket") {
		c.Socket = v.path(c.Socket)
		if err := socketPath(c.Socket); err != nil {
			v.errorf(c.At("socket"), "socket %q: %v", clip(c.Socket), err)
		}
	}
	v.controlAddress(c, "metrics", c.Metrics)
	v.controlAddress(c, "health", c.Health)
}

// controlAddress checks where something is shown that is for the host's owner.
func (v *validator) controlAddress(c *Control, key, addr string) {
	if addr == "" {
		return
	}
	v.bind(addr, c.At(key), key, nil)
	host, _, ip := cutPort(addr)
	v.warnIf(host == "" && (!ip.IsValid() || ip.IsUnspecified()), c.At(key), "%s %q can be read from every network of this host, 127.0.0.1 only from here", key, addr)
}
