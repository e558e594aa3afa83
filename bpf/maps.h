/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* The maps that both objects have. Those of sockmap.bpf.c are loaded; skmsg.bpf.c is loaded with the same. */
#ifndef TAILSPLICE_MAPS_H
#define TAILSPLICE_MAPS_H

#include "kernel.h"
#include "bpf/bpf_helpers.h"
#include "limits.h"

/* Every flow, to look at. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u64);
	__type(value, struct flow);
} flows SEC(".maps");

/* Socket cookie -> where its half is. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, __u64);
	__type(value, struct place);
} places SEC(".maps");

/* The protocol's state; userspace has it mapped. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct half);
} halves SEC(".maps");

/* Where to redirect to. It has no program, so that both sockets of a flow can be put here before
 * the first of them gets a verdict. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, __u32);
	__type(value, __u64);
} peers SEC(".maps");

/* What gets the verdict of sockmap.bpf.c. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, __u32);
	__type(value, __u64);
} sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENT_BYTES);
} events SEC(".maps");

#endif
