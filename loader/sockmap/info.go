package sockmap

import (
	"syscall"

	"github.com/tailsplice/tailsplice/loader/prove"
)

// Name is what configuration, logs and metrics call this datapath.
const Name = "sockmap"

// Flow is what Splice is told about a flow, and how it answers.
type Flow = prove.Flow

// Refusal is why Splice took a flow not over. It is counted by its text, so there are few.
type Refusal string

func (r Refusal) Error() string { return string(r) }

// Is makes one that is about a limit of the process a limit for errors.Is.
func (r Refusal) Is(err error) bool { return r == refusedDescriptors && err == error(syscall.EMFILE) }

const (
	RefusedOff         = Refusal("sockmap is switched off")
	refusedFull        = Refusal("too many spliced flows")
	RefusedState       = Refusal("a side has already ended")
	refusedMultipath   = Refusal("a side is multipath TCP")
	refusedDescriptors = Refusal("out of file descriptors")
	refusedSocket      = Refusal("a socket could not be read")
	RefusedMaps        = Refusal("a BPF map could not be written")
	refusedFilter      = Refusal("the filter that bounds memory could not be attached to a socket")
	refusedInsert      = Refusal("the kernel refused a socket")
)

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
