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
		for _, l := range allLoops() {
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

// openAsk makes what answer asks by.
func (l *loop) openAsk() bool {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return false
	}
	l.ask = &Socket{fd: fd, loop: l}
	if l.watch(l.ask, onFlow) != nil {
		unix.Close(fd)
		return false
	}
	l.count.Add(-1) // it is no work
	return true
}

// answer waits until l has taken an event. Each write to an eventfd is one.
func (l *loop) answer(ctx context.Context) error {
	taken := make(chan struct{})
	if err := l.ask.AwaitBytes(time.Hour, func(bool) { close(taken) }); err != nil {
		return err
	}
	if _, err := unix.Write(l.ask.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		return os.NewSyscallError("write", err) // nobody asks 2^64 times
	}
	select {
	case <-taken:
		return nil
	case <-ctx.Done():
		l.ask.Cancel()
		return errSilent
	}
}
