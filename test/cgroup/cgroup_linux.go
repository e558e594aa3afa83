package cgroup

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Listen listens on loopback, in a new cgroup that goes with the test, while the process stays where it is:
// the sockets that a listener accepts are in the cgroup that made it. network is tcp4 or tcp6. Root only.
func Listen(t testing.TB, network string) (l net.Listener, dir string) {
	t.Helper()
	at := "127.0.0.1:0"
	if network == "tcp6" {
		at = "[::1]:0"
	}
	return ListenAt(t, network, at)
}

// ListenAt is Listen at another address.
func ListenAt(t testing.TB, network, at string) (l net.Listener, dir string) {
	t.Helper()
	mount, own := find(t)
	dir = filepath.Join(mount, fmt.Sprintf("tailsplice-test-%d-%d", os.Getpid(), time.Now().UnixNano()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	back := filepath.Join(mount, own)
	t.Cleanup(func() {
		move(t, back)
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	move(t, dir)
	defer move(t, back)
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // kernel datapaths can't take MPTCP
	l, err := lc.Listen(context.Background(), network, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, dir
}

func move(t testing.TB, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		t.Fatal(err)
	}
}

// find says where the second hierarchy is mounted, and where in it this process is.
func find(t testing.TB) (mount, own string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if before, _, ok := strings.Cut(line, " - cgroup2 "); ok {
			mount = strings.Fields(before)[4]
		}
	}
	if mount == "" {
		t.Fatal("no cgroup2 is mounted")
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(groups)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			own = strings.TrimSpace(path)
		}
	}
	return mount, own
}
