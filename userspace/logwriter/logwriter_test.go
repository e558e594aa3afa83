package logwriter

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// reader is the other end of a log. It takes what it is allowed to.
type reader struct {
	mu     sync.Mutex
	wrote  strings.Builder
	stall  chan struct{} // a write waits until it is closed; nil: none waits
	stuck  chan struct{} // gets a value when a write waits
	fail   error         // of each write, after short bytes
	short  int
	failed int
}

func (r *reader) Write(b []byte) (int, error) {
	r.mu.Lock()
	stall, fail, short := r.stall, r.fail, r.short
	r.mu.Unlock()
	if stall != nil {
		r.stuck <- struct{}{}
		<-stall
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if fail != nil {
		r.failed++
		n := min(short, len(b))
		r.wrote.Write(b[:n])
		return n, fail
	}
	return r.wrote.Write(b)
}

func (r *reader) set(fail error, short int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail, r.short = fail, short
}

func (r *reader) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.wrote.String()
}

func sayLost(out io.Writer, lines int) { fmt.Fprintf(out, "lost %d\n", lines) }

const patience = time.Minute

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// TestStalledReader fills the queue while nobody reads: no write waits, and when
// the reader is back it gets the lines in their order, and in the place of those
// that are missing how many they are.
func TestStalledReader(t *testing.T) {
	r := &reader{stall: make(chan struct{}), stuck: make(chan struct{}, 1)}
	w := New(r, sayLost)
	fmt.Fprintln(w, "first")
	<-r.stuck
	line := strings.Repeat("x", 1023)
	kept := 0
	for w.Lost() == 0 {
		fmt.Fprintf(w, "%s\n", line)
		kept++
	}
	kept--
	for range 99 {
		fmt.Fprintln(w, line)
	}
	if bytes := kept * (len(line) + 1); bytes < queueBytes || bytes > queueBytes+len(line)+1 {
		t.Errorf("%d bytes were queued, want %d", bytes, queueBytes)
	}
	stall := r.stall
	r.mu.Lock()
	r.stall = nil
	r.mu.Unlock()
	close(stall)
	eventually(t, "the reader is told", func() bool { return strings.Contains(r.text(), "lost") })
	fmt.Fprintln(w, "last")
	w.Close(patience)
	if want := "first\n" + strings.Repeat(line+"\n", kept) + "lost 100\nlast\n"; r.text() != want {
		t.Errorf("%d bytes, want %d; the end is %q", len(r.text()), len(want), r.text()[max(0, len(r.text())-40):])
	}
	if w.Lost() != 100 {
		t.Errorf("%d lines are lost, want 100", w.Lost())
	}
}

// TestCloseGivesUp closes a writer whose reader takes nothing.
func TestCloseGivesUp(t *testing.T) {
	r := &reader{stall: make(chan struct{}), stuck: make(chan struct{}, 1)}
	defer close(r.stall)
	w := New(r, sayLost)
	fmt.Fprintln(w, "first")
	<-r.stuck
	w.Close(time.Millisecond)
	select {
	case <-w.done:
		t.Error("what is queued was written, though nobody reads")
	default:
	}
	fmt.Fprintln(w, "too late")
	if w.Lost() != 1 {
		t.Errorf("%d lines are lost, want the one after the end", w.Lost())
	}
}

func TestOrder(t *testing.T) {
	r := &reader{}
	w := New(r, sayLost)
	var want strings.Builder
	for i := range 10_000 {
		fmt.Fprintln(w, i)
		fmt.Fprintln(&want, i)
	}
	w.Close(patience)
	if r.text() != want.String() || w.Lost() != 0 {
		t.Errorf("%d bytes, want %d; %d lost", len(r.text()), want.Len(), w.Lost())
	}
}

// TestReaderGone writes to a pipe whose reader is gone, and to one that has a
// new one.
func TestReaderGone(t *testing.T) {
	r := &reader{fail: syscall.EPIPE, short: 2}
	w := New(r, sayLost)
	fmt.Fprintln(w, "one")
	eventually(t, "the line is lost", func() bool { return w.Lost() > 0 })
	r.set(syscall.EPIPE, 0)
	fmt.Fprintln(w, "three")
	eventually(t, "the next line is lost", func() bool { return w.Lost() > 1 })
	r.set(nil, 0)
	fmt.Fprintln(w, "four")
	w.Close(patience)
	if r.text() != "on\nfour\nlost 2\n" || w.Lost() != 2 {
		t.Errorf("got %q, %d lost", r.text(), w.Lost())
	}
}

// TestWouldBlock writes to a pipe that is full, and that somebody made
// non-blocking.
func TestWouldBlock(t *testing.T) {
	r := &reader{fail: syscall.EAGAIN, short: 1}
	w := New(r, sayLost)
	fmt.Fprintln(w, "hello")
	eventually(t, "a few tries", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.failed > 2 })
	r.set(nil, 0)
	w.Close(patience)
	if r.text() != "hello\n" || w.Lost() != 0 {
		t.Errorf("got %q, %d lost", r.text(), w.Lost())
	}
}
