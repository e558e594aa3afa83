package datapath

import (
	"fmt"
	"log/slog"
	"os"
	"testing"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

var _ relay.Datapath = (*loader.Loader)(nil)

func TestSockmap(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	for i, c := range []struct {
		name string
		l    relaytest.Loopback
		size relaytest.Size
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize()},
		{"tcp6 to tcp4", relaytest.Loopback{Down: "tcp6"}, relaytest.SmallSize()},
		{"tcp6", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize()},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := loader.New(loader.Options{Instance: fmt.Sprintf("ts-ldr-table-%d-%d", os.Getpid(), i), MaxFlows: 4096, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				s := l.Stats()
				t.Logf("%+v", s)
				if s.Spliced == 0 || s.Off != "" || len(s.Refused) > 1 {
					t.Errorf("sockmap was not what was tested: %+v", s)
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			})
			c.l.Options.Datapaths = []relay.Datapath{l}
			relaytest.Run(t, c.l.Path(t), c.size)
		})
	}
}
