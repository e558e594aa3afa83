package sockmap

import (
	"context"
	"net"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// SelfTest makes the tests that every datapath has to pass.
func (l *Engine) SelfTest() []host.Finding { return prove.Run(l.Tried(), prove.Stream) }

// Tried is the datapath as a proof sees it.
func (l *Engine) Tried() prove.Datapath { return tried{l} }

type tried struct{ l *Engine }

func (t tried) Splice(ctx context.Context, down, up int, _ *net.TCPConn,
	o Flow) (count func() (up, down int64), err error) {
	return t.l.SpliceBy(ctx, down, up, o, tcpOnly{t.l})
}

// do calls what with the flow, if there is one.
func (t tried) do(what func(*flow)) {
	for i := range t.l.live {
		if f := t.l.live[i].Load(); f != nil {
			f.mu.RLock()
			if !f.isClosed {
				what(f)
			}
			f.mu.RUnlock()
			return
		}
	}
}

func (t tried) Moved(direction int) (m prove.Moved) {
	t.do(func(f *flow) {
		s := f.directions[direction].snapshot()
		m = prove.Moved{Redirected: s.redirected, Passed: s.passed, PastTCP: s.local}
	})
	return m
}

func (t tried) GiveBack() bool {
	t.do(t.l.detacher.ask)
	return t.l.detacher != nil
}

func (t tried) Pressure() uint64 { return t.l.pressure }
