//go:build !linux

package memory

// state is for Linux: see watch_linux.go.
type state struct{ proc, cgroups string }

func (w *Watch) run()         {}
func (w *Watch) saveNothing() {}

// Status is nil: nothing is measured here.
func (w *Watch) Status() *Status { return nil }
