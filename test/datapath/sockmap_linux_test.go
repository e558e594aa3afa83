package datapath

import (
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

var _ relay.Datapath = (*loader.Loader)(nil)

func TestSockmap(t *testing.T) {
	for _, c := range []struct {
		name string
		l    relaytest.Loopback
		size relaytest.Size
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize()},
		{"tcp6 to tcp4", relaytest.Loopback{Down: "tcp6"}, relaytest.SmallSize()},
		{"tcp6", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize()},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := load(t)
			c.l.Options.Datapaths = []relay.Datapath{l}
			relaytest.Run(t, c.l.Path(t), c.size)
		})
	}
}

// TestSockmapWire: with an end that sends what overlaps, comes again and out of order.
func TestSockmapWire(t *testing.T) {
	relaytest.RunWire(t, relaytest.Loopback{Options: relay.Options{Datapaths: []relay.Datapath{load(t)}}})
}

// TestUserspace is for the kernels on which there is nothing else: see scripts/test-kernels.
func TestUserspace(t *testing.T) {
	relaytest.Run(t, relaytest.Loopback{}.Path(t), relaytest.SmallSize())
}

// load loads the datapath until the end of the test, which fails if it was not what was tested.
func load(t *testing.T) *loader.Loader {
	t.Helper()
	needRoot(t)
	l, err := loader.New(loader.Options{Instance: fmt.Sprintf("ts-ldr-table-%d-%d", os.Getpid(), instances.Add(1)), MaxFlows: 4096, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s := l.Stats()
		t.Logf("%+v", s)
		if s.Spliced == 0 || s.Off != "" || len(s.Refused) > 1 || s.Stalls > 0 {
			t.Errorf("sockmap was not what was tested, or stalled: %+v", s)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

var instances atomic.Int64
