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

// TestNeverDown: flows of each kind, by both datapaths, live through upgrades, reloads and crashes in any order
// while 200 new ones a second come. No upgrade and no reload costs one, a crash none that is idle, and whoever is cut
// by one hears of it soon after. SEED in the environment gives the order of an earlier run.
func TestNeverDown(t *testing.T) {
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "make", "nsenter", "pgrep")
	w := lab.Start(t, options)
	m := boot(t, w.EdgeA)
	target := net.JoinHostPort(w.Client.IP4.String(), "7000")
	m.write(t, "etc/tailsplice/tailsplice.yaml", fmt.Sprintf(`
listeners:
  - { name: plain, listen: [":9100"], mode: tcp, default: { forward: %[1]q, datapath: userspace } }
  - { name: spliced, listen: [":9101"], mode: tcp, default: { forward: %[1]q, datapath: sockmap } }
limits: { connections_per_source: 100000 }
`, target))
	m.write(t, "etc/systemd/system/tailsplice.service.d/limits.conf", "[Service]\nStartLimitIntervalSec=0\nWatchdogSec=60\n")
	sendBack(t, w.Client, "7000")
	m.restart(t)

	seed := rand.Uint64()
	fmt.Sscan(os.Getenv("SEED"), &seed)
	t.Logf("SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	n := &neverDown{crash: &crash{machine: m, world: w}, random: r}
	n.pid = n.main(t)
	n.fill(t)
	stop := n.come(t)
	var order []string
	for what, times := range map[string]int{"upgrade": neverDownUpgrades, "reload": neverDownReloads, "kill": neverDownKills} {
		for range times {
			order = append(order, what)
		}
	}
	slices.Sort(order)
	r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	for i, what := range order {
		n.does(t, i, what)
		n.fill(t)
	}
	stop()
	n.leavesNothing(t)
	if t.Logf("%d flows were in the sockmap when the daemon was killed", n.inKernel); n.inKernel == 0 {
		t.Error("they are none")
	}
	for _, l := range n.all {
		close(l.quit)
	}
	for _, l := range n.all {
		l.ends(t)
	}
}

// neverDown is the daemon, and the flows that are to live.
type neverDown struct {
	*crash
	random   *rand.Rand
	all      []*live
	phase    atomic.Pointer[string]
	changed  time.Time // when another process than before was the daemon, at the latest
	inKernel int       // flows that were spliced in the kernel when the daemon was killed
}

// The kinds of flows.
const (
	idle  = iota // says something at its begin, and when it is asked
	talks        // a message, and its answer, several times a second
	bulk         // a stream of bytes up, which all come down again
	kinds
)

var kindNames = [kinds]string{"idle", "talking", "bulk"}

// live is a flow, seen from its client. Its bytes are those of a generator, and come back.
type live struct {
	kind    int
	port    int
	conn    net.Conn
	opened  time.Time
	sends   *rand.ChaCha8
	expects *rand.ChaCha8
	quit    chan struct{}
	done    chan struct{} // closed when it has ended
	err     error         // why
	at      time.Time
}

// fill opens flows until there are enough, of which most are idle, and one in fifty has bulk.
func (n *neverDown) fill(t *testing.T) {
	t.Helper()
	n.all = slices.DeleteFunc(n.all, func(l *live) bool { return l.hasEnded() })
	for i := len(n.all); i < neverDownFlows; i++ {
		l := &live{kind: idle, port: 9100 + i%2, opened: time.Now(), quit: make(chan struct{}), done: make(chan struct{})}
		switch {
		case i%50 < 2: // one of each port
			l.kind = bulk
		case i%10 < 4:
			l.kind = talks
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		conn, err := n.world.Client.Dial(ctx, "tcp4", net.JoinHostPort(n.host.IP4.String(), fmt.Sprint(l.port)))
		cancel()
		if err != nil {
			t.Fatalf("a new flow: %v\n%s", err, n.journal(t))
		}
		t.Cleanup(func() { conn.Close() })
		var key [32]byte
		for j := range key {
			key[j] = byte(n.random.Uint32())
		}
		l.conn, l.sends, l.expects = conn, rand.NewChaCha8(key), rand.NewChaCha8(key)
		if err := l.say(100); err != nil {
			t.Fatalf("a new flow: %v", err)
		}
		n.all = append(n.all, l)
		go l.run()
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

// stuck is how long a flow may bring nothing: a crash takes a few seconds on a busy machine.
const stuck = time.Minute

// say sends bytes, and waits for them to come back.
func (l *live) say(size int) error {
	b := make([]byte, size)
	l.sends.Read(b)
	l.conn.SetDeadline(time.Now().Add(stuck))
	if _, err := l.conn.Write(b); err != nil {
		return err
	}
	return l.hear(size)
}

func (l *live) hear(size int) error {
	got, want := make([]byte, size), make([]byte, size)
	l.expects.Read(want)
	l.conn.SetReadDeadline(time.Now().Add(stuck))
	if k, err := io.ReadFull(l.conn, got); err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", k, size, err)
	}
	if !bytes.Equal(got, want) {
		return errWrong
	}
	return nil
}

var errWrong = errors.New("other bytes came back")

func (l *live) run() {
	defer close(l.done)
	var err error
	for isOver := false; err == nil && !isOver; {
		pause := time.Hour
		switch l.kind {
		case talks:
			pause, err = time.Duration(100+rand.IntN(200))*time.Millisecond, l.say(700)
		case bulk:
			pause, err = 0, l.stream(4<<20)
		}
		select {
		case <-l.quit:
			isOver = true
		case <-time.After(pause):
		}
	}
	l.err, l.at = err, time.Now()
}

// stream sends so much while it reads what comes back.
func (l *live) stream(size int) error {
	const piece = 16 << 10
	wrote := make(chan error, 1)
	go func() {
		b := make([]byte, piece)
		for range size / piece {
			l.sends.Read(b)
			l.conn.SetWriteDeadline(time.Now().Add(stuck))
			if _, err := l.conn.Write(b); err != nil {
				wrote <- err
				return
			}
			time.Sleep(2 * time.Millisecond) // a few flows must not be all that the machine does
		}
		wrote <- nil
	}()
	for range size / piece {
		if err := l.hear(piece); err != nil {
			l.conn.SetWriteDeadline(time.Now()) // or the other one goes on
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
	if err != nil {
		t.Errorf("a %s flow to %d, %v old: %v", kindNames[l.kind], l.port, time.Since(l.opened).Round(time.Second), err)
	}
	l.conn.Close()
}

// does does something to the daemon, and looks who has not lived through it.
func (n *neverDown) does(t *testing.T, i int, what string) {
	t.Helper()
	// Those that have lived for less, or have just come to a process, are not kept.
	time.Sleep(max(0, 3*time.Second-time.Since(n.changed), 3*time.Second-time.Since(n.all[len(n.all)-1].opened)))
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
		n.inKernel += n.spliced(t)
		n.kills(t, "KILL")
	}
	over := time.Now()
	n.changed = over
	n.hear(t)
	calm := ""
	n.phase.Store(&calm)
	var lost [kinds]int
	late := time.Duration(0)
	for _, l := range n.all {
		if !l.hasEnded() {
			continue
		}
		lost[l.kind]++
		late = max(late, l.at.Sub(over))
		if what != "kill" || l.kind == idle || !isCut(l.err) {
			t.Errorf("%d, a %s, took a %s flow to %d, %v old: %v", i, what, kindNames[l.kind], l.port,
				began.Sub(l.opened).Round(time.Millisecond), l.err)
		}
	}
	t.Logf("%d: %s in %v; ended: %d idle, %d talking, %d bulk flows, the last %v after it", i, what,
		over.Sub(began).Round(time.Millisecond), lost[idle], lost[talks], lost[bulk], late.Round(time.Millisecond))
	if late > 10*time.Second {
		t.Errorf("a flow was cut %v after the daemon was there again", late)
	}
	if t.Failed() {
		t.Fatal(n.journal(t))
	}
}

// spliced is how many flows are in the sockmap.
func (n *neverDown) spliced(t *testing.T) (spliced int) {
	t.Helper()
	var flows []struct{ Datapath string }
	if err := json.Unmarshal([]byte(n.run(t, "tailsplice", "flows", "--json")), &flows); err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if f.Datapath == "sockmap" {
			spliced++
		}
	}
	return spliced
}

// waitForOld waits until no flow is in an older process.
func (n *neverDown) waitForOld(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); strings.Contains(n.run(t, "tailsplice", "status", "--json"), `"older"`); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("an older process is still there:\n%s", n.run(t, "tailsplice", "status"))
		}
	}
}

// hear has each flow that moves move something, or end.
func (n *neverDown) hear(t *testing.T) {
	t.Helper()
	var all sync.WaitGroup
	for _, l := range n.all {
		if l.kind != idle || l.hasEnded() {
			continue
		}
		if n.random.IntN(4) > 0 { // the others stay idle
			continue
		}
		all.Go(func() {
			if err := l.say(300); err != nil {
				t.Errorf("an idle flow to %d, %v old: %v", l.port, time.Since(l.opened).Round(time.Millisecond), err)
			}
		})
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
				err := n.exchange(t.Context(), 9100+i%2)
				mu.Lock()
				defer mu.Unlock()
				switch _, failed := errors.AsType[*notConnected](err); {
				case err == nil:
					took[phase] = append(took[phase], time.Since(began))
				case failed, !isCut(err), *n.phase.Load() != "kill" && phase != "kill":
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
		for phase, all := range took {
			slices.Sort(all)
			t.Logf("%5d connections during %q: first byte p50 %v, p99 %v", len(all), phase, all[len(all)/2], all[len(all)*99/100])
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
