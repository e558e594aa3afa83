package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// keepFlowsAlive gives the connections that lc's listeners accept the options of a flow's socket. On Linux
// they inherit these from the listening socket: five system calls less for each connection.
func keepFlowsAlive(lc *net.ListenConfig) {
	lc.KeepAlive = -1 // Go need not set anything on each
	next := lc.Control
	lc.Control = func(network, address string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = tcpsock.SetOptions(int(fd)) })
		if err := errors.Join(cerr, err); err != nil || next == nil {
			return err
		}
		return next(network, address, c)
	}
}

// portOwner names the process that listens on the TCP port, as "nginx (pid 12)", or "" when it can't be told
// (no such socket, or not root).
func portOwner(port uint16) string {
	inodes := map[uint32]bool{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, _ := netlink.SocketDiagTCP(family)
		for _, s := range sockets {
			if s.State == tcpsock.Listening && s.ID.SourcePort == port && s.INode != 0 {
				inodes[s.INode] = true
			}
		}
	}
	if len(inodes) == 0 {
		return ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil {
			continue
		}
		var inode uint32
		if n, _ := fmt.Sscanf(to, "socket:[%d]", &inode); n != 1 || !inodes[inode] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
	}
	return ""
}

// followInterfaces makes the listeners look again whenever an address of this host comes or goes, until ctx
// ends.
func (srv *Server) followInterfaces(ctx context.Context) {
	for ctx.Err() == nil {
		changes := make(chan netlink.AddrUpdate)
		err := netlink.AddrSubscribeWithOptions(changes, ctx.Done(), netlink.AddrSubscribeOptions{
			ErrorCallback: func(error) {}}) // the channel is closed then
		if err != nil {
			srv.log.Warn("addresses of interfaces are not followed, a reload looks again", "err", err)
			return
		}
		srv.addressesMoved.wake() // for what changed before
		for range changes {
			srv.addressesMoved.wake()
		}
		select { // too much at once: begin again
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
