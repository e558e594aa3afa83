package sockmap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

func TestBothWays(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			l := open(t, nil, 16)
			p := loadertest.SplicePath(t, l, loadertest.PathOptions{Network: network})
			const n = 256 << 20
			start := time.Now()
			if err := loadertest.BothWays(p, n); err != nil {
				t.Fatal(err)
			}
			t.Log(time.Since(start))
		})
	}
}

// A reader that stops holds the sender up; nothing is lost when it goes on.
func TestReaderStops(t *testing.T) {
	l := open(t, nil, 16)
	for name, way := range loadertest.Ways {
		t.Run(name, func(t *testing.T) {
			p := loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 256 << 10})
			from, to := way(p)
			const n = 96 << 20
			done := make(chan error, 1)
			slow := &pausing{r: to, at: []int64{0, 1 << 20, 40 << 20}, pause: 700 * time.Millisecond,
				count: p.Count, ended: make(chan struct{})}
			go func() {
				hash, err := loadertest.Stream(from, 9, n)
				from.CloseWrite()
				got, m, rerr := [32]byte{}, int64(0), error(nil)
				<-slow.ended
				got, m, rerr = slow.hash, slow.n, slow.err
				if err == nil && (rerr != nil || m != n || got != hash) {
					err = fmt.Errorf("%d of %d bytes, the same %v, %v", m, n, got == hash, rerr)
				}
				done <- err
			}()
			slow.run()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if d := &l.onlyFlow(t).directions; d[0].shared().Consumed+d[1].shared().Consumed == 0 {
				t.Error("nothing was copied")
			}
		})
	}
}

// pausing is a reader that stops at some places, each time until nothing has moved for a pause.
type pausing struct {
	r     *net.TCPConn
	at    []int64
	pause time.Duration
	count func() (up, down int64)
	ended chan struct{}
	hash  [32]byte
	n     int64
	err   error
}

func (p *pausing) run() {
	defer close(p.ended)
	p.hash, p.n, p.err = loadertest.Drain(p)
}

func (p *pausing) Read(b []byte) (int, error) {
	if len(p.at) > 0 && p.n >= p.at[0] {
		p.at = p.at[1:]
		for last := int64(-1); ; {
			time.Sleep(p.pause)
			up, down := p.count()
			if up+down == last {
				break
			}
			last = up + down
		}
	}
	n, err := p.r.Read(b)
	p.n += int64(n)
	return n, err
}

func TestOneByteSegments(t *testing.T) {
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	data := prove.Pattern(20000)
	go func() {
		for i := range data {
			if _, err := p.Client.Write(data[i : i+1]); err != nil {
				return
			}
		}
		p.Client.CloseWrite()
	}()
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	got, err := io.ReadAll(p.Server)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes: %v", len(got), len(data), err)
	}
}

func TestConcurrentFlows(t *testing.T) {
	l := open(t, nil, 1024)
	const flows = 200
	var all sync.WaitGroup
	errs := make(chan error, flows)
	for i := range flows {
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 128 << 10})
		all.Add(1)
		go func() {
			defer all.Done()
			rnd := rand.New(rand.NewPCG(uint64(i), 7))
			up, down := make(chan error, 1), make(chan error, 1)
			go func() { up <- loadertest.Send(p.Client, p.Server, uint64(i), rnd.Int64N(2<<20)) }()
			go func() { down <- loadertest.Send(p.Server, p.Client, uint64(i)+1, int64(i)*10000) }()
			if err := errors.Join(<-up, <-down); err != nil {
				errs <- fmt.Errorf("flow %d: %w", i, err)
				return
			}
			if r := p.Wait(loadertest.Patience); r.End != prove.EndEOF {
				errs <- fmt.Errorf("flow %d ended %+v", i, r)
			}
		}()
	}
	stuck := time.AfterFunc(2*loadertest.Patience, func() {
		for i := range l.live {
			if f := l.live[i].Load(); f != nil {
				t.Logf("slot %d:\n%s", i, f.dump())
			}
		}
		t.Error("stuck")
		l.Close()
	})
	all.Wait()
	stuck.Stop()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}
