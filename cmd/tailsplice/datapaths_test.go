package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"testing"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// counted counts how many flows a datapath took: a table that passes because everything was refused proves nothing.
type counted struct {
	relay.Datapath
	taken, refused atomic.Int64
}

func (c *counted) Splice(ctx context.Context, down, up *net.TCPConn, f relay.Flow) (func() (up, down int64), error) {
	count, err := c.Datapath.Splice(ctx, down, up, f)
	if err != nil {
		c.refused.Add(1)
	} else {
		c.taken.Add(1)
	}
	return count, err
}

// TestSockmap runs the relay's table of cases through the loader: here is where the two may meet.
func TestSockmap(t *testing.T) {
	l, err := loader.New(loader.Options{Instance: fmt.Sprintf("test-%d", os.Getpid())})
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("no sockmap here: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, family := range []string{"tcp4", "tcp6"} {
		t.Run(family, func(t *testing.T) {
			c := &counted{Datapath: l}
			size := relaytest.SmallSize()
			if os.Getenv("RELAYTEST") != "" {
				size = relaytest.DefaultSize()
			}
			relaytest.Run(t, relaytest.Loopback{Down: family, Up: family, Options: relay.Options{Datapaths: []relay.Datapath{c}}}.Path(t), size)
			t.Logf("%d flows spliced, %d refused", c.taken.Load(), c.refused.Load())
			if c.taken.Load() < 100 {
				t.Errorf("only %d flows were spliced", c.taken.Load())
			}
		})
	}
	for reason, n := range l.Stats().Faults {
		t.Errorf("%d flows were reset: %s", n, reason)
	}
}
