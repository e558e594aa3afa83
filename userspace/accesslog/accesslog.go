// Package accesslog writes a line for each request to a file or to standard
// error, as JSON or in the formats that Apache and nginx made common.
//
// Writing never waits for a disk: lines are queued, within bounds, and one goroutine writes them. What can't
// be written is counted and complained of once. Rotation is the system's: a file that was renamed or removed
// is made anew within a second, and [Log.Reopen] does so at once.
package accesslog

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	queueBytes = 4 << 20     // bounds the lines that wait to be written
	lookEvery  = time.Second // how often the file's name is looked at for a rotation
	fileMode   = 0o640
	closeWait  = 2 * time.Second
)

// Stderr as a file's name is standard error.
const Stderr = "stderr"

// Options says where lines go.
type Options struct {
	File   string          // a path, or [Stderr]
	Format string          // "json", "common" or "combined"
	Log    *slog.Logger    // is told once when lines are lost, and when that is over
	Lost   func(lines int) // counts lines that were not written. Nil counts nowhere.
	// Wait makes it no error that the file can't be opened: it is tried again each second, and lines are lost
	// meanwhile.
	Wait bool
}

// Log is one open access log. Make it with [Open], end it with Close. Its
// methods may be called from any goroutine.
type Log struct {
	opts   Options
	format func([]byte, *Entry) []byte

	mu sync.Mutex
	// +checklocks:mu
	queue []byte // whole lines
	// +checklocks:mu
	lines int // in queue
	wake  chan struct{}
	// +checklocks:mu
	closed bool
	done   chan struct{} // closed when the writer has ended

	reopen  atomic.Bool
	problem atomic.Pointer[error] // why lines are lost now; nil: none is

	// The writer's own.
	out    io.Writer // nil: the file could not be opened yet
	file   *os.File  // nil for standard error
	looked time.Time
	torn   bool // the file ends in the middle of a line
}

// Open opens the file for appending, and makes it if it is not there. Its folder
// must exist, but for Options.Wait.
func Open(o Options) (*Log, error) {
	l := &Log{opts: o, wake: make(chan struct{}, 1), done: make(chan struct{})}
	switch o.Format {
	case "json":
		l.format = appendJSON
	case "common":
		l.format = appendCommon
	case "combined":
		l.format = appendCombined
	default:
		return nil, fmt.Errorf("there is no access log format %q", o.Format)
	}
	if o.File == Stderr {
		l.out = os.Stderr
	} else if err := l.open(); err != nil {
		if !o.Wait {
			return nil, err
		}
		l.fail(err)
	}
	go l.run()
	return l, nil
}

// Write queues the line of e. It never blocks: a line that finds the queue full,
// because the disk does not keep up, is lost and counted.
func (l *Log) Write(e *Entry) {
	l.mu.Lock()
	before := len(l.queue)
	fits := !l.closed && before < queueBytes
	if fits {
		l.queue = l.format(l.queue, e)
		l.lines++
	}
	l.mu.Unlock()
	if !fits {
		l.lost(1)
		return
	}
	if before == 0 {
		l.poke()
	}
}

// Reopen makes the writer open the file anew, as after a rotation.
func (l *Log) Reopen() {
	l.reopen.Store(true)
	l.poke()
}

// Close writes what is queued and closes the file. It gives up on a disk or a pipe that takes nothing.
func (l *Log) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.poke()
	select {
	case <-l.done:
	case <-time.After(closeWait):
	}
}

// TellsErrors says whether lines have what went wrong with a request, and its id.
func (l *Log) TellsErrors() bool { return l.opts.Format == "json" }

// File is Options.File.
func (l *Log) File() string { return l.opts.File }

// Problem is why lines are lost now, or nil.
func (l *Log) Problem() error {
	if p := l.problem.Load(); p != nil {
		return *p
	}
	return nil
}

func (l *Log) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *Log) lost(n int) {
	if l.opts.Lost != nil {
		l.opts.Lost(n)
	}
}

// run writes what is queued, until the log is closed.
func (l *Log) run() {
	defer close(l.done)
	var spare []byte
	for range l.wake {
		for {
			l.mu.Lock()
			batch, lines, closed := l.queue, l.lines, l.closed
			l.queue, l.lines = spare[:0], 0
			l.mu.Unlock()
			l.follow()
			if len(batch) > 0 {
				l.write(batch, lines)
			}
			if spare = batch; cap(spare) > queueBytes/4 {
				spare = nil // after a burst
			}
			if len(batch) > 0 {
				continue
			}
			if closed {
				if l.file != nil {
					l.file.Close()
				}
				return
			}
			break
		}
	}
}

// follow opens the file anew where its name is another file's by now.
func (l *Log) follow() {
	if l.opts.File == Stderr {
		return
	}
	asked := l.reopen.Swap(false)
	if !asked && time.Since(l.looked) < lookEvery {
		return
	}
	l.looked = time.Now()
	if !asked && l.file != nil {
		named, err := os.Stat(l.opts.File)
		open, err2 := l.file.Stat()
		if err == nil && err2 == nil && os.SameFile(named, open) {
			return
		}
	}
	waited := l.out == nil
	if err := l.open(); err != nil {
		l.fail(err)
	} else if waited {
		l.recovered()
	}
}

// open takes the file that has the name now. With an error the one before stays.
// It doesn't wait for somebody to read a named pipe: that nobody does is an error.
func (l *Log) open() error {
	f, err := os.OpenFile(l.opts.File, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, fileMode)
	if errors.Is(err, syscall.ENXIO) {
		return fmt.Errorf("%w: it is a named pipe that nobody reads: start its reader first", err)
	}
	if err != nil {
		return err
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.out, l.torn, l.looked = f, f, false, time.Now()
	return nil
}

// write writes whole lines, or loses them.
func (l *Log) write(batch []byte, lines int) {
	if l.out == nil {
		l.lost(lines)
		return
	}
	if l.torn {
		if _, err := l.out.Write([]byte("\n")); err != nil {
			l.lost(lines)
			return
		}
		l.torn = false
	}
	n, err := l.out.Write(batch)
	if err == nil {
		l.recovered()
		return
	}
	written := 0
	for _, c := range batch[:n] {
		if c == '\n' {
			written++
		}
	}
	l.torn = n > 0 && batch[n-1] != '\n'
	l.lost(lines - written)
	l.fail(err)
}

// recovered logs that lines are written again, if fail has logged that they are lost.
func (l *Log) recovered() {
	if l.problem.Swap(nil) != nil {
		l.opts.Log.Info("the access log can be written again", "file", l.opts.File)
	}
}

// fail logs once that lines are lost, until they no longer are. A file that can't be opened is tried again,
// also where no line comes.
func (l *Log) fail(err error) {
	if l.out == nil {
		time.AfterFunc(lookEvery, l.Reopen)
	}
	if l.problem.Swap(&err) != nil {
		return
	}
	if path, ok := errors.AsType[*os.PathError](err); ok {
		err = path.Err
	}
	l.opts.Log.Error("the access log can't be written: requests go on, their lines are lost and counted; see that the disk has space and the folder is there",
		"file", l.opts.File, "err", err)
}
