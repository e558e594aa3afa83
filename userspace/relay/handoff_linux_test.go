package relay

import (
	"testing"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// TestQuiet: a flow is quiet when it has moved little between two looks. One that has come since the last look is not,
// though it has moved little: it may be in the middle of bulk.
func TestQuiet(t *testing.T) {
	q := quietSweep{isRunning: true} // by nobody but this test
	f := (&Relay{}).newFlow(t.Context(), nil, nil, Options{}, nil)
	f.choice.Prefers = true
	f.down.socket = new(loop.Socket)
	q.add(f)
	defer q.remove(f)
	for i, sweep := range []struct {
		moved int64
		quiet bool
	}{
		{1000, false}, // it has just come
		{1000, true},
		{0, false}, // there is nothing to win
		{1 << 20, true},
		{1<<20 + 1, false},
	} {
		f.counters.down.Add(sweep.moved)
		if _, quiet := q.quiet()[f]; quiet != sweep.quiet {
			t.Errorf("sweep %d, %d bytes moved: quiet %v, want %v", i, sweep.moved, quiet, sweep.quiet)
		}
	}
}
