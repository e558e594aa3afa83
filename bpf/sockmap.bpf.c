// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/* The datapath sockmap: both sockets of a flow get the verdict, and leave it when the flow is busy. */

#include "leave.h"

/* For tests, as those of verdict.h. */
const volatile bool rule_clamp = true;
const volatile bool rule_late = true; /* a reset waits for the queue */

/* So that bpf2go finds them in the BTF. */
const struct event *unused_event __attribute__((unused));
const enum event_kind *unused_kind __attribute__((unused));
const enum leaving *unused_leaving __attribute__((unused));

SEC("sk_skb/stream_verdict")
int verdict(struct __sk_buff *skb)
{
	enum way way = TO_USERSPACE;
	struct arrival a;
	int action = arrive(skb, &a);

	if (action != UNDECIDED)
		return action;
	if (!a.h->seeded)
		seed(a.h, READ_ONCE(a.tcp->write_seq));
	if (may_redirect(&a) && fits(a.h, a.tcp, a.len, 0))
		way = TO_PEER;
	bpf_sk_release(a.peer);
	count(&a, way, 0);
	return way == TO_PEER ? redirect_to_peer(skb, &a) : SK_PASS;
}

SEC("iter/tcp")
int iter_leave(struct bpf_iter__tcp *ctx)
{
	__u32 half;
	struct half *h = stands_at(ctx, &half);

	if (!h)
		return 0;
	if (may_leave(h, half) && bpf_map_delete_elem(&sources, &half) == 0)
		has_left(h);
	call.half = half;
	return 1;
}

/* Segments whose payload was cut off by `ingress_clamp`. */
__u64 clamped = 0;

/* Is this reset, of a half's source, too early for what may wait behind bytes of the other way? */
static __always_inline bool is_early(struct __sk_buff *skb, struct place *at, struct half *h, struct tcp_sock *tcp)
{
	__u32 other = at->half ^ 1, written = tcp->write_seq, seq;
	struct half *back = bpf_map_lookup_elem(&halves, &other);
	struct flow *f = bpf_map_lookup_elem(&flows, &at->flow);
	bool next;

	if (!rule_late || !back || !back->seeded || !f)
		return false;
	if (other & 1)
		written -= (__u32)f->down.local;
	if ((__s32)((__u32)(READ_ONCE(back->redirected) + READ_ONCE(back->consumed)) - (written - back->base)) <= 0)
		return false;
	if (bpf_skb_load_bytes(skb, 4, &seq, sizeof(seq)))
		return false;
	next = from_network(seq) == READ_ONCE(tcp->rcv_nxt);
	if (next && READ_ONCE(h->passed) == READ_ONCE(h->consumed))
		return false; /* nothing waits */
	if (next)
		give_up(h, at->half, FAULT_RESET);
	return true;
}

/* The filter of a spliced socket (SO_ATTACH_BPF), run for each segment before TCP sees it. It gives how many
 * bytes TCP gets to see, from the TCP header on. What counts is what was passed and is charged to no socket,
 * yet or ever, and not in the hands of userspace, which has a bound of its own. */
SEC("socket")
int ingress_clamp(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct tcp_sock *tcp;
	struct place *at;
	struct half *h;
	__u8 head[2]; /* header length and flags, bytes 12 and 13 */
	__u32 half;
	__s64 free;

	at = bpf_map_lookup_elem(&places, &cookie);
	if (!at)
		return -1;
	half = at->half;
	h = bpf_map_lookup_elem(&halves, &half);
	if (!h || h->source != cookie || !h->seeded)
		return -1;
	if (skb->len <= MAX_TCP_HEADER) { /* a reset has no payload, but for a few systems' */
		if (bpf_skb_load_bytes(skb, 12, head, sizeof(head)))
			return -1;
		if (head[1] & TCP_RST) {
			tcp = skb->sk ? bpf_skc_to_tcp_sock(skb->sk) : 0;
			return tcp && is_early(skb, at, h, tcp) ? 0 : -1;
		}
	}
	if (!rule_clamp)
		return -1;
	free = READ_ONCE(h->passed) - READ_ONCE(h->consumed) - ((__s64)READ_ONCE(h->in_hand) << 12);
	if (free <= h->limit && h->fault == FAULT_NONE)
		return -1;
	tcp = skb->sk ? bpf_skc_to_tcp_sock(skb->sk) : 0;
	if (!tcp)
		return -1;
	free -= READ_ONCE(sock_of(tcp)->sk_backlog.rmem_alloc.counter);
	if (free <= h->limit && h->fault == FAULT_NONE)
		return -1;
	if (bpf_skb_load_bytes(skb, 12, head, sizeof(head)))
		return -1;
	if (skb->len <= (head[0] >> 4) * 4)
		return -1; /* no payload */
	__sync_fetch_and_add(&clamped, 1);
	/* A FIN without its bytes would come too early. */
	return head[1] & TCP_FIN ? 0 : (head[0] >> 4) * 4;
}

char _license[] SEC("license") = "Dual BSD/GPL";
