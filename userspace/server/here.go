package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/deny"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// here is what looks at the things that a configuration names.
type here struct {
	deps    plan.Deps
	running *Status // of the daemon that the configuration is the one of, or nil
}

// hereTimeout bounds one look.
const hereTimeout = 5 * time.Second

// LookHere looks at what cfg needs of this machine, and returns what is wrong, each with its place in the
// file. running is the status of the daemon that cfg is the configuration of, or nil: what that has bound is
// free. It takes 10 s at most.
func LookHere(ctx context.Context, cfg *config.Config, running *Status) []error {
	ctx, cancel := context.WithTimeout(ctx, 2*hereTimeout)
	defer cancel()
	h := &here{plan.NewDeps(slog.New(slog.DiscardHandler)), running}
	p, err := plan.Compile(cfg, h.deps)
	found := make([]error, len(p.Needs.Things))
	var looks sync.WaitGroup
	for i, t := range p.Needs.Things {
		looks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, hereTimeout)
			defer cancel()
			if err := h.look(ctx, t); err != nil {
				found[i] = cfg.Errorf(t.At, "%s %s: %v", t.Kind, t.Name, err)
			}
		})
	}
	looks.Wait()
	found = slices.DeleteFunc(found, func(err error) bool { return err == nil })
	if all, ok := err.(interface{ Unwrap() []error }); ok { // one for each listener
		found = append(found, all.Unwrap()...)
	}
	line := func(err error) int {
		if placed, ok := errors.AsType[*config.Error](err); ok {
			return placed.Pos.Line
		}
		return 0
	}
	slices.SortStableFunc(found, func(a, b error) int { return line(a) - line(b) })
	return found
}

// look says what is wrong with t.
func (h *here) look(ctx context.Context, t plan.Thing) (err error) {
	switch t.Kind {
	case plan.ThingPort:
		return h.lookPort(ctx, t.Name)
	case plan.ThingNode:
		_, err = h.deps.Tailnet.Resolve(ctx, t.Name)
	case plan.ThingContainer:
		_, err = h.deps.Containers.Resolve(ctx, t.Name)
	case plan.ThingHost:
		_, err = net.DefaultResolver.LookupNetIP(ctx, "ip", t.Name)
	default:
		return h.lookFile(t)
	}
	return err
}

// lookFile says why a file can't be used.
func (h *here) lookFile(t plan.Thing) error {
	switch t.Use {
	case plan.UseSocket:
		return isSocket(t.Name)
	case plan.UseRead:
		return canRead(t.Name)
	case plan.UseDeny:
		return cause(deny.Check(t.Name, config.ParsePrefix))
	case plan.UseWrite:
		return canWrite(t.Name)
	case plan.UseFolder:
		return canWrite(filepath.Join(t.Name, "x"))
	case plan.UseRun:
		_, err := exec.LookPath(t.Name)
		return err
	case plan.UseCertificate:
		_, err := tlsterm.Load([]tlsterm.Spec{{Cert: t.Name, Key: t.Key}}, h.deps.Log)
		if fe, ok := errors.AsType[*tlsterm.FileError](err); ok && fe.File == t.Name {
			return fe.Err // it is named already
		}
		return err
	}
	return nil // compiling the configuration, or the certificate's look, has seen it
}

// lookPort says why an address can't be listened on.
func (h *here) lookPort(ctx context.Context, addr string) error {
	if !config.OnTailnet(addr) {
		return h.canBind(addr)
	}
	addrs, err := selfAddrs(ctx, h.deps.Tailnet)
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range addrs {
		errs = append(errs, h.canBind(net.JoinHostPort(a.String(), portOf(addr))))
	}
	if in, err := h.deps.Tailnet.Inbound(ctx); err == nil {
		if problem := in.Problem(parsePort(portOf(addr))); problem != "" {
			errs = append(errs, errors.New(problem))
		}
	}
	return errors.Join(errs...)
}

// canBind binds addr, and gives it free again. What the daemon that runs has there is its own to take.
func (h *here) canBind(addr string) error {
	if h.running != nil {
		bound := slices.Clone(h.running.Control)
		for _, l := range h.running.Listeners {
			bound = append(bound, l.Bound...)
		}
		if slices.Contains(bound, addr) {
			return nil
		}
	}
	d, err := listen(addr)
	if err != nil {
		return err
	}
	d.Close()
	return nil
}

func isSocket(path string) error {
	info, err := os.Stat(path)
	if err == nil && info.Mode().Type() != fs.ModeSocket {
		err = errors.New("it is not a socket")
	}
	return cause(err)
}

func canRead(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return cause(err)
	}
	return f.Close()
}

// canWrite says why a file can't be written, or made in its folder, where it leaves nothing.
func canWrite(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return cause(err)
	}
	probe, err := os.CreateTemp(filepath.Dir(path), ".tailsplice-check-")
	if err != nil {
		return fmt.Errorf("it can't be created in %s: %w", filepath.Dir(path), cause(err))
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// cause is err without the path, which is said already.
func cause(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	return err
}
