package loader

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func (f *flow) dump() string {
	s := ""
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return "closed"
	}
	for i := range f.halves {
		h := &f.halves[i]
		m := h.shared()
		var si, pi unix.TCPInfo
		h.source().info(&si)
		h.peer().info(&pi)
		w, _ := h.peer().written()
		q, _ := h.peer().unacked()
		in, _ := h.source().unread()
		s += fmt.Sprintf("half %d: red %d passed %d consumed %d (mine %d) rest %d held %v bits %b also %v fin %v done %v | handled %d received %d written %d outq %d inq %d fault %d old/new %d/%d trimmed %d peerwin %d\n", i, load64(&m.Redirected), load64(&m.Passed), load64(&m.Consumed), h.consumed, len(h.rest), h.held, h.bits.Load(), f.also, h.fin, h.done.Load(),
			m.Redirected+m.Passed, si.Bytes_received-h.read0, w-h.written0, q, in, m.Fault, m.Older, m.Newer, m.Trimmed, pi.Snd_wnd)
	}
	return s
}
