package container

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"

	"github.com/tailsplice/tailsplice/userspace/follow"
)

// echoes are when to list once more after an event: a network's event comes before the list shows its effect.
var echoes = []time.Duration{150 * time.Millisecond, time.Second}

// watched is what can change a container's name, state, health or addresses. Asking for these alone spares
// the events of each run of a health check, one every few seconds.
var watched = client.Filters{}.
	Add("type", string(events.ContainerEventType), string(events.NetworkEventType)).
	Add("event", string(events.ActionCreate), string(events.ActionStart), string(events.ActionDie), string(events.ActionDestroy),
		string(events.ActionRename), string(events.ActionHealthStatusHealthy), string(events.ActionHealthStatusUnhealthy), string(events.ActionPause), string(events.ActionUnPause),
		string(events.ActionConnect), string(events.ActionDisconnect))

// Run follows the daemon's events until ctx is done, through its restarts. Call it once.
func (c *Client) Run(ctx context.Context) {
	if c.bad != nil {
		c.log.Warn("containers unavailable", "err", c.bad)
		return
	}
	follow.Run(ctx, func(ctx context.Context) error {
		defer c.watchEnded()
		return c.watch(ctx)
	}, func(err error) { c.reportLoss(ctx, err) })
}

// reportLoss logs that the daemon or its events went away, once until they come back.
func (c *Client) reportLoss(ctx context.Context, err error) {
	c.mu.Lock()
	first := !c.lost
	c.lost = true
	c.mu.Unlock()
	_, listErr := c.ask(ctx) // a filter may hide the events alone
	switch {
	case first && listErr == nil:
		c.log.Warn("docker's events are unavailable: its containers are listed every few seconds", "err", err)
	case first:
		c.log.Warn("containers unavailable", "err", err)
	}
}

// watch follows one stream of events until it fails.
func (c *Client) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// It may be another version of the daemon than last time.
	api, err := c.newAPI()
	if err != nil {
		return err
	}
	defer api.Close()
	c.mu.Lock()
	c.api, c.setup = api, setup{beyond: c.setup.beyond}
	c.mu.Unlock()
	// The stream's header comes before its subscription, so ask from now on.
	now := time.Now()
	slow := time.AfterFunc(askTimeout, cancel)
	stream := api.Events(ctx, client.EventsListOptions{Since: fmt.Sprintf("%d.%09d", now.Unix(), now.Nanosecond()), Filters: watched})
	if !slow.Stop() {
		return apiError(c.host, "follow events", context.DeadlineExceeded)
	}
	return c.follow(ctx, api, stream)
}

// follow keeps the list current until the stream of events fails.
func (c *Client) follow(ctx context.Context, api *client.Client, stream client.EventsResult) error {
	asked := make(chan error, 1)
	ask := func() {
		_, err := c.ask(ctx)
		asked <- err
	}
	go ask()
	asking := true

	beat := time.Tick(follow.Pulse)
	var renew <-chan time.Time // when to ask again
	echo := len(echoes)        // the next of echoes to wait for
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-stream.Err:
			return apiError(c.host, "follow events", err)
		case <-beat:
			if err := ping(ctx, api); err != nil {
				return apiError(c.host, "ping", err)
			}
		case <-stream.Messages:
			c.mu.Lock()
			c.noted = time.Now()
			c.mu.Unlock()
			renew = time.After(follow.Settle)
			echo = 0
		case <-renew:
			if asking {
				renew = time.After(echoes[0])
				continue
			}
			go ask()
			asking = true
		case err := <-asked:
			asking = false
			switch e, ok := errors.AsType[*Error](err); {
			case ok && e.hangs:
				renew = time.After(follow.PauseMax) // the ticker's ping shows whether it answers at all
				continue
			case err != nil:
				return err
			case len(stream.Err) > 0: // there are no events
				continue
			}
			c.nowLive(api)
			if echo < len(echoes) {
				renew = time.After(echoes[echo])
				echo++
			}
		}
	}
}

// nowLive says that events tell of everything that is newer than the last list.
func (c *Client) nowLive(api *client.Client) {
	c.mu.Lock()
	was, n := c.live, len(c.table.all)
	c.live, c.lost = true, false
	c.mu.Unlock()
	if !was {
		c.log.Info("containers", "docker", c.host, "api", api.ClientVersion(), "known", n)
	}
}

// watchEnded makes every answer ask again.
func (c *Client) watchEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live {
		c.good = time.Now()
	}
	c.live, c.noted = false, time.Now()
}
