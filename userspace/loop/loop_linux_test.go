package loop_test

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// reactor has two loops until the end of the test.
func reactor(t *testing.T) *loop.Reactor {
	t.Helper()
	r, err := loop.New(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// TestClose: a reactor that is closed leaves no goroutine and no descriptor, and what is asked of its sockets
// fails.
func TestClose(t *testing.T) {
	goroutines, fd := runtime.NumGoroutine(), nextFD(t)
	r, err := loop.New(2)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := r.Loop().NewSocket(fds[0])
	called := make(chan bool, 2)
	if err := s.AwaitBytes(loop.Wait{Timeout: time.Hour, Ready: func(timedOut bool) { called <- timedOut }}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := s.AwaitConnect(time.Hour, func(bool) { t.Error("a loop that has ended calls") }); err == nil {
		t.Error("a socket waits on a loop that has ended")
	}
	s.Close()
	unix.Close(fds[1])
	if now := nextFD(t); now != fd {
		t.Errorf("the next descriptor is %d, before it was %d", now, fd)
	}
	for end := time.Now().Add(time.Minute); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, before %d", runtime.NumGoroutine(), goroutines)
		}
	}
	select {
	case timedOut := <-called:
		t.Errorf("nothing has come, and the wait ends: timed out %v", timedOut)
	default:
	}
}

// TestAwaitAfterMissed: bytes that come when nobody waits, and of which the loop was told, end the next wait.
func TestAwaitAfterMissed(t *testing.T) {
	r := reactor(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	s := r.Loop().NewSocket(fds[0])
	defer s.Close()
	called := make(chan bool, 1)
	for _, isMissed := range []bool{false, true} {
		send := func() {
			if _, err := unix.Write(fds[1], []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if isMissed {
			send()
			if err := r.Alive(t.Context()); err != nil { // the loop has taken that event
				t.Fatal(err)
			}
		}
		if err := s.AwaitBytes(loop.Wait{Timeout: time.Hour, Ready: func(timedOut bool) { called <- timedOut }}); err != nil {
			t.Fatal(err)
		}
		if !isMissed {
			send()
		}
		select {
		case timedOut := <-called:
			if n, err := unix.Read(fds[0], make([]byte, 2)); n != 1 || timedOut {
				t.Errorf("%d bytes, %v, timed out %v", n, err, timedOut)
			}
		case <-time.After(time.Minute):
			t.Fatalf("the wait does not end for bytes that came before it: %v", isMissed)
		}
	}
}

// TestLateTimer: a timer that fires as the event comes that it was to wait for does not end the next wait.
func TestLateTimer(t *testing.T) {
	r := reactor(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	s := r.Loop().NewSocket(fds[0])
	defer s.Close()
	called := make(chan bool, 2)
	wait := func(timeout time.Duration) {
		t.Helper()
		if err := s.AwaitBytes(loop.Wait{Timeout: timeout, Ready: func(timedOut bool) { called <- timedOut }}); err != nil {
			t.Fatal(err)
		}
	}
	wait(time.Hour)
	fire := s.Fire()
	s.Cancel()
	wait(time.Hour)
	fire()
	if !s.Cancel() {
		t.Error("a timer that had fired before has ended the wait")
	}
	wait(time.Nanosecond)
	select {
	case timedOut := <-called:
		if !timedOut {
			t.Error("nothing has come, and the wait has not timed out")
		}
	case <-time.After(time.Minute):
		t.Error("the wait does not time out")
	}
}

func nextFD(t *testing.T) int {
	t.Helper()
	fd, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return fd
}
