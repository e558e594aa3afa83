package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// Access says who may use a route, and how long they wait for its target. The zero Access lets everybody in.
type Access struct {
	Allow       []string      `yaml:"allow" kind:"peer" nonempty:"true"` // in the form of AcceptProxy.From
	BasicAuth   *BasicAuth    `yaml:"basic_auth" noun:"basic_auth"`
	ForwardAuth *ForwardAuth  `yaml:"forward_auth" noun:"forward_auth"`
	Hold        time.Duration `yaml:"hold" min:"1s" max:"10m"`
	Wake        *Wake         `yaml:"wake" noun:"wake"`
}

// httpAccessKeys are those of Access that only http and https listeners know, accessKeys all of them.
var (
	httpAccessKeys = []string{"basic_auth", "forward_auth"}
	accessKeys     = append([]string{"allow", "hold", "wake"}, httpAccessKeys...)
)

// BasicAuth names those who have a password. Exactly one of its fields is set.
type BasicAuth struct {
	Section
	Users map[string]string `yaml:"users" kind:"bcrypt" key:"user" nonempty:"true"`
	File  string            `yaml:"file" kind:"file"`
}

// ForwardAuth is a server that is asked about each request.
type ForwardAuth struct {
	Section
	// Address has scheme http, https, tailnet or docker, and a host; the latter two a port. It may have a
	// path and a query.
	Address     string        `yaml:"address" kind:"authurl" required:"true"`
	CopyHeaders []string      `yaml:"copy_headers" kind:"copied_header" nonempty:"true"`
	Timeout     time.Duration `yaml:"timeout" default:"5s" min:"100ms" max:"1m"`
}

// Target is the server that is asked: the zero Target for an address that Parse would refuse.
func (f *ForwardAuth) Target() Target {
	u, err := url.Parse(f.Address)
	if err != nil {
		return Target{}
	}
	t, port := Target{Scheme: u.Scheme, Host: u.Hostname()}, u.Port()
	switch u.Scheme {
	case "http":
		t.Scheme, port = "tcp", cmp.Or(port, "80")
	case "https":
		t.Scheme, port = "tcp", cmp.Or(port, "443")
	}
	t.Port, _ = parsePort(port)
	return t
}

// AccessLog is where requests are written down, a line each.
type AccessLog struct {
	Section
	File   string `yaml:"file" kind:"file" default:"stderr"`
	Format string `yaml:"format" enum:"json common combined" default:"json"`
}

// access checks what an action on a listener of this mode says about who may use it.
func (v *validator) access(mode string, l *Listener, a *Action) {
	if mode == "sni" || mode == "tcp" {
		for _, key := range httpAccessKeys {
			v.errorIf(a.sets(key), a.keyAt(key), "%s belongs on an http or https listener, this one's mode is %s and sees no requests", key, mode)
		}
	}
	if a.Wake != nil && !a.unclear("forward") {
		v.wake(a, a.Wake)
	}
	if b := a.BasicAuth; b != nil {
		v.errorIf(!b.has("users") && !b.has("file"), b.Pos, "users is missing in basic_auth: users and bcrypt hashes of their passwords; or file: a file of htpasswd -B")
		v.errorIf(b.has("users") && b.has("file"), b.keyAt("file"), "users and file in basic_auth: it has one or the other")
		b.File = v.path(b.File)
		v.warnIf(mode == "http" && l.AcceptProxy == nil && slices.ContainsFunc(l.Listen, isPublic),
			a.keyAt("basic_auth"), "basic_auth on listener %q: without TLS the passwords can be read on the network", l.Name)
	}
}

// isPublic reports whether a listener on addr can be reached from beyond the tailnet and this host.
func isPublic(addr string) bool {
	host, _, ip := cutPort(addr)
	return host != "tailnet" && host != "localhost" && host != "lo" && !(ip.IsValid() && (ip.IsLoopback() || inTailnet(ip)))
}

// accessLogs checks all access logs together, and finds their files.
func (v *validator) accessLogs(c *Config) {
	served := false
	formats := map[string]*AccessLog{}
	check := func(a *AccessLog) {
		if a == nil {
			return
		}
		if a.File != "stderr" {
			a.File = v.path(a.File)
		}
		if first := formats[filepath.Clean(a.File)]; first != nil && first.Format != a.Format {
			v.errorf(a.Pos, "access_log %q is written as %s here and as %s on line %d: give each format a file of its own", a.File, a.Format, first.Format, first.Pos.Line)
			return
		}
		formats[filepath.Clean(a.File)] = a
	}
	check(c.AccessLog)
	for _, l := range c.Listeners {
		reads := l.IsHTTP() || l.Mode == "" // the decoder refused the mode: it may be one of these
		served = served || reads
		if l.sets("access_log") && !reads {
			v.errorf(l.keyAt("access_log"), "access_log belongs on an http or https listener, this one's mode is %s and sees no requests: the daemon's own log has a line for each connection", l.Mode)
			continue
		}
		check(l.AccessLog)
	}
	v.warnIf(c.AccessLog != nil && !served, c.keyAt("access_log"), "access_log stays empty: there is no http or https listener")
}

// bcryptPattern has the version, the cost, and 22 characters of salt with 31 of hash.
const bcryptPattern = `^\$2[aby]\$[0-9]{2}\$[./A-Za-z0-9]{53}$`

var bcryptHash = regexp.MustCompile(bcryptPattern)

// maxBcryptCost makes a check take a quarter of a minute: a higher cost is a mistake.
const maxBcryptCost = 16

func parseBcrypt(s string) (any, error) {
	if !bcryptHash.MatchString(s) {
		const how = "make one with tailsplice hash-password, or htpasswd -nB USER"
		if strings.HasPrefix(s, "$2") || !strings.ContainsAny(s, "${") {
			return nil, fmt.Errorf("not a whole bcrypt hash, which has 60 characters: %s", how)
		}
		return nil, fmt.Errorf("only bcrypt hashes are accepted: %s", how)
	}
	cost, _ := strconv.Atoi(s[4:6])
	return s, refuse(cost < 4 || cost > maxBcryptCost, "its cost of %d is out of range: 4 to %d", cost, maxBcryptCost)
}

func parseUser(s string) (any, error) {
	return s, cmp.Or(
		refuse(s == "", "must not be empty"),
		refuse(strings.Contains(s, ":"), "browsers can't send a user with a ':'"))
}

// notCopied are headers that belong to one connection, or that this hop writes itself, and those that begin
// with Tailscale-.
var notCopied = []string{"Connection", "Proxy-Connection", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length",
	"Host", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Tailsplice-Id"}

var notAlphanumeric = regexp.MustCompile(`[^A-Za-z0-9]`)

func parseCopiedHeader(s string) (any, error) {
	// Targets may make one of X-Forwarded-For, X_Forwarded_For and X.Forwarded.For.
	name := http.CanonicalHeaderKey(notAlphanumeric.ReplaceAllString(s, "-"))
	return http.CanonicalHeaderKey(s), cmp.Or(
		refuse(!httpguts.ValidHeaderFieldName(s), "not a header's name such as Remote-User"),
		refuse(slices.Contains(notCopied, name) || strings.HasPrefix(name, "Tailscale-"), "%s is written by this hop itself", name))
}

func parseAuthURL(s string) (any, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL such as http://127.0.0.1:9091/verify")
	}
	if err := cmp.Or(
		refuse(u.Host == "" && !strings.Contains(s, "://"), "the scheme is missing, did you mean %q?", masked("http://"+s)),
		refuse(u.User != nil, "it has a user or password in it"),
		refuse(u.Fragment != "", "a # is never sent to a server")); err != nil {
		return nil, err
	}
	switch u.Scheme {
	case "http", "https":
		before, after, _ := strings.Cut(s, u.Hostname())
		return s, within(before, checkAuthHost(u), after)
	case "tailnet", "docker":
		_, err := parseTarget(u.Scheme + "://" + u.Host)
		return s, err
	}
	return nil, errors.New("must begin with http://, https://, tailnet:// or docker://")
}

func checkAuthHost(u *url.URL) error {
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		if _, err := checkName(u.Hostname()); err != nil {
			return err
		}
	}
	if u.Port() == "" {
		return nil
	}
	_, err := parsePort(u.Port())
	return err
}
