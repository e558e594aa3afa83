package config

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// kind is how one sort of scalar is read, and how the schema describes it.
type kind struct {
	noun  string     // what messages call it, with an example
	kinds []nodeKind // the YAML scalars that it takes; none: text
	// parse returns a string, a bool, a Target, or an int64 (numbers, nanoseconds, bytes), in the form that
	// the rest of the program compares and uses. Its errors begin after the value: `listen "x": ERROR`.
	parse func(text string) (any, error)
	// instead, if set, says what to write instead of a bare number or true or false; "" is no idea.
	instead func(text string) string
	secret  bool           // messages don't show it: a password's hash, a key, a header that may be a token
	schema  map[string]any // the JSON schema's keywords, which may allow more than parse, never less
}

func (k *kind) takes(n nodeKind) bool {
	return k.kinds == nil && n == kindText || slices.Contains(k.kinds, n)
}

// kindOf picks the kind of a struct field: by its tag, or else by its Go type.
func kindOf(sf reflect.StructField) *kind {
	name := sf.Tag.Get("kind")
	if name == "" {
		switch t := sf.Type; {
		case t == targetType:
			name = "target"
		case t == reflect.TypeFor[time.Duration]():
			name = "duration"
		case t.Kind() == reflect.Int:
			name = "count"
		default:
			name = "text"
		}
	}
	k, ok := kinds[name]
	if !ok {
		panic("no kind " + name + " for " + sf.Name)
	}
	return k
}

// text is the schema of a text with a pattern, which may be "".
func text(pattern string) map[string]any {
	s := map[string]any{"type": "string"}
	if pattern != "" {
		s["pattern"] = pattern
	}
	return s
}

// notEmpty is the schema of any other text.
var notEmpty = map[string]any{"type": "string", "minLength": 1}

func quoted(s string) string { return strconv.Quote(s) + " in quotes" }

// ifValid offers text only where it would be accepted.
func ifValid(parse func(string) (any, error), form string) func(string) string {
	return func(s string) string {
		s = fmt.Sprintf(form, s)
		if _, err := parse(s); err != nil {
			return ""
		}
		return strconv.Quote(s)
	}
}

func asAny[T any](parse func(string) (T, error)) func(string) (any, error) {
	return func(s string) (any, error) { return parse(s) }
}

// refuse is an error if something is wrong: the first one of several counts, as cmp.Or has it.
func refuse(wrong bool, format string, args ...any) error {
	if !wrong {
		return nil
	}
	return fmt.Errorf(format, args...)
}

var kinds = map[string]*kind{
	"text":  {noun: "text", instead: quoted, schema: text(""), parse: func(s string) (any, error) { return s, nil }},
	"word":  {noun: "text", instead: quoted, schema: notEmpty, parse: func(s string) (any, error) { return s, refuse(s == "", "must not be empty") }},
	"mac":   {noun: "a MAC key in base64url", secret: true, parse: parseMAC, schema: text(`^[A-Za-z0-9_-]+$`)},
	"label": {noun: "a name of letters, digits, '.', '_' and '-'", instead: quoted, parse: parseLabel, schema: text(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)},
	"listen": {
		noun: `an address to listen on such as ":443", "192.0.2.1:443", "eth0:443" or "tailnet:443"`, parse: parseListen,
		instead: ifValid(parseListen, ":%s"),
		schema:  text(`^([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Za-z:.%_-]+\])?:[0-9]{1,5}$`),
	},
	"metrics": {
		noun: `an address such as 127.0.0.1:9464`, parse: parseMetrics,
		instead: ifValid(parseMetrics, "127.0.0.1:%s"),
		schema:  text(`^([0-9.]+|\[[0-9A-Za-z:.%_-]+\])?:[0-9]{1,5}$`),
	},
	"health": {
		noun: `an address such as 127.0.0.1:9465 or tailnet:9465`, parse: parseHealth,
		instead: ifValid(parseHealth, "127.0.0.1:%s"),
		schema:  text(`^(tailnet|[0-9.]+|\[[0-9A-Za-z:.%_-]+\])?:[0-9]{1,5}$`),
	},
	"name": {
		noun: `a name such as example.org or "*.example.org"`, instead: quoted,
		parse:  asAny(checkPattern),
		schema: text(`^(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?$`),
	},
	"alpn": {
		noun: "a protocol such as h2, http/1.1 or acme-tls/1", instead: quoted, parse: parseALPN,
		schema: map[string]any{"type": "string", "minLength": 1, "maxLength": 255, "examples": []string{"h2", "http/1.1", "acme-tls/1"}},
	},
	"path":         {noun: "a path such as /api/", parse: parsePath, schema: text(`^/[^?#*%]*$`)},
	"method":       {noun: "a method such as GET", parse: parseMethod, schema: text(`^[A-Z]+$`)},
	"header":       {noun: "a header's name such as X-Api", instead: quoted, parse: parseHeader, schema: text(`^[A-Za-z0-9-]+$`)},
	"header_value": {noun: "a header's value", secret: true, instead: quoted, parse: parseHeaderValue, schema: text("")},
	"server_name":  {noun: "a name such as example.org", parse: parseServerName, schema: text(`^[A-Za-z0-9._:-]+$`)},
	"redirect":     {noun: "https, or a URL such as https://example.org", parse: parseRedirect, schema: text(`^(https$|https?://.+)`)},
	"redirect_code": {
		noun: "one of " + strings.Join(redirectCodes, ", "), kinds: []nodeKind{kindNumber}, parse: parseRedirectCode,
		schema: map[string]any{"type": "integer", "enum": []int{301, 302, 303, 307, 308}},
	},
	"status": {
		noun: "a status such as 200, or a class such as 2xx", kinds: []nodeKind{kindNumber, kindText}, parse: parseStatus,
		schema: map[string]any{"type": []string{"integer", "string"}, "pattern": status.String()},
	},
	"age": {noun: "an age such as 1y, 180d or 24h", parse: parseAge, schema: text(`^([0-9]+[yd]|([0-9]+(\.[0-9]*)?(ns|us|µs|μs|ms|s|m|h))+)$`)},
	"target": {
		noun: targetNoun, parse: asAny(parseTarget),
		instead: ifValid(asAny(parseTarget), "127.0.0.1:%s"),
		schema:  text(`^((tailnet://)?(\[[0-9A-Za-z:.%_-]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}|docker://[A-Za-z0-9._/-]+:[0-9]{1,5}|unix:///.+)$`),
	},
	"peer":          {noun: "a CIDR, an IP address, a node's name, a user's login (with @) or a tag (tag:edge)", instead: quoted, parse: parsePeer, schema: notEmpty},
	"ether":         {noun: "the address of a network card such as 02:00:5e:10:00:01", instead: quoted, parse: parseEther, schema: text(`^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$|^([0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}$`)},
	"prefix":        {noun: "a CIDR or an IP address", parse: parsePrefix, schema: text(`^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$`)},
	"rate":          {noun: "a rate such as 20/s, 300/m or 1000/h", parse: parseRate, instead: ifValid(parseRate, "%s/s"), schema: text(`^[0-9]+/[smh]$`)},
	"file":          {noun: "a file", instead: quoted, parse: parseFile, schema: notEmpty},
	"socket":        {noun: "the path of a unix socket", parse: parseSocket, schema: notEmpty},
	"email":         {noun: "an e-mail address", parse: parseEmail, schema: text(`^[^@\s]+@[^@\s]+$`)},
	"url":           {noun: "an https:// URL", parse: parseURL, schema: text(`^https://.+`)},
	"bcrypt":        {noun: "a bcrypt hash such as $2y$10$...", secret: true, parse: parseBcrypt, schema: text(bcryptPattern)},
	"user":          {noun: "a user's name", instead: quoted, parse: parseUser, schema: text(`^[^:]+$`)},
	"copied_header": {noun: "a header's name such as Remote-User", instead: quoted, parse: parseCopiedHeader, schema: text("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")},
	"authurl":       {noun: "a URL such as http://127.0.0.1:9091/verify", parse: parseAuthURL, schema: text(`^(http|https|tailnet|docker)://.+`)},
	"true": {
		noun: "true, or left out", kinds: []nodeKind{kindBool},
		parse:  func(s string) (any, error) { return true, refuse(s != "true", "must be true, or left out") },
		schema: map[string]any{"type": "boolean", "const": true},
	},
	"bool": {
		noun: "true or false", kinds: []nodeKind{kindBool},
		parse:  func(s string) (any, error) { return s == "true", nil },
		schema: map[string]any{"type": "boolean"},
	},
	"count": {noun: "a number", kinds: []nodeKind{kindNumber}, parse: parseCount, schema: map[string]any{"type": "integer"}},
	"duration": {
		noun: "a duration such as 5s, 10m or 1h", parse: parseDuration,
		instead: func(s string) string {
			if !decimal.MatchString(s) {
				return ""
			}
			return s + "s for seconds"
		},
		schema: text(`^([0-9]+(\.[0-9]*)?(ns|us|µs|μs|ms|s|m|h))+$`),
	},
	"size": {
		noun: "a size such as 64KiB, 2MiB or a number of bytes", kinds: []nodeKind{kindNumber, kindText}, parse: parseSize,
		schema: map[string]any{"type": []string{"integer", "string"}, "pattern": `^[0-9]+(B|KiB|MiB|GiB)?$`},
	},
}

var label = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)

func parseLabel(s string) (any, error) {
	return s, cmp.Or(
		refuse(s == "", "must not be empty"),
		refuse(len(s) > maxName, "it is longer than %d characters", maxName),
		refuse(!label.MatchString(s), "it may have letters, digits and, between them, '.', '_' and '-'"))
}

// numeric is what was meant as an IPv4 address.
var numeric = regexp.MustCompile(`^[0-9.]+$`)

// parseListen reads an address to listen on: of IP addresses, of the tailnet, of an interface or of a host.
// The name of an interface or a host may end in a number: eth0.100 is an interface.
func parseListen(s string) (any, error) {
	if host, port, err := splitHostPort("", s, ""); err == nil && len(host) <= maxName && label.MatchString(host) &&
		!numeric.MatchString(host) && !strings.EqualFold(host, "tailnet") {
		return fmt.Sprintf("%s:%d", host, port), nil
	}
	return parseAddress(s)
}

// parseAddress is parseListen without the names that have to be looked up.
func parseAddress(s string) (any, error) {
	if scheme, _, ok := strings.Cut(s, "://"); ok {
		return nil, fmt.Errorf("%s:// cannot be listened on, only TCP: \":443\" or \"tailnet:443\"", scheme)
	}
	if _, err := parsePort(s); err == nil {
		return nil, fmt.Errorf("did you mean \":%s\"?", s)
	}
	if port, ok := strings.CutPrefix(s, ":"); ok && !strings.Contains(port, ":") {
		p, err := parsePort(port)
		return fmt.Sprintf(":%d", p), err
	}
	host, port, err := splitHostPort("", s, "")
	if err != nil {
		return nil, err
	}
	switch strings.ToLower(host) {
	case "tailnet":
		return fmt.Sprintf("tailnet:%d", port), nil
	case "*":
		return nil, fmt.Errorf("did you mean \":%d\"?", port)
	}
	a, err := netip.ParseAddr(host)
	return netip.AddrPortFrom(a.Unmap(), port).String(), cmp.Or(
		refuse(err != nil, "%q is not an IP address: write \":%d\" or \"IP:%d\"", host, port, port),
		refuse(a.IsMulticast(), "%s is a multicast address, TCP cannot listen on it", host),
		refuse(a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "", "a link-local address needs its interface: \"[%s%%eth0]:%d\"", host, port))
}

func parseHealth(s string) (any, error) { return parseShown("health", s) }

func parseShown(key, s string) (any, error) {
	off := slices.Contains([]string{"off", "no", "none", "disabled", "false"}, strings.ToLower(s))
	addr, err := parseAddress(s)
	return addr, cmp.Or(refuse(off, "leave %s out to serve none", key), err)
}

func parseMetrics(s string) (any, error) {
	v, err := parseShown("metrics", s)
	if err != nil {
		return nil, err
	}
	port, on := strings.CutPrefix(v.(string), "tailnet:")
	return v, refuse(on, "metrics are not served on tailnet:, write this node's tailnet address or \"127.0.0.1:%s\"", port)
}

func parseALPN(s string) (any, error) {
	return s, refuse(s == "" || len(s) > 255, "it has 1 to 255 bytes (RFC 7301)")
}

func parsePath(s string) (any, error) {
	// Requests are compared after decoding, so that no other way of writing a path leads around a route.
	plain, err := url.PathUnescape(s)
	decodes := err == nil && !strings.ContainsAny(plain, "%?#*")
	problem := cmp.Or(
		refuse(s == "", "must not be empty"),
		refuse(!strings.HasPrefix(s, "/"), "must begin with /, did you mean %q?", "/"+s),
		refuse(strings.Contains(s, "*"), "a path has no wildcards, it takes everything below it"),
		refuse(strings.ContainsAny(s, "?#"), "only the path is matched, without ? and #"),
		refuse(strings.Contains(s, "%") && decodes, "paths are compared decoded, write %q", plain),
		refuse(strings.Contains(s, "%"), "paths are compared decoded, and cannot have %% in them"),
		refuse(strings.Contains(s, "//"), "it has // in it, which is removed from requests"))
	for part := range strings.SplitSeq(s, "/") {
		problem = cmp.Or(problem, refuse(part == "." || part == "..", "it has %s in it, which is removed from requests", part))
	}
	return s, problem
}

func parsePeer(s string) (any, error) {
	if _, err := netip.ParseAddr(s); err == nil || strings.Contains(s, "/") {
		return parsePrefix(s)
	}
	if class, rest, ok := strings.Cut(s, ":"); ok {
		switch {
		case class == "tag" && tag.MatchString(rest):
			return s, nil
		case class == "tag":
			return nil, errors.New("a tag has letters, digits and hyphens, and begins with a letter")
		case class == "autogroup" || class == "group":
			return nil, errors.New("groups are not known to a node, name users or tags")
		case nearest(class, []string{"tag"}) != "" && tag.MatchString(rest):
			return nil, fmt.Errorf("did you mean %q?", "tag:"+rest)
		case strings.Contains(rest, ":"):
			return nil, errors.New("not an IP address")
		}
		if _, err := parsePort(rest); err == nil {
			return nil, fmt.Errorf("peers have no port, did you mean %q?", class)
		}
		return nil, errors.New("not a CIDR, IP address, node name, login or tag:NAME")
	}
	if user, domain, ok := strings.Cut(s, "@"); ok {
		// Headscale's users have no domain: me@.
		return s, refuse(user == "" || strings.ContainsAny(s, " \t\n") || strings.Contains(domain, "@"), "a login is USER@DOMAIN, or USER@")
	}
	name, err := checkName(s)
	return name, cmp.Or(refuse(strings.Contains(s, "*"), "peers have no wildcards, name a CIDR or a tag"), err)
}

// ParsePrefix reads a CIDR, or an IP address, which is the CIDR that holds it alone.
func ParsePrefix(s string) (netip.Prefix, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err == nil && a.Zone() != "":
		return netip.Prefix{}, fmt.Errorf("an address with an interface cannot be compared, write it without %%%s", a.Zone())
	case err == nil:
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	case !strings.Contains(s, "/"):
		return netip.Prefix{}, errors.New("not a CIDR or an IP address (names, users and tags are for allow)")
	}
	p, err := netip.ParsePrefix(s)
	return p, cmp.Or(
		refuse(err != nil, "not a CIDR such as 192.0.2.0/24"),
		refuse(p != p.Masked(), "it has bits set behind its length, did you mean %s or %s?", p.Masked(), p.Addr()),
		refuse(p.Addr().Is4In6(), "write it as IPv4"))
}

// parsePrefix returns what ParsePrefix has read as text, an address as one.
func parsePrefix(s string) (any, error) {
	p, err := ParsePrefix(s)
	if !strings.Contains(s, "/") {
		return p.Addr().String(), err
	}
	return p.String(), err
}

// tag is Tailscale's rule for the name of a tag.
var tag = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9-]*$`)

const notTheKey = "it names a file, and is not the PEM text itself"

func parseFile(s string) (any, error) {
	return s, cmp.Or(
		refuse(strings.TrimSpace(s) == "", "must not be empty"),
		refuse(isKey(s), notTheKey),
		refuse(strings.HasPrefix(s, "~"), "~ is the shell's, write the whole path"))
}

func parseSocket(s string) (any, error) {
	path, isURL := strings.CutPrefix(s, "unix://")
	_, err := parseFile(s)
	return s, cmp.Or(refuse(isURL, "it is a path, did you mean %q?", path), err, socketPath(s))
}

func parseEmail(s string) (any, error) {
	user, domain, ok := strings.Cut(s, "@")
	_, err := checkName(domain)
	return s, cmp.Or(
		refuse(!ok || user == "" || strings.ContainsAny(s, " \t\n<>"), "not an e-mail address"),
		refuse(err != nil, "not an e-mail address: %w", within(user+"@", err, "")))
}

func parseURL(s string) (any, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	return s, cmp.Or(
		refuse(u.Host == "" && u.Scheme == "https", "not a URL"),
		refuse(u.Scheme != "https", "must begin with https://"),
		refuse(u.User != nil, "it has a user or password in it"))
}

func parseMAC(s string) (any, error) {
	if strings.ContainsAny(s, "+/=") {
		plain := strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(s)
		if _, err := base64.RawURLEncoding.DecodeString(plain); err == nil {
			return nil, errors.New("it is base64, and must be base64url: write - for +, _ for /, and leave out =")
		}
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	return s, refuse(err != nil || len(b) == 0, "not base64url")
}

func parseCount(s string) (any, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, cmp.Or(
		refuse(!decimal.MatchString(s), "must be a whole number in plain digits"),
		refuse(err != nil, "it is far too large"))
}

func parseDuration(s string) (any, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err == nil && d < 0, strings.HasPrefix(s, "-"), strings.HasPrefix(s, "+"):
		return nil, errors.New("a duration has no sign")
	case err == nil && decimal.MatchString(s):
		return nil, fmt.Errorf("the unit is missing, write %ss for seconds", s) // "0"
	case err == nil:
		return int64(d), nil
	}
	digits := strings.TrimRight(s, " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := strings.ToLower(strings.TrimSpace(s[len(digits):]))
	n, numErr := strconv.ParseInt(digits, 10, 32)
	if numErr == nil {
		if hours := map[string]int64{"d": 24, "day": 24, "days": 24, "w": 168, "week": 168, "weeks": 168}[unit]; hours > 0 {
			return nil, fmt.Errorf("days and weeks are not units, did you mean %dh?", n*hours)
		}
		if unit == "" {
			return nil, fmt.Errorf("the unit is missing, write %ss for seconds", digits)
		}
		for _, u := range []string{"ms", "us", "ns", "s", "m", "h"} { // sec, min, hours
			if strings.HasPrefix(unit, u) {
				return nil, fmt.Errorf("did you mean %d%s?", n, u)
			}
		}
	}
	return nil, errors.New("not a duration such as 5s, 10m or 1h30m")
}

// rateUnits are what stands behind the / of a rate.
var rateUnits = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

func parseRate(s string) (any, error) {
	number, unit, found := strings.Cut(s, "/")
	n, err := parseCount(number)
	switch {
	case err == nil && !found:
		return nil, fmt.Errorf("the time is missing, did you mean %s/s?", number)
	case err != nil:
		return nil, errors.New("not a rate such as 20/s")
	case n.(int64) < 1, n.(int64) > maxRate:
		return nil, fmt.Errorf("out of range: 1 to %d", maxRate)
	case rateUnits[unit] == 0:
		for _, u := range []string{"s", "m", "h"} { // sec, min, hour
			if strings.HasPrefix(strings.ToLower(unit), u) {
				return nil, fmt.Errorf("did you mean %s/%s?", number, u)
			}
		}
		return nil, fmt.Errorf("%q is not a unit of time: write /s, /m or /h", unit)
	}
	return s, nil
}

// cutRate takes a rate apart that parseRate returned.
func cutRate(s string) (n int, per time.Duration) {
	number, unit, _ := strings.Cut(s, "/")
	n, _ = strconv.Atoi(number)
	return n, rateUnits[unit]
}

// maxRate is the largest number of a rate.
const maxRate = 1_000_000

// sizeUnits are the only ones: MB and M mean different things to different people.
var sizeUnits = []struct {
	suffix string
	bytes  int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"B", 1}}

func parseSize(s string) (any, error) {
	digits, unit := s, int64(1)
	for _, u := range sizeUnits {
		if d, ok := strings.CutSuffix(s, u.suffix); ok {
			digits, unit = d, u.bytes
			break
		}
	}
	if decimal.MatchString(digits) {
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n > (1<<62)/unit {
			return nil, errors.New("it is far too large")
		}
		return n * unit, nil
	}
	number := strings.TrimRight(s, " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	if letters := strings.ToLower(strings.TrimSpace(s[len(number):])); decimal.MatchString(number) && letters != "" {
		r, _ := utf8.DecodeRuneInString(letters)
		switch r {
		case 'k', 'm', 'g':
			return nil, fmt.Errorf("did you mean %s%siB?", number, strings.ToUpper(string(r)))
		case 'b':
			return nil, fmt.Errorf("did you mean %sB?", number)
		}
	}
	return nil, errors.New("not a size such as 64KiB, 2MiB or a number of bytes")
}
