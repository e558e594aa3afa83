package server

import (
	"fmt"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// TestConnectionsFitMemory: limits.connections is lowered to what limits.memory holds, and the budget is what the
// configuration says.
func TestConnectionsFitMemory(t *testing.T) {
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]
limits: { memory: 16MiB, connections: 5000 }`, freeAddr(t)))
	if n := d.Memory(); n != 16<<20 {
		t.Errorf("the budget is %d bytes", n)
	}
	cfg := new(config.Config)
	for _, v := range []struct {
		connections, want int
	}{{5000, 877}, {100, 100}} {
		cfg.Limits.Connections = v.connections
		if n, _ := d.fitLimits(cfg, plan.NeedsOf(cfg), 16<<20); n != v.want {
			t.Errorf("%d connections are allowed of %d, want %d", n, v.connections, v.want)
		}
	}
}
