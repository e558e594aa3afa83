package transparent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReturnPath: the container sees the client's address, whatever kind it is, behind
// a firewall that lets nothing in but answers, and nothing of the connection
// stays behind.
func TestReturnPath(t *testing.T) {
	w := newWorld(t)
	w.in(w.host, func() {
		nft := exec.Command("/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; nft -f -")
		nft.Stdin = strings.NewReader(`table inet firewall {
			chain input { type filter hook input priority filter; policy drop; ct state established,related accept; meta l4proto ipv6-icmp accept; }
			chain forward { type filter hook forward priority filter; policy drop; }
		}`)
		if out, err := nft.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	path := w.open(slog.New(slog.DiscardHandler))
	for _, s := range clients {
		client := netip.MustParseAddr(s)
		if err := path.Fits(client, netip.MustParseAddrPort(w.server[client.Is6()].Addr().String()).Addr()); err != nil {
			t.Errorf("%s does not fit: %v", s, err)
		}
		if got, err := w.sees(client); err != nil || got != s {
			t.Errorf("the container sees %q, %v: want %s", got, err, s)
		}
	}
	// The container's FIN finds its way too.
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		open := w.connections()
		if open == "" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the container still has\n%s", open)
		}
	}
}

// TestMany: 300 connections of one client at once, each of which moves bytes.
func TestMany(t *testing.T) {
	w := newWorld(t)
	w.open(slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	for i := range 300 {
		client := netip.MustParseAddr(clients[i%2])
		c, err := w.dial(client)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		wg.Go(func() {
			c.SetDeadline(time.Now().Add(patience))
			msg := bytes.Repeat([]byte("x"), 100_000)
			if _, err := c.Write(msg); err != nil {
				t.Error(err)
				return
			}
			for left, buf := len(msg), make([]byte, 4096); left > 0; {
				n, err := c.Read(buf)
				if err != nil {
					t.Errorf("%d bytes were not seen: %v", left, err)
					return
				}
				for line := range strings.Lines(string(buf[:n])) {
					var from string
					var got int
					fmt.Sscan(line, &from, &got)
					left -= got
				}
			}
		})
	}
	wg.Wait()
}

// TestFits: where answers would not come back, the reason is known before.
func TestFits(t *testing.T) {
	w := newWorld(t)
	path := w.open(slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		client, to string
		want       Reason
	}{
		{"203.0.113.7", containers4 + "2", ""},
		{"::ffff:203.0.113.7", containers4 + "2", ""},
		{"2001:db8:c::7", containers6 + "2", ""},
		{"203.0.113.7", containers6 + "2", Family},
		{"2001:db8:c::7", containers4 + "2", Family},
		{"127.0.0.1", containers4 + "2", ClientAddress},
		{"::1", containers6 + "2", ClientAddress},
		{"fe80::1%eth0", containers6 + "2", ClientAddress},
		{"203.0.113.7", "127.0.0.1", TargetHere},
		{"203.0.113.7", containers4 + "1", TargetHere},
		{"2001:db8:c::7", outside6 + "1", TargetHere},
		{containers4 + "3", containers4 + "2", SameNetwork},
		{containers6 + "3", containers6 + "2", SameNetwork},
		{"203.0.113.7", outside4 + "99", SameNetwork}, // whose gateway is another
		{containers4 + "3", outside4 + "99", ""},
	} {
		var got *Error
		if errors.As(path.Fits(netip.MustParseAddr(c.client), netip.MustParseAddr(c.to)), &got); got == nil {
			got = &Error{}
		}
		if got.Reason != c.want {
			t.Errorf("%s to %s: %q (%v), want %q", c.client, c.to, got.Reason, got, c.want)
		}
	}
	var none *Error
	if !errors.As((*ReturnPath)(nil).Fits(netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr(containers4+"2")), &none) || none.Reason != Unavailable {
		t.Errorf("without a ReturnPath: %v", none)
	}
}

// TestRemoved: what a ReturnPath adds is gone when it is closed. What a daemon leaves
// that is killed is replaced by the next one, and not doubled; what another one
// has that lives is left alone.
func TestRemoved(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	a := w.open(slog.New(slog.DiscardHandler))
	one := w.state()
	if n := strings.Count(one, "\n"); n != 7 || strings.Count(one, "fwmark 0x40/0x40") != 4 {
		t.Errorf("a ReturnPath adds\n%s\nwant two rules and a route for each family, and an nftables table", one)
	}
	b := w.open(slog.New(slog.DiscardHandler))
	two := w.state()
	if strings.Count(two, "\n") != 14 {
		t.Errorf("two ReturnPaths have\n%s", two)
	}
	kill(a) // and its rules stay
	if got := w.state(); got != two {
		t.Errorf("after the kill\n%s\nwant\n%s", got, two)
	}
	c := w.open(slog.New(slog.DiscardHandler))
	if got := w.state(); len(got) != len(two) || c.slot != a.slot {
		t.Errorf("after the kill and a start:\n%s\nwant\n%s", got, two)
	}
	must(t, c.Close())
	for _, s := range clients { // by b
		if got, err := w.sees(netip.MustParseAddr(s)); err != nil || got != s {
			t.Errorf("the container sees %q, %v: want %s", got, err, s)
		}
	}
	kill(b) // whose slot the next one does not take
	d := w.open(slog.New(slog.DiscardHandler))
	if got := w.state(); got != one || d.slot != 0 {
		t.Errorf("after all were killed and one was started:\n%s\nwant\n%s", got, one)
	}
	must(t, d.Close())
	if got := w.state(); got != before {
		t.Errorf("after the end:\n%s\nwant\n%s", got, before)
	}
}

// TestSlotsOfOthers: who may not do what a daemon does can't keep daemons from having a slot.
func TestSlotsOfOthers(t *testing.T) {
	w := newWorld(t)
	w.in(w.host, func() {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 { // of this thread, which ends here
			t.Fatal(errno)
		}
		for slot := range slots {
			if name, err := net.ListenPacket("unixgram", fmt.Sprintf("@tailsplice-transparent-%d", slot)); err == nil {
				t.Cleanup(func() { name.Close() })
			}
			if lock, err := lockSlot(slot); err == nil {
				t.Cleanup(func() { lock.Close() })
				t.Errorf("slot %d is anybody's", slot)
			} else if !errors.Is(err, fs.ErrPermission) {
				t.Errorf("slot %d: %v", slot, err)
			}
		}
	})
	path := w.open(slog.New(slog.DiscardHandler))
	if path.slot != 0 {
		t.Errorf("it has slot %d", path.slot)
	}
	must(t, path.Close())
}

// kill does with a ReturnPath what SIGKILL does.
func kill(w *ReturnPath) {
	w.once.Do(func() {
		close(w.stop)
		<-w.stopped
		w.free()
	})
}

// TestRepair: what others take away is put back.
func TestRepair(t *testing.T) {
	w := newWorld(t)
	var log strings.Builder
	path := w.open(slog.New(slog.NewTextHandler(&log, nil)))
	path.once.Do(func() { close(path.stop); <-path.stopped }) // or it would repair meanwhile, too
	t.Cleanup(func() { must(t, path.remove(path.slot)); path.free() })
	whole := w.state()
	for _, destroy := range []string{"nft flush ruleset", "nft flush table inet tailsplice-0", "ip rule del pref 1740; ip rule del pref 1741", "ip -6 route flush table 17440"} {
		path.repair()
		if log.Len() > 0 {
			t.Errorf("nothing was amiss: %s", log.String())
		}
		w.in(w.host, func() {
			if out, err := exec.Command("/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; "+destroy).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", destroy, err, out)
			}
		})
		if w.state() == whole && !strings.Contains(destroy, "flush table inet") {
			t.Errorf("%s destroyed nothing", destroy)
		}
		w.in(w.host, path.repair)
		if got := w.state(); got != whole || !strings.Contains(log.String(), "were restored") {
			t.Errorf("after %s:\n%s\nwant\n%s\nlog: %s", destroy, got, whole, log.String())
		}
		log.Reset()
		for _, s := range clients[:2] {
			if got, err := w.sees(netip.MustParseAddr(s)); err != nil || got != s {
				t.Errorf("after %s the container sees %q, %v: want %s", destroy, got, err, s)
			}
		}
	}
}

// TestOthers: transparent sockets that are not ours are none of our business.
func TestOthers(t *testing.T) {
	w := newWorld(t)
	w.open(slog.New(slog.DiscardHandler))
	c, err := w.dial(netip.MustParseAddr(clients[0]), func(d *net.Dialer) {
		prepared := d.Control
		d.Timeout = time.Second
		d.Control = func(n, a string, rc syscall.RawConn) error {
			var err error
			return errors.Join(prepared(n, a, rc), rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0) }), err)
		}
	})
	if err == nil {
		c.Close()
		t.Error("the answers to a stranger's socket are brought here")
	}
}

// TestNoRights: without CAP_NET_ADMIN the error says what to do, and nothing is left.
func TestNoRights(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	w.in(w.host, func() {
		var caps [2]unix.CapUserData // none, for this thread
		must(t, unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]))
		path, err := Open(slog.New(slog.DiscardHandler))
		if err == nil {
			path.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%v: want what is missing", err)
		}
	})
	if got := w.state(); got != before {
		t.Errorf("left is %s", got)
	}
}

// TestProbe: what the other tests use is there.
func TestProbe(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	w.in(w.host, func() { must(t, Probe()) })
	if got := w.state(); got != before {
		t.Errorf("the machine has changed: %s", got)
	}
}
