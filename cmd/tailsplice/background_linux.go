package main

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// backgroundNice is for what can wait while others are served. A thread gets about a tenth of a processor then for
// which another one competes, so it is not late for long, and whoever wakes up goes first.
const backgroundNice = 10

// inBackground is do on a thread of its own that gives way to others, which ends with it: to take the nice value
// back needs a privilege. Goroutines that do starts are on other threads.
func inBackground(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked, but on the first thread, which lives as long as the process
		if unix.Gettid() == os.Getpid() {
			inBackground(do)
			runtime.UnlockOSThread()
			return
		}
		unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), backgroundNice) // else it is as any other
		do()
	}()
	<-done
}
