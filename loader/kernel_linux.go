package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// runningKernel gives the version of the kernel, and what it calls itself.
func runningKernel() (version, string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return version{}, "", fmt.Errorf("ask for the kernel's version: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	signature, _ := os.ReadFile("/proc/version_signature")
	v, ok := parseVersion(release, unix.ByteSliceToString(u.Version[:]), string(signature))
	if !ok {
		return version{}, release, fmt.Errorf("kernel release %q has no version in it", release)
	}
	return v, release, nil
}

// refuseKnownBad says why the running kernel must not splice. allow: it may be known to damage streams.
func refuseKnownBad(allow bool) error {
	v, _, err := runningKernel()
	if err != nil {
		return err
	}
	if v.less(least) {
		return fmt.Errorf("%s: %w", badKernel(v), errors.ErrUnsupported)
	}
	if why := badKernel(v); why != "" && !allow {
		return fmt.Errorf("%w: %s", ErrKnownBad, why)
	}
	return nil
}

// explain says which capability a refusal of the kernel's is about; the kernel doesn't, and cilium/ebpf
// suspects a limit.
func explain(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	if f := probeCapabilities(); f.State == StateMissing {
		return fmt.Errorf("%s (%s): %w", f.Detail, f.Advice, unix.EPERM)
	}
	return err
}

// translate makes cilium/ebpf's notion of what a kernel can't do into the standard library's.
func translate(err error) error {
	if errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%w (%w)", err, errors.ErrUnsupported)
	}
	return err
}
