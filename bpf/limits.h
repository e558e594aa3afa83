/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* Sizes and types that the programs share with Go. This is their only home: bpf2go generates the Go
 * side from the BTF of the object, and the loader resizes the maps before it loads them.
 */
#ifndef TAILSPLICE_LIMITS_H
#define TAILSPLICE_LIMITS_H

enum {
	MAX_FLOWS = 65536,      /* flows at a time; a default, the loader sets what was configured */
	ID_BYTES = 40,          /* of a flow's id, a text with a zero at its end */
	ROUTE_BYTES = 64,       /* of a route's name, with a zero at its end */
	ADDRESS_BYTES = 56,     /* of [ADDRESS%ZONE]:PORT as text, with a zero at its end */
	EVENT_BYTES = 262144,   /* of the ring of events: 10,000 of them; a power of two */

	MAX_TARGETS = 4096,     /* addresses of processes on this host that flows go to */

	/* bpf_skb_adjust_room refuses more than 0xfff (net/core/filter.c). */
	TRIM_BYTES_A_CALL = 4095,
	/* An skb holds at most 512 KiB (GSO_MAX_SIZE), but what overlaps is a few segments. */
	TRIM_CALLS = 64,

	/* What one redirected skb takes from the peer's send buffer beyond its bytes: the heads of the
	 * skbs that its fragments are sent in, 1.3 to 2.3 KiB each. Too little here makes the kernel retry
	 * every jiffy, too much makes userspace copy earlier.
	 */
	SKB_OVERHEAD_BYTES = 4096,

	/* After each 4 MiB of a half userspace is told, which may find splice(2) better for them. */
	BULK_SHIFT = 22,
};

/* How a flow is doing; written by userspace only, which writes the counters again when it does. */
enum flow_state {
	FLOW_SPLICED = 1,   /* the kernel moves its bytes */
	FLOW_HALF_CLOSED,   /* one direction has ended */
	FLOW_ENDING,        /* being reset, what was received is still delivered */
};

/* Why a half gave up; written by the verdict, or by `ingress_clamp`, once. Userspace resets both sides then:
 * bytes may be missing, and neither side may take the stream for whole.
 */
enum fault {
	FAULT_NONE,
	FAULT_GAP,       /* cb[0] is not the sequence number that we are at: not our kernel's layout */
	FAULT_TRIM,      /* an overlap could not be cut off */
	FAULT_PEER,      /* the peer is gone, or takes no more data */
	FAULT_REDIRECT,  /* the helper refused */
	FAULT_RESET,     /* no bytes are missing: the source was reset, of which only `ingress_clamp` knows */
};

/* Whether a half goes out of the sockmap. */
enum leaving {
	STAYS,
	LEAVING,  /* `iter_leave` may take it out */
	HAS_LEFT, /* it did, and has set seeded to 0 */
};

/* What `iter_leave` is told, and tells. */
struct leave_call {
	__u64 read; /* userspace: how many of the half's bytes that were passed it has read */
	__u32 half; /* userspace: the one that is to leave; iter_leave: the one whose socket it stands at */
	__u32 pad;
};

/* What userspace is told through the ring. */
enum event_kind {
	EVENT_PASSED = 1, /* bytes wait in the source's queue, and userspace may be asleep */
	EVENT_FAULT,      /* half.fault was set */
	EVENT_UNREAD,     /* local.unread was set */
	EVENT_BULK,       /* 1 << BULK_SHIFT bytes more have come */
};

struct event {
	__u32 half;
	__u32 kind;
};

/* One direction of a flow, 64 bytes: the protocol between the verdict and userspace (see verdict.h).
 * Half 2n of slot n is downstream to upstream; its source socket has index 2n in the sockmaps, its peer 2n+1.
 * Every field has one writer.
 */
struct half {
	__u64 source;     /* userspace: the source's socket cookie; 0: the slot is free */
	__u64 redirected; /* verdict: bytes that went to the peer in the kernel */
	__u64 passed;     /* verdict: bytes that were left to userspace */
	__u64 consumed;   /* userspace: how many of those it has written to the peer */
	__u32 limit;      /* userspace: bytes that may wait for the peer's send buffer, flow_buffer */
	__u32 next_seq;   /* verdict: one past the last sequence number that was handled */
	__u32 base;       /* verdict: the peer's write_seq before our first byte */
	__u32 mark;       /* verdict: position in the stream that `older` ends at */
	__u16 older;      /* verdict: redirected skbs up to mark that may wait for the send buffer */
	__u16 newer;      /* verdict: those after mark */
	__u32 trimmed;    /* verdict: bytes cut off, which had been handled before */
	__u8 seeded;      /* verdict: base, mark and next_seq are valid, and it counts what comes */
	__u8 leaving;     /* userspace, and `iter_leave` while it is LEAVING */
	__u16 in_hand;    /* userspace: 4 KiB it has read and not yet written, where that is more than usual */
	enum fault fault; /* verdict, ingress_clamp */
};

/* How a cookie is found: the key of `flows`, and which half the socket is the source of. */
struct place {
	__u64 flow;
	__u32 half;
	__u32 pad;
};

struct direction {
	__u64 bytes;      /* all of the flow's: before + redirected + passed + local */
	__u64 before;     /* userspace moved them before the splice, such as a TLS hello; fixed */
	__u64 redirected;
	__u64 passed;
	__u64 trimmed;    /* cut off: bytes that the kernel delivered twice */
	__u64 local;      /* moved between the other side and a process on this host, past TCP */
};

/* What `bpftool map dump` shows of a flow. The key is downstream's socket cookie, the sk of `ss -e`. */
struct flow {
	char id[ID_BYTES];
	char route[ROUTE_BYTES];
	char downstream[ADDRESS_BYTES];       /* the client's address */
	char downstream_local[ADDRESS_BYTES]; /* where we accepted it */
	char upstream_local[ADDRESS_BYTES];   /* where we dialled from */
	char upstream[ADDRESS_BYTES];         /* the target's */
	__u64 upstream_cookie;
	enum flow_state state;
	__u32 slot;
	struct direction up;   /* downstream to upstream */
	struct direction down; /* upstream to downstream */
};

/* An address and a port; IPv4 as ::ffff:a.b.c.d. */
struct end {
	__u8 address[16];
	__u32 port;
};

/* A connection as the process on this host sees it. */
struct pair {
	struct end own;
	struct end other;
};

/* A flow whose target is a process on this host, by slot (see skmsg.bpf.c). */
struct local {
	struct pair pair; /* userspace: how the process's socket is found in `locals` */
	__u64 process;    /* userspace: the cookie of that socket */
	__u64 down;       /* query: where downstream's struct tcp_sock is */
	__u32 on;         /* userspace: bytes may go past TCP */
	__u32 base;       /* query: downstream's write_seq when the flow began */
	__u32 base_local; /* query: the process's write_seq for which that was so */
	__u32 unread;     /* sockops_capture: the process closed with bytes unread, a reset in TCP */
	__u64 in;         /* verdict: bytes that were redirected to the process */
	__u64 settled;    /* verdict: what `in` was when the worker was last seen to have moved all */
	__u64 out;        /* msg_redirect: bytes redirected to downstream; query takes what was not written */
	__u32 late;       /* userspace: the socket was captured late; verdict: that does not matter any more */
	__u32 first;      /* query: upstream's write_seq when the flow began */
	__u32 before;     /* query: bytes of the way back that were counted by then, which are before base */
	__u32 unused;
};

/* What `query` is asked to do, beside to answer. */
enum local_request {
	LOCAL_LOOK,
	LOCAL_BEGIN,  /* note where both streams are */
	LOCAL_SETTLE, /* correct `out` */
};

/* What `targets` knows of an address. */
enum local_target {
	TARGET_CAPTURE = 1, /* userspace: what is accepted there is to be captured */
	TARGET_ZEROCOPY,    /* sockops_capture: and it sends with MSG_ZEROCOPY */
	TARGET_LEFT,        /* userspace: what is accepted there is another daemon's to capture */
};

/* What `query` answers: a set of these. */
enum local_answer {
	LOCAL_THERE = 1,    /* the process's socket is in `locals` */
	LOCAL_BACKLOG = 2,  /* bytes for it wait for the worker */
	LOCAL_QUEUE = 4,    /* bytes wait for the process to read them */
	LOCAL_PAIR = 8,     /* it is our upstream's other end */
	LOCAL_SETTLED = 16, /* `out` was too large, and is right now */
	LOCAL_HELD = 32,    /* its socket can't be captured now; maybe another daemon still has it */
};

#endif
