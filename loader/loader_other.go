//go:build !linux || !(386 || amd64 || arm || arm64 || loong64 || mips || mips64 || mips64le || mipsle || ppc64 || ppc64le || riscv64 || s390x)

package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
)

// Loader and Local splice flows in the kernel, on Linux. Here there are none: New fails with
// errors.ErrUnsupported, and what their methods say is that nothing is there.
type (
	Loader  struct{}
	Local   struct{ Loader }
	Orphans struct{}
)

func unsupported() error {
	return fmt.Errorf("sockmap on %s/%s: %w", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}

func New(Options) (*Loader, error)                      { return nil, unsupported() }
func RemoveDead(string, *slog.Logger) error             { return nil }
func SelfTest(Options) []Finding                        { return Probe() }
func OpenOrphans(string, *slog.Logger) *Orphans         { return nil }
func (*Orphans) Close() error                           { return nil }
func (*Local) Leave()                                   {}
func (*Local) Name() string                             { return LocalName }
func (*Loader) Name() string                            { return Name }
func (*Loader) Local() (*Local, error)                  { return nil, unsupported() }
func (*Loader) Close() error                            { return nil }
func (*Loader) Health() (off string, stalls uint64)     { return unsupported().Error(), 0 }
func (*Loader) ClampedSegments() uint64                 { return 0 }
func (*Loader) Record(_, _ int, _ Flow) (func(), error) { return nil, unsupported() }
func (*Loader) Active() (flows int, ok bool)            { return 0, false }

func (*Loader) Splice(_ context.Context, down, up int, _ Flow) (func() (upBytes, downBytes int64), error) {
	return nil, unsupported()
}

func (*Orphans) Recall(_ context.Context, down, up int, _ [2]uint64) (downRest, upRest []byte, err error) {
	return nil, nil, nil
}

// Probe says that this system has no sockmap.
func Probe() []Finding {
	return []Finding{{Name: "kernel", State: StateMissing, Detail: runtime.GOOS + "/" + runtime.GOARCH,
		Advice: "the sockmap datapath needs Linux 6.1 or newer; flows go through userspace here"}}
}
