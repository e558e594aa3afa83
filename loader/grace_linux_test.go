package loader

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A flow ends while a program is at work on its process, and the next flow would have its slot: neither do
// the process's bytes go to the next client, nor is the next flow reset because the process has closed its
// socket.
func TestLocalSlotGivenAgain(t *testing.T) {
	for _, network := range networks() {
		for name, atWork := range map[string]func(f *flow, p *path) error{
			"sends": func(_ *flow, p *path) error {
				_, err := p.server.Write([]byte("for the first client only"))
				return err
			},
			"closes": func(f *flow, p *path) error { return p.server.Close() },
		} {
			for _, grace := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s %s grace %v", network, name, grace), func(t *testing.T) {
					r := &hooks{window: 200 * time.Millisecond}
					if !grace { // the next flow has to begin within it, and ends it
						r = (&hooks{window: 10 * time.Second}).without(ruleLocalGrace)
					}
					n := openLocal(t, r)
					n.l.mu.Lock()
					n.l.free = n.l.free[:1] // the next flow has the slot of the one before
					n.l.mu.Unlock()
					ln, _ := cgroup.Listen(t, network)
					first := becomeLocal(t, n, ln)
					f := n.l.onlyFlow(t)
					if name == "closes" {
						_, err := first.client.Write([]byte("not read"))
						must(t, err)
						waitFor(t, func() bool {
							answer, err := f.process.query(skmsgLocalRequestLOCAL_LOOK, 0)
							return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
						}, "the bytes to reach the process's queue")
					}
					was, done := windows(t, n), make(chan error, 1)
					go func() { done <- atWork(f, first) }()
					waitFor(t, func() bool { return windows(t, n) != was }, "the program to be at work")
					first.cancel()
					first.wait(10 * time.Second)
					waitFor(t, func() bool { n.l.mu.Lock(); defer n.l.mu.Unlock(); return len(n.l.free) > 0 },
						"the slot")
					second := becomeLocal(t, n, ln)
					next := n.l.onlyFlow(t).process
					must(t, n.objects.WindowShut.Set(uint32(1)))
					<-done // with an error, where the first client is gone
					err := errors.Join(second.client.SetDeadline(time.Now().Add(10*time.Second)),
						second.server.SetDeadline(time.Now().Add(10*time.Second)))
					must(t, err)
					err = exchangeBytes(second, 1000, 1000)
					if moved := next.moved(1); err == nil && moved != 1000 {
						err = fmt.Errorf("%d of 1000 bytes were counted", moved)
					}
					if err == nil && next.closedUnread() { // and it is about to be reset
						err = errors.New("its process is said to have closed its socket")
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
	must(t, n.objects.Windows.Get(&count))
	return count
}
