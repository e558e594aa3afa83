package sockmap

import (
	"fmt"
	"math/bits"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// TestCostOfFlows: what maps take for each flow that they have room for, from the start, is what is said
// where somebody chooses how many flows that is.
func TestCostOfFlows(t *testing.T) {
	spec, err := loadSockmap()
	loadertest.Must(t, err)
	const flows = 1 << 12
	l := open(t, nil, flows)
	cost := 0
	for name, m := range l.named() {
		c := costOfMap(t, spec.Maps[name], int(m.MaxEntries()))
		cost += c
		info, err := m.Info()
		loadertest.Must(t, err)
		// Since 6.4 the kernel says what it has allocated: with the heads of maps, which are no matter of
		// flows.
		if said, ok := info.Memlock(); ok && kernelCounts() && (int(said) < c || int(said) > c+8<<10) {
			t.Errorf("%s takes %d bytes, the kernel says %d", name, c, said)
		}
	}
	want := fmt.Sprintf("%d bytes", cost/flows)
	for _, file := range []string{"../options.go", "../../cmd/tailsplice/datapaths.go", "../../docs/datapaths.md"} {
		text, err := os.ReadFile(file)
		loadertest.Must(t, err)
		if !strings.Contains(string(text), want) {
			t.Errorf("a flow costs %s of maps from the start: %s must say that", want, file)
		}
	}
}

func kernelCounts() bool {
	v, _, err := host.Kernel()
	return err == nil && !v.Less(host.Version{Major: 6, Minor: 4})
}

// costOfMap is what a map takes while it is empty.
func costOfMap(t *testing.T, m *ebpf.MapSpec, entries int) int {
	t.Helper()
	const pointer, bucket = 8, 16 // struct bucket in kernel/bpf/hashtab.c
	switch m.Type {
	case ebpf.Array:
		return entries * (int(m.ValueSize+7) / 8 * 8)
	case ebpf.SockMap:
		return entries * pointer
	case ebpf.Hash:
		if m.Flags&unix.BPF_F_NO_PREALLOC == 0 {
			t.Errorf("map %s has all its entries from the start: count them", m.Name)
		}
		return 1 << bits.Len(uint(entries-1)) * bucket
	}
	t.Errorf("map %s: what does one of type %s take?", m.Name, m.Type)
	return 0
}
