//go:build unix

package relaytest

import (
	"fmt"
	"net"
	"runtime/metrics"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// onSocket calls f with the descriptor of c.
func onSocket(c net.Conn, f func(fd int) error) error {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// waitBroken waits until c's TCP knows that the connection was reset. It neither reads nor writes.
func waitBroken(p Path, c net.Conn) error {
	var revents int16
	for w := (poll{}); w.again(p.resetIn(patience)); {
		if err := onSocket(c, func(fd int) error {
			fds := []unix.PollFd{{Fd: int32(fd)}}
			_, err := unix.Poll(fds, 0)
			revents = fds[0].Revents
			return err
		}); err != nil && err != unix.EINTR {
			return err
		}
		if revents&unix.POLLERR != 0 {
			return nil
		}
	}
	return fmt.Errorf("not told of a reset (poll: %#x)", revents)
}

// sendUrgent waits for its turn as a write does: what was written before may fill the send buffer.
func sendUrgent(c net.Conn, b byte) error {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Write(func(fd uintptr) bool {
		serr = unix.Sendto(int(fd), []byte{b}, unix.MSG_OOB, nil)
		return serr != unix.EAGAIN
	}); err != nil {
		return err
	}
	return serr
}

// effort is what this process has done.
type effort struct {
	wakes      int64 // of threads that waited
	goroutines int64 // that were started; timers start some
	cpu        time.Duration
}

func takeEffort() effort {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	all := []metrics.Sample{{Name: "/sched/goroutines-created:goroutines"}}
	metrics.Read(all)
	return effort{int64(u.Nvcsw), int64(all[0].Value.Uint64()), time.Duration(u.Utime.Nano() + u.Stime.Nano())}
}

func (e effort) since(before effort) effort {
	return effort{e.wakes - before.wakes, e.goroutines - before.goroutines, e.cpu - before.cpu}
}
