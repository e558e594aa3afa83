package deny

import (
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// lookEvery is how often a file is looked at for a change.
const lookEvery = time.Second

// File is a table in a file that is followed. Make it with [Open], end it with Close; its other methods may
// be called from any goroutine, and wait for nothing.
type File struct {
	name  string
	parse Parse
	log   *slog.Logger
	table atomic.Pointer[Table]

	stop sync.Once
	done chan struct{} // closed by Close

	stamp   os.FileInfo // of what was read; nil: not there
	changed os.FileInfo // what the last look saw instead, nil: nothing
	missing bool        // the last look has said so
}

// Open reads a file with a prefix on each line, and reads it again when it changes, until Close. While a
// changed file can't be used, or is gone, the table stays as it was, and log hears of it once. The caller
// closes.
func Open(name string, parse Parse, log *slog.Logger) (*File, error) {
	f := &File{name: name, parse: parse, log: log, done: make(chan struct{})}
	info, err := os.Stat(name) // before reading: a change meanwhile is seen later
	if err != nil {
		return nil, err
	}
	t, err := readFile(name, parse)
	if err != nil {
		return nil, err
	}
	f.table.Store(t)
	f.stamp = info
	go f.follow()
	return f, nil
}

// Contains reports whether a is in one of the file's prefixes.
func (f *File) Contains(a netip.Addr) bool { return f.table.Load().Contains(a) }

// Len is how many different prefixes the file has.
func (f *File) Len() int { return f.table.Load().Len() }

// Close ends following the file. The table stays as it is.
func (f *File) Close() { f.stop.Do(func() { close(f.done) }) }

func (f *File) follow() {
	tick := time.NewTicker(lookEvery)
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

// look reads the file again if it has changed since it was read, but not since the last look: who writes into
// it may not be done.
func (f *File) look() {
	now, err := os.Stat(f.name)
	if err != nil {
		if !f.missing {
			f.log.Error("a file of denied prefixes can't be read: those before stay in force",
				"file", f.name, "err", err)
		}
		f.missing, f.changed = true, nil
		return
	}
	settled := f.changed != nil && same(f.changed, now)
	f.missing, f.changed = false, now
	if !settled || same(f.stamp, now) {
		return
	}
	f.stamp = now
	t, err := readFile(f.name, f.parse)
	if err != nil {
		f.log.Error("a file of denied prefixes can't be used as it is: those before the change stay in force",
			"file", f.name, "err", err)
		return
	}
	f.table.Store(t)
	f.log.Info("a file of denied prefixes was read again", "file", f.name, "prefixes", t.Len())
}

func same(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

func readFile(name string, parse Parse) (*Table, error) {
	r, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return read(name, r, parse)
}
