package prove

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// Datapath is what is proven. It has no flow but that of a test.
type Datapath interface {
	// Splice takes over the flow between two sockets, as a datapath does. server has the other end of up, and
	// is a socket of this process.
	Splice(ctx context.Context, down, up int, server *net.TCPConn, o Flow) (count func() (up, down int64), err error)
	// Moved says how the bytes of a direction of the flow went, 0 is up. It is zero while there is no flow.
	Moved(direction int) Moved
	// GiveBack asks the flow to be given back, if there is one, and reports whether that is possible here.
	GiveBack() bool
	// Pressure is from how many pages on TCP saves memory; 0: not known.
	Pressure() uint64
}

// Moved are bytes of one direction.
type Moved struct {
	Redirected uint64 // by the kernel, through TCP
	Passed     uint64 // left to userspace
	PastTCP    uint64 // between the other side and a process
}

// Test is one test of the self-test.
type Test struct {
	name, proves string
	run          func(*trial)
}

// untried is why a test could not be made, which is no verdict, and what to do about it.
type untried struct {
	error
	advice string
}

var errNoLoopback = errors.New("connect over loopback")

// Run makes the tests of a datapath, up to the first for which the machine lacks something, since the others
// need that, too. It takes about 0.2 s, and touches loopback only.
func Run(d Datapath, tests []Test) (findings []host.Finding) {
	var sent []byte
	for _, test := range tests {
		start := time.Now()
		f := host.Finding{Name: test.name, State: host.StateOK, Detail: test.proves}
		t := &trial{d: d, sent: &sent}
		err := t.try(test.run)
		var not untried
		what, advice := "", ""
		if err != nil && !errors.As(err, &not) {
			what, advice = lacking(d, err) // while the sockets hold what they do
		}
		t.close()
		f.Took = time.Since(start)
		switch {
		case not.error != nil:
			f.State, f.Detail, f.Advice = host.StateDegraded, "not tried: "+not.Error(), not.advice
		case what != "": // no proof could be made, which proves nothing
			f.Lacks, f.State, f.Detail, f.Advice = true, host.StateDegraded, what+": "+err.Error(), advice
		case err != nil:
			f.State, f.Detail = host.StateMissing, err.Error()
			f.Advice = "use another kernel; flows go through userspace meanwhile"
		}
		findings = append(findings, f)
		if f.Lacks {
			break
		}
	}
	return findings
}

// What a socket has to be allowed to hold, for anything to be redirected to it. Bytes.
const leastBuffer = 64 << 10

// lacking says what the machine lacks that may have made a test fail with err, and what to do about it. what
// is "" where it lacks nothing: then it is the kernel's splicing.
func lacking(d Datapath, err error) (what, advice string) {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS} {
		if errors.Is(err, e) {
			return "this process is at a limit", "raise its limit of descriptors (ulimit -n), or of memory"
		}
	}
	if i, e := net.InterfaceByName("lo"); e == nil && i.Flags&net.FlagUp == 0 {
		return "the interface lo is down", "ip link set lo up"
	}
	if errors.Is(err, errNoLoopback) {
		return "no connection over loopback can be made",
			"look at its address (ip addr show lo), and at the firewall"
	}
	// The kernel goes on saving memory until TCP has less than the first number of tcp_mem, which is by
	// itself three quarters of the second: see tcp(7) and tcp_init_mem.
	used, _ := tcpsock.Memory("/proc")
	if n, most := uint64(used)/uint64(os.Getpagesize()), d.Pressure(); most != 0 && n >= most-most/4 {
		return fmt.Sprintf("TCP is short of memory, with %d pages of %d", n, most),
			"wait until there is less traffic, or raise the limits: sysctl net.ipv4.tcp_mem"
	}
	for _, name := range []string{"tcp_rmem", "tcp_wmem"} {
		if most := host.TCPBuffer(name); most > 0 && most < leastBuffer {
			return fmt.Sprintf("a socket may have a buffer of %d bytes only (net.ipv4.%s), and %d are needed",
					most, name, leastBuffer),
				fmt.Sprintf("raise the last number: sysctl -w net.ipv4.%s='4096 65536 4194304'", name)
		}
	}
	return "", ""
}
