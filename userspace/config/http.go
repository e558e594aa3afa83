package config

import (
	"cmp"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// HTTP is what http and https listeners do with requests on their way.
type HTTP struct {
	Redirect           *Redirect           `yaml:"redirect" short:"to" noun:"redirect"`
	StripPrefix        bool                `yaml:"strip_prefix" kind:"true"`
	AddPrefix          string              `yaml:"add_prefix" kind:"path"`
	RequestHeaders     *HeaderChanges      `yaml:"request_headers" noun:"request_headers"`
	ResponseHeaders    *HeaderChanges      `yaml:"response_headers" noun:"response_headers"`
	Upstream           *Upstream           `yaml:"upstream" noun:"upstream"`
	MaxBody            int64               `yaml:"max_body" kind:"size" min:"0" max:"1024GiB"`
	Timeouts           *Timeouts           `yaml:"timeouts" noun:"timeouts"`
	Compress           bool                `yaml:"compress" kind:"true"`
	ClientCertificates *ClientCertificates `yaml:"client_certificates" noun:"client_certificates"`
}

// Redirect answers with another place.
type Redirect struct {
	Section
	To   string `yaml:"to" kind:"redirect" required:"true"`
	Code int    `yaml:"code" kind:"redirect_code" default:"308"`
}

// HeaderChanges are made in the order of its fields.
type HeaderChanges struct {
	Section
	Remove []string          `yaml:"remove" kind:"header" nonempty:"true"`
	Set    map[string]string `yaml:"set" kind:"header_value" key:"header" nonempty:"true"`
}

// Upstream is how to speak with a target.
type Upstream struct {
	Section
	Protocol   string `yaml:"protocol" enum:"http h2c https" default:"http"`
	CA         string `yaml:"ca" kind:"file"`
	Insecure   bool   `yaml:"insecure" kind:"true"`
	ServerName string `yaml:"server_name" kind:"server_name"`
}

// Timeouts are zero where the file says nothing.
type Timeouts struct {
	Section
	Connect time.Duration `yaml:"connect" min:"10ms" max:"10m"`
	Answer  time.Duration `yaml:"answer" min:"10ms" max:"8760h"`
	Body    time.Duration `yaml:"body" min:"10ms" max:"8760h"`
}

// ClientCertificates says which clients have one that counts.
type ClientCertificates struct {
	Section
	CA string `yaml:"ca" kind:"file" required:"true"`
}

// HSTS is a Strict-Transport-Security header (RFC 6797).
type HSTS struct {
	Section
	MaxAge     time.Duration `yaml:"max_age" kind:"age" required:"true" min:"0s" max:"10y"`
	Subdomains bool          `yaml:"subdomains" kind:"true"`
	Preload    bool          `yaml:"preload" kind:"true"`
}

// Value is the header's value.
func (h *HSTS) Value() string {
	v := "max-age=" + strconv.FormatInt(int64(h.MaxAge/time.Second), 10)
	if h.Subdomains {
		v += "; includeSubDomains"
	}
	if h.Preload {
		v += "; preload"
	}
	return v
}

// httpKeys are the keys that only http and https listeners know, in routes and default.
var httpKeys = []string{"redirect", "strip_prefix", "add_prefix", "request_headers", "response_headers", "upstream", "max_body", "timeouts", "compress", "client_certificates"}

// forwardKeys are those that mean nothing where requests are not forwarded.
var forwardKeys = []string{"strip_prefix", "add_prefix", "request_headers", "upstream", "max_body", "timeouts", "compress", "hold", "wake"}

// http checks what an action does with requests. path is the route's.
func (v *validator) http(mode string, a *Action, path, noun string) {
	if mode == "sni" || mode == "tcp" {
		for _, key := range httpKeys {
			v.errorIf(a.has(key), a.keyAt(key), "%s does not fit the listener's mode: %s reads no requests, only http and https do", key, mode)
		}
		return
	}
	v.errorIf(a.has("strip_prefix") && strings.Trim(path, "/") == "", a.keyAt("strip_prefix"), "strip_prefix removes the route's path, and %s has none", noun)
	for _, h := range []*HeaderChanges{a.RequestHeaders, a.ResponseHeaders} {
		if h != nil {
			v.errorIf(!h.has("set") && !h.has("remove"), h.Pos, "nothing is changed here: write set: { NAME: VALUE }, or remove: [NAME]")
		}
	}
	if a.Upstream != nil {
		v.upstream(a, a.Upstream)
	}
	if c := a.ClientCertificates; c != nil {
		c.CA = v.path(c.CA)
		v.errorIf(mode == "http", a.keyAt("client_certificates"), "client_certificates does not fit the listener's mode: certificates are shown in TLS, and only https terminates it")
	}
	v.errorIf(a.Redirect != nil && a.Redirect.To == "https" && mode == "https", a.At("redirect"), "redirect to https on an https listener: it would redirect to itself")
}

func (v *validator) upstream(a *Action, u *Upstream) {
	u.CA = v.path(u.CA)
	for _, key := range []string{"ca", "insecure", "server_name"} {
		v.errorIf(u.has(key) && !u.unclear("protocol") && u.Protocol != "https", u.keyAt(key), "%s is about TLS: add protocol: https, or remove it", key)
	}
	v.errorIf(u.has("insecure") && u.has("ca"), u.keyAt("insecure"), "ca and insecure: the certificate is checked or it is not")
	v.warnIf(u.Insecure, u.keyAt("insecure"), "insecure: the target's certificate is not checked, so anybody on the network path can read the traffic: name its authority with ca")
	if u.Protocol == "https" && !u.has("server_name") && !u.has("insecure") {
		for _, f := range a.Forward {
			v.errorIf(f.To.Scheme == "unix" || f.To.Scheme == "docker", u.Pos, "server_name is missing in upstream: the name on the certificate of %q", f.To)
		}
	}
}

// listenerHTTP checks the keys of a listener that are about requests.
func (v *validator) listenerHTTP(l *Listener) {
	v.errorIf(l.has("server_timing") && !l.IsHTTP(), l.keyAt("server_timing"), "server_timing does not fit the listener's mode: only http and https answer requests")
	if h := l.HSTS; l.has("hsts") && l.Mode != "https" {
		v.errorf(l.keyAt("hsts"), "hsts does not fit the listener's mode: browsers believe it over TLS only, and only https terminates that")
	} else if h != nil && h.Preload && !h.unclear("max_age") && (!h.Subdomains || h.MaxAge < 365*24*time.Hour) {
		v.errorf(h.keyAt("preload"), "preload needs subdomains: true and a max_age of at least 1y (hstspreload.org)")
	}
}

// methodsCover and headersCover say whether a route takes all that another one takes, as far as they go.
func methodsCover(a, b []string) bool {
	return a == nil || b != nil && !slices.ContainsFunc(b, func(m string) bool {
		return !slices.Contains(a, m) && !(m == "HEAD" && slices.Contains(a, "GET"))
	})
}

func headersCover(a, b map[string]string) bool {
	for name, value := range a {
		if other, ok := b[name]; !ok || value != "*" && value != other {
			return false
		}
	}
	return true
}

var headerName = regexp.MustCompile(`^[A-Za-z0-9-]+$`)

// hopHeaders belong to a connection or frame the message: nobody but the server and the client on both sides
// may set them (RFC 9110 7.6.1).
var hopHeaders = []string{"Connection", "Content-Length", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "X-Tailsplice-Id"}

func parseHeader(s string) (any, error) {
	name := http.CanonicalHeaderKey(s)
	return name, cmp.Or(
		refuse(s == "", "must not be empty"),
		refuse(strings.Contains(s, "_"), "many servers drop headers with _ in their name, did you mean %q?", strings.ReplaceAll(s, "_", "-")),
		refuse(!headerName.MatchString(s), "a header's name has letters, digits and -"),
		refuse(slices.Contains(hopHeaders, name), "it belongs to the connection or the message itself, and is made on each hop"))
}

var method = regexp.MustCompile(`^[A-Z]+$`)

func parseMethod(s string) (any, error) {
	up := strings.ToUpper(s)
	return s, cmp.Or(
		refuse(up != s && method.MatchString(up), "methods are upper-case, write %q", up),
		refuse(!method.MatchString(s), "not a method such as GET or POST"),
		refuse(s == "CONNECT", "tailsplice is not a forward proxy, CONNECT is never served"))
}

func parseRedirect(s string) (any, error) {
	switch s {
	case "https":
		return s, nil
	case "http":
		return nil, errors.New("redirects to http are not supported, did you mean https?")
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	return s, cmp.Or(
		refuse(u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Opaque != "", "must be https, or a URL such as https://example.org"),
		refuse(u.User != nil, "it has a user or password in it"))
}

var redirectCodes = []string{"301", "302", "303", "307", "308"}

func parseRedirectCode(s string) (any, error) {
	code, err := parseCount(s)
	return code, cmp.Or(refuse(!slices.Contains(redirectCodes, s), "must be one of %s", strings.Join(redirectCodes, ", ")), err)
}

var age = regexp.MustCompile(`^([0-9]{1,6})([yd])$`)

// parseAge reads a duration that may be long: days and years of 365 days.
func parseAge(s string) (any, error) {
	m := age.FindStringSubmatch(s)
	if m == nil {
		v, err := parseDuration(s)
		return v, refuse(err != nil, "not an age such as 1y, 180d or 24h")
	}
	n, _ := strconv.ParseInt(m[1], 10, 32)
	day := int64(24 * time.Hour)
	if m[2] == "y" {
		day *= 365
	}
	return n * day, refuse(n > (1<<62)/day, "it is far too large")
}

func parseHeaderValue(s string) (any, error) {
	return s, refuse(s != strings.TrimSpace(s), "it begins or ends with a space, which is cut off on the way")
}

func parseServerName(s string) (any, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return a.String(), nil
	}
	return asAny(checkName)(s)
}
