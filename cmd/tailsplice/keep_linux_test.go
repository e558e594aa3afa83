package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/handover"
)

// TestAdoptionIsGivenUp: a daemon that is told to end while flows of the one before it are still to go on resets
// them at once: they would seem to have ended well when they are kept no more. A recall has its time.
func TestAdoptionIsGivenUp(t *testing.T) {
	const flows = 20
	var has []handover.Socket
	var before *handover.Queue
	before = handover.OpenQueue(nil, func() (err error) {
		handover.Close(has)
		has, err = before.Sockets()
		return err
	})
	var ends []net.Conn
	ln := listen(t, "127.0.0.1:0")
	pair := func() (fd int) {
		t.Helper()
		c, err := net.Dial("tcp", ln.Addr().String())
		check(t, err)
		t.Cleanup(func() { c.Close() })
		check(t, c.SetDeadline(time.Now().Add(time.Minute)))
		ends = append(ends, c)
		a, err := ln.Accept()
		check(t, err)
		defer a.Close()
		f, err := a.(*net.TCPConn).File()
		check(t, err)
		defer f.Close()
		fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		check(t, err)
		return fd
	}
	n, err := before.Put(func(yield func(*handover.KeptFlow, error) bool) {
		for i := range flows {
			f := &handover.Flow{ID: fmt.Sprint(i), Kept: &handover.Balance{}}
			if !yield(handover.NewKeptFlow(f, pair(), pair()), nil) {
				return
			}
		}
	})
	if check(t, err); n != flows {
		t.Fatalf("%d flows are kept", n)
	}

	d := &process{log: slog.New(slog.DiscardHandler)}
	d.openStore(nil)
	d.keeper.flows = handover.OpenQueue(has, nil)
	looked := make(chan time.Duration, flows)
	recall := d.keeper.recallBy(func(ctx context.Context, _, _ int, _ [2]uint64) (_, _ []byte, err error) {
		until, _ := ctx.Deadline()
		looked <- time.Until(until)
		<-ctx.Done()
		return nil, nil, context.Cause(ctx)
	})
	go func() {
		d.adopt(d.keeper.flows, recall)
		close(d.keeper.adopted)
	}()
	for range flows {
		if in := <-looked; in <= 0 || in > recallWait {
			t.Errorf("a recall ends in %v", in)
		}
	}
	if !d.keeper.isAdopting() {
		t.Error("all flows are adopted")
	}
	d.endKeeping()
	if d.keeper.isAdopting() {
		t.Error("flows are adopted that are kept no more")
	}
	for i, c := range ends {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("end %d gets %v, want a reset", i, err)
		}
	}
	before.Close()
}

// TestUpgradeBeforeMain: while the service manager is still to be told of this process, no other one takes over
// from it.
func TestUpgradeBeforeMain(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	d := &process{log: slog.New(slog.DiscardHandler)}
	d.openStore(nil)
	now, cancel := context.WithCancel(t.Context())
	cancel() // it need not wait
	upgrade := func() error {
		_, err := d.upgrade(now, url.Values{"binary": {filepath.Join(t.TempDir(), "none")}})
		return err
	}
	const isEarly = "the upgrade before this one is not over yet"
	if err := upgrade(); err == nil || !strings.Contains(err.Error(), isEarly) {
		t.Errorf("before it is the main process: %v", err)
	}
	d.keeper.mu.Lock()
	d.keeper.isMain = true
	d.keeper.mu.Unlock()
	if err := upgrade(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is the main process: %v", err)
	}
}
