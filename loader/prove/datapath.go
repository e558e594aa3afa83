// Package prove says what a datapath in the kernel has to do, and proves on loopback that it does.
//
// A datapath takes flows by [Datapath], an interface with nothing of its mechanism in it, so that the next
// one gets the same proof: each has to pass [Stream], and one with a process on this host at its end
// [PastTCP] as well. A test that fails is the kernel's fault, unless the machine lacks something at the
// moment.
//
//	datapath.go        what a flow is, and what takes it over
//	prove_linux.go     runs tests, and says what the machine lacks
//	trial_linux.go     what a test has: a client, a server, and the flow between them
//	stream_linux.go    the tests of every datapath
//	past_tcp_linux.go  the tests of one whose bytes go past TCP
//	inject_linux.go    segments of our own making
package prove

import (
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/loader/host"
)

// Flow is what a datapath is told about a flow, and how it answers. It is identical to userspace/datapath's
// Handoff, which explains each field; the two packages may not import each other.
type Flow = struct {
	ID, Route string
	Up, Down  int64
	Buffer    int64
	Idle      time.Duration
	LastMoved time.Time
	Moved     func() (up, down int64)
	Busy      int64
	Ended     func(up, down int64, end string, err error)

	Recallable func(recall func())
	Returned   func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, lastMoved time.Time,
		forget func(), reason error)
}

// The ends of a flow, as userspace/relay names them.
const (
	EndEOF             = "eof"
	EndDownstreamReset = "downstream_reset"
	EndUpstreamReset   = "upstream_reset"
	EndIdle            = "idle"
	EndCanceled        = "canceled"
	EndError           = "error"
)

// SelfTestError says which rules this kernel breaks, or what about the machine kept it from proving that it
// keeps them.
type SelfTestError struct{ Findings []host.Finding }

func (e *SelfTestError) Error() string {
	var what []string
	for _, f := range e.Findings {
		if f.State == host.StateMissing {
			what = append(what, f.Name+": "+f.Detail)
		}
	}
	if e.Again() {
		f := e.Findings[len(e.Findings)-1]
		return "it can't be proven now that this kernel splices rightly: " + f.Detail + " (" + f.Advice + ")"
	}
	return "this kernel does not splice rightly: " + strings.Join(what, "; ")
}

// Again reports whether to try again makes sense: what failed may be the machine's present state.
func (e *SelfTestError) Again() bool {
	return len(e.Findings) > 0 && e.Findings[len(e.Findings)-1].Lacks
}

// Failed returns a [*SelfTestError] if findings say that the datapath can't be used, else nil.
func Failed(findings []host.Finding) error {
	for _, f := range findings {
		if f.State == host.StateMissing || f.Lacks {
			return &SelfTestError{findings}
		}
	}
	return nil
}
