package passage

import (
	"bytes"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// beside sends the message through nginx too, and says what its target gets that ours did not, or the
// reverse, and no table knows. got is what ours got, nil for nothing: refusal knows why then.
func (x *exchange) beside(got *request, nginx *passage) string {
	other := &exchange{wire: x.wire, message: x.message, reply: reply{status: 200, cut: -1}}
	q, a, err := nginx.send(other)
	if q == nil && a.Status == 0 { // nginx ends connections now and then; this one is new
		q, a, err = nginx.send(other)
	}
	switch {
	case err != nil:
		return "nginx: " + err.Error()
	case got == nil:
		return ""
	case q == nil:
		if x.nginxRefuses() == "" {
			return fmt.Sprintf("nginx refuses it with %d, %v", a.Status, a.Cut)
		}
		return ""
	case !q.whole:
		return ""
	}
	var wrong strings.Builder
	differs := func(what string, theirs, ours any) {
		if g, w := fmt.Sprintf("%q", ours), fmt.Sprintf("%q", theirs); g != w {
			fmt.Fprintf(&wrong, "%s is %.300s, and with nginx %.300s; ", what, g, w)
		}
	}
	differs("the method", q.method, got.method)
	differs("the request-target", x.nginxTarget(q.target), got.target)
	// Which nginx doesn't send: RFC 9112 3.2.
	if host := valuesOf(got.fields, "Host"); !slices.Equal(host, []string{""}) {
		differs("Host", valuesOf(q.fields, "Host"), host)
	}
	// nginx passes these on, or not, by a list of its own; those that Connection names it passes.
	drop := slices.Concat(hopByHop, own, []string{"Host", "Expect"}, named(x.message.Fields))
	theirs, ours := byName(q.fields, drop), byName(got.fields, drop)
	if agents := theirs["User-Agent"]; len(agents) > 1 || len(agents) == 1 && agents[0] == "" { // see arrived
		delete(theirs, "User-Agent")
		delete(ours, "User-Agent")
	}
	for name := range theirs {
		differs(name, theirs[name], ours[name])
	}
	for name := range ours {
		if theirs[name] == nil {
			differs(name, theirs[name], ours[name])
		}
	}
	if !x.reply.early && !bytes.Equal(q.body, got.body) {
		differs("the body", len(q.body), len(got.body))
	}
	return wrong.String()
}

// nginxTarget is what nginx sends that this hop writes in another way.
func (x *exchange) nginxTarget(target string) string {
	if strings.HasPrefix(target, "//") {
		return escapeOdd(target)
	}
	return target
}

// nginxRefuses says why nginx refuses what this hop passes on, "" if it should not.
func (x *exchange) nginxRefuses() string {
	m := x.message
	host, target, _ := x.address()
	path, _, _ := strings.Cut(target, "?")
	switch {
	case strings.Trim(m.Method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-_") != "":
		return "a method that is not in upper case"
	case m.Method == http.MethodTrace:
		return "TRACE"
	case strings.Contains(m.Target, "://") && strings.Contains(host, "_"):
		return "an underscore in the host of a whole address"
	case host == "":
		return "an empty host in HTTP/1.0"
	case m.Target == "*":
		return "OPTIONS *"
	case leadsOut(path):
		return "a path that leads above the root"
	case x.wire.HTTP2 && len(m.Hosts) > 1:
		return "a host beside :authority"
	case x.wire.HTTP2 && slices.ContainsFunc(m.Split, func(share int) bool { return share < 8 }):
		return "HEADERS without a byte of the block, which may be in CONTINUATION"
	case x.wire.HTTP2 && len(m.Trailer) > 0:
		return "trailers of HTTP/2"
	}
	for _, name := range []string{"Authorization", "If-None-Match", "Expect"} {
		if len(valuesOf(m.Fields, name)) > 1 {
			return "two headers that can't be lists"
		}
	}
	return ""
}

// leadsOut says whether a path has more .. than segments before them.
func leadsOut(path string) bool {
	depth := -1
	plain, _ := url.PathUnescape(path)
	for segment := range strings.SplitSeq(plain, "/") {
		switch segment {
		case "..":
			depth--
		case ".":
		default:
			depth++
		}
		if depth < 0 {
			return true
		}
	}
	return false
}
