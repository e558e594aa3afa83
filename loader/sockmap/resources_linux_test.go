package sockmap

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// backlogs counts the directions that have something redirected and not yet written. The kernel retries each
// of them every jiffy.
func backlogs(t *testing.T, l *Engine) (n int) {
	for i := range l.live {
		f := l.live[i].Load()
		if f == nil {
			continue
		}
		for j := range f.directions {
			d := &f.directions[j]
			written, err := d.peer().written()
			loadertest.Must(t, err)
			if written-d.written0 < d.moved() {
				n++
			}
		}
	}
	return n
}

func memAvailable(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/meminfo")
	loadertest.Must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "MemAvailable:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			loadertest.Must(t, err)
			return n << 10
		}
	}
	t.Fatal("no MemAvailable")
	return 0
}

// own is how much CPU this process has used.
func own() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// leastCPU is how much CPU this process uses in the quietest of ten spans: a busy machine may still be at
// what came before.
func leastCPU(span time.Duration) time.Duration {
	least := span
	for range 10 {
		before := own()
		time.Sleep(span)
		if least = min(least, own()-before); least < span/100 {
			break
		}
	}
	return least
}

// 200 flows both of whose readers have stopped, and whose senders push all they can: memory is bounded,
// nothing polls, and all arrives when the readers go on.
func TestStalledFlows(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	// 16 MiB are more than all buffers take.
	stall(t, 16<<20, func(perFlow int64, waiting int, cpu time.Duration) {
		// 2 flow_buffers, and the buffers of the proxy's two sockets at twice their bytes.
		if perFlow > 2*(2<<20)+2*(1<<20+1<<20)*2 {
			t.Errorf("%d bytes a flow are held", perFlow)
		}
		if waiting > 4 { // of 400
			t.Errorf("%d backlogs wait", waiting)
		}
		if cpu > 20*time.Millisecond {
			t.Errorf("%v of CPU in a second", cpu)
		}
	})
}

// Buffers may become so large that TCP's memory is used up, which the kernel does not take from a spliced
// socket as it does from others. All arrives then, too.
func TestStalledFlowsShortOfMemory(t *testing.T) {
	if !loadertest.InNewNetwork(t) {
		return
	}
	_, pressure := tcpsock.Memory("/proc")
	limit := pressure * 3 / 2 // as the kernel sets it
	stall(t, 24<<20, func(perFlow int64, waiting int, cpu time.Duration) {
		if most := limit/stalledFlows + 2*(2<<20); perFlow > most {
			t.Errorf("%d bytes a flow are held, more than %d: TCP's memory and two flow_buffers", perFlow,
				most)
		}
		if waiting > 4 { // of 400
			t.Errorf("%d backlogs wait", waiting)
		}
		// With that of the 400 senders, which the kernel wakes in vain when it is short of memory.
		if cpu > 80*time.Millisecond {
			t.Errorf("%v of CPU in a second", cpu)
		}
	})
}

// Without the bound a flow takes whatever it is sent.
func TestRuleBoundOff(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	r := new(Hooks).Without(ruleBound)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	p.Client.SetWriteDeadline(time.Now().Add(loadertest.Patience))
	n, _ := io.Copy(p.Client, io.LimitReader(loadertest.Zeroes{}, 96<<20))
	if n < 64<<20 {
		t.Errorf("only %d bytes were taken for a reader that does not read: this test proves nothing", n)
	}
	t.Logf("%d MiB were taken for a reader that does not read", n>>20)
}

const stalledFlows = 200

// stall lets both senders of each flow push up to size bytes for readers that begin after judge, when the
// senders write no more.
func stall(t *testing.T, size int64, judge func(perFlow int64, waiting int, cpu time.Duration)) {
	const flows = stalledFlows
	loadertest.Must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4096, Max: 4096}))
	l := open(t, nil, 1024)
	var paths []*loadertest.Path
	for range flows {
		paths = append(paths, loadertest.SplicePath(t, l, loadertest.PathOptions{}))
	}
	runtime.GC()
	before := memAvailable(t)
	var all sync.WaitGroup
	sent, failed := make([]int64, 2*flows), make([]error, 2*flows)
	var stop atomic.Bool
	for i, p := range paths {
		for j, c := range []*net.TCPConn{p.Client, p.Server} {
			all.Add(1)
			go func() {
				defer all.Done()
				for b := make([]byte, 16<<10); sent[2*i+j] < size && failed[2*i+j] == nil && !stop.Load(); {
					var n int
					n, failed[2*i+j] = c.Write(b)
					sent[2*i+j] += int64(n)
				}
				if stop.Load() && errors.Is(failed[2*i+j], os.ErrDeadlineExceeded) {
					failed[2*i+j] = nil
				}
				c.CloseWrite()
			}()
		}
	}
	moved := func() (n int64) {
		for _, p := range paths {
			up, down := p.Count()
			n += up + down
		}
		return n
	}
	for last, still := int64(-1), 0; still < 4; time.Sleep(250 * time.Millisecond) {
		if n := moved(); n == last {
			still++
		} else {
			last, still = n, 0
		}
	}
	held := before - memAvailable(t)
	cpu := leastCPU(time.Second)
	waiting := backlogs(t, l)
	for looks := 0; waiting > 4 && looks < 40; looks++ { // the kernel's workers may be late
		time.Sleep(250 * time.Millisecond)
		waiting = min(waiting, backlogs(t, l))
	}
	// What clients and servers hold is not ours: their buffers are as large as ours.
	t.Logf("%d flows stalled after %d MiB; MemAvailable fell by %d MiB, with the endpoints' buffers; "+
		"%d backlogs wait, %v of CPU in a second",
		flows, moved()>>20, held>>20, waiting, cpu)
	judge(held/flows, waiting, cpu)
	stop.Store(true)
	for _, p := range paths { // and those that write wait no more for room
		now := time.Now()
		loadertest.Must(t, errors.Join(p.Client.SetWriteDeadline(now), p.Server.SetWriteDeadline(now)))
	}

	var drained sync.WaitGroup
	got, broken := make([]atomic.Int64, 2*flows), make([]error, 2*flows)
	for i, p := range paths {
		for j, c := range []*net.TCPConn{p.Client, p.Server} {
			drained.Add(1)
			go func() {
				defer drained.Done()
				broken[2*i+j] = drainSlowly(c, &got[2*i+j], &got[2*i+1-j])
			}()
		}
	}
	all.Wait()
	drained.Wait()
	ended := make(map[*loadertest.Path]bool)
	for i := range got {
		p, want := paths[i/2], sent[i^1]
		n := got[i].Load()
		if n == want && broken[i] == nil || ended[p] {
			continue
		}
		ended[p] = true
		t.Logf("a reader got %d bytes of %d, %v", n, want, broken[i])
		if len(ended) == 1 { // whether it is a timer that they wait for
			for s := range l.live {
				if f := l.live[s].Load(); f != nil {
					t.Logf("flow %d waits:\n%s", s, f.dump())
				}
			}
			out, err := exec.Command("ss", "-tnmoie").CombinedOutput()
			t.Logf("the sockets, %v:\n%s", err, out)
		}
		r := p.Wait(loadertest.Patience)
		t.Logf("its flow ended %+v, %v", r, r.Err)
		if r.End == prove.EndEOF && broken[i] == nil {
			t.Error("bytes are missing, and nobody was told")
		}
	}
	if err := errors.Join(failed...); len(ended) > 0 || err != nil {
		t.Errorf("%d flows did not arrive whole, %v", len(ended), err)
	}
}

// standing is how long a flow may stand still, in pauses of half a minute and more, before it counts as one
// that hangs: TCP's timers back off to two minutes, and one end may have to wait for the other's.
const standing = 4 * time.Minute

// drainSlowly reads all of c, for as long as the flow moves: n and back count what its two readers get. While
// TCP is short of memory, and on a busy machine, that takes long.
func drainSlowly(c *net.TCPConn, n, back *atomic.Int64) error {
	last, since, stood := int64(-1), time.Now(), time.Duration(0)
	for b := make([]byte, 16<<10); ; {
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		m, err := c.Read(b)
		if all := n.Add(int64(m)) + back.Load(); all != last {
			if pause := time.Since(since); pause > 30*time.Second {
				stood += pause
			}
			last, since = all, time.Now()
		}
		switch {
		case err == io.EOF:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && stood+time.Since(since) < standing:
		case err != nil:
			return err
		}
	}
}

// Idle flows have no goroutine and wake nobody, and a sweep does little more with each than read its counts.
func TestIdleFlows(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	var files unix.Rlimit
	loadertest.Must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	few := 2000
	if raceEnabled { // the race detector has memory of its own, so that of a flow is not measured
		few = 500
	}
	// Each is four sockets, and more while it is made.
	flows := loadertest.AtSoak(few, min(20000, int(files.Max)/4-200))
	loadertest.Must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files.Max, Max: files.Max}))
	whileSwept := make(chan func())
	l := openSwept(t, nil, flows, func() {
		select {
		case do := <-whileSwept:
			do()
		default:
		}
	})
	var down, up []*net.TCPConn
	for range flows {
		c, d := loadertest.Connect(t, "tcp4")
		u, s := loadertest.Connect(t, "tcp4")
		t.Cleanup(func() { c.Close(); s.Close() })
		down, up = append(down, d), append(up, u)
	}
	debug.FreeOSMemory() // as the system would get it back in time
	goroutines, rss := runtime.NumGoroutine(), residentSet(t)
	for i := range flows {
		if _, err := loadertest.Splice(t.Context(), l, down[i], up[i],
			Flow{ID: "idle", Buffer: 2 << 20, Idle: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	down, up = nil, nil
	debug.FreeOSMemory()
	loadertest.WaitFor(t, func() bool { return runtime.NumGoroutine()-goroutines <= 2 },
		"idle flows to have no goroutines")
	grown, flow := residentSet(t)-rss, int64(flows)
	t.Logf("resident set grew by %d bytes a flow, of %d", grown/flow, flow)
	if grown/flow > 1536 && !raceEnabled {
		t.Errorf("%d bytes of resident set a flow", grown/flow)
	}
	var sweep, count time.Duration
	swept := make(chan bool)
	whileSwept <- func() { sweep, count = idleCosts(l); close(swept) } // within a second
	<-swept
	ratio := float64(sweep) / float64(count)
	t.Logf("a sweep of an idle flow takes %v, %.1f times what its counts take", sweep/time.Duration(flows), ratio)
	if ratio > 4 { // 2 is usual; one system call makes it much more
		t.Errorf("a sweep of an idle flow takes %.1f times what its counts take", ratio)
	}
	const span, most = 2 * time.Second, 60 // wakes: 15 are usual, a poll every 10 ms makes 100 at least
	wakes, cpu := wakesIn(span)
	// A busy machine may still be at what came before.
	for tries := 1; (wakes > most || cpu > span/2) && tries < 10; tries++ {
		wakes, cpu = wakesIn(span)
	}
	t.Logf("a process with %d idle flows wakes %d times in %v", flows, wakes, span)
	if wakes > most || cpu > span/2 {
		t.Errorf("a process with %d idle flows wakes %d times in %v, and takes %v of CPU", flows, wakes, span, cpu)
	}
}

// wakesIn is how often a thread of this process is woken in a span, and what CPU it takes, in which nothing is
// to be done.
func wakesIn(span time.Duration) (wakes int64, cpu time.Duration) {
	var before, after unix.Rusage
	cpu = own()
	_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
	time.Sleep(span)
	_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
	return after.Nvcsw - before.Nvcsw, own() - cpu
}

// idleCosts gives what it takes, in the quietest of a few tries, to sweep all flows, which are idle, and to
// read their counts. It is for the sweeper.
func idleCosts(l *Engine) (sweep, count time.Duration) {
	least := func(least *time.Duration, do func(*flow)) {
		before := own()
		for i := range l.live {
			do(l.live[i].Load())
		}
		if took := own() - before; *least == 0 || took < *least {
			*least = took
		}
	}
	now := time.Now()
	for range 20 {
		least(&sweep, func(f *flow) { f.sweep(now) })
		least(&count, func(f *flow) { f.count() })
	}
	return sweep, count
}

func residentSet(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/smaps_rollup")
	loadertest.Must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "Rss:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			loadertest.Must(t, err)
			return n << 10
		}
	}
	return 0
}

// Messages over a spliced flow wake nobody here: they take no CPU of this process but that of the two ends.
func TestQuiet(t *testing.T) {
	if n := wakes(t, nil); n != 0 {
		t.Errorf("%d wakes for 500 messages each way", n)
	}
}

func TestRuleQuietOff(t *testing.T) {
	r := new(Hooks).Without(ruleQuiet)
	if n := wakes(t, r); n < 100 {
		t.Errorf("%d wakes for 500 messages each way: this test proves nothing", n)
	}
}

// wakes counts the events that the poller gets while messages go to and fro.
func wakes(t *testing.T, r *Hooks) int {
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	f := l.live[firstLive(l)].Load()
	// A second epoll with the same interest sees what the poller sees, and does not take it away.
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	loadertest.Must(t, err)
	defer unix.Close(fd)
	events := uint32(baseEvents)
	if !r.Keeps(ruleQuiet) {
		events |= unix.EPOLLIN | unix.EPOLLOUT
	}
	for _, s := range f.sockets {
		loadertest.Must(t, unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(s), &unix.EpollEvent{Events: events}))
	}
	list, n, b := make([]unix.EpollEvent, 8), 0, make([]byte, 64)
	for range 500 {
		for _, way := range [][2]*net.TCPConn{{p.Client, p.Server}, {p.Server, p.Client}} {
			if _, err := way[0].Write(b); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(way[1], b); err != nil {
				t.Fatal(err)
			}
			got, err := unix.EpollWait(fd, list, 0)
			loadertest.Must(t, err)
			n += got
		}
	}
	return n
}

// Nothing is left of flows that have ended: no map entry, descriptor, goroutine or kernel memory.
func TestNothingIsLeft(t *testing.T)         { testNothingIsLeft(t, false) }
func TestNothingIsLeftRecorded(t *testing.T) { testNothingIsLeft(t, true) }

func testNothingIsLeft(t *testing.T, recorded bool) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	l := open(t, nil, 64)
	round := func(n int) {
		for i := range n {
			c, d := loadertest.Connect(t, "tcp4")
			u, s := loadertest.Connect(t, "tcp4")
			ended := make(chan string, 1)
			o := Flow{Buffer: 1 << 20, Ended: func(_, _ int64, end string, _ error) { ended <- end }}
			if recorded {
				forget := recordFlow(t, l, d, u, o)
				o.Ended = func(_, _ int64, end string, _ error) { forget(); ended <- end }
			}
			if _, err := loadertest.Splice(t.Context(), l, d, u, o); err != nil {
				t.Fatal(err)
			}
			if f := l.onlyFlow(t); (f.record != nil) != recorded {
				t.Fatalf("the flow's record: %v", f.record)
			}
			for range 3 {
				c.Write([]byte("request"))
				loadertest.Must(t, prove.Expect(s, []byte("request")))
				s.Write([]byte("response"))
				loadertest.Must(t, prove.Expect(c, []byte("response")))
			}
			want := prove.EndEOF
			switch i % 3 {
			case 0:
				s.Close()
				c.Close()
			case 1:
				c.Close()
				s.Close()
			case 2:
				c.SetLinger(0)
				c.Close()
				want = prove.EndDownstreamReset
				s.SetReadDeadline(time.Now().Add(loadertest.Patience))
				s.Read(make([]byte, 1))
				s.Close()
			}
			select {
			case end := <-ended:
				if end != want && want == prove.EndEOF {
					t.Fatalf("flow %d ended with %q", i, end)
				}
			case <-time.After(loadertest.Patience):
				t.Fatalf("flow %d did not end", i)
			}
		}
	}
	left := func() (descriptors, goroutines, left int) {
		loadertest.WaitFor(t, func() bool { return l.flows() == 0 }, "the flows' ends")
		time.Sleep(300 * time.Millisecond)
		runtime.GC()
		fds, err := os.ReadDir("/proc/self/fd")
		loadertest.Must(t, err)
		for _, m := range []*ebpf.Map{l.objects.Flows, l.objects.Places} {
			left += entries(m)
		}
		for i := range uint32(128) {
			var cookie uint64
			for _, m := range []*ebpf.Map{l.objects.Peers, l.objects.Sources} {
				if m.Lookup(i, &cookie) == nil {
					left++
				}
			}
			if l.halves[i].Source != 0 {
				left++
			}
		}
		return len(fds), runtime.NumGoroutine(), left
	}
	round(300)
	d0, g0, e0 := left()
	many, rounds := loadertest.AtSoak(5000, 50_000), 0
	// Others use the machine too: an object a flow is what would be found, and in each of a few rounds.
	for grown := int64(many)*4 + 1; grown > int64(many)*4; rounds++ {
		if rounds == 5 {
			t.Errorf("unreclaimable slab grew by %d KiB again", grown)
			break
		}
		before := slab(t)
		round(many)
		left()
		grown = slab(t) - before
		t.Logf("unreclaimable slab: %d KiB more than %d", grown, before)
	}
	d1, g1, e1 := left()
	// What goes in time is not left.
	for end := time.Now().Add(loadertest.Patience); (d1 > d0 || g1 > g0 || e1 != 0) && time.Now().Before(end); {
		d1, g1, e1 = left()
	}
	if d1 > d0 || g1 > g0 || e0 != 0 || e1 != 0 {
		t.Errorf("descriptors %d then %d, goroutines %d then %d, map entries %d then %d", d0, d1, g0, g1, e0,
			e1)
	}
	if n := l.generation.Load(); n != uint32(rounds*many)+300 {
		t.Errorf("%d flows were spliced", n)
	}
}

func slab(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/meminfo")
	loadertest.Must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "SUnreclaim:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			loadertest.Must(t, err)
			return n
		}
	}
	return 0
}

// What bpftool prints, what TCP_INFO says and what the ends counted are the same, to the
// byte.
func TestFlowsAgree(t *testing.T) {
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Network: "tcp6"})
	loadertest.Must(t, loadertest.ExchangeBytes(p, 123457, 7654321))
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		bpftool = "/usr/sbin/bpftool"
	}
	at, _ := pinnedAt.Load(l)
	out, err := exec.Command(bpftool, "-j", "map", "dump", "pinned", at.(string)+"/flows").Output()
	loadertest.Must(t, err)
	var dump []struct {
		Formatted struct {
			Key   uint64
			Value struct {
				ID, Route, Downstream, Upstream, State string
				DownstreamLocal                        string `json:"downstream_local"`
				UpstreamLocal                          string `json:"upstream_local"`
				Up, Down                               struct{ Bytes, Redirected, Passed, Trimmed int64 }
			}
		}
	}
	loadertest.Must(t, json.Unmarshal(out, &dump))
	if len(dump) != 1 {
		t.Fatalf("%d entries: %s", len(dump), out)
	}
	t.Logf("%s", out)
	d := dump[0].Formatted.Value
	up, down := p.Count()
	if up != 123457 || down != 7654321 || d.Up.Bytes != up || d.Down.Bytes != down {
		t.Errorf("bpftool says %+v, and %d bytes up and %d down are counted", d, up, down)
	}
	if d.ID != "id-"+t.Name() || d.Route != "web/"+t.Name() || d.State != "FLOW_SPLICED" ||
		d.Downstream != p.Client.LocalAddr().String() || d.Upstream != p.Server.LocalAddr().String() ||
		d.DownstreamLocal != p.Client.RemoteAddr().String() ||
		d.UpstreamLocal != p.Server.RemoteAddr().String() {
		t.Errorf("bpftool says %+v", d)
	}
	flow := l.live[firstLive(l)].Load()
	for i, want := range []int64{up, down} {
		got, err := flow.directions[i].source().received()
		loadertest.Must(t, err)
		written, err := flow.directions[i].peer().written()
		loadertest.Must(t, err)
		if int64(got) != want || int64(written-flow.directions[i].written0) != want {
			t.Errorf("direction %d: TCP_INFO says %d received and %d written, the count is %d", i, got,
				written-flow.directions[i].written0, want)
		}
	}
}
