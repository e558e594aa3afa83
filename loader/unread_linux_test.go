package loader

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

var instances atomic.Int64

// What a process has not read yet outlives the daemon that put it there: one that stops, one that is killed,
// and the next one, with sk_msg or without. When it has been read, nothing of it is left.
func TestLocalUnreadOutlivesTheDaemon(t *testing.T) {
	loadertest.NeedRoot(t)
	if os.Getenv("TS_LDR_UNREAD") != "" {
		daemonOfUnread(t)
		return
	}
	for _, network := range loadertest.Networks() {
		for _, killed := range []bool{false, true} {
			for _, ended := range []bool{false, true} { // the flow, before the daemon is
				t.Run(fmt.Sprintf("%s killed %v, ended %v", network, killed, ended), func(t *testing.T) {
					testUnread(t, network, killed, ended)
				})
			}
		}
	}
}

func testUnread(t *testing.T, network string, killed, ended bool) {
	instance := fmt.Sprintf("ts-ldr-unread-%d-%d", os.Getpid(), instances.Add(1))
	dir := filepath.Join("/sys/fs/bpf", "tailsplice", instance)
	t.Cleanup(func() { os.RemoveAll(dir) })
	target, _ := cgroup.Listen(t, network)
	said, stop, kill := startDaemonOfUnread(t, instance, target.Addr().String(), network)

	client, server := becomeUnread(t, said, target)
	data := prove.Pattern(20_000)
	_, err := client.Write(data)
	loadertest.Must(t, err)
	if ended { // an end is passed on only when the bytes before it are in the process's queue
		loadertest.Must(t, errors.Join(client.CloseWrite(), server.CloseWrite()))
		if line, err := said.ReadString('\n'); line != "ended eof\n" || err != nil {
			t.Fatalf("the daemon said %q, %v", line, err)
		}
	}
	raw, err := server.SyscallConn()
	loadertest.Must(t, err)
	wait := func(events int16) {
		loadertest.Must(t, raw.Control(func(fd uintptr) {
			p := []unix.PollFd{{Fd: int32(fd), Events: events}}
			for end := time.Now().Add(60 * time.Second); p[0].Revents&events == 0; {
				if _, err := unix.Poll(p, 1000); err != nil && err != unix.EINTR || time.Now().After(end) {
					t.Errorf("waited in vain for %x: %v", events, err)
					return
				}
			}
		}))
	}
	for n := 0; n < len(data); { // none is on its way any more
		loadertest.Must(t, raw.Control(func(fd uintptr) {
			n, _, err = unix.Recvfrom(int(fd), make([]byte, len(data)), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		}))
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
	}
	if killed {
		kill()
	} else {
		stop()
	}
	wait(unix.POLLRDHUP) // the daemon's end of the connection is closed

	for _, local := range []bool{true, false} {
		l, err := load(Options{Instance: instance, MaxFlows: 16, Local: local}, nil)
		loadertest.Must(t, err)
		if local {
			loadertest.Must(t, loadertest.ExchangeBytes(loadertest.SplicePath(t, l, loadertest.PathOptions{Network: network}), 1000, 1000))
		}
		loadertest.Must(t, l.Close())
	}
	l, err := load(Options{Instance: instance, MaxFlows: 16}, nil)
	loadertest.Must(t, err)
	defer l.Close()
	loadertest.Must(t, server.SetReadDeadline(time.Now().Add(60*time.Second)))
	got, err := io.ReadAll(server)
	if !bytes.Equal(got, data) || ended && err != nil {
		t.Errorf("the process has read %d of %d bytes, and %v", len(got), len(data), err)
	}
	loadertest.WaitFor(t, func() bool {
		left, err := filepath.Glob(filepath.Join(dir, "*", "locals"))
		return len(left) == 0 && err == nil
	}, "the map that was kept to go")
	loadertest.Must(t, l.Close())
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
}

// becomeUnread makes connections to the daemon until one goes past TCP.
func becomeUnread(t *testing.T, said *bufio.Reader, target net.Listener) (client, server *net.TCPConn) {
	t.Helper()
	line := func() string {
		line, err := said.ReadString('\n')
		loadertest.Must(t, err)
		return line[:len(line)-1]
	}
	address := line()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial(target.Addr().Network(), address)
		loadertest.Must(t, err)
		s, err := target.Accept()
		loadertest.Must(t, err)
		if line() == "spliced" {
			t.Cleanup(func() { c.Close(); s.Close() })
			return c.(*net.TCPConn), s.(*net.TCPConn)
		}
		c.Close()
		s.Close()
		if time.Now().After(end) {
			t.Fatal("no flow goes past TCP")
		}
	}
}

// startDaemonOfUnread starts a process that splices connections with the target.
func startDaemonOfUnread(t *testing.T,
	instance, target, network string) (said *bufio.Reader, stop, kill func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLocalUnreadOutlivesTheDaemon$")
	cmd.Env = append(os.Environ(), "TS_LDR_UNREAD="+instance, "TS_LDR_TARGET="+target,
		"TS_LDR_NETWORK="+network)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	loadertest.Must(t, err)
	out, err := cmd.StdoutPipe()
	loadertest.Must(t, err)
	loadertest.Must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	stop = func() {
		loadertest.Must(t, in.Close())
		loadertest.Must(t, cmd.Wait())
	}
	return bufio.NewReader(out), stop, func() { loadertest.Must(t, cmd.Process.Kill()); cmd.Wait() }
}

// daemonOfUnread says where it listens, of each connection whether it goes past TCP, and how that ends. It
// stops at the end of its input.
func daemonOfUnread(t *testing.T) {
	network := os.Getenv("TS_LDR_NETWORK")
	l, err := load(Options{Instance: os.Getenv("TS_LDR_UNREAD"), MaxFlows: 64, Local: true}, nil)
	loadertest.Must(t, err)
	n, err := l.Local()
	loadertest.Must(t, err)
	at := "127.0.0.1:0"
	if network == "tcp6" {
		at = "[::1]:0"
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), network, at)
	loadertest.Must(t, err)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		ln.Close()
	}()
	fmt.Println(ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		d := net.Dialer{}
		d.SetMultipathTCP(false)
		up, err := d.Dial(network, os.Getenv("TS_LDR_TARGET"))
		loadertest.Must(t, err)
		o := sockmap.Flow{ID: "unread", Buffer: 1 << 20,
			Ended: func(_, _ int64, end string, _ error) { fmt.Println("ended", end) }}
		if _, err = loadertest.Splice(context.Background(), n, c.(*net.TCPConn), up.(*net.TCPConn), o); err != nil {
			c.Close()
			up.Close()
			fmt.Println("refused")
		} else {
			fmt.Println("spliced")
		}
	}
	loadertest.Must(t, l.Close())
}
