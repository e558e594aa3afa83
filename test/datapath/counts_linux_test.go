package datapath

import (
	"context"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// countedLoader and countedLocal are the datapaths, and count what they are asked for, and how they answer.
type (
	countedLoader struct {
		*loader.Loader
		counts
	}
	countedLocal struct {
		*loader.Local
		counts
	}
)

// counts is of one datapath.
type counts struct {
	mu      sync.Mutex
	n       counted
	refused map[string]int
	known   map[uint64]place // the flows that it has, or had and may have again, by downstream's cookie
}

type counted struct {
	Flows     int // now, with those that are recorded
	Taken     int // flows, when they were taken first, or recorded
	HandedOff int // times a flow was taken
	Returned  int // times one was given back
	Refused   int // times none was taken
	Faults    int // flows that the verdict gave up
}

// place is where a flow is: stay counts the times that any was taken, and is 0 while the relay has this one.
type place struct {
	downstream string
	stay       int
}

func (l *countedLoader) Splice(ctx context.Context, down, up int, h datapath.Handoff) (func() (up, down int64), error) {
	return l.splice(ctx, down, up, h, l.Loader)
}

func (l *countedLocal) Splice(ctx context.Context, down, up int, h datapath.Handoff) (func() (up, down int64), error) {
	return l.splice(ctx, down, up, h, l.Local)
}

func (l *countedLoader) Record(down, up int, h datapath.Handoff) (forget func(), err error) {
	forget, err = l.Loader.Record(down, up, h)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.refuse(err)
		return nil, err
	}
	cookie := cookieOf(down)
	l.enter(cookie, place{downstream: tcpsock.Remote(down).String()})
	return l.forgets(cookie, forget), nil
}

func (c *counts) splice(ctx context.Context, down, up int, h datapath.Handoff, d datapath.Datapath) (count func() (up, down int64), err error) {
	cookie, downstream := cookieOf(down), tcpsock.Remote(down).String()
	ended, returned := h.Ended, h.Returned
	h.Ended = func(up, down int64, end string, err error) {
		c.mu.Lock()
		delete(c.known, cookie)
		if err != nil && strings.Contains(err.Error(), "the verdict gave up") {
			c.n.Faults++
		}
		c.mu.Unlock()
		ended(up, down, end, err)
	}
	if returned != nil {
		h.Returned = func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, lastMoved time.Time,
			forget func(), reason error) {
			c.mu.Lock()
			c.n.Returned++
			if delete(c.known, cookie); forget != nil {
				c.known[cookie] = place{downstream: downstream}
				forget = c.forgets(cookie, forget)
			}
			c.mu.Unlock()
			returned(down, up, downRest, upRest, upBytes, downBytes, lastMoved, forget, reason)
		}
	}
	c.mu.Lock()
	before, isKnown := c.known[cookie]
	c.n.HandedOff++
	c.enter(cookie, place{downstream, c.n.HandedOff}) // it may have ended when Splice returns
	c.mu.Unlock()
	if count, err = d.Splice(ctx, down, up, h); err == nil {
		return count, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n.HandedOff--
	if c.known[cookie] = before; !isKnown {
		c.n.Taken--
		delete(c.known, cookie)
	}
	c.refuse(err)
	return nil, err
}

// enter is called with mu held.
func (c *counts) enter(cookie uint64, p place) {
	if _, isKnown := c.known[cookie]; !isKnown {
		c.n.Taken++
	}
	if c.known == nil {
		c.known = map[uint64]place{}
	}
	c.known[cookie] = p
}

// refuse is called with mu held.
func (c *counts) refuse(err error) {
	if c.refused == nil {
		c.refused = map[string]int{}
	}
	c.refused[err.Error()]++
	c.n.Refused++
}

func (c *counts) forgets(cookie uint64, forget func()) func() {
	return func() {
		c.mu.Lock()
		delete(c.known, cookie)
		c.mu.Unlock()
		forget()
	}
}

func (c *counts) count() counted {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n.Flows = len(c.known)
	return c.n
}

// reasons are those of all refusals, with how many had each.
func (c *counts) reasons() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.refused)
}

// stayOf is the stay of the flow, or 0 while the relay has it.
func (c *counts) stayOf(t testing.TB, f *relaytest.Flow) int {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.known {
		if p.downstream == f.Client.LocalAddr().String() {
			return p.stay
		}
	}
	t.Fatal("the datapath does not know the flow")
	return 0
}

func cookieOf(fd int) uint64 {
	cookie, _ := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	return cookie
}
