package dial

import (
	"context"
	"time"
)

// HeadStart is how long an attempt to connect to t has before another address, or another target, is tried
// beside it.
func (t Target) HeadStart() time.Duration {
	if t.Scheme == Tailnet {
		return tailnetDelay
	}
	return fallbackDelay
}

// Explain says what [Dialer.Dial] would of an attempt to connect to t that has failed with err after it took
// some time.
func (d *Dialer) Explain(ctx context.Context, t Target, err error, took time.Duration) *Error {
	return d.explain(ctx, t, &failure{err: err, addr: t.String()}, took)
}
