package acme

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/certmagic"
)

// storage is a folder in certmagic's layout, folders 0700 and files 0600. Over certmagic's own it
//   - locks by flock(2), so that a daemon that was killed leaves no lock behind;
//   - keeps the generation before of each certificate and key beside the new
//     one, because the two files can't be replaced as one: whatever happens in
//     between, a pair that fits together is there at the next start;
//   - says in its errors what to do.
type storage struct {
	files certmagic.FileStorage

	mu sync.Mutex
	// +checklocks:mu
	locks map[string]*os.File
}

var storages sync.Map // by folder: a *storage, which holds the locks

func storageAt(dir string) *storage {
	s, _ := storages.LoadOrStore(dir, &storage{files: certmagic.FileStorage{Path: dir}, locks: map[string]*os.File{}})
	return s.(*storage)
}

// StorageError is an operation on the storage that failed, with what to do.
type StorageError struct {
	Op  string // read, write, remove, lock
	Dir string // the storage's folder
	Err error
}

func (e *StorageError) Unwrap() error { return e.Err }

func (e *StorageError) Error() string {
	what := fmt.Sprintf("%s acme storage: %v", e.Op, e.Err)
	switch {
	case errors.Is(e.Err, syscall.ENOSPC), errors.Is(e.Err, syscall.EDQUOT):
		return what + ": the disk is full: make room on it, or set acme.storage to a folder on another disk"
	case errors.Is(e.Err, syscall.EROFS):
		return what + fmt.Sprintf(": mount it writable (under systemd: StateDirectory=, or ReadWritePaths=%s), or set acme.storage to another folder", e.Dir)
	case errors.Is(e.Err, fs.ErrPermission):
		return what + fmt.Sprintf(": chown %s to user id %d, or set acme.storage to a folder of its own", e.Dir, os.Geteuid())
	case errors.Is(e.Err, syscall.ENOTDIR):
		return what + ": acme.storage must be a folder"
	}
	return what
}

// fail wraps err, and leaves it with the attempt that ctx belongs to: certmagic gives only its text further.
func (s *storage) fail(ctx context.Context, op string, err error) error {
	if err == nil || errors.Is(err, fs.ErrNotExist) && op == "read" {
		return err
	}
	e := &StorageError{op, s.files.Path, err}
	if a := attemptOf(ctx); a != nil && op != "read" {
		a.storage = e
	}
	return e
}

// usable makes the folder, and tries to write to it.
func (s *storage) usable() error {
	err := os.MkdirAll(s.files.Path, 0o700)
	if err == nil {
		var f *os.File
		if f, err = os.CreateTemp(s.files.Path, ".try-"); err == nil {
			_, err = f.Write(make([]byte, 4096))
			f.Close()
			os.Remove(f.Name())
		}
	}
	return s.fail(context.Background(), "write", err)
}

const oldSuffix = ".old"

// Store implements certmagic.Storage.
func (s *storage) Store(ctx context.Context, key string, value []byte) error {
	if strings.HasPrefix(key, "certificates/") && (strings.HasSuffix(key, ".crt") || strings.HasSuffix(key, ".key")) {
		name := s.files.Filename(key)
		old := name + oldSuffix
		os.Remove(old + ".new")
		err := os.Link(name, old+".new")
		if err == nil {
			err = os.Rename(old+".new", old)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s.fail(ctx, "write", err)
		}
	}
	return s.fail(ctx, "write", s.files.Store(ctx, key, value))
}

// generations reads what is at key, and what was there before.
func (s *storage) generations(key string) (out [][]byte) {
	for _, suffix := range []string{"", oldSuffix} {
		if b, err := os.ReadFile(s.files.Filename(key) + suffix); err == nil {
			out = append(out, b)
		}
	}
	return out
}

// Load, Delete, Exists, List and Stat implement certmagic.Storage.
func (s *storage) Load(ctx context.Context, key string) ([]byte, error) {
	b, err := s.files.Load(ctx, key)
	return b, s.fail(ctx, "read", err)
}

func (s *storage) Delete(ctx context.Context, key string) error {
	return s.fail(ctx, "remove", s.files.Delete(ctx, key))
}

func (s *storage) Exists(ctx context.Context, key string) bool { return s.files.Exists(ctx, key) }

func (s *storage) List(ctx context.Context, prefix string, recursive bool) ([]string, error) {
	return s.files.List(ctx, prefix, recursive)
}

func (s *storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	return s.files.Stat(ctx, key)
}

// lockPoll is how often a lock that somebody else has is tried again.
const lockPoll = 100 * time.Millisecond

// Lock implements certmagic.Storage.
func (s *storage) Lock(ctx context.Context, name string) error {
	file := filepath.Join(s.files.Path, "locks", certmagic.StorageKeys.Safe(name)+".lock")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return s.fail(ctx, "lock", err)
	}
	for {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return s.fail(ctx, "lock", err)
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		// Whoever had it may have removed the file that we have locked.
		if mine, statErr := f.Stat(); err == nil && statErr == nil {
			if there, statErr := os.Stat(file); statErr == nil && os.SameFile(mine, there) {
				s.mu.Lock()
				s.locks[name] = f
				s.mu.Unlock()
				return nil
			}
		}
		f.Close()
		if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
			return s.fail(ctx, "lock", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for another process that works on %s: %w", name, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// Unlock implements certmagic.Storage.
func (s *storage) Unlock(_ context.Context, name string) error {
	s.mu.Lock()
	f := s.locks[name]
	delete(s.locks, name)
	s.mu.Unlock()
	if f == nil {
		return fmt.Errorf("lock %s is not held", name)
	}
	os.Remove(f.Name()) // while it is ours; an error leaves an empty file
	return f.Close()
}
