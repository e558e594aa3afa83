// Package container finds the addresses of containers on this host by asking
// its Docker daemon, and follows them through restarts by its events.
//
// A name is a container's name, its id (12 hex digits of it at least), a
// Compose service, or PROJECT/SERVICE where several projects have a service of
// that name (PROJECT_SERVICE and PROJECT-SERVICE are understood too). The
// addresses are the container's own, on its Docker networks, so it needs no
// published port. The daemon must be one whose networks this host can reach,
// which rootless Docker and Docker Desktop are not.
//
// # What is remembered, and for how long
//
// One list of all containers is kept. While [Client.Run] follows the daemon's
// events it has no age, and an event makes the next answer wait for a new list:
// addresses are reused, so an old one may be another container's. Without the
// events a list is used for half a second. A daemon that went away leaves its
// last list in use for [staleFor], for containers outlive it (live-restore, a
// crash, an upgrade), and nobody else gives their addresses away.
package container

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/singleflight"
)

const (
	// freshFor is how long a list is good without events, and how soon after
	// one an unknown name is asked for again.
	freshFor = 500 * time.Millisecond
	// staleFor is how long the last list of a daemon that went away is good.
	staleFor = 30 * time.Second
	// askTimeout bounds one request.
	askTimeout = 3 * time.Second
	// restartWait is how long Resolve waits for a container that stopped just
	// now, or that Docker is restarting.
	restartWait = 3 * time.Second
)

// Client knows the containers of one Docker daemon. Make it with [New]. Its
// methods may be called from any goroutine, with or without [Client.Run].
type Client struct {
	host   string
	bad    error // why there can be no api
	log    *slog.Logger
	flight singleflight.Group
	turn   atomic.Uint32 // rotates the replicas of a service

	prefix        string // of the labels to remember; "" is none
	labelsChanged func()

	mu      sync.Mutex
	api     *client.Client      // replaced when the daemon comes back, maybe as another version
	table   *table              // the last list, nil before the first
	noted   time.Time           // when a list older than that became doubtful: an event, or the end of events
	good    time.Time           // when the table was last known to be right
	live    bool                // events come in
	beyond  string              // why this daemon's containers can't be reached, or ""
	lost    bool                // the events ended, and that was logged
	exposed map[string][]uint16 // TCP ports of labelled containers, by id
	changed chan struct{}       // closed and replaced with each new table
}

// New returns a client of the Docker daemon at host, "unix:///PATH" or
// "tcp://HOST:PORT". An empty host means $DOCKER_HOST, and if that is empty too
// the platform's default socket; DOCKER_API_VERSION, DOCKER_CERT_PATH and
// DOCKER_TLS_VERIFY are honoured. A host that can't be right is reported by
// [Client.Resolve]. It connects to nothing yet, and there is nothing to close.
func New(host string, log *slog.Logger) *Client {
	c := &Client{
		host:    cmp.Or(host, os.Getenv(client.EnvOverrideHost), client.DefaultDockerHost),
		log:     log,
		changed: make(chan struct{}),
	}
	c.api, c.bad = c.newAPI()
	return c
}

// newAPI makes a client that has yet to agree on a version with the daemon.
func (c *Client) newAPI() (*client.Client, error) {
	opts := []client.Opt{client.FromEnv, client.WithHost(c.host), client.WithUserAgent("tailsplice")}
	if path, ok := strings.CutPrefix(c.host, "unix://"); ok {
		opts = append(opts, client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", path)
			if err != nil {
				return nil, dialFailed{socketError(path, err)}
			}
			return conn, nil
		}))
	}
	api, err := client.New(opts...)
	if err != nil {
		return nil, &Error{Kind: KindAbsent, Host: c.host, Err: err, msg: fmt.Sprintf("docker host %q: %v", c.host, err)}
	}
	return api, nil
}

// Host returns the daemon's address in use, such as unix:///var/run/docker.sock.
func (c *Client) Host() string { return c.host }

// Ping asks the daemon for its containers, and says whether they can be reached
// from here.
func (c *Client) Ping(ctx context.Context) error {
	if _, _, err := c.current(ctx, true); err != nil {
		return err
	}
	return c.reachable()
}

// Resolve returns the addresses of the running container, or of the running
// containers of the service, that name stands for, at least one. A container's
// networks come in the order of their names, IPv4 first in each; a service's
// replicas take turns at being first. A container in the host's network
// namespace is at the loopback addresses.
//
// All errors but those of ctx are an [*Error]. A container that Docker is just
// restarting is waited for, 3 s at most.
func (c *Client) Resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	return c.resolve(ctx, name, false)
}

// Refresh is Resolve with an answer that the daemon gave after the call began.
func (c *Client) Refresh(ctx context.Context, name string) ([]netip.Addr, error) {
	return c.resolve(ctx, name, true)
}

func (c *Client) resolve(ctx context.Context, name string, fresh bool) ([]netip.Addr, error) {
	deadline := time.Now().Add(restartWait)
	for {
		t, changed, err := c.current(ctx, fresh)
		if err != nil {
			return nil, err
		}
		addrs, err := t.resolve(name, int(c.turn.Add(1)))
		if err == nil {
			return addrs, c.reachable()
		}
		// Unknown or stopped as of that list; an event may be on its way.
		if !fresh && time.Since(t.asked) > freshFor {
			fresh = true
			continue
		}
		e, ok := asStopped(err)
		if !ok {
			return nil, err
		}
		c.describe(ctx, e)
		if !e.temporary || !time.Now().Before(deadline) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err // "stopped just now" tells more than a deadline
		case <-changed:
		case <-time.After(100 * time.Millisecond): // without events nothing is signalled
		}
	}
}

// reachable says why no container of this daemon can be reached, or nil.
func (c *Client) reachable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.beyond == "" {
		return nil
	}
	return &Error{Kind: KindUnreachable, Host: c.host, msg: c.beyond}
}

// current returns the list that answers now, and a channel that is closed when
// another one takes its place.
func (c *Client) current(ctx context.Context, fresh bool) (*table, <-chan struct{}, error) {
	if c.bad != nil {
		return nil, nil, c.bad
	}
	now := time.Now()
	c.mu.Lock()
	t, changed, good, need := c.table, c.changed, c.good, c.noted
	live := c.live
	c.mu.Unlock()
	if t != nil && !fresh && !t.asked.Before(need) && (live || now.Sub(t.asked) < freshFor) {
		return t, changed, nil
	}
	if fresh {
		need = now
	}
	for {
		// Not this caller's ctx: all who ask now share the answer.
		got := c.flight.DoChan("list", func() (any, error) { return c.ask(context.WithoutCancel(ctx)) })
		select {
		case <-ctx.Done():
			return nil, nil, &Error{Kind: KindAbsent, Host: c.host, Err: ctx.Err(), msg: "docker at " + c.host + " did not answer in time"}
		case r := <-got:
			if r.Err != nil {
				if t != nil && now.Sub(good) < staleFor {
					return t, changed, nil
				}
				return nil, nil, r.Err
			}
			if t := r.Val.(*table); !t.asked.Before(need) {
				return t, changed, nil
			} // else it was on its way already, the next one is not
		}
	}
}

// ask requests the list and publishes it. Every error is an *Error.
func (c *Client) ask(ctx context.Context) (*table, error) {
	c.mu.Lock()
	api, first := c.api, c.table == nil
	c.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if first {
		if err := c.inform(ctx, api); err != nil {
			return nil, err
		}
	}
	asked := time.Now()
	list, err := api.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, apiError(c.host, "list containers", err)
	}
	t := newTable(list.Items, asked)
	t.labelled = c.labelled(ctx, api, list.Items, t)
	if c.publish(t) {
		c.labelsChanged()
	}
	return t, nil
}

// publish makes t the last list, unless a later one was quicker, and reports
// whether the labels in it are other ones.
func (c *Client) publish(t *table) (labels bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.table
	if old != nil && t.asked.Before(old.asked) {
		return false
	}
	c.table, c.good = t, t.asked
	close(c.changed)
	c.changed = make(chan struct{})
	return c.labelsChanged != nil && (old == nil || !slices.EqualFunc(old.labelled, t.labelled, Labelled.equal))
}

// inform finds out whether this host can reach the daemon's containers.
func (c *Client) inform(ctx context.Context, api *client.Client) error {
	info, err := api.Info(ctx, client.InfoOptions{})
	if err != nil {
		return apiError(c.host, "ask for its setup", err)
	}
	beyond := ""
	switch {
	case slices.ContainsFunc(info.Info.SecurityOptions, func(o string) bool { return strings.HasPrefix(o, "name=rootless") }):
		beyond = "docker at " + c.host + " is rootless, so this host can't reach its containers' addresses: " +
			"publish the port (-p 127.0.0.1:PORT:PORT) and forward to 127.0.0.1:PORT"
	case info.Info.OperatingSystem == "Docker Desktop":
		beyond = "Docker Desktop keeps its containers in a virtual machine that this host can't reach: " +
			"publish the port (-p 127.0.0.1:PORT:PORT) and forward to 127.0.0.1:PORT"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.beyond = beyond
	return nil
}
