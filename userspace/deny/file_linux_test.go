package deny

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/logs"
)

// TestReadsWithinASecond: 200,000 prefixes take less than a second of a CPU, however long a busy machine takes.
func TestReadsWithinASecond(t *testing.T) {
	text, most := lines(200_000), time.Second
	if raceEnabled {
		most *= 10
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cpu := func() time.Duration {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now); err != nil {
			t.Fatal(err)
		}
		return time.Duration(now.Nano())
	}
	began := cpu()
	if _, err := read("deny.txt", strings.NewReader(text), parse); err != nil {
		t.Fatal(err)
	}
	took := cpu() - began
	if t.Logf("%v of CPU", took); took > most {
		t.Errorf("reading them takes %v of CPU, want %v at most", took, most)
	}
}

// TestNoDescriptors: a change that comes while strangers use all descriptors up is read when they have gone.
func TestNoDescriptors(t *testing.T) {
	name := filepath.Join(t.TempDir(), "deny.txt")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("192.0.2.1\n")
	var log logs.Log
	f, err := Open(name, parse, log.Logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // we look ourselves
	write("192.0.2.1\n192.0.2.2\n")
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: had.Max}); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		f.look()
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	if f.Problem() == nil || f.Contains(addr("192.0.2.2")) || strings.Count(log.String(), "can't be used") != 1 {
		t.Errorf("without a descriptor: %v\n%s", f.Problem(), &log)
	}
	f.look()
	if !f.Contains(addr("192.0.2.2")) || f.Problem() != nil {
		t.Errorf("afterwards it is not read: %v", f.Problem())
	}
}
