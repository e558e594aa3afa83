package vhost

import (
	"bytes"
	"errors"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// IDHeader carries the path's id to HTTP upstreams.
const IDHeader = "X-Tailsplice-Id"

// forwarding are the headers in which a hop says for whom it speaks, and how it was asked, beside those that
// isForwarding knows by a part of their name. Frameworks believe them easily, so no stranger may send them.
var forwarding = setOf(
	"forwarded", // RFC 7239
	"client-ip", "remote-addr", "cf-connecting-ipv6", "cf-pseudo-ipv4", "x-remote-ip", "x-originating-ip",
	"x-proxyuser-ip", "x-azure-clientip", "x-azure-socketip", "x-sucuri-clientip", "x-envoy-external-address",
	"x-nf-client-connection-ip",
	// The scheme.
	"cf-visitor", "front-end-https", "x-arr-ssl", "fastly-ssl", "wl-proxy-ssl", "x-scheme", "x-url-scheme",
	"x-original-proto", "x-original-scheme",
	"x-http-host-override", "x-host", "x-original-host",
	// The request: auth servers are told of its path, and some frameworks route by it instead of the path.
	"x-original-uri", "x-original-method", "x-original-url", "x-rewrite-url",
	"x-tailsplice-id", "x-tailsplice-path", "x-tailsplice-timing",
	"client-cert", "client-cert-chain", // RFC 9440
	"proxy", // HTTP_PROXY where variables are made of headers
)

func setOf(names ...string) map[string]bool {
	set := map[string]bool{}
	for _, n := range names {
		set[n] = true
	}
	return set
}

// otherPath are those, as net/http spells them, by which a target or an auth server takes another path, or
// method, than the request's. Hops that are none of tailsplice pass on what their client sends in them.
var otherPath = setOf("X-Original-Uri", "X-Original-Method", "X-Original-Url", "X-Rewrite-Url")

// isForwarding says whether a header, however it is written, is one that dropForwarding removes for what it
// says of the client.
func isForwarding(name string) bool {
	var buf [64]byte // so that most names take no memory
	n := foldName(buf[:0], name)
	if len(n) < len("proxy") {
		return false
	}
	for _, end := range [...]string{"-client-ip", "-user-ip", "-real-ip", "-connecting-ip", "-remote-addr",
		"-viewer-address"} {
		if n[len(n)-1] == end[len(end)-1] && bytes.HasSuffix(n, []byte(end)) {
			return true
		}
	}
	return bytes.HasPrefix(n, []byte("forwarded-")) || bytes.HasPrefix(n, []byte("x-forwarded")) ||
		bytes.HasPrefix(n, []byte("tailscale-")) || bytes.Contains(n, []byte("-forwarded-")) || forwarding[string(n)]
}

// dropForwarding removes from a request's header what a stranger says of whom it is from and how it was
// asked: routes, guards and targets hear that from a hop that is believed, or not at all. Each hop asks its
// own tailscaled for the user, and guards its target's path: Tailscale- headers and other paths always go.
func dropForwarding(h http.Header, believed bool) {
	maps.DeleteFunc(h, func(name string, _ []string) bool {
		return isForwarding(name) && (!believed || !isPlainName(name) || strings.HasPrefix(strings.ToLower(name), "tailscale-") || otherPath[name])
	})
}

// setForwarded makes the forwarding headers of the request that goes out, whose header is out. What a
// believed hop sent is kept, and this hop added; of anyone else dropForwarding has left nothing. A client
// that is not known (see MayTell) is named so: the hop's own address would give it that hop's rights.
func setForwarded(in *http.Request, authority string, out http.Header, info ConnInfo, known bool, id string) {
	believed := believes(info, in.TLS != nil)
	proto := "http"
	if in.TLS != nil || info.ServerName != "" {
		proto = "https"
	}
	client := info.Client.Addr().Unmap().WithZone("")

	var chain, elements []string
	forHost, forProto := authority, proto
	if believed {
		chain = splitList(in.Header["X-Forwarded-For"])
		elements = splitElements(in.Header["Forwarded"])
		if v := in.Header.Get("X-Forwarded-Host"); v != "" {
			forHost = v
		}
		if v := strings.ToLower(in.Header.Get("X-Forwarded-Proto")); v == "http" || v == "https" {
			forProto = v
		}
		if len(elements) == 0 {
			elements = elementsOf(chain, forHost, forProto)
		}
	}
	switch {
	case !known:
		client = netip.Addr{}
		chain = append(chain, nodeName(client))
	case client.IsValid():
		chain = append(chain, client.String())
	}
	elements = append(elements, element(client, authority, proto))

	if len(chain) > 0 {
		out.Set("X-Forwarded-For", strings.Join(chain, ", "))
	}
	if forHost != "" {
		out.Set("X-Forwarded-Host", forHost)
	}
	out.Set("X-Forwarded-Proto", forProto)
	out.Set("Forwarded", strings.Join(elements, ", "))
	if id != "" {
		out[IDHeader] = []string{id}
	}
}

// clientOf is the client of a request: the last of a believed hop's X-Forwarded-For, which is what it saw,
// else that of the connection. What stands before it is the word of the client so found, and is believed if
// that is such a hop too. A hop is never the client: where one speaks for somebody and doesn't say for whom,
// or nobody can tell whether it is a hop, unknown says so, and client is the last who said something.
func clientOf(r *http.Request, info ConnInfo) (client netip.AddrPort, unknown error) {
	client = info.Client
	if info.Unknown != nil {
		return client, info.Unknown
	}
	var chain []string
	if believes(info, r.TLS != nil) {
		chain = splitList(r.Header["X-Forwarded-For"])
	}
	if len(chain) == 0 {
		return client, info.client(client.Addr())
	}
	for i := len(chain) - 1; ; i-- {
		addr, err := netip.ParseAddr(chain[i])
		if err != nil {
			return info.Client, &UnsaidError{Hop: info.Client.Addr()}
		}
		client = netip.AddrPortFrom(addr.Unmap(), 0)
		unknown = info.client(client.Addr())
		if i == 0 || len(chain)-i >= maxHops || !errors.As(unknown, new(*UnsaidError)) {
			return client, unknown
		}
	}
}

// maxHops bounds how far back a chain of hops is asked about.
const maxHops = 8

// splitList takes a list apart that may be spread over several lines.
func splitList(lines []string) []string {
	var out []string
	for _, l := range lines {
		for v := range strings.SplitSeq(l, ",") {
			if v = strings.TrimSpace(v); v != "" {
				out = append(out, v)
			}
		}
	}
	return out
}

// splitElements keeps each line of Forwarded whole: a comma may be quoted.
func splitElements(lines []string) []string {
	var out []string
	for _, l := range lines {
		if l = strings.Trim(l, " \t,"); l != "" {
			out = append(out, l)
		}
	}
	return out
}

// elementsOf puts X-Forwarded-For into Forwarded's words. host and proto are the first one's, the client's.
func elementsOf(chain []string, host, proto string) []string {
	var out []string
	for i, v := range chain {
		addr, _ := netip.ParseAddr(v) // what is none is unknown
		if i == 0 {
			out = append(out, element(addr, host, proto))
		} else {
			out = append(out, "for="+nodeName(addr))
		}
	}
	return out
}

// element is one forwarded-element of RFC 7239 4.
func element(client netip.Addr, host, proto string) string {
	s := "for=" + nodeName(client)
	if host != "" {
		s += ";host=" + quoted(host)
	}
	return s + ";proto=" + proto
}

// nodeName is RFC 7239 6's: IPv6 in brackets, and so in quotes.
func nodeName(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "unknown"
	case a.Is6():
		return `"[` + a.String() + `]"`
	}
	return a.String()
}

// quoted is a value as a token (RFC 9110 5.6.2), or in quotes.
func quoted(v string) string {
	if httpguts.ValidHeaderFieldName(v) { // which is a token
		return v
	}
	return `"` + quotedPairs.Replace(v) + `"`
}

// quotedPairs makes quoted-pairs of what can't stand in a quoted-string (RFC 9110 5.6.4).
var quotedPairs = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// pathID is the id of the path that a request is on: that of the hop before, if it is believed and looks like
// one, else the connection's.
func pathID(r *http.Request, info ConnInfo) string {
	if believes(info, r.TLS != nil) {
		if id := r.Header.Get(IDHeader); validID(id) {
			return id
		}
	}
	return info.ID
}

// requestID is the id that applications log a request by: the client's own, if that fits on a line of a log,
// else the path's with the number of the request on its connection.
func requestID(r *http.Request, c *conn, id string) string {
	v := r.Header["X-Request-Id"]
	if len(v) == 1 && v[0] != "" && len(v[0]) <= 128 && !strings.ContainsFunc(v[0], func(r rune) bool { return r <= ' ' || r > '~' }) {
		return v[0]
	}
	return id + "-" + strconv.FormatInt(c.requests.Add(1), 10)
}

// validID bounds what is copied from a header into logs and pages.
func validID(id string) bool {
	return len(id) >= 8 && len(id) <= 64 && strings.Trim(id, alphanumeric+"-_") == ""
}

const alphanumeric = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// PathHeader tells the next hop by which hops a request has come, the first one first, for the pages that
// show its path. It is believed from a hop that is believed only.
const PathHeader = "X-Tailsplice-Path"

// passed are the names of the hops before this one, as far as known: what the last of them says, or its own.
func (x *exchange) passed() []string {
	c := x.visit.Conn
	if believes(c, x.req.TLS != nil) {
		if names := hopNames(x.req.Header); len(names) > 0 {
			return names
		}
	}
	if c.Hop != "" {
		return []string{c.Hop}
	}
	return nil
}

// hopNames reads PathHeader. Nothing of it counts if a part of it is no node's name, or it has too many.
func hopNames(h http.Header) []string {
	names := splitList(h[PathHeader])
	if len(names) > maxHops {
		return nil
	}
	if slices.ContainsFunc(names, func(n string) bool { return len(n) > 63 || strings.Trim(n, alphanumeric+"-_.") != "" }) {
		return nil
	}
	return names
}

// stop is a place on the path that a page shows.
type stop struct {
	Name, State string
	Failed      bool
}

// stops is the path of a request to the hop that did not answer it; nil if the fault is here.
func (s *Server) stops(x *exchange, f fault) []stop {
	if f.target == "" {
		return nil
	}
	var way []stop
	for _, n := range slices.Concat([]string{"you"}, x.passed(), []string{s.opts.Node}) {
		way = append(way, stop{Name: n, State: "working"})
	}
	return append(way, stop{Name: bare(f.target), State: f.state, Failed: true})
}

// timingHeader asks the hops behind this one to show what they took. Only a hop that is believed may ask.
const timingHeader = "X-Tailsplice-Timing"

// sameHeader says whether two names of headers become one variable in CGI, WSGI and what is like them: each
// byte outside of letters and digits is the same there, and letters have no case.
func sameHeader(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && folds[a[i]] != folds[b[i]] {
			return false
		}
	}
	return true
}

// foldName appends name to buf as sameHeader sees it.
func foldName(buf []byte, name string) []byte {
	for i := range len(name) {
		buf = append(buf, folds[name[i]])
	}
	return buf
}

// folds are what bytes become: letters lower case, and what is neither letter nor digit "-".
var folds = func() (all [256]byte) {
	for c := range all {
		all[c] = '-'
		if strings.IndexByte(alphanumeric, byte(c)) >= 0 {
			all[c] = strings.ToLower(string(rune(c)))[0]
		}
	}
	return all
}()

// isPlainName says whether nothing but - stands between a name's letters and digits.
func isPlainName(name string) bool { return strings.Trim(name, alphanumeric+"-") == "" }

// dropHeader removes a header, however it is written.
func dropHeader(h http.Header, name string) {
	maps.DeleteFunc(h, func(other string, _ []string) bool { return sameHeader(other, name) })
}
