package container

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

// Labelled is a container that has labels which [Client.FollowLabels] asks for.
type Labelled struct {
	ID, Name    string
	Labels      map[string]string // those asked for; not to be changed
	Ports       []uint16          // TCP ports that its image or its creator exposes, ascending
	Created     time.Time
	Running     bool
	HostNetwork bool   // it is in the host's network namespace, where a port may be anybody's
	Replicas    string // what the containers of one Compose service share, or ""
}

// FollowLabels makes the client remember the labels whose names are ours. changed is called, without a lock
// and from any goroutine, when Labelled may return something else. Call it once, before anything else.
func (c *Client) FollowLabels(ours func(name string) bool, changed func()) {
	c.ours, c.labelsChanged = ours, changed
}

// OnChange has f called, from any goroutine, with each new list: what runs may be something else. f should be
// quick. Call it once, before anything else.
func (c *Client) OnChange(f func()) { c.onChange = f }

// Labelled lists the containers with labels as of the last list, by name. Those that never ran are left out.
// It is empty before [Client.Run] has the first list.
func (c *Client) Labelled() []Labelled {
	if t := c.now().table; t != nil {
		return t.labelled
	}
	return nil
}

// labelled makes the list for a table. It asks each container once for its exposed ports, as lists lack them.
func (c *Client) labelled(ctx context.Context, k known, list []container.Summary, t *table) []Labelled {
	if c.ours == nil {
		return nil
	}
	var out []Labelled
	exposed := map[string][]uint16{}
	for _, s := range list {
		labels := maps.Clone(s.Labels)
		maps.DeleteFunc(labels, func(name, _ string) bool { return !c.ours(name) })
		if len(labels) == 0 || s.State == container.StateCreated {
			continue
		}
		o := t.byID(s.ID)
		if o == nil {
			continue
		}
		ports, known := k.exposed[s.ID]
		if !known {
			got, err := k.api.ContainerInspect(ctx, s.ID, client.ContainerInspectOptions{})
			if err != nil || got.Container.Config == nil {
				continue // removed meanwhile, as the next list will show
			}
			ports = tcpPorts(got.Container.Config.ExposedPorts)
		}
		exposed[s.ID] = ports
		host, err := t.networkOf(o)
		l := Labelled{ID: s.ID, Name: o.name, Labels: labels, Ports: ports, Created: time.Unix(s.Created, 0),
			Running: s.State == container.StateRunning, HostNetwork: err == nil && host.mode == "host"}
		if o.service != "" {
			l.Replicas = o.project + "/" + o.service
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b Labelled) int { return strings.Compare(a.Name, b.Name) })
	c.mu.Lock()
	c.exposed = exposed
	c.mu.Unlock()
	return out
}

func tcpPorts(set network.PortSet) []uint16 {
	var ports []uint16
	for p := range set {
		if p.Proto() == network.TCP {
			ports = append(ports, p.Num())
		}
	}
	slices.Sort(ports)
	return ports
}

// Now returns a resolver of the same containers whose names are whole ids, with commas between those of
// replicas, and that never waits for one which may be restarting: what is stopped is stopped.
func (c *Client) Now() Now { return Now{c} }

// Now is what [Client.Now] returns.
type Now struct{ c *Client }

// Resolve is as [Client.Resolve], without waiting.
func (n Now) Resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	return n.resolve(ctx, name, false)
}

// Refresh is as [Client.Refresh], without waiting.
func (n Now) Refresh(ctx context.Context, name string) ([]netip.Addr, error) {
	return n.resolve(ctx, name, true)
}

func (n Now) resolve(ctx context.Context, name string, fresh bool) ([]netip.Addr, error) {
	t, _, err := n.c.current(ctx, fresh)
	if err != nil {
		return nil, err
	}
	addrs, err := t.resolveIDs(name, int(n.c.turn.Add(1)))
	if err == nil {
		return addrs, n.c.reachable(ctx)
	}
	if e, ok := asStopped(err); ok {
		n.c.describe(ctx, e)
		e.temporary = false
	}
	return nil, err
}
