package loader

import (
	"errors"
	"log/slog"
	"slices"
	"syscall"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/skmsg"
	"github.com/tailsplice/tailsplice/loader/sockmap"
)

// Options say how to load.
type Options struct {
	// Instance names the pins, below BPFFS/tailsplice/. Two daemons on one machine need two names; "" =
	// "default". Characters that bpffs can't have in a name are replaced.
	Instance string

	// BPFFS is where the BPF file system is or will be mounted; "" = /sys/fs/bpf.
	BPFFS string

	// MaxFlows bounds the flows at a time, > 0. One costs 208 bytes of maps from the
	// start, and about 700 bytes more while it lives, beside what Linux keeps for its sockets.
	MaxFlows int

	// Local also loads what [Loader.Local] needs. Where that fails, the rest works all the same.
	Local bool

	// KnownBad loads also on kernels whose version is known to lose, repeat or corrupt spliced data.
	KnownBad bool

	// Log gets what an operator should know; nil = nothing.
	Log *slog.Logger
}

// Again reports whether New may do what it failed to do when it is tried again: what was lacking is what the
// machine, or this process, may have later.
func Again(err error) bool {
	if e := new(prove.SelfTestError); errors.As(err, &e) {
		return e.Again()
	}
	return slices.ContainsFunc([]error{syscall.ENOMEM, syscall.ENOBUFS, syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN},
		func(lack error) bool { return errors.Is(err, lack) })
}

// What the packages of the mechanisms say, for those who use all of them.
type (
	Finding = host.Finding
	State   = host.State
	Flow    = prove.Flow
)

const (
	StateOK       = host.StateOK
	StateDegraded = host.StateDegraded
	StateMissing  = host.StateMissing
)

// Name and LocalName are what configuration, logs and metrics call the datapaths: of a Loader, and of
// [Loader.Local].
const (
	Name      = sockmap.Name
	LocalName = skmsg.Name
)

// ErrKnownBad is what New fails with on a kernel that is known to damage spliced streams.
var ErrKnownBad = host.ErrKnownBad
