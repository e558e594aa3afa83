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
// prefix that its route adds. Some servers leave escaped slashes alone, some take a backslash for a slash (IIS,
// and whatever parses by WHATWG's rules), cut ;parameters off before they resolve dot segments (Tomcat,
// Jetty), resolve none (Express), or take what follows two slashes at the start for a host (WHATWG). The error
// is a *BadRequest.
func (s *Server) checkReadings(x *exchange) error {
	if !isOddPath(x.uri.Path) {
		return nil
	}
	refuse := &BadRequest{BadPath, "Servers do not agree which path this is, and it might lead past a rule: send it without escaped slashes, backslashes, ;parameters, dot segments and double slashes."}
	if len(x.uri.Path) > maxOddPath {
		return refuse
	}
	seen := []string{x.uri.Plain}
	for way := range reading(readings) {
		path := way.of(x.uri.Path)
		if slices.Contains(seen, path) {
			continue
		}
		seen = append(seen, path)
		other, err := s.opts.Route(x.req, x.uri.Host, path)
		if err != nil || other == nil || other != x.route && (other.Guard != nil || other.ClientCAs != nil) {
			return refuse
		}
	}
	if prefix := x.route.AddPrefix; prefix != "" {
		for way := range reading(readings) {
			if !PathMatches(prefix, way.of(x.route.path(&x.uri))) {
				return refuse
			}
		}
	}
	return nil
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
		case "2e", "2f", "5c":
			return true
		}
		rest = rest[i+3:]
	}
}

// reading is a way to read a path: a set of the following.
type reading uint8

const (
	keepSlashes reading = 1 << iota // an escaped slash divides nothing
	backslashes                     // a backslash is a slash
	cutParams                       // what follows a ; in a segment is not of its name
	keepDots                        // dot segments are names
	cutHost                         // what follows two slashes at the start is a host
	readings                        // how many there are
)

// of reads path.
func (w reading) of(path string) string {
	if w&backslashes != 0 {
		path = strings.NewReplacer(`\`, "/", "%5c", "/", "%5C", "/").Replace(path)
	}
	if rest, ok := strings.CutPrefix(path, "//"); ok && w&cutHost != 0 {
		_, rest, _ = strings.Cut(rest, "/")
		path = "/" + rest
	}
	if w&cutParams != 0 && strings.IndexByte(path, ';') >= 0 {
		segments := strings.Split(path, "/")
		for i := range segments {
			segments[i], _, _ = strings.Cut(segments[i], ";")
		}
		path = strings.Join(segments, "/")
	}
	if w&keepSlashes != 0 {
		path = strings.NewReplacer("%2f", "%252f", "%2F", "%252f").Replace(path)
	}
	plain, err := url.PathUnescape(path)
	if err != nil {
		return path // readURI has refused such
	}
	if w&keepDots != 0 {
		for strings.Contains(plain, "//") {
			plain = strings.ReplaceAll(plain, "//", "/")
		}
		return plain
	}
	return RoutePath(plain)
}
