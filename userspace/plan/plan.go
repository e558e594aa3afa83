package plan

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// Plan is a configuration, compiled. It is immutable: a flow that has begun by one keeps what it has of it.
type Plan struct {
	Config   *config.Config
	Needs    Needs
	Services map[string]*Service // by listener; one that could not be compiled has none
	Labels   *Labels             // what the labels of containers add; never nil

	deps   Deps
	checks map[health.Spec]*health.Check
	base   *Plan // without the routes of labels; nil: this one
}

// Deps are what a plan is compiled with, beside the configuration.
type Deps struct {
	Log        *slog.Logger
	Tailnet    *tailnet.Client
	Containers *container.Client
	Dialer     *dial.Dialer
	// LabelDialer is for routes by labels: it takes the ids of containers, and
	// doesn't wait for one that may be restarting.
	LabelDialer *dial.Dialer

	// The rest is set by a server that runs the plan.

	// Health are the checks of targets that run.
	Health *health.Set

	// ACME obtains certificates.
	ACME *acme.Manager

	// Datapath returns an error if flows can't have the datapath that this word of
	// the configuration stands for. Without it any word is good.
	Datapath func(word string) error
	// Upstream sets in up, which is r's target for requests, what dials it and watches it.
	Upstream func(listener string, r *Rule, up *vhost.Upstream)
	// Guard makes the check of what r demands of each request; nil if it demands nothing.
	Guard func(listener string, r *Rule) vhost.Guard
	// Wait makes [vhost.Route].Wait for r, which has hold and several targets.
	Wait func(listener string, r *Rule) func(ctx context.Context, since time.Time, errs []error) bool
}

// NewDeps returns what is needed to look at targets and to dial them, without serving anybody.
func NewDeps(log *slog.Logger) Deps {
	d := Deps{Log: log, Tailnet: tailnet.New("", log), Containers: container.New("", log)}
	past := new(dial.Past)
	d.Dialer = &dial.Dialer{Tailnet: d.Tailnet, Container: d.Containers, Past: past}
	d.LabelDialer = &dial.Dialer{Container: d.Containers.Now(), Past: past}
	return d
}

// Compile makes the plan of a configuration, which it leaves as it is. It reads
// the files that routes name, and binds and dials nothing. The error is all that
// is wrong, joined: each with its file and line. The plan has the rest.
func Compile(cfg *config.Config, deps Deps) (*Plan, error) {
	p := &Plan{Config: cfg, Needs: NeedsOf(cfg), Services: map[string]*Service{}, Labels: newLabels(nil), deps: deps,
		checks: map[health.Spec]*health.Check{}}
	var errs []error
	for _, l := range cfg.Listeners {
		if s, err := p.service(l); err != nil {
			errs = append(errs, err)
		} else {
			p.Services[l.Name] = s
		}
	}
	return p, errors.Join(errs...)
}
