// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/* The splice: a verdict on each skb that a spliced socket receives.
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
 * Why userspace never sleeps while there is something to copy: it sleeps when it finds passed == consumed after it
 * stored consumed, and the verdict rings when it finds consumed == the old passed after it added to passed.
 * With a full barrier between the store and the load on both sides, at least one of them sees the other's store.
 * The atomic add is that barrier on x86. On weakly ordered machines it is not (the variant that is, BPF_FETCH,
 * needs 5.12), so there userspace looks once more a millisecond after it has stored consumed and gone to
 * sleep: by then all see what a processor has stored.
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
 * The halves of a flow that is busy leave, one by one, and when both have left userspace goes on with the flow by
 * splice(2). `leave` takes the source out of the sockmap while it holds the socket's lock, so no skb is under way to
 * the verdict, and only when userspace has read all that was passed, so no byte waits in the psock, where splice(2)
 * does not look. Userspace waits until all that was redirected is written, writes what it has read, and goes on behind
 * it. The flow may be spliced again, as a new one: the verdict finds out anew where the streams are.
 *
 * Reading makes room, and the sender may fill it before read(2) has returned. So SO_RCVLOWAT is raised for that moment: the
 * kernel tells nobody of what comes, and the verdict does not run for it.
 *
 * # What no socket is charged for
 *
 * The kernel has one queue in each socket (psock.ingress_skb) for what was redirected to it, and for what was passed
 * by it while that queue was not empty. What is in it is charged to nobody, so no window closes because of it. So
 *  - while one way passes, the other one doesn't redirect either: nothing new comes in front of what is passed, and
 *    soon the queue is empty, and what is passed is charged at once;
 *  - short of memory, TCP does not take what was redirected however much room there seems to be: then all is passed;
 *  - where that is not enough, since the worker that empties the queue comes late, `brake` cuts the payload off what
 *    comes in, before TCP sees it, as if the network had lost it. The sender sends it again.
 *
 * # A reset
 *
 * The worker stops for good at the first skb in that queue that a dead socket does not take, and what the socket
 * had passed behind it, and acknowledged, is lost. So `brake` keeps a reset from TCP while something in the queue
 * goes the other way, and tells userspace of it (FAULT_RESET): the queue is emptied as if nothing had come, and both
 * sides are reset when what the dead one sent has arrived. A reset that TCP would not take (its number is not the
 * one to come next, maybe since bytes in front of it still wait for the socket's lock) is forgotten: what is in the
 * queue is about to be sent, and brings another one.
 *
 * loader/model_test.go runs all interleavings of small cases against this, and loader/model_reset_test.go those of
 * a reset.
 */

/* includes */
#include "kernel.h"
#include "bpf/bpf_helpers.h"
#include "limits.h"

/* limits: all in limits.h. Tunables, set before load: each turns off one rule, for the tests that
 * prove that the rule is needed. */
const volatile bool rule_bound = true;
const volatile bool rule_trim = true;
const volatile bool rule_fin = true;
const volatile bool rule_couple = true;
const volatile bool rule_brake = true;
const volatile bool rule_late = true; /* a reset waits for the queue */

/* Pages; from here on (net.ipv4.tcp_mem) the kernel may refuse to take bytes into a send buffer. 0: not known. */
const volatile __u64 tcp_pressure = 0;

/* types: all in limits.h. */

/* maps */

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

/* What gets the verdict. */
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

/* helpers */

/* So that bpf2go finds them in the BTF. */
const struct event *unused_event __attribute__((unused));
const enum event_kind *unused_kind __attribute__((unused));
const enum leaving *unused_leaving __attribute__((unused));

#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define from_network(x) __builtin_bswap32(x)
#else
#define from_network(x) (x)
#endif

/* If the ring is full, userspace finds out by its sweep, within 3 seconds. */
static __always_inline void tell(__u32 half, enum event_kind kind)
{
	struct event e = { .half = half, .kind = kind };

	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
}

/* What becomes of the bytes of a half that gave up, until userspace has reset both sides. A peer that is gone
 * leaves no hole: what comes stays with the source, whose window closes, else its sender would be told
 * that all it has is delivered. After any other fault the skb is lost, and a hole must not be hidden by what comes after it. */
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

/* Does the peer's send buffer take len more bytes now, behind all that waits for it already? A backlog that can't
 * be written is retried every jiffy, for each flow that has one, so it must not come about. */
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
	need += READ_ONCE(peer->inet_conn.icsk_inet.sk.sk_wmem_queued);
	return need <= READ_ONCE(peer->inet_conn.icsk_inet.sk.sk_sndbuf);
}

/* Bytes for the peer would wait in the queue for as long as TCP is short of memory. */
static __always_inline bool short_of_memory(struct tcp_sock *peer)
{
	return tcp_pressure && peer->inet_conn.icsk_inet.sk.__sk_common.skc_prot->memory_allocated->counter >= (__s64)tcp_pressure;
}

/* Is what this half passes likely to find bytes of its own in front of it, that go the other way? */
static __always_inline bool is_passing(struct half *h)
{
	return h->seeded && READ_ONCE(h->passed) != READ_ONCE(h->consumed);
}

/* Where a verdict may send an skb. local.bpf.c includes this file, and adds a third way. */
enum way { WAY_PEER, WAY_WAIT, WAY_LOCAL };

struct local_flow {
	struct local *at; /* 0: not a local flow */
};

static __always_inline void local_find(struct local_flow *l, __u32 half);
static __always_inline enum way local_way(struct local_flow *l, struct half *h, __u32 half, struct tcp_sock *peer, __u32 len);
static __always_inline __u64 local_beside(struct local_flow *l, __u32 half); /* what else is in the peer's stream */
static __always_inline __u32 local_base(struct local_flow *l, __u32 half, struct tcp_sock *peer); /* half.base */
static __always_inline __u64 local_moved(struct local_flow *l, __u32 half);
static __always_inline long local_redirect(struct local_flow *l, struct __sk_buff *skb);

#ifndef WITH_LOCAL
static __always_inline void local_find(struct local_flow *l, __u32 half) {}
static __always_inline enum way local_way(struct local_flow *l, struct half *h, __u32 half, struct tcp_sock *peer, __u32 len) { return WAY_PEER; }
static __always_inline __u64 local_beside(struct local_flow *l, __u32 half) { return 0; }
static __always_inline __u32 local_base(struct local_flow *l, __u32 half, struct tcp_sock *peer) { return peer->write_seq; }
static __always_inline __u64 local_moved(struct local_flow *l, __u32 half) { return 0; }
static __always_inline long local_redirect(struct local_flow *l, struct __sk_buff *skb) { return SK_DROP; }
#endif

static __always_inline int verdict(struct __sk_buff *skb)
{
	struct local_flow local = {};
	enum way way = WAY_WAIT;
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct tcp_sock *tcp;
	struct bpf_sock *peer;
	struct direction *d;
	enum fault fault;
	struct place *at;
	struct flow *f;
	struct half *h, *back;
	__u32 len, half, other;
	__u64 was, now;
	bool pass;

	/* A FIN alone. Redirecting it would break the peer; userspace sees the end by EPOLLRDHUP. */
	if (rule_fin && skb->len == 0)
		return SK_DROP;

	at = bpf_map_lookup_elem(&places, &cookie);
	if (!at)
		return SK_PASS; /* not a flow, or no more: charged to its own socket */
	half = at->half;
	h = bpf_map_lookup_elem(&halves, &half);
	if (!h || h->source != cookie)
		return SK_PASS; /* likewise */
	if (h->fault != FAULT_NONE && h->fault != FAULT_RESET)
		return after_fault(h->fault); /* about to be reset */

	local_find(&local, half);
	other = half ^ 1;
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
	len = skb->len;

	peer = bpf_map_lookup_elem(&peers, &other);
	if (!peer)
		return give_up(h, half, FAULT_PEER);
	tcp = bpf_skc_to_tcp_sock(peer);
	if (!tcp) {
		bpf_sk_release(peer);
		return give_up(h, half, FAULT_PEER);
	}
	if (tcp->inet_conn.icsk_inet.sk.__sk_common.skc_state != TCP_ESTABLISHED &&
	    tcp->inet_conn.icsk_inet.sk.__sk_common.skc_state != TCP_CLOSE_WAIT) {
		bpf_sk_release(peer);
		return give_up(h, half, FAULT_PEER);
	}
	if (!h->seeded) { /* all that was counted is written */
		h->mark = h->redirected + h->consumed;
		h->base = local_base(&local, half, tcp) - h->mark;
		h->older = 0;
		h->newer = 0;
		h->seeded = 1;
	}
	back = bpf_map_lookup_elem(&halves, &other);
	pass = h->passed != READ_ONCE(h->consumed) || short_of_memory(tcp) || (rule_couple && back && is_passing(back));
	if (!pass)
		way = local_way(&local, h, half, tcp, len);
	if (way == WAY_WAIT || (way == WAY_PEER && !fits(h, tcp, len, local_beside(&local, half))))
		pass = true;
	bpf_sk_release(peer);

	h->next_seq += len;
	if (pass) {
		was = h->passed;
		__sync_fetch_and_add(&h->passed, len);
		if (READ_ONCE(h->consumed) == was)
			tell(half, EVENT_PASSED);
	} else if (way == WAY_PEER) {
		h->newer++;
		WRITE_ONCE(h->redirected, h->redirected + len);
	}

	now = h->redirected + h->passed;
	if ((now ^ (now - len)) >> BULK_SHIFT)
		tell(half, EVENT_BULK);

	f = bpf_map_lookup_elem(&flows, &at->flow);
	if (f) {
		d = half & 1 ? &f->down : &f->up;
		d->trimmed = h->trimmed;
		d->redirected = h->redirected;
		d->passed = h->passed;
		d->local = local_moved(&local, half);
		d->bytes = d->before + h->redirected + h->passed + d->local;
	}

	if (pass)
		return SK_PASS; /* charged to the source: its window closes, userspace copies */
	if ((way == WAY_LOCAL ? local_redirect(&local, skb) : bpf_sk_redirect_map(skb, &peers, other, 0)) != SK_PASS)
		return give_up(h, half, FAULT_REDIRECT);
	return SK_PASS;
}

/* programs */

#ifndef WITH_LOCAL
SEC("sk_skb/stream_verdict")
int splice(struct __sk_buff *skb)
{
	return verdict(skb);
}

/* Runs in the system call of who asks, so there is no order to argue. */
struct leave_call call = {};

/* Takes a half out of the sockmap that is LEAVING. Reading the iterator runs it for each TCP socket of the namespace,
 * under the socket's lock (since 5.15). Deleting by the system call does not take that, and an skb that
 * is on its way to the verdict would be dropped, for want of one.
 *
 * 1 ends the read with EAGAIN, and the next read begins with the same socket: to get there takes milliseconds where
 * the kernel's table of sockets is large, and asking there microseconds. */
SEC("iter/tcp")
int leave(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct place *at;
	struct half *h;
	__u64 cookie;
	__u32 half;

	if (!sk)
		return 0;
	cookie = sk->skc_cookie.counter;
	at = bpf_map_lookup_elem(&places, &cookie);
	if (!at)
		return 0;
	half = at->half;
	h = bpf_map_lookup_elem(&halves, &half);
	if (!h || h->source != cookie || h->leaving != LEAVING || h->fault != FAULT_NONE)
		return 0;
	if (call.half == half && call.read == h->passed && bpf_map_delete_elem(&sources, &half) == 0) {
		h->seeded = 0;
		h->leaving = HAS_LEFT;
	}
	call.half = half;
	return 1;
}

/* Segments whose payload was cut off by `brake`. */
__u64 braked = 0;

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

/* The filter of a spliced socket (SO_ATTACH_BPF), run for each segment before TCP sees it. It gives how many bytes TCP
 * gets to see, from the TCP header on. What counts is what was passed and is charged to no socket, yet or ever,
 * and not in the hands of userspace, which has a bound of its own. */
SEC("socket")
int brake(struct __sk_buff *skb)
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
	if (!rule_brake)
		return -1;
	free = READ_ONCE(h->passed) - READ_ONCE(h->consumed) - ((__s64)READ_ONCE(h->in_hand) << 12);
	if (free <= h->limit && h->fault == FAULT_NONE)
		return -1;
	tcp = skb->sk ? bpf_skc_to_tcp_sock(skb->sk) : 0;
	if (!tcp)
		return -1;
	free -= READ_ONCE(tcp->inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);
	if (free <= h->limit && h->fault == FAULT_NONE)
		return -1;
	if (bpf_skb_load_bytes(skb, 12, head, sizeof(head)))
		return -1;
	if (skb->len <= (head[0] >> 4) * 4)
		return -1; /* no payload */
	__sync_fetch_and_add(&braked, 1);
	/* A FIN without its bytes would come too early. */
	return head[1] & TCP_FIN ? 0 : (head[0] >> 4) * 4;
}
#endif

/* license */
char _license[] SEC("license") = "Dual BSD/GPL";
