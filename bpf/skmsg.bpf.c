// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/* The last hop to a process on this host, past TCP.
 *
 *	client ── TCP ── downstream ──verdict──► process         redirect into its ingress queue
 *	                 downstream ◄───msg───── process         redirect of what it sends
 *	                                 upstream ── TCP ── process    still: what can't go past it, FIN, RST
 *
 * The TCP connection between upstream and the process stays, with verdict.h's whole protocol on it: it is
 * where bytes go when a redirect would have to wait, so whoever has to wait is held up, and woken, by TCP.
 * Only at moments when that connection is empty may bytes go past it:
 *
 * # To the process
 *
 * The process reads its ingress queue before what TCP has for it. So
 *  - past TCP only if the process has read all that upstream's TCP was ever given: its copied_seq is
 *    upstream's write_seq (they count in one space), and nothing waits to be written to upstream;
 *  - into TCP only if the worker has moved all redirected skbs into the ingress queue, where they come first.
 *    The verdict and userspace (`query`) both look.
 * The kernel charges what is in the ingress queue to the process's socket, but what is on its way there to
 * nobody, and tries again every jiffy when there is no room: the verdict goes past TCP only while at most
 * half of the receive buffer is in use, counting what may still be on its way.
 *
 * # From the process
 *
 * `msg_redirect` runs in the process's send(), under its socket's lock, and a redirect writes to downstream
 * before send() returns. What it does not redirect goes by TCP to upstream, whose verdict or userspace writes
 * it to downstream. So
 *  - past TCP only if downstream has been given every byte that the process ever sent, by either way:
 *    downstream.write_seq - base == out + (process.write_seq - base_local);
 *  - past TCP only if downstream's send buffer has room, and TCP is not short of memory: else send() would
 *    fail with EAGAIN, and the process would wait for room in its own, which has some.
 * If a redirect fails in part all the same, send() has told the process how much of it was taken, so no byte
 * is lost. But `out` is too large then, nothing is redirected any more, and whoever waits for what downstream
 * was given waits for bytes that never come. When the way back has not moved for a while userspace has `out`
 * corrected (LOCAL_SETTLE), from what downstream was given: while no redirect is at work (it holds a
 * reference to downstream's psock), and nothing waits for the worker. loader/sockmap/model_local_test.go runs
 * all interleavings of small cases against this.
 *
 * # Giving back
 *
 * A flow is given back when nothing of it is past TCP:
 *  - `on` is 0, and a grace period of RCU is over: no program is at work that has seen it as 1, so `in` and
 *    `out` are final, but for what LOCAL_SETTLE takes away. The verdict goes on, by TCP.
 *  - Both sources have left `local_sources`, as those of sockmap leave theirs (`iter_leave`).
 *  - Downstream was given all of `out`, so no redirect is at work, which would find it gone and fail.
 *  - The process has read its ingress queue to the end: with its socket out of `locals` the queue is freed.
 *    While it does not, the flow stays; what comes goes by TCP, behind the queue. So does one whose process
 *    has closed its socket, unless the queue was empty before: it may have to be reset.
 * Then nothing is lost when the process's socket goes out of `locals`, and it is one like any other.
 *
 * # Captured late
 *
 * Whoever gets such a flow next captures the process's socket anew (`capture_late`), once nobody is left that
 * holds its old psock: a process that waits in a read does until something comes. The process may also be
 * waiting in TCP's own read then, which does not look into the ingress queue. So what comes first for it goes
 * by TCP, and past TCP only when the process has read that (`late`).
 *
 * # Slots
 *
 * Unlike the verdict, `msg_redirect` and `sockops_capture` run under the lock of a socket that is not ours to
 * close, so a flow may end while they are at it. Its slot is given to another flow only when a grace period
 * of RCU is over since its process was taken out of `local_places`: whoever found the slot there has come to
 * its end by then.
 *
 * # Ends
 *
 * An end overtakes what the worker has not moved into the ingress queue, so userspace passes a FIN, or a
 * reset, on only after that (`query`). What is in the queue stays readable behind either, as what TCP has
 * received. A close() with unread bytes is a reset in TCP; here TCP doesn't know of them, and
 * `sockops_capture` notes it for userspace.
 *
 * # Zero-copy sends
 *
 * A socket in `locals` sends copies, whatever it is asked for, and the kernel never says that a send with
 * MSG_ZEROCOPY is complete. So a process is told that its socket can't (`sockopt_refuse`), and one that can
 * is not captured.
 */

#include "leave.h"

/* For tests, as those of verdict.h. */
const volatile bool rule_local_order = true;
const volatile bool rule_local_bound = true;
const volatile bool rule_local_unread = true;
const volatile bool rule_local_late = true;
const volatile __u64 window_ns = 0; /* how long msg_redirect and sockops_capture wait before they act */

/* So that bpf2go finds them in the BTF. */
const enum local_answer *unused_answer __attribute__((unused));
const enum local_request *unused_request __attribute__((unused));
const enum local_target *unused_target __attribute__((unused));

/* Sockets of processes that are targets. It has the program `msg_redirect`. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, struct pair);
	__type(value, __u64);
} locals SEC(".maps");

/* When a socket was put there (CLOCK_MONOTONIC), until a flow claims it. Userspace removes what none does. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, struct pair);
	__type(value, __u64);
} caught SEC(".maps");

/* Where such processes listen. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TARGETS);
	__type(key, struct end);
	__type(value, __u32);
} targets SEC(".maps");

/* Cookie of a process's socket -> slot of its flow. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u64);
	__type(value, struct place);
} local_places SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct local);
} local_flows SEC(".maps");

/* Both sockets of a flow with a local target: what gets the verdict `local_verdict`. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2 * MAX_FLOWS);
	__type(key, __u32);
	__type(value, __u64);
} local_sources SEC(".maps");

/* The running kernel's number of an enum sock_flags. */
#define sock_flag(name) __builtin_preserve_enum_value(*(enum sock_flags *)name, 1)

static __always_inline struct sk_psock *psock_of(struct sock *sk)
{
	return (void *)((__u64)sk->sk_user_data & ~7ULL);
}

/* What waits in a socket's psock: LOCAL_BACKLOG, LOCAL_QUEUE. */
static __always_inline __u32 waits(struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);
	struct list_head *next = 0;
	__u32 n = 0, answer = 0;

	/* A psock that is gone holds nothing. One that is freed meanwhile reads as anything. */
	if (!psock)
		return 0;
	if (bpf_probe_read_kernel(&n, sizeof(n), &psock->ingress_skb.qlen) || n)
		answer |= LOCAL_BACKLOG;
	if (bpf_probe_read_kernel(&next, sizeof(next), &psock->ingress_msg.next) || next != &psock->ingress_msg)
		answer |= LOCAL_QUEUE;
	return answer;
}

/* Has the process's receive buffer room for len bytes, behind those that may still be on their way? */
static __always_inline bool has_room(struct local *l, struct half *h, struct tcp_sock *tcp, __u32 len)
{
	__u64 coming = l->in - l->settled + len;
	__s64 used = READ_ONCE(sock_of(tcp)->sk_backlog.rmem_alloc.counter);

	if (!rule_local_bound)
		return true;
	/* True sizes are up to twice the bytes, and a head for each skb. */
	used += 2 * (__s64)coming + SKB_OVERHEAD_BYTES;
	return used <= h->limit && 2 * used <= READ_ONCE(sock_of(tcp)->sk_rcvbuf);
}

/* Where to send what comes from downstream: to the process where order and room allow it. */
static __always_inline enum way to_process(struct local *l, struct arrival *a)
{
	enum way way = TO_PEER;
	struct half *h = a->h;
	struct tcp_sock *tcp;
	struct bpf_sock *sk;
	__u32 waiting;

	sk = bpf_map_lookup_elem(&locals, &l->pair);
	if (!sk)
		return TO_PEER; /* closed: upstream will be told */
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		goto out;
	waiting = waits(sock_of(tcp)) & LOCAL_BACKLOG;
	if (!waiting)
		l->settled = l->in;
	if (waiting && rule_local_order)
		way = TO_USERSPACE; /* nothing may overtake it in TCP */
	if (!READ_ONCE(l->on))
		goto out;
	if (rule_local_order && ((__u32)(h->redirected + h->consumed) != a->tcp->write_seq - h->base ||
				 READ_ONCE(tcp->copied_seq) != a->tcp->write_seq))
		goto out;
	if (rule_local_late && l->late && a->tcp->write_seq == l->first)
		goto out; /* the process may wait where only TCP wakes it */
	if (!has_room(l, h, tcp, a->len))
		goto out;
	l->late = 0;
	WRITE_ONCE(l->in, l->in + a->len);
	way = TO_PROCESS;
out:
	bpf_sk_release(sk);
	return way;
}

/* Has downstream, whose write_seq is given, got all that the process sent? */
static __always_inline bool all_in(struct local *l, __u32 down, struct tcp_sock *process)
{
	return down - l->base == (__u32)l->out + READ_ONCE(process->write_seq) - l->base_local;
}

/* May the process's next bytes be written to downstream now? An sk_msg program can look no socket up in a
 * sockmap (it may not release it), so it reads downstream through the address that `query` has left.
 * Userspace holds that socket until `on` is 0, and afterwards the read finds at worst another socket's
 * numbers, and the redirect no socket. */
static __always_inline bool takes(struct local *l, struct tcp_sock *process, __u32 size)
{
	struct tcp_sock *down = (void *)l->down;
	struct sock *sk = sock_of(down);
	int queued = 0, most = 0;
	unsigned char state = 0;
	__u32 seq = 0;

	if (bpf_probe_read_kernel(&state, sizeof(state), (const void *)&sk->__sk_common.skc_state) ||
	    bpf_probe_read_kernel(&seq, sizeof(seq), &down->write_seq) ||
	    bpf_probe_read_kernel(&queued, sizeof(queued), &sk->sk_wmem_queued) ||
	    bpf_probe_read_kernel(&most, sizeof(most), &sk->sk_sndbuf))
		return false;
	if (state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT)
		return false;
	if (rule_local_order && !all_in(l, seq, process))
		return false;
	if (short_of_memory(process)) /* one account for all of TCP */
		return false;
	return !rule_local_bound || (__s64)size + (size >> 2) + SKB_OVERHEAD_BYTES + queued <= most;
}

/* Takes from `out` what redirects did not write. by_tcp is what has come to downstream by the worker and by
 * userspace, read before the last verdict on upstream was over. */
static __always_inline __u32 settle(struct local *l, __u32 slot, __u32 by_tcp)
{
	__u32 half = 2 * slot, other = half + 1, seq, answer = 0;
	struct half *h = bpf_map_lookup_elem(&halves, &other);
	struct bpf_sock *sk, *source;
	struct sk_psock *psock;
	struct tcp_sock *down;
	int refs, maps = 1; /* peers */
	__s32 over;

	if (!h)
		return 0;
	sk = bpf_map_lookup_elem(&peers, &half);
	if (!sk)
		return 0; /* the flow has ended */
	down = bpf_skc_to_tcp_sock(sk);
	if (!down || waits(sock_of(down)) & LOCAL_BACKLOG)
		goto out;
	source = bpf_map_lookup_elem(&local_sources, &half); /* else it has left */
	if (source) {
		maps++;
		bpf_sk_release(source);
	}
	psock = psock_of(sock_of(down));
	if (bpf_probe_read_kernel(&refs, sizeof(refs), &psock->refcnt.refs.counter) || refs > maps)
		goto out; /* a redirect is at work */
	seq = READ_ONCE(down->write_seq);
	over = (__u32)l->out - (seq - l->base - (by_tcp - l->before));
	if (over <= 0 || (__u32)(READ_ONCE(h->redirected) + READ_ONCE(h->consumed)) != by_tcp)
		goto out;
	WRITE_ONCE(l->out, l->out - over);
	answer = LOCAL_SETTLED;
out:
	bpf_sk_release(sk);
	return answer;
}

/* The window that window_ns makes: how often somebody was in it, and whether a test has seen enough. */
__u32 windows = 0;
__u32 window_shut = 0;

static long is_over(__u32 i, void *end) { return READ_ONCE(window_shut) || bpf_ktime_get_ns() >= *(__u64 *)end; }

/* Only the first who comes waits. A close() comes here up to three times, the last two of them in the softirq
 * that holds the socket's lock, which other processors then wait for: nothing else would run meanwhile, nor
 * whoever is to shut the window. */
static __always_inline void widen(void)
{
	__u64 end;

	if (!window_ns || READ_ONCE(windows))
		return;
	__sync_fetch_and_add(&windows, 1);
	end = bpf_ktime_get_ns() + window_ns;
	for (int i = 0; i < 64 && !is_over(0, &end); i++)
		bpf_loop(1 << 23, is_over, &end, 0);
}

/* READ_ONCE in the callers: the verifier refuses a context pointer that the compiler has chosen. */
static __always_inline void address(__u8 to[16], __u32 family, __u32 ip4, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u32 *w = (__u32 *)to;

	if (family == AF_INET6) {
		w[0] = a;
		w[1] = b;
		w[2] = c;
		w[3] = d;
		return;
	}
	w[0] = 0;
	w[1] = 0;
	w[2] = from_network(0xffff);
	w[3] = ip4;
}

/* Has close() just taken out what TCP had received? Then what is left was redirected: it is freed after a
 * grace period of RCU. close() takes the psock away before, which shutdown() and a FIN don't. A FIN that
 * comes later is in the queue itself when the state changes because of it. */
static __always_inline bool closes(struct bpf_sock_ops *ops, struct tcp_sock *tcp)
{
	__u32 old = READ_ONCE(ops->args[0]), new = READ_ONCE(ops->args[1]);

	if (sock_of(tcp)->sk_shutdown != SHUTDOWN_MASK || psock_of(sock_of(tcp)))
		return false;
	if (new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK)
		return true;
	/* After a shutdown() close() changes no state, or leaves FIN_WAIT2 to a socket for TIME_WAIT. */
	return new == TCP_FIN_WAIT2 || (old == TCP_FIN_WAIT2 && new == TCP_CLOSE &&
					!(sock_of(tcp)->__sk_common.skc_flags & SOCK_DONE));
}

SEC("sk_skb/stream_verdict")
int local_verdict(struct __sk_buff *skb)
{
	enum way way = TO_USERSPACE;
	__u64 moved = 0, beside = 0;
	struct arrival a;
	struct local *l;
	__u32 slot, seq;
	bool from_process;
	int action = arrive(skb, &a);

	if (action != UNDECIDED)
		return action;
	slot = a.half >> 1;
	from_process = a.half & 1;
	l = bpf_map_lookup_elem(&local_flows, &slot);

	if (!a.h->seeded) {
		seq = READ_ONCE(a.tcp->write_seq);
		if (l && from_process) /* downstream's write_seq may have moved on past TCP by now */
			seq = READ_ONCE(l->base);
		seed(a.h, seq);
	}
	if (may_redirect(&a))
		way = l && !from_process ? to_process(l, &a) : TO_PEER;
	if (l && from_process)
		beside = READ_ONCE(l->out);
	if (way == TO_PEER && !fits(a.h, a.tcp, a.len, beside))
		way = TO_USERSPACE;
	bpf_sk_release(a.peer);

	if (l)
		moved = from_process ? READ_ONCE(l->out) : l->in;
	count(&a, way, moved);
	if (way == TO_PEER)
		return redirect_to_peer(skb, &a);
	if (way == TO_PROCESS && bpf_sk_redirect_hash(skb, &locals, &l->pair, BPF_F_INGRESS) != SK_PASS)
		return give_up(a.h, a.half, FAULT_REDIRECT);
	return SK_PASS;
}

/* What the process sends. */
SEC("sk_msg")
int msg_redirect(struct sk_msg_md *msg)
{
	struct tcp_sock *process;
	struct place *at;
	struct local *l;
	struct flow *f;
	__u32 slot, half, size = msg->size;
	__u64 cookie;

	if (!msg->sk)
		return SK_PASS; /* by TCP, as everything below that passes */
	process = bpf_skc_to_tcp_sock(msg->sk);
	if (!process)
		return SK_PASS;
	cookie = sock_of(process)->__sk_common.skc_cookie.counter;
	at = bpf_map_lookup_elem(&local_places, &cookie);
	if (!at)
		return SK_PASS; /* not a flow */
	half = at->half; /* downstream's */
	slot = half >> 1;
	l = bpf_map_lookup_elem(&local_flows, &slot);
	if (!l || !l->on || l->process != cookie || !takes(l, process, size))
		return SK_PASS;
	widen();
	if (bpf_msg_redirect_map(msg, &peers, half, 0) != SK_PASS)
		return SK_PASS; /* downstream is gone: upstream will be told */
	WRITE_ONCE(l->out, l->out + size);
	f = bpf_map_lookup_elem(&flows, &at->flow);
	if (f) {
		f->down.local = l->out;
		f->down.bytes = f->down.before + f->down.redirected + f->down.passed + l->out;
	}
	return SK_PASS;
}

/* As that of sockmap.bpf.c, for both sockmaps. */
SEC("iter/tcp")
int iter_leave(struct bpf_iter__tcp *ctx)
{
	__u32 half;
	struct half *h = stands_at(ctx, &half);

	if (!h)
		return 0;
	if (may_leave(h, half) &&
	    (bpf_map_delete_elem(&sources, &half) == 0 || bpf_map_delete_elem(&local_sources, &half) == 0))
		has_left(h);
	call.half = half;
	return 1;
}

/* Refuses to let the sockets of targets send with MSG_ZEROCOPY, as kernels do that don't have it. */
SEC("cgroup/setsockopt")
int sockopt_refuse(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct end own = {};

	if (ctx->level != SOL_SOCKET || ctx->optname != SO_ZEROCOPY || !sk)
		goto allow;
	address(own.address, sk->family, READ_ONCE(sk->src_ip4), READ_ONCE(sk->src_ip6[0]),
		READ_ONCE(sk->src_ip6[1]), READ_ONCE(sk->src_ip6[2]), READ_ONCE(sk->src_ip6[3]));
	own.port = sk->src_port;
	if (bpf_map_lookup_elem(&targets, &own)) {
		bpf_set_retval(-EOPNOTSUPP);
		return 0;
	}
allow:
	ctx->optlen = 0; /* the kernel takes the value from the process, however long it is */
	return 1;
}

/* Puts connections to targets into `locals`, and sees how they are closed. */
SEC("sockops")
int sockops_capture(struct bpf_sock_ops *ops)
{
	struct tcp_sock *tcp;
	struct pair pair = {};
	struct place *at;
	struct local *l;
	__u64 now, cookie;
	__u32 slot, zerocopy = TARGET_ZEROCOPY, *target;

	if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		address(pair.own.address, ops->family, READ_ONCE(ops->local_ip4), READ_ONCE(ops->local_ip6[0]),
			READ_ONCE(ops->local_ip6[1]), READ_ONCE(ops->local_ip6[2]), READ_ONCE(ops->local_ip6[3]));
		pair.own.port = ops->local_port;
		target = bpf_map_lookup_elem(&targets, &pair.own);
		if (!target || *target == TARGET_LEFT)
			return 1; /* something else in that cgroup, or another daemon's */
		tcp = ops->sk ? bpf_skc_to_tcp_sock(ops->sk) : 0;
		/* As the listener had it. */
		if (tcp && sock_of(tcp)->__sk_common.skc_flags >> sock_flag(SOCK_ZEROCOPY) & 1) {
			bpf_map_update_elem(&targets, &pair.own, &zerocopy, 0);
			return 1;
		}
		address(pair.other.address, ops->family, READ_ONCE(ops->remote_ip4), READ_ONCE(ops->remote_ip6[0]),
			READ_ONCE(ops->remote_ip6[1]), READ_ONCE(ops->remote_ip6[2]), READ_ONCE(ops->remote_ip6[3]));
		pair.other.port = from_network(ops->remote_port);
		now = bpf_ktime_get_ns();
		if (bpf_map_update_elem(&caught, &pair, &now, 0))
			return 1;
		/* If there is no room, or the socket can't be in a sockmap, TCP carries it as before. */
		if (bpf_sock_hash_update(ops, &locals, &pair, BPF_NOEXIST)) {
			bpf_map_delete_elem(&caught, &pair);
			return 1;
		}
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		return 1;
	}
	if (ops->op != BPF_SOCK_OPS_STATE_CB || !ops->sk)
		return 1;
	tcp = bpf_skc_to_tcp_sock(ops->sk);
	if (!tcp)
		return 1;
	cookie = sock_of(tcp)->__sk_common.skc_cookie.counter;
	at = bpf_map_lookup_elem(&local_places, &cookie);
	if (!at)
		return 1;
	slot = at->half >> 1;
	l = bpf_map_lookup_elem(&local_flows, &slot);
	if (l && l->process == cookie && rule_local_unread && closes(ops, tcp) &&
	    sock_of(tcp)->sk_backlog.rmem_alloc.counter > 0) {
		widen();
		WRITE_ONCE(l->unread, 1);
		tell(at->half | 1, EVENT_UNREAD);
	}
	return 1;
}

/* Tells userspace how the flow in slot cb[0] is; cb[1] is the enum local_request. BPF_PROG_TEST_RUN only. */
SEC("tc")
int query(struct __sk_buff *skb)
{
	struct bpf_sock *sk, *down_sk, *up_sk;
	struct tcp_sock *process, *down, *up;
	__u32 slot = skb->cb[0], half = 2 * slot, other = half + 1, answer = 0;
	struct local *l = bpf_map_lookup_elem(&local_flows, &slot);
	struct half *back = bpf_map_lookup_elem(&halves, &other);

	if (!l || !back)
		return 0;
	if (skb->cb[1] == LOCAL_SETTLE)
		return settle(l, slot, skb->cb[2]);
	sk = bpf_map_lookup_elem(&locals, &l->pair);
	if (!sk)
		return 0;
	process = bpf_skc_to_tcp_sock(sk);
	if (process)
		answer = LOCAL_THERE | waits(sock_of(process));
	down_sk = bpf_map_lookup_elem(&peers, &half);
	down = down_sk ? bpf_skc_to_tcp_sock(down_sk) : 0;
	up_sk = bpf_map_lookup_elem(&peers, &other);
	up = up_sk ? bpf_skc_to_tcp_sock(up_sk) : 0;
	if (process && down && up && skb->cb[1] == LOCAL_BEGIN) {
		/* All that upstream has read is in downstream: that is where both streams are. */
		l->down = (__u64)down;
		l->base = down->write_seq;
		l->before = back->redirected + back->consumed;
		l->base_local = up->copied_seq;
		l->first = up->write_seq;
		/* Another connection with these addresses, in another namespace, has other numbers. */
		if (process->rcv_nxt - up->snd_una <= up->write_seq - up->snd_una &&
		    up->rcv_nxt - process->snd_una <= process->write_seq - process->snd_una)
			answer |= LOCAL_PAIR;
	}
	if (up_sk)
		bpf_sk_release(up_sk);
	if (down_sk)
		bpf_sk_release(down_sk);
	bpf_sk_release(sk);
	return answer;
}

/* Is this an IPv4 address? */
static __always_inline bool is_mapped(struct end *e)
{
	__u32 *w = (__u32 *)e->address;

	return !w[0] && !w[1] && w[2] == from_network(0xffff);
}

/* Captures a process's socket that an earlier daemon had captured, and has given back. Run by
 * BPF_PROG_TEST_RUN only: behind an Ethernet header there is the key that the socket is to have in `locals`,
 * and cb[0] is the number of its network namespace, or negative for that of the caller. */
SEC("tc")
int capture_late(struct __sk_buff *skb)
{
	struct bpf_sock_tuple t = {};
	struct tcp_sock *tcp;
	struct bpf_sock *sk;
	struct pair pair;
	__u32 *own = (__u32 *)pair.own.address, *other = (__u32 *)pair.other.address;
	__u64 now, space = (__s64)(__s32)skb->cb[0];
	__u32 answer = 0;

	if (bpf_skb_load_bytes(skb, 14, &pair, sizeof(pair)))
		return 0;
	if (is_mapped(&pair.own)) {
		t.ipv4.saddr = other[3];
		t.ipv4.daddr = own[3];
		t.ipv4.sport = from_network16(pair.other.port);
		t.ipv4.dport = from_network16(pair.own.port);
		sk = bpf_sk_lookup_tcp(skb, &t, sizeof(t.ipv4), space, 0);
	} else {
		for (int i = 0; i < 4; i++) {
			t.ipv6.saddr[i] = other[i];
			t.ipv6.daddr[i] = own[i];
		}
		t.ipv6.sport = from_network16(pair.other.port);
		t.ipv6.dport = from_network16(pair.own.port);
		sk = bpf_sk_lookup_tcp(skb, &t, sizeof(t.ipv6), space, 0);
	}
	if (!sk)
		return 0;
	tcp = bpf_skc_to_tcp_sock(sk);
	/* One that has not been captured before will not tell how it is closed. One that waits for more than a
	 * byte would wait for ever: past TCP nothing is counted for it. */
	if (!tcp || sock_of(tcp)->sk_rcvlowat > 1 || sock_of(tcp)->__sk_common.skc_state != TCP_ESTABLISHED ||
	    !(tcp->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG) ||
	    sock_of(tcp)->__sk_common.skc_flags >> sock_flag(SOCK_ZEROCOPY) & 1)
		goto out;
	answer = LOCAL_HELD;
	now = bpf_ktime_get_ns();
	if (bpf_map_update_elem(&caught, &pair, &now, BPF_NOEXIST))
		goto out;
	if (bpf_map_update_elem(&locals, &pair, sk, BPF_NOEXIST))
		bpf_map_delete_elem(&caught, &pair);
	else
		answer = LOCAL_THERE;
out:
	bpf_sk_release(sk);
	return answer;
}

/* What waits for the process whose socket has the key that follows an Ethernet header in skb. Run by
 * BPF_PROG_TEST_RUN only. An iterator of `locals` would say it at once, but there are kernels that refuse to
 * load any iterator of a map's elements. */
SEC("tc")
int query_unread(struct __sk_buff *skb)
{
	struct tcp_sock *tcp;
	struct bpf_sock *sk;
	struct pair pair;
	__u32 answer = 0;

	if (bpf_skb_load_bytes(skb, 14, &pair, sizeof(pair)))
		return 0;
	sk = bpf_map_lookup_elem(&locals, &pair);
	if (!sk)
		return 0;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (tcp)
		answer = waits(sock_of(tcp));
	bpf_sk_release(sk);
	return answer;
}

char _license[] SEC("license") = "Dual BSD/GPL";
