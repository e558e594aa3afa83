package front

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// A Need is something that a configuration needs of the machine that it is for.
type Need struct {
	Kind string // one of NeedKinds
	Name string // the path, the address, the name
	At   config.Pos

	look func(context.Context, *here) error // nil: compiling the configuration looks at it
}

// NeedKinds are the kinds of needs, in the order in which people are told of them.
var NeedKinds = []string{needFile, needPort, needNode, needContainer, needHost}

const (
	needFile      = "file"
	needPort      = "port"
	needNode      = "node"
	needContainer = "container"
	needHost      = "host name"
)

// here is what looks.
type here struct {
	deps    plan.Deps
	running *Status // of the daemon that the configuration is the one of, or nil
}

// hereTimeout bounds one look.
const hereTimeout = 5 * time.Second

// Needs lists what cfg needs of a machine, each once.
func Needs(cfg *config.Config) (all []Need) {
	add := func(kind, name string, at config.Pos, look func(context.Context, *here) error) {
		same := func(n Need) bool { return n.Kind == kind && n.Name == name }
		if name != "" && !slices.ContainsFunc(all, same) {
			all = append(all, Need{kind, name, at, look})
		}
	}
	peers := func(s *config.Section, key string, from []string) {
		for i, p := range from {
			if _, err := netip.ParsePrefix(p); err == nil || strings.ContainsAny(p, "@:") {
				continue
			}
			if _, err := netip.ParseAddr(p); err == nil {
				continue
			}
			add(needNode, p, s.At(key, i), lookNode(p))
		}
	}
	target := func(t dial.Target, at config.Pos) {
		switch t.Scheme {
		case dial.Tailnet:
			add(needNode, t.Host, at, lookNode(t.Host))
		case dial.Docker:
			add(needContainer, t.Host, at, func(ctx context.Context, h *here) error {
				_, err := h.deps.Containers.Resolve(ctx, t.Host)
				return err
			})
		case dial.Unix:
			add(needFile, t.Path, at, func(context.Context, *here) error { return isSocket(t.Path) })
		default:
			if _, ok := t.Literal(); !ok {
				add(needHost, t.Host, at, func(ctx context.Context, _ *here) error {
					_, err := net.DefaultResolver.LookupNetIP(ctx, "ip", t.Host)
					return err
				})
			}
		}
	}
	action := func(a *config.Action) {
		for i := range a.Forward {
			target(dial.Target(a.Forward[i].To), a.Forward[i].At("to"))
		}
		peers(&a.Section, "allow", a.Allow)
		if u := a.Upstream; u != nil {
			add(needFile, u.CA, u.At("ca"), nil)
		}
		if c := a.ClientCertificates; c != nil {
			add(needFile, c.CA, c.At("ca"), nil)
		}
		if b := a.BasicAuth; b != nil {
			add(needFile, b.File, b.At("file"), nil)
		}
		if fa := a.ForwardAuth; fa != nil {
			u, err := url.Parse(fa.Address)
			if err == nil && (u.Scheme == dial.Tailnet || u.Scheme == dial.Docker) {
				target(dial.Target{Scheme: u.Scheme, Host: u.Hostname()}, fa.At("address"))
			}
		}
	}
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		for j, addr := range l.Listen {
			add(needPort, addr, l.At("listen", j), lookPort(addr))
		}
		for j := range l.Certificates {
			certificateNeeds(&l.Certificates[j], add)
		}
		if log := cfg.AccessLogOf(l); log != nil && log.File != accesslog.Stderr {
			add(needFile, log.File, log.At("file"), func(context.Context, *here) error {
				return canWrite(log.File)
			})
		}
		if l.AcceptProxy != nil {
			peers(&l.AcceptProxy.Section, "from", l.AcceptProxy.From)
		}
		peers(&l.Section, "allow", l.Allow)
		for a := range l.Actions() {
			action(a)
		}
	}
	for key, addr := range map[string]string{"metrics": cfg.Control.Metrics, "health": cfg.Control.Health} {
		add(needPort, addr, cfg.Control.At(key), lookPort(addr))
	}
	return all
}

func certificateNeeds(c *config.Certificate,
	add func(kind, name string, at config.Pos, look func(context.Context, *here) error)) {
	if f := c.Files; f != nil {
		add(needFile, f.Cert, f.At("cert"), func(_ context.Context, h *here) error {
			_, err := tlsterm.Load([]tlsterm.Spec{{Cert: f.Cert, Key: f.Key}}, h.deps.Log)
			var fe *tlsterm.FileError
			if errors.As(err, &fe) && fe.File == f.Cert {
				return fe.Err // it is named already
			}
			return err
		})
		if f.Key != f.Cert {
			add(needFile, f.Key, f.At("key"), nil) // the certificate's look has seen it
		}
	}
	if a := c.ACME; a != nil {
		add(needFile, a.Storage, a.At("storage"), func(context.Context, *here) error {
			return canWrite(filepath.Join(a.Storage, "x"))
		})
		add(needFile, a.CA, a.At("ca"), func(context.Context, *here) error { return canRead(a.CA) })
		if a.DNS != nil {
			add(needFile, a.DNS.Exec[0], a.DNS.At("exec"), func(context.Context, *here) error {
				_, err := exec.LookPath(a.DNS.Exec[0])
				return err
			})
		}
	}
}

// LookHere looks at needs on this machine, and returns what is wrong, each with its place in the file. running is the status of the daemon that cfg is the configuration of, or nil: what that has
// bound is free. It takes 10 s at most.
func LookHere(ctx context.Context, cfg *config.Config, needs []Need, running *Status) []error {
	ctx, cancel := context.WithTimeout(ctx, 2*hereTimeout)
	defer cancel()
	h := &here{plan.NewDeps(slog.New(slog.DiscardHandler)), running}
	_, err := plan.Compile(cfg, h.deps)
	found := make([]error, len(needs))
	var looks sync.WaitGroup
	for i, n := range needs {
		if n.look == nil {
			continue
		}
		looks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, hereTimeout)
			defer cancel()
			if err := n.look(ctx, h); err != nil {
				found[i] = cfg.Errorf(n.At, "%s %s: %v", n.Kind, n.Name, err)
			}
		})
	}
	looks.Wait()
	found = slices.DeleteFunc(found, func(err error) bool { return err == nil })
	if all, ok := err.(interface{ Unwrap() []error }); ok { // one for each listener
		found = append(found, all.Unwrap()...)
	}
	line := func(err error) int {
		var placed *config.Error
		if errors.As(err, &placed) {
			return placed.Pos.Line
		}
		return 0
	}
	slices.SortStableFunc(found, func(a, b error) int { return line(a) - line(b) })
	return found
}

func lookNode(name string) func(context.Context, *here) error {
	return func(ctx context.Context, h *here) error {
		_, err := h.deps.Tailnet.Resolve(ctx, name)
		return err
	}
}

// lookPort says why an address can't be listened on.
func lookPort(addr string) func(context.Context, *here) error {
	return func(ctx context.Context, h *here) error {
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
			port, _ := strconv.ParseUint(portOf(addr), 10, 16)
			if problem := in.Problem(uint16(port)); problem != "" {
				errs = append(errs, errors.New(problem))
			}
		}
		return errors.Join(errs...)
	}
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
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
