/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/* The part of the kernel's types that our programs touch: a vmlinux.h cut down to what is read.
 *
 * The first half is UAPI: numbers and layouts that never change. The second half is not: its
 * structs list only the members that we read, in any order, and preserve_access_index makes the
 * loader look up each member's offset in the running kernel's BTF (CO-RE).
 */
#ifndef TAILSPLICE_KERNEL_H
#define TAILSPLICE_KERNEL_H

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef _Bool bool;

#define true 1
#define false 0

/* UAPI: include/uapi/linux/bpf.h */

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_SOCKMAP = 15,
	BPF_MAP_TYPE_SOCKHASH = 18,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_F_NO_PREALLOC = 1U << 0,
	BPF_NOEXIST = 1,         /* of updates */
	BPF_F_MMAPABLE = 1U << 10,
	BPF_F_INGRESS = 1U << 0, /* of the redirect helpers */
};

enum sk_action {
	SK_DROP = 0,
	SK_PASS = 1,
};

/* Numbers of include/net/tcp_states.h, fixed by BPF_TCP_* of the UAPI. */
enum {
	TCP_ESTABLISHED = 1,
	TCP_FIN_WAIT1 = 4,
	TCP_FIN_WAIT2 = 5,
	TCP_CLOSE = 7,
	TCP_CLOSE_WAIT = 8,
	TCP_LAST_ACK = 9,
};

enum {
	TCP_FIN = 1, /* of the flags, byte 13 of the header */
	TCP_RST = 4,
};

enum {
	MAX_TCP_HEADER = 60, /* bytes, options and all: the header's length is 4 bits, in words */
};

enum {
	SHUTDOWN_MASK = 3,   /* include/net/sock.h: RCV_SHUTDOWN | SEND_SHUTDOWN */
	SOCK_DONE = 1U << 1, /* likewise, of skc_flags: a FIN has come */
};

enum {
	AF_INET = 2,
	AF_INET6 = 10,
};

enum {
	BPF_SOCK_OPS_STATE_CB_FLAG = 1U << 2,
	BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB = 5,
	BPF_SOCK_OPS_STATE_CB = 10,
};

/* The numbers of all architectures that are built for, but MIPS. */
enum {
	SOL_SOCKET = 1,
	SO_ZEROCOPY = 60,
	EOPNOTSUPP = 95,
};

struct bpf_flow_keys;

/* Addresses and ports of a connection, in network byte order, as what comes to a socket has them. */
struct bpf_sock_tuple {
	union {
		struct {
			__be32 saddr;
			__be32 daddr;
			__be16 sport;
			__be16 dport;
		} ipv4;
		struct {
			__be32 saddr[4];
			__be32 daddr[4];
			__be16 sport;
			__be16 dport;
		} ipv6;
	};
};

/* A socket, for programs that may not see the kernel's own struct. */
struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;       /* network byte order */
	__u32 src_ip6[4];
	__u32 src_port;      /* host byte order */
};

/* The context of sockopt programs. */
struct bpf_sockopt {
	union {
		struct bpf_sock *sk;
	} __attribute__((aligned(8)));
	union {
		void *optval;
	} __attribute__((aligned(8)));
	union {
		void *optval_end;
	} __attribute__((aligned(8)));
	__s32 level;
	__s32 optname;
	__s32 optlen;
	__s32 retval;
};

/* The context of sk_skb programs. The verifier rewrites each access, so it must not be relocated. */
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	union {
		struct bpf_flow_keys *flow_keys;
	} __attribute__((aligned(8)));
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	union {
		struct bpf_sock *sk;
	} __attribute__((aligned(8)));
	__u32 gso_size;
};

/* The context of sk_msg programs. */
struct sk_msg_md {
	union {
		void *data;
	} __attribute__((aligned(8)));
	union {
		void *data_end;
	} __attribute__((aligned(8)));
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 size;
	union {
		struct bpf_sock *sk;
	} __attribute__((aligned(8)));
};

/* The context of sockops programs, up to what we read. */
struct bpf_sock_ops {
	__u32 op;
	union {
		__u32 args[4];
		__u32 reply;
		__u32 replylong[4];
	};
	__u32 family;
	__u32 remote_ip4;    /* network byte order, as the other addresses and remote_port */
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;    /* host byte order */
	__u32 is_fullsock;
	__u32 snd_cwnd;
	__u32 srtt_us;
	__u32 bpf_sock_ops_cb_flags;
	__u32 state;
	__u32 rtt_min;
	__u32 snd_ssthresh;
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 mss_cache;
	__u32 ecn_flags;
	__u32 rate_delivered;
	__u32 rate_interval_us;
	__u32 packets_out;
	__u32 retrans_out;
	__u32 total_retrans;
	__u32 segs_in;
	__u32 data_segs_in;
	__u32 segs_out;
	__u32 data_segs_out;
	__u32 lost_out;
	__u32 sacked_out;
	__u32 sk_txhash;
	__u64 bytes_received;
	__u64 bytes_acked;
	union {
		struct bpf_sock *sk;
	} __attribute__((aligned(8)));
};

/* atomic_long_t has no name of its own to be found by, and nothing but this. */
struct atomic {
	long counter;
};

/* Not UAPI: found by name in the running kernel's BTF. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sock_common;
struct sock;

/* The context of iter/tcp programs. */
struct bpf_iter__tcp {
	union {
		struct sock_common *sk_common;
	} __attribute__((aligned(8)));
};

struct proto {
	struct atomic *memory_allocated; /* pages that TCP has in all */
};

enum sock_flags {
	SOCK_ZEROCOPY = 20, /* a bit of skc_flags; looked up by the loader, as members are */
};

struct sock_common {
	struct proto *skc_prot;
	volatile unsigned char skc_state;
	unsigned long skc_flags;
	struct {
		__s64 counter;
	} skc_cookie; /* 0 until somebody has asked for it */
};

struct sock {
	struct sock_common __sk_common;
	int sk_wmem_queued; /* bytes, true sizes: what the send buffer holds, unacknowledged included */
	int sk_sndbuf;      /* bytes, true sizes: what it may hold */
	struct {
		struct {
			int counter;
		} rmem_alloc; /* bytes, true sizes: what was received and not read, by whatever way it came */
	} sk_backlog;
	int sk_rcvbuf;      /* bytes, true sizes: what it may hold */
	int sk_rcvlowat;    /* bytes: SO_RCVLOWAT */
	__u8 sk_shutdown;   /* SHUTDOWN_MASK after close() */
	void *sk_user_data; /* the psock of a socket in a sockmap, with flags in the lowest three bits */
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_nxt;    /* one past the last byte that has come */
	__u32 snd_una;    /* the first byte that was not acknowledged */
	__u32 copied_seq; /* the first byte that nobody has taken from the receive queue */
	__u32 write_seq;  /* one past the last byte that was written into the send queue */
	__u8 bpf_sock_ops_cb_flags; /* what sockops programs are called for */
};

struct sk_buff_head {
	__u32 qlen;
};

struct list_head {
	struct list_head *next;
};

struct sk_psock {
	struct {
		struct {
			int counter;
		} refs;
	} refcnt; /* one for each map that the socket is in, and for each call that is at work on it */
	struct sk_buff_head ingress_skb; /* redirected here, and not yet moved on by the worker */
	struct list_head ingress_msg;    /* to be read by the process */
};

#pragma clang attribute pop

#endif
