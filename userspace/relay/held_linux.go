package relay

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// holding is what is known of the bytes that readers have no room for.
type holding struct {
	short     atomic.Bool // of memory
	scarceTCP atomic.Bool // memory of TCP
	saves     atomic.Bool // sockets' buffers are to grow no more

	leastReceive atomic.Int64 // bytes that a receive buffer may have meanwhile in any case
	piped        atomic.Int64 // bytes in this process and its pipes that pumps have no room for
	sweep        atomic.Int64 // the number of the last MeasureHeld

	measuring sync.Mutex
}

// SaveMemory says whether memory is short: then pipes are filled with little at a time.
func (r *Relay) SaveMemory(isShort bool) { r.holding.short.Store(isShort) }

// Piped is how many bytes this process and its pipes hold that readers have no room for. Cheap.
func (r *Relay) Piped() int64 { return r.holding.piped.Load() }

// Held is what the last [Relay.MeasureHeld] has found of the flow, in bytes, and since when no byte has gone
// to the reader who has no room.
func (c *Counters) Held() (bytes int64, since time.Time) {
	if f := c.flow.Load(); f == nil || c.sweep.Load() != f.relay.holding.sweep.Load() {
		return 0, time.Time{}
	}
	return c.held.Load(), c.since.Load().Time()
}

// hold notes that the pump of what s sends has so many bytes, and no room for them.
func (s *side) hold(bytes int) {
	if old := s.held.Swap(int64(bytes)); old != int64(bytes) {
		s.flow.relay.holding.piped.Add(int64(bytes) - old)
	}
}

// MeasureHeld finds the flows whose readers have no room, and what they hold for them: in the sockets'
// queues, in this process and in pipes. It takes about a microsecond for each.
//
// +checklocksignore: the analyzer takes the deferred unlock for none
func (r *Relay) MeasureHeld(now time.Time) {
	r.holding.measuring.Lock()
	defer r.holding.measuring.Unlock()
	number := r.holding.sweep.Load() + 1
	for _, s := range r.watches.stalled() {
		n := int(s.held.Load())
		s.control(func(fd int) { n += known(tcpsock.Unread(fd)) })
		s.other().control(func(fd int) { n += known(tcpsock.Unacked(fd)) })
		if moved := s.moved().Load(); s.stoodAt != moved || s.stoodSince == 0 {
			s.stoodAt, s.stoodSince = moved, moment.Of(now)
		}
		c := s.flow.counters
		if c.sweep.Swap(number) != number {
			c.held.Store(0)
			c.since.Store(s.stoodSince)
		}
		c.held.Add(int64(n))
		c.since.Store(min(c.since.Load(), s.stoodSince))
	}
	r.holding.sweep.Store(number)
}

// stalled are the sides whose pumps wait for room: they have them watched meanwhile.
func (w *watcher) stalled() (sides []*side) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sides {
		if s.held.Load() > 0 {
			sides = append(sides, s)
		}
	}
	return sides
}

// unread is how many bytes c has in its receive queue.
func unread(c net.Conn) (n int) {
	tcpsock.Control(c, func(fd int) { n, _ = tcpsock.Unread(fd) })
	return n
}

// known is n, which is 0 where nothing is known.
func known(n int, _ error) int { return n }
