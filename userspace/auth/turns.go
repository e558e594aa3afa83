package auth

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	sourceAttempts = 4  // bounds the different passwords of one source that are being checked or wait
	sharedAttempts = 32 // bounds those of all unknown sources together
	// waitingSources bounds the sources that wait, of those that have failed lately
	// and of those that have not.
	waitingSources = 64
	// freeFailures is how many wrong passwords of a source cost it nothing; then it has one attempt in
	// failureTime, and each of those times makes good for one failure.
	freeFailures = 20
	failureTime  = time.Second

	busyFor    = 2 * time.Second // what those who are told to come again should wait at least
	sweepEvery = time.Minute
)

// BusyError says that a password was not checked, because there are too many to check.
type BusyError struct {
	Source     bool          // too many of the same source
	RetryAfter time.Duration // when it may be tried again
	why        string
}

func (e *BusyError) Error() string { return "the password was not checked: " + e.why }

// turns shares out the CPUs that check passwords. Sources have their turns one after the other, however many
// attempts each has. Sources that have failed lately come behind all others, and one that fails often waits
// before each further attempt.
type turns struct {
	mu      sync.Mutex
	sources map[netip.Prefix]*source // +checklocks:mu
	swept   time.Time                // +checklocks:mu
	// +checklocks:mu
	free int // checks that may run beside those that do
	// +checklocks:mu
	next [2][]*source // those with attempts that wait, in their order: have not failed, have failed
}

// source is where attempts come from. The zero Prefix stands for all that are not known.
type source struct {
	known    bool
	attempts []*attempt // that run or wait
	waiting  []*attempt
	charged  time.Time // when the failures so far no longer count
	wrong    *passwordKey
}

// passwordKey stands for a user and a password.
type passwordKey = [sha256.Size]byte

// attempt is one password that is to be checked.
type attempt struct {
	key            passwordKey
	turn           chan struct{} // closed when it may run
	done           chan struct{} // closed when it has, or was given up
	checked, right bool
}

func newTurns(n int) *turns { return &turns{free: n, sources: map[netip.Prefix]*source{}} }

// try runs check when it is from's turn. The same password of the same source is checked once for all who ask
// meanwhile, and once more only after another one if it was wrong. The error is ctx's or a *BusyError.
func (t *turns) try(ctx context.Context, from netip.Prefix, key passwordKey, check func() bool) (bool, error) {
	for {
		a, mine, delay, err := t.enter(from, key)
		switch {
		case err != nil:
			return false, err
		case !mine:
			select {
			case <-a.done:
			case <-ctx.Done():
				return false, ctx.Err()
			}
			if a.checked {
				return a.right, nil
			}
			continue
		}
		if delay > 0 {
			timer := time.NewTimer(delay)
			select {
			case <-timer.C:
				t.queue(from, a)
			case <-ctx.Done():
				timer.Stop()
			}
		}
		select {
		case <-a.turn:
			right := check()
			t.leave(from, a, true, right)
			return right, nil
		case <-ctx.Done():
			t.leave(from, a, false, false)
			return false, ctx.Err()
		}
	}
}

// enter makes an attempt of from's, or finds the one that there is already. After
// a delay it is to be queued; without one it is.
func (t *turns) enter(from netip.Prefix, key passwordKey) (a *attempt, mine bool, delay time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.sweep(now)
	s := t.sources[from]
	if s == nil {
		s = &source{known: from.IsValid()}
	}
	if s.wrong != nil && *s.wrong == key {
		a := &attempt{done: make(chan struct{}), checked: true}
		close(a.done)
		return a, false, 0, nil
	}
	if i := slices.IndexFunc(s.attempts, func(a *attempt) bool { return a.key == key }); i >= 0 {
		return s.attempts[i], false, 0, nil
	}
	most := sourceAttempts
	if !s.known {
		most = sharedAttempts
	}
	delay = max(0, s.charged.Add(-freeFailures*failureTime).Sub(now)) // the zero time is long ago
	switch {
	case len(s.attempts) >= most:
		return nil, false, 0, &BusyError{true, busyFor + delay, fmt.Sprintf("%d of its source wait already", most)}
	case len(s.waiting) == 0 && len(t.next[s.class(now)]) >= waitingSources:
		return nil, false, 0, &BusyError{false, busyFor, fmt.Sprintf("%d sources wait already", waitingSources)}
	}
	a = &attempt{key: key, turn: make(chan struct{}), done: make(chan struct{})}
	s.attempts = append(s.attempts, a)
	t.sources[from] = s
	if delay == 0 {
		t.enqueue(s, a, now)
	}
	return a, true, delay, nil
}

// queue lets an attempt wait for its turn.
func (t *turns) queue(from netip.Prefix, a *attempt) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.enqueue(t.sources[from], a, time.Now())
}

// +checklocks:t.mu
func (t *turns) enqueue(s *source, a *attempt, now time.Time) {
	s.waiting = append(s.waiting, a)
	if len(s.waiting) == 1 {
		class := s.class(now)
		t.next[class] = append(t.next[class], s)
	}
	t.grant(now)
}

// leave ends an attempt, which had its turn or was given up.
func (t *turns) leave(from netip.Prefix, a *attempt, checked, right bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	s := t.sources[from]
	s.attempts = slices.DeleteFunc(s.attempts, func(b *attempt) bool { return a == b })
	a.checked, a.right = checked, right
	close(a.done)
	if checked && !right && s.known {
		s.wrong = &a.key
		if s.charged.Before(now) {
			s.charged = now
		}
		s.charged = s.charged.Add(failureTime)
	}
	select {
	case <-a.turn:
		t.free++
		t.grant(now)
		return
	default:
	}
	if i := slices.Index(s.waiting, a); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
		if len(s.waiting) == 0 {
			for class := range t.next {
				t.next[class] = slices.DeleteFunc(t.next[class], func(o *source) bool { return o == s })
			}
		}
	}
}

// grant gives turns to those that wait.
//
// +checklocks:t.mu
func (t *turns) grant(now time.Time) {
	for class := range t.next {
		for t.free > 0 && len(t.next[class]) > 0 {
			s := t.next[class][0]
			t.next[class] = t.next[class][1:]
			a := s.waiting[0]
			if s.waiting = s.waiting[1:]; len(s.waiting) > 0 {
				behind := s.class(now)
				t.next[behind] = append(t.next[behind], s)
			}
			t.free--
			close(a.turn)
		}
	}
}

// class is the index in next of those that are like s.
func (s *source) class(now time.Time) int {
	if s.charged.After(now) {
		return 1
	}
	return 0
}

// sweep forgets sources with nothing to remember.
//
// +checklocks:t.mu
func (t *turns) sweep(now time.Time) {
	if now.Sub(t.swept) < sweepEvery {
		return
	}
	t.swept = now
	for from, s := range t.sources {
		if len(s.attempts) == 0 && !s.charged.After(now) {
			delete(t.sources, from)
		}
	}
}
