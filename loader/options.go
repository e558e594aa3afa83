package loader

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Name is what configuration, logs and metrics call this datapath.
const Name = "sockmap"

// LocalName is what they call that of [Loader.Local].
const LocalName = "sk_msg"

// DefaultMaxFlows is Options.MaxFlows where it is 0.
const DefaultMaxFlows = 65536

// Options say how to load. The zero value is good for one daemon on a machine.
type Options struct {
	// Instance names the pins, below BPFFS/tailsplice/. Two daemons on one machine need two names; "" = "default".
	// Characters that bpffs can't have in a name are replaced.
	Instance string

	// BPFFS is where the BPF file system is or will be mounted; "" = /sys/fs/bpf.
	BPFFS string

	// MaxFlows bounds the flows at a time; 0 = DefaultMaxFlows. One costs 208 bytes of maps from the
	// start, and about 700 bytes more while it lives, beside what Linux keeps for its sockets.
	MaxFlows int

	// Local also loads what [Loader.Local] needs. Where that fails, the rest works all the same.
	Local bool

	// KnownBad loads also on kernels whose version is known to lose, repeat or corrupt spliced data.
	KnownBad bool

	// Log gets what an operator should know; nil = nothing.
	Log *slog.Logger
}

// Flow is what Splice is told about a flow, and how it answers. It is identical to userspace/relay's Flow,
// which explains each field; the two packages may not import each other.
type Flow = struct {
	ID, Route string
	Up, Down  int64
	Buffer    int64
	Idle      time.Duration
	Moved     func() (up, down int64)
	Busy      int64
	Ended     func(up, down int64, end string, err error)
	Returned  func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, forget func(), reason error)
}

// The ends of a flow, as userspace/relay names them.
const (
	endEOF             = "eof"
	endDownstreamReset = "downstream_reset"
	endUpstreamReset   = "upstream_reset"
	endIdle            = "idle"
	endCanceled        = "canceled"
	endError           = "error"
)

// refusal is why Splice took a flow not over. It is counted by its text, so there are few.
type refusal string

func (r refusal) Error() string { return string(r) }

const (
	refusedOff         = refusal("sockmap is switched off")
	refusedFull        = refusal("too many spliced flows")
	refusedState       = refusal("a side has already ended")
	refusedMultipath   = refusal("a side is multipath TCP")
	refusedDescriptors = refusal("out of file descriptors")
	refusedSocket      = refusal("a socket could not be read")
	refusedMaps        = refusal("a BPF map could not be written")
	refusedFilter      = refusal("the filter that bounds memory could not be attached to a socket")
	refusedInsert      = refusal("the kernel refused a socket")

	refusedUnknown    = refusal("the target's process is not known yet")
	refusedTargets    = refusal("more targets than sk_msg can track are in use")
	refusedElsewhere  = refusal("the target is not a process on this host")
	refusedRootCgroup = refusal("the target's process is in the root cgroup")
	refusedNoCgroup   = refusal("the cgroup of the target's process could not be found")
	refusedAttach     = refusal("the program could not be attached to the cgroup of the target's process")
	refusedZeroCopy   = refusal("the target's process sends with MSG_ZEROCOPY")
	refusedNotCaught  = refusal("the target's socket was not seen when it was created")
	refusedPair       = refusal("the target's socket is not the peer of ours")
)

// Again reports whether New may do what it failed to do when it is tried again: what was lacking is what the machine, or
// this process, may have later.
func Again(err error) bool {
	if e := new(SelfTestError); errors.As(err, &e) {
		return e.Again()
	}
	return slices.ContainsFunc([]error{syscall.ENOMEM, syscall.ENOBUFS, syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN},
		func(lack error) bool { return errors.Is(err, lack) })
}

// SelfTestError says which rules this kernel breaks, or what about the machine kept it from proving that it
// keeps them.
type SelfTestError struct{ Findings []Finding }

func (e *SelfTestError) Error() string {
	var what []string
	for _, f := range e.Findings {
		if f.State == StateMissing {
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

// Info is a spliced flow, live.
type Info struct {
	ID               string `json:"id"`
	Route            string `json:"route"`
	Downstream       string `json:"downstream"`
	DownstreamLocal  string `json:"downstream_local"`
	UpstreamLocal    string `json:"upstream_local"`
	Upstream         string `json:"upstream"`
	DownstreamCookie uint64 `json:"downstream_cookie"` // what ss -e prints as sk, and the key in the flows map
	UpstreamCookie   uint64 `json:"upstream_cookie"`
	State            string `json:"state"`                // spliced, half_closed, ending
	Up               int64  `json:"up"`                   // bytes, as from the count that Splice gives
	Down             int64  `json:"down"`                 //
	UpCopied         int64  `json:"up_copied"`            // of which userspace moved: the peer was slower, or userspace had the flow
	DownCopied       int64  `json:"down_copied"`          //
	UpTrimmed        int64  `json:"up_trimmed"`           // bytes that the kernel delivered twice, cut off
	DownTrimmed      int64  `json:"down_trimmed"`         //
	UpLocal          int64  `json:"up_local,omitempty"`   // bytes that went past TCP to a process on this host
	DownLocal        int64  `json:"down_local,omitempty"` // and from it
	UpWaiting        int64  `json:"up_waiting,omitempty"` // bytes received that the peer's TCP does not have yet
	DownWaiting      int64  `json:"down_waiting,omitempty"`
}

// Stats count since New.
type Stats struct {
	Flows    int            `json:"flows"`    // now, with those that are only recorded
	Spliced  uint64         `json:"spliced"`  // flows taken over, or recorded
	Refused  map[string]int `json:"refused"`  // by reason
	Faults   map[string]int `json:"faults"`   // flows reset since the verdict gave up, by reason
	Inserted uint64         `json:"inserted"` // times a direction came into the sockmap after it had begun
	Switched uint64         `json:"switched"` // times a direction went from redirecting to copying
	Bulk     uint64         `json:"bulk"`     // times a direction left the sockmap, since the flow was busy
	Clamped  uint64         `json:"clamped"`  // segments that were refused their payload, to bound memory; the sender sent it again
	Stalls   uint64         `json:"stalls"`   // times a flow had to be woken since an event was missing; should be 0
	Off      string         `json:"off"`      // why the datapath is switched off; empty: it is on
}
