package passage

import (
	"bytes"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/tailsplice/tailsplice/test/oracle"
)

// This file is the table of what may change on the way. Whatever it doesn't name arrives as it was sent.

// An exchange is a message, and what its target answers.
type exchange struct {
	wire    oracle.Wire
	message *oracle.Message
	reply   reply
}

func (x *exchange) String() string {
	m, r := *x.message, x.reply
	m.Body, r.body, r.cut = m.Body[:min(len(m.Body), 8)], r.body[:min(len(r.body), 8)], min(r.cut, 8)
	text := fmt.Sprintf("%s %s, a body of %d, answered (early: %v, cut: %d) by %q, a body of %d", x.wire, &m,
		len(x.message.Body), r.early, x.reply.cut, r.bytes(m.Method), len(x.reply.body))
	return regexp.MustCompile(`v{30,}`).ReplaceAllStringFunc(text,
		func(v string) string { return fmt.Sprintf("v{%d}", len(v)) })
}

// plain says whether the client speaks HTTP/1.0.
func (x *exchange) plain() bool { return !x.wire.HTTP2 && x.message.Version == "HTTP/1.0" }

// names that belong to one connection, or frame a message.
var hopByHop = []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade", "Content-Length"}

// Of requests: what this hop says, whoever said it before.
var own = []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Tailsplice-Id", "X-Tailsplice-Path",
	"X-Request-Id"}

// Trailers that mean something to whom takes them for headers are dropped.
var notTrailers = append([]string{"Host", "Authorization", "Cookie", "Expect", "Range", "Content-Type",
	"If-None-Match",
	"Cache-Control", "Max-Forwards", "Content-Encoding", "Pragma"}, slices.Concat(hopByHop, own)...)

// spelled is how a name is written in HTTP/1.
func spelled(name string) string {
	name = http.CanonicalHeaderKey(name)
	if rest, ok := strings.CutPrefix(name, "Sec-Websocket-"); ok {
		return "Sec-WebSocket-" + rest
	}
	return name
}

// byName are the values of each name as it is to be written, without what drop names, and without the space
// around values. Values of one name keep their order, names don't.
func byName(fields []oracle.Field, drop []string) http.Header {
	h := http.Header{}
	for _, f := range fields {
		if !slices.Contains(drop, http.CanonicalHeaderKey(f.Name)) {
			h[spelled(f.Name)] = append(h[spelled(f.Name)], strings.Trim(f.Value, " \t"))
		}
	}
	return h
}

// named are the names in the header Connection: they belong to the connection.
func named(fields []oracle.Field) (names []string) {
	for _, f := range fields {
		if strings.EqualFold(f.Name, "Connection") {
			for name := range strings.SplitSeq(f.Value, ",") {
				names = append(names, http.CanonicalHeaderKey(strings.TrimSpace(name)))
			}
		}
	}
	return names
}

var validHost = regexp.MustCompile(`^([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?|\[[0-9a-fA-F:.]+\])` +
	`(:[1-9][0-9]{0,4})?$`)

var badEscape = regexp.MustCompile(`%($|.$|[^0-9a-fA-F]|.[^0-9a-fA-F]|00)`)

// address is the host that a message is for and the request-target that arrives.
func (x *exchange) address() (host, target string, ok bool) {
	m := x.message
	if len(m.Hosts) > 0 {
		host = m.Hosts[0]
	}
	target = m.Target
	for _, scheme := range []string{"http://", "https://"} {
		if !x.wire.HTTP2 && len(target) > len(scheme) && strings.EqualFold(target[:len(scheme)], scheme) {
			// A whole address is in the place of Host.
			rest := target[len(scheme):]
			end := strings.IndexAny(rest, "/?")
			if end < 0 {
				end = len(rest)
			}
			host, target = rest[:end], rest[end:]
			if !strings.HasPrefix(target, "/") {
				target = "/" + target
			}
		}
	}
	return host, target, target == "*" && m.Method == http.MethodOptions || strings.HasPrefix(target, "/")
}

// refusal says why a message may be refused, "" if it may not.
func (x *exchange) refusal() string {
	m := x.message
	host, target, ok := x.address()
	path, _, _ := strings.Cut(target, "?")
	switch {
	case !httpguts.ValidHeaderFieldName(m.Method):
		return "the method is no token"
	case m.Method == http.MethodConnect:
		return "no forward proxy"
	case m.Method == "PRI":
		return "a method of HTTP/2 itself"
	case !ok:
		return "the request-target has no form that is served"
	case strings.ContainsFunc(target, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '#' }):
		return "the request-target has a space, a # or a control character"
	case badEscape.MatchString(path):
		return "the path has a % that is no escape, or an escaped NUL"
	case len(m.Hosts) > 1 && !(x.wire.HTTP2 && len(m.Hosts) == 2 && strings.EqualFold(m.Hosts[0],
		m.Hosts[1])):
		return "two hosts"
	case host == "" && (!x.plain() || strings.Contains(m.Target, "://")), len(m.Hosts) == 0 &&
		!x.plain(), host != "" && !validHost.MatchString(host):
		return "the host is none"
	}
	for _, f := range slices.Concat(m.Fields, m.Trailer) {
		name := http.CanonicalHeaderKey(f.Name)
		switch {
		case !httpguts.ValidHeaderFieldName(f.Name) || !httpguts.ValidHeaderFieldValue(f.Value):
			return "a header's name or value is none"
		case name == "Expect" && !strings.EqualFold(f.Value, "100-continue"):
			return "an expectation that is unknown"
		case x.wire.HTTP2 && (slices.Contains(hopByHop[:8], name) || name == "Upgrade") && !(name == "Te" &&
			f.Value == "trailers"):
			return "HTTP/2 has no headers of the connection"
		case x.wire.HTTP2 && slices.Contains([]string{"Content-Length", "Transfer-Encoding", "Host"}, name):
			return "another framing, or another host"
		}
	}
	if x.wire.HTTP2 && len(valuesOf(m.Fields, "TE")) > 1 {
		return "two headers TE"
	}
	size := 0
	for _, f := range m.Trailer {
		if size += len(f.Name) + len(f.Value); size > 3000 {
			return "trailers that are longer than net/http takes"
		}
		if x.wire.HTTP2 && !httpguts.ValidTrailerHeader(http.CanonicalHeaderKey(f.Name)) {
			return "a trailer that net/http resets the stream for"
		}
		if slices.Contains([]string{"Transfer-Encoding", "Trailer", "Content-Length"},
			http.CanonicalHeaderKey(f.Name)) {
			return "a trailer that frames"
		}
	}
	return ""
}

// arrived says what is wrong with what the target got, "" if nothing is.
func (x *exchange) arrived(q *request) string {
	m := x.message
	host, target, _ := x.address()
	if strings.HasPrefix(target, "//") {
		target = escapeOdd(target) // net/url writes no such path as it is
	}
	var wrong strings.Builder
	differs := func(what string, got, want any) {
		if g, w := fmt.Sprintf("%q", got), fmt.Sprintf("%q", want); g != w {
			fmt.Fprintf(&wrong, "%s is %.300s, want %.300s; ", what, g, w)
		}
	}
	differs("the method", q.method, m.Method)
	differs("the request-target", q.target, target)
	differs("the version", q.version, "HTTP/1.1")
	differs("Host", valuesOf(q.fields, "Host"), []string{host})

	drop := slices.Concat(hopByHop, own, []string{"Host"}, named(m.Fields))
	want, got := byName(m.Fields, drop), http.Header{}
	for _, f := range q.fields {
		if !slices.Contains(append([]string{"Host"}, own...), f.Name) {
			got[f.Name] = append(got[f.Name], f.Value)
		}
	}
	for _, f := range m.Fields { // a client that takes trailers says so to each hop
		if strings.EqualFold(f.Name, "TE") && httpguts.HeaderValuesContainsToken([]string{f.Value},
			"trailers") {
			want["Te"] = []string{"trailers"}
		}
	}
	if cookies := valuesOf(m.Fields, "Cookie"); x.wire.HTTP2 && want["Cookie"] != nil { // RFC 9113 8.2.3
		want["Cookie"] = []string{strings.Trim(strings.Join(cookies, "; "), " \t")}
	}
	if len(m.Body) == 0 && !m.Chunked || x.plain() || x.wire.HTTP2 {
		delete(want, "Expect") // it is about a body; net/http answers that of HTTP/2
	}
	if got["Expect"] == nil {
		delete(want, "Expect") // of a target that has ignored one
	}
	if agents := want["User-Agent"]; len(agents) > 0 && agents[0] == "" {
		delete(want, "User-Agent") // net/http takes it for one that is not to be sent
	} else if len(agents) > 0 {
		want["User-Agent"] = agents[:1] // there is no list of them
	}
	for name := range want {
		differs(name, got[name], want[name])
	}
	for name := range got {
		if want[name] == nil {
			differs(name, got[name], want[name])
		}
	}
	if x.reply.early {
		return wrong.String()
	}
	if !bytes.Equal(q.body, m.Body) || !q.whole {
		fmt.Fprintf(&wrong, "the body has %d bytes, whole: %v, want %d; ", len(q.body), q.whole, len(m.Body))
	}
	if len(m.Body) > 0 {
		differs("chunked", q.chunked, m.Chunked || len(m.Trailer) > 0)
		if !q.chunked {
			differs("Content-Length", q.length, fmt.Sprint(len(m.Body)))
		}
	}
	trailer := slices.DeleteFunc(slices.Clone(m.Trailer),
		func(f oracle.Field) bool { return !httpguts.ValidHeaderFieldName(f.Name) })
	differs("the trailers", byName(q.trailer, nil), byName(trailer, notTrailers))
	return wrong.String()
}

// escapeOdd escapes what no path may have (RFC 3986 3.3), up to the query.
func escapeOdd(target string) string {
	path, query, some := strings.Cut(target, "?")
	var b strings.Builder
	for i := range len(path) {
		if c := path[i]; c >= 0x80 || strings.IndexByte("\"<>\\^`{|}", c) >= 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	if some {
		b.WriteString("?" + query)
	}
	return b.String()
}

// cameBack says what is wrong with what the client got, "" if nothing is.
func (x *exchange) cameBack(a oracle.Answer) string {
	r, m := &x.reply, x.message
	var wrong strings.Builder
	differs := func(what string, got, want any) {
		if g, w := fmt.Sprintf("%q", got), fmt.Sprintf("%q", want); g != w {
			fmt.Fprintf(&wrong, "%s is %.300s, want %.300s; ", what, g, w)
		}
	}
	differs("the status", a.Status, r.status)

	var interim []int
	for _, line := range r.interim {
		var status int
		fmt.Sscan(line, &status)
		if !x.plain() { // HTTP/1.0 has none
			interim = append(interim, status)
		}
	}
	differs("what comes before the answer", slices.DeleteFunc(slices.Clone(a.Interim),
		func(s int) bool { return s == 100 }), interim)

	drop := slices.Concat(hopByHop, []string{"Alt-Svc"}, named(r.fields))
	want, got := http.Header{}, http.Header{}
	for name, values := range byName(r.fields, drop) {
		want[http.CanonicalHeaderKey(name)] = values
	}
	for name, values := range a.Header {
		if name = http.CanonicalHeaderKey(name); !slices.Contains(hopByHop, name) && !(name == "Date" &&
			want["Date"] == nil) {
			got[name] = values
		}
	}
	if r.status == 304 && got["Content-Type"] == nil {
		delete(want, "Content-Type") // net/http on HTTP/1; the client knows it
	}
	for name := range want {
		differs(name, got[name], want[name])
	}
	for name := range got {
		if want[name] == nil {
			differs(name, got[name], want[name])
		}
	}

	if r.status == 204 {
		differs("the length of a 204", a.Header["Content-Length"], []string(nil))
	}
	body := r.body
	if r.cut >= 0 {
		body = body[:r.cut]
	}
	if r.bodiless(m.Method) {
		body = nil
	}
	if !bytes.Equal(a.Body, body) {
		fmt.Fprintf(&wrong, "the answer's body has %d bytes, want %d; ", len(a.Body), len(body))
	}
	cut := r.cut >= 0 && !r.bodiless(m.Method) && (r.framing == byChunks || r.framing == byLength &&
		r.cut < len(r.body))
	if looksCut := a.Cut != nil; looksCut != cut {
		fmt.Fprintf(&wrong, "the answer ends by %v, want it cut: %v; ", a.Cut, cut)
	}
	if lengths := a.Header["Content-Length"]; r.framing == byLength && r.status != 204 && r.status != 304 &&
		lengths != nil {
		differs("the answer's length", lengths, []string{fmt.Sprint(len(r.body))})
	}
	if r.framing == byChunks && !r.bodiless(m.Method) && !cut && !x.plain() {
		trailer := http.Header{}
		for name, values := range a.Trailer {
			trailer[spelled(name)] = values
		}
		differs("the answer's trailers", trailer, byName(r.trailer, nil))
	}
	return wrong.String()
}
