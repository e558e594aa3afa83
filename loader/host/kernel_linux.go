package host

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Kernel gives the version of the kernel, and what it calls itself.
func Kernel() (Version, string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Version{}, "", fmt.Errorf("ask for the kernel's version: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	signature, _ := os.ReadFile("/proc/version_signature")
	v, ok := parseVersion(release, unix.ByteSliceToString(u.Version[:]), string(signature))
	if !ok {
		return Version{}, release, fmt.Errorf("kernel release %q has no version in it", release)
	}
	return v, release, nil
}

// RefuseKnownBad says why the running kernel must not splice. allow: it may be known to damage streams.
func RefuseKnownBad(allow bool) error {
	v, _, err := Kernel()
	if err != nil {
		return err
	}
	if v.Less(least) {
		return fmt.Errorf("%s: %w", badKernel(v), errors.ErrUnsupported)
	}
	if why := badKernel(v); why != "" && !allow {
		return fmt.Errorf("%w: %s", ErrKnownBad, why)
	}
	return nil
}

// Explain says which capability a refusal of the kernel's is about; the kernel doesn't, and cilium/ebpf
// suspects a limit.
func Explain(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	if f := probeCapabilities(); f.State == StateMissing {
		return fmt.Errorf("%s (%s): %w", f.Detail, f.Advice, unix.EPERM)
	}
	return err
}

// Translate makes cilium/ebpf's notion of what a kernel can't do into the standard library's.
func Translate(err error) error {
	if errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%w (%w)", err, errors.ErrUnsupported)
	}
	return err
}
