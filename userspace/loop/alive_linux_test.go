package loop

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAlive: a loop that does not go on is found, and one that does again is.
//
// +checklocksignore: the analyzer does not follow a lock in a slice
func TestAlive(t *testing.T) {
	r, err := New(2)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	try := func(wait time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		return r.Alive(ctx)
	}
	if err := try(time.Minute); err != nil {
		t.Fatal(err)
	}
	l := r.loops[len(r.loops)-1]
	l.mu.Lock() // as who is in the middle of an event
	for range 3 {
		if err := try(20 * time.Millisecond); err == nil {
			t.Error("a loop that is stuck is called alive")
		}
	}
	l.mu.Unlock()
	for end := time.Now().Add(time.Minute); ; {
		err := try(time.Minute)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after it went on: %v", err)
		}
	}
}

// TestAliveWithoutDescriptors: who has none left, and serves, is alive. To start it again would only help
// those who use them up.
func TestAliveWithoutDescriptors(t *testing.T) {
	r, err := New(2)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	none := unix.Rlimit{Cur: 0, Max: had.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &had)
	if fd, err := unix.Eventfd(0, 0); err == nil {
		unix.Close(fd)
		t.Fatal("there is a descriptor left")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for range 3 {
		if err := r.Alive(ctx); err != nil {
			t.Error(err)
		}
	}
}

// TestAliveAfterClose: a reactor that is closed is not alive, and writes to no descriptor that was its own.
func TestAliveAfterClose(t *testing.T) {
	r, err := New(1)
	if err != nil {
		t.Fatal(err)
	}
	was := r.loops[0].ask.FD()
	other, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	r.Close()
	if err := unix.Dup3(other, was, unix.O_CLOEXEC); err != nil { // as what is opened next may be
		t.Fatal(err)
	}
	defer unix.Close(was)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if r.Alive(ctx) == nil {
		t.Error("it is alive")
	}
	if n, err := unix.Read(other, make([]byte, 8)); err != unix.EAGAIN {
		t.Errorf("%d bytes were written to somebody else's descriptor, %v", n, err)
	}
}
