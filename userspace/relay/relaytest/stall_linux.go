package relaytest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// stillFor is how long nothing of a flow may move before it counts as one that stands still. No case waits
// for as long.
const stillFor = patience / 2

// A Watchdog prints, of each flow that stands still, what there is to know about it, while it does.
type Watchdog struct {
	// Networks are those that the flows' sockets are in, by name. Each runs a function there.
	Networks map[string]func(func() error) error

	// Describe says where the relay has the flow with these counters. The addresses in it are those by which
	// its goroutines are found.
	Describe func(*relay.Counters) string

	mu    sync.Mutex
	flows map[*watchedFlow]bool
}

// A watchedFlow is guarded by Watchdog.mu.
type watchedFlow struct {
	test  string
	flow  *Flow
	moved *relay.Counters

	seen  [4]int64  // bytes of the relay and of the ends, when they had last changed
	since time.Time // when that was seen
	told  bool
}

// Path is p, with flows that are looked at.
func (w *Watchdog) Path(p Path) Path {
	connect := p.Connect
	p.Connect = func(t testing.TB) *Flow {
		f := connect(t)
		start := f.start
		f.start = func(ctx context.Context, o relay.Options) {
			if o.Counters == nil {
				o.Counters = new(relay.Counters)
			}
			x := &watchedFlow{test: t.Name(), flow: f, moved: o.Counters, since: time.Now()}
			w.mu.Lock()
			w.flows[x] = true
			w.mu.Unlock()
			t.Cleanup(func() {
				w.mu.Lock()
				defer w.mu.Unlock()
				delete(w.flows, x)
			})
			start(ctx, o)
		}
		return f
	}
	return p
}

// Run looks at the flows until the end of the test.
func (w *Watchdog) Run(t *testing.T) {
	w.flows = make(map[*watchedFlow]bool)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				w.look()
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
}

func (w *Watchdog) look() {
	var still []*watchedFlow
	w.mu.Lock()
	for x := range w.flows {
		if !x.told && x.still(time.Now()) {
			x.told = true
			still = append(still, x)
		}
	}
	w.mu.Unlock()
	for _, x := range still {
		fmt.Print(w.report(x))
	}
}

// still reports whether x stands still. A flow whose ends are both closed does not.
func (x *watchedFlow) still(now time.Time) bool {
	var seen [4]int64
	seen[0], seen[1] = x.moved.Load()
	open := false
	for i, c := range []net.Conn{x.flow.Client, x.flow.Server} {
		err := onSocket(c, func(fd int) error {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil {
				seen[2+i] = int64(info.Bytes_received + info.Bytes_acked)
			}
			return err
		})
		open = open || err == nil
	}
	if seen != x.seen {
		x.seen, x.since = seen, now
	}
	return open && now.Sub(x.since) > stillFor
}

func (w *Watchdog) report(x *watchedFlow) string {
	var b strings.Builder
	up, down := x.moved.Load()
	fmt.Fprintf(&b, "--- %s stands still, in the hands of %s, after %d bytes up and %d down\n",
		x.test, x.moved.Datapath(), up, down)
	where := w.Describe(x.moved)
	fmt.Fprintln(&b, where)

	var ports []string // of those that dial
	for _, c := range []net.Conn{x.flow.Client, x.flow.Up} {
		if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
			ports = append(ports, fmt.Sprintf("sport = :%d or dport = :%[1]d", a.Port))
		}
	}
	for name, in := range w.Networks {
		fmt.Fprintf(&b, "network %s:\n", name)
		err := in(func() error {
			sockets, err := exec.Command("ss", "-tainmoeOH", "( "+strings.Join(ports, " or ")+" )").Output()
			if err != nil {
				return err
			}
			b.Write(sockets)
			for _, file := range []string{"netstat", "snmp"} {
				all, err := os.ReadFile("/proc/thread-self/net/" + file)
				if err != nil {
					return err
				}
				b.WriteString(tcpCounters(string(all)))
			}
			return nil
		})
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	for _, file := range []string{"/proc/net/sockstat", "/proc/net/softnet_stat"} {
		all, _ := os.ReadFile(file)
		fmt.Fprintf(&b, "%s:\n%s", file, all)
	}
	b.WriteString(goroutinesWith(regexp.MustCompile("0x[0-9a-f]{6,}").FindAllString(where, -1)))
	return b.String()
}

// tcpCounters gives those of TCP that are not 0 in a file of two lines for each protocol, one of names and
// one of values.
func tcpCounters(file string) string {
	var b strings.Builder
	lines := strings.Split(file, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if !strings.HasPrefix(lines[i], "Tcp") || len(names) != len(values) {
			continue
		}
		for k, value := range values[1:] {
			if value != "0" {
				fmt.Fprintf(&b, "%s=%s ", names[1+k], value)
			}
		}
	}
	return b.String() + "\n"
}

// goroutinesWith gives the stacks on which one of those addresses is.
func goroutinesWith(addresses []string) string {
	all := make([]byte, 16<<20)
	all = all[:runtime.Stack(all, true)]
	var b strings.Builder
	for stack := range strings.SplitSeq(string(all), "\n\n") {
		for _, a := range addresses {
			if strings.Contains(stack, a) {
				b.WriteString(stack + "\n\n")
				break
			}
		}
	}
	return b.String()
}
