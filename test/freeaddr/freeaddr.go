// Package freeaddr gives a test addresses that nothing listens on, and that stay so until the test uses them:
// nothing else takes them between the choice and the use. It is for tests only, and imports none of ours.
package freeaddr

import (
	"fmt"
	"net"
	"strconv"
	"sync"
)

// The ports are below those that the kernel gives to connections, and to listeners of port 0. Each process
// has a block of them to itself, whose first port is a lock: a UDP socket is bound to it until the process
// ends.
const (
	lowest  = 10000
	highest = 32000
	block   = 400 // many more than the tests of a process use at a time
)

var (
	mu   sync.Mutex
	used = 1
)

// claim gives the first port of this process's block, or 0.
var claim = sync.OnceValue(func() int {
	for first := lowest; first+block <= highest; first += block {
		if c, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", first)); err == nil {
			locks[first] = c
			return first
		}
	}
	return 0
})

var locks = map[int]net.PacketConn{} // kept, so that nothing closes them

// fatal is a test, or a script of one.
type fatal interface {
	Fatalf(format string, args ...any)
}

// Get is an address of 127.0.0.1, host:port.
func Get(t fatal) string {
	return Of(t, "127.0.0.1")
}

// Of is an address of host, which is an IP address.
func Of(t fatal, host string) string {
	return net.JoinHostPort(host, strconv.Itoa(Ports(t, host, 1)))
}

// Ports is the first of n ports in a row, all of which are free for TCP and UDP on host.
func Ports(t fatal, host string, n int) int {
	first := claim()
	if first == 0 {
		t.Fatalf("no block of ports is left from %d to %d", lowest, highest)
	}
	mu.Lock()
	defer mu.Unlock()
	for range block {
		if used+n > block {
			used = 1
		}
		port := first + used
		used += n
		if areFree(host, port, n) {
			return port
		}
	}
	t.Fatalf("no %d ports in a row are free on %s, from %d to %d", n, host, first+1, first+block-1)
	return 0
}

func areFree(host string, port, n int) bool {
	for ; n > 0; port, n = port+1, n-1 {
		at := net.JoinHostPort(host, strconv.Itoa(port))
		l, err := net.Listen("tcp", at)
		if err != nil {
			return false
		}
		l.Close()
		c, err := net.ListenPacket("udp", at)
		if err != nil {
			return false
		}
		c.Close()
	}
	return true
}
