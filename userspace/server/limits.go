package server

import (
	"math"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

const (
	// filesReserved is for what strangers have no share in: listeners, logs, the control socket, a reload.
	// Half of it is for pipes, without which bulk is copied.
	filesReserved = 256
	pipesWanted   = 2048 // where there is room for them
)

// fitLimits lowers the limits of connections and of requests to what memory and the file descriptors allow,
// and says so: better to refuse in time than to fail in the middle.
func (srv *Server) fitLimits(cfg *config.Config, needs plan.Needs, memory int64) (connections, requests int) {
	connections, requests = cfg.Limits.Connections, cfg.Limits.Requests
	if most := memory / 4 * 3 / connectionBytes; memory > 0 && int64(connections) > most {
		connections = int(most)
		srv.log.Info("limits.connections is lowered to what limits.memory allows, at 12 KiB for each in three quarters of it",
			"connections", cfg.Limits.Connections, "connections_lowered_to", connections, "memory", memory)
	}
	perConnection, perRequest := filesOf(needs)
	need := connections*perConnection + requests*perRequest
	if srv.opts.RaiseFiles == nil {
		return connections, requests
	}
	files, err := srv.opts.RaiseFiles(uint64(need + filesReserved + 2*pipesWanted))
	if err != nil {
		return connections, requests
	}
	reserved := min(filesReserved, int(files)/2) // where there are few, they are shared
	room := int(files) - reserved
	if need > room {
		if perRequest > 0 {
			requests = max(1, min(requests, room/(2*perConnection)))
		}
		connections = max(1, min(connections, (room-requests*perRequest)/perConnection))
		need = connections*perConnection + requests*perRequest
		srv.log.Warn("limits.connections and limits.requests are lowered to what the limit of open files allows: raise LimitNOFILE= (systemd) or `ulimit -n`",
			"connections", cfg.Limits.Connections, "requests", cfg.Limits.Requests,
			"connections_lowered_to", connections, "requests_lowered_to", requests, "open_files", files)
	}
	srv.opts.Relay.LimitPipes(reserved/4 + max(0, room-need)/2)
	return connections, requests
}

// filesOf is how many sockets a connection takes, and a request: the target's of a flow is there as long as
// the client's, an HTTP client has one and each of its requests may have one more.
func filesOf(n plan.Needs) (perConnection, perRequest int) {
	perConnection = 1
	if n.Flows {
		perConnection = 2
	}
	if n.Requests {
		perRequest = 1
	}
	return perConnection, perRequest
}

const (
	// A connection takes so many bytes of the kernel's while it does nothing, and so many in all, an upstream
	// one included: see docs/configuration.md.
	connectionKernel = 4 << 10
	connectionBytes  = 12 << 10

	leastMemory = 16 << 20 // bytes of a budget, however little there is

	// A connection that waits for a hello takes so many bytes of the machine's memory, kernel included.
	waitingCost = 8 << 10
)

// mostWaiting is how many connections may wait for a hello: they get an eighth of what this machine, or its
// cgroup, has.
func mostWaiting() int64 {
	if n := memoryHere(); n > 0 {
		return n / 8 / waitingCost
	}
	return math.MaxInt64
}

// memoryHere is what this process may have at most, in bytes; 0: it is not known.
func memoryHere() int64 { return machineMemory("/proc", "/sys/fs/cgroup") }

// memoryOf is the budget of cfg, in bytes: 5/8 of what this machine, or its cgroup, has where the
// configuration does not say it. 0: there is none, since nothing is known.
func memoryOf(cfg *config.Config) int64 {
	if cfg.Limits.Memory > 0 {
		return cfg.Limits.Memory
	}
	if n := memoryHere(); n > 0 {
		return max(leastMemory, n/8*5)
	}
	return 0
}

// Memory is the budget in force, in bytes; 0: none.
func (srv *Server) Memory() int64 { return srv.memory.Load() }
