package transparent

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Probe tries a Way in a network namespace of its own, so that nothing of this machine changes. The error
// says what is missing. It needs root.
func Probe() error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here, and with it the namespace
		done <- probe()
	}()
	return <-done
}

func probe() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("it can be tried as root only (%w)", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	w, err := Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return errors.Join(append(slices.Collect(maps.Values(w.off)), w.Close())...)
}
