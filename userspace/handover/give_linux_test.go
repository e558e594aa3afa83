package handover

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// tcpPair is a connection that a peer has the other end of.
func tcpPair(t *testing.T) (ours, peer net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if peer, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); peer.Close() })
	return ours, peer
}

// flowOf is a flow of two connections, whose other ends are returned.
func flowOf(t *testing.T, id string) (f *Flow, client, target net.Conn) {
	t.Helper()
	f = &Flow{ID: id, Listener: "web"}
	f.Down.Conn, client = tcpPair(t)
	f.Up.Conn, target = tcpPair(t)
	return f, client, target
}

// newcomer is a process that takes flows.
type newcomer struct {
	sync.Mutex
	come, begun, forgotten []*Flow
	refuses                error
}

// +checklocksignore: the analyzer takes the deferred unlock for none
func (n *newcomer) adopt(f *Flow) (begin, forget func(), err error) {
	n.Lock()
	defer n.Unlock()
	if n.refuses != nil {
		f.Close()
		return nil, nil, n.refuses
	}
	n.come = append(n.come, f)
	add := func(to *[]*Flow) func() {
		return func() {
			n.Lock()
			defer n.Unlock()
			*to = append(*to, f)
		}
	}
	return add(&n.begun), add(&n.forgotten), nil
}

// counts are how many flows have come, were begun, and were forgotten.
func (n *newcomer) counts() [3]int {
	n.Lock()
	defer n.Unlock()
	return [3]int{len(n.come), len(n.begun), len(n.forgotten)}
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// TestGive: flows arrive whole, with what was read of them in a message or in a file, and are begun by the new
// process once the old one has let them go. No descriptor is left.
func TestGive(t *testing.T) {
	old, new := twoEnds(t)
	before := openFiles(t)
	var n newcomer
	e := Elders{OnFlow: n.adopt}
	e.Add(new)
	if m, err := old.Receive(time.Now().Add(time.Minute)); err != nil || m.Step != Newest || !m.TakesFlows {
		t.Fatalf("%+v, %v: it says nothing of flows", m, err)
	}
	g, err := old.Give()
	if err != nil {
		t.Fatal(err)
	}
	const flows = 3*mostFlows + 5
	rest := make([]byte, mostRest)
	rand.Read(rest)
	var wg sync.WaitGroup
	type ends struct{ client, target net.Conn }
	all := map[string]ends{}
	sizes := []int{0, 1, inlineRest, inlineRest + 1, mostRest}
	for i := range flows {
		f, client, target := flowOf(t, fmt.Sprint(i))
		f.Down.Rest, f.Up.Rest = rest[:sizes[i%len(sizes)]], rest[:sizes[i/3%len(sizes)]]
		f.Up.IsEnded, f.Down.IsShut, f.BytesUp = true, true, int64(i)
		f.IdleTimeout = (8760 * time.Hour).Milliseconds()
		all[f.ID] = ends{client, target}
		for _, c := range []net.Conn{f.Down.Conn, f.Up.Conn} {
			if err := c.(*net.TCPConn).SetKeepAliveConfig(tcpsock.KeepAlive); err != nil {
				t.Fatal(err)
			}
		}
		wg.Add(1)
		g.Give(f, func(err error) {
			if err != nil {
				t.Errorf("flow %s: %v", f.ID, err)
			}
			f.Close()
			wg.Done()
		})
	}
	wg.Wait()
	until(t, "not all are begun", func() bool { return n.counts() == [3]int{flows, flows, 0} })
	g.Close()
	for _, f := range n.begun {
		var i int
		fmt.Sscan(f.ID, &i)
		if !bytes.Equal(f.Down.Rest, rest[:sizes[i%len(sizes)]]) || !bytes.Equal(f.Up.Rest, rest[:sizes[i/3%len(sizes)]]) ||
			!f.Up.IsEnded || f.Up.IsShut || !f.Down.IsShut || f.BytesUp != int64(i) || f.Listener != "web" || f.IdleTimeout != (8760*time.Hour).Milliseconds() {
			t.Errorf("flow %d has come as %+v", i, f)
		}
		for _, c := range []struct{ ours, peer net.Conn }{{f.Down.Conn, all[f.ID].client}, {f.Up.Conn, all[f.ID].target}} {
			tcpsock.Control(c.ours, func(fd int) {
				if _, err := unix.Write(fd, []byte(f.ID+"\n")); err != nil {
					t.Error(err)
				}
				if n, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE); n != int(tcpsock.KeepAlive.Idle/time.Second) {
					t.Errorf("keep-alive begins after %d s (%v)", n, err)
				}
			})
			var got string
			if fmt.Fscan(c.peer, &got); got != f.ID {
				t.Errorf("the peer of flow %s reads %q", f.ID, got)
			}
		}
		f.Close()
		all[f.ID].client.Close()
		all[f.ID].target.Close()
	}
	until(t, "descriptors are left", func() bool { return len(openFiles(t).more(before)) == 0 })
}

// TestGiveRefused: what the new process does not take is the old one's as before.
func TestGiveRefused(t *testing.T) {
	old, new := twoEnds(t)
	n := newcomer{refuses: errors.New("no room for it")}
	e := Elders{OnFlow: n.adopt}
	e.Add(new)
	g, err := old.Give()
	if err != nil {
		t.Fatal(err)
	}
	give := func() error {
		f, client, _ := flowOf(t, "a")
		said := make(chan error, 1)
		g.Give(f, func(err error) { said <- err })
		err := <-said
		if _, writeErr := f.Down.Conn.Write([]byte("x")); writeErr != nil {
			t.Errorf("a flow that was refused: %v", writeErr)
		}
		if _, readErr := client.Read(make([]byte, 1)); readErr != nil {
			t.Errorf("a flow that was refused: %v", readErr)
		}
		return err
	}
	if err := give(); err == nil || err.Error() != "no room for it" {
		t.Errorf("refused: %v", err)
	}
	f, _, _ := flowOf(t, "b")
	said := make(chan error, 1)
	f.Name = string(bytes.Repeat([]byte("x"), mostBytes))
	g.Give(f, func(err error) { said <- err })
	if err := <-said; err == nil {
		t.Error("a record that no message takes was given")
	}
	n.Lock()
	n.refuses = ErrLeft
	n.Unlock()
	if err := give(); err == nil {
		t.Error("it was given to who takes none")
	}
	<-g.Lost() // since no other will be taken
	if err := give(); err == nil {
		t.Error("it was given to nobody")
	}
	g.Close()
	if err := give(); err != errClosed {
		t.Errorf("after Close: %v", err)
	}
}

// hand is one end of a connection by which flows go, moved by hand.
type hand struct {
	t *testing.T
	*Link
}

func (h *hand) read(step string) *Message {
	h.t.Helper()
	m, err := h.Receive(time.Now().Add(time.Minute))
	if err != nil || m.Step != step {
		h.t.Fatalf("got %+v (%v), want %s", m, err, step)
	}
	return m
}

func (h *hand) say(m Message) {
	h.t.Helper()
	if err := h.Send(m); err != nil {
		h.t.Fatal(err)
	}
}

// TestGiveToTheDead: the new process dies at each step. What it was not told to begin goes on in the old one.
func TestGiveToTheDead(t *testing.T) {
	for _, step := range []string{"nothing is read", "flow is read", "taken is said", "begin is read"} {
		t.Run(step, func(t *testing.T) {
			old, new := twoEnds(t)
			g, err := old.Give()
			if err != nil {
				t.Fatal(err)
			}
			m, err := new.Receive(time.Now().Add(time.Minute))
			if err != nil || m.Step != Flows {
				t.Fatalf("%+v, %v", m, err)
			}
			l, err := newLink(m.Sockets[0].File)
			if err != nil {
				t.Fatal(err)
			}
			h := hand{t, l}
			f, client, _ := flowOf(t, "a")
			said := make(chan error, 1)
			g.Give(f, func(err error) { said <- err })
			gone := false
			if step != "nothing is read" {
				m := h.read(FlowStep)
				Close(m.Sockets)
				if step != "flow is read" {
					h.say(Message{Step: Taken, Numbers: []uint64{m.Flows[0].Number, 12345}})
					h.read(Begin)
					gone = true
				}
			}
			l.Close()
			if err := <-said; (err == nil) != gone {
				t.Errorf("the old process takes it for given: %v (%v)", err == nil, err)
			}
			<-g.Lost()
			g.Close()
			if _, err := f.Down.Conn.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if _, err := client.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
		})
	}
}

// gives is a process that gives flows, and the hand of the one that is to take them. The caller closes both.
func gives(t *testing.T) (*Giver, hand) {
	t.Helper()
	old, new := twoEnds(t)
	g, err := old.Give()
	if err != nil {
		t.Fatal(err)
	}
	m, err := new.Receive(time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	l, err := newLink(m.Sockets[0].File)
	if err != nil {
		t.Fatal(err)
	}
	return g, hand{t, l}
}

// TestGiveKilled: a flow that is killed on its way is not begun by the process that has taken it. Others are.
func TestGiveKilled(t *testing.T) {
	g, h := gives(t)
	defer h.Close()
	defer g.Close()
	var killed atomic.Bool
	flows, said := map[uint64]*Flow{}, map[*Flow]chan error{}
	for _, id := range []string{"a", "b"} {
		f, _, _ := flowOf(t, id)
		f.IsKilled = func() bool { return id == "a" && killed.Load() }
		end := make(chan error, 1)
		said[f] = end
		g.Give(f, func(err error) { end <- err })
		m := h.read(FlowStep)
		Close(m.Sockets)
		flows[m.Flows[0].Number] = f
	}
	killed.Store(true)
	var numbers []uint64
	for n := range flows {
		numbers = append(numbers, n)
	}
	h.say(Message{Step: Taken, Numbers: numbers})
	for range flows { // in either order
		m, err := h.Receive(time.Now().Add(time.Minute))
		if err != nil || len(m.Numbers) != 1 {
			t.Fatalf("%+v, %v", m, err)
		}
		f := flows[m.Numbers[0]]
		want, why := Begin, error(nil)
		if f.ID == "a" {
			want, why = Keep, errKilled
		}
		if err := <-said[f]; m.Step != want || err != why {
			t.Errorf("%s of %s: %v", m.Step, f.ID, err)
		}
	}
}

// TestGiveIsLate: a process that does not answer is told that the old one goes on, before that does, and what it
// says of the flow later changes nothing.
func TestGiveIsLate(t *testing.T) {
	g, h := gives(t)
	defer h.Close()
	defer g.Close()
	f, _, _ := flowOf(t, "a")
	said := make(chan error, 1)
	g.Give(f, func(err error) { said <- err })
	first := h.read(FlowStep)
	Close(first.Sockets)
	if m := h.read(Keep); len(m.Numbers) != 1 || m.Numbers[0] != first.Flows[0].Number {
		t.Errorf("%+v", m)
	}
	if err := <-said; !errors.Is(err, errLate) {
		t.Errorf("late: %v", err)
	}
	h.say(Message{Step: Taken, Numbers: []uint64{first.Flows[0].Number}})
	g.Give(f, func(err error) { said <- err }) // once more
	second := h.read(FlowStep)                 // and not begin
	Close(second.Sockets)
	h.say(Message{Step: Taken, Numbers: []uint64{second.Flows[0].Number}})
	h.read(Begin)
	if err := <-said; err != nil {
		t.Error(err)
	}
}

// TestGiveToWhoHangs: where the other process reads nothing, all flows are the old one's again, and it is
// known that none is to be given. They can be given once it reads.
func TestGiveToWhoHangs(t *testing.T) {
	old, new := twoEnds(t)
	g, err := old.Give()
	if err != nil {
		t.Fatal(err)
	}
	m, err := new.Receive(time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	l, err := newLink(m.Sockets[0].File)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, _, _ := flowOf(t, "a")
	f.Name = string(bytes.Repeat([]byte("x"), 30<<10))
	const flows = 100 // more than the socket takes
	said := make(chan error, flows)
	give := func() {
		own := *f
		g.Give(&own, func(err error) { said <- err })
	}
	for range flows {
		give()
	}
	for range flows {
		if err := <-said; !errors.Is(err, errLate) {
			t.Errorf("it hangs: %v", err)
		}
	}
	if g.Answers() {
		t.Error("it is taken for one that answers")
	}
	var n newcomer
	took := make(chan struct{})
	go func() {
		defer close(took)
		takeFlows(l, n.adopt)
	}()
	until(t, "it reads", g.Answers)
	give()
	if err := <-said; err != nil {
		t.Error(err)
	}
	g.Close()
	<-took
	if got := n.counts(); got[1] != 1 || got[0] != got[1]+got[2] {
		t.Errorf("come, begun and forgotten: %v", got)
	}
	for _, f := range n.come {
		f.Close()
	}
}

// TestCloseIsLate: a Giver that is closed takes back what nobody answers.
func TestCloseIsLate(t *testing.T) {
	old, _ := twoEnds(t)
	g, err := old.Give()
	if err != nil {
		t.Fatal(err)
	}
	f, _, _ := flowOf(t, "a")
	said := make(chan error, 1)
	g.Give(f, func(err error) { said <- err })
	g.Close()
	if err := <-said; !errors.Is(err, errLate) {
		t.Error(err)
	}
}

// TestTakeFromTheDead: the old process dies at each step. The new one goes on with what it knows, unless it was
// told not to.
func TestTakeFromTheDead(t *testing.T) {
	for _, c := range []struct {
		name   string
		says   []string
		unread bool // its answers are, so that the end is another error
		want   [3]int
	}{
		{"nothing is said", nil, false, [3]int{}},
		{"flow is said", []string{FlowStep}, false, [3]int{1, 1, 0}},
		{"flow is said, and the answer is not read", []string{FlowStep}, true, [3]int{1, 1, 0}},
		{"begin is said", []string{FlowStep, Begin}, true, [3]int{1, 1, 0}},
		{"keep is said", []string{FlowStep, Keep}, true, [3]int{1, 0, 1}},
		{"keep is said twice, and then begin", []string{FlowStep, Keep, Keep, Begin}, true, [3]int{1, 0, 1}},
		{"begin is said twice", []string{FlowStep, Begin, Begin}, true, [3]int{1, 1, 0}},
		{"garbage is said", []string{FlowStep, "garbage", Keep}, true, [3]int{1, 0, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			old, new := twoEnds(t)
			h := hand{t, old}
			f, _, _ := flowOf(t, "a")
			f.Number, f.Version = 7, FlowVersion
			packed, err := f.pack()
			if err != nil {
				t.Fatal(err)
			}
			var n newcomer
			for _, step := range c.says {
				switch step {
				case FlowStep:
					h.say(Message{Step: step, Flows: []*Flow{packed.flow}, Sockets: packed.sockets})
				case "garbage":
					if _, _, err := old.c.WriteMsgUnix([]byte("garbage"), unix.UnixRights(0, 0), nil); err != nil {
						t.Fatal(err)
					}
				default:
					h.say(Message{Step: step, Numbers: []uint64{7, 9}})
				}
			}
			took := make(chan struct{})
			if c.unread { // the new process reads when all is said, and answers who does not read any more
				go func() {
					defer close(took)
					takeFlows(new, n.adopt)
				}()
				if len(c.says) > 0 {
					until(t, "it does not come", func() bool { return n.counts()[0] == 1 })
				}
				old.Close()
			} else {
				old.Close()
				takeFlows(new, n.adopt)
				close(took)
			}
			<-took
			if got := n.counts(); got != c.want {
				t.Errorf("come, begun and forgotten: %v, want %v", got, c.want)
			}
		})
	}
}
