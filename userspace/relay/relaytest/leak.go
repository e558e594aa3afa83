package relaytest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// left counts what a flow could leave behind.
type left struct {
	goroutines int
	sockets    map[int]int
}

func take(p Path) left {
	l := left{goroutines: runtime.NumGoroutine(), sockets: make(map[int]int)}
	for _, pid := range p.PIDs {
		l.sockets[pid] = sockets(pid)
	}
	return l
}

// check waits until there is no more than before. A few goroutines may be new: those that a process has one
// of.
func (l left) check(t testing.TB, p Path) {
	t.Helper()
	few := 2 + runtime.GOMAXPROCS(0)
	what := ""
	end := time.Now().Add(p.resetIn(patience))
	for wait := time.Millisecond; time.Now().Before(end); wait = min(2*wait, time.Second) {
		what = ""
		now := take(p)
		if p.Connect != nil && now.goroutines > l.goroutines+few {
			what = fmt.Sprintf("goroutines: %d, before %d", now.goroutines, l.goroutines)
		}
		for pid, n := range now.sockets {
			if n > l.sockets[pid] {
				what += fmt.Sprintf(" sockets of process %d: %d, before %d", pid, n, l.sockets[pid])
			}
		}
		if what == "" {
			return
		}
		time.Sleep(wait)
	}
	t.Errorf("left behind: %s", what)
	if p.Connect != nil {
		b := make([]byte, 64<<10)
		t.Logf("%s", b[:runtime.Stack(b, true)])
	}
}

// sockets counts the sockets of a process; 0 where /proc does not tell. Unix sockets of another process are
// left out: those of a daemon go to tailscaled and Docker, and come when it asks them something.
func sockets(pid int) int {
	dir, others := "/proc/self/fd", map[string]bool{}
	if pid != 0 {
		dir = fmt.Sprintf("/proc/%d/fd", pid)
		unix, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
		for line := range strings.Lines(string(unix)) {
			if col := strings.Fields(line); len(col) > 6 { // Num RefCount Protocol Flags Type St Inode Path
				others["socket:["+col[6]+"]"] = true
			}
		}
	}
	fds, _ := os.ReadDir(dir)
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil &&
			strings.HasPrefix(to, "socket:") && !others[to] {
			n++
		}
	}
	return n
}
