package balance

import (
	"context"
	"errors"
	"slices"
	"time"
)

// MaxBeside is how many attempts of a race are waited for at a time: each takes a file descriptor. For one
// more the oldest is given up.
const MaxBeside = 4

// ErrSlow is why an attempt has failed that was given up: others were tried, or one of them has succeeded.
// It is a [context.DeadlineExceeded].
var ErrSlow error = slowError{}

type slowError struct{}

func (slowError) Error() string        { return "no answer before others were tried" }
func (slowError) Is(target error) bool { return target == context.DeadlineExceeded }

// Race tries one candidate after the other for the same thing, until one succeeds: the next as soon as one
// fails, or beside those that are slow (RFC 8305 section 5). T is a candidate, and C what it gives.
type Race[T, C any] struct {
	Next  func() (candidate T, ok bool) // the one to try next, if there is another
	Delay func(T) time.Duration         // its time before the next one is tried beside it
	// it takes no longer than ctx; after Run it may still fail
	Try   func(ctx context.Context, candidate T) (C, error)
	Close func(C) // ends what a slower one gives after all

	// Lost hears of each that has failed, and of those that had begun before the one that succeeded
	// ([ErrSlow]).
	Lost func(candidate T, err error)
}

// runner is a candidate that is being tried.
type runner[T any] struct {
	candidate T
	giveUp    context.CancelCauseFunc
}

type outcome[T, C any] struct {
	of  *runner[T]
	got C
	err error
}

// Run returns the first candidate that succeeded, and what it gives, which the caller then owns. ok is false
// where all have failed, or ctx has ended.
func (r *Race[T, C]) Run(ctx context.Context) (candidate T, got C, ok bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(ErrSlow)
	beside := time.NewTimer(0)
	defer beside.Stop()
	results := make(chan outcome[T, C])
	var waiting []*runner[T] // the oldest first
	defer func() { go r.closeLate(results, len(waiting)) }()
	begin := func() {
		next, more := r.Next()
		if !more {
			return
		}
		if n := len(waiting); n >= MaxBeside {
			waiting[n-MaxBeside].giveUp(ErrSlow)
		}
		own, giveUp := context.WithCancelCause(ctx)
		one := &runner[T]{next, giveUp}
		waiting = append(waiting, one)
		go func() {
			got, err := r.Try(own, next)
			if err != nil && context.Cause(own) == ErrSlow && (errors.Is(err, context.Canceled) || errors.Is(err, ErrSlow)) {
				err = ErrSlow
			}
			results <- outcome[T, C]{one, got, err}
		}()
		beside.Reset(r.Delay(next))
	}
	for begin(); len(waiting) > 0; {
		select {
		case <-beside.C:
			if ctx.Err() == nil {
				begin()
			}
		case o := <-results:
			i := slices.Index(waiting, o.of)
			waiting = slices.Delete(waiting, i, i+1)
			o.of.giveUp(nil)
			if o.err == nil {
				for _, slower := range waiting[:i] {
					r.Lost(slower.candidate, ErrSlow)
				}
				return o.of.candidate, o.got, true
			}
			r.Lost(o.of.candidate, o.err)
			// Another one is under way already in place of one that was given up.
			if ctx.Err() == nil && (o.err != ErrSlow || len(waiting) == 0) {
				begin()
			}
		}
	}
	return candidate, got, false
}

// closeLate closes what the n slower candidates still give.
func (r *Race[T, C]) closeLate(results <-chan outcome[T, C], n int) {
	for range n {
		if o := <-results; o.err == nil {
			r.Close(o.got)
		}
	}
}
