package server

import (
	"math"
	"net/netip"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
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
		srv.log.Info("limits.connections is lowered to what limits.memory allows, at 14 KiB for each in three quarters of it",
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
	// A connection takes so many bytes in all, an upstream one included: see docs/configuration.md.
	connectionBytes = 14 << 10

	// A connection that waits for a hello takes so many bytes of the machine's memory, kernel included.
	waitingCost = 8 << 10
)

// mostWaiting is how many connections may wait for a hello: they get an eighth of what this machine, or its
// cgroup, has.
func mostWaiting() int64 {
	if n := memory.Available(); n > 0 {
		return n / 8 / waitingCost
	}
	return math.MaxInt64
}

// newMemory is what keeps the flows of srv within limits.memory.
func (srv *Server) newMemory() *memory.Watch {
	return memory.New(memory.Options{
		Log: srv.log, Limited: srv.limited, Relay: srv.opts.Relay, Flows: srv.flows,
		Connections:   srv.limiter.Total,
		Ports:         func() map[uint16]bool { return *srv.ports.Load() },
		IsListeningAt: srv.isListeningAt,
		MayBeMany:     srv.mayBeMany,
		// which a container may, in a network namespace of its own
		MayBeHere: func(a netip.Addr) bool { return a.IsPrivate() && !tailnet.Contains(a) },
		GiveUp:    srv.keeping.giveBack,
		Ended:     func(what string, n int) { srv.metrics.Cut.WithLabelValues(what).Add(float64(n)) },
	})
}

// Memory is the budget in force, in bytes; 0: none.
func (srv *Server) Memory() int64 { return srv.memory.Budget() }
