package relay

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// asking holds a token while loops are asked: one that never answers must not cost a goroutine for each who
// asks.
var asking = make(chan struct{}, 1)

var errSilent = errors.New("a loop that moves connections does not answer")

// Alive waits until each loop has taken an event. It fails when ctx ends before, or where it can't be tried.
func Alive(ctx context.Context) error {
	select {
	case asking <- struct{}{}:
	case <-ctx.Done():
		return errSilent
	}
	done := make(chan error, 1)
	go func() {
		var err error
		for _, l := range loops.all {
			if err = l.answer(ctx); err != nil {
				break
			}
		}
		<-asking
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return errSilent
	}
}

// answer waits until l has taken an event.
func (l *loop) answer(ctx context.Context) error {
	fd, err := unix.Eventfd(1, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	s, taken := &Socket{fd: fd, loop: l}, make(chan struct{})
	defer s.Close()
	if err := s.AwaitBytes(time.Hour, func(bool) { close(taken) }); err != nil {
		return err
	}
	select {
	case <-taken:
		return nil
	case <-ctx.Done():
		s.Cancel()
		return errSilent
	}
}
