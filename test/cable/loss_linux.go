package cable

import (
	"errors"
	"os/exec"
	"testing"

	"github.com/tailsplice/tailsplice/test/loss"
)

// Lose makes c lose that part of the packets, both ways, from then on. Both ends stop making super-packets,
// of which one lost would be forty lost.
func (c *Cable) Lose(t testing.TB, part float64) {
	t.Helper()
	whole := func(dev string) error {
		return exec.Command("ethtool", "-K", dev, "tso", "off", "gso", "off").Run()
	}
	if err := errors.Join(
		whole(c.near),
		c.AtFar(func() error { return whole("far") }),
		c.AtFar(func() error { return loss.On("far", part) }),
	); err != nil {
		t.Fatalf("a cable that loses packets: %v", err)
	}
}
