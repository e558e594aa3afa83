// Package hook runs programs that a configuration names.
package hook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Program is one run of a program, without a shell.
type Program struct {
	Argv    []string
	Env     map[string]string // added to the daemon's own
	Timeout time.Duration     // then it is killed, with all that it started
	Key     string            // of the configuration that has Timeout, for the error
}

// MaxOutput is how much of what a program prints is kept: its end, in bytes.
const MaxOutput = 2048

// Error is a run that failed.
type Error struct {
	Command string // as it was run
	Err     error
	Output  string // the end of what it printed
}

func (e *Error) Unwrap() error { return e.Err }

func (e *Error) Error() string {
	s := fmt.Sprintf("`%s`: %v", e.Command, e.Err)
	if e.Output != "" {
		s += fmt.Sprintf(": it printed %q", e.Output)
	}
	return s
}

// Run runs p and waits for its end. Where ctx ends first, or Timeout is over, it is killed. Any exit status
// but 0 is an [Error].
func (p Program) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Argv[0], p.Argv[1:]...)
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = os.Environ()
	for name, value := range p.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that the kill reaches a script's children
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("it was killed after %v: raise %s if it needs longer", p.Timeout, p.Key)
	}
	return &Error{Command: strings.Join(p.Argv, " "), Err: err, Output: strings.TrimSpace(out.String())}
}

// tail keeps the end of what is written to it.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	*t = (*t)[max(0, len(*t)-MaxOutput):]
	return len(p), nil
}

func (t tail) String() string { return strings.ToValidUTF8(string(t), "?") }
