package memory

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

// TestEndsBothSides: what is held at the other side of a flow that is ended is given back at once as well, and
// counts, so that no more flows are ended than have to be.
func TestEndsBothSides(t *testing.T) {
	const flows = 8
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	w, now := carry(t, up, at), time.Now()
	for range flows {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	var all tcpsock.Sockets
	eventually(t, "all readers have stopped", func() bool {
		w.opts.Relay.MeasureHeld(now)
		_, _, all = w.socketMemory()
		return len(all) == flows && len(w.stalled(now, all)) == flows
	})
	accepted := all.Held()
	use := func(dialled int64) Use { // so much that nine tenths of what accepted sockets hold have to go
		return Use{Used: accepted / 10 * 21, Total: accepted / 10 * 24, What: OfTCP, sockets: all, dialled: dialled}
	}
	now = now.Add(stoppedForShort + time.Minute)
	w.Look(now, use(8*accepted))
	cut := func() int64 { return w.ended[OfTCP] }
	if n := cut(); n < 1 || n > 2 {
		t.Errorf("%d flows are ended, though one holds enough", n)
	}
	eventually(t, "what was ended is gone", func() bool { return int64(w.opts.Flows.Len()) == flows-cut() })
	w.Look(now, use(0))
	if n := cut(); n < 4 {
		t.Errorf("%d flows are ended, which hold too little", n)
	}
	eventually(t, "they are reset by the daemon", func() bool {
		return w.killed.Load() == cut()
	})
}

// TestEndsWithoutRights: without CAP_NET_ADMIN, as in our own image, flows are ended as far as is called for, and
// counted. What flows that have ended left to the kernel stays, and what is missing is said once.
func TestEndsWithoutRights(t *testing.T) {
	const flows = 8
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		if n, _ := c.Read(make([]byte, 1)); n == 1 {
			c.Write(make([]byte, 256<<10)) // and ends: the kernel keeps it for the client
			return
		}
		io.Copy(c, forever{})
	})
	at := freeAddr(t)
	w, now := carry(t, up, at), time.Now()
	connect := func(first string) {
		t.Helper()
		c := dialTCP(t, at)
		c.SetReadBuffer(4 << 10)
		io.WriteString(c, first)
		c.CloseWrite()
	}
	connect("x")
	var all tcpsock.Sockets
	orphans := func() (n int) {
		t.Helper()
		_, _, all = w.socketMemory()
		for _, s := range all {
			if s.IsOrphan && s.Held > stoppedMin {
				n++
			}
		}
		return n
	}
	eventually(t, "a flow has ended that leaves bytes to the kernel", func() bool { return w.opts.Flows.Len() == 0 && orphans() == 1 })
	for range flows {
		connect("")
	}
	eventually(t, "all readers have stopped", func() bool {
		w.opts.Relay.MeasureHeld(now)
		orphans()
		return len(all) == flows+1 && len(w.stalled(now, all)) == flows+1
	})
	now = now.Add(stoppedForShort + time.Minute)
	look := func(u Use) {
		t.Helper()
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and ends with the thread
			var caps [2]unix.CapUserData
			err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0])
			w.Look(now, u)
			done <- err
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	held := all.Held()
	cut := func() int64 { return w.ended[OfTCP] }
	look(Use{Used: held / 10 * 21, Total: held / 10 * 24, What: OfTCP, sockets: all})
	n := cut()
	if n < 2 || n > flows {
		t.Errorf("%d are ended, want all that is called for", n)
	}
	eventually(t, "what is counted has ended", func() bool { return int64(w.opts.Flows.Len()) == flows-n })
	look(Use{Used: 7 << 30, Total: 8 << 30, What: OfTCP, sockets: all})
	eventually(t, "all have ended", func() bool { return w.opts.Flows.Len() == 0 && cut() == flows })
	if n := orphans(); n != 1 {
		t.Errorf("%d are left of what flows left to the kernel, want 1", n)
	}
	if n := w.messages.Count("CAP_NET_ADMIN"); n != 1 {
		t.Errorf("what is missing is said %d times, want 1", n)
	}
	if n := w.messages.Count("can't be ended"); n != 0 {
		t.Errorf("the log says %d times that flows can't be ended", n)
	}
}

// TestEndsWhileShort: once the kernel is short of memory for TCP it is so until less than 3/4 are taken, and
// until then readers who have stopped for a second are ended.
func TestEndsWhileShort(t *testing.T) {
	const flows = 4
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	w, now := carry(t, up, at), time.Now()
	for range flows {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	eventually(t, "all readers have stopped", func() bool {
		w.opts.Relay.MeasureHeld(now)
		_, _, all := w.socketMemory()
		return len(all) == flows && len(w.stalled(now, all)) == flows
	})
	now = now.Add(stoppedForShort + time.Second)
	for _, v := range []struct {
		what    string
		isShort bool
		ended   int64
	}{{OfTCP, false, 0}, {OfBudget, true, 0}, {OfTCP, true, flows}} {
		eventually(t, fmt.Sprintf("%+v", v), func() bool { // one may have had room yet, and stand still later
			w.Look(now, Use{Used: 6 << 30, Total: 8 << 30, What: v.what, isTCPShort: v.isShort})
			now = now.Add(stoppedForShort + time.Second)
			n := w.ended[v.what]
			if n > v.ended {
				t.Fatalf("%+v: %d are ended", v, n)
			}
			return n == v.ended
		})
	}
}

// TestSamePeer: a flow is ended though its client has another one from the same address and port, to another port.
func TestSamePeer(t *testing.T) {
	up := backend(t, func(c net.Conn) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			io.Copy(c, forever{})
		}
	})
	var ports []string
	for range 8 {
		ports = append(ports, freeAddr(t))
	}
	w, now := carry(t, up, ports...), time.Now()
	from := netip.MustParseAddrPort(freeAddr(t))
	for i, at := range ports {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
		if err := unix.Bind(fd, tcpsock.Sockaddr(from)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, tcpsock.Sockaddr(netip.MustParseAddrPort(at))); err != nil {
			t.Fatal(err)
		}
		if i == len(ports)/2 {
			unix.Write(fd, []byte{1})
		}
	}
	moved := func() (n int64) {
		for _, f := range w.opts.Flows.Snapshot(flow.Query{}) {
			n += f.BytesDown
		}
		return n
	}
	last := int64(0)
	eventually(t, "the reader has stopped", func() bool {
		time.Sleep(300 * time.Millisecond)
		n := moved()
		isSame := n > 0 && n == last
		last = n
		return isSame && w.opts.Flows.Len() == len(ports)
	})
	for range 2 {
		w.Look(now, Use{Used: 7 << 30, Total: 8 << 30, What: OfTCP})
		now = now.Add(stoppedForShort)
	}
	eventually(t, "the flow that holds much has ended", func() bool { return moved() == 0 })
}

// TestSmallHolders: where TCP's memory is short those that hold little are ended as well; for the budget they aren't.
func TestSmallHolders(t *testing.T) {
	const flows, each = 20, 3 << 10
	up := backend(t, func(c net.Conn) {
		c.Write(make([]byte, each))
		c.Read(make([]byte, 1))
	})
	addr := freeAddr(t)
	w, now := carry(t, up, addr), time.Now()
	for range flows {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // which is the least, and no room for so much
		if err := unix.Connect(fd, tcpsock.Sockaddr(netip.MustParseAddrPort(addr))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all answers have come", func() bool {
		sum := int64(0)
		for _, f := range w.opts.Flows.Snapshot(flow.Query{}) {
			sum += f.BytesDown
		}
		return sum == flows*each
	})
	for _, what := range []string{OfBudget, OfTCP} {
		for range 2 {
			now = now.Add(stoppedForShort)
			w.Look(now, Use{Used: 7 << 30, Total: 8 << 30, What: what})
		}
		if n, want := w.ended[what], map[string]int64{OfTCP: flows}[what]; n != want {
			t.Errorf("for want of %s %d are ended, want %d", what, n, want)
		}
	}
}
