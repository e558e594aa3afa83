package config

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Balancing says which of a route's targets a connection or a request gets, and how it is found out which of
// them work. Without words the choice is random, and flows are kept.
type Balancing struct {
	Balance string  `yaml:"balance" enum:"random source"`
	Health  *Health `yaml:"health" short:"check" noun:"health"` // nil: targets are not checked
	OnDown  string  `yaml:"on_down" enum:"keep reset"`
}

// Health says how targets are checked.
type Health struct {
	Section
	Check   string        `yaml:"check" enum:"connect tls http" default:"connect"`
	Every   time.Duration `yaml:"every" default:"5s" min:"100ms" max:"1h"`
	Timeout time.Duration `yaml:"timeout" default:"2s" min:"10ms" max:"1m"`
	Rise    int           `yaml:"rise" default:"2" min:"1" max:"100"`
	Fall    int           `yaml:"fall" default:"3" min:"1" max:"100"`
	Path    string        `yaml:"path" kind:"path" default:"/"`
	// Expect holds status codes and classes such as 2xx; none: 2xx and 3xx.
	Expect     []string      `yaml:"expect" kind:"status" nonempty:"true"`
	ServerName string        `yaml:"server_name" kind:"server_name"`
	Verify     bool          `yaml:"verify" kind:"true"`
	SlowStart  time.Duration `yaml:"slow_start" default:"30s" min:"0s" max:"1h"`
}

// balanceKeys are those of Balancing.
var balanceKeys = []string{"balance", "health", "on_down"}

// balance checks what an action says of its targets. names are those of the route, none for default. With no
// mode (it was wrong) it checks only what is so in every mode.
func (v *validator) balance(mode string, a *Action, names []string) {
	isHTTP := mode == "http" || mode == "https"
	v.warnIf(a.Balance == "source" && a.sets("forward") && len(a.Forward) == 1, a.keyAt("balance"),
		"balance has no effect with a single target")
	if a.OnDown == "reset" {
		v.errorIf(isHTTP, a.keyAt("on_down"), "on_down: reset belongs on an sni or tcp listener: on one of mode %s a request that fails is answered, or tried at another target", mode)
		v.errorIf(!a.has("health"), a.keyAt("on_down"), "on_down: reset needs health, which tells that a target is down: add health: connect")
	}
	if h := a.Health; h != nil && !h.unclear("check") {
		v.health(mode, h, a.Upstream, names)
	}
}

// health checks what checks of targets are to do. up is how requests are sent to them, nil for HTTP/1.1.
func (v *validator) health(mode string, h *Health, up *Upstream, names []string) {
	isHTTP := mode == "http" || mode == "https"
	refuse := func(why string, keys ...string) {
		for _, key := range keys {
			v.errorIf(h.sets(key), h.keyAt(key), "%s %s", key, why)
		}
	}
	if h.Check != "http" {
		refuse("is about requests: add check: http, or remove it", "path", "expect")
	}
	switch {
	case h.Check == "connect":
		refuse("is about TLS and requests: add check: tls or check: http, or remove it", "server_name", "verify")
	case isHTTP:
		refuse("does not belong on a listener of mode "+mode+": upstream says which certificates count", "verify")
		v.errorIf(h.Check == "tls" && (up == nil || up.Protocol == "http" || up.Protocol == "h2c"), h.At("check"),
			"check: tls where requests go to the target without TLS: add upstream: { protocol: https }, or write check: http")
	case h.Check == "http" && mode == "tcp":
		refuse("is about TLS, and check: http on a tcp listener speaks HTTP in the clear: write check: tls, or remove it", "verify")
	case h.Verify && h.ServerName == "" && !h.unclear("server_name") && mode != "":
		v.errorIf(ExactName(names) == "", h.keyAt("verify"), "verify needs the name that the certificate must have: add server_name")
	}
}

// ExactName is the first of a route's names that is no wildcard, or "".
func ExactName(names []string) string {
	i := slices.IndexFunc(names, func(n string) bool { return !strings.HasPrefix(n, "*.") })
	if i < 0 {
		return ""
	}
	return names[i]
}

var status = regexp.MustCompile(`^[1-5]([0-9][0-9]|xx)$`)

func parseStatus(s string) (any, error) {
	low := strings.ToLower(s)
	return s, cmp.Or(
		refuse(s != low && status.MatchString(low), "classes are lower-case, write %q", low),
		refuse(!status.MatchString(s), "not a status such as 200, or a class such as 2xx"))
}
