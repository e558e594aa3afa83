package main

import (
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInBackground: what runs in the background gives way to others, and nothing that comes after it does.
func TestInBackground(t *testing.T) {
	nice := func() int {
		n, err := unix.Getpriority(unix.PRIO_PROCESS, unix.Gettid())
		check(t, err)
		return 20 - n // as the kernel has it
	}
	usual := nice()
	if usual >= backgroundNice {
		t.Skipf("the test has nice %d itself", usual)
	}
	for range 100 {
		var started sync.WaitGroup
		inBackground(func() {
			if n := nice(); n != backgroundNice || unix.Gettid() == os.Getpid() {
				t.Errorf("nice is %d on thread %d, want %d on none but the first", n, unix.Gettid(), backgroundNice)
			}
			started.Go(func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				if n := nice(); n != usual {
					t.Errorf("nice of a goroutine that was started there is %d, want %d", n, usual)
				}
			})
		})
		started.Wait()
		if n := nice(); n != usual {
			t.Errorf("nice is %d afterwards, want %d", n, usual)
		}
	}
}
