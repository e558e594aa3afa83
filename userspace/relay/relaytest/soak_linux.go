package relaytest

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// A Soak runs the cases about how flows end, and every pair of hands and order, again and again, while
// something else keeps all processors busy: what needs a rare moment comes.
type Soak struct {
	Rounds   int
	Limit    time.Duration  // no round begins later
	Only     *regexp.Regexp // of the names below a round; nil: all
	Paths    map[string]Path
	Hands    []Hands
	Watchdog *Watchdog
}

// Run runs many rounds at a time (-parallel), since most of a round is waiting. It prints how many ran, and
// how many of them failed.
func (s Soak) Run(t *testing.T) {
	burn(t)
	s.Watchdog.Run(t)
	for name, p := range s.Paths {
		s.Paths[name] = s.Watchdog.Path(p)
	}
	for i, h := range s.Hands {
		s.Hands[i].Path = s.Watchdog.Path(h.Path)
	}
	begin := time.Now()
	var ran, failed atomic.Int32
	t.Run("rounds", func(t *testing.T) {
		for i := range s.Rounds {
			t.Run(fmt.Sprint(i+1), func(t *testing.T) {
				t.Parallel()
				if time.Since(begin) > s.Limit {
					return
				}
				t.Cleanup(func() {
					if t.Failed() {
						failed.Add(1)
					}
					if n := ran.Add(1); n%100 == 0 {
						fmt.Printf("soak: %d of %d rounds have run in %v, %d failed\n",
							n, s.Rounds, time.Since(begin).Round(time.Second), failed.Load())
					}
				})
				s.round(t)
			})
		}
	})
	fmt.Printf("soak: %d of %d rounds ran in %v, %d failed\n",
		ran.Load(), s.Rounds, time.Since(begin).Round(time.Second), failed.Load())
	if int(ran.Load()) < s.Rounds {
		t.Errorf("only %d of %d rounds could begin within %v", ran.Load(), s.Rounds, s.Limit)
	}
}

// ends are the cases about how flows end.
var ends = regexp.MustCompile("^(concurrent flows$|half-close|reset)")

func (s Soak) round(t *testing.T) {
	run := func(name string, f func(t *testing.T)) {
		if s.Only == nil || s.Only.MatchString(name) {
			t.Run(name, f)
		}
	}
	size := Size{Behind: 64 << 10, Concurrent: 4, Flow: 64 << 10, Repeat: 1, Slow: true}
	for name, p := range s.Paths {
		p.Dial = func(t testing.TB) (client, server net.Conn) {
			f := p.Connect(t)
			f.Start(context.Background(), relay.Options{})
			return f.Client, f.Server
		}
		for _, c := range Cases() {
			if ends.MatchString(c.Name) {
				run(name+"/"+c.Name, func(t *testing.T) { c.Run(t, p, size) })
			}
		}
	}
	quick := slices.DeleteFunc(orders(), func(o order) bool { return o.slow })
	for _, h := range s.Hands {
		if !h.Alone {
			run(h.Name, func(t *testing.T) { eachPair(t, h, quick, false) })
		}
	}
}

// burn keeps all processors busy until the end of the test, with what gives way a little.
func burn(t *testing.T) {
	for range runtime.NumCPU() {
		background(t, exec.Command("nice", "-n", "5", "sh", "-c", "while :; do :; done"))
	}
}

// background runs c until the end of the test, or of this process.
func background(t *testing.T, c *exec.Cmd) {
	started, stop, stopped := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		runtime.LockOSThread() // its end kills c, and not that of a thread that somebody else has locked
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := c.Start()
		started <- err
		if err == nil {
			<-stop
			c.Process.Kill()
			c.Wait()
		}
	}()
	must(t, <-started)
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
}
