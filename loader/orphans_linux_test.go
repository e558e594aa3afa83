package loader

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// orphan is a flow whose sockets a process that is to be killed has, and this one too.
type orphan struct {
	client, down, up, server *net.TCPConn
	offsets                  [2]uint64
	talk                     func(o *orphan) error // runs until the flow has ended, and compares what it brings
	isDead                   chan struct{}         // closed when the process is
	stop                     chan struct{}         // closed when the flow may end
	rounds                   atomic.Int64          // that talk has made
	wasReset                 atomic.Bool           // it could not be recalled
	result                   chan error
}

func newOrphan(t *testing.T, talk func(*orphan) error) *orphan {
	o := &orphan{talk: talk, stop: make(chan struct{}), isDead: make(chan struct{}), result: make(chan error, 1)}
	o.client, o.down = loadertest.Connect(t, "tcp4")
	o.up, o.server = loadertest.Connect(t, "tcp4")
	t.Cleanup(func() { o.client.Close(); o.down.Close(); o.up.Close(); o.server.Close() })
	at := [2]tcpsock.Position{positionOf(t, o.down), positionOf(t, o.up)}
	o.offsets = [2]uint64{at[1].Written - at[0].Read, at[0].Written - at[1].Read}
	return o
}

func positionOf(t *testing.T, c *net.TCPConn) (p tcpsock.Position) {
	t.Helper()
	err := net.ErrClosed
	tcpsock.Control(c, func(fd int) { p, err = tcpsock.PositionOf(fd) })
	loadertest.Must(t, err)
	return p
}

// copyByHand is what a process does that has adopted the flow: rest comes first.
func (o *orphan) copyByHand(downRest, upRest []byte) {
	for _, way := range []struct {
		from, to *net.TCPConn
		rest     []byte
	}{{o.down, o.up, downRest}, {o.up, o.down, upRest}} {
		go func() {
			_, err := io.Copy(struct{ io.Writer }{way.to}, io.MultiReader(bytes.NewReader(way.rest), struct{ io.Reader }{way.from}))
			if err == nil {
				way.to.CloseWrite()
			}
		}()
	}
}

// startDoomed runs a process that splices all flows, and gives what kills it.
func startDoomed(t *testing.T, at string, flows []*orphan) (kill func()) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOrphansOf$")
	cmd.Env = append(os.Environ(), "TS_LDR_BPFFS="+at, "TS_LDR_DOOMED="+strconv.Itoa(len(flows)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	for _, o := range flows {
		for _, c := range []*net.TCPConn{o.down, o.up} {
			f, err := c.File()
			loadertest.Must(t, err)
			defer f.Close()
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
	}
	out, err := cmd.StdoutPipe()
	loadertest.Must(t, errors.Join(err, cmd.Start()))
	kill = sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
	t.Cleanup(kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q %v", line, err)
	}
	return kill
}

// TestOrphansOf is the process that is killed.
func TestOrphansOf(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("TS_LDR_DOOMED"))
	if n == 0 {
		return
	}
	l, err := load(Options{BPFFS: os.Getenv("TS_LDR_BPFFS"), MaxFlows: n}, nil)
	loadertest.Must(t, err)
	for i := range n {
		fds := [2]int{3 + 2*i, 4 + 2*i}
		for _, fd := range fds {
			loadertest.Must(t, unix.SetNonblock(fd, true))
		}
		_, err := l.Splice(context.Background(), fds[0], fds[1], prove.Flow{Buffer: 256 << 10,
			Ended: func(up, down int64, end string, err error) {
				fmt.Fprintln(os.Stderr, "flow", i, "ended:", up, down, end, err)
			}})
		loadertest.Must(t, err)
	}
	fmt.Println("ready")
	select {}
}

// recallAll recalls the flows as the next daemon does, all at once. It splices half of them again, and copies
// the others by hand.
func recallAll(t *testing.T, at string, all []*orphan) (failed int) {
	t.Helper()
	orphans := OpenOrphans(at, loadertest.LogTo(t))
	if orphans == nil {
		t.Fatal("there are no orphans")
	}
	hands := make([]int, len(all))
	for i, o := range all {
		hands[i] = o.inHands(t, at)
	}
	next, err := load(Options{BPFFS: at, MaxFlows: len(all)}, nil)
	loadertest.Must(t, err)
	t.Cleanup(func() { loadertest.Must(t, next.Close()) })
	ctx, cancel := context.WithTimeout(context.Background(), loadertest.Patience)
	defer cancel()
	var wait sync.WaitGroup
	var n, spliced atomic.Int32
	took := make([]time.Duration, len(all))
	for i, o := range all {
		wait.Go(func() {
			fds := [2]int{fdOf(o.down), fdOf(o.up)}
			start := time.Now()
			downRest, upRest, err := orphans.Recall(ctx, fds[0], fds[1], o.offsets)
			took[i] = time.Since(start)
			if err != nil {
				n.Add(1)
				if t.Logf("flow %d: %v", i, err); hands[i] <= 0 {
					t.Errorf("flow %d could not be recalled, and nothing was in the hands of the process that died", i)
				}
				o.wasReset.Store(true)
				tcpsock.ResetConn(o.down)
				tcpsock.ResetConn(o.up)
				return
			}
			if len(downRest)+len(upRest) > 0 {
				t.Logf("flow %d brings %d and %d bytes along", i, len(downRest), len(upRest))
			} else if i%2 == 0 && o.spliceBy(next) == nil {
				spliced.Add(1)
				return
			}
			o.copyByHand(downRest, upRest)
		})
	}
	wait.Wait()
	t.Logf("%d recalled, of which %d are spliced again; %d not; the longest took %v",
		len(all)-int(n.Load()), spliced.Load(), n.Load(), slices.Max(took))
	loadertest.Must(t, orphans.Close())
	return int(n.Load())
}

func fdOf(c *net.TCPConn) (fd int) {
	tcpsock.Control(c, func(own int) { fd = own })
	return fd
}

// inHands is how many bytes the dead process had read and not said to be written: they were passed, and can't
// be read.
func (o *orphan) inHands(t *testing.T, at string) (n int) {
	t.Helper()
	dir := filepath.Join(at, "tailsplice", "default", "current")
	places, err := ebpf.LoadPinnedMap(filepath.Join(dir, "places"), nil)
	loadertest.Must(t, err)
	defer places.Close()
	halves, err := ebpf.LoadPinnedMap(filepath.Join(dir, "halves"), nil)
	loadertest.Must(t, err)
	defer halves.Close()
	for _, c := range []*net.TCPConn{o.down, o.up} {
		cookie, err := unix.GetsockoptUint64(fdOf(c), unix.SOL_SOCKET, unix.SO_COOKIE)
		loadertest.Must(t, err)
		var place struct {
			Flow      uint64
			Half, Pad uint32
		}
		loadertest.Must(t, places.Lookup(cookie, &place))
		passed := func() uint64 {
			var half struct {
				Source, Redirected, Passed, Consumed uint64
				Rest                                 [32]byte
			}
			loadertest.Must(t, halves.Lookup(place.Half, &half))
			return half.Passed - half.Consumed
		}
		for before, unread := passed(), 0; ; {
			unread, err = unix.IoctlGetInt(fdOf(c), unix.SIOCINQ)
			loadertest.Must(t, err)
			now := passed()
			if now == before {
				n += int(now) - unread
				break
			}
			before = now
		}
	}
	return n
}

func (o *orphan) spliceBy(l *Loader) error {
	var fds [2]int
	for i, c := range []*net.TCPConn{o.down, o.up} {
		raw, err := c.SyscallConn()
		if err == nil {
			fds[i], err = tcpsock.Dup(raw)
		}
		if err != nil {
			return err
		}
	}
	_, err := l.Splice(context.Background(), fds[0], fds[1], prove.Flow{Buffer: 256 << 10,
		Ended: func(_, _ int64, end string, err error) {}})
	if err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
	}
	return err
}

func (o *orphan) start() { go func() { o.result <- o.talk(o) }() }

func (o *orphan) isStopped() bool {
	select {
	case <-o.stop:
		return true
	default:
		return false
	}
}

// end gives how the talk has ended.
func (o *orphan) end(t *testing.T, i int) {
	t.Helper()
	select {
	case err := <-o.result:
		if err != nil && !o.wasReset.Load() {
			t.Errorf("flow %d: %v", i, err)
		}
	case <-time.After(loadertest.Patience):
		t.Errorf("flow %d hangs after %d rounds", i, o.rounds.Load())
	}
}

// pingPong says something and waits for the answer, which says the same.
func pingPong(o *orphan) error {
	go func() {
		io.Copy(struct{ io.Writer }{o.server}, struct{ io.Reader }{o.server})
		o.server.CloseWrite()
	}()
	said, heard := make([]byte, 64), make([]byte, 64)
	for n := uint64(0); !o.isStopped(); n++ {
		for i := range 8 {
			binary.BigEndian.PutUint64(said[8*i:], 8*n+uint64(i))
		}
		if _, err := o.client.Write(said); err != nil {
			return err
		}
		if _, err := io.ReadFull(o.client, heard); err != nil {
			return err
		}
		if !bytes.Equal(said, heard) {
			return fmt.Errorf("the answer %d is %x, and not %x", n, heard, said)
		}
		o.rounds.Add(1)
	}
	o.client.CloseWrite()
	if n, err := io.Copy(io.Discard, o.client); n > 0 || err != nil {
		return fmt.Errorf("behind the end came %d bytes, %w", n, err)
	}
	return nil
}

// stream sends numbers until it is told to stop, and gives how many bytes.
func stream(o *orphan, c *net.TCPConn, piece int) (n uint64, err error) {
	b := make([]byte, piece)
	for !o.isStopped() {
		for i := 0; i < len(b); i += 8 {
			binary.BigEndian.PutUint64(b[i:], n+uint64(i))
		}
		m, err := c.Write(b)
		if n += uint64(m); err != nil {
			return n, err
		}
	}
	return n, c.CloseWrite()
}

// compare reads such a stream to its end.
func compare(c *net.TCPConn, pause func()) (n uint64, err error) {
	b := make([]byte, 8<<10)
	for {
		m, err := io.ReadFull(c, b)
		for i := 0; i+8 <= m; i += 8 {
			if at := binary.BigEndian.Uint64(b[i:]); at != n+uint64(i) {
				return n, fmt.Errorf("at %d is %d", n+uint64(i), at)
			}
		}
		n += uint64(m)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		pause()
	}
}

// bulk sends as much as the other side takes, whose reader is slow after a while: one way, or both.
func bulk(slow time.Duration, both bool) func(*orphan) error {
	return func(o *orphan) error {
		pause := func() {
			if o.rounds.Add(1) > 10 {
				select {
				case <-o.stop:
				case <-time.After(slow):
				}
			}
		}
		way := func(from, to *net.TCPConn) error {
			sent := make(chan error, 1)
			var n uint64
			go func() {
				var err error
				n, err = stream(o, from, 16<<10)
				sent <- err
			}()
			got, err := compare(to, pause)
			if err = errors.Join(err, <-sent); err == nil && got != n {
				err = fmt.Errorf("of %d bytes %d have come", n, got)
			}
			return err
		}
		back := make(chan error, 1)
		go func() {
			if !both {
				o.server.CloseWrite()
				_, err := compare(o.client, func() {})
				back <- err
				return
			}
			back <- way(o.server, o.client)
		}()
		return errors.Join(way(o.client, o.server), <-back)
	}
}

// halfClosed ends one way at once, and sends the other way on.
func halfClosed(o *orphan) error {
	o.client.CloseWrite()
	if n, err := compare(o.server, func() {}); n != 0 || err != nil {
		return fmt.Errorf("%d bytes came, %w", n, err)
	}
	for n := uint64(0); ; n += 8 {
		b := make([]byte, 8)
		if o.isStopped() {
			o.server.CloseWrite()
			got, err := o.client.Read(b)
			if got != 0 || err != io.EOF {
				return fmt.Errorf("behind the end: %d, %w", got, err)
			}
			return nil
		}
		binary.BigEndian.PutUint64(b, n)
		if _, err := o.server.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(o.client, b); err != nil {
			return err
		}
		if got := binary.BigEndian.Uint64(b); got != n {
			return fmt.Errorf("at %d is %d", n, got)
		}
		o.rounds.Add(1)
	}
}

// endsLate ends one way with bytes in front, when nobody passes an end on.
func endsLate(o *orphan) error {
	want := prove.Pattern(1000)
	ask := func() error {
		if _, err := o.client.Write(want); err != nil {
			return err
		}
		return prove.Expect(o.server, want)
	}
	for range 4 {
		if err := ask(); err != nil {
			return err
		}
		o.rounds.Add(1)
	}
	<-o.isDead
	o.client.Write(want)
	o.client.CloseWrite()
	got, err := io.ReadAll(o.server)
	if err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came, %w", len(got), err)
	}
	o.server.Write(want)
	o.server.Close()
	if got, err = io.ReadAll(o.client); err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came back, %w", len(got), err)
	}
	return nil
}

// A flow goes on in the kernel when its process is killed, and whoever has its sockets takes it out of the
// sockmap with not a byte lost, whatever it is doing. Only where the process had read bytes and not yet
// written them, the recall says that it can't be.
func TestOrphans(t *testing.T) {
	for name, c := range map[string]struct {
		talk   func(*orphan) error
		flows  int
		rounds int64 // that the kernel makes by itself, when nobody lives
	}{
		"talkers":                {pingPong, 200, 5},
		"half-closed":            {halfClosed, 20, 5},
		"ended while dead":       {endsLate, 20, 0},
		"bulk":                   {bulk(0, false), 5, 0},
		"slow bulk":              {bulk(2*time.Millisecond, false), 5, 0},
		"slow bulk of both":      {bulk(2*time.Millisecond, true), 5, 0},
		"bulk that nobody reads": {bulk(time.Hour, true), 5, 0},
	} {
		t.Run(name, func(t *testing.T) { testOrphans(t, c.talk, c.flows, c.rounds) })
	}
}

func testOrphans(t *testing.T, talk func(*orphan) error, flows int, rounds int64) {
	at := loadertest.OwnBPFFS(t, "0700")
	all := make([]*orphan, flows)
	for i := range all {
		all[i] = newOrphan(t, talk)
		for _, c := range []*net.TCPConn{all[i].client, all[i].server} { // the proxy's are what they are
			loadertest.Must(t, errors.Join(c.SetReadBuffer(128<<10), c.SetWriteBuffer(128<<10)))
		}
	}
	kill := startDoomed(t, at, all)
	if o := OpenOrphans(at, loadertest.LogTo(t)); o != nil {
		t.Errorf("of a process that lives: %v", o)
	}
	for _, o := range all {
		o.start()
	}
	for _, o := range all {
		loadertest.WaitFor(t, func() bool { return o.rounds.Load() > 3 }, "the flow to be in use")
	}
	kill()
	stalled, before := 0, make([]int64, len(all))
	for i, o := range all {
		before[i] = o.rounds.Load()
	}
	for i, o := range all {
		end := time.Now().Add(loadertest.Patience)
		for o.rounds.Load() < before[i]+rounds && time.Now().Before(end) && o.inHands(t, at) == 0 {
			time.Sleep(time.Millisecond)
		}
		if o.rounds.Load() < before[i]+rounds {
			stalled++
		}
	}
	if stalled*10 > flows {
		t.Errorf("%d of %d flows did not go on by themselves", stalled, flows)
	}
	for _, o := range all {
		close(o.isDead)
	}
	failed := recallAll(t, at, all)
	if failed == flows {
		t.Error("all flows were lost")
	}
	for _, o := range all {
		close(o.stop)
	}
	for i, o := range all {
		o.end(t, i)
	}
}

// Where what a dead process has left can't be looked into, no flow is known to be out of it.
func TestOrphansUnseen(t *testing.T) {
	at := loadertest.OwnBPFFS(t, "0700")
	dir := filepath.Join(at, "tailsplice", "edge", "1")
	loadertest.Must(t, os.MkdirAll(dir, 0o700))
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 4, MaxEntries: 1})
	loadertest.Must(t, err)
	defer other.Close()
	loadertest.Must(t, other.Pin(filepath.Join(dir, "places"))) // as of another version
	o := OpenOrphans(at, loadertest.LogTo(t))
	defer o.Close()
	client, server := loadertest.Connect(t, "tcp4")
	defer client.Close()
	defer server.Close()
	var fds [2]int
	for i, c := range []*net.TCPConn{client, server} {
		tcpsock.Control(c, func(fd int) { fds[i] = fd })
	}
	if _, _, err := o.Recall(t.Context(), fds[0], fds[1], [2]uint64{}); err == nil {
		t.Error("a flow is said to be in no sockmap")
	}
}
