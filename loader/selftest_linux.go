package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// testPatience bounds one wait of the self-test; bytes that come one after another get it each time, since a busy machine
// may be slow and is not wrong.
const testPatience = 3 * time.Second

// SelfTest loads the programs beside whatever runs, and gives the verdicts of the self-test: what New would find.
// It takes about 0.2 s, and touches loopback only.
func SelfTest(o Options) []Finding {
	// Containers may share the BPF file system, and have processes of one number.
	o.Instance, o.MaxFlows = fmt.Sprintf("selftest-%d-%x", os.Getpid(), time.Now().UnixNano()), 64
	if err := refuseKnownBad(o.KnownBad); err != nil {
		return []Finding{{Name: "version", State: StateMissing, Detail: err.Error(), Advice: "use a newer kernel; flows go through userspace meanwhile"}}
	}
	l, err := load(o, nil)
	if err != nil {
		return []Finding{{Name: "load", State: StateMissing, Detail: explain(err).Error(), Advice: "see the findings about the machine"}}
	}
	findings := l.selfTest()
	if o.Local {
		l.proveLocal()
		findings = append(findings, l.localFindings()...)
	}
	if err := l.Close(); err != nil {
		findings = append(findings, Finding{Name: "close", State: StateDegraded, Detail: err.Error()})
	}
	return findings
}

// SelfTest gives the verdicts that New found.
func (l *Loader) SelfTest() []Finding { return l.findings }

func failed(findings []Finding) error {
	for _, f := range findings {
		if f.State == StateMissing || f.Lacks {
			return &SelfTestError{findings}
		}
	}
	return nil
}

// errUntried: a test could not be made, which is no verdict.
var errUntried = errors.New("not tried")

var errNoLoopback = errors.New("connect over loopback")

// test is one test of the self-test.
type test struct {
	name, proves string
	run          func(*trial) error
	advice       string // where it could not be made
}

func (l *Loader) selfTest() []Finding {
	return l.try(false, []test{
		{"redirect", "bytes go both ways, whole, without passing through the process", (*trial).redirect, ""},
		{"kick", "bytes that were queued before the splice arrive", (*trial).kick, ""},
		{"trim", "an skb that was read in part is cut where cb[0] says", (*trial).trim, ""},
		{"overlap", "an overlapping retransmit is delivered once", (*trial).overlap, "give the daemon CAP_NET_RAW and CAP_NET_ADMIN"},
		{"bound", "a reader that stops also stops the sender, and loses nothing", (*trial).bound, ""},
		{"bulk", "a busy direction leaves the sockmap and comes back, with every byte in its place", (*trial).bulk, fmt.Sprintf("use Linux %d.%d or newer", leastDetach.major, leastDetach.minor)},
		{"drain", "data that is queued when a stream ends arrives before the end", (*trial).drain, ""},
		{"reset", "a reset of either side reaches the other", (*trial).reset, ""},
	})
}

func (l *Loader) try(local bool, tests []test) []Finding {
	var findings []Finding
	for _, test := range tests {
		start := time.Now()
		f := Finding{Name: test.name, State: StateOK, Detail: test.proves}
		t := &trial{l: l, local: local}
		err := test.run(t)
		what, advice := "", ""
		if err != nil && !errors.Is(err, errUntried) {
			what, advice = l.lacking(err) // while the sockets hold what they do
		}
		t.close()
		f.Took = time.Since(start)
		switch {
		case errors.Is(err, errUntried):
			f.State, f.Detail = StateDegraded, err.Error()
			f.Advice = test.advice
		case what != "": // no proof could be made, which proves nothing
			f.Lacks, f.State, f.Detail, f.Advice = true, StateDegraded, what+": "+err.Error(), advice
		case err != nil:
			f.State, f.Detail = StateMissing, err.Error()
			f.Advice = "use another kernel; flows go through userspace meanwhile"
		}
		findings = append(findings, f)
		if f.Lacks {
			break // the others need it, too
		}
	}
	return findings
}

// What a socket has to be allowed to hold, for anything to be redirected to it. Bytes.
const leastBuffer = 64 << 10

// lacking says what may have made a test fail beside the kernel's splicing, and what to do about it; "":
// nothing.
func (l *Loader) lacking(err error) (what, advice string) {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, refusedDescriptors} {
		if errors.Is(err, e) {
			return "this process is at a limit", "raise its limit of descriptors (ulimit -n), or of memory"
		}
	}
	if i, e := net.InterfaceByName("lo"); e == nil && i.Flags&net.FlagUp == 0 {
		return "the interface lo is down", "ip link set lo up"
	}
	if errors.Is(err, errNoLoopback) {
		return "no connection over loopback can be made",
			"look at its address (ip addr show lo), and at the firewall"
	}
	// The kernel goes on saving memory until TCP has less than the first number of tcp_mem, which is by itself
	// three quarters of the second: see tcp(7) and tcp_init_mem.
	if n, most := tcpMemory(), l.pressure; most != 0 && n >= most-most/4 {
		return fmt.Sprintf("TCP is short of memory, with %d pages of %d", n, l.pressure),
			"wait until there is less traffic, or raise the limits: sysctl net.ipv4.tcp_mem"
	}
	for _, name := range []string{"tcp_rmem", "tcp_wmem"} {
		if most := tcpBuffer(name); most > 0 && most < leastBuffer {
			return fmt.Sprintf("a socket may have a buffer of %d bytes only (net.ipv4.%s), and %d are needed",
					most, name, leastBuffer),
				fmt.Sprintf("raise the last number: sysctl -w net.ipv4.%s='4096 65536 4194304'", name)
		}
	}
	return "", ""
}

// tcpMemory is how many pages TCP has, in all network namespaces.
func tcpMemory() (pages uint64) {
	b, _ := os.ReadFile("/proc/net/sockstat")
	for line := range strings.Lines(string(b)) {
		// TCP: inuse 30 orphan 0 tw 2 alloc 35 mem 5
		if rest, ok := strings.CutPrefix(line, "TCP: "); ok {
			if _, mem, ok := strings.Cut(rest, " mem "); ok {
				pages, _ = strconv.ParseUint(strings.TrimSpace(mem), 10, 64)
			}
		}
	}
	return pages
}

// trial is one test's client, server and what is between them.
type trial struct {
	l              *Loader
	client, server *net.TCPConn
	down, up       *net.TCPConn
	ended          chan string
	count          func() (up, down int64)
	cancel         context.CancelFunc
	local          bool          // the server is a process on this host
	returns        *atomic.Int32 // how often the flow was given back
}

func (t *trial) connect() error {
	t.close()
	var err error
	if t.client, t.down, err = loopback(); err != nil {
		return err
	}
	t.up, t.server, err = loopback()
	return err
}

func loopback() (dialled, accepted *net.TCPConn, err error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", errNoLoopback, err)
		}
	}()
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if err := ln.(*net.TCPListener).SetDeadline(time.Now().Add(testPatience)); err != nil {
		return nil, nil, err
	}
	d := net.Dialer{Timeout: testPatience}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", ln.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	a, err := ln.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c.(*net.TCPConn), a.(*net.TCPConn), nil
}

func (t *trial) splice() error {
	t.ended, t.returns = make(chan string, 1), new(atomic.Int32)
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel = cancel
	limit := time.Now().Add(20 * testPatience)
	for _, c := range []*net.TCPConn{t.client, t.server} {
		if err := c.SetDeadline(limit); err != nil {
			return err
		}
	}
	var err error
	var at *process
	if t.local {
		if at, err = t.l.local.insert(t.server); err != nil {
			return fmt.Errorf("put the socket of the process into the map: %w", err)
		}
	}
	ended := t.ended
	o := Flow{ID: "self-test", Buffer: 1 << 20,
		Ended: func(_, _ int64, end string, _ error) { ended <- end }}
	o.Returned = func(down, up int, downRest, upRest []byte, _, _ int64, _ func(), _ error) {
		go t.takeBack(ctx, o, [2]socket{socket(down), socket(up)}, [2][]byte{downRest, upRest})
	}
	if t.count, err = t.l.spliceConns(ctx, t.down, t.up, o, at); err != nil {
		return fmt.Errorf("splice: %w", err)
	}
	return nil
}

func (t *trial) close() {
	if t.cancel != nil {
		t.cancel()
	}
	for _, c := range []*net.TCPConn{t.client, t.server, t.down, t.up} {
		if c != nil {
			_ = c.Close()
		}
	}
	if t.count != nil {
		select { // so that the slot is free
		case <-t.ended:
		case <-time.After(testPatience):
		}
	}
	*t = trial{l: t.l, local: t.local}
}

// flow is the one that t spliced.
func (t *trial) flow() *flow {
	for i := range t.l.live {
		if f := t.l.live[i].Load(); f != nil {
			return f
		}
	}
	return nil
}

func (t *trial) end(want string) error {
	select {
	case end := <-t.ended:
		t.ended <- end
		if end != want {
			return fmt.Errorf("the flow ended with %q instead of %q", end, want)
		}
		return nil
	case <-time.After(testPatience):
		return fmt.Errorf("the flow did not end")
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// patient is a connection that gives each read testPatience.
type patient struct{ *net.TCPConn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(testPatience)); err != nil {
		return 0, err
	}
	return p.TCPConn.Read(b)
}

// expect reads len(want) bytes.
func expect(c io.Reader, want []byte) error {
	got := make([]byte, len(want))
	n, err := io.ReadFull(c, got)
	if err != nil {
		return fmt.Errorf("%d of %d bytes arrived: %w", n, len(want), err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("other bytes arrived than were sent")
	}
	return nil
}

// whole writes to one, ends the stream, and expects all and the end at the other.
func whole(from, to *net.TCPConn, data []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(data)
		sent <- errors.Join(err, from.CloseWrite())
	}()
	err := expect(patient{to}, data)
	if err == nil {
		var extra [1]byte
		if n, e := (patient{to}).Read(extra[:]); n != 0 || e != io.EOF {
			err = fmt.Errorf("after the last byte came %d bytes, %v", n, e)
		}
	}
	return errors.Join(err, <-sent)
}

func (t *trial) redirect() error {
	if err := errors.Join(t.connect()); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	f, data := t.flow(), pattern(64<<10)
	for _, way := range [][2]*net.TCPConn{{t.client, t.server}, {t.server, t.client}} {
		if _, err := way[0].Write(data); err != nil {
			return err
		}
		if err := expect(patient{way[1]}, data); err != nil {
			return err
		}
	}
	for i := range f.directions {
		if s := f.directions[i].snapshot(); s.redirected+s.local == 0 {
			return errors.New("nothing was redirected by the kernel")
		}
	}
	if err := errors.Join(whole(t.client, t.server, data), whole(t.server, t.client, data)); err != nil {
		return err
	}
	if err := t.end(endEOF); err != nil {
		return err
	}
	if up, down := t.count(); up != 2*int64(len(data)) || down != 2*int64(len(data)) {
		return fmt.Errorf("%d bytes were counted up and %d down, %d were sent each way", up, down, 2*len(data))
	}
	return nil
}

func (t *trial) kick() error {
	if err := t.connect(); err != nil {
		return err
	}
	data := pattern(3000)
	if _, err := t.client.Write(data); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	return expect(patient{t.server}, data)
}

func (t *trial) trim() error {
	if err := t.connect(); err != nil {
		return err
	}
	data := pattern(10000)
	if _, err := t.client.Write(data); err != nil {
		return err
	}
	if err := expect(patient{t.down}, data[:6000]); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	return expect(patient{t.server}, data[6000:])
}

func (t *trial) overlap() error {
	if err := t.connect(); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	data := pattern(9000)
	if _, err := t.client.Write(data[:100]); err != nil {
		return err
	}
	if err := expect(patient{t.server}, data[:100]); err != nil {
		return err
	}
	in, err := newInjector(t.client)
	if err != nil {
		return fmt.Errorf("%w: %w", errUntried, err)
	}
	defer in.close()
	// From 50 bytes back to 5000 bytes on; then the connection itself sends those 5000 once more, and 3900 that are new.
	if err := in.send(-50, data[50:5100]); err != nil {
		return fmt.Errorf("%w: %w", errUntried, err)
	}
	if err := expect(patient{t.server}, data[100:5100]); err != nil {
		if t.flow().directions[0].snapshot().redirected == 100 {
			return fmt.Errorf("%w: the segment did not come in, a firewall may have dropped it", errUntried)
		}
		return err
	}
	if _, err := t.client.Write(data[100:]); err != nil {
		return err
	}
	return expect(patient{t.server}, data[5100:])
}

// shrink makes the buffers on the way small, so that little fills it.
func (t *trial) shrink() error {
	return errors.Join(t.client.SetWriteBuffer(64<<10), t.server.SetReadBuffer(32<<10), t.up.SetWriteBuffer(64<<10), t.down.SetReadBuffer(64<<10))
}

func (t *trial) bound() error {
	if err := t.connect(); err != nil {
		return err
	}
	if err := t.shrink(); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	f, client, data, sent := t.flow(), t.client, pattern(4<<20), make(chan error, 1)
	go func() { // may outlive the trial
		_, err := client.Write(data)
		sent <- errors.Join(err, client.CloseWrite())
	}()
	// It stops by itself, with bytes left to userspace: nothing more is handled for a while.
	var last snapshot
	for still, limit := 0, time.Now().Add(3*testPatience); still < 5 || last.passed == 0; {
		time.Sleep(5 * time.Millisecond)
		now := f.directions[0].snapshot()
		if still++; now != last {
			last, still = now, 0
		}
		if n := now.redirected + now.passed + now.local; n > 2<<20 {
			return fmt.Errorf("%d bytes were taken for a reader that does not read", n)
		}
		if time.Now().After(limit) {
			return fmt.Errorf("the sender was not held up: %+v", now)
		}
	}
	if err := expect(patient{t.server}, data); err != nil {
		return err
	}
	return <-sent
}

func (t *trial) bulk() error {
	if t.l.detacher == nil {
		return fmt.Errorf("%w: busy flows stay in the sockmap, which costs them some speed", errUntried)
	}
	if err := t.connect(); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	client, data, sent := t.client, pattern(2<<20), make(chan error, 1)
	for round := range int32(2) {
		go func() { // may outlive the trial
			_, err := client.Write(data)
			sent <- err
		}()
		for part := data; len(part) > 0; part = part[min(len(part), len(data)/8):] {
			if err := expect(patient{t.server}, part[:min(len(part), len(data)/8)]); err != nil {
				return err
			}
			t.leave()
		}
		if err := <-sent; err != nil {
			return err
		}
		// While nothing comes it leaves at once; while much comes it may not, but what comes is whole.
		for limit := time.Now().Add(10 * testPatience); t.returns.Load() <= round; time.Sleep(time.Millisecond) {
			t.leave()
			if time.Now().After(limit) {
				return errors.New("the kernel does not take a socket out of the sockmap")
			}
		}
	}
	// The last time that it was asked may take it out once more.
	for limit := time.Now().Add(10 * testPatience); ; {
		before := t.redirected()
		if _, err := client.Write(data[:1000]); err != nil {
			return err
		}
		if err := expect(patient{t.server}, data[:1000]); err != nil {
			return err
		}
		if before > 0 && t.redirected() > before {
			return nil
		}
		if time.Now().After(limit) {
			return errors.New("nothing was redirected by the kernel any more")
		}
	}
}

// leave asks the flow to leave, where it is spliced at the moment.
func (t *trial) leave() {
	f := t.flow()
	if f == nil {
		return
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.isClosed {
		t.l.detacher.ask(f)
	}
}

// redirected is how many bytes have been redirected upwards since the flow is spliced.
func (t *trial) redirected() uint64 {
	f := t.flow()
	if f == nil {
		return 0
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return 0
	}
	return load64(&f.directions[0].shared().Redirected)
}

// takeBack splices a flow again that was given back, when all that there was to be read is written, as userspace/relay
// does it: of an skb that was read in part the verdict can't cut off as much as may have been read.
func (t *trial) takeBack(ctx context.Context, o Flow, sockets [2]socket, rest [2][]byte) {
	t.returns.Add(1)
	all := make([]byte, 4<<20) // more than is sent at a time
	for i, rest := range rest {
		n, _ := sockets[i].read(all)
		rest = append(rest, all[:n]...)
		for len(rest) > 0 && ctx.Err() == nil {
			n, err := sockets[1-i].write(rest)
			if rest = rest[n:]; err != nil && !isAgain(err) {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	if _, err := t.l.splice(ctx, sockets, o, nil, func() {}); err != nil {
		for _, s := range sockets {
			s.reset()
		}
		o.Ended(0, 0, endError, err)
	}
}

func (t *trial) drain() error {
	if err := t.connect(); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	return errors.Join(whole(t.client, t.server, pattern(1<<20)), whole(t.server, t.client, pattern(1<<20)), t.end(endEOF))
}

func (t *trial) reset() error {
	for _, up := range []bool{false, true} {
		if err := t.connect(); err != nil {
			return err
		}
		if err := t.splice(); err != nil {
			return err
		}
		from, to, want := t.client, t.server, endDownstreamReset
		if up {
			from, to, want = t.server, t.client, endUpstreamReset
		}
		if err := errors.Join(from.SetLinger(0), from.Close()); err != nil {
			return err
		}
		var b [1]byte
		if _, err := (patient{to}).Read(b[:]); !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("a reset arrived as %v", err)
		}
		if err := t.end(want); err != nil {
			return err
		}
	}
	return nil
}
