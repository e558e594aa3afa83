package unit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestNeverDown: flows of each kind, by both datapaths, WebSockets and streams of HTTP/2 live through upgrades, reloads
// and crashes in any order while 200 new ones a second come. No upgrade and no reload costs one, or has those that come
// wait for three times as long as usual. A crash costs no flow that is idle or in the sockmap, and all requests. Whoever
// is cut hears of it within a second. A process that another one has taken over from ends with its last request. At the
// end there is one process, with the descriptors and the maps that it had before the first flow. SEED in the environment
// gives the order of an earlier run.
func TestNeverDown(t *testing.T) {
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "make", "nsenter", "pgrep", "bpftool")
	w := lab.Start(t, options)
	m := boot(t, w.EdgeA)
	target := func(port string) string { return net.JoinHostPort(w.Client.IP4.String(), port) }
	m.write(t, "etc/tailsplice/tailsplice.yaml", fmt.Sprintf(`
listeners:
  - { name: plain, listen: [":9100"], mode: tcp, default: { forward: %[1]q, datapath: userspace } }
  - { name: spliced, listen: [":9101"], mode: tcp, default: { forward: %[1]q, datapath: sockmap } }
  - { name: http, listen: [":9102"], mode: http, default: { forward: %[2]q } }
  - { name: https, listen: [":9103"], mode: https, certificates: [{ files: %[3]s }], default: { forward: %[2]q } }
  - { name: http2, listen: [":9104"], mode: https, certificates: [{ files: %[3]s }], default: { forward: %[2]q, upstream: { protocol: h2c } } }
limits: { connections_per_source: 100000, requests_per_source: 4096 }
`, target("7000"), target("7001"), certificate(t, w, m)))
	m.write(t, "etc/systemd/system/tailsplice.service.d/limits.conf", "[Service]\nWatchdogSec=60\n")
	sendBack(t, w.Client, "7000")
	closeTarget := answerAlike(t, w.Client, "7001")
	m.restart(t)

	seed := rand.Uint64()
	fmt.Sscan(os.Getenv("SEED"), &seed)
	t.Logf("SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	n := &neverDown{crash: &crash{machine: m, world: w}, random: r}
	n.pid = n.main(t)
	before := n.holds(t)
	n.fill(t)
	stop := n.come(t)
	var order []string
	for what, times := range map[string]int{"upgrade": neverDownUpgrades, "reload": neverDownReloads, "kill": neverDownKills} {
		for range times {
			order = append(order, what)
		}
	}
	slices.Sort(order)
	// An upgrade is the last, so that an older process is there for the end of all requests.
	r.Shuffle(len(order)-1, func(i, j int) { order[i], order[j] = order[j], order[i] })
	for i, what := range order {
		n.does(t, i, what)
		n.retire(t)
		n.fill(t)
	}
	stop()
	n.end(t, (*live).isRequest)
	n.leavesNothing(t)
	n.end(t, func(l *live) bool { return !l.isRequest() })
	n.requesters.Range(func(r, _ any) bool { r.(*requester).CloseIdleConnections(); return true })
	closeTarget() // the daemon has idle connections to it
	n.holdsNoMore(t, before)
}

// neverDown is the daemon, and the flows that are to live.
type neverDown struct {
	*crash
	random     *rand.Rand
	all        []*live                      // what takes the place of one is of the same kind
	shared     atomic.Pointer[[]*requester] // whose connections have streams
	phase      atomic.Pointer[string]
	requesters sync.Map  // all there were, as keys
	opened     time.Time // when the last flow was, but for requests
	changed    time.Time // when another process than before was the daemon, at the latest
}

// The kinds of flows.
const (
	idle  = iota // says something at its begin, and when it is asked
	talks        // a message, and its answer, several times a second
	bulk         // a stream of bytes up, which all come down again
	kinds
)

// talkPause is how long a flow that talks is silent at most.
const talkPause = 300 * time.Millisecond

var kindNames = [kinds]string{"idle", "talking", "bulk"}

// A way is how the bytes of a flow go. Each has a port of its own.
type way int

const (
	plain way = iota
	spliced
	webSocket
	secureWebSocket
	http2
)

var wayNames = [...]string{"TCP", "TCP in the sockmap", "WebSocket", "WebSocket in TLS", "HTTP/2"}

func (w way) port() int { return 9100 + int(w) }

// live is a flow, seen from its client. Its bytes are those of a generator, and come back.
type live struct {
	kind    int
	way     way
	by      *requester // of requests: whose connection it has
	in      string     // of requests: the process that has it until its end
	conn    io.ReadWriteCloser
	opened  time.Time
	sends   *rand.ChaCha8
	expects *rand.ChaCha8
	asked   chan chan<- struct{} // has it say something if it is idle, and gets told when that has come back, or has not
	quit    chan struct{}
	moved   atomic.Int64  // how often bytes have come back
	done    chan struct{} // closed when it has ended
	err     error         // why
	at      time.Time
	isKnown bool // that it has ended, and is judged
}

func (l *live) String() string {
	return fmt.Sprintf("%s flow by %s, %v old", kindNames[l.kind], wayNames[l.way], time.Since(l.opened).Round(time.Millisecond))
}

func (l *live) isRequest() bool { return l.by != nil }

// newLive is the i-th of all. Most are idle, and one in thirty has bulk.
func (n *neverDown) newLive(i int) *live {
	l := &live{kind: idle, way: plain + way(i%2), asked: make(chan chan<- struct{}), quit: make(chan struct{}), done: make(chan struct{})}
	switch j := i - neverDownFlows; {
	case j >= 0:
		l.way = [...]way{webSocket, secureWebSocket, http2, http2}[j%4]
		if l.kind = j / 4 % 2; j%100 < 4 { // one of each way
			l.kind = bulk
		}
	case i%50 < 2: // one of each port
		l.kind = bulk
	case i%10 < 4:
		l.kind = talks
	}
	var key [32]byte
	for j := range key {
		key[j] = byte(n.random.Uint32())
	}
	l.sends, l.expects = rand.NewChaCha8(key), rand.NewChaCha8(key)
	return l
}

// fill opens flows until there are enough.
func (n *neverDown) fill(t *testing.T) {
	t.Helper()
	if n.all == nil {
		n.all = make([]*live, neverDownFlows+neverDownRequests)
	}
	var streams []*live
	var groups [][]*live // each is opened one after the other
	isYoung := false     // a flow that is to be kept
	for i, l := range n.all {
		switch {
		case l == nil:
		case !l.hasEnded():
			continue
		case l.err != nil && !l.isKnown:
			t.Errorf("nothing was done, and it took a %v: %v", l, l.err)
		}
		l = n.newLive(i)
		if n.all[i] = l; l.way == http2 {
			streams = append(streams, l)
		} else {
			groups = append(groups, []*live{l})
		}
		isYoung = isYoung || l.way < webSocket
	}
	groups = slices.AppendSeq(groups, slices.Chunk(streams, streamsTogether))
	var all sync.WaitGroup
	room := make(chan struct{}, 16)
	for _, g := range groups {
		all.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			n.open(t, g)
		})
	}
	all.Wait()
	if t.Failed() {
		t.Fatal(n.journal(t))
	}
	if isYoung {
		n.opened = time.Now()
	}
	n.share()
}

// open opens flows, by the same connection if they can share one.
func (n *neverDown) open(t *testing.T, group []*live) {
	var by *requester
	if w := group[0].way; w != plain && w != spliced {
		by = n.requester(w)
	}
	for _, l := range group {
		var err error
		switch l.way {
		case plain, spliced:
			l.conn, err = n.dial(t.Context(), l.way)
		case webSocket, secureWebSocket:
			l.conn, err = by.webSocket(t.Context())
		case http2:
			l.conn, err = by.stream(t.Context())
		}
		if err == nil {
			t.Cleanup(func() { l.conn.Close() })
			err = l.say(100)
		}
		if err != nil {
			t.Errorf("a new %v: %v", l, err)
			return
		}
		if l.opened = time.Now(); by != nil {
			l.by, l.in = by, n.pid
		}
		go l.run()
	}
	if by != nil && by.connections.Load() != 1 {
		t.Errorf("%d requests by %s take %d connections", len(group), wayNames[group[0].way], by.connections.Load())
	}
}

func (l *live) hasEnded() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// timed is a connection that ends if it brings nothing for too long.
type timed struct{ net.Conn }

func (c timed) Read(b []byte) (int, error) {
	c.SetReadDeadline(time.Now().Add(stuck))
	return c.Conn.Read(b)
}

func (c timed) Write(b []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(stuck))
	return c.Conn.Write(b)
}

func (n *neverDown) dial(ctx context.Context, w way) (timed, error) {
	ctx, cancel := context.WithTimeout(ctx, stuck)
	defer cancel()
	c, err := n.world.Client.Dial(ctx, "tcp4", net.JoinHostPort(n.host.IP4.String(), fmt.Sprint(w.port())))
	return timed{c}, err
}

// stuck is how long a flow may bring nothing: a crash takes a few seconds on a busy machine.
const stuck = time.Minute

// say sends bytes, and waits for them to come back.
func (l *live) say(size int) error {
	b := make([]byte, size)
	l.sends.Read(b)
	if _, err := l.conn.Write(b); err != nil {
		return err
	}
	return l.hear(size)
}

func (l *live) hear(size int) error {
	got, want := make([]byte, size), make([]byte, size)
	l.expects.Read(want)
	if k, err := io.ReadFull(l.conn, got); err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", k, size, err)
	}
	if !bytes.Equal(got, want) {
		return errWrong
	}
	l.moved.Add(1)
	return nil
}

var errWrong = errors.New("other bytes came back")

func (l *live) run() {
	defer close(l.done)
	var err error
	for err == nil {
		pause := time.Hour
		switch l.kind {
		case talks:
			pause, err = talkPause/3+rand.N(talkPause*2/3), l.say(700)
		case bulk:
			pause, err = 0, l.bulk(4<<20)
		}
		if err != nil {
			break
		}
		select {
		case <-l.quit:
			return
		case heard := <-l.asked:
			err = l.say(300)
			close(heard)
		case <-time.After(pause):
		}
	}
	l.err, l.at = err, time.Now()
}

// ask has an idle flow say something.
func (l *live) ask() {
	heard := make(chan struct{})
	select {
	case l.asked <- heard:
		<-heard
	case <-l.done:
	}
}

// bulk sends so much, unless it is to quit, while it reads what comes back.
func (l *live) bulk(size int) error {
	const piece = 16 << 10
	sent, wrote := make(chan struct{}, size/piece), make(chan error, 1)
	go func() {
		defer close(sent)
		b := make([]byte, piece)
		for range size / piece {
			select {
			case <-l.quit:
				wrote <- nil
				return
			case <-time.After(2 * time.Millisecond): // a few flows must not be all that the machine does
			}
			l.sends.Read(b)
			sent <- struct{}{}
			if _, err := l.conn.Write(b); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- nil
	}()
	for range sent {
		if err := l.hear(piece); err != nil {
			l.conn.Close() // or the other one goes on
			return errors.Join(err, <-wrote)
		}
	}
	return <-wrote
}

// ends waits for the rest of what the flow has to say, asks for more, and closes it. It was told to quit.
func (l *live) ends(t *testing.T) {
	t.Helper()
	<-l.done
	err := l.err
	if err == nil {
		err = l.say(1000)
	}
	if closed := l.conn.Close(); err == nil {
		err = closed
	}
	if err != nil {
		t.Errorf("the end of a %v: %v", l, err)
	}
}

// end ends flows.
func (n *neverDown) end(t *testing.T, which func(*live) bool) {
	t.Helper()
	var all sync.WaitGroup
	for _, l := range n.all {
		if !l.hasEnded() && which(l) {
			close(l.quit)
			all.Go(func() { l.ends(t) })
		}
	}
	all.Wait()
}

// does does something to the daemon, and looks who has not lived through it.
func (n *neverDown) does(t *testing.T, i int, what string) {
	t.Helper()
	n.waitForOld(t) // whose last request may have ended
	// Those that have lived for less, or have just come to a process, are not kept.
	time.Sleep(max(0, 3*time.Second-time.Since(n.changed), 3*time.Second-time.Since(n.opened)))
	var inKernel map[*live]bool
	if what == "kill" {
		inKernel = n.spliced(t)
	}
	waited := longestPause()
	began := time.Now()
	n.phase.Store(&what)
	switch what {
	case "upgrade":
		n.run(t, "tailsplice", "upgrade")
		n.changes(t, what)
		n.waitForOld(t)
	case "reload":
		n.run(t, "systemctl", "reload", service)
	case "kill":
		n.kills(t, "KILL")
	}
	over := time.Now()
	n.changed = over
	n.hear(t, what)
	calm := ""
	n.phase.Store(&calm)
	var lost [kinds]int
	requests, late := 0, time.Duration(0)
	for _, l := range n.all {
		mayEnd := what == "kill" && (l.isRequest() || l.kind == bulk || l.kind == talks && !inKernel[l])
		if !l.hasEnded() {
			if mayEnd && l.isRequest() {
				t.Errorf("%d: a %v, lives on, and its process does not", i, l)
			}
			continue
		}
		l.isKnown = true
		if late = max(late, l.at.Sub(over)); l.isRequest() {
			requests++
		} else {
			lost[l.kind]++
		}
		if !mayEnd || !wasCut(l.err) {
			t.Errorf("%d, a %s, took a %v: %v", i, what, l, l.err)
		}
	}
	t.Logf("%d: %s in %v; ended: %d idle, %d talking, %d bulk flows, %d requests, the last %v after it", i, what,
		over.Sub(began).Round(time.Millisecond), lost[idle], lost[talks], lost[bulk], requests, late.Round(time.Millisecond))
	// Who talks may say nothing for a while, and this program be kept waiting by others.
	if most := time.Second + talkPause + waited(); late > most {
		t.Errorf("a flow was cut %v after the daemon was there again, want %v at most", late, most)
	}
	if t.Failed() {
		t.Fatal(n.journal(t))
	}
}

// spliced are the flows that are in the sockmap, once some of each kind are that the kernel moves.
func (n *neverDown) spliced(t *testing.T) (found map[*live]bool) {
	t.Helper()
	by := map[string]*live{}
	for _, l := range n.all {
		if c, isTCP := l.conn.(timed); isTCP && l.way == spliced {
			by[c.LocalAddr().String()] = l
		}
	}
	for end := time.Now().Add(stuck); ; time.Sleep(100 * time.Millisecond) {
		var flows []struct{ Client, Datapath string }
		if err := json.Unmarshal([]byte(n.run(t, "tailsplice", "flows", "--json")), &flows); err != nil {
			t.Fatal(err)
		}
		found = map[*live]bool{}
		var of [kinds]int
		for _, f := range flows {
			if l := by[f.Client]; l != nil && f.Datapath == "sockmap" {
				found[l] = true
				of[l.kind]++
			}
		}
		if of[idle] > 0 && of[talks] > 0 {
			t.Logf("%d idle, %d talking, %d bulk flows are in the sockmap", of[idle], of[talks], of[bulk])
			return found
		}
		if time.Now().After(end) {
			t.Fatalf("%v flows of each kind are in the sockmap", of)
		}
	}
}

// longestPause begins to look how long this program is kept waiting, and returns what tells and ends that.
func longestPause() (end func() time.Duration) {
	stop, longest := make(chan struct{}), make(chan time.Duration)
	go func() {
		most := time.Duration(0)
		for {
			began := time.Now()
			select {
			case <-stop:
				longest <- most
				return
			case <-time.After(10 * time.Millisecond):
				most = max(most, time.Since(began))
			}
		}
	}()
	return func() time.Duration {
		close(stop)
		return <-longest
	}
}

// waitForOld waits until an older process has nothing left but requests that live, and is gone without one.
func (n *neverDown) waitForOld(t *testing.T) {
	t.Helper()
	has := map[string]map[*requester]bool{} // the connections of a process
	for _, l := range n.all {
		if l.isRequest() && !l.hasEnded() {
			if has[l.in] == nil {
				has[l.in] = map[*requester]bool{}
			}
			has[l.in][l.by] = true
		}
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var status struct {
			Older []struct{ PID, Flows int }
		}
		if err := json.Unmarshal([]byte(n.run(t, "tailsplice", "status", "--json")), &status); err != nil {
			t.Fatal(err)
		}
		isOver := true
		for _, o := range status.Older {
			c := len(has[fmt.Sprint(o.PID)])
			isOver = isOver && c > 0 && o.Flows <= c
		}
		if isOver {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("an older process has more than the requests that live, or none and is still there:\n%s", n.run(t, "tailsplice", "status"))
		}
	}
}

// hear has idle flows move something, most of which stay idle. After a crash it waits until requests have ended, and
// each other flow that moves has moved something, or ended.
func (n *neverDown) hear(t *testing.T, what string) {
	t.Helper()
	var all sync.WaitGroup
	for _, l := range n.all {
		isCrash, moved := what == "kill", l.moved.Load()
		isOver := isCrash && l.isRequest()
		switch {
		case l.kind == idle && (isOver || n.random.IntN(4) == 0):
			all.Go(l.ask)
		case l.kind != idle && isCrash:
			all.Go(func() {
				// Once may have been on its way. One that goes on and should not is found by who called.
				for end := time.Now().Add(2 * stuck); !l.hasEnded() && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
					if !isOver && l.moved.Load() > moved+1 {
						return
					}
				}
			})
		}
	}
	all.Wait()
}

// come makes 200 connections a second until it is told to stop. None may be refused.
func (n *neverDown) come(t *testing.T) (stop func()) {
	calm := ""
	n.phase.Store(&calm)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var mu sync.Mutex
	took := map[string][]time.Duration{}
	cut := 0
	all.Go(func() {
		tick := time.NewTicker(time.Second / 200)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			all.Go(func() {
				phase, began := *n.phase.Load(), time.Now()
				err := n.newcomer(t.Context(), i)
				mu.Lock()
				defer mu.Unlock()
				switch _, failed := errors.AsType[*notConnected](err); {
				case err == nil:
					took[phase] = append(took[phase], time.Since(began))
				case failed, !wasCut(err), *n.phase.Load() != "kill" && phase != "kill":
					t.Errorf("connection %d, during %q: %v", i, phase, err)
				default:
					cut++
				}
			})
		}
	})
	return func() {
		cancel()
		all.Wait()
		p99 := map[string]time.Duration{}
		for phase, all := range took {
			slices.Sort(all)
			p99[phase] = all[len(all)*99/100]
			t.Logf("%5d connections during %q: first byte p50 %v, p99 %v", len(all), phase, all[len(all)/2], p99[phase])
		}
		if usual := max(p99[calm], neverDownUsual); p99["upgrade"] > 3*usual {
			t.Errorf("the p99 of first bytes is %v during upgrades, want three times %v at most", p99["upgrade"], usual)
		}
		t.Logf("%d were cut by crashes", cut)
	}
}

// leavesNothing: there is one process, with one generation of pinned maps.
func (n *neverDown) leavesNothing(t *testing.T) {
	t.Helper()
	var left string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		processes := strings.Fields(n.run(t, "sh", "-c", "cat /sys/fs/cgroup/system.slice/"+service+"/cgroup.procs"))
		generations := strings.Fields(n.run(t, "sh", "-c", "ls -d /sys/fs/bpf/tailsplice/*/[0-9]* 2>/dev/null || true"))
		if left = fmt.Sprintf("processes %v, generations of maps %v", processes, generations); len(processes) <= 1 && len(generations) <= 1 {
			return
		}
	}
	t.Errorf("a minute later there are %s", left)
}

// holds is what the daemon has: descriptors by what they are of, those that systemd keeps, and slots of its maps.
func (n *neverDown) holds(t *testing.T) map[string]int {
	t.Helper()
	has := map[string]int{}
	for _, to := range strings.Fields(n.run(t, "sh", "-c", "for f in /proc/"+n.pid+"/fd/*; do readlink $f || true; done")) {
		kind, _, _ := strings.Cut(strings.TrimPrefix(to, "anon_inode:"), ":")
		if strings.HasPrefix(to, "/") {
			kind = "file"
		}
		has["descriptors of "+kind]++
	}
	var kept int
	if _, err := fmt.Sscan(n.run(t, "systemctl", "show", "--value", "--property=NFileDescriptorStore", service), &kept); err != nil {
		t.Fatal(err)
	}
	has["descriptors that systemd keeps"] = kept
	for _, name := range []string{"flows", "places"} {
		dump := n.run(t, "bpftool", "--json", "map", "dump", "pinned", "/sys/fs/bpf/tailsplice/default/current/"+name)
		has["slots of "+name] = strings.Count(dump, `"key"`)
	}
	return has
}

// holdsNoMore: a minute after its last flow the daemon has no more than before the first one.
func (n *neverDown) holdsNoMore(t *testing.T, before map[string]int) {
	t.Helper()
	before["descriptors that systemd keeps"] += 2 // the queue of flows
	before["descriptors of socket"] += 2          // its ends here
	before["descriptors of [eventpoll]"]++        // the relay's, which is made when it is needed first
	before["descriptors of pipe"] += 2 * 64       // which it keeps for the next flow
	var more []string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		more = nil
		for what, has := range n.holds(t) {
			if has > before[what] {
				more = append(more, fmt.Sprintf("%d %s, %d before", has, what, before[what]))
			}
		}
		if more == nil {
			return
		}
	}
	slices.Sort(more)
	t.Errorf("a minute after the last flow there are %s\n%s", strings.Join(more, "; "),
		n.run(t, "sh", "-c", "ls -l /proc/"+n.pid+"/fd; ss -antp; ss -axp"))
}

// sendBack sends back what comes to a port.
func sendBack(t *testing.T, h *lab.Host, port string) {
	t.Helper()
	ln, err := h.Listen("tcp", net.JoinHostPort(h.IP4.String(), port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}
