package deny

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

// File is a table in a file that is followed. Make it with [Open], end it with Close; its other methods may
// be called from any goroutine, and wait for nothing.
type File struct {
	name  string
	parse Parse
	log   *slog.Logger
	table atomic.Pointer[Table]

	problem atomic.Pointer[error] // of the file as it is now

	stop sync.Once
	done chan struct{} // closed by Close

	stamp   os.FileInfo // of what was read; nil: not there
	changed os.FileInfo // what the last look saw instead, nil: nothing
	missing bool        // the last look has said so
	bad     error       // what is wrong with what was read
}

// Open reads a file with a prefix on each line, and reads it again when it changes, until Close. While a
// changed file can't be used, is gone, or has no prefix any more and does not say that it is meant so, the
// table stays as it was, and log hears of it once. before is the table of the same file in an earlier
// configuration, nil for none: it stays where the file has become empty. The caller closes.
func Open(name string, parse Parse, log *slog.Logger, before *Table) (*File, error) {
	f := &File{name: name, parse: parse, log: log, done: make(chan struct{})}
	if err := f.begin(before); err != nil {
		return nil, err
	}
	return f, nil
}

// Await is Open for a file that may be mended later: as long as it can't be read it denies everybody, and
// Problem says why.
func Await(name string, parse Parse, log *slog.Logger) *File {
	f := &File{name: name, parse: parse, log: log, done: make(chan struct{})}
	err := f.begin(nil)
	if err == nil {
		return f
	}
	log.Error("a file of denied prefixes can't be used: "+everybodyDenied, "file", name, "err", err)
	f.table.Store(&Table{all: true})
	f.bad, f.missing = err, errors.Is(err, fs.ErrNotExist)
	f.publish()
	go f.follow()
	return f
}

// Check says what is wrong with a file that is to be opened, or that it has no prefix without saying so.
func Check(name string, parse Parse) error {
	f := &File{name: name}
	t, err := readFile(name, parse)
	if err == nil {
		f.use(t)
		err = f.bad
	}
	return err
}

const everybodyDenied = "everybody is denied until it can be"

// begin reads the file and follows it, or says why it can't.
func (f *File) begin(before *Table) error {
	info, err := os.Stat(f.name) // before reading: a change meanwhile is seen later
	if err != nil {
		return err
	}
	t, err := readFile(f.name, f.parse)
	if err != nil {
		return err
	}
	f.table.Store(before)
	f.stamp = info
	f.use(t)
	if f.bad != nil {
		f.log.Warn("a file of denied prefixes is empty", "file", f.name, "err", f.bad)
	}
	f.publish()
	go f.follow()
	return nil
}

// meanwhile says who is denied while the file can't be used.
func (f *File) meanwhile() string {
	if f.IsUnread() {
		return everybodyDenied
	}
	return "the previous ones stay in force"
}

// use takes what the file has. A file that was emptied, by a full disk or a script that failed half-way, must
// not let in the clients that it kept out.
func (f *File) use(t *Table) (taken bool) {
	f.bad = nil
	if t.Len() == 0 && !t.none {
		f.bad = fmt.Errorf("%s has no prefix: write %q into it if nobody is to be denied", f.name, sayNone)
		if n := f.Len(); n > 0 {
			f.bad = fmt.Errorf("%w; the previous %d stay in force", f.bad, n)
			return false
		}
		if before := f.table.Load(); before != nil && before.all {
			return false
		}
	}
	f.table.Store(t)
	return true
}

// publish lets Problem say what is wrong with the file now.
func (f *File) publish() {
	if f.bad == nil {
		f.problem.Store(nil)
		return
	}
	bad := f.bad
	f.problem.Store(&bad)
}

// Problem is why the file is not in force as it is, or that it has no prefix without saying so; nil if all is
// well.
func (f *File) Problem() error {
	if p := f.problem.Load(); p != nil {
		return *p
	}
	return nil
}

// Name is the file's.
func (f *File) Name() string { return f.name }

// Table is what is in force now.
func (f *File) Table() *Table { return f.table.Load() }

// Contains reports whether a is in one of the file's prefixes.
func (f *File) Contains(a netip.Addr) bool { return f.table.Load().Contains(a) }

// IsUnread reports whether the file could never be read, so that everybody is denied.
func (f *File) IsUnread() bool { return f.table.Load().all }

// Len is how many different prefixes the file has.
func (f *File) Len() int { return f.table.Load().Len() }

// Close ends following the file. The table stays as it is.
func (f *File) Close() { f.stop.Do(func() { close(f.done) }) }

func (f *File) follow() {
	tick := time.NewTicker(filestamp.Every)
	defer tick.Stop()
	for {
		select {
		case <-f.done:
			return
		case <-tick.C:
			f.look()
		}
	}
}

// look reads the file again if it has changed since it was read, but not since the last look: a writer may
// not be done with it yet.
func (f *File) look() {
	now, err := os.Stat(f.name)
	if err != nil {
		if !f.missing {
			f.log.Error("a file of denied prefixes can't be read: "+f.meanwhile(), "file", f.name, "err", err)
			f.problem.Store(&err)
		}
		f.missing, f.changed = true, nil
		return
	}
	settled := f.changed != nil && filestamp.Same(f.changed, now)
	f.changed = now
	if !settled {
		return
	}
	if f.missing {
		f.missing = false
		f.publish()
	}
	if filestamp.Same(f.stamp, now) {
		return
	}
	f.stamp = now
	defer f.publish()
	t, err := readFile(f.name, f.parse)
	switch {
	case err != nil:
		if f.bad == nil || f.bad.Error() != err.Error() {
			f.log.Error("a file of denied prefixes can't be used as it is: "+f.meanwhile(), "file", f.name,
				"err", err)
		}
		f.bad = err
		if _, failed := errors.AsType[*fs.PathError](err); failed {
			f.stamp = nil // it was not read, perhaps for want of a descriptor: the next look tries again
		}
	case !f.use(t):
		f.log.Error("a file of denied prefixes is empty: "+f.meanwhile(), "file", f.name,
			"err", f.bad)
	default:
		f.log.Info("a file of denied prefixes was read again", "file", f.name, "prefixes", t.Len())
	}
}

func readFile(name string, parse Parse) (*Table, error) {
	r, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return read(name, r, parse)
}
