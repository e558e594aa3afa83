package skmsg

import (
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A daemon that has left captures no sockets, and its flows go on: those that are accepted from then on are
// captured by the next one.
func TestLocalLeave(t *testing.T) {
	ln, _ := cgroup.Listen(t, "tcp4")
	n := openLocal(t, nil)
	p := loadertest.BecomeLocal(t, n, ln)
	loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
	n.Leave()
	next := openLocal(t, nil)
	q := loadertest.BecomeLocal(t, next, ln)
	for _, p := range []*loadertest.Path{p, q} {
		loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
	}
	if at := onlyProcess(t, next); at.Moved(0) != 1000 {
		t.Errorf("%d bytes went past TCP", at.Moved(0))
	}
	var pair skmsgPair
	if n.objects.Caught.NextKey(nil, &pair) == nil { // else the map was full in the end
		t.Error("it has captured a socket since it has left")
	}
	if at := onlyProcess(t, n); at.Moved(0) != 2000 {
		t.Errorf("%d bytes went past TCP where it has left", at.Moved(0))
	}
}

// The same of a flow past TCP, in which some bytes have gone that way and the others go by TCP.
func TestLocalResetBehindOtherWay(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			const limit = 16 << 10
			n := openLocal(t, nil)
			ln, _ := cgroup.Listen(t, network)
			p := loadertest.BecomeLocal(t, n, ln)
			loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 4*limit))
			at := onlyProcess(t, n)
			if at.Moved(1) <= limit {
				t.Fatal("few bytes of the process went past TCP: this test proves nothing")
			}
			// What the process sends goes by TCP.
			loadertest.Must(t, errors.Join(n.objects.LocalPlaces.Delete(at.cookie), p.Client.SetLinger(0)))
			for side := range uint32(2) {
				setLimit(t, n, 2*at.slot+side, limit)
			}
			loadertest.Alone(t, func() {
				for range 3 {
					loadertest.WriteRaw(t, p.Server, prove.Pattern(limit/2))
				}
				loadertest.WriteRaw(t, p.Client, prove.Pattern(limit/2))
				p.Client.Close()
			})
			loadertest.Must(t, errors.Join(p.Server.SetReadDeadline(time.Now().Add(loadertest.Patience)),
				prove.Expect(p.Server, prove.Pattern(limit/2))))
			if n, err := p.Server.Read(make([]byte, 1)); n != 0 ||
				err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("instead of a reset: %d bytes, %v", n, err)
			}
		})
	}
}
