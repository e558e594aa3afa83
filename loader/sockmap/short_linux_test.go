package sockmap

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// Short flows that end while they are being inserted.
func TestShortFlows(t *testing.T) {
	l := open(t, nil, 64)
	refused := 0
	for i := range 3000 {
		rnd := rand.New(rand.NewPCG(uint64(i), 3))
		a, b := rnd.Int64N(4<<10), rnd.Int64N(16<<10)
		up, down := make(chan error, 1), make(chan error, 1)
		p, err := loadertest.TrySplice(t, l, loadertest.PathOptions{Before: func(client, server, _, _ *net.TCPConn) {
			client.SetDeadline(time.Now().Add(loadertest.Patience))
			server.SetDeadline(time.Now().Add(loadertest.Patience))
			go func() { up <- loadertest.Send(client, server, 1, a) }()
			go func() { down <- loadertest.Send(server, client, 2, b) }()
		}})
		if err != nil {
			refused++
			for _, way := range [][2]*net.TCPConn{{p.Down, p.Up}, {p.Up, p.Down}} {
				go func() {
					io.Copy(struct{ io.Writer }{way[1]}, struct{ io.Reader }{way[0]})
					way[1].CloseWrite()
				}()
			}
			if rerr := errors.Join(<-up, <-down); rerr != nil {
				t.Fatalf("flow %d, refused with %v: %v", i, err, rerr)
			}
			p.Client.Close()
			p.Server.Close()
			p.Down.Close()
			p.Up.Close()
			continue
		}
		f := l.live[0].Load()
		for s := 1; f == nil && s < 64; s++ {
			f = l.live[s].Load()
		}
		watch := time.AfterFunc(loadertest.Patience/2, func() {
			if f != nil {
				t.Logf("flow %d:\n%s", i, f.dump())
			}
		})
		if err := errors.Join(<-up, <-down); err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		if r := p.Wait(loadertest.Patience); r != (loadertest.Result{Up: a, Down: b, End: prove.EndEOF}) {
			t.Fatalf("flow %d ended %+v", i, r)
		}
		watch.Stop()
		p.Client.Close()
		p.Server.Close()
	}
	t.Logf("%d refused", refused)
}
