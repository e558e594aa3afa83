package acme

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/mholt/acmez/v3/acme"

	"github.com/tailsplice/tailsplice/userspace/hook"
)

// Hook is a program that sets and removes TXT records for dns-01. It is run as
//
//	EXEC... present FQDN VALUE     set the record, and return when the zone's servers answer with it
//	EXEC... cleanup FQDN VALUE     remove the record with that value; others of the same name stay
//
// with FQDN such as "_acme-challenge.example.org." (with the dot at its end), without a shell and with the
// daemon's environment. Status 0 is success; what it prints is shown when it fails. It is the interface of
// lego's exec provider, so that hooks written for that one work.
type Hook struct {
	Exec []string // program and arguments
	// of one run; 0 means DefaultHookTimeout. Then it is killed, with all that it started.
	Timeout time.Duration
	Wait    time.Duration // after present, for records that need time to spread
}

// DefaultHookTimeout is how long a hook may run.
const DefaultHookTimeout = 2 * time.Minute

// limit is how long a run may take.
func (h *Hook) limit() time.Duration { return cmp.Or(h.Timeout, DefaultHookTimeout) }

func (h *Hook) run(ctx context.Context, verb, fqdn, value string) error {
	p := hook.Program{Argv: slices.Concat(h.Exec, []string{verb, fqdn, value}), Timeout: h.limit(), Key: "acme.dns.timeout"}
	if err := p.Run(ctx); err != nil {
		return fmt.Errorf("dns hook %w", err)
	}
	return nil
}

// hookSolver presents dns-01.
type hookSolver struct{ h *Hook }

func (s hookSolver) Present(ctx context.Context, ch acme.Challenge) error {
	return s.h.run(ctx, "present", ch.DNS01TXTRecordName()+".", ch.DNS01KeyAuthorization())
}

// Wait implements acmez.Waiter.
func (s hookSolver) Wait(ctx context.Context, _ acme.Challenge) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(s.h.Wait):
		return nil
	}
}

// CleanUp removes the record also when the attempt was broken off.
func (s hookSolver) CleanUp(ctx context.Context, ch acme.Challenge) error {
	hurry := ctx.Err() != nil // the daemon may be ending
	ctx = context.WithoutCancel(ctx)
	if hurry {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
	}
	return s.h.run(ctx, "cleanup", ch.DNS01TXTRecordName()+".", ch.DNS01KeyAuthorization())
}
