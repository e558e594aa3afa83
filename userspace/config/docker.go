package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// Docker makes routes of the labels of containers on this host.
type Docker struct {
	Section
	Enabled bool     `yaml:"enabled" kind:"bool" required:"true"`
	Hosts   []string `yaml:"hosts" kind:"name" nonempty:"true"`
	Wake    bool     `yaml:"wake" kind:"true"`
}

// Allows reports whether labels may claim a host, which is as [Labels].Host has it.
func (d *Docker) Allows(host string) bool {
	return len(d.Hosts) == 0 || slices.ContainsFunc(d.Hosts, func(allowed string) bool { return Covers(allowed, host) })
}

// Covers reports whether a name, or all that a wildcard stands for, is among what a pattern stands for.
func Covers(pattern, name string) bool {
	suffix, wild := strings.CutPrefix(pattern, "*")
	return name == pattern || wild && strings.HasSuffix(name, suffix)
}

// LabelPrefix is how the labels begin that are ours.
const LabelPrefix = "tailsplice."

const (
	labelHost = LabelPrefix + "host"
	labelPath = LabelPrefix + "path"
	labelPort = LabelPrefix + "port"
	labelTLS  = LabelPrefix + "tls"
	labelWake = LabelPrefix + "wake"
)

var labelKeys = []string{"host", "path", "port", "tls", "wake"}

// maxLabelHosts bounds what one label can make the route table hold.
const maxLabelHosts = 100

// Labels are what a container's labels ask for.
type Labels struct {
	Host []string      // at least one, as a route's host
	Path string        // as a route's path, or ""
	Port uint16        // 0: the one that the container exposes
	TLS  string        // "", "true", "false" or "passthrough"
	Wake bool          // the container is woken
	Idle time.Duration // of wake, as Wake.Idle
}

// Fits reports whether the labels are meant for listeners of this mode.
func (l *Labels) Fits(mode string) bool {
	switch l.TLS {
	case "passthrough":
		return mode == "sni"
	case "true":
		return mode == "https"
	case "false":
		return mode == "http"
	}
	return mode == "http" || mode == "https"
}

// LabelProblem says what is wrong with one label, or between several.
type LabelProblem struct{ Label, Problem string }

// IsLabel reports whether a container's label of that name is ours, or was meant to be: Tailsplice.Host,
// tailsplice-host.
func IsLabel(name string) bool { return strings.HasPrefix(name, LabelPrefix) || meantLabel(name) != "" }

// meantLabel returns the label that one with another prefix was meant to be, or "".
func meantLabel(name string) string {
	if len(name) > 2*len(labelHost) {
		return ""
	}
	squash := func(s string) string { return notAlphanumeric.ReplaceAllString(strings.ToLower(s), "") }
	best, most := "", 2
	for _, key := range labelKeys {
		if d := spelling.Distance(squash(name), squash(LabelPrefix+key)); d <= most {
			best, most = LabelPrefix+key, d-1
		}
	}
	return best
}

// ParseLabels reads the labels of a container that are ours by IsLabel; others are left alone. Values are
// checked as those of a configuration's routes are, but for capitals in names, which are no mistake here.
// With errors there is no route at all: a mistyped path must not open the whole host.
func ParseLabels(labels map[string]string) (l Labels, errs []LabelProblem) {
	bad := func(label, format string, args ...any) {
		errs = append(errs, LabelProblem{label, fmt.Sprintf(format, args...)})
	}
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		l.set(name, strings.TrimSpace(labels[name]), bad)
	}
	if _, ok := labels[labelHost]; !ok && len(errs) == 0 {
		bad(labelHost, "it is missing: which host names lead to the container")
	}
	if l.TLS == "passthrough" && l.Path != "" {
		bad(labelPath, "with %s=passthrough the path is inside TLS, where nobody sees it", labelTLS)
	}
	if len(errs) > 0 {
		return Labels{}, errs
	}
	return l, nil
}

// set reads one label.
func (l *Labels) set(name, value string, bad func(label, format string, args ...any)) {
	switch name {
	case labelHost:
		l.Host = parseLabelHosts(value, bad)
	case labelPath:
		if p, err := parsePath(value); err != nil {
			bad(name, "%q: %v", clip(value), err)
		} else {
			l.Path = p.(string)
		}
	case labelPort:
		p, err := parsePort(value)
		if err != nil {
			bad(name, "%v", err)
		}
		l.Port = p
	case labelTLS:
		switch value {
		case "true", "false", "passthrough":
			l.TLS = value
		default:
			bad(name, "%q: must be true (https listeners only), false (http only) or passthrough (sni, where the container itself speaks TLS)", clip(value))
		}
	case labelWake:
		idle, err := parseLabelWake(value)
		if err != nil {
			bad(name, "%q: %v", clip(value), err)
		}
		l.Wake, l.Idle = true, idle
	default:
		refuseUnknown(name, bad)
	}
}

// refuseUnknown is for a label that is ours, or seems to be meant to be, and is none of labelKeys.
func refuseUnknown(name string, bad func(label, format string, args ...any)) {
	key, isOurs := strings.CutPrefix(name, LabelPrefix)
	near, meant := nearest(key, labelKeys), meantLabel(name)
	switch {
	case isOurs && near != "":
		bad(clip(name), "unknown label, did you mean %q?", LabelPrefix+near)
	case isOurs:
		bad(clip(name), "unknown label, there are %s%s", LabelPrefix, strings.Join(labelKeys, ", ."))
	case meant != "":
		bad(clip(name), "there is no such label, did you mean %q?", meant)
	}
}

func parseLabelHosts(value string, bad func(label, format string, args ...any)) []string {
	var hosts []string
	items := strings.Split(value, ",")
	if len(items) > maxLabelHosts {
		bad(labelHost, "%d names, at most %d can be in a label", len(items), maxLabelHosts)
		return nil
	}
	for _, item := range items {
		item = strings.TrimSpace(item)
		host, err := checkPattern(item)
		switch {
		case err != nil:
			bad(labelHost, "%q: %v", clip(item), err)
		case !slices.Contains(hosts, host):
			hosts = append(hosts, host)
		}
	}
	return hosts
}
