package topology

import (
	"context"
	"net/netip"
	"os/exec"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// labHost is a host of the lab.
type labHost struct{ *lab.Host }

func (h labHost) Start(c *exec.Cmd) error {
	// The lab's own Command, for its environment and its end with this process.
	l := h.Command(context.Background(), c.Path, c.Args[1:]...)
	if c.SysProcAttr != nil {
		c.SysProcAttr.Pdeathsig = l.SysProcAttr.Pdeathsig
	} else {
		c.SysProcAttr = l.SysProcAttr
	}
	if c.Env == nil {
		c.Env = l.Env
	}
	return h.Do(c.Start)
}

// directPort is where the edge's kernel forwards to the server.
const directPort = 7001

// NewTailnet makes the lab's world without anycast and Docker: the client reaches an edge through a router,
// and the edge reaches the laptop by its tailnet address, through tailscaled on both and the router between
// them.
func NewTailnet(ctx context.Context, progress func(format string, args ...any)) (_ *Topology, err error) {
	w, err := lab.New(ctx, lab.Options{NoAnycast: true, NoDocker: true, Progress: progress})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if _, err := w.EdgeA.Node.WaitDirect(ctx, w.Laptop.Node); err != nil {
		return nil, err
	}
	t := &Topology{
		Name: "tailnet", Client: labHost{w.Client}, Proxy: labHost{w.EdgeA}, Server: labHost{w.Laptop},
		Listen: w.EdgeA.IP4,
		Target: netip.AddrPortFrom(w.Laptop.Node.IP4, ServerPort),
		Direct: netip.AddrPortFrom(w.EdgeA.IP4, directPort),
		Note:   "the edge's kernel forwards into the tailnet with NAT, since a tailnet carries only its nodes' addresses",
		Close:  w.Close,
	}
	for _, h := range []Host{t.Client, t.Proxy, t.Server} {
		if err := tune(h); err != nil {
			return nil, err
		}
	}
	if err := t.Proxy.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return nil, err
	}
	t.SetDirect = func(on bool) error {
		if on {
			return DNAT(t, directPort)
		}
		return NoDNAT(t)
	}
	return t, nil
}
