package auth

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

func sourceN(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), 32)
}

func key(n int) passwordKey { return passwordKey{byte(n), byte(n >> 8), 1} }

// trial runs checks that take until they are told to go on.
type trial struct {
	*turns
	t    *testing.T
	goOn chan struct{}
	wg   sync.WaitGroup

	mu  sync.Mutex
	ran []netip.Prefix // whose checks ran, in their order
}

func newTrial(t *testing.T, slots int) *trial {
	tr := &trial{turns: newTurns(slots), t: t, goOn: make(chan struct{})}
	t.Cleanup(tr.wg.Wait)
	return tr
}

// start begins an attempt, and returns when it waits, or when it was refused.
func (tr *trial) start(from netip.Prefix, k int) error {
	tr.t.Helper()
	tr.turns.mu.Lock()
	before := 0
	if s := tr.sources[from]; s != nil {
		before = len(s.attempts)
	}
	tr.turns.mu.Unlock()
	refused := make(chan error, 1)
	tr.wg.Go(func() {
		_, err := tr.try(tr.t.Context(), from, key(k), func() bool {
			tr.mu.Lock()
			tr.ran = append(tr.ran, from)
			tr.mu.Unlock()
			select {
			case <-tr.goOn:
			case <-tr.t.Context().Done():
			}
			return false
		})
		refused <- err
	})
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		select {
		case err := <-refused:
			return err
		case <-time.After(time.Millisecond):
		}
		tr.turns.mu.Lock()
		s := tr.sources[from]
		there := s != nil && len(s.attempts) > before
		tr.turns.mu.Unlock()
		if there {
			return nil
		}
	}
	tr.t.Fatal("an attempt neither waits nor is refused")
	return nil
}

func (tr *trial) order() []netip.Prefix {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.ran)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// TestOneSourceGuesses has a source guess 245 passwords at once. A few of them
// wait; another source has its turn among the first.
//
// +checklocksignore
func TestOneSourceGuesses(t *testing.T) {
	tr := newTrial(t, 1)
	refused := 0
	for k := range 245 {
		if err := tr.start(sourceN(1), k); err != nil {
			var busy *BusyError
			if !errors.As(err, &busy) || !busy.Source || busy.RetryAfter <= 0 {
				t.Fatalf("%v", err)
			}
			refused++
		}
	}
	if refused != 245-sourceAttempts {
		t.Errorf("%d are refused, want %d", refused, 245-sourceAttempts)
	}
	if err := tr.start(sourceN(2), 1000); err != nil {
		t.Fatal(err)
	}
	close(tr.goOn)
	tr.wg.Wait()
	if i := slices.Index(tr.order(), sourceN(2)); i < 0 || i > 2 {
		t.Errorf("another source's turn is number %d: %v", i+1, tr.order())
	}
	if tr.free != 1 {
		t.Errorf("%d slots are free at the end", tr.free)
	}
}

// TestManySourcesGuess has more sources fail, and try again, than may wait. One
// that has not failed comes before all of them.
//
// +checklocksignore
func TestManySourcesGuess(t *testing.T) {
	tr := newTrial(t, 1)
	for n := range waitingSources + 1 { // one of them runs
		if err := tr.start(sourceN(n), n); err != nil {
			t.Fatal(err)
		}
	}
	var busy *BusyError
	if err := tr.start(sourceN(500), 0); !errors.As(err, &busy) || busy.Source || busy.RetryAfter <= 0 {
		t.Errorf("one source too many: %v", err)
	}
	if n := len(tr.sources); n != waitingSources+1 {
		t.Errorf("%d sources are remembered", n)
	}
	for range waitingSources + 1 {
		select {
		case tr.goOn <- struct{}{}:
		case <-time.After(time.Minute):
			t.Fatal("no check runs")
		}
	}
	tr.wg.Wait()
	before := len(tr.order())
	for n := range waitingSources + 1 {
		if err := tr.start(sourceN(n), 1000+n); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.start(sourceN(500), 0); err != nil {
		t.Fatalf("one that has not failed: %v", err)
	}
	close(tr.goOn)
	tr.wg.Wait()
	if i := slices.Index(tr.order(), sourceN(500)) - before; i != 1 {
		t.Errorf("the turn of one that has not failed is number %d of those after the first", i)
	}
}

// TestFailuresSlow: who fails often waits before each attempt, others don't; those
// of sources that are not known are nobody's.
//
// +checklocksignore
func TestFailuresSlow(t *testing.T) {
	tr := newTurns(1)
	fail := func(from netip.Prefix, k int) {
		t.Helper()
		if right, err := tr.try(t.Context(), from, key(k), func() bool { return false }); right || err != nil {
			t.Fatal(right, err)
		}
	}
	// As if it had failed as often as costs nothing.
	tr.sources[sourceN(1)] = &source{known: true, charged: time.Now().Add(freeFailures * failureTime)}
	fail(sourceN(1), 1)
	a, mine, delay, err := tr.enter(sourceN(1), key(2))
	if !mine || err != nil || delay <= 0 || delay > failureTime {
		t.Errorf("after %d failures: %v, %v", freeFailures+1, delay, err)
	}
	tr.leave(sourceN(1), a, false, false)
	for k := range 2 * freeFailures {
		fail(netip.Prefix{}, k)
	}
	for _, from := range []netip.Prefix{sourceN(2), {}} {
		a, mine, delay, err := tr.enter(from, key(1000))
		if !mine || err != nil || delay != 0 {
			t.Errorf("from %v: %v, %v", from, delay, err)
		}
		tr.leave(from, a, false, false)
	}
	if tr.free != 1 {
		t.Errorf("%d slots are free", tr.free)
	}
}

// TestSamePassword: what one source sends many times at once, as a browser does
// for the parts of a page, is checked once.
func TestSamePassword(t *testing.T) {
	u, err := NewUsers(map[string]string{"me": hash(t, "secret")})
	if err != nil {
		t.Fatal(err)
	}
	for password, right := range map[string]bool{"secret": true, "wrong": false} {
		var checks atomic.Int64
		goOn := make(chan struct{})
		u.compare = func(hash, password []byte) error {
			checks.Add(1)
			<-goOn
			return bcrypt.CompareHashAndPassword(hash, password)
		}
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				if got, err := u.Check(t.Context(), sourceN(1), "me", password); got != right || err != nil {
					t.Errorf("%q: %v, %v", password, got, err)
				}
			})
			if i == 40 { // the others come now, or late
				close(goOn)
			}
		}
		wg.Wait()
		if n := checks.Load(); n != 1 {
			t.Errorf("%q was checked %d times", password, n)
		}
	}
}

// TestLeaving has attempts given up: while they wait, and while others wait for
// their result.
//
// +checklocksignore
func TestLeaving(t *testing.T) {
	tr := newTrial(t, 1)
	if err := tr.start(sourceN(1), 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var left sync.WaitGroup
	left.Go(func() {
		if _, err := tr.try(ctx, sourceN(2), key(2), func() bool { t.Error("it runs"); return false }); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	waiting := func(n int) func() bool {
		return func() bool {
			tr.turns.mu.Lock()
			defer tr.turns.mu.Unlock()
			s := tr.sources[sourceN(2)]
			return s != nil && len(s.waiting) == n
		}
	}
	eventually(t, "the second waits", waiting(1))
	result := make(chan error, 1)
	go func() { // who asks for the same
		right, err := tr.try(t.Context(), sourceN(2), key(2), func() bool { return true })
		if !right {
			err = fmt.Errorf("%v, %w", right, err)
		}
		result <- err
	}()
	cancel()
	left.Wait()
	close(tr.goOn)
	if err := <-result; err != nil {
		t.Errorf("who asked for the same as one that left: %v", err)
	}
	tr.wg.Wait()
	if tr.free != 1 || len(tr.next[0])+len(tr.next[1]) != 0 {
		t.Errorf("%d slots are free, %d and %d sources wait", tr.free, len(tr.next[0]), len(tr.next[1]))
	}
}

// +checklocksignore
func TestSweep(t *testing.T) {
	tr := newTurns(1)
	for n := range 100 {
		_, _ = tr.try(t.Context(), sourceN(n), key(n), func() bool { return n%2 == 0 })
	}
	if n := len(tr.sources); n != 100 {
		t.Errorf("%d sources", n)
	}
	tr.sweep(time.Now().Add(sweepEvery))
	if n := len(tr.sources); n != 0 {
		t.Errorf("%d sources are remembered for ever", n)
	}
}
