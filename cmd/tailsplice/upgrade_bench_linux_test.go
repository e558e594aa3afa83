package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// BenchmarkUpgrade is what an upgrade costs those who are connected. Each number that others have a part in stands
// beside that of who has nothing to do with the upgrade, in the same moments: direct connections, or the time before.
//
//	go test -run '^$' -bench '^BenchmarkUpgrade$' -benchtime 1x ./cmd/tailsplice
func BenchmarkUpgrade(b *testing.B) {
	var files unix.Rlimit
	check(b, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	files.Cur = files.Max
	check(b, unix.Setrlimit(unix.RLIMIT_NOFILE, &files))
	for _, flows := range []int{0, min(10_000, int(files.Max)/3)} { // two files for each, here and in the daemon
		b.Run(fmt.Sprintf("idle=%d", flows), func(b *testing.B) { benchmarkUpgrade(b, flows) })
	}
}

func benchmarkUpgrade(b *testing.B, flows int) {
	const talkers, comers = 32, 4
	d := startUpgradable(b)
	for i := range flows {
		from := net.IPv4(127, 0, 1, byte(i/2000))
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).Dial("tcp", d.edge)
		check(b, err)
		defer c.Close()
		check(b, echo(c))
	}
	var through, direct []*talker
	for range talkers {
		through, direct = append(through, talkTo(b, d.edge)), append(direct, talkTo(b, d.target))
	}
	var pauses, directPauses, usual []time.Duration
	var moved, ratios, came, cameBefore, memory []float64
	for b.Loop() {
		time.Sleep(2 * time.Second) // the last one is over
		old := d.newest()
		before := resident(b, old)
		longest(slices.Concat(through, direct))
		time.Sleep(time.Second)
		usual = append(usual, longest(through)...)
		longest(direct)
		began := time.Now()
		_, err := d.ask("upgrade")
		check(b, err)
		took := time.Since(began)
		wait(b, "all flows have gone over", func() error { // a command for each look would compete with the flows
			var s server.Status
			err := admin.Client{Socket: d.control}.Get(b.Context(), "status", &s)
			if err == nil && s.Flows < flows+talkers {
				err = fmt.Errorf("%d have, and %+v", s.Flows, s.Older)
			}
			return err
		})
		moved = append(moved, (time.Since(began) - took).Seconds())
		ratios = append(ratios, took.Seconds())
		pauses, directPauses = append(pauses, longest(through)...), append(directPauses, longest(direct)...)
		memory = append(memory, resident(b, d.newest())/before)

		// And once more, while new ones come as fast as they can.
		var all sync.WaitGroup
		var n atomic.Int64
		end := make(chan struct{})
		for range comers {
			all.Go(func() {
				for {
					select {
					case <-end:
						return
					default:
					}
					if err := d.newFlow(); err != nil {
						b.Error(err)
						return
					}
					n.Add(1)
				}
			})
		}
		rate := func(during func()) float64 {
			was, began := n.Load(), time.Now()
			during()
			return float64(n.Load()-was) / time.Since(began).Seconds()
		}
		cameBefore = append(cameBefore, rate(func() { time.Sleep(2 * time.Second) }))
		came = append(came, rate(func() {
			_, err := d.ask("upgrade")
			check(b, err)
			time.Sleep(time.Second)
		}))
		close(end)
		all.Wait()
	}
	for _, t := range slices.Concat(through, direct) {
		check(b, t.stop())
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ratios), "s-until-it-accepts")
	b.ReportMetric(median(moved), "s-until-all-have-moved")
	b.ReportMetric(part(pauses, 0.5), "ms-pause-p50")
	b.ReportMetric(part(pauses, 0.99), "ms-pause-p99")
	b.ReportMetric(part(usual, 0.5), "ms-usual-p50")
	b.ReportMetric(part(usual, 0.99), "ms-usual-p99")
	b.ReportMetric(part(directPauses, 0.5), "ms-direct-p50")
	b.ReportMetric(part(directPauses, 0.99), "ms-direct-p99")
	b.ReportMetric(median(memory), "of-the-old-one's-memory")
	b.ReportMetric(median(came)/median(cameBefore), "of-usual-new-flows")
}

// talker has a small message echoed every few milliseconds, each at times of its own: those that go in step wait
// for each other.
type talker struct {
	c       net.Conn
	longest atomic.Int64 // ns that one took
	quit    chan struct{}
	ended   chan error
}

func talkTo(b *testing.B, address string) *talker {
	b.Helper()
	c, err := net.Dial("tcp", address)
	check(b, err)
	t := &talker{c: c, quit: make(chan struct{}), ended: make(chan error, 1)}
	b.Cleanup(func() { c.Close() })
	go func() {
		for {
			began := time.Now()
			if err := echo(c); err != nil {
				t.ended <- err
				return
			}
			t.longest.Store(max(t.longest.Load(), int64(time.Since(began))))
			select {
			case <-t.quit:
				t.ended <- nil
				return
			case <-time.After(5*time.Millisecond + rand.N(10*time.Millisecond)):
			}
		}
	}()
	return t
}

// longest is how long the longest message of each took since it was asked last.
func longest(all []*talker) (times []time.Duration) {
	for _, t := range all {
		times = append(times, time.Duration(t.longest.Swap(0)))
	}
	return times
}

func (t *talker) stop() error {
	close(t.quit)
	return <-t.ended
}

// resident is the memory of a process in bytes.
func resident(b *testing.B, pid int) (kib float64) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(b, err)
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	fmt.Sscan(rest, &kib)
	return kib
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// part is a quantile, in milliseconds.
func part(all []time.Duration, q float64) float64 {
	slices.Sort(all)
	return float64(all[int(float64(len(all)-1)*q)].Microseconds()) / 1000
}
