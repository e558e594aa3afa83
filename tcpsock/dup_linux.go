package tcpsock

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dup gives another descriptor of sock's socket, which is the caller's; with an error it is negative. It is
// none of 0 to 2, which a program that is started would take for its own.
func Dup(sock syscall.RawConn) (fd int, err error) {
	fd = -1
	if cerr := sock.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil {
		return -1, cerr
	}
	return fd, os.NewSyscallError("fcntl", err)
}
