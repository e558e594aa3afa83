/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* How a half goes out of the sockmap: what is common to the iterators of both objects. One of them runs. */
#ifndef TAILSPLICE_LEAVE_H
#define TAILSPLICE_LEAVE_H

#include "verdict.h"

/* Runs in the system call of who asks, so there is no order to argue. */
struct leave_call call = {};

/* The half that is LEAVING whose source the iterator stands at, or 0. The iterator takes it out of the
 * sockmap if may_leave.
 *
 * Reading the iterator runs it for each TCP socket of the namespace, under the socket's lock (since 5.15).
 * Deleting by the system call does not take that, and an skb that is on its way to the verdict would be
 * dropped, for want of one.
 *
 * It returns 1 then, which ends the read with EAGAIN, and the next read begins with the same socket: to get
 * there takes milliseconds where the kernel's table of sockets is large, and asking there microseconds. */
static __always_inline struct half *stands_at(struct bpf_iter__tcp *ctx, __u32 *half)
{
	struct sock_common *sk = ctx->sk_common;
	struct place *at;
	struct half *h;
	__u64 cookie;

	if (!sk)
		return 0;
	cookie = sk->skc_cookie.counter;
	at = bpf_map_lookup_elem(&places, &cookie);
	if (!at)
		return 0;
	*half = at->half;
	h = bpf_map_lookup_elem(&halves, half);
	if (!h || h->source != cookie || h->leaving != LEAVING || h->fault != FAULT_NONE)
		return 0;
	return h;
}

/* Has userspace asked for this half, and read all that was passed? */
static __always_inline bool may_leave(struct half *h, __u32 half)
{
	return call.half == half && call.read == h->passed;
}

static __always_inline void has_left(struct half *h)
{
	h->seeded = 0;
	h->leaving = HAS_LEFT;
}

#endif
