package server

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/dial"
)

// TestDisabled: while_down takes a disabled default for one that is down, a reload that leaves the target out keeps it
// disabled, and what was learnt about it before stays.
func TestDisabled(t *testing.T) {
	target, addr := backend(t, echo), freeAddr(t)
	yaml := func(to string) string {
		return fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q }, while_down: close } ]", addr, to)
	}
	d := start(t, yaml(target))
	l := func() ListenerStatus { return d.Status().Listeners[0] }
	eventually(t, "it opens", func() bool { return l().Closed == "" })
	query := url.Values{"target": {target}}
	if got, err := d.SetDisabled(query, true); err != nil || got.Target != target || got.Since.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	eventually(t, "it closes", func() bool { return strings.Contains(l().Closed, "an operator has disabled it") && len(l().Bound) == 0 })
	if down := l().Routes[0].Down; len(down) != 0 {
		t.Errorf("nobody has tried it, and it is down: %q", down)
	}
	since := d.Status().Disabled
	if err := d.Reload(parse(t, yaml("127.0.0.1:9"))); err != nil {
		t.Fatal(err)
	}
	if got := d.Status().Disabled; len(got) != 1 || got[0] != since[0] {
		t.Errorf("after a reload without it: %+v, was %+v", got, since)
	}
	if err := d.Reload(parse(t, yaml(target))); err != nil {
		t.Fatal(err)
	}
	if !d.disabled.Has(target) || d.disabled.Check(dial.Target{}, target) == nil {
		t.Error("after a reload with it: enabled")
	}
	if _, err := d.SetDisabled(query, false); err != nil || len(d.Status().Disabled) != 0 {
		t.Errorf("%v, %+v", err, d.Status().Disabled)
	}
	eventually(t, "it opens again", func() bool { return l().Closed == "" && len(l().Bound) == 1 })
	if _, err := d.SetDisabled(url.Values{"target": {"127.0.0.1:9"}}, false); err == nil {
		t.Error("a target that there is not is enabled")
	}
}
