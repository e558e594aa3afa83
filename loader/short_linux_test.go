package loader

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"
)

// Short flows that end while they are being inserted.
func TestShortFlows(t *testing.T) {
	l := open(t, nil, 64)
	refused := 0
	for i := range 3000 {
		rnd := rand.New(rand.NewPCG(uint64(i), 3))
		a, b := rnd.Int64N(4<<10), rnd.Int64N(16<<10)
		up, down := make(chan error, 1), make(chan error, 1)
		p, err := trySplice(t, l, pathOptions{before: func(client, server, _, _ *net.TCPConn) {
			client.SetDeadline(time.Now().Add(patience))
			server.SetDeadline(time.Now().Add(patience))
			go func() { up <- send(client, server, 1, a) }()
			go func() { down <- send(server, client, 2, b) }()
		}})
		if err != nil {
			refused++
			for _, way := range [][2]*net.TCPConn{{p.down, p.up}, {p.up, p.down}} {
				go func() {
					io.Copy(struct{ io.Writer }{way[1]}, struct{ io.Reader }{way[0]})
					way[1].CloseWrite()
				}()
			}
			if rerr := errors.Join(<-up, <-down); rerr != nil {
				t.Fatalf("flow %d, refused with %v: %v", i, err, rerr)
			}
			p.client.Close()
			p.server.Close()
			p.down.Close()
			p.up.Close()
			continue
		}
		f := l.live[0].Load()
		for s := 1; f == nil && s < 64; s++ {
			f = l.live[s].Load()
		}
		watch := time.AfterFunc(patience/2, func() {
			if f != nil {
				t.Logf("flow %d:\n%s", i, f.dump())
			}
		})
		if err := errors.Join(<-up, <-down); err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		if r := p.wait(patience); r != (result{up: a, down: b, end: endEOF}) {
			t.Fatalf("flow %d ended %+v", i, r)
		}
		watch.Stop()
		p.client.Close()
		p.server.Close()
	}
	t.Logf("%d refused", refused)
}
