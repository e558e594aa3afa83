package main

import (
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// What routes lead to, by port. Names of routes are these with ".test".
const (
	pingPort = 9001 + iota // says one byte
	bulkPort               // says bulkBytes, and no more
	stopPort               // says what it can, and reads nothing
	idlePort               // says one byte, and stays; one for each source
)

const (
	bulkBytes  = 2 << 20
	smallQueue = 16 << 10 // bytes that who stops reading takes
)

// targets listens at the ports of args until the process is killed.
func targets(args []string) error {
	raiseFiles()
	for _, arg := range args {
		var port int
		if _, err := fmt.Sscan(arg, &port); err != nil {
			return err
		}
		ln, err := net.Listen("tcp4", fmt.Sprintf("%s:%d", targetAddr, port))
		if err != nil {
			return err
		}
		if port == stopPort { // what is accepted takes it from the listener
			control(ln.(*net.TCPListener), func(fd int) { unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, smallQueue) })
		}
		go serve(ln, port)
	}
	fmt.Println("ready")
	select {}
}

func serve(ln net.Listener, port int) {
	kept := make(map[net.Conn]bool) // or the collector would close them
	for {
		c, err := ln.Accept()
		if err != nil {
			continue
		}
		switch port {
		case pingPort:
			go func() {
				c.Write([]byte{1})
				io.Copy(io.Discard, c)
				c.Close()
			}()
		case bulkPort:
			go func() {
				c.Write(make([]byte, bulkBytes))
				c.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, c)
				c.Close()
			}()
		case stopPort:
			go writeOn(c)
		default:
			c.Write([]byte{1})
			kept[c] = true
		}
	}
}

// writeOn writes to c until it is broken, and closes it.
func writeOn(c net.Conn) {
	b := make([]byte, 16<<10)
	for {
		if _, err := c.Write(b); err != nil {
			c.Close()
			return
		}
	}
}

func control(c syscall.Conn, f func(fd int)) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

// raiseFiles lets this process have as many files as it may.
func raiseFiles() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		l.Cur = l.Max
		unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
}
