package relaytest

import (
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// waitAcked waits until all that was sent on c is acknowledged.
func waitAcked(c net.Conn) error {
	n := -1
	for p := (poll{}); p.again(patience); {
		if err := onSocket(c, func(fd int) (err error) {
			n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
			return err
		}); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
	}
	return fmt.Errorf("%d bytes not acknowledged", n)
}

// cork makes what is sent next share its last segment with the FIN.
func cork(c net.Conn) error {
	return onSocket(c, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_CORK, 1)
	})
}

// watchHeld looks at two sockets of this process, between which something copies. held tells how many
// bytes were taken from src and not given to dst. It works on duplicates, since a datapath may
// close what it is given; they have to be closed before the flow ends.
func watchHeld(t testing.TB, src, dst net.Conn) (held func() int64, closeAll func()) {
	t.Helper()
	dup := func(c net.Conn) (d int) {
		must(t, onSocket(c, func(fd int) (err error) {
			d, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			return err
		}))
		return d
	}
	s, d := dup(src), dup(dst)
	peek := make([]byte, 32<<20) // more than a receive buffer
	return func() int64 {
			in, err := unix.GetsockoptTCPInfo(s, unix.IPPROTO_TCP, unix.TCP_INFO)
			must(t, err)
			queued, err := unix.IoctlGetInt(s, unix.SIOCINQ)
			must(t, err)
			if queued == 0 { // a socket that was in a sockmap counts here only what came while it was
				n, _, err := unix.Recvfrom(s, peek, unix.MSG_PEEK|unix.MSG_TRUNC|unix.MSG_DONTWAIT)
				if err == nil {
					queued = n
				}
			}
			out, err := unix.GetsockoptTCPInfo(d, unix.IPPROTO_TCP, unix.TCP_INFO)
			must(t, err)
			written := out.Bytes_sent - out.Bytes_retrans + uint64(out.Notsent_bytes)
			return int64(in.Bytes_received) - int64(queued) - int64(written)
		}, func() {
			unix.Close(s)
			unix.Close(d)
		}
}
