// Package loader is the kernel side of tailsplice: it loads the BPF programs of ../bpf, and splices
// pairs of TCP sockets so that bytes go from one to the other without passing through this process.
//
// # What it promises
//
// Bytes arrive exactly once, in order and whole, or the flow is reset. A flow holds at most Flow.Buffer bytes
// a direction outside of the sockets' own buffers. An idle flow has no goroutine, a stalled one costs no CPU.
// [New] proves this on loopback before it gives a Loader out, and refuses kernels that are known to lose
// data.
//
// # How a direction works
//
// userspace/relay decides which flows are here: it gives one to [Loader.SpliceSockets] when it is ping-pong
// or quiet. A flow that becomes busy leaves the sockmap, and is given back (detach_linux.go). One that prefers
// this datapath is in the flows map from its begin to its end, whoever has it (ledger_linux.go).
//
// In there, the verdict (bpf/verdict.h) redirects each skb to the peer while the peer's send buffer takes
// it, and else leaves it in the source's queue, which closes the source's window, and says so through a ring.
// Then this package copies: it waits until all that was redirected has been written, reads what was passed,
// writes it to the peer, and publishes how far it is; when it has caught up, the verdict redirects again.
// File direction_linux.go has this half of the protocol, model_test.go checks the whole by exhaustion.
//
// [Local] is for flows whose target is a process on this host: between it and the other side bytes go past
// TCP. File bpf/skmsg.bpf.c says how.
//
// # Least kernel
//
// Linux 6.1 with BTF (CONFIG_DEBUG_INFO_BTF) and CONFIG_BPF_STREAM_PARSER. The process needs CAP_BPF,
// CAP_PERFMON and CAP_NET_ADMIN (or CAP_SYS_ADMIN), and CAP_NET_RAW for the self-test. See [Probe]. Elsewhere
// [New] fails with errors.ErrUnsupported. `make test-kernels` runs the tests on 6.1 and 6.12. On 5.10 flows
// stall at an urgent byte (kernel.go).
//
// # Files
//
// The Loader, and a flow in it:
//
//	loader_linux.go     New, which loads the programs, and Close
//	options.go          how to load, what Splice is told of a flow, and why it refuses one
//	splice_linux.go     a flow is taken over
//	flow_linux.go       a flow, from its begin to its end
//	direction_linux.go  what was passed one way is copied
//	detach_linux.go     a busy flow leaves the sockmap, and is given back
//	ledger_linux.go     flows that are in the flows map, whoever has them
//	sock_linux.go       the sockets of a flow
//	events_linux.go     what epoll and the verdict's ring tell
//	sweep_linux.go      idle and stalled flows, and events that were lost
//	counts_linux.go     what is counted, and when the datapath is switched off
//	flows_linux.go      what the maps say of each flow, for people
//	pins_linux.go       the maps in the BPF file system, by generation
//	hooks_linux.go      the rules that a test can switch off
//
// Flows with a process on this host:
//
//	local_linux.go          the datapath sk_msg
//	local_targets_linux.go  the addresses that flows go to, and their cgroups
//	local_find_linux.go     the cgroup of a process
//	unread_linux.go         bytes that the process has not read when the daemon ends
//	grace_linux.go          when a slot of a map can be used again
//
// What the kernel must be and do:
//
//	finding.go               what was found, for people
//	kernel.go                which versions are refused
//	probe_linux.go           what this machine has and lacks
//	selftest_linux.go        the proof on loopback
//	local_selftest_linux.go  the same for sk_msg
//	inject_linux.go          segments of our own making, for the proof
//	gen.go                   how the programs are compiled
package loader
