package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func twoEnds(t *testing.T) (a, b *Link) {
	t.Helper()
	a, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	if b, err = newLink(theirs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// files are what the descriptors of this process are of, and how many are of each.
type files map[string]int

func openFiles(t *testing.T) files {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := make(files)
	for _, f := range all {
		if of, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil { // else it was that of the directory
			open[of]++
		}
	}
	return open
}

func (f files) count() (n int) {
	for _, of := range f {
		n += of
	}
	return n
}

// more gives those that are not in before. What has gone since is not of the test: the end of an earlier one.
func (now files) more(before files) (more []string) {
	for of, n := range now {
		if n > before[of] {
			more = append(more, of)
		}
	}
	return more
}

// TestSockets: more sockets than a message takes arrive in their order, as they were, and stay as they are for
// who had them: those that do not block still do not.
func TestSockets(t *testing.T) {
	old, new := twoEnds(t)
	before := openFiles(t)
	const n = 2*mostFiles + 7
	var all []Socket
	var listeners []*net.TCPListener
	for i := range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, ln.(*net.TCPListener))
		all = append(all, Socket{Kind: KindListener, Name: fmt.Sprint("listener ", i), Address: ln.Addr().String(), File: f})
	}
	sent := make(chan error, 1)
	parts := []json.RawMessage{json.RawMessage(`[1]`), json.RawMessage(`{"b":"` + strings.Repeat("x", mostBytes/2) + `"}`)}
	go func() { sent <- old.SendSockets(all, json.RawMessage(`{"a":1}`), 7, parts...) }()
	got, last, more, err := new.receiveSockets(time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if string(last.State) != `{"a":1}` || last.Remains.Flows != 7 || len(more) != 2 || string(more[0]) != string(parts[0]) ||
		string(more[1]) != string(parts[1]) {
		t.Errorf("the state that came is %s, %d parts, and %d flows live", last.State, len(more), last.Remains.Flows)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if len(got) != n {
		t.Fatalf("%d sockets came, want %d", len(got), n)
	}
	for i, s := range got {
		ln, err := net.FileListener(s.File)
		if err != nil {
			t.Fatal(err)
		}
		if s.Name != all[i].Name || ln.Addr().String() != s.Address {
			t.Errorf("socket %d is %s at %s, want %s", i, s.Name, ln.Addr(), all[i].Address)
		}
		ln.Close()
		raw, _ := listeners[i].SyscallConn()
		raw.Control(func(fd uintptr) {
			if flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("socket %d blocks who had it (%v)", i, err)
			}
		})
		listeners[i].Close()
	}
	Close(got)
	Close(all)
	if more := openFiles(t).more(before); len(more) > 0 {
		t.Errorf("files are left open: %v", more)
	}
}

// TestLongState: a state that has no room beside the names of sockets comes whole, also to a process that knows
// nothing of parts, which has no state but that.
func TestLongState(t *testing.T) {
	old, new := twoEnds(t)
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []Socket
	for range mostFiles {
		all = append(all, Socket{Kind: KindListener, Name: strings.Repeat("n", 200), Address: "a", File: f})
	}
	state := json.RawMessage(`"` + strings.Repeat("s", mostBytes-1000) + `"`)
	for _, c := range []struct {
		all   []Socket
		state json.RawMessage
	}{{all, state}, {all, nil}, {nil, state}, {nil, nil}, {all[:1], json.RawMessage("{}")}} {
		sent := make(chan error, 1)
		go func() { sent <- old.SendSockets(c.all, c.state, 7, json.RawMessage("1"), json.RawMessage("2")) }()
		sockets, got := 0, json.RawMessage(nil)
		for { // as versions do that know no parts
			m, err := new.Receive(time.Now().Add(time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			sockets += len(m.Sockets)
			Close(m.Sockets)
			if m.Step == Sockets && !m.More {
				got = m.State
				break
			}
		}
		if err := <-sent; err != nil || sockets != len(c.all) || string(got) != string(c.state) {
			t.Errorf("%d sockets came of %d, and a state of %d bytes of %d: %v", sockets, len(c.all), len(got), len(c.state), err)
		}
	}
}

// TestPartsFail: the sockets come, with the state, though a part before them can't be sent.
func TestPartsFail(t *testing.T) {
	old, new := twoEnds(t)
	long := json.RawMessage(`"` + strings.Repeat("p", mostBytes) + `"`)
	if err := old.SendSockets(nil, json.RawMessage("1"), 7, json.RawMessage("2"), long); err != nil {
		t.Fatal(err)
	}
	_, last, more, err := new.receiveSockets(time.Now().Add(time.Minute))
	if err != nil || string(last.State) != "1" || len(more) != 1 || string(more[0]) != "2" {
		t.Errorf("%+v, %d parts: %v", last, len(more), err)
	}
}

// TestGarbage: what makes no sense is an error, and descriptors that came with it are closed.
func TestGarbage(t *testing.T) {
	old, new := twoEnds(t)
	before := openFiles(t)
	send := func(text string, files int) {
		t.Helper()
		var fds []int
		for range files {
			fds = append(fds, 0)
		}
		if _, _, err := old.c.WriteMsgUnix([]byte(text), unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		text  string
		files int
	}{
		{"garbage", 2}, {`{"version":1,"step":"sockets"}`, 200}, {strings.Repeat("x", mostBytes+1), 3},
		{`{"version":1,"step":"` + strings.Repeat("x", mostBytes) + `"}`, 1},
	} {
		send(c.text, c.files)
		if m, err := new.Receive(time.Now().Add(time.Minute)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%.40q with %d files is taken as %+v (%v)", c.text, c.files, m, err)
		}
		if more := openFiles(t).more(before); len(more) > 0 {
			t.Errorf("%.40q with %d files: files are left open: %v", c.text, c.files, more)
		}
	}
	if err := old.Send(Message{Step: Yours}); err != nil {
		t.Fatal(err)
	}
	if m, err := new.Receive(time.Now().Add(time.Minute)); err != nil || m.Step != Yours {
		t.Errorf("after that: %+v, %v", m, err)
	}
	old.Close()
	if _, err := new.Receive(time.Now().Add(time.Minute)); !errors.Is(err, io.EOF) {
		t.Errorf("the other end is closed: %v, want EOF", err)
	}
}

// TestElders: what is left of an older process is known while it lives, and it learns which one is the newest.
func TestElders(t *testing.T) {
	old, new := twoEnds(t)
	states := make(chan json.RawMessage, 1)
	e := Elders{OnState: func(s json.RawMessage) { states <- s }}
	e.Add(new)
	expect := func(step string) *Message {
		t.Helper()
		m, err := old.Receive(time.Now().Add(time.Minute))
		if err != nil || m.Step != step {
			t.Fatalf("got %+v (%v), want %s", m, err, step)
		}
		return m
	}
	if m := expect(Newest); m.PID != os.Getpid() {
		t.Errorf("the newest is %d, want %d", m.PID, os.Getpid())
	}
	until := func(what string, is func([]Remains) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !is(e.List()); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, e.List())
			}
		}
	}
	old.Send(Message{Step: Left, Remains: &Remains{PID: 7, Flows: 3, Connections: 4}})
	until("the older process is not known", func(all []Remains) bool { return len(all) == 1 && all[0].Flows == 3 && all[0].PID == 7 })
	old.Send(Message{Step: State})
	old.Send(Message{Step: State, State: json.RawMessage(`{"late":1}`)})
	if s := <-states; string(s) != `{"late":1}` {
		t.Errorf("what comes to the state later is %s", s)
	}
	e.End(1500 * time.Millisecond)
	if m := expect(End); m.Within != 1500 {
		t.Errorf("it is to end within %d ms, want 1500", m.Within)
	}
	old.Send(Message{Step: Left, Ended: true, Remains: &Remains{PID: 7}})
	until("it has nothing left", func(all []Remains) bool { return len(all) == 0 })
	if all, err := e.Sockets(); err != nil || len(all) != 1 {
		t.Errorf("it stays, and is handed on: %v, %v", all, err)
	} else {
		Close(all)
	}
	old.Close()
	until("it is gone", func([]Remains) bool {
		all, err := e.Sockets()
		Close(all)
		return err == nil && len(all) == 0
	})
}

// TestEldersMiss: a message that can't be received is the only one that is missed, on either side, and no
// process is told to end within a time that is none to the other.
func TestEldersMiss(t *testing.T) {
	old, new := twoEnds(t)
	var e Elders
	e.Add(new)
	told := make(chan *Message)
	go func() {
		old.Hear(func(m *Message) { told <- m })
		close(told)
	}()
	hear := func(step string) *Message {
		t.Helper()
		select {
		case m := <-told:
			if m == nil || m.Step != step {
				t.Fatalf("the older process hears %+v, want %s", m, step)
			}
			return m
		case <-time.After(time.Minute):
			t.Fatalf("the older process does not hear %s", step)
			return nil
		}
	}
	hear(Newest)
	// What comes with fewer descriptors than it names is what comes where no descriptor is free.
	const short = `{"version":1,"step":"flows","sockets":[{"kind":"flows"}]}`
	for _, l := range []*Link{old, new} {
		if _, err := l.c.Write([]byte(short)); err != nil {
			t.Fatal(err)
		}
	}
	old.Send(Message{Step: Left, Remains: &Remains{PID: 7}})
	for end := time.Now().Add(time.Minute); len(e.List()) != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the newest process hears nothing any more")
		}
	}
	e.End(math.MaxInt64)
	if m := hear(End); time.Duration(m.Within)*time.Millisecond != mostWithin {
		t.Errorf("it is to end within %d ms", m.Within)
	}
	new.Close()
	if m, ok := <-told; ok {
		t.Errorf("it hears %+v after the end", m)
	}
}
