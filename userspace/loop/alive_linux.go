package loop

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

var errSilent = errors.New("a loop that moves connections does not answer")

// Alive waits until each loop has taken an event. It fails when ctx ends before, or where it can't be tried.
// A loop that never answers costs one goroutine, however often it is asked.
func (r *Reactor) Alive(ctx context.Context) error {
	select {
	case r.asking <- struct{}{}:
	case <-ctx.Done():
		return errSilent
	}
	done := make(chan error, 1)
	go func() {
		var err error
		for _, l := range r.loops {
			if err = l.answer(ctx); err != nil {
				break
			}
		}
		<-r.asking
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return errSilent
	}
}

// An answerer is sent to when the loop takes an event of its eventfd.
type answerer chan struct{}

func (a answerer) Handle(uint32) (then func()) {
	select {
	case a <- struct{}{}:
	default: // nobody has taken the one before
	}
	return nil
}

// openAsk makes what answer asks by.
func (l *Loop) openAsk() error {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	l.ask, l.answers = l.NewSocket(fd), make(answerer, 1)
	if _, err := l.ask.Attach(l.answers); err != nil {
		unix.Close(fd)
		return err
	}
	return nil
}

// wake makes an event of an eventfd. Each write to it is one.
func (s *Socket) wake() error {
	_, err := unix.Write(s.FD(), []byte{1, 0, 0, 0, 0, 0, 0, 0}) // nobody does so 2^64 times
	return os.NewSyscallError("write", err)
}

// answer waits until l has taken an event.
func (l *Loop) answer(ctx context.Context) error {
	err := errSilent
	l.Do(func() func() {
		select {
		case <-l.answers: // to one who has not waited for it
		default:
		}
		if l.fd >= 0 { // else the eventfd is closed, or about to be
			err = l.ask.wake()
		}
		return nil
	})
	if err != nil {
		return err
	}
	select {
	case <-l.answers:
		return nil
	case <-ctx.Done():
		return errSilent
	}
}
