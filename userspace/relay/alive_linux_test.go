package relay

import (
	"context"
	"testing"
	"time"
)

// TestAlive: a loop that does not go on is found, and one that does again is.
func TestAlive(t *testing.T) {
	if pickLoop() == nil {
		t.Fatal("no loop")
	}
	try := func(wait time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		return Alive(ctx)
	}
	if err := try(time.Minute); err != nil {
		t.Fatal(err)
	}
	l := loops.all[len(loops.all)-1]
	l.mu.Lock() // as who is in the middle of an event
	for range 3 {
		if err := try(20 * time.Millisecond); err == nil {
			t.Error("a loop that is stuck is called alive")
		}
	}
	l.mu.Unlock()
	for end := time.Now().Add(time.Minute); ; {
		err := try(time.Minute)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after it went on: %v", err)
		}
	}
}
