package hook

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

const patience = time.Minute

// TestRun: what a program gets, and what is said of one that fails. That one which hangs is killed with its
// children is tested where hooks are used, by acme's TestHook.
func TestRun(t *testing.T) {
	t.Setenv("OURS", "env")
	p := Program{Argv: []string{"sh", "-c", `echo "$0 $1 $OURS $MORE"; exit 3`, "a b", "*"}, Env: map[string]string{"MORE": "more"}, Timeout: patience}
	err := p.Run(t.Context())
	failed, ok := errors.AsType[*Error](err)
	if !ok || failed.Output != "a b * env more" || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
	if err := (Program{Argv: []string{"true"}, Timeout: patience}).Run(t.Context()); err != nil {
		t.Error(err)
	}
	if err := (Program{Argv: []string{"/nonexistent"}, Timeout: patience}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (Program{Argv: []string{"sleep", "600"}, Timeout: patience}).Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("ctx has ended: %v", err)
	}
}
