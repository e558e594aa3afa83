package server

import (
	"fmt"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
)

// TestDrained: what concerns a drained listener does not make the daemon unready, while_down does not open it,
// and another mode leaves it drained.
func TestDrained(t *testing.T) {
	target, addr, stays := freeAddr(t), freeAddr(t), freeAddr(t)
	yaml := func(mode, more string) string {
		return fmt.Sprintf(`
listeners:
  - { name: web, listen: [%q], mode: %s, default: { forward: %q }%s }
  - { name: stays, listen: [%q], mode: tcp, default: { forward: %q } }
`, addr, mode, target, more, stays, target)
	}
	d := start(t, yaml("tcp", ", while_down: close"))
	web := url.Values{"listener": {"web"}}
	if d.Ready().Ready {
		t.Error("ready, with a default that is down")
	}
	got, err := d.SetDrained(web, true)
	if err != nil || len(got.Listeners) != 1 || got.Listeners[0].Since.IsZero() || got.Listeners[0].Shut == "" {
		t.Errorf("%+v, %v", got, err)
	}
	if r := d.Ready(); !r.Ready || len(r.Drained) != 1 || len(r.Problems) == 0 {
		t.Errorf("with the problem of a drained listener: %s", r)
	}
	ln, err := net.Listen("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	l := func() ListenerStatus { return d.Status().Listeners[0] }
	eventually(t, "its default answers", func() bool { return l().Closed == "" })
	since := l().Drained
	if len(l().Bound) != 0 || since.IsZero() {
		t.Errorf("while_down has opened a drained listener: %+v", l())
	}
	if again, err := d.SetDrained(web, true); err != nil || !again.Listeners[0].Since.Equal(since) {
		t.Errorf("drained twice: %+v, %v, since %v", again, err, since)
	}
	if err := d.Reload(parse(t, yaml("sni", ""))); err != nil {
		t.Fatal(err)
	}
	if len(l().Bound) != 0 || !l().Drained.Equal(since) || l().Mode != "sni" {
		t.Errorf("after a reload to another mode: %+v", l())
	}
	if got, err := d.SetDrained(web, false); err != nil || len(got.Listeners[0].Bound) != 1 || !got.Listeners[0].Since.IsZero() {
		t.Errorf("undrained: %+v, %v", got, err)
	}
	d.Close()
	if _, err := d.SetDrained(web, true); err == nil {
		t.Error("a daemon that has ended is drained")
	}
}

// TestOrders: what an operator has said of listeners and targets holds in a process that takes over, until a
// reload leaves the listener out. It knows which containers were started.
func TestOrders(t *testing.T) {
	target, addr, stays := freeAddr(t), freeAddr(t), freeAddr(t)
	kept := fmt.Sprintf(`
listeners:
  - { name: stays, listen: [%q], mode: tcp, default: { forward: %q } }
`, stays, target)
	both := kept + fmt.Sprintf("  - { name: web, listen: [%q], mode: tcp, default: { forward: %q } }\n", addr, target)
	cfg := parse(t, both)
	old := startConfig(t, cfg)
	if _, err := old.SetDrained(url.Values{"listener": {"web"}}, true); err != nil {
		t.Fatal(err)
	}
	if _, err := old.SetDisabled(url.Values{"target": {target}}, true); err != nil {
		t.Fatal(err)
	}
	old.wakes.mu.Lock()
	old.wakes.add(&woken{Started: container.Started{ID: "1"}, Idle: time.Hour, Used: time.Now()}, old.lapse)
	old.wakes.mu.Unlock()
	said, err := old.Orders()
	if err != nil {
		t.Fatal(err)
	}
	before := old.Status()
	old.Close()
	d := startOptions(t, cfg, Options{Orders: said})
	after := d.Status()
	if len(after.Disabled) != 1 || !after.Disabled[0].Since.Equal(before.Disabled[0].Since) {
		t.Errorf("disabled are %+v, and were %+v", after.Disabled, before.Disabled)
	}
	if all := d.wakes.list(); len(all) != 1 || all[0].ID != "1" || all[0].Idle != time.Hour {
		t.Errorf("containers that may be stopped: %+v", all)
	}
	for i, l := range after.Listeners {
		if was := before.Listeners[i]; !l.Drained.Equal(was.Drained) || len(l.Bound) != len(was.Bound) {
			t.Errorf("%s is drained since %s and bound to %v, and was since %s to %v", l.Name, l.Drained, l.Bound, was.Drained, was.Bound)
		}
	}
	for _, yaml := range []string{kept, both} {
		if err := d.Reload(parse(t, yaml)); err != nil {
			t.Fatal(err)
		}
	}
	if l := d.Status().Listeners[1]; !l.Drained.IsZero() || len(l.Bound) == 0 {
		t.Errorf("a listener that is new by a reload is drained: %+v", l)
	}
}
