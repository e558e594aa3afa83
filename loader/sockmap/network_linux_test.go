package sockmap

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// lan is two namespaces with a cable between them: the process's own, where the proxy is, and that of both
// ends. They are gone when the process is.
type lan struct {
	t    *testing.T
	here netns.NsHandle
	ends netns.NsHandle
	veth netlink.Link // our end of the cable
}

const (
	lanHere = "10.88.0.1"
	lanEnds = "10.88.0.2"
)

func newLAN(t *testing.T) *lan {
	n := &lan{t: t}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var err error
	n.here, err = netns.Get()
	loadertest.Must(t, err)
	n.ends, err = netns.New() // and enters it
	loadertest.Must(t, err)
	loadertest.Must(t, netns.Set(n.here))
	loadertest.Must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ts-ldr-here"},
		PeerName: "ts-ldr-ends"}))
	n.veth, err = netlink.LinkByName("ts-ldr-here")
	loadertest.Must(t, err)
	peer, err := netlink.LinkByName("ts-ldr-ends")
	loadertest.Must(t, err)
	loadertest.Must(t, netlink.LinkSetNsFd(peer, int(n.ends)))
	up := func(name, addr string) {
		l, err := netlink.LinkByName(name)
		loadertest.Must(t, err)
		a, err := netlink.ParseAddr(addr + "/24")
		loadertest.Must(t, err)
		loadertest.Must(t, netlink.AddrAdd(l, a))
		loadertest.Must(t, netlink.LinkSetUp(l))
	}
	up("ts-ldr-here", lanHere)
	loadertest.Must(t, netns.Set(n.ends))
	up("ts-ldr-ends", lanEnds)
	loadertest.Must(t, netns.Set(n.here))
	return n
}

// atEnds runs f in the namespace of the ends.
func (n *lan) atEnds(f func() error) {
	n.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	loadertest.Must(n.t, netns.Set(n.ends))
	err := f()
	loadertest.Must(n.t, netns.Set(n.here))
	loadertest.Must(n.t, err)
}

// splice makes a flow whose ends are on the other side of the cable.
func (n *lan) splice(l *Engine, o loadertest.PathOptions) *loadertest.Path {
	n.t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	p := &loadertest.Path{T: n.t, Ended: make(chan loadertest.Result, 1), Returns: new(atomic.Int32)}
	listen := func(at string) *net.TCPListener {
		ln, err := lc.Listen(context.Background(), "tcp4", at+":0")
		loadertest.Must(n.t, err)
		return ln.(*net.TCPListener)
	}
	front := listen(lanHere)
	defer front.Close()
	var back *net.TCPListener
	n.atEnds(func() error {
		back = listen(lanEnds)
		c, err := d.Dial("tcp4", front.Addr().String())
		if err == nil {
			p.Client = c.(*net.TCPConn)
		}
		return err
	})
	defer back.Close()
	var err error
	p.Down, err = front.AcceptTCP()
	loadertest.Must(n.t, err)
	c, err := d.Dial("tcp4", back.Addr().String())
	loadertest.Must(n.t, err)
	p.Up = c.(*net.TCPConn)
	p.Server, err = back.AcceptTCP()
	loadertest.Must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	p.Cancel = cancel
	o.Buffer = max(o.Buffer, 1<<20)
	p.Count, err = loadertest.Splice(ctx, l, p.Down, p.Up, p.Flow(ctx, l, o))
	loadertest.Must(n.t, err)
	n.t.Cleanup(func() { cancel(); p.Client.Close(); p.Server.Close() })
	return p
}

// lose drops a part of what comes in at our end of the cable, and of what comes in at the other. By clsact,
// since tcx needs 6.6.
func (n *lan) lose(oneIn int32) {
	const pass, drop = 0, 2 // TC_ACT_OK, TC_ACT_SHOT
	spec := ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.FnGetPrandomU32.Call(),
		asm.Mod.Imm32(asm.R0, oneIn),
		asm.JEq.Imm32(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R0, pass),
		asm.Return(),
		asm.Mov.Imm(asm.R0, drop).WithSymbol("drop"),
		asm.Return(),
	}}
	program, err := ebpf.NewProgram(&spec)
	loadertest.Must(n.t, err)
	defer program.Close() // the filters hold it
	at := n.veth.Attrs().Index
	loadertest.Must(n.t, netlink.QdiscAdd(n.clsact()))
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		loadertest.Must(n.t, netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: at, Parent: parent, Handle: 1,
				Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd: program.FD(), Name: "lose", DirectAction: true,
		}))
	}
}

func (n *lan) clsact() netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: n.veth.Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func TestVeth(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	n, l := newLAN(t), open(t, nil, 64)
	start := time.Now()
	loadertest.Must(t, loadertest.BothWays(n.splice(l, loadertest.PathOptions{}), 128<<20))
	t.Logf("128 MiB each way in %v", time.Since(start))
}

// Loss makes retransmits, and with them segments that come out of order and twice.
func TestLoss(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	n, l := newLAN(t), open(t, nil, 64)
	n.lose(100)
	var all sync.WaitGroup
	for i := range loadertest.AtSoak(20, 60) {
		p := n.splice(l, loadertest.PathOptions{})
		all.Go(func() {
			if err := loadertest.BothWays(p, int64(1+i)<<18); err != nil {
				t.Errorf("flow %d: %v", i, err)
			}
		})
	}
	all.Wait()
	if n := l.stalls(); n != 0 {
		t.Errorf("%d stalls", n)
	}
}

// Nobody repeats a reset that got lost: a probe of keepalive finds the end gone, and the other one is told.
func TestLostReset(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	n := newLAN(t)
	for name, leaves := range map[string]bool{"inside": false, "outside": true} {
		l := open(t, nil, 16)
		for side := range 2 {
			p := n.splice(l, loadertest.PathOptions{Busy: 1 << 40})
			if leaves {
				detachOne(t, l, l.onlyFlow(t), side)
			}
			ours := int(l.onlyFlow(t).sockets[side])
			from, to := p.Client, p.Server
			if side == 1 {
				from, to = to, from
			}
			start := time.Now() // keepalive begins with the last byte
			loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
			loadertest.Must(t, errors.Join(unix.SetsockoptInt(ours, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
				unix.SetsockoptInt(ours, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1),
				unix.SetsockoptInt(ours, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1)))
			n.lose(1)
			from.SetLinger(0)
			from.Close()
			loadertest.Must(t, netlink.QdiscDel(n.clsact()))
			to.SetDeadline(time.Now().Add(loadertest.Patience))
			if read, err := to.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s, side %d: the end was told %d bytes and %v", name, side, read, err)
			}
			if time.Since(start) < 500*time.Millisecond {
				t.Errorf("%s, side %d: the reset was not lost: this proves nothing", name, side)
			}
			p.Wait(loadertest.Patience)
		}
	}
}

// A queueing discipline that drops at once makes TCP send a segment again as new: bytes_sent counts it twice,
// and what is derived from it ends streams too early. Ours is not.
func TestLocalDrops(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	n, l := newLAN(t), open(t, nil, 64)
	// 100 Mbit/s with room for a few segments.
	loadertest.Must(t, netlink.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: n.veth.Attrs().Index, Handle: netlink.MakeHandle(1, 0),
			Parent: netlink.HANDLE_ROOT},
		Rate: 200e6 / 8, Limit: 40000, Buffer: 20000,
	}))
	for i := range 2 {
		p := n.splice(l, loadertest.PathOptions{})
		f := l.live[firstLive(l)].Load()
		counted := int64(0)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				case <-time.After(2 * time.Millisecond):
				}
				f.mu.RLock()
				if !f.isClosed {
					var info unix.TCPInfo
					d := &f.directions[0]
					if d.peer().info(&info) == nil {
						written := info.Bytes_sent - info.Bytes_retrans + uint64(info.Notsent_bytes)
						counted = max(counted, int64(written)-int64(d.moved()))
					}
					w, err := d.peer().written()
					s := d.snapshot()
					// A FIN counts one.
					if all := s.redirected + s.passed; err == nil && w-d.written0 > all+1 {
						t.Errorf("%d bytes are said to be written, of %d", w-d.written0, all)
					}
				}
				f.mu.RUnlock()
			}
		}()
		if err := loadertest.Send(p.Client, p.Server, uint64(i), 1<<20); err != nil {
			t.Fatal(err)
		}
		close(stop)
		<-stopped
		t.Logf("bytes_sent - bytes_retrans + notsent was up to %d bytes too high", counted)
		p.Client.Close()
		p.Server.Close()
		p.Wait(loadertest.Patience)
	}
}

// Without waiting for the backlog what is copied overtakes what was redirected.
func TestRuleOrderOff(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	r := new(Hooks).Without(ruleOrder)
	l := open(t, r, 16)
	for i := range 400 {
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Buffer: 64 << 10, Before: func(client, server, _, up *net.TCPConn) {
			up.SetWriteBuffer(64 << 10)
			server.SetReadBuffer(64 << 10)
		}})
		p.Client.SetDeadline(time.Now().Add(5 * time.Second)) // damage may be a stream that stands
		p.Server.SetDeadline(time.Now().Add(5 * time.Second))
		err := loadertest.Send(p.Client, p.Server, uint64(i), 2<<20)
		p.Client.Close()
		p.Server.Close()
		p.Wait(loadertest.Patience)
		if err != nil {
			t.Logf("flow %d: %v", i, err)
			return
		}
	}
	t.Error("nothing was damaged without the order: this test proves nothing")
}

// Failures that come in a burst switch the datapath off, once, with one line in the log. The flows that were
// refused and those that come after go through userspace, those that live go on.
func TestSwitchOff(t *testing.T) {
	// Its sockmap has the sockets already, so that the kernel refuses them.
	foreign := open(t, nil, 2*burstFailures)
	l := open(t, nil, 16)
	var mu sync.Mutex
	var log bytes.Buffer
	write := writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(b)
	})
	l.log = slog.New(slog.NewTextHandler(write, nil))
	live := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	var all sync.WaitGroup
	var refused atomic.Int32 // by the kernel
	for i := range uint32(2 * burstFailures) {
		all.Go(func() {
			p, err := loadertest.TrySplice(t, l, loadertest.PathOptions{Before: func(_, _, down, _ *net.TCPConn) {
				s, err := dup(down)
				if err == nil {
					err = foreign.objects.Sources.Put(i, uint64(s))
					s.close()
				}
				if err != nil {
					t.Error(err)
				}
			}})
			if errors.Is(err, refusedInsert) {
				refused.Add(1)
			} else if !errors.Is(err, RefusedOff) {
				t.Errorf("a socket that is in another sockmap: %v", err)
				return
			}
			if err := foreign.objects.Sources.Delete(i); err != nil {
				t.Error(err)
			}
			relayed(t, p)
		})
	}
	all.Wait()
	p, err := loadertest.TrySplice(t, l, loadertest.PathOptions{})
	if !errors.Is(err, RefusedOff) {
		t.Fatalf("still on: %v", err)
	}
	relayed(t, p)
	if off, _ := l.Health(); off != refusedInsert.Error() || refused.Load() < burstFailures || l.flows() != 1 {
		t.Errorf("%q after %d were refused, with %d flows", off, refused.Load(), l.flows())
	}
	mu.Lock()
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "switched off") {
		t.Errorf("%d lines in the log:\n%s", n, log.String())
	}
	mu.Unlock()
	loadertest.Must(t, loadertest.BothWays(live, 1<<20))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// Copying is what a direction gets whose source the kernel did not take.
func TestCopying(t *testing.T) {
	r := new(Hooks).Without(ruleBoth)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	f := l.live[firstLive(l)].Load()
	if !f.directions[1].isCopying.Load() {
		t.Fatal("it is not copying")
	}
	loadertest.Must(t, loadertest.BothWays(p, 32<<20))
	p = loadertest.SplicePath(t, l,
		loadertest.PathOptions{Before: func(_, server, _, _ *net.TCPConn) { server.Write([]byte("early")) }})
	loadertest.Must(t, prove.Expect(p.Client, []byte("early")))
	p.Server.SetLinger(0)
	p.Server.Close()
	if r := p.Wait(loadertest.Patience); r.End != prove.EndUpstreamReset || r.Down != 5 {
		t.Errorf("ended %+v", r)
	}
}

// Real multipath TCP is refused by its name, not as a failure of the kernel.
func TestMultipath(t *testing.T) {
	l := open(t, nil, 16)
	lc, d := net.ListenConfig{}, net.Dialer{}
	lc.SetMultipathTCP(true)
	d.SetMultipathTCP(true)
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	loadertest.Must(t, err)
	defer ln.Close()
	c, err := d.Dial("tcp4", ln.Addr().String())
	loadertest.Must(t, err)
	defer c.Close()
	a, err := ln.Accept()
	loadertest.Must(t, err)
	defer a.Close()
	if multipath, err := a.(*net.TCPConn).MultipathTCP(); !multipath {
		t.Skipf("this kernel has no multipath TCP (%v): nothing to refuse", err)
	}
	u, s := loadertest.Connect(t, "tcp4")
	defer u.Close()
	defer s.Close()
	_, err = loadertest.Splice(context.Background(), l, a.(*net.TCPConn), u, Flow{})
	if !errors.Is(err, refusedMultipath) {
		t.Errorf("%v", err)
	}
}
