package path

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
	"github.com/tailsplice/tailsplice/userspace/dial"
)

// The checks of TestTargetDies find a target down in fallTime at the latest.
const (
	diesChecks = "check: http, path: /headers, every: 300ms, timeout: 500ms, rise: 2, fall: 2, slow_start: 3s"
	fallTime   = 2*330*time.Millisecond + 500*time.Millisecond
	slowStart  = 3 * time.Second
)

// A visit is a flow of TestTargetDies.
type visit struct {
	began time.Time
	took  time.Duration
	by    string // "a" or "b", the target
	err   error
}

// visits are those that have ended. They come 100 a second, whatever becomes of those before.
type visits struct {
	mu       sync.Mutex
	all      []visit
	underWay atomic.Int64
}

// between are those that began between two times.
func (v *visits) between(from, to time.Time) (some []visit) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, one := range v.all {
		if !one.began.Before(from) && one.began.Before(to) {
			some = append(some, one)
		}
	}
	return some
}

// usual is the median of how long they take.
func usual(some []visit) time.Duration {
	if len(some) == 0 {
		return 0
	}
	var all []time.Duration
	for _, one := range some {
		all = append(all, one.took)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// share is how many of 100 target a had.
func share(some []visit) int {
	n := 0
	for _, one := range some {
		if one.by == "a" {
			n++
		}
	}
	return 100 * n / max(1, len(some))
}

// TestTargetDies: one of two targets dies under load in each way that there is. No flow fails for it but those that a
// process had when it was killed, those that are connected meanwhile have the other target within the time of a dial,
// and once checks have had the time to find it down none is tried there. When it is back it gets connections again, few
// at first.
func TestTargetDies(t *testing.T) {
	s := world(t)
	a, b := s.Cloud, s.Friend
	serve := func(h *lab.Host) *lab.Process {
		t.Helper()
		root, err := lab.Root()
		if err != nil {
			t.Fatal(err)
		}
		p, err := h.StartProcess("target", []string{filepath.Join(root, "build/lab-blog")},
			func(c *lab.Cmd) { c.Env = append(c.Environ(), "LISTEN="+net.JoinHostPort(h.IP4.String(), "7100")) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Stop(0) })
		return p
	}
	one := serve(a)
	serve(b)
	edge := s.edgeA
	config, err := edge.Host.ReadFile(lab.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	s.configure(t, edge, strings.Replace(string(config), limits, fmt.Sprintf(`  - name: dying
    listen: [":9200"]
    mode: tcp
    default: { forward: ["%s:7100", "%s:7100"], health: { %s } }
`, a.IP4, b.IP4, diesChecks)+limits, 1))

	// isUp reports what the checks have found.
	isUp := func() bool {
		out, err := edge.CLI(t.Context(), "status", "--json")
		if err != nil {
			t.Fatal(err)
		}
		var status struct {
			Listeners []struct {
				Name   string
				Routes []struct {
					Targets []struct {
						Target string
						Health struct{ Up bool }
					}
				}
			}
		}
		if err := json.Unmarshal(out, &status); err != nil {
			t.Fatal(err)
		}
		for _, l := range status.Listeners {
			if l.Name == "dying" {
				return l.Routes[0].Targets[0].Health.Up
			}
		}
		t.Fatalf("no listener: %s", out)
		return false
	}
	v := new(visits)
	visitOnce := func() (by string, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		c, err := s.Client.Dial(ctx, "tcp4", net.JoinHostPort(edge.Host.IP4.String(), "9200"))
		if err != nil {
			return "", err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err := fmt.Fprint(c, "GET /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); err != nil {
			return "", err
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		var f struct{ Local string }
		if err := json.NewDecoder(res.Body).Decode(&f); err != nil {
			return "", err
		}
		return map[string]string{a.IP4.String(): "a", b.IP4.String(): "b"}[hostOf(f.Local)], nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	stop := func() { cancel(); load.Wait() }
	defer stop()
	load.Go(func() {
		tick := time.NewTicker(time.Second / 100)
		defer tick.Stop()
		for ctx.Err() == nil {
			<-tick.C
			v.underWay.Add(1)
			load.Go(func() {
				one := visit{began: time.Now()}
				one.by, one.err = visitOnce()
				one.took = time.Since(one.began)
				v.mu.Lock()
				defer v.mu.Unlock()
				v.all = append(v.all, one)
				v.underWay.Add(-1)
			})
		}
	})
	nft := func(script string) error {
		out, err := a.Sh(t.Context(), script)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	var back time.Time
	for _, c := range []struct {
		name    string
		dies    func() error
		lives   func() error
		cutsOld bool // flows that it has
		accepts bool // flows that wait for it until it lives again
	}{
		{"process", func() error { one.Kill(); return nil }, func() error { one = serve(a); return nil }, true, false},
		{"host", func() error { return a.Cut(false) }, a.Restore, false, false},
		{"black hole", func() error {
			return nft("nft 'add table inet hole; add chain inet hole in { type filter hook input priority 0; }; add rule inet hole in tcp dport 7100 drop'")
		}, func() error { return nft("nft delete table inet hole") }, false, false},
		{"accepts and never answers", func() error { return one.Signal(syscall.SIGSTOP) },
			func() error { return one.Signal(syscall.SIGCONT) }, false, true},
	} {
		eventually(t, "both have flows", func() error {
			now := time.Now()
			if n := share(v.between(now.Add(-time.Second), now)); !isUp() || n < 25 {
				return fmt.Errorf("up: %v, %d %% of them", isUp(), n)
			}
			return nil
		})
		before := time.Now()
		lives := sync.OnceValue(c.lives)
		t.Cleanup(func() { lives() })
		if err := c.dies(); err != nil {
			t.Fatal(err)
		}
		died := time.Now()
		// Of a busy machine's second it is found down later, and the load needs as long to see that.
		known := died.Add(fallTime + time.Second)
		time.Sleep(time.Until(known))
		if isUp() {
			t.Errorf("%s: it is up %v after it", c.name, time.Since(died))
		}
		time.Sleep(time.Second)
		over := time.Now()
		if err := lives(); err != nil {
			t.Fatal(err)
		}
		eventually(t, c.name+": it is up again", func() error {
			if !isUp() {
				return errors.New("it is not")
			}
			return nil
		})
		back = time.Now()
		eventually(t, c.name+": flows end", func() error {
			if n := v.underWay.Load(); n > 50 {
				return fmt.Errorf("%d are under way", n)
			}
			return nil
		})
		meanwhile, later := v.between(died, known), v.between(known, over)
		usually := usual(v.between(before.Add(-time.Second), before))
		t.Logf("%s: flows take %v; %d began until it was to be known, %v at most, and %d after that take %v", c.name, usually,
			len(meanwhile), slowest(meanwhile), len(later), usual(later))
		for _, one := range v.between(time.Time{}, back) {
			if one.err != nil && !(c.cutsOld && one.began.Before(died)) {
				t.Errorf("%s: a flow that began %v after it failed: %v", c.name, one.began.Sub(died), one.err)
			}
		}
		for _, one := range meanwhile {
			if !c.accepts && (one.by == "a" || one.took > dial.DefaultTimeout) {
				t.Errorf("%s: a flow that began %v after it has target %s after %v", c.name, one.began.Sub(died), one.by, one.took)
			}
		}
		for _, one := range later {
			if one.by == "a" {
				t.Errorf("%s: a flow that began %v after it has target a", c.name, one.began.Sub(died))
			}
		}
		// One that is tried there first takes a quarter of a second more, or waits for good.
		if got := usual(later); len(later) < 20 || got > usually+200*time.Millisecond {
			t.Errorf("%s: once it is known, %d flows take %v each, and %v before", c.name, len(later), got, usually)
		}
		v.mu.Lock()
		v.all = nil
		v.mu.Unlock()
		if t.Failed() {
			return
		}
	}
	eventually(t, "slow start is over", func() error {
		if since := time.Since(back); since < slowStart+time.Second {
			return fmt.Errorf("it is up since %v", since)
		}
		return nil
	})
	stop()
	for _, l := range edge.LogLines() {
		if l["msg"] == "a target is up again: its health checks succeed" {
			if back, err = time.Parse(time.RFC3339Nano, fmt.Sprint(l["time"])); err != nil {
				t.Fatal(err)
			}
		}
	}
	// In the first fifth it has a tenth of its weight, and then two: 13 % of the flows.
	first, last := v.between(back, back.Add(slowStart/5)), v.between(back.Add(slowStart), time.Now())
	t.Logf("of %d flows a target that is back has %d %%, and of %d later ones %d %%", len(first), share(first), len(last), share(last))
	if len(first) < 20 || len(last) < 40 || 3*share(first) > 2*share(last) {
		t.Error("want half as many more later at least")
	}
}

func slowest(some []visit) (most time.Duration) {
	for _, one := range some {
		most = max(most, one.took)
	}
	return most
}
