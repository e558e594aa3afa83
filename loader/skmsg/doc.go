// Package skmsg is the datapath for flows whose target is a process on this host. Between the process and the
// other side, bytes go past TCP; for the rest it is sockmap, whose verdict and maps it uses. bpf/skmsg.bpf.c
// says how.
//
// # Locks
//
// targets.mu and graces.mu are taken while a flow of sockmap holds its own. Neither is held while a flow is
// called.
//
//	skmsg_linux.go    the datapath, and the process's end of a flow
//	targets_linux.go  the addresses that flows go to, and their cgroups
//	find_linux.go     the cgroup of a process
//	unread_linux.go   bytes that the process has not read when the daemon ends
//	grace_linux.go    when a slot of a map can be used again
package skmsg

// Name is what configuration, logs and metrics call this datapath.
const Name = "sk_msg"

// This object needs more of the kernel (bpf_probe_read_kernel, sk_msg, sockops), and is loaded only where it
// is asked for; it shares the maps of sockmap's.
//
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target bpfel,bpfeb -no-global-types -type local -type pair -type end -type local_answer -type local_target -type local_request -type half -type place skmsg ../../bpf/skmsg.bpf.c -- -mcpu=v3 -nostdinc -Wall -Werror -I../../bpf/include
