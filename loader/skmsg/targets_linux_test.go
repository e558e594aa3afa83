package skmsg

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A target that no flow goes to any more makes room for a new one, and the program stays where its flows are.
func TestLocalForgetsTargets(t *testing.T) {
	n := openLocal(t, nil)
	first, dir := cgroup.Listen(t, "tcp4")
	p := loadertest.BecomeLocal(t, n, first)
	process := onlyProcess(t, n)
	at, hour := netip.MustParseAddrPort(first.Addr().String()), time.Hour
	n.targets.mu.Lock()
	n.targets.known[at].used = time.Now().Add(-hour)
	for i := 1; i < maxTargets; i++ {
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 80)
		n.targets.known[at] = &target{used: time.Now().Add(-hour / 2)}
		loadertest.Must(t, n.objects.Targets.Put(endOf(at), uint32(1)))
	}
	n.targets.mu.Unlock()

	second, _ := cgroup.Listen(t, "tcp4")
	q := loadertest.BecomeLocal(t, n, second)
	loadertest.Must(t, loadertest.ExchangeBytes(q, 1000, 1000))
	n.targets.mu.Lock()
	if n.targets.known[at] != nil || len(n.targets.known) != maxTargets {
		t.Errorf("%d targets are known, with the oldest", len(n.targets.known))
	}
	for _, k := range n.targets.known {
		k.used = time.Now()
	}
	n.targets.mu.Unlock()

	// The program still sees how the socket of the first one's flow ends.
	if n := loadertest.Attached(t, dir); n == 0 {
		t.Error("no program is attached to the cgroup of a target whose flow lives")
	}
	_, err := p.Client.Write(prove.Pattern(1000))
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool {
		answer, err := process.query(skmsgLocalRequestLOCAL_LOOK, 0)
		return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
	}, "the bytes to reach the process's queue")
	loadertest.Must(t, errors.Join(p.Server.Close(), p.Client.SetReadDeadline(time.Now().Add(loadertest.Patience))))
	if _, err = p.Client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the process closed with bytes unread, and the client is told: %v", err)
	}

	// More targets than there is room for do not take it from each other.
	tcpsock.Control(q.Client, func(fd int) {
		if _, err := n.targets.find(fd); err != refusedTargets {
			t.Errorf("with all in use: %v", err)
		}
	})
}

// A socket whose connection was reset has no address of its peer: that is no target, and nothing is learned
// of it.
func TestLocalRefusesReset(t *testing.T) {
	n := openLocal(t, nil)
	client, down := loadertest.Connect(t, "tcp4")
	up, server := loadertest.Connect(t, "tcp4")
	defer client.Close()
	defer down.Close()
	defer up.Close()
	tcpsock.ResetConn(server)
	tcpsock.Control(up, func(fd int) {
		loadertest.WaitFor(t, func() bool { return tcpsock.IsClosed(fd) }, "the reset")
		tcpsock.Control(down, func(other int) {
			_, err := n.Splice(t.Context(), other, fd, sockmap.Flow{Buffer: 1 << 20})
			if !errors.Is(err, sockmap.RefusedState) {
				t.Errorf("refused: %v", err)
			}
		})
	})
	n.targets.mu.Lock()
	defer n.targets.mu.Unlock()
	if len(n.targets.known) != 0 {
		t.Errorf("targets: %v", n.targets.known)
	}
}
