package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// TestWoken: what was started is handed over with the time for which it runs unused, and is looked at when that may be
// over. Who uses what is forgotten when nobody does and nothing was started.
func TestWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looked := make(chan string, 3)
		look := func(w *woken) { looked <- w.Name }
		old, next := newWakes(), newWakes()
		old.mu.Lock()
		old.add(&woken{Started: container.Started{ID: "1", Name: "a", At: "then"}, Idle: time.Hour, Used: time.Now()}, look)
		old.mu.Unlock()
		time.Sleep(time.Minute)
		b, err := json.Marshal(orders{Woken: old.list()})
		if err != nil {
			t.Fatal(err)
		}
		old.stop()
		var o orders
		if err := json.Unmarshal(b, &o); err != nil || len(o.Woken) != 1 || o.Woken[0].Started != (container.Started{ID: "1", Name: "a", At: "then"}) {
			t.Fatalf("%s: %v", b, err)
		}
		next.adopt(o.Woken, look)
		time.Sleep(time.Hour - time.Nanosecond)
		if len(looked) != 0 {
			t.Error("it is looked at too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if len(looked) != 1 || <-looked != "a" {
			t.Errorf("looked at are %d", len(looked))
		}

		rule := &plan.Rule{Target: plan.Target{To: dial.Target{Scheme: dial.Docker, Host: "a", Port: 80}}}
		name := containerOf(rule)
		first, second := next.begin(name), next.begin(name)
		first()
		first() // again changes nothing
		used := func() map[string]use {
			next.mu.Lock()
			defer next.mu.Unlock()
			all := map[string]use{}
			for name, u := range next.uses {
				all[name] = *u
			}
			return all
		}
		if u := used(); u["a"].count != 1 {
			t.Errorf("used: %+v", u)
		}
		second()
		if u := used(); u["a"].count != 0 || !u["a"].last.Equal(time.Now()) {
			t.Errorf("it was used: %+v", u)
		}
		next.stop()
		next.begin(name)()
		if u := used(); len(u) != 0 {
			t.Errorf("kept: %v", u)
		}
		if next.begin(containerOf(&plan.Rule{Target: plan.Target{To: dial.Target{Scheme: dial.TCP, Host: "a"}}})) != nil {
			t.Error("an address is taken for a container")
		}
		if !next.mayWake("a") || next.mayWake("a") || !next.mayWake("b") {
			t.Error("a machine gets packets all the time, or none")
		}
		time.Sleep(lanAgain)
		if !next.mayWake("a") {
			t.Error("a machine gets one packet only")
		}
	})
}

// TestWokenLate: what is started after another process has got the list goes there as well, once, and from there to the
// next one. Of two starts of a container the later one counts.
func TestWokenLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := func(day int) string { return time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC).Format(time.RFC3339Nano) }
		start := func(ws *wakes, id string, day int) {
			ws.mu.Lock()
			defer ws.mu.Unlock()
			ws.add(&woken{Started: container.Started{ID: id, Name: id, At: at(day)}, Idle: time.Hour, Used: time.Now()}, func(*woken) {})
		}
		knows := func(ws *wakes) map[string]string {
			all := map[string]string{}
			for _, w := range ws.list() {
				all[w.ID] = w.At
			}
			return all
		}
		old, next, last := new(Server), new(Server), new(Server)
		for _, srv := range []*Server{old, next, last} {
			srv.wakes = newWakes()
		}
		give := func(from, to *Server) (told bool) {
			from.TellLate(func(late json.RawMessage) error {
				told = true
				return to.AddOrders(late)
			})
			return told
		}
		start(old.wakes, "first", 1)
		if give(old, next) {
			t.Error("what is known is told late")
		}
		old.wakes.collect(true)
		start(old.wakes, "a", 2)
		start(old.wakes, "b", 2)
		start(next.wakes, "a", 3)
		start(next.wakes, "b", 1)
		tries := 0
		old.TellLate(func(json.RawMessage) error { // which does not get there
			tries++
			return errors.New("no room")
		})
		if tries != 1 {
			t.Errorf("it is tried %d times at once", tries)
		}
		if !give(old, next) || give(old, next) {
			t.Error("what is started late is not told, or twice")
		}
		if got, want := knows(next.wakes), map[string]string{"a": at(3), "b": at(2)}; !maps.Equal(got, want) {
			t.Errorf("known are %v, want %v", got, want)
		}
		next.wakes.collect(true)
		start(old.wakes, "c", 4)
		old.wakes.stop()
		if !give(old, next) || !give(next, last) {
			t.Error("what is started late does not come to the one after the next")
		}
		if got, want := knows(last.wakes), map[string]string{"c": at(4)}; !maps.Equal(got, want) {
			t.Errorf("known are %v, want %v", got, want)
		}
		next.wakes.collect(false) // the other one did not take over
		start(next.wakes, "d", 5)
		if give(next, last) {
			t.Error("it is told though nobody takes over")
		}
		next.wakes.stop()
		last.wakes.stop()
	})
}

// TestWokenIsKept: who keeps the orders for the time after a crash hears of each container that is started. It is used
// anew from when the next process begins.
func TestWokenIsKept(t *testing.T) {
	var moved atomic.Int64
	cfg := parse(t, fmt.Sprintf("listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]", freeAddr(t), freeAddr(t)))
	d := startOptions(t, cfg, Options{Moved: func() { moved.Add(1) }})
	before := moved.Load()
	d.noteStarted(container.Started{ID: "1", Name: "a", At: "then"}, &plan.Rule{Policy: plan.Policy{Wake: &config.Wake{Docker: true, Idle: time.Hour}}})
	if moved.Load() == before {
		t.Error("nobody hears of it")
	}
	b, err := d.Orders()
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	var o orders
	if err := json.Unmarshal(b, &o); err != nil || len(o.Woken) != 1 {
		t.Fatalf("%s, %v", b, err)
	}
	o.Woken[0].Used = time.Now().Add(-2 * time.Hour) // when it was kept
	if b, err = json.Marshal(o); err != nil {
		t.Fatal(err)
	}
	next := startOptions(t, cfg, Options{Orders: b})
	next.wakes.mu.Lock()
	defer next.wakes.mu.Unlock()
	if w := next.wakes.started["1"]; w == nil || time.Since(w.Used) > time.Minute {
		t.Errorf("known is %+v", w)
	}
}

// TestWokenWhileUpgraded: what seems unused is not stopped while another process takes over, which may use it.
func TestWokenWhileUpgraded(t *testing.T) {
	d := start(t, fmt.Sprintf("listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]", freeAddr(t), freeAddr(t)))
	d.noteStarted(container.Started{ID: "1", Name: "a", At: "then"}, &plan.Rule{Policy: plan.Policy{Wake: &config.Wake{Docker: true, Idle: time.Hour}}})
	sockets, err := d.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	defer handover.Close(sockets)
	d.wakes.mu.Lock()
	w := d.wakes.started["1"]
	w.Used = time.Now().Add(-2 * time.Hour)
	d.wakes.mu.Unlock()
	stays := func() {
		t.Helper()
		d.lapse(w)
		d.wakes.mu.Lock()
		defer d.wakes.mu.Unlock()
		if d.wakes.started["1"] != w || time.Since(w.Used) > time.Minute {
			t.Errorf("it is stopped, or will be at once: %+v", w)
		}
		w.Used = time.Now().Add(-2 * time.Hour)
	}
	stays()
	if _, _, err := d.OrdersInParts(); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	d.isFrozen = false // as one sees it who has looked just before it was
	d.mu.Unlock()
	stays()
}
