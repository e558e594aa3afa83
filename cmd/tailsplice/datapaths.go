package main

import (
	"errors"
	"log/slog"
	"strings"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/front"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// The loader is made for the relay, though neither may import the other.
var (
	_ relay.Datapath = (*loader.Loader)(nil)
	_ relay.Sockets  = (*loader.Loader)(nil)
	_ relay.Health   = (*loader.Loader)(nil)
	_ relay.Datapath = (*loader.Local)(nil)
	_ relay.Health   = (*loader.Local)(nil)
)

// loadDatapaths brings up the kernel datapaths that cfg asks for, and says in
// Missing why another is not there. The caller closes them.
func loadDatapaths(cfg *config.Config, knownBad bool, log *slog.Logger) (o front.Options, closeAll func()) {
	o.Missing = map[string]string{}
	const unasked = "no configuration asked for it at start: it is loaded when the daemon is started again"
	local := asksFor(cfg, loader.LocalName)
	if !local {
		o.Missing[loader.LocalName] = unasked
	}
	if !local && !asksFor(cfg, loader.Name) {
		o.Missing[loader.Name] = unasked
		return o, func() {}
	}
	l, err := loader.New(loader.Options{Instance: instance(cfg), MaxFlows: cfg.Limits.Connections, Local: local, KnownBad: knownBad, Log: log})
	if err != nil {
		reason := err.Error()
		if errors.Is(err, loader.ErrKnownBad) {
			reason += " (--allow-known-bad-kernel overrides)"
		}
		o.Missing[loader.Name] = reason
		if local {
			o.Missing[loader.LocalName] = "it needs sockmap: " + reason
		}
		log.Warn("datapath sockmap is not available: `tailsplice doctor` says more", "reason", reason)
		return o, func() {}
	}
	if local {
		if n, err := l.Local(); err != nil {
			o.Missing[loader.LocalName] = err.Error()
		} else {
			o.Datapaths = append(o.Datapaths, n)
		}
	}
	o.Datapaths = append(o.Datapaths, l)
	return o, func() {
		if err := l.Close(); err != nil {
			log.Warn("unload the sockmap datapath", "err", err)
		}
	}
}

// asksFor says whether cfg names a datapath, for all flows or for some.
func asksFor(cfg *config.Config, name string) bool {
	if cfg.Datapath == name {
		return true
	}
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		if l.Default != nil && l.Default.Datapath == name {
			return true
		}
		for j := range l.Routes {
			if l.Routes[j].Datapath == name {
				return true
			}
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
