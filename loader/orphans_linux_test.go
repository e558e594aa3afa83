package loader

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

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
	stop                     chan struct{}         // closed when the flow may end
	rounds                   atomic.Int64          // that talk has made
	recalled                 chan struct{}         // closed when the flow was recalled
	result                   chan error
}

func newOrphan(t *testing.T, talk func(*orphan) error) *orphan {
	o := &orphan{talk: talk, stop: make(chan struct{}), recalled: make(chan struct{}), result: make(chan error, 1)}
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

// startDoomed runs a process that splices all of os, and gives what kills it.
func startDoomed(t *testing.T, at string, os_ []*orphan) (kill func()) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOrphansOf$")
	cmd.Env = append(os.Environ(), "TS_LDR_BPFFS="+at, "TS_LDR_DOOMED="+strconv.Itoa(len(os_)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	for _, o := range os_ {
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

// recallAll recalls the flows as the next process does, all at once, and gives how many could not be.
func recallAll(t *testing.T, at string, all []*orphan) (failed int) {
	t.Helper()
	orphans, err := OpenOrphans(at, loadertest.LogTo(t))
	loadertest.Must(t, err)
	if orphans == nil {
		t.Fatal("there are no orphans")
	}
	loadertest.Must(t, RemoveDead(at, slog.New(slog.DiscardHandler))) // as the next daemon does
	ctx, cancel := context.WithTimeout(context.Background(), loadertest.Patience)
	defer cancel()
	var wait sync.WaitGroup
	var n atomic.Int32
	var most atomic.Int64
	for i, o := range all {
		wait.Go(func() {
			fds := [2]int{}
			tcpsock.Control(o.down, func(fd int) { fds[0] = fd })
			tcpsock.Control(o.up, func(fd int) { fds[1] = fd })
			start := time.Now()
			downRest, upRest, err := orphans.Recall(ctx, fds[0], fds[1], o.offsets)
			if took := int64(time.Since(start)); took > most.Load() {
				most.Store(took)
			}
			if err != nil {
				n.Add(1)
				t.Logf("flow %d: %v", i, err)
				tcpsock.ResetConn(o.down)
				tcpsock.ResetConn(o.up)
				o.result <- nil // its talk has failed, rightly
				return
			}
			if len(downRest)+len(upRest) > 0 {
				t.Logf("flow %d brings %d and %d bytes along", i, len(downRest), len(upRest))
			}
			close(o.recalled)
			o.copyByHand(downRest, upRest)
		})
	}
	wait.Wait()
	t.Logf("%d recalled, %d not; the longest took %v", len(all)-int(n.Load()), n.Load(), time.Duration(most.Load()))
	loadertest.Must(t, orphans.Close())
	return int(n.Load())
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
		if err != nil {
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
	return o.atEnd(o.client, o.server)
}

// atEnd ends the flow: no more comes.
func (o *orphan) atEnd(client, server *net.TCPConn) error {
	client.CloseWrite()
	for _, c := range []*net.TCPConn{client} {
		if n, err := io.Copy(io.Discard, c); n > 0 || err != nil {
			return fmt.Errorf("behind the end came %d bytes, %w", n, err)
		}
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

// bulk sends as much as the other side takes, whose reader is slow: one way, or both.
func bulk(slow time.Duration, both bool) func(*orphan) error {
	return func(o *orphan) error {
		pause := func() {
			o.rounds.Add(1)
			if !o.isStopped() {
				time.Sleep(slow)
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

// ended ends one way with bytes in front, when nobody passes an end on.
func ended(dead chan struct{}) func(*orphan) error {
	return func(o *orphan) error {
		<-dead
		o.rounds.Add(1)
		want := prove.Pattern(1000)
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
}

// A flow goes on in the kernel when its process is killed, and whoever has its sockets takes it out of the
// sockmap with not a byte lost, whatever it is doing.
func TestOrphans(t *testing.T) {
	dead := make(chan struct{})
	for name, c := range map[string]struct {
		talk   func(*orphan) error
		flows  int
		rounds int64 // that the kernel makes by itself, when nobody lives
	}{
		"talkers":               {pingPong, 200, 5},
		"half-closed":           {halfClosed, 20, 5},
		"ended while dead":      {ended(dead), 20, 0},
		"bulk":                  {bulk(0, false), 4, 0},
		"slow bulk":             {bulk(2*time.Millisecond, false), 10, 0},
		"slow bulk of both":     {bulk(2*time.Millisecond, true), 10, 0},
		"bulk that nobody read": {bulk(time.Second, true), 10, 0},
	} {
		t.Run(name, func(t *testing.T) {
			at := loadertest.OwnBPFFS(t, "0700")
			all := make([]*orphan, c.flows)
			for i := range all {
				all[i] = newOrphan(t, c.talk)
			}
			kill := startDoomed(t, at, all)
			for _, o := range all {
				o.start()
			}
			for _, o := range all {
				loadertest.WaitFor(t, func() bool { return o.rounds.Load() > 3 || name == "ended while dead" }, "the flow to be in use")
			}
			kill()
			if name == "ended while dead" {
				close(dead)
			}
			before := make([]int64, len(all))
			for i, o := range all {
				before[i] = o.rounds.Load()
			}
			stalled := 0
			for i, o := range all {
				end := time.Now().Add(2 * time.Second)
				for o.rounds.Load() < before[i]+c.rounds && time.Now().Before(end) {
					time.Sleep(time.Millisecond)
				}
				if o.rounds.Load() < before[i]+c.rounds {
					stalled++
				}
			}
			if stalled > 0 {
				t.Logf("%d flows have stalled when nobody lived", stalled)
			}
			failed := recallAll(t, at, all)
			for _, o := range all {
				o.rounds.Store(0)
			}
			if failed > 0 {
				t.Logf("%d of %d recalls have failed", failed, len(all))
			}
			for _, o := range all {
				close(o.stop)
			}
			for i, o := range all {
				o.end(t, i)
			}
		})
	}
}
