package sockmap

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// What a side sent before its reset arrives, though it waits in the kernel's queue behind bytes that go the
// other way, which nobody takes any more. The worker that empties the queue runs on this thread's processor,
// and gets none of its time before the reset is there.
func TestResetBehindOtherWay(t *testing.T) {
	for _, late := range []bool{true, false} {
		var r *Hooks
		if !late {
			r = r.Without(ruleLate)
		}
		l := open(t, r, 16)
		for _, network := range loadertest.Networks() {
			for name, way := range loadertest.Ways {
				when := map[bool]string{true: "late", false: "at once"}[late]
				ok := t.Run(name+" "+network+" "+when, func(t *testing.T) {
					const limit = 16 << 10
					patience := loadertest.Patience
					if !late { // they never come
						patience = 3 * time.Second
					}
					try := func() (p *loadertest.Path, to *net.TCPConn, err error) {
						p = loadertest.SplicePath(t, l, loadertest.PathOptions{Network: network, Buffer: limit})
						loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
						from, to := way(p)
						burst, other := prove.Pattern(limit/2), prove.Pattern(limit/2)
						loadertest.Must(t, from.SetLinger(0))
						loadertest.Alone(t, func() {
							for range 3 { // two are redirected, and the third one is passed
								loadertest.WriteRaw(t, to, other)
							}
							loadertest.WriteRaw(t, from, burst)
							from.Close()
						})
						loadertest.Must(t, to.SetReadDeadline(time.Now().Add(patience)))
						return p, to, prove.Expect(to, burst)
					}
					if !late {
						for range 10 { // a virtual machine's processor may stop, and others run meanwhile
							if _, _, err := try(); err != nil {
								return
							}
						}
						t.Error("the bytes arrive without the rule: this test proves nothing")
						return
					}
					p, to, err := try()
					loadertest.Must(t, err)
					if n, err := to.Read(make([]byte, 1)); n != 0 ||
						err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("instead of a reset: %d bytes, %v", n, err)
					}
					want := map[string]string{"up": prove.EndDownstreamReset, "down": prove.EndUpstreamReset}[name]
					if end := p.Wait(loadertest.Patience); end.End != want {
						t.Errorf("ended %+v, want %s", end, want)
					}
				})
				if !ok {
					return
				}
			}
		}
	}
}
