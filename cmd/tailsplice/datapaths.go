package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// The loader is made for the relay, though neither may import the other.
var (
	_ datapath.Returner = (*loader.Loader)(nil)
	_ datapath.Health   = (*loader.Loader)(nil)
	_ server.Clamper    = (*loader.Loader)(nil)
	_ datapath.Datapath = (*loader.Local)(nil)
	_ datapath.Health   = (*loader.Local)(nil)
	_ datapath.Leaver   = (*loader.Local)(nil)
)

// autoFlows bounds the flows that auto gives to the kernel, where nothing else is: those that are
// ping-pong, at a time, and those that have been. They cost 208 bytes of maps each from the start.
const autoFlows = 2048

// datapaths are the kernel's, for one daemon.
type datapaths struct {
	options server.Options // what the configuration names, and works, now or later; Missing is about others
	load    func() (*loader.Loader, error)
	lacks   func(f *server.Server, why string)       // hears why load has failed
	loaded  func(f *server.Server, l *loader.Loader) // hears of what load has loaded
	loader  *loader.Loader                           // nil: none
	log     *slog.Logger
	tried   chan struct{} // closed when load has returned for the first time, and it was heard
	busy    sync.WaitGroup
	quit    chan struct{}
}

// How long a machine that can't prove its kernel now is left alone: at first, and at most.
const (
	loadAgain     = 5 * time.Second
	loadAgainMost = time.Minute
)

// loadDatapaths brings up the kernel datapaths that cfg names. The caller closes them.
func loadDatapaths(cfg *config.Config, knownBad bool, log *slog.Logger) *datapaths {
	if err := loader.RemoveDead("", log); err != nil {
		log.Warn("what ended daemons left in the kernel can't be removed", "err", err)
	}
	const unasked = "no configuration asked for it at start: it is loaded when the daemon is started again"
	p := &datapaths{log: log, quit: make(chan struct{}), tried: make(chan struct{})}
	p.options.Missing = map[string]string{loader.Name: unasked, loader.LocalName: unasked}
	wanted := plan.NeedsOf(cfg).Datapaths
	local, named := wanted[loader.LocalName], cfg.Datapath == loader.Name || wanted[loader.Name]
	o := loader.Options{Instance: instance(cfg), MaxFlows: cfg.Limits.Connections, Local: local, KnownBad: knownBad, Log: log}
	if !local && !named {
		if wanted[plan.Auto] {
			o.MaxFlows = min(o.MaxFlows, autoFlows)
			p.load = func() (*loader.Loader, error) { return loader.New(o) }
			p.lacks = func(f *server.Server, why string) { f.Lacks(loader.Name, why) }
			p.loaded = func(f *server.Server, l *loader.Loader) {
				f.Lacks(loader.Name, "it was loaded for auto only: start the daemon again to have it for other flows")
				f.Offer(l)
			}
		}
		return p
	}
	var err error
	if p.loader, err = loader.New(o); loader.Again(err) {
		p.wait(o, lack(err))
		return p
	} else if err != nil {
		reason := lack(err)
		p.options.Missing[loader.Name] = reason
		if local {
			p.options.Missing[loader.LocalName] = "it needs sockmap: " + reason
		}
		log.Warn("datapath sockmap is not available: `tailsplice doctor` says more", "reason", reason)
		return p
	}
	if local {
		if n, err := p.loader.Local(); err != nil {
			p.options.Missing[loader.LocalName] = err.Error()
		} else {
			p.options.Datapaths = append(p.options.Datapaths, n)
			delete(p.options.Missing, loader.LocalName)
		}
	}
	p.options.Datapaths = append(p.options.Datapaths, p.loader)
	delete(p.options.Missing, loader.Name)
	return p
}

// wait has the datapaths that the configuration names refuse flows until they can be had.
func (p *datapaths) wait(o loader.Options, why string) {
	sockmap := lateReturner{newLate[datapath.Returner](loader.Name, why)}
	local := newLate[datapath.Datapath](loader.LocalName, why)
	if o.Local {
		p.options.Datapaths = append(p.options.Datapaths, local)
		delete(p.options.Missing, loader.LocalName)
	}
	p.options.Datapaths = append(p.options.Datapaths, sockmap)
	delete(p.options.Missing, loader.Name)
	p.load = func() (*loader.Loader, error) { return loader.New(o) }
	p.lacks = func(_ *server.Server, why string) {
		sockmap.why.Store(&why)
		local.why.Store(&why)
	}
	p.loaded = func(_ *server.Server, l *loader.Loader) {
		sockmap.set(l)
		if n, err := l.Local(); o.Local && err == nil {
			local.set(n)
		} else if o.Local {
			local.why.Store(new(err.Error()))
		}
		p.log.Info("datapath sockmap is available: new flows can use it")
	}
}

// offer lets f give flows of auto to the kernel. What is needed for nothing else is loaded only now, while
// connections are accepted, and what could not be loaded before is tried again.
func (p *datapaths) offer(f *server.Server) {
	for _, d := range p.options.Datapaths {
		if s, ok := d.(datapath.Returner); ok {
			f.Offer(s)
		}
	}
	if p.load == nil {
		return
	}
	p.busy.Go(func() {
		tried := sync.OnceFunc(func() { close(p.tried) })
		defer tried()
		l, err := p.load()
		last, pause := "", loadAgain
		for ; err != nil; l, err = p.load() {
			p.lacks(f, lack(err))
			tried()
			if last != lack(err) {
				last = lack(err)
				p.log.Info("all flows go through userspace, since datapath sockmap is not available: "+
					"`tailsplice doctor` says more", "reason", last, "tried_again", loader.Again(err))
			}
			if !loader.Again(err) {
				return
			}
			select {
			case <-p.quit:
				return
			case <-time.After(pause):
				pause = min(2*pause, loadAgainMost)
			}
		}
		p.loader = l
		p.loaded(f, l)
	})
}

// firstLoadWait bounds how long a process that is to take over waits for the kernel datapath of auto.
const firstLoadWait = 5 * time.Second

// await waits for the kernel datapath of auto: flows that come before it is loaded could not use it.
func (p *datapaths) await(ctx context.Context) {
	if p.load == nil {
		return
	}
	select {
	case <-p.tried:
	case <-time.After(firstLoadWait):
	case <-ctx.Done():
	}
}

func lack(err error) string {
	if errors.Is(err, loader.ErrKnownBad) {
		return err.Error() + " (--allow-known-bad-kernel overrides)"
	}
	return err.Error()
}

// close comes after all flows have ended.
func (p *datapaths) close() {
	close(p.quit)
	p.busy.Wait()
	if p.loader == nil {
		return
	}
	if err := p.loader.Close(); err != nil {
		p.log.Warn("unload the sockmap datapath", "err", err)
	}
}

// instance tells the pins of two daemons on one machine apart by what they
// can't share anyway: the control socket.
func instance(cfg *config.Config) string {
	if cfg.Control.Socket == defaultControl {
		return "default"
	}
	return strings.Trim(cfg.Control.Socket, "/")
}
