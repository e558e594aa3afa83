package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/cgroup"
)

func TestLocalSelfTest(t *testing.T) {
	needRoot(t)
	l, err := New(Options{Instance: fmt.Sprintf("ts-ldr-%d-%d", os.Getpid(), instances.Add(1)), MaxFlows: 64,
		Local: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n, err := l.Local()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range l.localFindings() {
		t.Log(f.Name, f.State, f.Detail, f.Took)
		if f.State != StateOK {
			t.Error(f)
		}
	}
	if s := n.Stats().Flows; s != 0 {
		t.Errorf("%d flows are left", s)
	}
}

// Each rule that the self-test is there for makes it fail when it is off.
func TestLocalSelfTestFindsBrokenRules(t *testing.T) {
	for name, c := range map[string]struct {
		off  rule
		test string
	}{
		"order": {ruleLocalOrder, "sk_msg: order"},
		"bound": {ruleLocalBound, "sk_msg: bound"},
	} {
		t.Run(name, func(t *testing.T) {
			n := openLocal(t, new(hooks).without(c.off))
			for _, f := range n.selfTest() {
				if f.Name != c.test {
					continue
				}
				if f.State != StateMissing {
					t.Errorf("%s did not fail: %+v", c.test, f)
				}
				t.Logf("%s: %s", c.test, f.Detail)
			}
		})
	}
}

func openLocal(t testing.TB, r *hooks) *Local {
	t.Helper()
	n, err := open(t, r, 16).Local()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A socket with the addresses of ours, in another network namespace, is none of ours: told by sequence
// numbers.
func TestLocalPair(t *testing.T) {
	for _, on := range []bool{true, false} {
		var r *hooks
		if !on {
			r = r.without(ruleLocalPair)
		}
		n := openLocal(t, r)
		_, down := connect(t, "tcp4")
		up, _ := connect(t, "tcp4")
		_, stranger := connect(t, "tcp4")
		at, err := n.insert(stranger)
		if err != nil {
			t.Fatal(err)
		}
		o := Flow{Buffer: 1 << 20, Ended: func(_, _ int64, _ string, _ error) {}}
		_, err = n.l.spliceConns(context.Background(), down, up, o, at)
		if on && !errors.Is(err, refusedPair) || !on && err != nil {
			t.Errorf("with the rule %v: %v", on, err)
		}
		var cookie uint64
		if err := n.objects.Locals.Lookup(at.pair, &cookie); on && err == nil {
			t.Error("the stranger's socket is still in the map")
		}
	}
}

// An end must not overtake what is on its way to the process's queue. That is only ever much without the
// bound.
func TestLocalDrain(t *testing.T) {
	for _, on := range []bool{true, false} {
		r := new(hooks).without(ruleLocalBound)
		if !on {
			r = r.without(ruleLocalDrain)
		}
		n := openLocal(t, r)
		p := &trial{l: n.l, local: true}
		defer p.close()
		must(t, errors.Join(p.connect(), p.server.SetReadBuffer(32<<10), p.splice()))
		f, data := p.flow(), pattern(512<<10)
		_, err := p.client.Write(data)
		must(t, errors.Join(err, p.client.CloseWrite()))
		waitFor(t, func() bool {
			answer, err := f.process.query(skmsgLocalRequestLOCAL_LOOK, 0)
			return f.process.moved(0) == uint64(len(data)) &&
				(answer&skmsgLocalAnswerLOCAL_BACKLOG == 0 || f.directions[0].isDone.Load() || on) && err == nil
		}, "all to be redirected")
		got, err := io.ReadAll(p.server)
		if on && (err != nil || string(got) != string(data)) {
			t.Errorf("with the rule %d of %d bytes arrived, %v", len(got), len(data), err)
		}
		if !on && len(got) == len(data) {
			t.Error("without the rule all arrived too: it is not needed, or the test is wrong")
		}
		t.Logf("drain %v: %d of %d bytes arrived", on, len(got), len(data))
	}
}

// A process that closes with bytes unread resets the other side, though TCP doesn't know of them.
func TestLocalUnread(t *testing.T) {
	for _, on := range []bool{true, false} {
		var r *hooks
		if !on {
			r = r.without(ruleLocalUnread)
		}
		n := openLocal(t, r)
		ln, _ := cgroup.Listen(t, "tcp4")
		p := becomeLocal(t, n, ln)
		f := n.l.onlyFlow(t)
		_, err := p.client.Write(pattern(1000))
		must(t, err)
		waitFor(t, func() bool {
			answer, err := f.process.query(skmsgLocalRequestLOCAL_LOOK, 0)
			return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
		}, "the bytes to reach the process's queue")
		must(t, p.server.Close())
		long := patience
		if !on { // it may never be told
			long = 5 * time.Second
		}
		must(t, p.client.SetReadDeadline(time.Now().Add(long)))
		_, err = p.client.Read(make([]byte, 1))
		if on != errors.Is(err, unix.ECONNRESET) {
			t.Errorf("with the rule %v the client is told: %v", on, err)
		}
	}
}

// Where the kernel's warning would stop the machine, nothing is put past TCP. The sysctl is covered by a file
// for this thread only, which ends with the test.
func TestPanicsOnWarning(t *testing.T) {
	needRoot(t)
	if panicsOnWarning() {
		t.Fatal("kernel.panic_on_warn is set here")
	}
	file := filepath.Join(t.TempDir(), "one")
	must(t, os.WriteFile(file, []byte("1\n"), 0o600))
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount(file, "/proc/sys/kernel/panic_on_warn", "", unix.MS_BIND, ""))
		if err == nil && !panicsOnWarning() {
			err = errors.New("it was not seen")
		}
		if _, e := loadLocalTargets(nil, 1); err == nil && !errors.Is(e, errors.ErrUnsupported) {
			err = fmt.Errorf("sk_msg began: %w", e)
		}
		done <- err
	}()
	must(t, <-done)
}

func waitFor(t testing.TB, what func() bool, name string) {
	t.Helper()
	for end := time.Now().Add(patience); !what(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", name)
		}
	}
}

// onlyFlow is the one that lives.
func (l *Loader) onlyFlow(t testing.TB) *flow {
	t.Helper()
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			return f
		}
	}
	t.Fatal("there is no flow")
	return nil
}

// becomeLocal makes flows to the listener until one goes past TCP, which is the only one left.
func becomeLocal(t testing.TB, n *Local, ln net.Listener) *path {
	t.Helper()
	network := "tcp4"
	if addrPort(ln.Addr()).Addr().Is6() {
		network = "tcp6"
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		p := &path{t: t, ended: make(chan result, 1)}
		p.client, p.down = connect(t, network)
		up, err := net.Dial(network, ln.Addr().String())
		must(t, err)
		server, err := ln.Accept()
		must(t, err)
		p.up, p.server = up.(*net.TCPConn), server.(*net.TCPConn)
		ctx, cancel := context.WithCancel(context.Background())
		p.cancel = cancel
		t.Cleanup(func() { cancel(); p.client.Close(); p.server.Close() })
		p.count, err = n.Splice(ctx, p.down, p.up,
			Flow{ID: "local", Buffer: 1 << 20,
				Ended: func(up, down int64, end string, err error) { p.ended <- result{up, down, end, err} }})
		if err == nil {
			return p
		}
		p.down.Close()
		p.up.Close()
		p.client.Close()
		p.server.Close()
		if time.Now().After(end) {
			t.Fatalf("the target does not become local: %+v", n.Stats())
		}
	}
}

// The program is attached to the cgroup of the target, and nowhere else; and a daemon that is killed leaves
// nothing there.
func TestLocalAttachment(t *testing.T) {
	needRoot(t)
	instance := fmt.Sprintf("ts-ldr-local-%d", os.Getpid())
	if i := os.Getenv("TS_LDR_LOCAL"); i != "" {
		l, err := load(Options{Instance: i, MaxFlows: 16, Local: true}, nil)
		must(t, err)
		n, err := l.Local()
		must(t, err)
		ln, err := net.FileListener(os.NewFile(3, "listener"))
		must(t, err)
		becomeLocal(t, n, ln)
		fmt.Println("ready")
		select {}
	}
	pins := filepath.Join(defaultBPFFS, "tailsplice", instance)
	t.Cleanup(func() { os.RemoveAll(pins) })
	ln, dir := cgroup.Listen(t, "tcp4")
	file, err := ln.(*net.TCPListener).File()
	must(t, err)
	defer file.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLocalAttachment$")
	cmd.Env, cmd.ExtraFiles = append(os.Environ(), "TS_LDR_LOCAL="+instance), []*os.File{file}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	b := make([]byte, 5)
	if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready" {
		t.Fatalf("%q %v", b, err)
	}
	if n := attached(t, dir); n != 1 {
		t.Errorf("%d programs are attached to the target's cgroup", n)
	}
	if n := attached(t, filepath.Dir(dir)); n != 0 {
		t.Errorf("%d programs are attached to the root of all cgroups", n)
	}
	must(t, cmd.Process.Kill())
	cmd.Wait()
	waitFor(t, func() bool { return attached(t, dir) == 0 }, "the dead daemon's program to go")

	l, err := load(Options{Instance: instance, MaxFlows: 16, Local: true}, nil)
	must(t, err)
	n, err := l.Local()
	must(t, err)
	p := becomeLocal(t, n, ln)
	must(t, bothWays(p, 1<<20))
	must(t, l.Close())
	if n := attached(t, dir); n != 0 {
		t.Errorf("%d programs are attached after the end", n)
	}
	if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
}

func attached(t testing.TB, dir string) int {
	t.Helper()
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(d.Fd()), Attach: ebpf.AttachCGroupSockOps})
	must(t, err)
	return len(r.Programs)
}

// Streams that end at the same moment have both ended: a FIN that comes to a closed socket is nothing unread.
func TestLocalCloseAtOnce(t *testing.T) {
	n := openLocal(t, nil)
	ln, _ := cgroup.Listen(t, "tcp4")
	for range 200 {
		p := becomeLocal(t, n, ln)
		must(t, exchangeBytes(p, 1000, 1000))
		closed := make(chan error, 1)
		go func() { closed <- p.client.Close() }()
		must(t, errors.Join(p.server.Close(), <-closed))
		if r := p.wait(patience); r.end != endEOF {
			t.Fatalf("ended %+v", r)
		}
	}
}
