package plan

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// claimed is a configured route, or the default, under one of its names.
type claimed struct {
	*config.Route
	pattern string // "" for the default
}

// guarded says which configured route guards requests that a label's route for host and path on listener l
// would take away, and what it asks for; "" if there is none. Where docker.hosts opens it, it guards nothing.
func guarded(cfg *config.Config, l *config.Listener, host, path string) (by string) {
	return cmp.Or(guardedHere(l, host, path), guardedBeside(cfg, l, host, path))
}

// guardedHere is guarded for the routes of l itself.
func guardedHere(l *config.Listener, host, path string) (by string) {
	for _, c := range claims(l, host) {
		goesFirst := c.pattern == host && len(trimmed(c.Path)) >= len(trimmed(path))
		if goesFirst || !pathsMeet(c.Path, path) {
			continue // the label takes nothing from it
		}
		if c.guards() && !opened(l.Docker, c.pattern, host) {
			return c.describe(host)
		}
		if vhost.PathMatches(c.Path, path) && len(c.Methods) == 0 && len(c.Headers) == 0 && len(c.ALPN) == 0 {
			break // nothing of it comes to those behind
		}
	}
	return ""
}

// guardedBeside is guarded for the other listeners: a label on l would take the name from one where its
// visitors show passwords and cookies.
func guardedBeside(cfg *config.Config, l *config.Listener, host, path string) (by string) {
	for _, other := range cfg.Listeners {
		if other == l || other.Mode != "https" && (other.Mode != "http" || l.Mode == "sni") {
			continue
		}
		for _, c := range named(other) {
			covers := config.Covers(c.pattern, host) || config.Covers(host, c.pattern)
			within := l.Mode == "sni" || pathsMeet(c.Path, path)
			if covers && within && c.guards() && !leadsTo(&c.Action, l) && !opened(l.Docker, c.pattern, host) {
				return c.describe(host) + " (listener " + other.Name + ")"
			}
		}
	}
	return ""
}

// pathsMeet says whether one of two paths of routes is below the other, in upper or lower case.
func pathsMeet(a, b string) bool {
	below := func(a, b string) bool {
		m := vhost.Match{Path: a, AnyCase: true}
		return m.TakesPath(b)
	}
	return below(a, b) || below(b, a)
}

// leadsTo says whether what a does leads to l, on this host.
func leadsTo(a *config.Action, l *config.Listener) bool {
	return slices.ContainsFunc(a.Forward, func(f *config.Forward) bool {
		ip, _ := netip.ParseAddr(f.To.Host)
		if f.To.Scheme != "tcp" || !ip.IsLoopback() && f.To.Host != "localhost" {
			return false
		}
		return slices.ContainsFunc(l.Listen, func(addr string) bool {
			_, port, _ := net.SplitHostPort(addr)
			return port == strconv.Itoa(int(f.To.Port))
		})
	})
}

// named are the routes of l with each of their names.
func named(l *config.Listener) (all []claimed) {
	for _, r := range l.Routes {
		for _, pattern := range slices.Concat(r.SNI, r.Host) {
			all = append(all, claimed{r, pattern})
		}
	}
	return all
}

// claims are those that take requests for host, which may be a wildcard, in the order in which they are
// tried.
func claims(l *config.Listener, host string) []claimed {
	all := slices.DeleteFunc(named(l), func(c claimed) bool { return !config.Covers(c.pattern, host) })
	slices.SortStableFunc(all, func(a, b claimed) int {
		if exactly := a.pattern == host; exactly != (b.pattern == host) {
			if exactly {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(len(b.pattern), len(a.pattern)), cmp.Compare(len(b.Path), len(a.Path)))
	})
	if l.Default != nil {
		all = append(all, claimed{&config.Route{Action: *l.Default}, ""})
	}
	return all
}

// guards says whether not everybody may have what c leads to. A default that rejects is as good as none.
func (c claimed) guards() bool { return len(asks(&c.Action)) > 0 || c.Reject && c.pattern != "" }

// opened says whether docker.hosts lets labels have what a guarded pattern covers of host: it has the pattern
// itself, or a part of it. What covers more only bounds what labels may claim.
func opened(d *config.Docker, pattern, host string) bool {
	return slices.ContainsFunc(d.Hosts, func(h string) bool {
		return (pattern == "" || config.Covers(pattern, h)) && (config.Covers(h, host) || config.Covers(host, h))
	})
}

// describe names c, what it asks for, and what opens it to labels for host.
func (c claimed) describe(host string) string {
	what := "rejects"
	if all := asks(&c.Action); len(all) > 0 {
		what = "has " + strings.Join(all, ", ")
	}
	return "the configured route " + cmp.Or(c.pattern, "default") + ", which " + what + ": to let labels have it, write " + cmp.Or(c.pattern, host) + " into docker.hosts"
}

func trimmed(path string) string { return strings.TrimSuffix(path, "/") }
