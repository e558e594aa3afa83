package skmsg

import (
	"errors"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A flow to a process in another network namespace, behind a veth as that of a container, is given back, and
// goes past TCP again.
func TestLocalCapturedLateElsewhere(t *testing.T) {
	if !loadertest.InNewNetwork(t) {
		return
	}
	ln := listenElsewhere(t)
	n, next := openLocal(t, nil), openLocal(t, nil)
	p := loadertest.BecomeLocal(t, n, ln)
	end := time.Now().Add(loadertest.Patience)
	loadertest.Must(t, errors.Join(p.Client.SetDeadline(end), p.Server.SetDeadline(end)))
	loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
	spliceAgain(t, next, p, recalled(t, p))
	for range 2 {
		loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
	}
	if at := onlyProcess(t, next); at.Moved(0) != 1000 || at.Moved(1) != 2000 { // the first by TCP
		t.Errorf("%d and %d bytes went past TCP", at.Moved(0), at.Moved(1))
	}
}

// listenElsewhere listens in a network namespace of its own, which has a process, and to which a veth leads.
func listenElsewhere(t *testing.T) (ln net.Listener) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	loadertest.Must(t, err)
	defer own.Close()
	other, err := netns.New() // and goes there
	loadertest.Must(t, err)
	defer other.Close()
	process := exec.Command("sleep", "3600")
	loadertest.Must(t, errors.Join(process.Start(), netns.Set(own)))
	t.Cleanup(func() { process.Process.Kill(); process.Wait() })

	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "here"}, PeerName: "there", PeerNamespace: netlink.NsFd(other)}
	loadertest.Must(t, netlink.LinkAdd(link))
	up := func(name, address string) {
		l, err := netlink.LinkByName(name)
		loadertest.Must(t, err)
		a, err := netlink.ParseAddr(address)
		loadertest.Must(t, errors.Join(err, netlink.AddrAdd(l, a), netlink.LinkSetUp(l)))
	}
	up("here", "10.99.0.1/24")
	loadertest.Must(t, netns.Set(other))
	up("there", "10.99.0.2/24")
	ln, _ = cgroup.ListenAt(t, "tcp4", "10.99.0.2:0")
	loadertest.Must(t, netns.Set(own))
	return ln
}
