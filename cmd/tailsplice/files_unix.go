//go:build unix

package main

import "golang.org/x/sys/unix"

// raiseFileLimit raises RLIMIT_NOFILE as far as it may towards want, and returns what the limit is now.
// Raising the hard limit needs CAP_SYS_RESOURCE; the soft one goes up to the hard one for everybody.
func raiseFileLimit(want uint64) (uint64, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, err
	}
	if l.Cur >= want {
		return l.Cur, nil
	}
	if want > l.Max {
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: want}) == nil {
			return want, nil
		}
	}
	up := unix.Rlimit{Cur: min(want, l.Max), Max: l.Max}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &up) != nil {
		return l.Cur, nil
	}
	return up.Cur, nil
}
