package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/front"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// The loader is made for the relay, though neither may import the other.
var (
	_ relay.Sockets  = (*loader.Loader)(nil)
	_ relay.Health   = (*loader.Loader)(nil)
	_ relay.Datapath = (*loader.Local)(nil)
	_ relay.Health   = (*loader.Local)(nil)
)

// autoFlows bounds the flows that auto gives to the kernel, where nothing else is: those that talk, at a time, and those that have
// talked. They cost 1.4 KB each from the start.
const autoFlows = 2048

// loadDatapaths brings up the kernel datapaths that cfg asks for, and says in
// Missing why another is not there. The caller closes them.
func loadDatapaths(cfg *config.Config, knownBad bool, log *slog.Logger) (o front.Options, closeAll func()) {
	o.Missing = map[string]string{}
	const unasked = "no configuration asked for it at start: it is loaded when the daemon is started again"
	local, named, auto := asksFor(cfg, loader.LocalName), asksFor(cfg, loader.Name), asksFor(cfg, "auto")
	if !local {
		o.Missing[loader.LocalName] = unasked
	}
	if !local && !named && !auto {
		o.Missing[loader.Name] = unasked
		return o, func() {}
	}
	flows := cfg.Limits.Connections
	if !local && !named {
		flows = min(flows, autoFlows)
	}
	l, err := loader.New(loader.Options{Instance: instance(cfg), MaxFlows: flows, Local: local, KnownBad: knownBad, Log: log})
	if err != nil {
		reason := err.Error()
		if errors.Is(err, loader.ErrKnownBad) {
			reason += " (--allow-known-bad-kernel overrides)"
		}
		o.Missing[loader.Name] = reason
		if local {
			o.Missing[loader.LocalName] = "it needs sockmap: " + reason
		}
		level, what := slog.LevelWarn, "datapath sockmap is not available: `tailsplice doctor` says more"
		if !local && !named {
			level, what = slog.LevelInfo, "all flows go through userspace, since datapath sockmap is not available: `tailsplice doctor` says more"
		}
		log.Log(context.Background(), level, what, "reason", reason)
		return o, func() {}
	}
	if local {
		if n, err := l.Local(); err != nil {
			o.Missing[loader.LocalName] = err.Error()
		} else {
			o.Datapaths = append(o.Datapaths, n)
		}
	}
	o.Datapaths, o.Auto = append(o.Datapaths, l), []relay.Sockets{l}
	return o, func() {
		if err := l.Close(); err != nil {
			log.Warn("unload the sockmap datapath", "err", err)
		}
	}
}

// asksFor says whether flows of cfg are to have a datapath.
func asksFor(cfg *config.Config, name string) bool {
	has := func(a *config.Action) bool {
		return a != nil && !a.Reject && cmp.Or(a.Datapath, cfg.Datapath, "auto") == name
	}
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		if l.Mode == "http" || l.Mode == "https" {
			continue // this process has to see the bytes
		}
		if has(l.Default) || slices.ContainsFunc(l.Routes, func(r config.Route) bool { return has(&r.Action) }) {
			return true
		}
	}
	return false
}

// instance tells the pins of two daemons on one machine apart by what they
// can't share anyway: the control socket.
func instance(cfg *config.Config) string {
	if cfg.Control.Socket == defaultControl {
		return "default"
	}
	return strings.Trim(cfg.Control.Socket, "/")
}
