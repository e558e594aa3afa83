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
		if err != nil {
			t.Error(err)
		}
		return 20 - n // the system call gives 20 less nice
	}
	usual := nice()
	want := min(usual+backgroundNice, 19)
	if want == usual {
		t.Skipf("the test has nice %d itself", usual)
	}
	for range 100 {
		var started sync.WaitGroup
		inBackground(func() {
			if n := nice(); n != want {
				t.Errorf("nice is %d in the background, want %d", n, want)
			}
			if unix.Gettid() == os.Getpid() {
				t.Error("it is on the first thread, which stays")
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
