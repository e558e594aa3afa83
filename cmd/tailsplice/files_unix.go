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

// growFiles makes room for so many more descriptors at once. Else the kernel does so while they come, each
// time that they have doubled, and waits for all processors then (expand_fdtable in fs/file.c): more than 10
// ms, in which nothing is accepted or taken over.
func growFiles(more int) {
	var l unix.Rlimit
	if more == 0 || unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || l.Cur == 0 {
		return
	}
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	from := int(min(uint64(more)+filesBeside, l.Cur-1))
	if far, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, from); err == nil {
		unix.Close(far)
	}
}

// filesBeside is for descriptors that are not those of flows.
const filesBeside = 256
