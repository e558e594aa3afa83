//go:build !linux || !(386 || amd64 || arm || arm64 || loong64 || mips || mips64 || mips64le || mipsle || ppc64 || ppc64le || riscv64 || s390x)

package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
)

// Loader splices flows in the kernel, on Linux; here there is none.
type Loader struct{}

// New fails here, with errors.ErrUnsupported.
func New(Options) (*Loader, error) { return nil, unsupported() }

// Name is the datapath's name.
func (*Loader) Name() string { return Name }

// Splice refuses.
func (*Loader) Splice(context.Context, *net.TCPConn, *net.TCPConn, Flow) (func() (up, down int64), error) {
	return nil, unsupported()
}

// SpliceSockets refuses.
func (*Loader) SpliceSockets(_ context.Context, down, up int, _ Flow) (func() (upBytes, downBytes int64), error) {
	return nil, unsupported()
}

// Local is the datapath for targets on this host, on Linux.
type Local struct{ Loader }

// Local says that there is none.
func (*Loader) Local() (*Local, error) { return nil, unsupported() }

// Name is the datapath's name.
func (*Local) Name() string { return LocalName }

// Close has nothing to close.
func (*Loader) Close() error { return nil }

// Flows has none.
func (*Loader) Flows() []Info { return nil }

// Stats has nothing to count.
func (*Loader) Stats() Stats { return Stats{Off: unsupported().Error()} }

// Health is off.
func (*Loader) Health() (off string, stalls uint64) { return unsupported().Error(), 0 }

// ClampedSegments is 0.
func (*Loader) ClampedSegments() uint64 { return 0 }

// SelfTest of a Loader finds nothing.
func (*Loader) SelfTest() []Finding { return SelfTest(Options{}) }

// SelfTest says that there is nothing to test.
func SelfTest(Options) []Finding { return Probe() }

// RemoveDead has nothing to remove.
func RemoveDead(string, *slog.Logger) error { return nil }

// Probe says that this system has no sockmap.
func Probe() []Finding {
	return []Finding{{Name: "kernel", State: StateMissing, Detail: runtime.GOOS + "/" + runtime.GOARCH, Advice: "the sockmap datapath needs Linux 6.1 or newer; flows go through userspace here"}}
}

func unsupported() error {
	return fmt.Errorf("sockmap on %s/%s: %w", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}

// Record refuses.
func (*Loader) Record(_, _ int, _ Flow) (forget func(), err error) {
	return nil, unsupported()
}

// Busy is none.
func (*Loader) Busy() (flows int, ok bool) { return 0, false }
