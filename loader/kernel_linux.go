package loader

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

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

func refuseKnownBad(o Options) error {
	v, _, err := runningKernel()
	if err != nil {
		return err
	}
	if v.less(least) {
		return fmt.Errorf("%s: %w", badKernel(v), errors.ErrUnsupported)
	}
	if why := badKernel(v); why != "" && !o.KnownBad {
		return fmt.Errorf("%w: %s", ErrKnownBad, why)
	}
	return nil
}
