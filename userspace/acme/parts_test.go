package acme

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailsplice/tailsplice/userspace/hook"
)

// TestHook: how the program is run, and what becomes of one that hangs or talks
// too much.
func TestHook(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "hook")
	out := filepath.Join(dir, "out")
	write := func(body string) {
		if err := os.WriteFile(script, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h := &Hook{Exec: []string{script, "my arg"}, Timeout: patience}
	write(`printf '%s|' "$@" >` + out + "\n")
	if err := h.run(t.Context(), "present", "_acme-challenge.a.org.", "the value"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(out); string(b) != "my arg|present|_acme-challenge.a.org.|the value|" {
		t.Errorf("the hook got %q", b)
	}

	write("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 7\n")
	err := h.run(t.Context(), "present", "a.", "v")
	var he *hook.Error
	if !errors.As(err, &he) || len(he.Output) > hook.MaxOutput || !strings.HasSuffix(he.Output, "line 19999") || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("a talkative hook: %d bytes: %.300v", len(he.Output), err)
	}

	pid := filepath.Join(dir, "pid")
	write("sleep 600 & echo $! >" + pid + "; wait\n")
	child := ""
	for h.Timeout = 300 * time.Millisecond; child == ""; h.Timeout *= 2 { // until it comes as far as its child
		begin := time.Now()
		err = h.run(t.Context(), "present", "a.", "v")
		if err == nil || !strings.Contains(err.Error(), "killed after "+h.Timeout.String()) || time.Since(begin) > h.Timeout+patience {
			t.Fatalf("a hook that hangs: %v after %v", err, time.Since(begin))
		}
		b, _ := os.ReadFile(pid)
		child = strings.TrimSpace(string(b))
	}
	eventually(t, "the end of the hook's child "+child, func() error {
		if stat, err := os.ReadFile("/proc/" + child + "/stat"); err == nil && !strings.Contains(string(stat), ") Z ") {
			return errors.New("it lives")
		}
		return nil
	})

	h.Exec = []string{filepath.Join(dir, "nowhere")}
	if err := h.run(t.Context(), "present", "a.", "v"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no hook: %v", err)
	}
	// An attempt that was broken off still removes its record, in little time.
	h.Exec, h.Timeout = []string{script}, time.Minute
	write("touch " + out + ".cleaned\n")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.run(context.WithoutCancel(ctx), "cleanup", "a.", "v"); err != nil {
		t.Error(err)
	}
}

// TestGenerations: whatever certmagic was interrupted in, a pair that fits
// together is found.
func TestGenerations(t *testing.T) {
	h := newHost(t)
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{{Directory: "https://acme.invalid/dir"}}}.withDefaults()
	const dir = "certificates/acme.invalid-dir/a.example.org/a.example.org"
	type step struct{ key, value string }
	first, second := mint(t, "a.example.org", time.Hour), mint(t, "a.example.org", 2*time.Hour)
	for name, c := range map[string]struct {
		steps []step
		want  []byte
	}{
		"nothing":                      {nil, nil},
		"one":                          {[]step{{".key", first.key}, {".crt", first.cert}}, first.der},
		"two":                          {[]step{{".key", first.key}, {".crt", first.cert}, {".key", second.key}, {".crt", second.cert}}, second.der},
		"the second's key only":        {[]step{{".key", first.key}, {".crt", first.cert}, {".key", second.key}}, first.der},
		"the second's key, taken back": {[]step{{".key", first.key}, {".crt", first.cert}, {".key", second.key}, {".key", ""}}, first.der},
		"both taken back":              {[]step{{".key", first.key}, {".crt", first.cert}, {".key", second.key}, {".crt", second.cert}, {".key", ""}, {".crt", ""}}, first.der},
		"half a file":                  {[]step{{".key", first.key}, {".crt", first.cert}, {".crt", second.cert[:100]}}, first.der},
	} {
		s.Storage = storageDir(t)
		p, err := newPolicy(h.m, s)
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range c.steps {
			if st.value == "" {
				err = p.storage.Delete(t.Context(), dir+st.key)
			} else {
				err = p.storage.Store(t.Context(), dir+st.key, []byte(st.value))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		var got []byte
		if f := p.newest("a.example.org"); f != nil {
			got = f.cert.Certificate[0]
		}
		if !bytes.Equal(got, c.want) {
			t.Errorf("%s: the wrong certificate", name)
		}
	}
}

// TestLock: one at a time, and a holder that dies leaves nothing behind.
func TestLock(t *testing.T) {
	dir := storageDir(t)
	a := &storage{files: storageAt(dir).files, locks: map[string]*os.File{}} // as another process would
	b := storageAt(dir)
	if err := a.Lock(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := b.Lock(ctx, "x"); err == nil {
		t.Error("two hold one lock")
	}
	got := make(chan error, 1)
	go func() { got <- b.Lock(t.Context(), "x") }()
	if err := a.Unlock(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	b.mu.Lock()
	b.locks["x"].Close() // what the kernel does for one that dies
	b.mu.Unlock()
	if err := a.Lock(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	if err := a.Unlock(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "locks")); len(left) != 0 {
		t.Errorf("%d lock files are left", len(left))
	}
}

func TestStorageErrors(t *testing.T) {
	for want, err := range map[string]error{
		"the disk is full: make room":                                 syscall.ENOSPC,
		"read-only file system: mount it writable (under systemd: St": &os.PathError{Op: "open", Path: "/x", Err: syscall.EROFS},
		"chown /srv/acme to user id":                                  syscall.EACCES,
		"must be a folder":                                            syscall.ENOTDIR,
	} {
		e := &StorageError{Op: "write", Dir: "/srv/acme", Err: err}
		if !strings.Contains(e.Error(), want) {
			t.Errorf("%v: want %q", e, want)
		}
	}
}

// TestBridge: certmagic's steps are for debugging, its warnings are not lost.
func TestBridge(t *testing.T) {
	for _, c := range []struct {
		level slog.Level
		want  []string
	}{
		{slog.LevelInfo, []string{"WARN certmagic: careful", "WARN certmagic: broken"}},
		{slog.LevelDebug, []string{"DEBUG certmagic: step", "WARN certmagic: careful", "WARN certmagic: broken", "DEBUG certmagic: job failed"}},
	} {
		var b bytes.Buffer
		z := newZap(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: c.level}))).Named("x").With(zap.String("who", "me"))
		z.Info("step")
		z.Warn("careful", zap.Duration("in", time.Second))
		z.Error("broken", zap.Error(errors.New("why")))
		z.Error("job failed")
		var got []string
		for line := range strings.Lines(b.String()) {
			if !strings.Contains(line, "who=me") {
				t.Errorf("no field of With: %s", line)
			}
			_, rest, _ := strings.Cut(line, "level=")
			level, rest, _ := strings.Cut(rest, ` msg="`)
			msg, _, _ := strings.Cut(rest, `"`)
			got = append(got, level+" "+msg)
		}
		if strings.Join(got, "\n") != strings.Join(c.want, "\n") {
			t.Errorf("%v: got %q", c.level, got)
		}
		if !strings.Contains(b.String(), "error=why") || !strings.Contains(b.String(), "in=1s") {
			t.Errorf("fields are lost: %s", &b)
		}
	}
}
