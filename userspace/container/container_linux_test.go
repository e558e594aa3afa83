package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

func compose(project, service string) map[string]string {
	return map[string]string{labelProject: project, labelService: service}
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// eventually tries f until it succeeds, and returns how long that took: what
// does not follow an event never does.
func eventually(t *testing.T, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := f()
		took := time.Since(began)
		switch {
		case took > patience:
			t.Fatalf("after %s: %v", took, err)
		case err == nil:
			return took
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// resolve returns name's addresses once it has some.
func resolve(t *testing.T, c *Client, name string) (addrs []netip.Addr) {
	t.Helper()
	eventually(t, func() (err error) {
		addrs, err = c.Resolve(t.Context(), name)
		if err == nil && len(addrs) == 0 {
			t.Fatalf("resolve %s: no address and no error", name)
		}
		return err
	})
	return addrs
}

// count waits until name has n addresses.
func count(t *testing.T, c *Client, name string, n int) (addrs []netip.Addr) {
	t.Helper()
	eventually(t, func() (err error) {
		if addrs, err = c.Resolve(t.Context(), name); err == nil && len(addrs) != n {
			err = fmt.Errorf("%s is at %s, want %d addresses", name, addrs, n)
		}
		return err
	})
	return addrs
}

// refused returns the error that name must give, of that kind, saying all of says.
func refused(t *testing.T, c *Client, name string, kind Kind, says ...string) (e *Error) {
	t.Helper()
	eventually(t, func() error {
		addrs, err := c.Resolve(t.Context(), name)
		if !errors.As(err, &e) || e.Kind != kind {
			return fmt.Errorf("resolve %s: %v, %v; want kind %s", name, addrs, err, kind)
		}
		for _, s := range says {
			if !strings.Contains(err.Error(), s) {
				return fmt.Errorf("resolve %s: %q does not say %q", name, err, s)
			}
		}
		return nil
	})
	return e
}

// TestDocker runs a real dockerd, and follows its containers.
func TestDocker(t *testing.T) {
	d := startDocker(t)
	d.image("box")

	c := New(d.host, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	defer running.Wait()
	defer cancel()
	live := func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.live {
			return errors.New("no events")
		}
		return nil
	}
	d.eventually(live)

	id := d.run("blog", nil, "")
	t.Run("name and id", func(t *testing.T) {
		a := resolve(t, c, "blog")
		if who := d.whoAt(a[0]); who != "blog" {
			t.Errorf("%s is %q", a, who)
		}
		for _, name := range []string{id, id[:12], "/blog"} {
			if b := resolve(t, c, name); !slices.Equal(a, b) {
				t.Errorf("%s is at %s, blog at %s", name, b, a)
			}
		}
		refused(t, c, id[:11], KindUnknown)
		refused(t, c, "blob", KindUnknown, `did you mean "blog"`)
		refused(t, c, "something-else", KindUnknown, "there are blog")
	})

	t.Run("restart with another address", func(t *testing.T) {
		old := resolve(t, c, "blog")[0]
		before := time.Now()
		d.down("blog")
		e := refused(t, c, "blog", KindStopped, "is stopped since", "docker start blog")
		if e.Stopped.Before(before) || e.Stopped.After(time.Now()) {
			t.Errorf("stopped since %s", e.Stopped)
		}
		d.run("squatter", nil, "") // it is given what became free
		if at := resolve(t, c, "squatter")[0]; at != old {
			t.Fatalf("squatter is at %s, so blog need not move from %s", at, old)
		}
		d.up("blog")
		var now netip.Addr
		took := eventually(t, func() error {
			a, err := c.Resolve(t.Context(), "blog")
			if err == nil && a[0] == old {
				err = fmt.Errorf("still at %s", old)
			}
			if err == nil {
				now = a[0]
			}
			return err
		})
		if who := d.whoAt(now); who != "blog" {
			t.Errorf("%s is %q", now, who)
		}
		t.Logf("followed in %s", took)
	})

	t.Run("restart under way", func(t *testing.T) {
		now := 0
		restarted := make(chan error, 1)
		go func() {
			_, err := d.api.ContainerRestart(t.Context(), "blog", client.ContainerRestartOptions{Timeout: &now})
			restarted <- err
		}()
		// Whatever moment these hit, the answer is an address and never an error.
		for range 40 {
			resolve(t, c, "blog")
			time.Sleep(10 * time.Millisecond)
		}
		if err := <-restarted; err != nil {
			t.Fatal(err)
		}
		if who := d.whoAt(resolve(t, c, "blog")[0]); who != "blog" {
			t.Errorf("after the restart it is %q", who)
		}
	})

	t.Run("rename", func(t *testing.T) {
		a := resolve(t, c, "squatter")
		if _, err := d.api.ContainerRename(t.Context(), "squatter", client.ContainerRenameOptions{NewName: "tenant"}); err != nil {
			t.Fatal(err)
		}
		if b := resolve(t, c, "tenant"); !slices.Equal(a, b) {
			t.Errorf("tenant is at %s, was at %s", b, a)
		}
		refused(t, c, "squatter", KindUnknown)
		d.remove("tenant")
		refused(t, c, "tenant", KindUnknown)
	})

	t.Run("networks of both families", func(t *testing.T) {
		v6 := true
		_, err := d.api.NetworkCreate(t.Context(), "dual", client.NetworkCreateOptions{EnableIPv6: &v6, IPAM: &network.IPAM{Config: []network.IPAMConfig{
			{Subnet: netip.MustParsePrefix("10.77.0.0/24")}, {Subnet: netip.MustParsePrefix("fd77::/64")},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		d.run("both", nil, "dual", "dual")
		a := resolve(t, c, "both")
		if len(a) != 2 || !netip.MustParsePrefix("10.77.0.0/24").Contains(a[0]) || !netip.MustParsePrefix("fd77::/64").Contains(a[1]) {
			t.Fatalf("both is at %s", a)
		}
		if who := d.whoAt(a[0]); who != "both" {
			t.Errorf("%s is %q", a[0], who)
		}
		if _, err := d.api.NetworkConnect(t.Context(), "bridge", client.NetworkConnectOptions{Container: "both"}); err != nil {
			t.Fatal(err)
		}
		count(t, c, "both", 3)
		if _, err := d.api.NetworkDisconnect(t.Context(), "bridge", client.NetworkDisconnectOptions{Container: "both"}); err != nil {
			t.Fatal(err)
		}
		count(t, c, "both", 2)
		d.remove("both")
	})

	t.Run("network modes", func(t *testing.T) {
		d.run("onhost", nil, "host")
		if a := resolve(t, c, "onhost"); a[0].String() != "127.0.0.1" || a[1].String() != "::1" {
			t.Errorf("onhost is at %s", a)
		}
		d.run("guest", nil, "container:blog")
		if a, b := resolve(t, c, "guest"), resolve(t, c, "blog"); !slices.Equal(a, b) {
			t.Errorf("guest is at %s, blog at %s", a, b)
		}
		d.run("alone", nil, "none")
		refused(t, c, "alone", KindUnreachable, "no network")
		for _, n := range []string{"onhost", "guest", "alone"} {
			d.remove(n)
		}
	})

	t.Run("states", func(t *testing.T) {
		d.create("fresh", nil, "")
		refused(t, c, "fresh", KindStopped, "never started")
		d.up("fresh")
		if _, err := d.api.ContainerPause(t.Context(), "fresh", client.ContainerPauseOptions{}); err != nil {
			t.Fatal(err)
		}
		refused(t, c, "fresh", KindStopped, "paused", "docker unpause fresh")
		if _, err := d.api.ContainerUnpause(t.Context(), "fresh", client.ContainerUnpauseOptions{}); err != nil {
			t.Fatal(err)
		}
		resolve(t, c, "fresh")
		d.remove("fresh")
	})

	t.Run("compose", func(t *testing.T) {
		d.run("shop-api-1", compose("shop", "api"), "")
		one := resolve(t, c, "api")
		for _, name := range []string{"shop/api", "shop_api", "shop-api", "shop-api-1"} {
			if a := resolve(t, c, name); !slices.Equal(a, one) {
				t.Errorf("%s is at %s, api at %s", name, a, one)
			}
		}
		d.run("shop-api-2", compose("shop", "api"), "")
		two := count(t, c, "api", 2)
		if next := resolve(t, c, "api"); next[0] != two[1] || next[1] != two[0] {
			t.Errorf("the replicas don't take turns: %s, then %s", two, next)
		}
		d.down("shop-api-1")
		if a := count(t, c, "api", 1); a[0] == one[0] {
			t.Errorf("the one replica left is said to be at %s, which stopped", a)
		}
		d.down("shop-api-2")
		refused(t, c, "api", KindStopped, "stopped since")
		d.run("copy-api-1", compose("copy", "api"), "")
		refused(t, c, "api", KindAmbiguous, "copy/api or shop/api")
		if who := d.whoAt(resolve(t, c, "copy/api")[0]); who != "copy-api-1" {
			t.Errorf("copy/api is %q", who)
		}
		refused(t, c, "shop/apt", KindUnknown, `did you mean "shop/api"`)
		oneoff := compose("shop", "job")
		oneoff[labelOneOff] = "True"
		d.run("shop-job-run-1", oneoff, "")
		refused(t, c, "job", KindUnknown)
	})

	t.Run("health", func(t *testing.T) {
		// only waits until name is at that container alone, and it is said of those others how they are.
		only := func(name, container string, ailing ...string) {
			t.Helper()
			want := resolve(t, c, container)
			d.eventually(func() error {
				for range 4 { // the replicas take turns
					if got, err := c.Resolve(t.Context(), name); err != nil || !slices.Equal(got, want) {
						return fmt.Errorf("%s is at %s, %v; want %s, which is %s", name, got, err, want, container)
					}
				}
				if got := c.Ailing(name); !slices.Equal(got, ailing) {
					return fmt.Errorf("ailing is %q, want %q", got, ailing)
				}
				return nil
			})
		}
		d.checked("web-1", compose("health", "web"))
		only("web", "web-1", "web-1 is unhealthy") // there is no other
		d.checked("web-2", compose("health", "web"))
		d.healthy("web-2")
		only("web", "web-2", "web-1 is unhealthy")
		only("web-1", "web-1", "web-1 is unhealthy") // its own name means it
		d.healthy("web-1")
		count(t, c, "web", 2)
		d.run("web-3", compose("health", "web"), "") // nobody checks it
		count(t, c, "web", 3)
		for _, n := range []string{"web-1", "web-2", "web-3"} {
			d.remove(n)
		}
	})

	t.Run("labels", func(t *testing.T) {
		c := New(d.host, slog.New(slog.DiscardHandler))
		moved := make(chan struct{}, 100)
		c.FollowLabels(isTest, func() { moved <- struct{}{} })
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { c.Run(ctx) })
		defer running.Wait()
		defer cancel()
		// look waits until exactly this is listed, and for the call that says so.
		look := func(want string) {
			t.Helper()
			eventually(t, func() error {
				select {
				case <-moved:
				case <-time.After(10 * time.Millisecond):
				}
				var got []string
				for _, l := range c.Labelled() {
					got = append(got, fmt.Sprintf("%s %v %v running=%v host=%v %s", l.Name, l.Labels, l.Ports, l.Running, l.HostNetwork, l.Replicas))
				}
				if s := strings.Join(got, "; "); s != want {
					return fmt.Errorf("%s; want %s", s, want)
				}
				return nil
			})
		}
		labels := compose("shop", "page")
		labels["test.host"], labels["other"] = "a.org", "x"
		d.create("labelled", labels, "")
		look("") // it never ran
		d.up("labelled")
		look("labelled map[test.host:a.org] [80] running=true host=false shop/page")
		id := c.Labelled()[0].ID
		if a, err := c.Now().Resolve(t.Context(), strings.Repeat("0", 64)+","+id); err != nil || d.whoAt(a[0]) != "labelled" {
			t.Errorf("its id leads to %v, %v", a, err)
		}
		if _, err := c.Now().Resolve(t.Context(), "labelled"); err == nil {
			t.Error("a name is taken for an id")
		}
		for try := 1; ; try++ { // it never waits; that one of a few is quick shows it on a busy machine too
			if _, err := d.api.ContainerKill(t.Context(), "labelled", client.ContainerKillOptions{}); err != nil {
				t.Fatal(err)
			}
			look("labelled map[test.host:a.org] [80] running=false host=false shop/page")
			began := time.Now()
			_, err := c.Now().Resolve(t.Context(), id)
			took := time.Since(began)
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindStopped || e.Temporary() {
				t.Errorf("after %s: %v", took, err)
			}
			if took < restartWait/2 {
				break
			}
			if try == 10 {
				t.Fatalf("it waits: the last of %d took %s", try, took)
			}
			d.up("labelled")
			look("labelled map[test.host:a.org] [80] running=true host=false shop/page")
		}
		d.remove("labelled")
		d.run("onhost", map[string]string{"test.host": "b.org"}, "host")
		look("onhost map[test.host:b.org] [80] running=true host=true ")
		d.remove("onhost")
		look("")
	})

	t.Run("filter", func(t *testing.T) { testFilter(t, d) })

	t.Run("without events", func(t *testing.T) {
		c := New(d.host, slog.New(slog.DiscardHandler))
		old := resolve(t, c, "copy/api")[0]
		d.down("copy-api-1")
		d.run("filler", nil, "")
		d.up("copy-api-1")
		eventually(t, func() error {
			if a := resolve(t, c, "copy/api")[0]; a == old {
				return errors.New("still the old address")
			}
			return nil
		})
	})

	t.Run("daemon gone and back", func(t *testing.T) {
		at := resolve(t, c, "blog")
		d.command("kill")
		eventually(t, func() error {
			if live() == nil {
				return errors.New("the client has not noticed")
			}
			return nil
		})
		// Its containers live on, and so does what is known of them.
		if a := resolve(t, c, "blog"); !slices.Equal(a, at) {
			t.Errorf("without a daemon blog is at %s, was at %s", a, at)
		}
		c.mu.Lock()
		c.good = c.good.Add(-staleFor)
		c.mu.Unlock()
		refused(t, c, "blog", KindAbsent, d.host[len("unix://"):], "systemctl", "DOCKER_HOST")
		refused(t, New(d.host, slog.New(slog.DiscardHandler)), "blog", KindAbsent)
		d.start()
		d.eventually(live)
		// Without live-restore it ended what it found.
		d.up("blog")
		if who := d.whoAt(resolve(t, c, "blog")[0]); who != "blog" {
			t.Errorf("afterwards blog is %q", who)
		}
	})
}
