package vhost

import (
	"net/url"
	"slices"
	"strings"
)

// maxOddPath bounds a path about which servers may disagree: each way to read it is looked up.
const maxOddPath = 8 << 10

// checkReadings refuses a path by which x would get round a rule if its target reads paths in another way
// than Plain was read: the path leads to no route then, to a route with a guard of its own, or out of the
// prefix that its route adds. The error is a *BadRequest.
func (s *Server) checkReadings(x *exchange) error {
	if !isOddPath(x.uri.Path) {
		return nil
	}
	if x.route.AddPrefix == "" && s.opts.ByPath != nil && !s.opts.ByPath(x.uri.Host) {
		return nil // whatever it is read as
	}
	refuse := &BadRequest{BadPath, "Servers do not agree which path this is, and it might lead past a rule: send it without escaped slashes, backslashes, ;parameters, dot segments and double slashes."}
	paths, ok := x.readings()
	if !ok {
		return refuse
	}
	for _, path := range paths {
		if path == x.uri.Plain {
			continue
		}
		other, err := s.opts.Route(x.req, x.uri.Host, path)
		if err != nil || other == nil || other != x.route && (other.Guard != nil || other.ClientCAs != nil) {
			return refuse
		}
	}
	if prefix := x.route.AddPrefix; prefix != "" {
		paths, ok := readings(x.route.path(&x.uri))
		if !ok || slices.ContainsFunc(paths, func(path string) bool { return !PathMatches(prefix, path) }) {
			return refuse
		}
	}
	return nil
}

// readings are the paths that x may be for, by its route's prefixes, if they are not too many.
func (x *exchange) readings() (all []string, ok bool) {
	if len(x.uri.Path) > maxOddPath {
		return nil, false
	}
	all, ok = readings(x.uri.Path)
	if !ok || x.route.StripPrefix == "" && x.route.AddPrefix == "" {
		return all, ok
	}
	rest, ok := readings(x.route.rest(&x.uri)) // the target reads what the prefixes leave
	for _, path := range rest {
		all = append(all, strings.TrimSuffix(x.route.StripPrefix, "/")+path)
	}
	return all, ok
}

// isOddPath says whether servers may disagree about a path. Those of most requests are not odd.
func isOddPath(path string) bool {
	if strings.ContainsAny(path, `;\`) || strings.HasPrefix(path, "//") || strings.Contains(path, "/.") {
		return true
	}
	for rest := path; ; {
		i := strings.IndexByte(rest, '%')
		if i < 0 || i+3 > len(rest) {
			return false
		}
		switch strings.ToLower(rest[i+1 : i+3]) {
		case "23", "25", "2e", "2f", "3f", "5c":
			return true
		}
		rest = rest[i+3:]
	}
}

// maxReadings bounds the ways to write a path for its readers: half a dozen differences in one have more.
const maxReadings = 32

// readings are the paths that servers may take path for, if there are not too many.
func readings(path string) (all []string, ok bool) {
	ways := []string{path}
	orAlso := func(read func(string) string) {
		if len(ways) > maxReadings {
			return
		}
		for _, p := range ways {
			if p = read(p); !slices.Contains(ways, p) {
				ways = append(ways, p)
			}
		}
	}
	orAlso(unescapePercents.Replace) // servers behind which another one decodes again
	orAlso(resolvedOnce)             // nginx that sends its decoded $uri on: the same, after dot segments
	orAlso(cutQuery)                 // the same: an escaped ? or # is none any more
	orAlso(slashBackslashes.Replace) // IIS, and whatever parses by WHATWG's rules
	orAlso(cutHost)
	orAlso(cutHostBehindAll)           // WHATWG
	orAlso(cutParams)                  // Tomcat, Jetty
	orAlso(keepEscapedSlashes.Replace) // many: an escaped slash divides nothing
	orAlso(keepEscapedDots.Replace)    // HAProxy, java.net.URI: an escaped dot is a name
	if len(ways) > maxReadings {
		return nil, false
	}
	for _, p := range ways {
		plain, err := url.PathUnescape(p)
		if err != nil {
			plain = p // readURI has refused such
		}
		for _, p := range [...]string{
			RoutePath(plain),
			// WHATWG, HAProxy, nginx with merge_slashes off: the name between two slashes is empty
			resolveDots(plain),
			mergeSlashes(plain), // Express, with and without its middleware: dot segments are names
			plain,
		} {
			if !slices.Contains(all, p) {
				all = append(all, p)
			}
		}
	}
	return all, true
}

var (
	unescapePercents   = strings.NewReplacer("%25", "%")
	slashBackslashes   = strings.NewReplacer(`\`, "/", "%5c", "/", "%5C", "/")
	keepEscapedSlashes = strings.NewReplacer("%2f", "%252f", "%2F", "%252f") // which decode to what was there
	keepEscapedDots    = strings.NewReplacer("%2e", "%252e", "%2E", "%252e")
)

// resolvedOnce decodes and resolves path, where that leaves something to be decoded again.
func resolvedOnce(path string) string {
	plain, err := url.PathUnescape(path)
	if err != nil || !strings.Contains(plain, "%") {
		return path
	}
	return RoutePath(plain)
}

// cutQuery cuts off an escaped ? or #, and what follows it.
func cutQuery(path string) string {
	for i := range len(path) - 2 {
		if path[i] == '%' && (strings.EqualFold(path[i+1:i+3], "3f") || path[i+1:i+3] == "23") {
			return path[:i]
		}
	}
	return path
}

// cutHost takes what follows two slashes at the start for a host.
func cutHost(path string) string {
	rest, ok := strings.CutPrefix(path, "//")
	if !ok {
		return path
	}
	_, rest, _ = strings.Cut(rest, "/")
	return "/" + rest
}

// cutHostBehindAll takes what follows two slashes or more at the start for a host.
func cutHostBehindAll(path string) string {
	if !strings.HasPrefix(path, "//") {
		return path
	}
	return cutHost("//" + strings.TrimLeft(path, "/"))
}

// cutParams cuts off what follows a ; in each segment.
func cutParams(path string) string {
	segments := strings.Split(path, "/")
	for i := range segments {
		segments[i], _, _ = strings.Cut(segments[i], ";")
	}
	return strings.Join(segments, "/")
}

// resolveDots resolves dot segments as in RFC 3986 5.2.4, where the segment between two slashes is empty.
func resolveDots(path string) string {
	segments := strings.Split(path, "/")[1:] // what is before the first slash is none
	out := segments[:0]
	for i, s := range segments {
		switch {
		case s == ".." && len(out) > 0:
			out = out[:len(out)-1]
		case s != "." && s != "..":
			out = append(out, s)
			continue
		}
		if i == len(segments)-1 {
			out = append(out, "") // the path ends in a slash
		}
	}
	return "/" + strings.Join(out, "/")
}

func mergeSlashes(path string) string {
	for strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	return path
}
