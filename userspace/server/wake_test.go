package server

import (
	"encoding/json"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
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
