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
		o    loader.Options
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize(), loader.Options{}},
		{"tcp4 at once", relaytest.Loopback{}, relaytest.DefaultSize(), loader.Options{AtOnce: true}},
		{"tcp6 to tcp4 at once", relaytest.Loopback{Down: "tcp6"}, relaytest.SmallSize(), loader.Options{AtOnce: true}},
		{"tcp6", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize(), loader.Options{}},
		{"tcp6 at once", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize(), loader.Options{AtOnce: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := load(t, c.o)
			c.l.Options.Datapaths = []relay.Datapath{l}
			relaytest.Run(t, c.l.Path(t), c.size)
		})
	}
}

// TestSockmapWire: with an end that sends what overlaps, comes again and out of order.
func TestSockmapWire(t *testing.T) {
	for name, o := range map[string]loader.Options{"begins outside": {}, "at once": {AtOnce: true}} {
		t.Run(name, func(t *testing.T) {
			relaytest.RunWire(t, relaytest.Loopback{Options: relay.Options{Datapaths: []relay.Datapath{load(t, o)}}})
		})
	}
}

// TestUserspace is for the kernels on which there is nothing else: see scripts/test-kernels.
func TestUserspace(t *testing.T) {
	relaytest.Run(t, relaytest.Loopback{}.Path(t), relaytest.SmallSize())
}

// load loads the datapath until the end of the test, which fails if it was not what was tested.
func load(t *testing.T, o loader.Options) *loader.Loader {
	t.Helper()
	needRoot(t)
	o.Instance, o.MaxFlows, o.Log = fmt.Sprintf("ts-ldr-table-%d-%d", os.Getpid(), instances.Add(1)), 4096, slog.New(slog.NewTextHandler(os.Stderr, nil))
	l, err := loader.New(o)
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
