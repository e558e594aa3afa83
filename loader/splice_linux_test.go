package loader

import (
	"errors"
	"testing"
	"time"
)

func TestBothWays(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			l := open(t, allRules, 16)
			p := splicePath(t, l, pathOptions{network: network})
			const n = 64 << 20
			up, down := make(chan error, 1), make(chan error, 1)
			start := time.Now()
			go func() { up <- send(p.client, p.server, 1, n) }()
			go func() { down <- send(p.server, p.client, 2, n) }()
			if err := errors.Join(<-up, <-down); err != nil {
				t.Fatal(err)
			}
			r := p.wait(5 * time.Second)
			if r.end != endEOF || r.err != nil || r.up != n || r.down != n {
				t.Errorf("ended %+v", r)
			}
			t.Logf("%v %+v", time.Since(start), l.Stats())
		})
	}
}
