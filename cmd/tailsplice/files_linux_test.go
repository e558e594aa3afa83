package main

import (
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/freeaddr"
)

// TestFewFiles: 600 descriptors and no right to more. Flows whose readers have stopped, as many as may be,
// leave some for a good client, the control socket and a reload: pipes are not for all of them.
func TestFewFiles(t *testing.T) {
	const files, stopped = 600, 150
	target := listen(t, "127.0.0.1:0")
	var sent atomic.Int64
	go func() { // endless
		piece := make([]byte, 64<<10)
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() {
				defer c.Close()
				c.(*net.TCPConn).SetWriteBuffer(64 << 10)
				for {
					n, err := c.Write(piece)
					if sent.Add(int64(n)); err != nil {
						return
					}
				}
			}()
		}
	}()
	echo := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := echo.Accept(); err == nil; c, err = echo.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	at := [2]string{freeaddr.Get(t), freeaddr.Get(t)}
	d := startStalled(t, fmt.Sprintf(`
listeners:
  - { name: bulk, listen: [%q], mode: tcp, default: { forward: %q, datapath: userspace } }
  - { name: good, listen: [%q], mode: sni, default: { forward: %q } }
limits: { flow_buffer: 64KiB }`, at[0], target.Addr(), at[1], echo.Addr()),
		"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$@"`, files), "sh", "setpriv", "--bounding-set=-sys_resource")
	for range stopped {
		c, err := net.Dial("tcp", at[0])
		check(t, err)
		t.Cleanup(func() { c.Close() })
		check(t, c.(*net.TCPConn).SetReadBuffer(64<<10))
		check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
		_, err = io.CopyN(io.Discard, c, 1<<20) // so that it is bulk
		check(t, err)
	}
	last := int64(-1)
	wait(t, "all have stopped", func() error {
		now := sent.Load()
		defer func() { last = now }()
		time.Sleep(300 * time.Millisecond)
		if now != last {
			return fmt.Errorf("%d bytes, %d before", now, last)
		}
		return nil
	})
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	check(t, err)
	if len(open) < 2*stopped || len(open) > files-50 {
		t.Errorf("%d descriptors are in use for %d flows that have stopped, of %d", len(open), stopped, files)
	}
	var askers []net.Conn
	for range files { // who asks the control socket, and then says nothing, has no share in the descriptors either
		c, err := net.Dial("unix", d.control)
		check(t, err)
		askers = append(askers, c)
	}
	first := hello(t)
	for i := range 20 {
		c, err := net.Dial("tcp", at[1])
		check(t, err)
		_, err = c.Write(first)
		check(t, err)
		check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
		got := make([]byte, len(first))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != string(first) {
			t.Fatalf("good client %d: %v", i+1, err)
		}
		defer c.Close()
	}
	for _, c := range askers {
		c.Close()
	}
	if out, err := d.ask("reload"); err != nil {
		t.Errorf("reload: %v: %s", err, out)
	}
}

// TestGrowFiles: the kernel's table has room for what was asked for, and no descriptor is left.
func TestGrowFiles(t *testing.T) {
	room := func() (n int) {
		t.Helper()
		text, err := os.ReadFile("/proc/self/status")
		check(t, err)
		_, rest, _ := strings.Cut(string(text), "FDSize:")
		_, err = fmt.Sscan(rest, &n)
		check(t, err)
		return n
	}
	var files unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	before := room()
	most := int(min(files.Cur, 1<<20)) - filesBeside
	if before >= most {
		t.Skipf("there is room for %d descriptors, and the limit is %d", before, files.Cur)
	}
	growFiles(0)
	if n := room(); n != before {
		t.Errorf("there is room for %d descriptors, want %d still", n, before)
	}
	want := min(2*before, most)
	growFiles(want)
	if n := room(); n < want {
		t.Errorf("there is room for %d descriptors, want %d", n, want)
	}
	if _, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", want+filesBeside)); err == nil {
		t.Error("a descriptor is left")
	}
	if files.Cur <= 1<<20 { // else it takes much memory
		if growFiles(math.MaxInt); room() < most {
			t.Errorf("there is room for %d descriptors, want as many as may be, %d", room(), files.Cur)
		}
	}
}
