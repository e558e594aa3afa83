package relay

import "testing"

// TestQuiet: a flow is quiet when it has moved little between two looks. One that has come since the last look is not,
// though it has moved little: it may be in the middle of bulk.
func TestQuiet(t *testing.T) {
	c := calmFlows{looks: true} // by nobody but this test
	f := (&Relay{}).newFlow(t.Context(), nil, nil, Options{}, nil)
	f.prefers = true
	c.add(f, nil)
	defer c.remove(f)
	for i, look := range []struct {
		moved int64
		quiet bool
	}{
		{1000, false}, // it has just come
		{1000, true},
		{0, false}, // there is nothing to win
		{calmBytes, true},
		{calmBytes + 1, false},
	} {
		f.counters.down.Add(look.moved)
		if _, quiet := c.quiet()[f]; quiet != look.quiet {
			t.Errorf("look %d, %d bytes moved: quiet %v, want %v", i, look.moved, quiet, look.quiet)
		}
	}
}
