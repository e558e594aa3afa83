package balance

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestRaceGivenUpInside: an attempt that is a race of its own, and was given up, has another one begun in its
// place already: its error begins no more, and every way has its time.
func TestRaceGivenUpInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var at []time.Duration
		race := Race[int, int]{
			Next:  func() (int, bool) { at = append(at, time.Since(began)); return len(at), len(at) <= MaxBeside+3 },
			Delay: func(int) time.Duration { return time.Second },
			Try: func(ctx context.Context, i int) (int, error) {
				<-ctx.Done()
				return 0, fmt.Errorf("way %d: %w", i, context.Cause(ctx))
			},
			Close: func(int) {},
			Lost:  func(int, error) {},
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, _, ok := race.Run(ctx); ok {
			t.Error("it has succeeded")
		}
		for i, d := range at {
			if want := time.Duration(i) * time.Second; d != want {
				t.Errorf("way %d began after %s, want %s", i, d, want)
			}
		}
	})
}
