package skmsg

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A flow ends while a program is at work on its process, and the next flow would have its slot: neither do
// the process's bytes go to the next client, nor is the next flow reset because the process has closed its
// socket.
func TestLocalSlotGivenAgain(t *testing.T) {
	for _, network := range loadertest.Networks() {
		for name, atWork := range map[string]func(p *loadertest.Path) error{
			"sends": func(p *loadertest.Path) error {
				_, err := p.Server.Write([]byte("for the first client only"))
				return err
			},
			"closes": func(p *loadertest.Path) error { return p.Server.Close() },
		} {
			for _, grace := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s %s grace %v", network, name, grace), func(t *testing.T) {
					r := &sockmap.Hooks{Window: 200 * time.Millisecond, Slots: 1} // the next flow has the slot of the one before
					if !grace {                                                   // the next flow has to begin within it, and ends it
						r = (&sockmap.Hooks{Window: 10 * time.Second, Slots: 1}).Without(ruleLocalGrace)
					}
					n := openLocal(t, r)
					ln, _ := cgroup.Listen(t, network)
					first := loadertest.BecomeLocal(t, n, ln)
					at := onlyProcess(t, n)
					if name == "closes" {
						_, err := first.Client.Write([]byte("not read"))
						loadertest.Must(t, err)
						loadertest.WaitFor(t, func() bool {
							answer, err := at.query(skmsgLocalRequestLOCAL_LOOK, 0)
							return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
						}, "the bytes to reach the process's queue")
					}
					was, done := windows(t, n), make(chan error, 1)
					go func() { done <- atWork(first) }()
					loadertest.WaitFor(t, func() bool { return windows(t, n) != was }, "the program to be at work")
					first.Cancel()
					first.Wait(10 * time.Second)
					second := loadertest.BecomeLocal(t, n, ln)
					next := onlyProcess(t, n)
					loadertest.Must(t, n.objects.WindowShut.Set(uint32(1)))
					<-done // with an error, where the first client is gone
					err := errors.Join(second.Client.SetDeadline(time.Now().Add(10*time.Second)),
						second.Server.SetDeadline(time.Now().Add(10*time.Second)))
					loadertest.Must(t, err)
					err = loadertest.ExchangeBytes(second, 1000, 1000)
					if moved := next.Moved(1); err == nil && moved != 1000 {
						err = fmt.Errorf("%d of 1000 bytes were counted", moved)
					}
					if err == nil && next.ClosedUnread() { // and it is about to be reset
						err = errors.New("its process is said to have closed its socket")
					}
					if n := windows(t, n); n != 1 {
						t.Errorf("programs waited %d times", n)
					}
					if (err == nil) != grace {
						t.Errorf("the second flow: %v", err)
					}
					t.Logf("the second flow: %v", err)
				})
			}
		}
	}
}

func windows(t *testing.T, n *Local) (count uint32) {
	t.Helper()
	loadertest.Must(t, n.objects.Windows.Get(&count))
	return count
}
