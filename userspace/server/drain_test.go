package server

import (
	"fmt"
	"net"
	"net/url"
	"testing"
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
