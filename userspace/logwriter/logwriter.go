// Package logwriter writes the daemon's log without ever waiting for who reads it: a pipe that nobody
// empties, a terminal that was stopped, a journal that hangs.
//
// Lines are queued, within bounds, and one goroutine writes them in their order. A line that finds the queue
// full is lost and counted, and the log says how many are missing in the place where they would stand.
package logwriter

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// queueBytes bounds the lines that wait to be written, about ten thousand.
const queueBytes = 4 << 20

// pause is how long lines may gather once some have been written: where there are thousands a second, waking
// a goroutine and a system call for each cost more than the lines.
const pause = 5 * time.Millisecond

// Writer is an io.Writer of whole lines, made by [New] and ended by Close, for use from any goroutine.
type Writer struct {
	out io.Writer
	gap func(out io.Writer, lines int)

	mu sync.Mutex
	// +checklocks:mu
	queue []byte // whole lines
	// +checklocks:mu
	lines int // in queue
	// +checklocks:mu
	missed int // lines lost behind those in queue
	// +checklocks:mu
	closed bool

	lost atomic.Int64
	wake chan struct{}
	done chan struct{} // closed when run has ended

	// run's own.
	unsaid int  // lines that out does not have, and of which gap was not told
	torn   bool // out ends in the middle of a line
}

// New returns a writer to out. gap gets out, once that takes lines again, and how many are missing there.
func New(out io.Writer, gap func(out io.Writer, lines int)) *Writer {
	w := &Writer{out: out, gap: gap, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w
}

// Write queues a copy of line. It never blocks or fails: with a full queue, or after Close, line is lost.
func (w *Writer) Write(line []byte) (int, error) {
	w.mu.Lock()
	first := len(w.queue) == 0
	fits := !w.closed && len(w.queue) < queueBytes
	if fits {
		w.queue = append(w.queue, line...)
		w.lines++
	} else {
		w.missed++
	}
	w.mu.Unlock()
	if !fits {
		w.lost.Add(1)
	} else if first {
		w.poke()
	}
	return len(line), nil
}

// Lost returns how many lines were not written.
func (w *Writer) Lost() int64 { return w.lost.Load() }

// Close writes what is queued, for as long as wait, and leaves out open. Lines written afterwards are lost.
func (w *Writer) Close(wait time.Duration) {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.poke()
	select {
	case <-w.done:
	case <-time.After(wait):
	}
}

func (w *Writer) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run writes what is queued, until the writer is closed.
func (w *Writer) run() {
	defer close(w.done)
	var spare []byte
	for range w.wake {
		for {
			w.mu.Lock()
			batch, lines, missed, closed := w.queue, w.lines, w.missed, w.closed
			w.queue, w.lines, w.missed = spare[:0], 0, 0
			w.mu.Unlock()
			if len(batch) > 0 {
				w.write(batch, lines)
			}
			if w.unsaid += missed; w.unsaid > 0 && !w.torn {
				w.gap(&gapWriter{w}, w.unsaid)
			}
			if spare = batch; cap(spare) > queueBytes/4 {
				spare = nil // after a burst
			}
			if len(batch) > 0 {
				if !closed {
					time.Sleep(pause)
				}
				continue
			}
			if closed {
				return
			}
			break
		}
	}
}

// write writes whole lines, or loses them.
func (w *Writer) write(batch []byte, lines int) {
	if w.torn {
		if _, err := w.writeAll([]byte("\n")); err != nil {
			w.lose(lines)
			return
		}
		w.torn = false
	}
	n, err := w.writeAll(batch)
	if err == nil {
		return
	}
	w.torn = n > 0 && batch[n-1] != '\n'
	w.lose(lines - bytes.Count(batch[:n], []byte("\n")))
}

func (w *Writer) lose(lines int) {
	w.lost.Add(int64(lines))
	w.unsaid += lines
}

// writeAll is out.Write, and waits where out is a pipe that somebody else made non-blocking.
func (w *Writer) writeAll(b []byte) (n int, err error) {
	for {
		var m int
		m, err = w.out.Write(b[n:])
		n += m
		if !errors.Is(err, syscall.EAGAIN) {
			return n, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// gapWriter takes the line of gap: once it is written there is nothing more to say.
type gapWriter struct{ w *Writer }

func (g *gapWriter) Write(line []byte) (int, error) {
	n, err := g.w.writeAll(line)
	if err == nil {
		g.w.unsaid = 0
	}
	g.w.torn = n > 0 && line[n-1] != '\n'
	return n, err
}
