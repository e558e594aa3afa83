package relaytest

import (
	"fmt"
	"time"
)

// A view is what one end of a flow did and saw.
type view struct {
	sent    int64 // bytes that its kernel took, urgent ones left out
	urgents int   // that it sent
	ended   bool  // its stream, by itself or with close

	left   string // how it left before the other's stream had ended: "", opReset or opClose
	acked  int64  // of sent, when it left, at least
	whole  bool   // when it left all was acknowledged, the end of its stream too
	unread bool   // when it left there were bytes that it had not read

	got    int64         // bytes that it read, urgent ones left out
	over   string        // how the other's stream ended for it: "", sawEnd or sawReset
	early  bool          // it saw that end before the other had ended its stream
	told   bool          // another call than a read told it of a reset
	paused time.Duration // the longest time for which it did not read
	waited time.Duration // how long the read waited that told it of a reset

	wrong   []string // what it found out by itself: a byte that differs, a step that takes too long
	refused bool     // then, TCP itself stood still
}

const (
	sawEnd   = "the end"
	sawReset = "a reset"
)

// between is what lies between the two ends.
type between struct {
	proxy bool

	// short: of the memory that the sockets of the proxy take, or of packets, much is missing. When a
	// reader sends as well, and the proxy does not take it, its last segments may be dropped after their
	// sequence number was noted. Linux refuses the reader's window updates from then on, which have a
	// lower one, until somebody takes what it sent: it seems to have stopped.
	short bool
}

// mayStop is less than how long a reader of what came before a reset may stop, so that all of it arrives: 2
// s.
const mayStop = 1500 * time.Millisecond

// breaks reports whether the other end may see a reset because of what v did.
func (v *view) breaks(other *view) bool {
	switch v.left {
	case opReset:
		return true
	case opClose: // bytes that came then, or later, are answered by a reset
		return v.unread || v.got < other.sent || other.urgents > 0
	}
	return false
}

// promise holds what came from one end to the other against what TCP promises when nobody is between them,
// and the Linux of both. Each fault is a sentence.
//
//   - Bytes arrive once and in order. (The reader compares them.)
//   - The end of a stream comes behind all of it, and not before it was sent.
//   - A reset is told as one, by a read or by another call, and only if the other end has made one.
//   - Who reads on gets what was acknowledged before the reset. A proxy has the leave to forget what waits
//     for a reader who stops for 2 s, or seems to, and Linux keeps it.
func promise(from, to *view, by between) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	reset := to.told || to.over == sawReset
	if to.got > from.sent {
		fault("read %d bytes of %d", to.got, from.sent)
	}
	if reset && !from.breaks(to) {
		fault("was told of a reset that nobody made")
	}
	if to.left != "" {
		return faults // it did not wait for more
	}
	switch {
	case to.over == "":
		fault("saw no end of the stream")
	case to.over == sawEnd && to.told: // the reset was told by the other call
	case to.over == sawEnd && to.early:
		fault("saw the end of a stream that had not ended, behind %d bytes", to.got)
	case to.over == sawEnd && to.got < from.sent:
		fault("saw the end behind %d bytes of %d", to.got, from.sent)
	case to.over == sawReset && from.whole && from.ended && !(by.proxy && to.sent+int64(to.urgents) > 0):
		// A proxy that is told of the reset by a write does not learn whether an end had come before.
		fault("saw a reset instead of the end that was acknowledged before it")
	}
	stopped := to.paused > mayStop || by.short && to.waited > mayStop && from.got < to.sent
	if reset && to.got < from.acked && !(by.proxy && stopped) {
		fault("read %d bytes of %d that were acknowledged before the reset", to.got, from.acked)
	}
	return faults
}
