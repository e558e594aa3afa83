package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// ends are a flow as the network has it: the client, the server, and the sockets between that a process has.
type ends struct {
	client, server *net.TCPConn
	down, up       *net.TCPConn
	balance        Balance
}

func newEnds(t *testing.T) *ends {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	pair := func() (dialled, accepted *net.TCPConn) {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		a, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close(); a.Close() })
		c.SetDeadline(time.Now().Add(time.Minute))
		a.SetDeadline(time.Now().Add(time.Minute))
		return c.(*net.TCPConn), a.(*net.TCPConn)
	}
	e := new(ends)
	e.client, e.down = pair()
	e.up, e.server = pair()
	e.balance = BalanceOf(new(Flow), e.position(t, e.down), e.position(t, e.up))
	return e
}

func fdOf(t *testing.T, c *net.TCPConn) (fd int) {
	t.Helper()
	fd, err := descriptor(c)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func (e *ends) position(t *testing.T, c *net.TCPConn) tcpsock.Position {
	t.Helper()
	p, err := tcpsock.PositionOf(fdOf(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// kept is a copy of the flow for a queue.
func (e *ends) kept(t *testing.T, id string) *KeptFlow {
	t.Helper()
	dup := func(c *net.TCPConn) int {
		fd, err := unix.FcntlInt(uintptr(fdOf(t, c)), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	b := e.balance
	return NewKeptFlow(&Flow{ID: id, Kept: &b}, dup(e.down), dup(e.up))
}

// crash ends the process that has the sockets.
func (e *ends) crash() {
	e.down.Close()
	e.up.Close()
}

// pass moves n bytes.
func pass(t *testing.T, from, to *net.TCPConn, n int) {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(from, b); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Write(b); err != nil {
		t.Fatal(err)
	}
}

// managed is a queue, and what a manager has of it.
type managed struct {
	t    *testing.T
	q    *Queue
	has  []Socket
	fail error
}

func newManaged(t *testing.T) *managed {
	m := &managed{t: t}
	m.q = OpenQueue(nil, m.store)
	t.Cleanup(func() { m.q.Close(); Close(m.has) })
	return m
}

func (m *managed) store() error {
	if m.fail != nil {
		return m.fail
	}
	all, err := m.q.Sockets()
	if err != nil {
		m.t.Error(err)
	}
	Close(m.has)
	m.has = all
	return nil
}

// copies are those of what the manager has, for a process that it starts.
func (m *managed) copies() (all []Socket) {
	for _, s := range m.has {
		fd, err := descriptor(s.File)
		if err == nil {
			fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		}
		if err != nil {
			m.t.Fatal(err)
		}
		s.File = fileOf(fd)
		all = append(all, s)
	}
	return all
}

// next are the flows that a process would find now.
//
// +checklocksignore: nobody else has the Queue
func (m *managed) next() (ids []string) {
	m.t.Helper()
	q := OpenQueue(m.copies(), func() error { return nil })
	flows, wrong := flowsOf(m.t, q)
	if len(wrong) > 0 {
		m.t.Errorf("what is kept is wrong: %v", wrong)
	}
	for _, k := range flows {
		ids = append(ids, k.Flow.ID)
		k.Close()
	}
	for _, p := range q.pairs {
		p.close()
	}
	slices.Sort(ids)
	return ids
}

// flowsOf are the flows that a process has left in q. The caller closes them.
func flowsOf(t *testing.T, q *Queue) (flows []*KeptFlow, wrong []error) {
	t.Helper()
	wrong = q.Flows(t.Context(), func(k *KeptFlow) { flows = append(flows, k) })
	return flows, wrong
}

// putAll are flows for a queue, one after the other; each is called before one.
func putAll(t *testing.T, all map[string]*ends, each func()) iter.Seq2[*KeptFlow, error] {
	return func(yield func(*KeptFlow, error) bool) {
		for id, e := range all {
			each()
			if !yield(e.kept(t, id), nil) {
				return
			}
		}
	}
}

func flowsNamed(t *testing.T, from, n int) (all map[string]*ends, ids []string) {
	all = map[string]*ends{}
	for i := range n {
		id := fmt.Sprintf("%03d", from+i)
		all[id], ids = newEnds(t), append(ids, id)
	}
	return all, ids
}

// TestQueue: what is put in is there for the next process, and for the one after that.
func TestQueue(t *testing.T) {
	m := newManaged(t)
	if got := m.next(); len(got) > 0 {
		t.Errorf("at first there is %v", got)
	}
	before := openFiles(t).count()
	all, ids := flowsNamed(t, 0, 2*mostTogether+3)
	during := openFiles(t).count()
	if n, err := m.q.Put(putAll(t, all, func() {})); n != len(all) || err != nil {
		t.Fatalf("%d are kept, %v", n, err)
	}
	if n := openFiles(t).count(); n > during+4 {
		t.Errorf("%d descriptors are open, after %d", n, during)
	}
	for range 2 {
		if got := m.next(); !slices.Equal(got, ids) {
			t.Errorf("kept are %v", got)
		}
	}
	if n, isWhole := m.q.Len(); n != len(all) || !isWhole {
		t.Errorf("it has %d, %v", n, isWhole)
	}
	for _, e := range all {
		e.crash()
	}
	// The next process has the flows still, though this one is gone.
	q := OpenQueue(m.copies(), func() error { return nil })
	flows, wrong := flowsOf(t, q)
	if len(wrong) > 0 || len(flows) != len(all) {
		t.Fatalf("%d flows, %v", len(flows), wrong)
	}
	for _, k := range flows {
		f, err := k.Take(nil)
		if err != nil {
			t.Fatal(err)
		}
		e := all[f.ID]
		go e.client.Write([]byte("hello"))
		pass(t, f.Down.Conn.(*net.TCPConn), f.Up.Conn.(*net.TCPConn), 5)
		if _, err := io.ReadFull(e.server, make([]byte, 5)); err != nil {
			t.Errorf("%s: %v", f.ID, err)
		}
		f.Close()
		k.Close()
	}
	q.Close()
	for id, e := range all {
		e.client.Close()
		e.server.Close()
		delete(all, id)
	}
	if got := m.next(); len(got) > 0 {
		t.Errorf("a queue that was closed has %v", got)
	}
	if n, err := m.q.Put(putAll(t, map[string]*ends{"late": newEnds(t)}, func() {})); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err) // of this process, which lives
	}
	m.q.Close()
	if n, err := m.q.Put(putAll(t, map[string]*ends{"late": newEnds(t)}, func() {})); n != 0 || err == nil {
		t.Errorf("after its end it takes %d", n)
	}
	Close(m.has)
	m.has = nil
	if n := openFiles(t).count(); n > before+2*4 { // of those that were late
		t.Errorf("%d descriptors are open, before there were %d", n, before)
	}
}

// TestRenew: whenever the process ends while living flows go to another pair, the next one finds each of them once.
func TestRenew(t *testing.T) {
	m := newManaged(t)
	all, _ := flowsNamed(t, 0, 40)
	if _, err := m.q.Put(putAll(t, all, func() {})); err != nil {
		t.Fatal(err)
	}
	live := map[string]*ends{}
	var ids []string
	for id, e := range all {
		if id < "030" {
			live[id], ids = e, append(ids, id)
			continue
		}
		e.crash()
	}
	slices.Sort(ids)
	steps := 0
	look := func() {
		steps++
		got := m.next()
		if missing := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return slices.Contains(got, id) }); len(missing) > 0 {
			t.Fatalf("step %d: %v are lost", steps, missing)
		}
		if len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("step %d: %v: some are there twice", steps, got)
		}
	}
	q := m.q
	q.store = func() error {
		look()
		err := m.store()
		look()
		return err
	}
	for range 3 {
		if n, err := q.Renew(putAll(t, live, look), len(live)); n != len(live) || err != nil {
			t.Fatalf("%d are kept, %v", n, err)
		}
		if got := m.next(); !slices.Equal(got, ids) {
			t.Errorf("kept are %v, want %v", got, ids)
		}
		if len(m.has) != 2 {
			t.Errorf("the manager has %v", m.has)
		}
	}
	if steps < 60 {
		t.Errorf("%d steps", steps)
	}
	// One that ends in the middle of it goes on from there.
	before := m.copies()
	q.store = m.store
	q.Renew(func(yield func(*KeptFlow, error) bool) {
		for id, e := range live {
			if !yield(e.kept(t, id), nil) {
				return
			}
			Close(before)
			before = m.copies()
		}
	}, len(live))
	Close(before)

	// Where not all of the flows can be had, all is as it was.
	noMore := errors.New("no more")
	_, err := q.Renew(func(yield func(*KeptFlow, error) bool) {
		for id, e := range live {
			if yield(e.kept(t, id), nil) {
				yield(nil, noMore)
			}
			return
		}
	}, len(live))
	if got := m.next(); err == nil || !errors.Is(err, noMore) || !slices.Equal(got, ids) || len(m.has) != 2 {
		t.Errorf("%v: kept are %v, want %v", err, got, ids)
	}

	// Where the manager fails all is as it was.
	m.fail = errors.New("no")
	if _, err := q.Renew(putAll(t, live, func() {}), len(live)); err == nil {
		t.Error("a manager that fails is no error")
	}
	m.fail = nil
	if got := m.next(); !slices.Equal(got, ids) || len(m.has) != 2 {
		t.Errorf("kept are %v, want %v", got, ids)
	}
}

// TestQueueIsFull: what has no room is not kept, and all else is.
//
// +checklocksignore: nobody else has the Queue
func TestQueueIsFull(t *testing.T) {
	m := newManaged(t)
	first := newEnds(t)
	if n, err := m.q.Put(putAll(t, map[string]*ends{"first": first}, func() {})); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := unix.SetsockoptInt(int(m.q.pairs[0].in.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, 100<<10); err != nil {
		t.Fatal(err)
	}
	e, kept := newEnds(t), 1
	long := strings.Repeat("name", 1000)
	n, err := m.q.Put(func(yield func(*KeptFlow, error) bool) {
		for {
			k := e.kept(t, "more")
			k.Flow.Name = long
			if !yield(k, nil) {
				return
			}
		}
	})
	if kept += n; !errors.Is(err, unix.EAGAIN) || n == 0 || n > 100 {
		t.Errorf("%d are kept, %v", n, err)
	}
	if n, _ := m.q.Len(); n != kept {
		t.Errorf("it has %d, want %d", n, kept)
	}
}

// TestQueueIsReadInParts: whoever closes the flows that he has got needs no more descriptors than a few messages
// have, and where there are none for a while that is waited for.
func TestQueueIsReadInParts(t *testing.T) {
	m := newManaged(t)
	all, ids := flowsNamed(t, 0, 5*mostTogether)
	if _, err := m.q.Put(putAll(t, all, func() {})); err != nil {
		t.Fatal(err)
	}
	q := OpenQueue(m.copies(), nil)
	free := fewFiles(t, 4*mostTogether) // for a message, and the reader's own
	var got []string
	var held []*KeptFlow
	var closing sync.WaitGroup
	wrong := q.Flows(t.Context(), func(k *KeptFlow) {
		got = append(got, k.Flow.ID)
		if held = append(held, k); len(held) == mostTogether {
			some := held
			held = nil
			closing.Go(func() {
				time.Sleep(20 * time.Millisecond) // the reader wants more meanwhile
				for _, k := range some {
					k.Close()
				}
			})
		}
	})
	closing.Wait()
	free()
	slices.Sort(got)
	if len(wrong) > 0 || !slices.Equal(got, ids) {
		t.Errorf("%d of %d flows come, %v", len(got), len(ids), wrong)
	}
	if n, isWhole := q.Len(); n != len(ids) || !isWhole {
		t.Errorf("it has %d, %v", n, isWhole)
	}
	for id, e := range all {
		if tcpsock.IsClosed(fdOf(t, e.down)) {
			t.Errorf("%s was reset", id)
		}
	}
	q.Close()
}

// fewFiles lets this process open n more descriptors only, until what it returns is called.
func fewFiles(t *testing.T, n int) (free func()) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// A limit is on their numbers: those below it are taken.
	last, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var taken []int
	for fd := last; fd < last+n; {
		if fd, err = unix.FcntlInt(uintptr(last), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		taken = append(taken, fd)
	}
	most := slices.Max(taken)
	slices.Sort(taken)
	closeAll(taken[len(taken)-n:])
	taken = append(taken[:len(taken)-n], last)
	now := before
	now.Cur = uint64(most) + 1
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
	free = sync.OnceFunc(func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &before)
		closeAll(taken)
	})
	t.Cleanup(free)
	return free
}

// TestQueueIsGivenUp: flows that a process can't look at any more get a reset, and not a proper end. Those that it
// has got are its own.
func TestQueueIsGivenUp(t *testing.T) {
	m := newManaged(t)
	all, _ := flowsNamed(t, 0, 3*mostTogether)
	var order []string
	if _, err := m.q.Put(func(yield func(*KeptFlow, error) bool) {
		for id, e := range all {
			order = append(order, id)
			if !yield(e.kept(t, id), nil) {
				return
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		e.crash()
	}
	q := OpenQueue(m.copies(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []*KeptFlow
	wrong := q.Flows(ctx, func(k *KeptFlow) {
		got = append(got, k)
		cancel()
	})
	if len(got) != mostTogether || len(wrong) != 1 || !errors.Is(wrong[0], errGivenUp) {
		t.Fatalf("%d flows, %v", len(got), wrong)
	}
	q.Close()
	for _, id := range order[mostTogether:] {
		for _, c := range []*net.TCPConn{all[id].client, all[id].server} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: an end gets %v, want a reset", id, err)
			}
		}
	}
	for _, k := range got {
		f, err := k.Take(nil)
		if err != nil {
			t.Fatal(err)
		}
		go all[f.ID].client.Write([]byte("hello"))
		pass(t, f.Down.Conn.(*net.TCPConn), f.Up.Conn.(*net.TCPConn), 5)
		f.Close()
		k.Close()
	}
}

// TestPutWhileRead: what this process has kept while it still reads what another one has left is its own, and not
// taken for what it was left.
func TestPutWhileRead(t *testing.T) {
	m := newManaged(t)
	left, ids := flowsNamed(t, 0, 2*mostTogether)
	if _, err := m.q.Put(putAll(t, left, func() {})); err != nil {
		t.Fatal(err)
	}
	next := &managed{t: t}
	next.q = OpenQueue(m.copies(), next.store)
	t.Cleanup(func() { next.q.Close(); Close(next.has) })
	own, ownIDs := flowsNamed(t, 100, 3)
	put := func(id string) {
		t.Helper()
		if n, err := next.q.Put(putAll(t, map[string]*ends{id: own[id]}, func() {})); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	put(ownIDs[0])
	var got []string
	wrong := next.q.Flows(t.Context(), func(k *KeptFlow) {
		if len(got) == 0 {
			put(ownIDs[1])
		}
		got = append(got, k.Flow.ID)
		k.Close()
	})
	if slices.Sort(got); len(wrong) > 0 || !slices.Equal(got, ids) {
		t.Errorf("the process before has left %v, %v", got, wrong)
	}
	put(ownIDs[2])
	want := slices.Concat(ids, ownIDs)
	if got := next.next(); !slices.Equal(got, want) {
		t.Errorf("kept are %v, want %v", got, want)
	}
	if _, isWhole := next.q.Len(); isWhole {
		t.Error("there are two pairs, and no renewal is due")
	}
	maps.Copy(left, own)
	if n, err := next.q.Renew(putAll(t, left, func() {}), len(left)); n != len(left) || err != nil {
		t.Fatal(n, err)
	}
	if got := next.next(); !slices.Equal(got, want) || len(next.has) != 2 {
		t.Errorf("kept are %v in %d ends, want %v", got, len(next.has), want)
	}
}

// TestMostInFlight: without a capability there is a bound, and what is over it is not kept, which is an error.
func TestMostInFlight(t *testing.T) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	without := make(chan int)
	go func() {
		runtime.LockOSThread() // and it ends with the thread
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
		}
		without <- mostInFlight()
	}()
	if n := <-without; uint64(n) != min(files.Cur, math.MaxInt32)/8 {
		t.Errorf("without capabilities %d flows may be kept, and there may be %d files", n, files.Cur)
	}
	m := newManaged(t)
	m.q.most = 2*mostTogether + 1
	all, ids := flowsNamed(t, 0, 3*mostTogether)
	for _, how := range []struct {
		name string
		put  func() (int, error)
		want int
	}{
		{"put", func() (int, error) { return m.q.Put(putAll(t, all, func() {})) }, 2 * mostTogether},
		{"renew", func() (int, error) { return m.q.Renew(putAll(t, all, func() {}), 2*mostTogether) }, 2 * mostTogether},
		{"more", func() (int, error) { return m.q.Put(putAll(t, all, func() {})) }, 0},
	} {
		if n, err := how.put(); n != how.want || !errors.Is(err, errQueueFull) {
			t.Errorf("%s: %d are kept, %v", how.name, n, err)
		}
		if got := m.next(); len(got) != 2*mostTogether {
			t.Errorf("%s: kept are %d of %d", how.name, len(got), len(ids))
		}
	}
}

// TestTakeFiltered: a flow that another process was about to take out of a sockmap, and has kept bytes from, goes on.
func TestTakeFiltered(t *testing.T) {
	m, e := newManaged(t), newEnds(t)
	if _, err := m.q.Put(putAll(t, map[string]*ends{"a": e}, func() {})); err != nil {
		t.Fatal(err)
	}
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	for _, c := range []*net.TCPConn{e.down, e.up} {
		fd := fdOf(t, c)
		err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]})
		if err := errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 10_000)); err != nil {
			t.Fatal(err)
		}
	}
	e.crash()
	flows, _ := flowsOf(t, OpenQueue(m.copies(), nil))
	defer flows[0].Close()
	f, err := flows[0].Take(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	down, up := f.Down.Conn.(*net.TCPConn), f.Up.Conn.(*net.TCPConn)
	down.SetDeadline(time.Now().Add(time.Minute))
	up.SetDeadline(time.Now().Add(time.Minute))
	e.client.Write([]byte("hello"))
	pass(t, down, up, 5)
	pass(t, e.server, e.server, 5)
	pass(t, up, down, 5)
	if _, err := io.ReadFull(e.client, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	for _, c := range []*net.TCPConn{down, up} {
		if n, err := unix.GetsockoptInt(fdOf(t, c), unix.SOL_SOCKET, unix.SO_RCVLOWAT); n != 1 || err != nil {
			t.Errorf("a read waits for %d bytes, %v", n, err)
		}
	}
}

// TestTakeWithoutFiles: a flow goes on as soon as there are descriptors for it.
func TestTakeWithoutFiles(t *testing.T) {
	e := newEnds(t)
	k := e.kept(t, "a")
	defer k.Close()
	e.crash()
	free := fewFiles(t, 1)
	time.AfterFunc(20*time.Millisecond, free)
	f, err := k.Take(nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// TestTake: a flow goes on where nothing of it is lost, and else both its ends get to know.
func TestTake(t *testing.T) {
	const up, down = "from the client", "from the server"
	for name, c := range map[string]struct {
		do     func(t *testing.T, e *ends)
		recall Recall
		want   error // nil: it goes on
		check  func(t *testing.T, f *Flow)
	}{
		"idle": {},
		"talked": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			pass(t, e.down, e.up, len(up))
			e.server.Write([]byte(down))
			pass(t, e.up, e.down, len(down))
		}, check: func(t *testing.T, f *Flow) {
			if f.BytesUp != int64(len(up)) || f.BytesDown != int64(len(down)) {
				t.Errorf("it has moved %d and %d", f.BytesUp, f.BytesDown)
			}
		}},
		"unread": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			e.server.Write([]byte(down))
			e.server.CloseWrite()
		}},
		"half closed": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			e.client.CloseWrite()
			pass(t, e.down, e.up, len(up))
			if n, err := e.down.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatal(n, err)
			}
			e.up.CloseWrite()
		}, check: func(t *testing.T, f *Flow) {
			if !f.Down.IsEnded || !f.Up.IsShut || f.Up.IsEnded || f.Down.IsShut {
				t.Errorf("%+v, %+v", f.Down, f.Up)
			}
		}},
		"an end that was not passed on": {do: func(t *testing.T, e *ends) {
			e.client.CloseWrite()
			if n, err := e.down.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatal(n, err)
			}
		}, check: func(t *testing.T, f *Flow) {
			if f.Down.IsEnded || f.Up.IsShut {
				t.Errorf("%+v, %+v", f.Down, f.Up)
			}
		}},
		"in hands": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			io.ReadFull(e.down, make([]byte, 1))
		}, want: ErrLostBytes},
		"in hands on the way down": {do: func(t *testing.T, e *ends) {
			e.server.Write([]byte(down))
			io.ReadFull(e.up, make([]byte, 1))
		}, want: ErrLostBytes},
		"recalled": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			io.ReadFull(e.down, make([]byte, 4))
		}, recall: func(int, int, *Balance) (down, up []byte, err error) { return []byte("from"), nil, nil },
			check: func(t *testing.T, f *Flow) {
				if string(f.Down.Rest) != "from" || f.BytesUp != 0 {
					t.Errorf("%+v", f)
				}
			}},
		"recalled in part": {do: func(t *testing.T, e *ends) {
			e.client.Write([]byte(up))
			io.ReadFull(e.down, make([]byte, 4))
		}, recall: func(int, int, *Balance) (down, up []byte, err error) { return []byte("fro"), nil, nil }, want: ErrLostBytes},
		"not recalled": {recall: func(int, int, *Balance) (down, up []byte, err error) { return nil, nil, io.ErrNoProgress }, want: ErrLostBytes},
		"the client has reset": {do: func(t *testing.T, e *ends) {
			e.client.SetLinger(0)
			e.client.Close()
			e.down.Read(make([]byte, 1)) // until it has come
		}, want: ErrOver},
	} {
		t.Run(name, func(t *testing.T) {
			m, e := newManaged(t), newEnds(t)
			if _, err := m.q.Put(putAll(t, map[string]*ends{"a": e}, func() {})); err != nil {
				t.Fatal(err)
			}
			if c.do != nil {
				c.do(t, e)
			}
			e.crash()
			flows, wrong := flowsOf(t, OpenQueue(m.copies(), nil))
			if len(flows) != 1 || len(wrong) > 0 {
				t.Fatal(flows, wrong)
			}
			defer flows[0].Close()
			f, err := flows[0].Take(c.recall)
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if c.want != nil { // and the queue has copies still
				for _, c := range []*net.TCPConn{e.client, e.server} {
					if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
						t.Errorf("an end gets %v, want a reset", err)
					}
				}
				return
			}
			defer f.Close()
			if c.check != nil {
				c.check(t, f)
			}
		})
	}
}

// TestTakeEnded: where both streams have ended what one side is still to get comes to it.
func TestTakeEnded(t *testing.T) {
	m, e := newManaged(t), newEnds(t)
	if _, err := m.q.Put(putAll(t, map[string]*ends{"a": e}, func() {})); err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 200<<10)
	go e.server.Write(big)
	pass(t, e.up, e.down, len(big))
	e.server.CloseWrite()
	e.client.CloseWrite()
	for _, c := range [][2]*net.TCPConn{{e.down, e.up}, {e.up, e.down}} {
		if _, err := c[0].Read(make([]byte, 1)); err != io.EOF {
			t.Fatal(err)
		}
		c[1].CloseWrite()
	}
	if _, err := io.ReadAll(e.server); err != nil {
		t.Fatal(err)
	}
	for !tcpsock.IsClosed(fdOf(t, e.up)) {
		time.Sleep(time.Millisecond)
	}
	e.crash()
	flows, _ := flowsOf(t, OpenQueue(m.copies(), nil))
	defer flows[0].Close()
	if _, err := flows[0].Take(nil); !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(e.client); len(b) != len(big) || err != nil {
		t.Errorf("%d bytes come, %v", len(b), err)
	}
}

func fileOf(fd int) *os.File { return os.NewFile(uintptr(fd), "copy") }
