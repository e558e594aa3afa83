package config

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Target is where connections are forwarded to. The zero Target is no target.
type Target struct {
	Scheme string // tcp (HOST:PORT), tailnet, docker or unix
	// Host is a host name or IP address (tcp), a node's name or tailnet address (tailnet), or a container,
	// a compose service, or PROJECT/SERVICE (docker). IPv6 addresses stand without brackets.
	Host string
	Port uint16 // never 0, except for unix, which has none
	Path string // the absolute path of a unix socket
}

// String returns the target as it is written in a configuration.
func (t Target) String() string {
	switch t.Scheme {
	case "":
		return ""
	case "unix":
		return "unix://" + t.Path
	}
	addr := net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port)))
	if t.Scheme == "tcp" {
		return addr
	}
	return t.Scheme + "://" + addr
}

const targetNoun = `a target such as 127.0.0.1:8080, tailnet://NODE:PORT, docker://CONTAINER:PORT or unix:///PATH`

// maxSocketPath is sun_path of Linux, 108 bytes, less the zero at its end (unix(7)).
const maxSocketPath = 107

// tailnetRanges are where Tailscale and Headscale number nodes (RFC 6598, and Tailscale's ULA range).
var tailnetRanges = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

func inTailnet(a netip.Addr) bool {
	return slices.ContainsFunc(tailnetRanges, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
}

func parseTarget(s string) (Target, error) {
	scheme, rest, found := strings.Cut(s, "://")
	if !found {
		return parseTCP(s)
	}
	switch scheme {
	case "tailnet", "docker":
		host, port, err := splitHostPort(scheme+"://", rest, "")
		if err != nil {
			return Target{}, err
		}
		if scheme == "tailnet" {
			host, err = tailnetNode(host)
			err = within("tailnet://", err, fmt.Sprintf(":%d", port))
		} else {
			err = refuse(!container.MatchString(host), "%q is not the name of a container, a compose service or PROJECT/SERVICE", host)
		}
		return Target{Scheme: scheme, Host: host, Port: port}, err
	case "unix":
		return Target{Scheme: scheme, Path: rest}, cmp.Or(
			refuse(!strings.HasPrefix(rest, "/"), `the path is absolute, did you mean "unix:///%s"?`, rest),
			socketPath(rest))
	case "http", "tcp":
		return Target{}, withoutScheme(rest, map[string]string{
			"http": "http and https listeners speak HTTP to every target",
			"tcp":  "a target without a scheme is TCP",
		}[scheme])
	case "https", "tls":
		return Target{}, withoutScheme(rest, "an sni listener passes TLS on untouched, and http and https listeners speak it with upstream: { protocol: https }")
	case "":
		return Target{}, errors.New("the scheme before :// is missing")
	}
	// tailscale and container are near in meaning only.
	guess := didYouMean(scheme, []string{"tailnet", "docker", "unix"})
	switch strings.ToLower(scheme) {
	case "tailscale", "ts":
		guess = `, did you mean "tailnet"?`
	case "container", "compose", "podman":
		guess = `, did you mean "docker"?`
	}
	return Target{}, fmt.Errorf("unknown scheme %q, must be tailnet, docker, unix or none%s", scheme, guess)
}

func parseTCP(s string) (Target, error) {
	for _, known := range []string{"tailnet:", "docker:", "unix:"} {
		if after, ok := strings.CutPrefix(s, known); ok && (strings.Contains(after, ":") || known == "unix:") {
			for _, slashes := range []string{"//", "///"} {
				if t, err := parseTarget(known + slashes + strings.TrimLeft(after, "/")); err == nil {
					return Target{}, fmt.Errorf("did you mean %q?", t)
				}
			}
		}
	}
	host, port, err := splitHostPort("", s, "127.0.0.1")
	if err != nil {
		return Target{}, err
	}
	host, err = dialHost(host, port)
	return Target{Scheme: "tcp", Host: host, Port: port}, within("", err, fmt.Sprintf(":%d", port))
}

// container is the Docker engine's rule for names, with an optional compose project before it.
var container = regexp.MustCompile(`^([a-zA-Z0-9][a-zA-Z0-9_.-]*/)?[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// withoutScheme teaches to leave a scheme out.
func withoutScheme(rest, why string) error {
	rest, _, _ = strings.Cut(strings.TrimRight(rest, "/"), "/")
	if _, err := parseTarget(rest); err == nil {
		return fmt.Errorf("write %q without a scheme: %s", rest, why)
	}
	return fmt.Errorf("write HOST:PORT without a scheme: %s", why)
}

// splitHostPort splits HOST:PORT. The scheme that stood before it is for messages. With instead, a missing
// host is an error that offers that one.
func splitHostPort(scheme, s, instead string) (string, uint16, error) {
	if strings.Count(s, ":") > 1 && !strings.HasPrefix(s, "[") {
		// ::1:443 is an address too, but hardly meant as one.
		i := strings.LastIndex(s, ":")
		if _, err := netip.ParseAddr(s[:i]); err == nil {
			return "", 0, fmt.Errorf(`an IPv6 address needs brackets: "%s[%s]%s"`, scheme, s[:i], s[i:])
		}
		if _, err := netip.ParseAddr(s); err == nil {
			return "", 0, fmt.Errorf(`the port is missing: "%s[%s]:PORT"`, scheme, s)
		}
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		if ae, ok := errors.AsType[*net.AddrError](err); ok && strings.Contains(ae.Err, "missing port") {
			if _, err := parsePort(s); err == nil && instead != "" {
				return "", 0, fmt.Errorf("did you mean %q?", instead+":"+s)
			}
			if s == "" {
				return "", 0, errors.New("must not be empty")
			}
			return "", 0, fmt.Errorf("the port is missing: %q", scheme+s+":PORT")
		}
		return "", 0, errors.New("not HOST:PORT")
	}
	p, err := parsePort(port)
	if err != nil {
		return "", 0, err
	}
	a, _ := netip.ParseAddr(host)
	return host, p, cmp.Or(
		refuse(host == "" && instead != "", "the host is missing, did you mean %q?", instead+":"+port),
		refuse(host == "", "the host is missing"),
		refuse(strings.HasPrefix(s, "[") && !a.Is6(), "%q is not an IPv6 address, only those stand in brackets", host))
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), cmp.Or(
		refuse(s == "", "the port is missing"),
		refuse(!decimal.MatchString(s), "port %q is not a number from 1 to 65535", s),
		refuse(err != nil || n == 0, "port %s is out of range: 1 to 65535", s))
}

// decimal is a number without sign, leading zeros, underscores or another base: YAML 1.1 and 1.2 read
// those differently.
var decimal = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)

// dialHost checks the host of a plain target.
func dialHost(host string, port uint16) (string, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if a.Is6() {
			loopback = netip.IPv6Loopback()
		}
		return a.String(), cmp.Or(
			refuse(a.IsUnspecified(), "%s can't be connected to, did you mean %q?", host, netip.AddrPortFrom(loopback, port)),
			refuse(a.IsMulticast(), "%s is a multicast address, TCP cannot connect to it", host))
	}
	return checkName(host)
}

// tailnetNode checks the node of a tailnet target.
func tailnetNode(host string) (string, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap().String(),
			refuse(!inTailnet(a), "%s is not a tailnet address (100.64.0.0/10 or fd7a:115c:a1e0::/48): a target without tailnet:// may be any address", host)
	}
	return checkName(host)
}

func socketPath(path string) error {
	return cmp.Or(
		refuse(len(path) > maxSocketPath, "the path has %d bytes, a unix socket's has at most %d", len(path), maxSocketPath),
		refuse(strings.HasSuffix(path, "/"), "it names a folder, not a socket"),
		refuse(strings.HasPrefix(path, "@"), "abstract sockets (@name) are not supported"))
}
