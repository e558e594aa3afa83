package loader

// One object is meant for kernels from 6.1 on (6.1, 6.12 and 6.18 are tested): -mcpu=v4 would need 6.6, and what
// differs between kernels is relocated by CO-RE. -nostdinc: only the headers pinned in bpf/include count.
//
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target bpfel,bpfeb -type half -type flow -type place -type event -type fault -type flow_state -type event_kind -type leaving sockmap ../bpf/sockmap.bpf.c -- -mcpu=v3 -nostdinc -Wall -Werror -I../bpf/include

// skmsg.bpf.c needs more of the kernel (bpf_probe_read_kernel, sk_msg, sockops), and is loaded only where it
// is asked for; it shares the maps of the first object.
//
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target bpfel,bpfeb -no-global-types -type local -type pair -type end -type local_answer -type local_target -type local_request skmsg ../bpf/skmsg.bpf.c -- -mcpu=v3 -nostdinc -Wall -Werror -I../bpf/include
