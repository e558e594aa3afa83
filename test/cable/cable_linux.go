package cable

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

const ownNetwork = "TAILSPLICE_TEST_OWN_NETWORK"

// InOwnNetwork runs the rest of the test in a process of its own, in a network namespace that ends with it
// and whose loopback is up. It returns true there, and false in the process that waited for that. It needs
// root.
func InOwnNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(ownNetwork) == t.Name() {
		if err := up("lo"); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	args := []string{"-test.run=^" + t.Name() + "$"}
	flag.Visit(func(f *flag.Flag) {
		own := !strings.HasPrefix(f.Name, "test.") // the test's
		if own || slices.Contains([]string{"test.v", "test.parallel", "test.timeout"}, f.Name) {
			args = append(args, "-"+f.Name+"="+f.Value.String())
		}
	})
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), ownNetwork+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	if err := cmd.Run(); err != nil {
		t.Errorf("in a network of its own: %v", err)
	}
	return false
}

// Sysctl sets a value below /proc/sys/net in the network of this process. Only after [InOwnNetwork].
func Sysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := sysctl(name, value); err != nil {
		t.Fatal(err)
	}
}

func sysctl(name, value string) error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) }

// A Cable leads from the network of this process to another one.
type Cable struct {
	far  netns.NsHandle
	near string      // the device here; the one there is called far
	addr [2][]string // at the near end and at the far one, of both families
}

var cables atomic.Int32 // laid so far

// New lays a cable until the end of the test, only after [InOwnNetwork]. Sockets at its far end have windows
// of at most rmem bytes.
func New(t testing.TB, rmem int) *Cable {
	t.Helper()
	n := cables.Add(1)
	c := &Cable{far: -1, near: fmt.Sprintf("near%d", n)}
	for i := range c.addr {
		c.addr[i] = []string{fmt.Sprintf("10.90.%d.%d", n, i+1), fmt.Sprintf("fd90:%d::%d", n, i+1)}
	}
	t.Cleanup(func() {
		if c.far >= 0 {
			c.far.Close()
		}
	})
	own, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	err = onThread(
		func() (err error) { c.far, err = netns.New(); return err }, // and enters it
		func() error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "far"}, PeerName: c.near,
				PeerNamespace: netlink.NsFd(own)})
		},
		func() error {
			return errors.Join(sysctl("ipv4/tcp_rmem", fmt.Sprintf("4096 %d %d", rmem, rmem)), up("lo"),
				up("far", c.addr[1]...))
		},
		func() error { return netns.Set(own) },
		func() error { return up(c.near, c.addr[0]...) },
	)
	if err != nil {
		t.Fatalf("lay a cable: %v", err)
	}
	return c
}

// Addr is the address of one of the two ends, of network "tcp4" or "tcp6", with port 0.
func (c *Cable) Addr(network string, atFar bool) string {
	at := c.addr[0]
	if atFar {
		at = c.addr[1]
	}
	addr := at[0]
	if network == "tcp6" {
		addr = at[1]
	}
	return netip.AddrPortFrom(netip.MustParseAddr(addr), 0).String()
}

// AtFar runs f at the far end: the sockets that it makes are there.
func (c *Cable) AtFar(f func() error) error {
	return onThread(func() error { return netns.Set(c.far) }, f)
}

// Plug puts the cable in at the far end, or pulls it. IPv6 addresses there are gone when it was pulled.
func (c *Cable) Plug(in bool) error {
	return c.AtFar(func() error {
		l, err := netlink.LinkByName("far")
		if err != nil {
			return err
		}
		if !in {
			return netlink.LinkSetDown(l)
		}
		return netlink.LinkSetUp(l)
	})
}

// onThread runs steps, until one fails, on a thread of its own, which ends with them.
func onThread(steps ...func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: no other goroutine may find itself in another network
		var err error
		for _, step := range steps {
			if err == nil {
				err = step()
			}
		}
		done <- err
	}()
	return <-done
}

func up(name string, addrs ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, addr := range addrs {
		bits := 24
		a := netip.MustParseAddr(addr)
		if a.Is6() {
			bits = 64
		}
		na, err := netlink.ParseAddr(fmt.Sprintf("%s/%d", addr, bits))
		if err != nil {
			return err
		}
		if a.Is6() {
			na.Flags = syscall.IFA_F_NODAD // there at once
		}
		if err := netlink.AddrAdd(l, na); err != nil {
			return fmt.Errorf("%s on %s: %w", addr, name, err)
		}
	}
	return netlink.LinkSetUp(l)
}
