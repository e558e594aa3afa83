package sockmap

import (
	"syscall"

	"github.com/tailsplice/tailsplice/loader/prove"
)

// Name is what configuration, logs and metrics call this datapath.
const Name = "sockmap"

// Flow is what Splice is told about a flow, and how it answers.
type Flow = prove.Flow

// Refusal is why Splice did not take a flow over. It is counted by its text, so there are few.
type Refusal string

func (r Refusal) Error() string { return string(r) }

// Is has errors.Is find that a lack of descriptors is EMFILE.
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
