package sockmap

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// +checklocksignore
func (f *flow) dump() string {
	s := ""
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return "closed"
	}
	for i := range f.directions {
		d := &f.directions[i]
		m := d.shared()
		var si, pi unix.TCPInfo
		d.source().info(&si)
		d.peer().info(&pi)
		w, _ := d.peer().written()
		q, _ := d.peer().unacked()
		in, _ := d.source().unread()
		s += fmt.Sprintf("direction %d: red %d passed %d consumed %d (mine %d) rest %d held %v bits %b also %v fin %v done %v | handled %d received %d written %d outq %d inq %d fault %d old/new %d/%d trimmed %d peerwin %d\n", i, load64(&m.Redirected), load64(&m.Passed), load64(&m.Consumed), d.consumed, len(d.rest), d.mustWait, d.bits.Load(), f.watched, d.sawFIN, d.isDone.Load(),
			m.Redirected+m.Passed, si.Bytes_received-d.read0, w-d.written0, q, in, m.Fault, m.Older, m.Newer, m.Trimmed, pi.Snd_wnd)
	}
	return s
}
