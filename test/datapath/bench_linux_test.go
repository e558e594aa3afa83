package datapath

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// BenchmarkDatapaths compares, on loopback and in one process, so only the ratios mean something.
// CPU is the whole machine's, since softirqs and kworkers are nobody's.
func BenchmarkDatapaths(b *testing.B) {
	needRoot(b)
	l, local := loadLocal(b, "bench")
	target, _ := cgroup.Listen(b, "tcp4")
	becomeKnown(b, local, relaytest.Loopback{Server: target, Options: relay.Options{Datapaths: []datapath.Datapath{local}}}.Path(b))
	for _, d := range []struct {
		name   string
		list   []datapath.Datapath
		server net.Listener
	}{{"userspace", nil, nil}, {"sockmap", []datapath.Datapath{l}, nil}, {"sk_msg", []datapath.Datapath{local}, target}} {
		start := func(b *testing.B) (client, server net.Conn) {
			lb := relaytest.Loopback{Server: d.server, Options: relay.Options{Datapaths: d.list}}
			f := lb.Path(b).Connect(b)
			f.Start(context.Background(), relay.Options{})
			b.Cleanup(func() { f.Client.Close(); f.Server.Close() })
			return f.Client, f.Server
		}
		b.Run("bulk/"+d.name, func(b *testing.B) {
			client, server := start(b)
			b.SetBytes(1 << 20)
			go func() {
				buf := make([]byte, 64<<10)
				for range b.N * 16 {
					if _, err := client.Write(buf); err != nil {
						return
					}
				}
				client.(*net.TCPConn).CloseWrite()
			}()
			before, t := busy(b), time.Now()
			n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{server}, make([]byte, 256<<10))
			if n != int64(b.N)<<20 || err != nil {
				b.Fatal(n, err)
			}
			cpu := busy(b) - before
			b.ReportMetric(cpu.Seconds()/(float64(n)/(1<<30)), "cpu-s/GiB")
			_ = t
		})
		for _, conns := range []int{1, 32} {
			b.Run(fmt.Sprintf("rtt%d/%s", conns, d.name), func(b *testing.B) {
				var all sync.WaitGroup
				var mu sync.Mutex
				var times []time.Duration
				rounds := max(b.N/conns, 1)
				var pairs [][2]net.Conn
				for range conns {
					c, s := start(b)
					pairs = append(pairs, [2]net.Conn{c, s})
				}
				before := busy(b)
				b.ResetTimer()
				for _, p := range pairs {
					go func() {
						buf := make([]byte, 64)
						for {
							if _, err := io.ReadFull(p[1], buf); err != nil {
								return
							}
							if _, err := p[1].Write(buf); err != nil {
								return
							}
						}
					}()
					all.Go(func() {
						buf, mine := make([]byte, 64), make([]time.Duration, 0, rounds)
						for range rounds {
							t := time.Now()
							if _, err := p[0].Write(buf); err != nil {
								b.Error(err)
								return
							}
							if _, err := io.ReadFull(p[0], buf); err != nil {
								b.Error(err)
								return
							}
							mine = append(mine, time.Since(t))
						}
						mu.Lock()
						times = append(times, mine...)
						mu.Unlock()
					})
				}
				all.Wait()
				b.StopTimer()
				slices.Sort(times)
				b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-us")
				b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-us")
				b.ReportMetric((busy(b)-before).Seconds()*1e6/float64(len(times)), "cpu-us/rtt")
			})
		}
	}
}

// busy is how long the machine's CPUs have worked since boot.
func busy(b *testing.B) time.Duration {
	s, err := os.ReadFile("/proc/stat")
	if err != nil {
		b.Fatal(err)
	}
	var user, nice, system, idle, wait, irq, softirq int64
	line, _, _ := strings.Cut(string(s), "\n")
	if _, err := fmt.Sscanf(line, "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &irq, &softirq); err != nil {
		b.Fatal(err)
	}
	return time.Duration(user+nice+system+irq+softirq) * 10 * time.Millisecond
}
