package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// kept is a queue of flows, and copies of its ends, as the service manager has them.
type kept struct {
	t *testing.T
	q *handover.Queue

	mu sync.Mutex
	// +checklocks:mu
	has []handover.Socket
	// +checklocks:mu
	stored int // how often it was given some
}

// startKeeping is start of a daemon that keeps flows.
func startKeeping(t *testing.T, yaml string) *daemon {
	t.Helper()
	return startOptions(t, parse(t, yaml), Options{KeepsFlows: true})
}

// keep has the flows of d kept until the end of the test.
func keep(t *testing.T, d *daemon) *kept {
	m := &kept{t: t}
	m.q = handover.OpenQueue(nil, m.store)
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		d.KeepFlows(ctx, m.q, func() bool { return true })
	}()
	t.Cleanup(func() {
		cancel()
		<-over
		m.q.Close()
		handover.Close(m.copies())
	})
	return m
}

func (m *kept) store() error {
	all, err := m.q.Sockets()
	m.mu.Lock()
	defer m.mu.Unlock()
	handover.Close(m.has)
	m.has = all
	m.stored++
	return err
}

func (m *kept) copies() (all []handover.Socket) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.has {
		fd, err := unix.FcntlInt(s.File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			m.t.Error(err)
		}
		s.File = os.NewFile(uintptr(fd), "copy")
		all = append(all, s)
	}
	return all
}

// next are the flows that a process after a crash would find. The caller closes them.
func (m *kept) next() (flows []*handover.KeptFlow) {
	m.t.Helper()
	wrong := handover.OpenQueue(m.copies(), nil).Flows(m.t.Context(), func(k *handover.KeptFlow) { flows = append(flows, k) })
	if len(wrong) > 0 {
		m.t.Error(wrong)
	}
	return flows
}

// TestKeepFlows: what is kept of flows says rightly that nothing of them was lost, whatever came before their bytes,
// and whichever way they came.
func TestKeepFlows(t *testing.T) {
	plain := backend(t, echo)
	behindHeader := backend(t, func(c net.Conn) {
		defer c.Close()
		_, rest, err := proxyheader.Read(c, nil, 4096, time.Minute)
		if err == nil {
			c.Write(rest)
			io.Copy(c, c)
		}
	})
	inner, innerSlow, outer := freeAddr(t), freeAddr(t), freeAddr(t)
	addr := map[string]string{"plain": freeAddr(t), "slow": freeAddr(t), "sni": freeAddr(t), "sni-slow": freeAddr(t), "to header": outer}
	d := startKeeping(t, fmt.Sprintf(`
limits: { connections_per_source: 100 }
listeners:
  - { name: plain, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: slow, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: sni, listen: [%q], mode: sni, default: { forward: %q } }
  - { name: sni-slow, listen: [%q], mode: sni, default: { forward: %q } }
  - { name: outer, listen: [%q], mode: tcp, default: { forward: %q, send_proxy: v2 } }
  - { name: inner, listen: [%q], mode: tcp, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
  - { name: inner-slow, listen: [%q], mode: tcp, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
`, addr["plain"], plain, addr["slow"], byName(plain), addr["sni"], plain, addr["sni-slow"], byName(plain),
		outer, inner, inner, byName(innerSlow), innerSlow, behindHeader))
	m := keep(t, d)
	const more = 5000
	hello := helloFor(t, "example.com")
	want := map[string]int64{}
	for name, a := range addr {
		c := dialTCP(t, a)
		n := int64(more)
		if name == "sni" || name == "sni-slow" {
			n += int64(len(hello))
			c.Write(hello)
			if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
				t.Fatal(err)
			}
		}
		exchangeBytes(t, c, more)
		if name == "to header" {
			want["outer"], want["inner"], want["inner-slow"] = n, n, n
		} else {
			want[name] = n
		}
	}
	eventually(t, "all are kept", func() bool { n, _ := m.q.Len(); return n == len(want) })
	for range 2 { // and what was kept is so still
		for _, k := range m.next() {
			f, err := k.Take(nil)
			name := k.Flow.Listener
			if err != nil {
				t.Fatalf("%s: %v: %+v", name, err, *k.Flow.Kept)
			}
			if f.BytesUp != want[name] || f.BytesDown != want[name] {
				t.Errorf("%s: it has moved %d and %d, want %d", name, f.BytesUp, f.BytesDown, want[name])
			}
			f.Close()
			k.Close()
		}
	}
}

// TestKeptFlowsEnd: what is kept follows the flows that live, and costs no more than they do.
func TestKeptFlowsEnd(t *testing.T) {
	addr := freeAddr(t)
	d := startKeeping(t, fmt.Sprintf(`
limits: { connections_per_source: 1000 }
listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	m := keep(t, d)
	const flows = 4 * mostEndedKept
	var all []*net.TCPConn
	for range flows {
		c := dialTCP(t, addr)
		exchangeBytes(t, c, 10)
		all = append(all, c)
	}
	eventually(t, "all are kept", func() bool { n, _ := m.q.Len(); return n == flows })
	m.mu.Lock()
	if m.stored != 1 {
		t.Errorf("the manager was given something %d times", m.stored)
	}
	m.mu.Unlock()
	for i, c := range all[flows/4:] {
		switch i % 3 {
		case 0: // by EOF
			c.CloseWrite()
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Error(err)
			}
		case 1:
			c.SetLinger(0)
		}
		c.Close()
	}
	eventually(t, "the ended ones are gone", func() bool { n, isWhole := m.q.Len(); return n == flows/4 && isWhole })
	live := 0
	for _, k := range m.next() {
		f, err := k.Take(nil)
		if errors.Is(err, handover.ErrGone) { // the manager may not have been told yet
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		live++
		f.Close()
		k.Close()
	}
	if live != flows/4 {
		t.Errorf("%d flows live, want %d", live, flows/4)
	}
	eventually(t, "there is no look any more", func() bool { return !d.keeping.isAwake.Load() })
	for _, c := range all[:flows/4] {
		exchangeBytes(t, c, 10)
	}
}

// TestAdoptKept: a flow that was adopted after a crash is kept still, and one that another process has given is.
func TestAdoptKept(t *testing.T) {
	addr := freeAddr(t)
	d := startKeeping(t, fmt.Sprintf(`listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	m := keep(t, d)
	c := dialTCP(t, addr)
	exchangeBytes(t, c, 1000)
	eventually(t, "it is kept", func() bool { n, _ := m.q.Len(); return n == 1 })
	flows := m.next()
	// The other one is dead, as far as this flow goes.
	for _, fl := range d.Flows().Live() {
		s := fl.Killer.(*spliced)
		left := make(chan error, 1)
		s.isLeaving.Store(true)
		s.Leave(t.Context(), func(p *relay.Parcel, err error) {
			if err == nil {
				p.Down.Conn.Close()
				p.Up.Conn.Close()
				s.remove()
				s.in.release()
			}
			left <- err
		})
		if err := <-left; err != nil {
			t.Fatal(err)
		}
	}
	next := startKeeping(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, freeAddr(t), addr))
	f, err := flows[0].Take(nil)
	if err != nil {
		t.Fatal(err)
	}
	begin, _, err := next.AdoptFlow(f)
	if err != nil {
		t.Fatal(err)
	}
	begin()
	flows[0].Close()
	exchangeBytes(t, c, 1000)
	s := next.Flows().Live()[0].Killer.(*spliced)
	if !s.isKept.Load() || *s.balance != *f.Kept {
		t.Errorf("it is kept: %v, with %+v, was %+v", s.isKept.Load(), s.balance, f.Kept)
	}
	eventually(t, "all bytes are counted", func() bool { up, down := s.bytes(); return up == 2000 && down == 2000 })
	flows = m.next()
	if f, err = flows[0].Take(nil); err != nil {
		t.Fatal(err)
	}
	f.Close()
	flows[0].Close()
	s.isKept.Store(false) // as of a flow that another process has given
	other := keep(t, next)
	eventually(t, "it is kept there", func() bool { n, _ := other.q.Len(); return n == 1 })
	flows = other.next()
	if f, err = flows[0].Take(nil); err != nil {
		t.Fatal(err)
	}
	f.Close()
	flows[0].Close()
}

// TestKeepsWhatItCan: where the manager fails that is said once, and nothing else is hurt.
func TestKeepsWhatItCan(t *testing.T) {
	addr := freeAddr(t)
	d := startKeeping(t, fmt.Sprintf(`listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	q := handover.OpenQueue(nil, func() error { return errors.New("no manager") })
	for range 3 {
		c := dialTCP(t, addr)
		exchangeBytes(t, c, 10)
	}
	time.Sleep(keepAfter)
	for range 3 {
		d.keepNow(q, true, time.Now())
	}
	if n := d.log.Count("not all flows are kept"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
}

// TestKeepsWithoutFiles: where there are no descriptors flows are kept as soon as there are some, and those that
// were stay so.
func TestKeepsWithoutFiles(t *testing.T) {
	addr := freeAddr(t)
	d := startKeeping(t, fmt.Sprintf(`listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	m := &kept{t: t}
	m.q = handover.OpenQueue(nil, m.store)
	t.Cleanup(func() { m.q.Close(); handover.Close(m.copies()) })
	exchangeBytes(t, dialTCP(t, addr), 10)
	old := time.Now().Add(keepAfter)
	is := func(want int) {
		t.Helper()
		flows := m.next()
		if len(flows) != want {
			t.Errorf("%d flows are kept, want %d", len(flows), want)
		}
		for _, k := range flows {
			k.Close()
		}
	}
	eventually(t, "the first is kept", func() bool { d.keepNow(m.q, true, old); n, _ := m.q.Len(); return n == 1 })
	exchangeBytes(t, dialTCP(t, addr), 10)
	eventually(t, "there are two", func() bool { return d.Flows().Len() == 2 })
	old = time.Now().Add(keepAfter)
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	none := files
	none.Cur = 4 // which are open
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	for range 2 * mostTries {
		if next := d.keepNow(m.q, true, old); next != keepEvery {
			t.Errorf("the next look is in %v", next)
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	is(1)
	d.keepNow(m.q, true, old)
	is(2)
	if n := d.log.Count("too many open files"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
}

// endedOnly is a queue that has flows which have ended, and nothing else, and can't be renewed.
type endedOnly struct{ flowKeeper }

func (endedOnly) Len() (int, bool) { return 1, true }

func (endedOnly) Renew(iter.Seq2[*handover.KeptFlow, error], int) (int, error) {
	return 0, errors.New("no manager")
}

// TestRenewsLater: where the last flows have ended, and the queue can't be renewed, that is tried again, though no
// flow begins or ends.
func TestRenewsLater(t *testing.T) {
	d := startKeeping(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, freeAddr(t), freeAddr(t)))
	if next := d.keepNow(endedOnly{}, true, time.Now()); next <= 0 || next > renewEvery {
		t.Errorf("the next look is in %v", next)
	}
}

// fullOfEnded is a queue that has as many flows as it says, of which none lives.
type fullOfEnded struct {
	flowKeeper
	ended, put int
}

func (q *fullOfEnded) Len() (int, bool) { return q.ended, true }

func (q *fullOfEnded) Put(flows iter.Seq2[*handover.KeptFlow, error]) (int, error) {
	for k := range flows {
		k.Close()
		q.put++
	}
	return q.put, nil
}

// TestKeepsNoMore: while flows that have ended can't be given up, there are not more and more of them.
func TestKeepsNoMore(t *testing.T) {
	addr := freeAddr(t)
	d := startKeeping(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	exchangeBytes(t, dialTCP(t, addr), 10)
	eventually(t, "there is a flow", func() bool { return d.Flows().Len() == 1 })
	for _, q := range []*fullOfEnded{{ended: mostEndedKept + 1}, {ended: mostEndedKept}} {
		if next := d.keepNow(q, false, time.Now().Add(keepAfter)); next != keepEvery {
			t.Errorf("the next look is in %v", next)
		}
		if want := mostEndedKept + 1 - q.ended; q.put != want {
			t.Errorf("beside %d that have ended %d are kept, want %d", q.ended, q.put, want)
		}
	}
}

// TestRenewalIsDue: flows that have ended are given up soon, sooner where memory is short or they are many, and not
// at once again where that has failed.
func TestRenewalIsDue(t *testing.T) {
	for _, c := range []struct {
		name        string
		rested      time.Duration
		ended, kept int
		notWhole    bool
		short       bool
		failed      bool
		want        bool
	}{
		{name: "all live", rested: time.Hour, kept: 1},
		{name: "one has ended", rested: renewEvery, ended: 1, kept: 1000, want: true},
		{name: "one has ended just now", rested: time.Second, ended: 1, kept: 1000},
		{name: "memory is short", rested: renewEvery / 5, ended: 1, kept: 1000, short: true, want: true},
		{name: "memory is short again", rested: time.Second, ended: 1, kept: 1000, short: true},
		{name: "memory is short, and all live", rested: time.Hour, kept: 1000, short: true},
		{name: "most have ended", rested: time.Millisecond, ended: mostEndedKept + 1, kept: 3, want: true},
		{name: "most have ended, and it failed", rested: time.Millisecond, ended: mostEndedKept + 1, kept: 3, failed: true},
		{name: "it failed a while ago", rested: renewEvery, ended: mostEndedKept + 1, kept: 3, failed: true, want: true},
		{name: "not all of it can be read", rested: renewEvery, kept: 3, notWhole: true, want: true},
	} {
		now := time.Now()
		k := &keeping{renewed: now.Add(-c.rested), rest: renewEvery, failed: c.failed}
		if is := k.isDue(now, c.ended, c.kept, !c.notWhole, c.short); is != c.want {
			t.Errorf("%s: %v", c.name, is)
		}
	}
}
