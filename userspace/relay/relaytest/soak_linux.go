package relaytest

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// Soak runs the cases about how flows end, and every pair of hands and order, again and again, while something else keeps all
// processors busy: what needs a rare moment comes. Many rounds run at a time (-parallel), since most of a round is waiting. No
// round begins after limit. It prints how many ran, and how many of them failed.
func Soak(t *testing.T, rounds int, limit time.Duration, paths map[string]Path, hands []Hands) {
	burn(t)
	begin := time.Now()
	var ran, failed atomic.Int32
	t.Run("rounds", func(t *testing.T) {
		for i := range rounds {
			t.Run(fmt.Sprint(i+1), func(t *testing.T) {
				t.Parallel()
				if time.Since(begin) > limit {
					return
				}
				t.Cleanup(func() {
					if t.Failed() {
						failed.Add(1)
					}
					if n := ran.Add(1); n%100 == 0 {
						fmt.Printf("soak: %d of %d rounds have run in %v, %d failed\n", n, rounds, time.Since(begin).Round(time.Second), failed.Load())
					}
				})
				soakRound(t, paths, hands)
			})
		}
	})
	fmt.Printf("soak: %d of %d rounds ran in %v, %d failed\n", ran.Load(), rounds, time.Since(begin).Round(time.Second), failed.Load())
	if int(ran.Load()) < rounds {
		t.Errorf("only %d of %d rounds could begin within %v", ran.Load(), rounds, limit)
	}
}

func soakRound(t *testing.T, paths map[string]Path, hands []Hands) {
	size := Size{Behind: 64 << 10, Concurrent: 4, Flow: 64 << 10, Repeat: 1, Slow: true}
	for name, p := range paths {
		p.Dial = func(t testing.TB) (client, server net.Conn) {
			f := p.Connect(t)
			f.Start(context.Background(), relay.Options{})
			return f.Client, f.Server
		}
		for _, c := range Cases() {
			if c.Name == "concurrent flows" || strings.HasPrefix(c.Name, "half-close") || strings.HasPrefix(c.Name, "reset") {
				t.Run(name+"/"+c.Name, func(t *testing.T) { c.Run(t, p, size) })
			}
		}
	}
	quick := slices.DeleteFunc(orders(), func(o order) bool { return o.slow })
	for _, h := range hands {
		if !h.Alone {
			t.Run(h.Name, func(t *testing.T) { eachPair(t, h, quick, false) })
		}
	}
}

// burn keeps all processors busy until the end of the test, with what gives way a little.
func burn(t *testing.T) {
	for range runtime.NumCPU() {
		c := exec.Command("nice", "-n", "5", "sh", "-c", "while :; do :; done")
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.Process.Kill()
			c.Wait()
		})
	}
}
