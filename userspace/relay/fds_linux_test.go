package relay_test

import (
	"context"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestNoDescriptors: with no descriptor left for a pipe nor for an epoll, flows go on by copying.
func TestNoDescriptors(t *testing.T) {
	p := relaytest.Loopback{Options: relay.WithParkAfter(relay.Options{}, 1)}.Path(t)
	f := p.Connect(t)
	_, r := relaytest.Relay()
	r.DropPipes()

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = highest(t) + 1
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	var fillers []*os.File // the gaps below it
	for {
		fd, err := unix.Dup(0)
		if err != nil {
			break
		}
		fillers = append(fillers, os.NewFile(uintptr(fd), "filler"))
	}
	defer func() {
		for _, f := range fillers {
			f.Close()
		}
	}()

	f.Start(context.Background(), relay.Options{})
	if err := relaytest.Exchange(f.Client, f.Server, 20<<20, 20<<20); err != nil {
		t.Error(err)
	}
	if r := f.Result(t); r.End != relay.EndEOF {
		t.Errorf("%+v", r)
	}
}

// highest is the highest descriptor in use.
func highest(t *testing.T) (fd uint64) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		n, _ := strconv.ParseUint(e.Name(), 10, 64)
		fd = max(fd, n)
	}
	return fd
}
