// Package container asks the Docker daemon for addresses of containers, and follows restarts by its events.
//
// A name is a container's name, its id (12 hex digits of it at least), a Compose service, or PROJECT/SERVICE
// where several projects have a service of that name (PROJECT_SERVICE and PROJECT-SERVICE are understood
// too). The addresses are the container's own, on its Docker networks, so it needs no published port. The
// daemon must be one whose networks this host can reach, which rootless Docker and Docker Desktop are not.
//
// # What is remembered, and for how long
//
// One list of all containers is kept. While [Client.Run] follows the daemon's events it has no age, and an
// event makes the next answer wait for a new list: addresses are reused, so an old one may be another
// container's. Without the events a list is used for half a second. A daemon that answers, but not with its
// list, leaves the last one in use. A daemon that went away leaves it in use for [staleFor], for containers
// outlive it (live-restore, a crash, an upgrade), and nobody else gives their addresses away.
//
// A filter in front of the daemon's socket must let /_ping, /containers and /events through. Without /events
// the list is asked for every few seconds; without /info this host is assumed to reach the containers. To
// start containers it must let POST /containers/ID/start and /stop through.
//
// Its files:
//
//	container.go  the client of the Docker API
//	table.go      one list of containers: names and addresses
//	watch.go      the daemon's events
//	labelled.go   containers whose labels are routes
//	wake.go       containers are started when somebody wants them, and stopped when nobody does
//	errors.go     why an answer could not be had
package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sync/singleflight"
)

const (
	// freshFor is how long a list is good without events, and how soon an unknown name is asked for again.
	freshFor = 500 * time.Millisecond
	staleFor = 30 * time.Second // how long the last list of a daemon that went away is good
	// askTimeout bounds one request, but for the list and the setup: it bounds how long is waited for them.
	askTimeout  = 3 * time.Second
	listTimeout = 10 * time.Second // bounds the request for the list
	// setupTimeout bounds the request for the daemon's setup, which takes it seconds on some machines.
	setupTimeout = 30 * time.Second
	setupWait    = 250 * time.Millisecond // how long after that request was sent answers wait for it
	setupAgain   = time.Minute            // when it is sent again after it failed
	// restartWait is how long Resolve waits for a container that just stopped, or that Docker is restarting.
	restartWait = 3 * time.Second
)

// Client knows the containers of one Docker daemon. Its methods, with or without Run, are for any goroutine.
type Client struct {
	host   string
	bad    error // why there can be no api
	log    *slog.Logger
	flight singleflight.Group
	turn   atomic.Uint32 // rotates the replicas of a service

	ours          func(label string) bool // which labels to remember; nil is none
	labelsChanged func()
	onChange      func() // hears of each list; nil: nobody wants to

	mu sync.Mutex
	// +checklocks:mu
	known
}

// known is what the daemon has said.
type known struct {
	api   *client.Client // replaced when the daemon comes back, maybe as another version
	table *table         // the last list, nil before the first
	noted time.Time      // when a list older than that became doubtful: an event, or the end of events
	good  time.Time      // when the table was last known to be right
	live  bool           // events come in
	// why the last request for the list failed or takes long, nil if it was answered
	failing *Error
	lost    bool                // the events ended, and that was logged
	setup   setup               // how the daemon runs
	exposed map[string][]uint16 // TCP ports of labelled containers, by id
	changed chan struct{}       // closed and replaced with each new table

	waking
}

// now is a copy of what is known.
func (c *Client) now() known {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known
}

// setup is what is known of how the daemon runs.
type setup struct {
	asked  time.Time // when it was last asked for it
	known  bool      // it answered
	err    error     // why it did not
	beyond string    // why its containers can't be reached, or ""
}

// New returns a client of the Docker daemon at host, "unix:///PATH" or "tcp://HOST:PORT"; empty means
// $DOCKER_HOST, or else the platform's default socket. DOCKER_API_VERSION, DOCKER_CERT_PATH and
// DOCKER_TLS_VERIFY are honoured. [Client.Resolve] reports a wrong host. There is nothing to close.
func New(host string, log *slog.Logger) *Client {
	c := &Client{host: cmp.Or(host, os.Getenv(client.EnvOverrideHost), client.DefaultDockerHost), log: log,
		known: known{changed: make(chan struct{})}}
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

// Ping asks the daemon for its containers, and says whether they can be reached from here.
func (c *Client) Ping(ctx context.Context) error {
	if err := c.List(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-c.inform(ctx):
	}
	return c.reachable(ctx)
}

// List asks the daemon for its containers.
func (c *Client) List(ctx context.Context) error {
	_, _, err := c.current(ctx, true)
	return err
}

// Problem says what is wrong with the daemon as of the last answers, or nil. It asks nobody.
func (c *Client) Problem() error {
	k := c.now()
	s := k.setup
	switch {
	case k.failing != nil && k.failing.hangs && k.table != nil:
		return fmt.Errorf("%w: the list of %s is used", k.failing, k.table.asked.Local().Format("2006-01-02 15:04:05"))
	case k.failing != nil:
		return k.failing
	case s.beyond != "":
		return &Error{Kind: KindUnreachable, Host: c.host, msg: s.beyond}
	case s.err != nil:
		return fmt.Errorf("%w: this host is assumed to reach its containers, as it does unless Docker is rootless or Docker Desktop", s.err)
	case !s.known && !s.asked.IsZero() && time.Since(s.asked) > setupWait:
		return fmt.Errorf("docker at %s takes long to answer /info: until then this host is assumed to reach its containers", c.host)
	}
	return nil
}

// Ailing tells which of the running containers that name stands for are starting or unhealthy as of the last
// list, as "NAME is unhealthy". name is as for Resolve, or ids with commas between them.
func (c *Client) Ailing(name string) (out []string) {
	t := c.now().table
	if t == nil {
		return nil
	}
	found, err := t.lookup(name)
	if err != nil {
		found = t.lookupIDs(name)
	}
	for _, o := range found {
		if o.state == container.StateRunning && o.health != "" {
			out = append(out, o.name+" is "+o.health)
		}
	}
	return out
}

// Resolve returns the addresses of the running container, or of the running containers of the service, that
// name stands for, at least one. A container's networks come in the order of their names, IPv4 first in each;
// a service's replicas take turns at being first, but for those that are starting or unhealthy while another
// is not. A container in the host's network namespace is at the loopback addresses.
//
// All errors but those of ctx are an [*Error]. A container that just restarts is waited for, 3 s at most.
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
			return addrs, c.reachable(ctx)
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
func (c *Client) reachable(ctx context.Context) error {
	s := c.now().setup
	if left := setupWait - time.Since(s.asked); left > 0 && !s.known && s.err == nil {
		select {
		case <-ctx.Done():
		case <-time.After(left):
		case <-c.inform(ctx):
		}
		s = c.now().setup
	}
	if s.beyond == "" {
		return nil
	}
	return &Error{Kind: KindUnreachable, Host: c.host, msg: s.beyond}
}

// current returns the list that answers now, and a channel that is closed when another one takes its place.
func (c *Client) current(ctx context.Context, fresh bool) (*table, <-chan struct{}, error) {
	if c.bad != nil {
		return nil, nil, c.bad
	}
	began, k := time.Now(), c.now()
	t, changed, need := k.table, k.changed, k.noted
	if t != nil && !fresh && !t.asked.Before(need) && (k.live || began.Sub(t.asked) < freshFor) {
		return t, changed, nil
	}
	if fresh {
		need = began
	}
	patience := time.After(askTimeout)
	for {
		// Not this caller's ctx: all who ask now share the answer.
		got := c.flight.DoChan("list", func() (any, error) { return c.ask(context.WithoutCancel(ctx)) })
		if t != nil && k.failing != nil && k.failing.hangs && c.holds(ctx) {
			return t, changed, nil // nobody waits for it but the first
		}
		select {
		case <-ctx.Done():
			return nil, nil, &Error{Kind: KindAbsent, Host: c.host, Err: ctx.Err(), msg: "docker at " + c.host + " did not answer in time"}
		case <-patience:
			e := apiError(c.host, "list containers", context.DeadlineExceeded)
			c.noteFailing(e)
			if t != nil && c.holds(ctx) {
				return t, changed, nil
			}
			return nil, nil, e
		case r := <-got:
			if r.Err != nil {
				if t != nil && c.holds(ctx) {
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

// holds reports whether the last list is good without another: for a while, and while the daemon answers.
func (c *Client) holds(ctx context.Context) bool {
	k := c.now()
	if k.live || time.Since(k.good) < staleFor {
		return true
	}
	got := c.flight.DoChan("ping", func() (any, error) {
		err := ping(context.WithoutCancel(ctx), k.api)
		if err == nil {
			c.mu.Lock()
			c.good = time.Now()
			c.mu.Unlock()
		}
		return nil, err
	})
	select {
	case <-ctx.Done():
		return false
	case r := <-got:
		return r.Err == nil
	}
}

func ping(ctx context.Context, api *client.Client) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := api.Ping(ctx, client.PingOptions{})
	return err
}

// noteFailing remembers why there is no newer list.
func (c *Client) noteFailing(e *Error) {
	c.mu.Lock()
	first := e.hangs && (c.failing == nil || !c.failing.hangs)
	c.failing = e
	c.mu.Unlock()
	if first {
		c.log.Warn("docker does not list its containers in time: the last list is used while it answers otherwise", "docker", c.host)
	}
}

// ask requests the list and publishes it. Every error is an *Error.
func (c *Client) ask(ctx context.Context) (*table, error) {
	k := c.now()
	if !k.setup.known && time.Since(k.setup.asked) > setupAgain {
		c.inform(ctx) // nobody waits for it
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	asked := time.Now()
	list, err := k.api.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		e := apiError(c.host, "list containers", err)
		if !errors.Is(err, context.Canceled) {
			c.noteFailing(e)
		}
		return nil, e
	}
	t := newTable(list.Items, asked)
	t.labelled = c.labelled(ctx, k, list.Items, t)
	if c.publish(t) {
		c.labelsChanged()
	}
	if c.onChange != nil {
		c.onChange()
	}
	return t, nil
}

// publish makes t the last list, unless a later one was quicker, and reports whether its labels are others.
func (c *Client) publish(t *table) (labels bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.table
	if old != nil && t.asked.Before(old.asked) {
		return false
	}
	c.table, c.good, c.failing = t, t.asked, nil
	close(c.changed)
	c.changed = make(chan struct{})
	return c.labelsChanged != nil && (old == nil || !reflect.DeepEqual(old.labelled, t.labelled))
}

// inform asks whether this host can reach the containers, unless that is known, and then sends one value.
func (c *Client) inform(ctx context.Context) <-chan singleflight.Result {
	return c.flight.DoChan("setup", func() (any, error) {
		c.mu.Lock()
		api, s := c.api, c.setup
		if !s.known {
			c.setup.asked = time.Now()
		}
		c.mu.Unlock()
		if s.known {
			return nil, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), setupTimeout)
		defer cancel()
		info, err := api.Info(ctx, client.InfoOptions{})
		s.known, s.err, s.beyond = err == nil, nil, ""
		switch {
		case err != nil:
			s.err = apiError(c.host, "ask for its setup (/info)", err)
		case slices.ContainsFunc(info.Info.SecurityOptions, func(o string) bool { return strings.HasPrefix(o, "name=rootless") }):
			s.beyond = "docker at " + c.host + " is rootless, so this host can't reach its containers' addresses: " +
				"publish the port (-p 127.0.0.1:PORT:PORT) and forward to 127.0.0.1:PORT"
		case info.Info.OperatingSystem == "Docker Desktop":
			s.beyond = "Docker Desktop keeps its containers in a virtual machine that this host can't reach: " +
				"publish the port (-p 127.0.0.1:PORT:PORT) and forward to 127.0.0.1:PORT"
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		s.asked = c.setup.asked
		if api == c.api { // else it is another daemon's by now
			c.setup = s
		}
		return nil, nil
	})
}
