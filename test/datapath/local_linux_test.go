package datapath

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestLocal runs the table over flows to a process on this host, whose listener is in a cgroup of its own.
func TestLocal(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		network string
		size    relaytest.Size
	}{{"tcp4", relaytest.DefaultSize()}, {"tcp6", relaytest.SmallSize()}} {
		t.Run(c.network, func(t *testing.T) {
			l, local := loadLocal(t, "table-"+c.network)
			server, _ := cgroup.Listen(t, c.network)
			at := relaytest.Loopback{Up: c.network, Server: server,
				Options: relay.Options{Datapaths: []datapath.Datapath{local, l}}}
			p := at.Path(t)
			becomeKnown(t, local, p)
			before := local.count()
			relaytest.Run(t, p, c.size)
			wasTested(t, local, before)
		})
	}
}

// TestLocalWire: with a client that sends what overlaps, comes again and out of order.
func TestLocalWire(t *testing.T) {
	needRoot(t)
	l, local := loadLocal(t, "wire")
	server, _ := cgroup.Listen(t, "tcp4")
	at := relaytest.Loopback{Server: server, Options: relay.Options{Datapaths: []datapath.Datapath{local, l}}}
	becomeKnown(t, local, at.Path(t))
	before := local.count()
	relaytest.RunWire(t, at)
	wasTested(t, local, before)
}

// wasTested: most flows since before went past TCP. A few may have ended when they were offered, or have been
// too quick to be caught.
func wasTested(t *testing.T, local *countedLocal, before counted) {
	t.Helper()
	s := local.count()
	off, _ := local.Health()
	t.Logf("%+v, %v", s, local.reasons())
	if n := s.Taken - before.Taken; n == 0 || s.Refused-before.Refused > n/2 || off != "" || s.Faults > 0 {
		t.Errorf("it was not what was tested: %+v before, %q", before, off)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func loadLocal(t testing.TB, name string) (*loader.Loader, *countedLocal) {
	t.Helper()
	l, err := loader.New(loader.Options{Instance: fmt.Sprintf("ts-ldr-%s-%d", name, os.Getpid()),
		MaxFlows: 4096, Local: true, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	local, err := l.Local()
	if err != nil {
		t.Fatal(err)
	}
	return l, &countedLocal{Local: local}
}

// becomeKnown makes flows until one is taken past TCP: the first to a target never is.
func becomeKnown(t testing.TB, local *countedLocal, p relaytest.Path) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		before := local.count().Taken
		f := p.Connect(t)
		f.Start(context.Background(), relay.Options{})
		if err := relaytest.Exchange(f.Client, f.Server, 1000, 1000); err != nil {
			t.Fatal(err)
		}
		f.Result(t)
		if local.count().Taken > before {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the target does not become known: %v", local.reasons())
		}
	}
}
