/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* The verdict on each skb that a spliced socket receives: its protocol, and the steps that it is made of.
 *
 * # The protocol with userspace
 *
 * Each direction (struct half) is either redirecting, and then only the kernel moves its bytes, or passing,
 * and then only userspace does. It is passing while passed != consumed.
 *
 *	verdict:    if passed != consumed or the peer can't take the skb now: passed += len, SK_PASS
 *	            else: redirected += len, redirect
 *	userspace:  while passed != consumed: read n bytes from the source, wait until the peer's TCP was given
 *	            redirected + consumed bytes, write the n bytes to it, consumed += n
 *
 * Why no byte can overtake another:
 *  - The verdict of one source runs under that socket's lock, so a half has one writer here.
 *  - What is passed comes after all that was redirected. Userspace got its bytes out of the source's queue,
 *    under the lock that the verdict held when it passed them, so it sees every `redirected` that was counted
 *    before; and none is added until consumed == passed. So it waits for the right number.
 *  - What is redirected comes after all that was passed: the verdict redirects only when it sees
 *    consumed == passed, and userspace stores consumed (release) after its write() has returned,
 *    so the peer's lock, that the backlog worker takes next, was already released by that write.
 *  - An old value of consumed is too small, and only makes the verdict pass once more.
 *
 * Why userspace never sleeps while there is something to copy: it sleeps when it finds passed == consumed
 * after it stored consumed, and the verdict rings when it finds consumed == the old passed after it added to
 * passed. With a full barrier between the store and the load on both sides, at least one of them sees the
 * other's store. The atomic add is that barrier on x86. On weakly ordered machines it is not (the variant
 * that is, BPF_FETCH, needs 5.12), so there userspace looks once more a millisecond after it has stored
 * consumed and gone to sleep: by then all see what a processor has stored.
 *
 * Nothing else here needs a barrier beyond those of locks and of map entries:
 *  - the fields of a slot are written before its entries in `places` and `local_places`, and their address
 *    depends on what is loaded from there;
 *  - a socket comes into a sockmap under the lock that its verdict runs under;
 *  - what follows from a comparison is a store, as a redirect is, and no processor makes that before it has
 *    loaded what is compared.
 *
 * # Bulk
 *
 * The halves of a flow that is busy leave, one by one, and when both have left userspace goes on with the
 * flow by splice(2). `iter_leave` takes the source out of the sockmap while it holds the socket's lock, so no
 * skb is under way to the verdict, and only when userspace has read all that was passed, so no byte waits in
 * the psock, where splice(2) does not look. Userspace waits until all that was redirected is written, writes
 * what it has read, and goes on behind it. The flow may be spliced again, as a new one: the verdict finds out
 * anew where the streams are.
 *
 * Reading makes room, and the sender may fill it before read(2) has returned. So SO_RCVLOWAT is raised for
 * that moment: the kernel tells nobody of what comes, and the verdict does not run for it.
 *
 * # What no socket is charged for
 *
 * The kernel has one queue in each socket (psock.ingress_skb) for what was redirected to it, and for what was
 * passed by it while that queue was not empty. What is in it is charged to nobody, so no window closes
 * because of it. So
 *  - while one way passes, the other one doesn't redirect either: nothing new comes in front of what is
 *    passed, and soon the queue is empty, and what is passed is charged at once;
 *  - short of memory, TCP does not take what was redirected however much room there seems to be: then all is
 *    passed;
 *  - where that is not enough, since the worker that empties the queue comes late, `ingress_clamp` cuts the
 *    payload off what comes in, before TCP sees it, as if the network had lost it. The sender sends it again.
 *
 * # A reset
 *
 * The worker stops for good at the first skb in that queue that a dead socket does not take, and what the
 * socket had passed behind it, and acknowledged, is lost. So `ingress_clamp` keeps a reset from TCP while
 * something in the queue goes the other way, and tells userspace of it (FAULT_RESET): the queue is emptied as
 * if nothing had come, and both sides are reset when what the dead one sent has arrived. A reset that TCP
 * would not take (its number is not the one to come next, maybe since bytes in front of it still wait for the
 * socket's lock) is forgotten: what is in the queue is about to be sent, and brings another one.
 *
 * loader/sockmap/model_test.go runs all interleavings of small cases against this, and model_reset_test.go
 * beside it those of a reset.
 */

#ifndef TAILSPLICE_VERDICT_H
#define TAILSPLICE_VERDICT_H

#include "kernel.h"
#include "bpf/bpf_helpers.h"
#include "limits.h"
#include "maps.h"

/* Set before load. Each turns off one rule, for the tests that prove that the rule is needed. */
const volatile bool rule_bound = true;
const volatile bool rule_trim = true;
const volatile bool rule_fin = true;
const volatile bool rule_mutual = true; /* while one way passes, the other one does */

/* Pages; from here on (net.ipv4.tcp_mem) a send buffer may refuse bytes. 0: not known. */
const volatile __u64 tcp_pressure = 0;

#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define from_network(x) __builtin_bswap32(x)
#define from_network16(x) __builtin_bswap16(x)
#else
#define from_network(x) (x)
#define from_network16(x) (x)
#endif

static __always_inline struct sock *sock_of(struct tcp_sock *tcp) { return &tcp->inet_conn.icsk_inet.sk; }

/* If the ring is full, userspace finds out by its sweep, within 3 seconds. */
static __always_inline void tell(__u32 half, enum event_kind kind)
{
	struct event e = { .half = half, .kind = kind };

	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
}

/* What becomes of the bytes of a half that gave up, until userspace has reset both sides. A peer that is gone
 * leaves no hole: what comes stays with the source, whose window closes, else its sender would be told that
 * all it has is delivered. After any other fault the skb is lost, and a hole must not be hidden by what comes
 * after it. */
static __always_inline int after_fault(enum fault fault)
{
	return fault == FAULT_PEER ? SK_PASS : SK_DROP;
}

static __always_inline int give_up(struct half *h, __u32 half, enum fault fault)
{
	if (h->fault == FAULT_NONE) {
		WRITE_ONCE(h->fault, fault);
		tell(half, EVENT_FAULT);
	}
	return after_fault(fault);
}

/* Cuts off what was handled before. The kernel hands over whole skbs and does not look at copied_seq:
 * a retransmit that overlaps, or an skb that was read in part before insertion, would be delivered
 * twice. Returns 0, or a fault. */
static __always_inline enum fault trim(struct __sk_buff *skb, struct half *h)
{
	/* Without a parser, cb[0] is TCP_SKB_CB(skb)->seq. That is no ABI: the self-test proves it. */
	__s32 over = (__s32)(h->next_seq - skb->cb[0]);

	if (over < 0)
		return FAULT_GAP;
	for (int i = 0; i < TRIM_CALLS; i++) {
		__s32 cut = over;

		if (cut > (__s32)skb->len)
			cut = skb->len;
		if (cut > TRIM_BYTES_A_CALL)
			cut = TRIM_BYTES_A_CALL;
		if (cut <= 0)
			return FAULT_NONE;
		if (bpf_skb_adjust_room(skb, -cut, 0, 0))
			return FAULT_TRIM;
		over -= cut;
		WRITE_ONCE(h->trimmed, h->trimmed + cut);
	}
	return over > 0 && skb->len > 0 ? FAULT_TRIM : FAULT_NONE;
}

/* Does the peer's send buffer take len more bytes now, behind all that waits for it already? A backlog that
 * can't be written is retried every jiffy, for each flow that has one, so it must not come about. */
static __always_inline bool fits(struct half *h, struct tcp_sock *peer, __u32 len, __u32 beside)
{
	__u32 at = (__u32)(h->redirected + h->consumed);
	__u32 written = peer->write_seq - h->base - beside;
	__u32 waiting = at - written;
	__s64 need;

	if ((__s32)(written - h->mark) >= 0) {
		h->older = h->newer;
		h->newer = 0;
		h->mark = at;
	}
	if ((__s32)waiting <= 0) {
		waiting = 0;
		h->older = 0;
		h->newer = 0;
	}
	if (!rule_bound)
		return true;
	if ((__u64)waiting + len > h->limit || h->newer == 0xffff)
		return false;
	/* A quarter more, for fragments that come to skbs of their own. */
	need = (__s64)waiting + len + ((waiting + len) >> 2);
	need += (__s64)(h->older + h->newer + 1) * SKB_OVERHEAD_BYTES;
	need += READ_ONCE(sock_of(peer)->sk_wmem_queued);
	return need <= READ_ONCE(sock_of(peer)->sk_sndbuf);
}

/* Bytes for the peer would wait in the queue for as long as TCP is short of memory. */
static __always_inline bool short_of_memory(struct tcp_sock *peer)
{
	return tcp_pressure &&
	       sock_of(peer)->__sk_common.skc_prot->memory_allocated->counter >= (__s64)tcp_pressure;
}

/* Is what this half passes likely to find bytes of its own in front of it, that go the other way? */
static __always_inline bool is_passing(struct half *h)
{
	return h->seeded && READ_ONCE(h->passed) != READ_ONCE(h->consumed);
}

/* Where a verdict sends an skb. */
enum way {
	TO_USERSPACE,
	TO_PEER,
	TO_PROCESS, /* on this host, past TCP: skmsg.bpf.c */
};

/* An skb that a verdict has to decide on. */
struct arrival {
	struct place *at;
	struct half *h;
	struct bpf_sock *peer; /* a reference */
	struct tcp_sock *tcp;  /* the peer's */
	__u32 half;
	__u32 len;
};

#define UNDECIDED (-1)

/* Finds the half that the skb came for and its peer, and cuts off what was handled before. Where that is all,
 * it gives the action; else UNDECIDED, and the caller releases the peer. */
static __always_inline int arrive(struct __sk_buff *skb, struct arrival *a)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct tcp_sock *tcp;
	struct bpf_sock *peer;
	enum fault fault;
	struct place *at;
	struct half *h;
	__u32 half, other;

	/* A FIN alone. Redirecting it would break the peer; userspace sees the end by EPOLLRDHUP. */
	if (rule_fin && skb->len == 0)
		return SK_DROP;

	at = bpf_map_lookup_elem(&places, &cookie);
	if (!at)
		return SK_PASS; /* not a flow, or no more: charged to its own socket */
	half = at->half;
	h = bpf_map_lookup_elem(&halves, &half);
	if (!h || h->source != cookie)
		return SK_PASS; /* the slot is another flow's by now */
	if (h->fault != FAULT_NONE && h->fault != FAULT_RESET)
		return after_fault(h->fault); /* about to be reset */

	if (!skb->sk)
		return give_up(h, half, FAULT_PEER);
	tcp = bpf_skc_to_tcp_sock(skb->sk);
	if (!tcp)
		return give_up(h, half, FAULT_PEER);
	if (!h->seeded)
		h->next_seq = tcp->copied_seq;
	if (rule_trim) {
		fault = trim(skb, h);
		if (fault != FAULT_NONE)
			return give_up(h, half, fault);
		if (rule_fin && skb->len == 0)
			return SK_DROP; /* all of it was handled before */
	}

	other = half ^ 1;
	peer = bpf_map_lookup_elem(&peers, &other);
	if (!peer)
		return give_up(h, half, FAULT_PEER);
	tcp = bpf_skc_to_tcp_sock(peer);
	if (!tcp || (sock_of(tcp)->__sk_common.skc_state != TCP_ESTABLISHED &&
		     sock_of(tcp)->__sk_common.skc_state != TCP_CLOSE_WAIT)) {
		bpf_sk_release(peer);
		return give_up(h, half, FAULT_PEER);
	}
	a->at = at;
	a->h = h;
	a->peer = peer;
	a->tcp = tcp;
	a->half = half;
	a->len = skb->len;
	return UNDECIDED;
}

/* Notes where the streams are: all that was counted is written, and the peer's TCP is at peer_seq. */
static __always_inline void seed(struct half *h, __u32 peer_seq)
{
	h->mark = h->redirected + h->consumed;
	h->base = peer_seq - h->mark;
	h->older = 0;
	h->newer = 0;
	h->seeded = 1;
}

/* Is the half redirecting, or may it begin to? Whether the peer has room is another question. */
static __always_inline bool may_redirect(struct arrival *a)
{
	__u32 other = a->half ^ 1;
	struct half *back = bpf_map_lookup_elem(&halves, &other);

	return a->h->passed == READ_ONCE(a->h->consumed) && !short_of_memory(a->tcp) &&
	       !(rule_mutual && back && is_passing(back));
}

/* Counts the skb. local: bytes of this direction that went past TCP, to or from a process. */
static __always_inline void count(struct arrival *a, enum way way, __u64 local)
{
	struct half *h = a->h;
	struct direction *d;
	struct flow *f;
	__u64 was, now;

	h->next_seq += a->len;
	if (way == TO_USERSPACE) {
		was = h->passed;
		__sync_fetch_and_add(&h->passed, a->len);
		if (READ_ONCE(h->consumed) == was)
			tell(a->half, EVENT_PASSED);
	} else if (way == TO_PEER) {
		h->newer++;
		WRITE_ONCE(h->redirected, h->redirected + a->len);
	}

	now = h->redirected + h->passed;
	if (way != TO_PROCESS && (now ^ (now - a->len)) >> BULK_SHIFT)
		tell(a->half, EVENT_BULK);

	f = bpf_map_lookup_elem(&flows, &a->at->flow);
	if (f) {
		d = a->half & 1 ? &f->down : &f->up;
		d->trimmed = h->trimmed;
		d->redirected = h->redirected;
		d->passed = h->passed;
		d->local = local;
		d->bytes = d->before + h->redirected + h->passed + local;
	}
}

static __always_inline int redirect_to_peer(struct __sk_buff *skb, struct arrival *a)
{
	if (bpf_sk_redirect_map(skb, &peers, a->half ^ 1, 0) != SK_PASS)
		return give_up(a->h, a->half, FAULT_REDIRECT);
	return SK_PASS;
}

#endif
