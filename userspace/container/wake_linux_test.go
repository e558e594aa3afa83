package container

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
)

// starts is how often dockerd has started a container.
func (d *daemon) starts(name string) (n int) {
	d.t.Helper()
	ctx, cancel := context.WithCancel(d.t.Context())
	defer cancel()
	all := d.api.Events(ctx, client.EventsListOptions{Since: "1", Until: fmt.Sprint(time.Now().Unix() + 1), // which is waited for
		Filters: client.Filters{}.Add("type", string(events.ContainerEventType)).Add("event", string(events.ActionStart)).Add("container", name)})
	for {
		select {
		case <-all.Messages:
			n++
		case err := <-all.Err:
			if err != nil && err != io.EOF {
				d.t.Fatal(err)
			}
			return n
		}
	}
}

// isRunning says whether a container runs.
func (d *daemon) isRunning(name string) bool {
	d.t.Helper()
	got, err := d.api.ContainerInspect(d.t.Context(), name, client.ContainerInspectOptions{})
	if err != nil {
		d.t.Fatal(err)
	}
	return got.Container.State.Running
}

// wake is Wake that must succeed. It returns what was started, nil if that is nothing.
func wake(t *testing.T, c *Client, name string) (started *Started) {
	t.Helper()
	if err := c.Wake(t.Context(), name, func(s Started) { started = &s }); err != nil {
		t.Fatalf("wake %s: %v", name, err)
	}
	return started
}

// nobody is not told.
func nobody(Started) {}

// notWoken is the error of Wake, of that kind, saying that.
func notWoken(t *testing.T, c *Client, name string, kind Kind, says string) {
	t.Helper()
	err := c.Wake(t.Context(), name, nobody)
	if e, ok := err.(*Error); !ok || e.Kind != kind || !strings.Contains(e.Error(), says) {
		t.Errorf("wake %s: %v, want %s, %q", name, err, kind, says)
	}
}

func TestWake(t *testing.T) {
	d := startDocker(t)
	d.image("box")
	for _, events := range []bool{true, false} {
		t.Run(fmt.Sprintf("events %v", events), func(t *testing.T) {
			d.t = t
			var refuse []string
			if !events {
				refuse = []string{"events"}
			}
			f := newFilter(t, d.host, refuse...)
			c, _ := keepUp(t, f.host)
			name := fmt.Sprintf("sleepy-%v", events)
			id := d.create(name, nil, "")
			defer d.remove(name)
			eventually(t, func() error { _, err := c.find(t.Context(), name); return err })

			// Many at once start it once.
			var all sync.WaitGroup
			told := make(chan Started, 10)
			for range 10 {
				all.Go(func() {
					if err := c.Wake(t.Context(), name, func(s Started) { told <- s }); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if n := d.starts(name); n != 1 || len(told) != 1 {
				t.Fatalf("started %d times, and told %d times", n, len(told))
			}
			first := <-told
			if first.ID != id || first.Name != name {
				t.Errorf("started is %+v", first)
			}
			if addrs := resolve(t, c, name); len(addrs) != 1 || d.whoAt(addrs[0]) != name {
				t.Errorf("it is at %v", addrs)
			}
			if s := wake(t, c, name); s != nil {
				t.Errorf("it runs, and was started: %+v", s)
			}

			// Stopped, it is started again at once.
			if stopped, err := c.Stop(t.Context(), first); err != nil || !stopped || d.isRunning(name) {
				t.Errorf("stop: %v, %v; it runs: %v", stopped, err, d.isRunning(name))
			}
			second := wake(t, c, name)
			if second == nil || second.ID != id || second.At == first.At {
				t.Fatalf("started again: %+v, after %+v", second, first)
			}
			// Who starts it may leave meanwhile, and hears of it all the same.
			if _, err := c.Stop(t.Context(), *second); err != nil {
				t.Fatal(err)
			}
			leaving, cancel := context.WithCancel(t.Context())
			asked, release := f.hold(t, "containers/"+id+"/start")
			left := make(chan error)
			go func() { left <- c.Wake(leaving, name, func(s Started) { told <- s }) }()
			<-asked
			cancel()
			if err := <-left; err != context.Canceled {
				t.Errorf("who has left gets %v", err)
			}
			release()
			third := <-told
			second = &third
			// What somebody else has started is not stopped, nor what was stopped by somebody else.
			d.down(name)
			if stopped, err := c.Stop(t.Context(), *second); err != nil || stopped {
				t.Errorf("what does not run was stopped: %v, %v", stopped, err)
			}
			d.up(name)
			if stopped, err := c.Stop(t.Context(), *second); err != nil || stopped || !d.isRunning(name) {
				t.Errorf("somebody else's was stopped: %v, %v", stopped, err)
			}
			if s := wake(t, c, id[:idPrefix]); s != nil {
				t.Errorf("somebody else's counts as started here: %+v", s)
			}
		})
	}
	d.t = t
}

func TestWakeNot(t *testing.T) {
	d := startDocker(t)
	d.image("box")
	// One with a health check.
	d.checked("checked", nil)
	d.down("checked")
	forbidden := d.create("forbidden", nil, "")
	if _, err := d.api.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Name: "broken", Config: &container.Config{Image: "box", Cmd: []string{"/busybox", "sh", "-c", "exit 3"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.api.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Name: "impossible", Config: &container.Config{Image: "box", Cmd: []string{"/nowhere"}}}); err != nil {
		t.Fatal(err)
	}
	c, _ := keepUp(t, newFilter(t, d.host, "containers/"+forbidden+"/start").host)
	eventually(t, func() error { _, err := c.find(t.Context(), "impossible"); return err })

	notWoken(t, c, "checked", KindStarting, "has not passed its health check yet")
	d.healthy("checked")
	eventually(t, func() error { return c.Wake(t.Context(), "checked", nobody) })
	if n := d.starts("checked"); n != 2 { // with the one of checked itself
		t.Errorf("checked was started %d times", n)
	}
	d.run("paused", nil, "")
	if _, err := d.api.ContainerPause(t.Context(), "paused", client.ContainerPauseOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := wake(t, c, "paused"); s != nil {
		t.Errorf("what was paused by hand was started: %+v", s)
	}
	if _, err := d.api.ContainerUnpause(t.Context(), "paused", client.ContainerUnpauseOptions{}); err != nil {
		t.Fatal(err)
	}

	notWoken(t, c, "nobody", KindUnknown, "nobody")
	for range 2 {
		notWoken(t, c, "forbidden", KindNotStarted, "forbids to start container")
		notWoken(t, c, "impossible", KindNotStarted, "/nowhere")
	}
	if err := c.Wake(t.Context(), "broken", nobody); err != nil && !strings.Contains(err.Error(), "has ended at once") {
		t.Errorf("broken: %v", err)
	}
	eventually(t, func() error {
		err := c.Wake(t.Context(), "broken", nobody)
		if err == nil || !strings.Contains(err.Error(), "with code 3") {
			return fmt.Errorf("it is %v", err)
		}
		return nil
	})
	if d.starts("forbidden") != 0 || d.isRunning("forbidden") {
		t.Error("forbidden runs")
	}
}
