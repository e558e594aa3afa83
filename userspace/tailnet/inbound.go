package tailnet

import (
	"context"
	"fmt"

	"tailscale.com/ipn"
)

// Inbound is what tailscaled's own settings do to connections to this node's tailnet addresses.
type Inbound struct {
	ShieldsUp bool              // it refuses all of them
	Served    map[uint16]string // it answers on these ports itself, for "tailscale serve" or "tailscale funnel"
}

// Inbound asks tailscaled for these settings. All errors but those of ctx are an [*Error].
func (c *Client) Inbound(ctx context.Context) (Inbound, error) {
	prefs, err := c.lc.GetPrefs(ctx)
	if err != nil {
		return Inbound{}, localError(c.socket, err)
	}
	serve, err := c.lc.GetServeConfig(ctx)
	if err != nil {
		return Inbound{}, localError(c.socket, err)
	}
	in := Inbound{ShieldsUp: prefs.ShieldsUp, Served: map[uint16]string{}}
	in.add(serve)
	for _, f := range serve.Foreground { // of commands that run in a terminal
		in.add(f)
	}
	return in, nil
}

func (in *Inbound) add(s *ipn.ServeConfig) {
	if s == nil {
		return
	}
	for port := range s.TCP {
		in.Served[port] = "tailscale serve"
	}
	for at, on := range s.AllowFunnel {
		if port, err := at.Port(); err == nil && on && in.Served[port] != "" {
			in.Served[port] = "tailscale funnel"
		}
	}
}

// Problem says why no connection comes to a listener on that port of this node's tailnet addresses, and what
// to do, or "".
func (in Inbound) Problem(port uint16) string {
	switch who := in.Served[port]; {
	case who != "":
		return fmt.Sprintf("`%s` has port %d of this node, so tailscaled answers there itself: `%s status` shows it, `tailscale serve reset` ends all of it; or listen on another port", who, port, who)
	case in.ShieldsUp:
		return "shields are up on this node, so tailscaled refuses all connections from the tailnet: `tailscale set --shields-up=false`"
	}
	return ""
}
