// Package sockmap splices flows by a verdict on what their sockets receive.
//
// # How a direction works
//
// userspace/datapath decides which flows are here: the relay gives one to [Engine.Splice] when it is
// ping-pong or quiet. A flow that becomes busy leaves the sockmap, and is given back. One that prefers this
// datapath is in the flows map from its begin to its end, whoever has it.
//
// In there, the verdict (bpf/verdict.h) redirects each skb to the peer while the peer's send buffer takes
// it, and else leaves it in the source's queue, which closes the source's window, and says so through a ring.
// Then this package copies: it waits until all that was redirected has been written, reads what was passed,
// writes it to the peer, and publishes how far it is; when it has caught up, the verdict redirects again.
// File direction_linux.go has this half of the protocol, model_test.go checks the whole by exhaustion.
//
// # Locks
//
// flow.mu comes first. Under it one more may be taken, of detacher.mu, offer.mu, flow.watchMu, record.mu,
// Engine.mu, and those of a [Bypass]. Engine.mu is also taken under ledger.mu. The others are held alone.
//
// A direction is an actor: whoever finds its bit isRunning clear and sets it runs it, alone, and owns the
// fields that say so. What it finds out that changes the flow is done after flow.mu is released.
//
// # Files
//
//	engine_linux.go     loads the programs, starts and stops; slots
//	refusal.go          what is told of a flow, and why one is refused
//	splice_linux.go     a flow is taken over
//	flow_linux.go       a flow, from its begin to its end
//	direction_linux.go  what was passed one way is copied
//	detach_linux.go     a busy flow leaves the sockmap, and is given back
//	orphan_linux.go     a flow is taken out of the sockmap of a process that is dead
//	bypass_linux.go     what carries a part of a flow's bytes past TCP
//	ledger_linux.go     flows that are in the flows map, whoever has them
//	sock_linux.go       the sockets of a flow
//	events_linux.go     what epoll and the verdict's ring tell
//	sweep_linux.go      idle and stalled flows, and events that were lost
//	counts_linux.go     what is counted, and when the datapath is switched off
//	proof_linux.go      the datapath as the self-test sees it
//	hooks_linux.go      the rules that a test can switch off
package sockmap

// One object is meant for kernels from 6.1 on: -mcpu=v4 would need 6.6, and what differs between kernels is
// relocated by CO-RE. On which of them it was tried, and how, is in docs/kernel.md. -nostdinc: only the
// headers pinned in bpf/include count.
//
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target bpfel,bpfeb -type half -type flow -type place -type event -type fault -type flow_state -type event_kind -type leaving sockmap ../../bpf/sockmap.bpf.c -- -mcpu=v3 -nostdinc -Wall -Werror -I../../bpf/include
