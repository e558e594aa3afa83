package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
	"github.com/tailsplice/tailsplice/userspace/transparent"
)

// askPatience bounds how long doctor waits for one of the daemons that it asks.
const askPatience = 3 * time.Second

// leastMTU is IPv6's, and what tailscaled gives its interface.
const leastMTU = 1280

type report struct {
	Format   int              `json:"format_version"` // flow.FormatVersion
	Machine  []loader.Finding `json:"machine"`
	SelfTest []loader.Finding `json:"self_test"` // of the sockmap datapath
	Services []loader.Finding `json:"services"`
}

func newDoctor() *cobra.Command {
	var a asker
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Report what this machine has and lacks, and what to do about it",
		Long: `Report what this machine has and lacks for tailsplice, and what to do about it.

The userspace datapath works whatever is missing. As root the command also
tests on loopback that the sockmap datapath of this kernel transfers every byte
correctly. Without root it reports what it could not see. The exit status is 0
whatever it finds.`,
		Example: `  sudo tailsplice doctor
  tailsplice doctor --json | jq '.machine[] | select(.state != "ok")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := report{Format: flow.FormatVersion, Machine: append(loader.Probe(), findTransparent(cmd.Context())),
				SelfTest: loader.SelfTest(loader.Options{Local: true}), Services: services(cmd.Context(), a.Socket)}
			return show(cmd, a.asJSON, &r, func(w io.Writer) { printReport(w, r) })
		},
	}
	return a.flags(cmd)
}

// services looks at what tailsplice works with: each may be missing where the configuration doesn't need it.
func services(ctx context.Context, control string) []loader.Finding {
	tailscaled := findTailscaled(ctx)
	findInbound(ctx, control, &tailscaled)
	return []loader.Finding{
		tailscaled,
		findDocker(ctx),
		find(ctx, "daemon", "start it with `tailsplice run`, or name its socket with --control", func(ctx context.Context) (string, error) {
			var s server.Status
			err := admin.Client{Socket: control}.Get(ctx, "status", &s)
			return fmt.Sprintf("%s runs as %s with %s", s.Version, s.Node, plural(s.Flows, "flow")), err
		}),
	}
}

func findDocker(ctx context.Context) loader.Finding {
	return find(ctx, "docker", "only needed for docker:// targets", func(ctx context.Context) (string, error) {
		c := container.New("", slog.New(slog.DiscardHandler))
		err := c.Ping(ctx)
		return "answers at " + c.Host(), cmp.Or(err, c.Problem())
	})
}

// findTransparent tries what routes with transparent need.
func findTransparent(ctx context.Context) loader.Finding {
	const advice = "only needed for routes with transparent: without it containers see this host's address instead of the client's"
	return find(ctx, "transparent", advice, func(context.Context) (string, error) {
		return "containers can see the client's own address, IPv4 and IPv6", transparent.Probe()
	})
}

// findNode asks tailscaled who this node is.
func findNode(ctx context.Context, advice string) loader.Finding {
	return find(ctx, "tailscaled", advice, func(ctx context.Context) (string, error) {
		id, err := tailnet.New("", slog.New(slog.DiscardHandler)).Self(ctx)
		return id.String(), err
	})
}

// find makes a finding of an answer.
func find(ctx context.Context, name, advice string, ask func(context.Context) (string, error)) loader.Finding {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	detail, err := ask(ctx)
	if err != nil {
		return loader.Finding{Name: name, State: loader.StateDegraded, Detail: err.Error(), Advice: advice}
	}
	return loader.Finding{Name: name, State: loader.StateOK, Detail: detail}
}

// findTailscaled looks at tailscaled and the interface that it made.
func findTailscaled(ctx context.Context) loader.Finding {
	f := findNode(ctx, "only needed for tailnet targets, tailnet listeners, and accept_proxy by identity")
	if f.State != loader.StateOK {
		return f
	}
	ifs, err := net.Interfaces()
	if err != nil {
		f.State, f.Detail = loader.StateDegraded, f.Detail+": its interface can't be seen: "+err.Error()
		return f
	}
	for _, i := range ifs {
		addrs, _ := i.Addrs()
		if slices.ContainsFunc(addrs, func(a net.Addr) bool { return tailnet.Contains(addrOf(a)) }) {
			f.Detail += fmt.Sprintf(", %s has an MTU of %d", i.Name, i.MTU)
			if i.MTU < leastMTU {
				f.State, f.Advice = loader.StateDegraded, fmt.Sprintf("less than %d breaks IPv6: unset TS_DEBUG_MTU", leastMTU)
			}
			return f
		}
	}
	f.State, f.Detail = loader.StateDegraded, f.Detail+": no interface has its addresses"
	f.Advice = "run tailscaled without --tun=userspace-networking: what is not in the kernel can't be spliced there"
	return f
}

// addrOf is the address of an interface, without the length of its network. It is the zero Addr for anything
// else.
func addrOf(a net.Addr) netip.Addr {
	p, _ := netip.ParsePrefix(a.String())
	return p.Addr().Unmap()
}

// findInbound adds to f what tailscaled's own settings keep from the tailnet listeners of the daemon that
// runs; if none runs, what they would keep from one.
func findInbound(ctx context.Context, control string, f *loader.Finding) {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	in, err := tailnet.New("", slog.New(slog.DiscardHandler)).Inbound(ctx)
	if err != nil {
		return // f says why
	}
	var s server.Status
	says, ports := "a tailnet listener gets no connections", []uint16(nil)
	runs := (admin.Client{Socket: control}).Get(ctx, "status", &s) == nil
	if runs {
		ports = tailnetPorts(s)
	} else {
		says, ports = "no connection would come to some tailnet listeners", append(slices.Sorted(maps.Keys(in.Served)), 443)
	}
	var problems []string
	for _, p := range ports {
		if problem := in.Problem(p); problem != "" && !slices.Contains(problems, problem) {
			problems = append(problems, problem)
		}
	}
	if len(problems) == 0 {
		return
	}
	if runs {
		f.State = loader.StateDegraded
	}
	f.Detail += "; " + says + ": " + strings.Join(problems, "; ")
}

// tailnetPorts returns the ports of a daemon's tailnet listeners.
func tailnetPorts(s server.Status) (ports []uint16) {
	for _, l := range s.Listeners {
		for _, a := range l.Listen {
			if port, ok := strings.CutPrefix(a, "tailnet:"); ok {
				if n, err := strconv.ParseUint(port, 10, 16); err == nil {
					ports = append(ports, uint16(n))
				}
			}
		}
	}
	return ports
}

func printReport(w io.Writer, r report) {
	colour := term.IsTerminal(int(os.Stdout.Fd()))
	section := func(title string, findings []loader.Finding) {
		fmt.Fprintf(w, "%s\n", title)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, f := range findings {
			fmt.Fprintf(tw, "  %s\t%s\t%s\n", mark(f.State, colour), f.Name, f.Detail)
			if f.Advice != "" {
				fmt.Fprintf(tw, "  %s\t\t→ %s\n", mark("", colour), f.Advice)
			}
		}
		tw.Flush()
	}
	section("this machine", r.Machine)
	section("the sockmap datapath, tried on loopback", r.SelfTest)
	section("what it works with", r.Services)
}

// mark is a state, coloured for people. All marks are of the same width, so that the columns stay straight.
func mark(s loader.State, colour bool) string {
	text := fmt.Sprintf("%-8s", s)
	if !colour {
		return text
	}
	code := map[loader.State]string{loader.StateOK: "32", loader.StateDegraded: "33", loader.StateMissing: "31"}[s]
	return "\x1b[" + cmp.Or(code, "39") + "m" + text + "\x1b[0m"
}
