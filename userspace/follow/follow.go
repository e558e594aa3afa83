// Package follow keeps up with a daemon on this host that tells what changes, through its restarts.
//
// It is what clients of such daemons have alike: how soon they try again, how often they ask whether a quiet
// one still answers, and how long they collect what comes in one go.
package follow

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"time"
)

const (
	// PauseMin and PauseMax bound the pause before another try, which costs one connect(2).
	PauseMin = 50 * time.Millisecond
	PauseMax = 2 * time.Second
	Pulse    = 15 * time.Second     // how often a quiet daemon is asked whether it still answers
	Settle   = 5 * time.Millisecond // collects the changes that come in one go
)

// Run calls watch, which follows the daemon until it fails, again and again until ctx is done, and lost with
// the error in between. The pauses grow while watch fails at once, and differ from client to client.
func Run(ctx context.Context, watch func(context.Context) error, lost func(error)) {
	for pause := PauseMin; ; pause = min(2*pause, PauseMax) {
		began := time.Now()
		err := watch(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > PauseMax {
			pause = PauseMin
		}
		lost(err)
		if !Sleep(ctx, pause/2+rand.N(pause)) {
			return
		}
	}
}

// IsTimeout says whether err is that the daemon did not answer in time.
func IsTimeout(err error) bool {
	var n net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &n) && n.Timeout()
}

// Sleep reports whether ctx outlived it.
func Sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
