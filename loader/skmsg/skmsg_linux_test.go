package skmsg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/pins"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// Each rule that the self-test is there for makes it fail when it is off.
func TestLocalSelfTestFindsBrokenRules(t *testing.T) {
	for name, c := range map[string]struct {
		off  sockmap.Rule
		test string
	}{
		"order": {ruleLocalOrder, "sk_msg: order"},
		"bound": {ruleLocalBound, "sk_msg: bound"},
	} {
		t.Run(name, func(t *testing.T) {
			n := openLocal(t, new(sockmap.Hooks).Without(c.off))
			for _, f := range n.SelfTest() {
				if f.Name != c.test {
					continue
				}
				if f.State != host.StateMissing {
					t.Errorf("%s did not fail: %+v", c.test, f)
				}
				t.Logf("%s: %s", c.test, f.Detail)
			}
		})
	}
}

// openLocal loads the datapath for one test, with hooks, and closes it after.
func openLocal(t testing.TB, h *sockmap.Hooks) *Local {
	t.Helper()
	g, err := pins.Claim(loadertest.OwnBPFFS(t, "0700"), "ts-ldr", HoldsUnread, loadertest.LogTo(t))
	loadertest.Must(t, err)
	c := sockmap.Config{MaxFlows: 16, Pin: g.Pin, Log: loadertest.LogTo(t), Hooks: h}
	l, err := sockmap.Load(c)
	loadertest.Must(t, err)
	n, err := Load(l, c)
	loadertest.Must(t, err)
	loadertest.Must(t, errors.Join(g.Publish(), l.Start(func(time.Time) bool { n.Sweep(); return true })))
	t.Cleanup(func() {
		if err := errors.Join(l.Stop(), n.Close(), g.Release(), l.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

// onlyProcess is that of the only flow, which has begun.
func onlyProcess(t testing.TB, n *Local) *process {
	t.Helper()
	for slot := range n.flows {
		if f := &n.flows[slot]; f.On != 0 {
			p := &process{local: n, pair: f.Pair, cookie: f.Process, slot: uint32(slot)}
			p.isPrepared.Store(true)
			return p
		}
	}
	t.Fatal("there is no flow")
	return nil
}

// halfOf is what the maps say of a direction.
func halfOf(t testing.TB, n *Local, index uint32) (h skmsgHalf) {
	t.Helper()
	loadertest.Must(t, n.l.Shared()["halves"].Lookup(index, &h))
	return h
}

// setLimit is for a direction that does not move.
func setLimit(t testing.TB, n *Local, index, limit uint32) {
	t.Helper()
	h := halfOf(t, n, index)
	h.Limit = limit
	loadertest.Must(t, n.l.Shared()["halves"].Put(index, h))
}

// hasFIN reports whether the other end has ended its stream.
func hasFIN(t testing.TB, c *net.TCPConn) (is bool) {
	t.Helper()
	raw, err := c.SyscallConn()
	loadertest.Must(t, err)
	loadertest.Must(t, raw.Control(func(fd uintptr) { is = !tcpsock.IsEstablished(int(fd)) }))
	return is
}

// A socket with the addresses of ours, in another network namespace, is none of ours: told by sequence
// numbers.
func TestLocalPair(t *testing.T) {
	for _, on := range []bool{true, false} {
		var r *sockmap.Hooks
		if !on {
			r = r.Without(ruleLocalPair)
		}
		n := openLocal(t, r)
		_, down := loadertest.Connect(t, "tcp4")
		up, _ := loadertest.Connect(t, "tcp4")
		_, stranger := loadertest.Connect(t, "tcp4")
		at, err := n.insert(stranger)
		if err != nil {
			t.Fatal(err)
		}
		o := sockmap.Flow{Buffer: 1 << 20, Ended: func(_, _ int64, _ string, _ error) {}}
		_, err = prove.OfConns(down, up, func(down, up int) (func() (up, down int64), error) {
			return n.l.SpliceBy(context.Background(), down, up, o, at)
		})
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
		r := new(sockmap.Hooks).Without(ruleLocalBound)
		if !on {
			r = r.Without(ruleLocalDrain)
		}
		n := openLocal(t, r)
		client, down := loadertest.Connect(t, "tcp4")
		up, server := loadertest.Connect(t, "tcp4")
		defer client.Close()
		defer server.Close()
		at, err := n.insert(server)
		loadertest.Must(t, errors.Join(err, server.SetReadBuffer(32<<10)))
		_, err = prove.OfConns(down, up, func(down, up int) (func() (up, down int64), error) {
			return n.l.SpliceBy(t.Context(), down, up, sockmap.Flow{Buffer: 1 << 20}, at)
		})
		loadertest.Must(t, err)
		data := prove.Pattern(512 << 10)
		_, err = client.Write(data)
		loadertest.Must(t, errors.Join(err, client.CloseWrite()))
		loadertest.WaitFor(t, func() bool {
			answer, err := at.query(skmsgLocalRequestLOCAL_LOOK, 0)
			return at.Moved(0) == uint64(len(data)) &&
				(answer&skmsgLocalAnswerLOCAL_BACKLOG == 0 || hasFIN(t, server) || on) && err == nil
		}, "all to be redirected")
		got, err := io.ReadAll(server)
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
		var r *sockmap.Hooks
		if !on {
			r = r.Without(ruleLocalUnread)
		}
		n := openLocal(t, r)
		ln, _ := cgroup.Listen(t, "tcp4")
		p := loadertest.BecomeLocal(t, n, ln)
		at := onlyProcess(t, n)
		_, err := p.Client.Write(prove.Pattern(1000))
		loadertest.Must(t, err)
		loadertest.WaitFor(t, func() bool {
			answer, err := at.query(skmsgLocalRequestLOCAL_LOOK, 0)
			return answer&skmsgLocalAnswerLOCAL_QUEUE != 0 && err == nil
		}, "the bytes to reach the process's queue")
		loadertest.Must(t, p.Server.Close())
		long := loadertest.Patience
		if !on { // it may never be told
			long = 5 * time.Second
		}
		loadertest.Must(t, p.Client.SetReadDeadline(time.Now().Add(long)))
		_, err = p.Client.Read(make([]byte, 1))
		if on != errors.Is(err, unix.ECONNRESET) {
			t.Errorf("with the rule %v the client is told: %v", on, err)
		}
	}
}

// Where the kernel's warning would stop the machine, nothing is put past TCP. The sysctl is covered by a file
// for this thread only, which ends with the test.
func TestPanicsOnWarning(t *testing.T) {
	loadertest.NeedRoot(t)
	if panicsOnWarning() {
		t.Fatal("kernel.panic_on_warn is set here")
	}
	file := filepath.Join(t.TempDir(), "one")
	loadertest.Must(t, os.WriteFile(file, []byte("1\n"), 0o600))
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount(file, "/proc/sys/kernel/panic_on_warn", "", unix.MS_BIND, ""))
		if err == nil && !panicsOnWarning() {
			err = errors.New("it was not seen")
		}
		if _, e := Load(nil, sockmap.Config{}); err == nil && !errors.Is(e, errors.ErrUnsupported) {
			err = fmt.Errorf("sk_msg began: %w", e)
		}
		done <- err
	}()
	loadertest.Must(t, <-done)
}

// Streams that end at the same moment have both ended: a FIN that comes to a closed socket is nothing unread.
func TestLocalCloseAtOnce(t *testing.T) {
	n := openLocal(t, nil)
	ln, _ := cgroup.Listen(t, "tcp4")
	for range 200 {
		p := loadertest.BecomeLocal(t, n, ln)
		loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
		closed := make(chan error, 1)
		go func() { closed <- p.Client.Close() }()
		loadertest.Must(t, errors.Join(p.Server.Close(), <-closed))
		if r := p.Wait(loadertest.Patience); r.End != prove.EndEOF {
			t.Fatalf("ended %+v", r)
		}
	}
}
