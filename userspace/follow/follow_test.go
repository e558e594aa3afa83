package follow

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// The pauses grow up to the longest, and begin again after a daemon that was there for a while.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		gone := errors.New("gone")
		var starts []time.Time
		losses := 0
		Run(ctx, func(context.Context) error {
			starts = append(starts, time.Now())
			switch len(starts) {
			case 10:
				time.Sleep(time.Minute)
			case 12:
				cancel()
			}
			return gone
		}, func(err error) {
			if losses++; err != gone {
				t.Errorf("lost says %v", err)
			}
		})
		if losses != 11 || len(starts) != 12 {
			t.Fatalf("%d losses of %d starts", losses, len(starts))
		}
		want := PauseMin
		for i := 1; i < len(starts); i++ {
			got := starts[i].Sub(starts[i-1])
			if i == 10 {
				got, want = got-time.Minute, PauseMin
			}
			if got < want/2 || got > want*3/2 {
				t.Errorf("pause %d is %v, want %v give or take a half", i, got, want)
			}
			want = min(2*want, PauseMax)
		}
	})
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if !Sleep(ctx, time.Millisecond) {
			t.Error("it was cut short")
		}
		if Sleep(ctx, time.Minute) {
			t.Error("it outlasted its context")
		}
	})
}
