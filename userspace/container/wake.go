package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

const (
	// startTimeout bounds a start, and stopTimeout a stop, which waits for what the container does at its
	// end.
	startTimeout = time.Minute
	stopTimeout  = 10 * time.Minute
	// startAgain is how soon a container that was started is started once more: one that fails at once isn't
	// started all the time.
	startAgain = 10 * time.Second
)

// Started is a container that [Client.Wake] has started.
type Started struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	At   string `json:"at"` // when, as Docker has it: each start of the container has another
}

// waking is what is under way, or was a moment ago, with containers that are started and stopped here, by id.
type waking struct {
	tried    map[string]tried
	stopping map[string]chan struct{} // closed when it is over
}

// tried is a start.
type tried struct {
	at  time.Time
	err error
}

// Wake starts the container that name stands for, or of the replicas of a service the first, unless one of
// them runs already, and returns when it does. Any number of calls at once start it once: the started of one
// of them hears of it, from another goroutine, and also where that call's ctx has ended by then. name is as
// for Resolve, or whole ids with commas between them.
//
// All errors but those of ctx are an [*Error]. [KindStarting] is that it runs, and has yet to pass its health
// check.
func (c *Client) Wake(ctx context.Context, name string, started func(Started)) error {
	found, err := c.find(ctx, name)
	if err != nil {
		return err
	}
	if over := c.stops(found); over != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-over:
		}
		if found, err = c.find(ctx, name); err != nil {
			return err
		}
	}
	if !slices.ContainsFunc(found, (*one).isUp) {
		if err := c.startOnce(ctx, found[0], started); err != nil {
			return err
		}
		if found, err = c.find(ctx, name); err != nil {
			return err
		}
	}
	starting := func(o *one) bool { return o.isUp() && o.health == string(container.Starting) }
	isReady := func(o *one) bool { return o.isUp() && !starting(o) }
	if i := slices.IndexFunc(found, starting); i >= 0 && !slices.ContainsFunc(found, isReady) {
		o := found[i]
		return &Error{Kind: KindStarting, Name: o.name,
			msg: fmt.Sprintf("container %q is starting: it has not passed its health check yet", o.name)}
	}
	return nil
}

// isUp reports whether o is nothing to be started: it runs, was paused by hand, or Docker is starting it.
func (o *one) isUp() bool {
	return o.state == container.StateRunning || o.state == container.StatePaused || o.state == container.StateRestarting
}

// find returns what name stands for, at least one.
func (c *Client) find(ctx context.Context, name string) ([]*one, error) {
	t, _, err := c.current(ctx, false)
	if err != nil {
		return nil, err
	}
	found, err := t.lookup(name)
	if err != nil {
		if byID := t.lookupIDs(name); len(byID) > 0 {
			return byID, nil
		}
	}
	return found, err
}

// stops returns what is closed when one of found is stopped, nil if Stop stops none of them.
func (c *Client) stops(found []*one) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range found {
		if over := c.stopping[o.id]; over != nil {
			return over
		}
	}
	return nil
}

// startOnce starts o for all who want that now.
func (c *Client) startOnce(ctx context.Context, o *one, started func(Started)) error {
	got := c.flight.DoChan("start "+o.id, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		return nil, c.start(ctx, o, started)
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-got:
		return r.Err
	}
}

// start starts o, unless it runs by now, or was started a moment ago.
func (c *Client) start(ctx context.Context, o *one, started func(Started)) error {
	api := c.now().api
	was, err := api.ContainerInspect(ctx, o.id, client.ContainerInspectOptions{})
	if err != nil {
		return c.startError(o, err)
	}
	defer c.Doubt()
	state := was.Container.State
	if state == nil || state.Running {
		return nil
	}
	c.mu.Lock()
	maps.DeleteFunc(c.tried, func(_ string, t tried) bool { return time.Since(t.at) > startAgain })
	last, isSoon := c.tried[o.id]
	c.mu.Unlock()
	switch {
	case isSoon && last.err != nil:
		return last.err
	case isSoon:
		return &Error{Kind: KindStopped, Name: o.name, msg: fmt.Sprintf("container %q has ended at once after it was started, with code %d "+
			"(docker logs %s): it is started again %s after the last time", o.name, state.ExitCode, o.name, startAgain)}
	}
	_, err = api.ContainerStart(ctx, o.id, client.ContainerStartOptions{})
	if err != nil {
		err = c.startError(o, err)
	}
	c.mu.Lock()
	if c.tried == nil {
		c.tried = map[string]tried{}
	}
	c.tried[o.id] = tried{time.Now(), err}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	is, err := api.ContainerInspect(ctx, o.id, client.ContainerInspectOptions{})
	if err == nil && is.Container.State != nil { // else it runs, and nobody may stop it
		started(Started{ID: o.id, Name: o.name, At: is.Container.State.StartedAt})
	}
	return nil
}

// Doubt makes the next answer wait for a new list.
func (c *Client) Doubt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noted = time.Now()
}

func (c *Client) startError(o *one, err error) error {
	if own, ok := errors.AsType[*Error](err); ok { // there is no dockerd
		return own
	}
	e := apiError(c.host, fmt.Sprintf("start container %q", o.name), err)
	if errdefs.IsPermissionDenied(err) {
		e.msg = fmt.Sprintf("docker at %s forbids to start container %q (%v): what guards its socket, such as a filter or an authorization plugin, must let "+
			"POST /containers/*/start and /stop through, or wake can't be used", c.host, o.name, err)
	}
	e.Kind, e.Name = KindNotStarted, o.name
	return e
}

// Stop stops a container that Wake has started, as `docker stop` does. It leaves it alone, and returns false,
// if it does not run, or was started once more since then by somebody else.
func (c *Client) Stop(ctx context.Context, s Started) (stopped bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	api, over := c.now().api, make(chan struct{})
	c.mu.Lock()
	if c.stopping == nil {
		c.stopping = map[string]chan struct{}{}
	}
	c.stopping[s.ID] = over
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.stopping, s.ID)
		delete(c.tried, s.ID)
		c.noted = time.Now()
		close(over)
	}()
	is, err := api.ContainerInspect(ctx, s.ID, client.ContainerInspectOptions{})
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, apiError(c.host, fmt.Sprintf("inspect container %q", s.Name), err)
	case is.Container.State == nil || !is.Container.State.Running || is.Container.State.StartedAt != s.At:
		return false, nil
	}
	if _, err := api.ContainerStop(ctx, s.ID, client.ContainerStopOptions{}); err != nil {
		return false, apiError(c.host, fmt.Sprintf("stop container %q", s.Name), err)
	}
	return true, nil
}

// IDs returns the whole ids of the containers that name stands for as of the last list; name is as for Wake.
func (c *Client) IDs(name string) (ids []string) {
	t := c.now().table
	if t == nil {
		return nil
	}
	found, err := t.lookup(name)
	if err != nil {
		found = t.lookupIDs(name)
	}
	for _, o := range found {
		ids = append(ids, o.id)
	}
	return ids
}
