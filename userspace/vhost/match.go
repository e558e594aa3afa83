package vhost

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Match is what narrows a host's routes. The zero Match takes every request.
type Match struct {
	Path    string            // see PathMatches
	Methods []string          // nil for any; GET takes HEAD too
	Headers map[string]string // by canonical name; "*" is any value
	AnyCase bool              // Path is in upper or lower case: servers may take both for the same
}

// Takes says whether m takes a request whose path is path, as Options.Route got it, and if not, whether it is
// the method alone that doesn't fit.
func (m *Match) Takes(r *http.Request, path string) (ok, otherMethod bool) {
	if !m.TakesPath(path) {
		return false, false
	}
	for name, want := range m.Headers {
		values := valuesOf(r.Header, name)
		if len(values) == 0 || want != "*" && !slices.Contains(values, want) {
			return false, false
		}
	}
	// WSGI's frameworks take post for POST, so a rule for one is a rule for both.
	method := strings.ToUpper(r.Method)
	if m.Methods == nil || slices.Contains(m.Methods, method) || method == http.MethodHead && slices.Contains(m.Methods, http.MethodGet) {
		return true, false
	}
	return false, true
}

// TakesPath says whether m takes this path.
func (m *Match) TakesPath(path string) bool {
	if !m.AnyCase {
		return PathMatches(m.Path, path)
	}
	for _, want := range strings.TrimSuffix(m.Path, "/") {
		got, size := utf8.DecodeRuneInString(path)
		if size == 0 || got != want && anyCase(got) != anyCase(want) {
			return false
		}
		path = path[size:]
	}
	return path == "" || path[0] == '/'
}

// valuesOf are the values of a header, however its name is written: the target may read all of them as one.
func valuesOf(h http.Header, name string) (all []string) {
	for other, values := range h {
		if sameHeader(other, name) {
			all = append(all, values...)
		}
	}
	return all
}

// PathMatches says whether a route's path covers path: the same, or followed by more segments. "/api/" and
// "/api" both cover /api, /api/ and /api/x, and not /apis; "" and "/" cover everything.
func PathMatches(route, path string) bool {
	route = strings.TrimSuffix(route, "/")
	rest, ok := strings.CutPrefix(path, route)
	return ok && (rest == "" || rest[0] == '/')
}

// anyCase makes one of the letters that Express, Caddy, IIS, Java and what is like them take for the same.
func anyCase(r rune) rune { return unicode.ToLower(unicode.ToUpper(r)) }

// MethodError says that there are routes for the path, and none for the method: 405.
type MethodError struct{ Allow []string }

func (e *MethodError) Error() string {
	return fmt.Sprintf("no route for this method, only for %s", strings.Join(e.Allow, ", "))
}
