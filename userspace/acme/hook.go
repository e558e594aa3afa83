package acme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mholt/acmez/v3/acme"
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
	Exec    []string      // program and arguments
	Timeout time.Duration // of one run; 0 means DefaultHookTimeout. Then it is killed, with all that it started.
	Wait    time.Duration // after present, for records that need time to spread
}

// DefaultHookTimeout is how long a hook may run.
const DefaultHookTimeout = 2 * time.Minute

// hookOutput is how much of what a hook prints is shown: its end, in bytes.
const hookOutput = 2048

// limit is how long a run may take.
func (h *Hook) limit() time.Duration { return cmp.Or(h.Timeout, DefaultHookTimeout) }

// HookError is a hook that failed.
type HookError struct {
	Command string // as it was run
	Err     error
	Output  string // the end of what it printed
}

func (e *HookError) Unwrap() error { return e.Err }

func (e *HookError) Error() string {
	s := fmt.Sprintf("dns hook `%s`: %v", e.Command, e.Err)
	if e.Output != "" {
		s += fmt.Sprintf(": it printed %q", e.Output)
	}
	return s
}

func (h *Hook) run(ctx context.Context, verb, fqdn, value string) error {
	ctx, cancel := context.WithTimeout(ctx, h.limit())
	defer cancel()
	argv := slices.Concat(h.Exec, []string{verb, fqdn, value})
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that the kill reaches a script's children
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("it was killed after %v: raise acme.dns.timeout if it needs longer", h.limit())
	}
	return &HookError{Command: strings.Join(argv, " "), Err: err, Output: strings.TrimSpace(out.String())}
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

// tail keeps the end of what is written to it.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	*t = (*t)[max(0, len(*t)-hookOutput):]
	return len(p), nil
}

func (t tail) String() string { return strings.ToValidUTF8(string(t), "?") }
