package vhost

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// URI is what a request is for. It is read once, when the request enters: what is routed, guarded, logged,
// told to others and sent on comes from it, and the request's own fields are made those of it. Whatever two
// servers could read in two ways is no URI, and is refused.
type URI struct {
	// Authority is the host, with a port if the client wrote one, in the client's own spelling. "" is only
	// for HTTP/1.0, where a request need not name a host.
	Authority string
	Host      string // what routes are looked up by: lower case, no port, no dot at its end, no brackets
	Path      string // the client's bytes. It begins with "/", or is "*" in OPTIONS.
	Query     string // the client's bytes from the "?" on; "" if there is none
	// Plain is Path as an upstream reads it that decodes and resolves, so that no other way of writing a path
	// leads around a route: without escapes, dot segments and double slashes. That of "*" is "/".
	Plain string
}

// String is the request-target that is sent on.
func (u *URI) String() string { return u.Path + u.Query }

// HostPort is the host as routes are looked up by it, with the port that the client wrote, if any: Authority
// in the one spelling that whoever compares hosts will know.
func (u *URI) HostPort() string {
	host, port := u.Host, ""
	if i := strings.LastIndexByte(u.Authority, ':'); i > strings.LastIndexByte(u.Authority, ']') {
		port = u.Authority[i:]
	}
	if strings.IndexByte(host, ':') >= 0 {
		host = "[" + host + "]"
	}
	return host + port
}

// BadRequest is why a request was refused before it was routed: 400.
type BadRequest struct {
	Reason string // one of the Bad constants, for metrics
	text   string // for people: what is wrong, and what would be right
}

func (e *BadRequest) Error() string { return e.text }

// Reasons of a BadRequest.
const (
	BadTarget    = "bad_target"    // the request-target has no form that is served
	BadHost      = "bad_host"      // the host is neither a name nor an address, with a port or without
	HostMismatch = "host_mismatch" // :authority and Host differ
	// servers don't agree which path it is, and the answers to that lead to different rules
	BadPath = "bad_path"
)

// readURI reads what r is for, and sets r's fields that name it. The scheme is the connection's, whatever the
// client says. The error is a *BadRequest; the URI that comes with it is for logs.
func readURI(r *http.Request) (URI, error) {
	asked := URI{Authority: r.Host, Host: r.Host, Path: r.RequestURI} // for the log, if it is refused
	authority, target, isAbsolute, err := splitTarget(r)
	if err != nil {
		return asked, err
	}
	u := URI{Authority: authority, Path: target}
	var ok bool
	if u.Host, ok = readHost(authority); !ok && (authority != "" || isAbsolute || r.ProtoAtLeast(1, 1)) {
		return asked, &BadRequest{BadHost, "The host of the request is neither a name nor an address, with one port or without: send Host: example.org or Host: example.org:8080."}
	}
	if i := strings.IndexByte(target, '?'); i >= 0 {
		u.Path, u.Query = target[:i], target[i:]
	}
	if !httpguts.ValidHeaderFieldName(r.Method) { // net/http checks that in HTTP/1 only
		return asked, &BadRequest{BadTarget, "The method is no token: send one such as GET."}
	}
	plain := "/"
	if target != "*" || r.Method != http.MethodOptions {
		if plain, err = readPath(u.Path, target); err != nil {
			return asked, err
		}
	}
	u.Plain = RoutePath(plain)
	r.Host, r.RequestURI = u.Authority, u.String()
	*r.URL = url.URL{Path: plain, RawPath: u.Path, RawQuery: strings.TrimPrefix(u.Query, "?"), ForceQuery: u.Query == "?"}
	return u, nil
}

// splitTarget gives the authority of r's target, or of its header, and what follows in the target. The error
// is a *BadRequest.
func splitTarget(r *http.Request) (authority, target string, isAbsolute bool, err error) {
	if r.ProtoMajor >= 2 {
		// net/http takes Host out of the header in HTTP/1 only.
		hosts := r.Header["Host"]
		if len(hosts) > 1 || len(hosts) == 1 && !strings.EqualFold(hosts[0], r.Host) {
			return "", "", false, &BadRequest{HostMismatch,
				"The header Host names another host than :authority: send one of them, or the same in both."}
		}
		delete(r.Header, "Host")
		return r.Host, r.RequestURI, false, nil
	}
	rest, ok := cutScheme(r.RequestURI)
	if !ok {
		return r.Host, r.RequestURI, false, nil
	}
	// The target's authority is the host then, and the header Host means nothing (RFC 9112 3.2.2).
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	authority, target = rest[:end], rest[end:]
	if target == "" || target[0] == '?' {
		target = "/" + target
	}
	return authority, target, true, nil
}

// readPath gives the path of a target without its escapes. The error is a *BadRequest.
func readPath(path, target string) (plain string, err error) {
	switch {
	case target == "" || target[0] != '/':
		return "", &BadRequest{BadTarget,
			"The request-target has no form that is served: send a path such as /x?y, or the whole http:// or https:// address."}
	case strings.ContainsFunc(target, func(c rune) bool { return c <= ' ' || c == '#' || c == 0x7f }):
		return "", &BadRequest{BadTarget,
			"The request-target has a space, a # or a control character: send it percent-encoded."}
	case strings.IndexByte(path, '%') < 0:
		return path, nil
	}
	plain, err = url.PathUnescape(path)
	if err != nil || strings.IndexByte(plain, 0) >= 0 {
		return "", &BadRequest{BadTarget,
			"The path has a % that is no escape, or an escaped NUL: send a % as %25."}
	}
	return plain, nil
}

// cutScheme takes http:// or https:// off a request-target.
func cutScheme(target string) (rest string, ok bool) {
	scheme, rest, ok := strings.Cut(target, "://")
	return rest, ok && (strings.EqualFold(scheme, "http") || strings.EqualFold(scheme, "https"))
}

// readHost reads an authority of a name or an address, with one port or without.
func readHost(authority string) (host string, ok bool) {
	host = authority
	if strings.HasPrefix(host, "[") {
		inner, rest, closed := strings.Cut(host[1:], "]")
		a, err := netip.ParseAddr(inner)
		if err != nil || !closed || !a.Is6() || a.Zone() != "" || rest != "" && !isPort(rest) {
			return "", false
		}
		return a.String(), true
	}
	if i := strings.IndexByte(host, ':'); i >= 0 {
		if !isPort(host[i:]) {
			return "", false
		}
		host = host[:i]
	}
	return routeHost(host), isName(host)
}

// isPort says whether s is a colon and a port.
func isPort(s string) bool {
	n, err := strconv.ParseUint(s[1:], 10, 16)
	return s[0] == ':' && err == nil && n > 0 && len(s) <= len(":65535") && s[1] != '0'
}

// isName says whether s is of labels of letters, digits, - and _, with or without a dot at the end.
func isName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	return s != "" && len(s) <= maxName && s[0] != '.' && s[len(s)-1] != '.' && !strings.Contains(s, "..") &&
		strings.Trim(s, alphanumeric+"-_.") == ""
}

// maxName is the length of the longest name of the DNS (RFC 1035 2.3.4).
const maxName = 253

// routeHost is the form of a name that routes are looked up by.
func routeHost(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// setTarget makes path, percent-encoded as its sender liked, and query the request-target of out.
func setTarget(out *url.URL, path, query string) {
	out.User, out.Path, out.RawPath, out.Opaque = nil, "", "", path
	out.RawQuery, out.ForceQuery = strings.TrimPrefix(query, "?"), query == "?"
	if strings.HasPrefix(path, "//") {
		// net/url writes a scheme before such an Opaque, and the target would take what follows for a host.
		// Of characters that no URI may have the escaped form is sent then.
		out.Opaque, out.RawPath = "", escapeOdd(path)
		out.Path, _ = url.PathUnescape(path) // it was read before
	}
}

// escapeOdd escapes what no path may have (RFC 3986 3.3), and leaves all else, escapes too, as it is.
func escapeOdd(path string) string {
	return escapeBytes(path, func(c byte) bool { return c >= 0x80 || strings.IndexByte("\"<>\\^`{|}", c) >= 0 })
}

// escapeBytes percent-encodes those bytes of text that are odd.
func escapeBytes(text string, odd func(byte) bool) string {
	var b strings.Builder
	for i := range len(text) {
		if odd(text[i]) {
			fmt.Fprintf(&b, "%%%02X", text[i])
		} else {
			b.WriteByte(text[i])
		}
	}
	return b.String()
}
