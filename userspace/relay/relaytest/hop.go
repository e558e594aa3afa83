package relaytest

import (
	"cmp"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// Hops are of the flows of a [Loopback] that are asked to leave.
type Hops struct {
	// Within is how long a flow stays with a relay at most before it is asked to leave that; 0 = 5 ms.
	Within time.Duration

	mu sync.Mutex
	// +checklocks:mu
	left int
	// +checklocks:mu
	stayed map[string]int // by the reason
}

// Counts are the times that a flow went from one relay to the other, and that one stayed, by the reason.
func (h *Hops) Counts() (left int, stayed map[string]int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	stayed = make(map[string]int)
	for why, n := range h.stayed {
		stayed[why] = n
	}
	return h.left, stayed
}

func (h *Hops) count(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil:
		h.left++
	case h.stayed == nil:
		h.stayed = map[string]int{err.Error(): 1}
	default:
		h.stayed[err.Error()]++
	}
}

// run is [relay.Relay.Run] for a flow that goes from r to another relay, and back, at random moments,
// until it ends.
func (h *Hops) run(ctx context.Context, r, other *relay.Relay, down, up net.Conn, o relay.Options, done func(relay.Result)) {
	if o.Counters == nil {
		o.Counters = new(relay.Counters)
	}
	over := make(chan struct{})
	finish := func(r relay.Result) {
		close(over)
		done(r)
	}
	go h.hop(ctx, r, other, o, finish, over)
	r.Run(ctx, down, up, o, finish)
}

func (h *Hops) hop(ctx context.Context, r, other *relay.Relay, o relay.Options, done func(relay.Result), over <-chan struct{}) {
	type answer struct {
		parcel *relay.Parcel
		err    error
	}
	answers := make(chan answer, 1)
	for {
		select {
		case <-over:
			return
		case <-time.After(rand.N(cmp.Or(h.Within, 5*time.Millisecond))):
		}
		asking, cancel := context.WithCancel(context.Background())
		if rand.N(8) == 0 { // whoever asks gives up at once, or in the middle
			time.AfterFunc(rand.N(200*time.Microsecond), cancel)
		}
		o.Counters.Leave(asking, func(p *relay.Parcel, err error) { answers <- answer{p, err} })
		a := <-answers
		cancel()
		h.count(a.err)
		if a.err != nil {
			continue
		}
		r, other = other, r
		// As between processes: the sockets have new descriptors, and the old ones are closed later.
		p := *a.parcel
		p.Down.Conn, p.Up.Conn = another(p.Down.Conn), another(p.Up.Conn)
		r.Resume(ctx, &p, o, done)
		a.parcel.Down.Conn.Close()
		a.parcel.Up.Conn.Close()
	}
}

// another gives another descriptor of c's socket, which is in Go's poller at times.
func another(c net.Conn) net.Conn {
	if rand.N(4) > 0 {
		c, err := c.(interface{ Copy() (net.Conn, error) }).Copy()
		if err != nil {
			panic(err)
		}
		return c
	}
	file, err := c.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		panic(err)
	}
	defer file.Close()
	c, err = net.FileConn(file)
	if err != nil {
		panic(err)
	}
	return c
}
