/* SPDX-License-Identifier: GPL-2.0 */
/*
 * vsock.h - inside kerf-vsock.ko
 *
 * AF_VSOCK between two kernels over a shared area. Words in the area have one
 * writing side each; a reader takes a value once and checks it, and nothing the
 * other side writes can make this side go out of bounds or loop. Where both sides
 * write (pending, rd_wait, wr_wait) it is by xchg or a sync_ bit operation only.
 *
 * Locks: the socket lock, then area->lock (taken in hard interrupts).
 */
#ifndef KERF_VSOCK_H
#define KERF_VSOCK_H

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kernel.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/workqueue.h>
#include <net/af_vsock.h>

#include <kmorph_abi.h>
#include <kmorph_api.h>

/*
 * The area
 */
#define KV_MAGIC	0x31304b4353564b4dULL	/* "MKVSCK01" */
#define KV_VERSION	1
#define KV_CLASSES	3
#define KV_CHANNELS	1024			/* at most, all classes together */
#define KV_WORDS	(KV_CHANNELS / 64)
#define KV_AREAS	16
#define KV_INLINE	255			/* bytes that count as a small message */

struct kv_class {
	u32 ring;		/* bytes of a ring, a power of two; two a channel */
	u32 first;		/* first channel */
	u32 count;
	u32 reserved;
	u64 data;		/* offset of the rings */
};

/* Written once by the formatter; magic last. */
struct kv_header {
	u64 magic;
	u32 version;
	u32 epoch;
	u64 size;
	u32 id[2];		/* kernel ids of side 0 and 1 */
	u32 channels;
	u32 split;		/* each split-th channel is side 1's to open, others side 0's */
	struct kv_class class[KV_CLASSES];
};

/* Written by its own side. */
struct kv_side {
	u32 state;		/* 0, then the epoch, then KV_LEFT */
	u32 moves;
	u64 door;
} ____cacheline_aligned;

#define KV_LEFT		0xffffffffU

/* Channels with news for a side: set by the other, taken by its own. Hints only. */
struct kv_pending {
	unsigned long summary ____cacheline_aligned;	/* bit n: look at word[n] */
	unsigned long word[KV_WORDS] ____cacheline_aligned;
};

struct kv_request {
	u32 src_port;
	u32 dst_port;
};

/*
 * What a side says about its channels, written by that side alone: generation
 * and flags. A channel is free when both words are released in one generation.
 */
struct kv_control {
	u32 word[KV_CHANNELS];
	struct kv_request request[KV_CHANNELS];
};

#define KV_GEN_SHIFT	8
#define KV_OPEN		BIT(0)	/* asked for (opener), answered (other side) */
#define KV_EST		BIT(1)
#define KV_SHUT_RCV	BIT(2)
#define KV_SHUT_SEND	BIT(3)
#define KV_SHUT		(KV_SHUT_RCV | KV_SHUT_SEND)
#define KV_REL		BIT(4)	/* this side is through with the channel */
#define KV_RST		BIT(5)

/* The cursors of one ring; they run freely, the place is cursor modulo size. */
struct kv_cursors {
	u32 head ____cacheline_aligned;		/* written by the producer */
	u32 tail ____cacheline_aligned;		/* written by the consumer */
	u32 rd_wait ____cacheline_aligned;	/* the consumer wants to be told */
	u32 wr_wait;				/* the producer wants to be told */
};

struct kv_layout {
	struct kv_header header;
	struct kv_side side[2] __aligned(4096);
	struct kv_pending pending[2];
	struct kv_control control[2] __aligned(4096);
	struct kv_cursors cursors[KV_CHANNELS][2] __aligned(4096);	/* [channel][producer] */
};

#define KV_META		ALIGN(sizeof(struct kv_layout), 65536)

/*
 * This side's view
 */
struct kv_area;

struct kv_channel {
	struct kv_area *area;
	struct vsock_sock *vsk;		/* no reference: gone before the socket is */
	u32 word;			/* what our side says */
	u32 seen;			/* what we have last acted upon */
	bool wake;			/* the work is to wake the socket */
	struct work_struct work;
};

struct kv_area {
	struct kref ref;
	struct list_head list;
	struct kmorph_link link;
	unsigned int me;		/* side */
	struct kv_layout *shared;
	u32 channels;
	u32 split;
	struct kv_class class[KV_CLASSES];	/* our own computation, never re-read */
	spinlock_t lock;		/* channel[].vsk, .word, .seen */
	bool up;
	bool dead;
	bool reported;
	atomic_t running;		/* works inside the area */
	struct work_struct left_work;
	struct kv_channel channel[];
};

/* The part of a socket that is ours. Under the socket lock, except for dead. */
struct kv_sock {
	struct vsock_sock *vsk;
	struct kv_area *area;		/* NULL when it has no channel */
	u32 ch;
	u32 size;			/* of a ring */
	u32 head;			/* our cursors: the shared ones are exports of these */
	u32 tail;
	u8 *tx;
	u8 *rx;
	struct kv_cursors *txc;
	struct kv_cursors *rxc;
	u32 poll_misses;		/* looks before sleeping that found nothing, in a row */
	bool dead;			/* every call fails with ECONNRESET */
};

static inline struct kv_sock *kv_sock(struct vsock_sock *vsk)
{
	return vsk->trans;
}

static inline u32 kv_gen(u32 word)
{
	return word >> KV_GEN_SHIFT;
}

static inline u32 kv_cid(u32 id)
{
	return id + VMADDR_CID_HOST;
}

static inline unsigned int kv_opener(const struct kv_area *area, u32 ch)
{
	return ch % area->split == area->split - 1;
}

static inline u32 kv_his_word(struct kv_area *area, u32 ch)
{
	return smp_load_acquire(&area->shared->control[!area->me].word[ch]);
}

extern const struct vsock_transport kv_transport;
extern struct workqueue_struct *kv_wq;

/* area.c */
extern struct kv_area __rcu *kv_areas[KV_AREAS];
extern const struct kmorph_link_ops kv_link_ops;
struct kv_area *kv_area_find(u32 cid);
void kv_area_put(struct kv_area *area);
void kv_area_reset(struct kv_area *area);
int kv_areas_show(char *buf, size_t size);
int kv_channels_show(char *buf, size_t size);

/* channel.c */
void kv_kick(struct kv_area *area, u32 ch);
void kv_set_word(struct kv_area *area, u32 ch, u32 word);
void kv_add_flags(struct kv_sock *kv, u32 flags);
int kv_channel_open(struct kv_sock *kv);
void kv_attach(struct kv_sock *kv, struct kv_area *area, u32 ch);
void kv_detach(struct kv_sock *kv, u32 flags);
void kv_bad(struct kv_sock *kv);

/* control.c */
void kv_channel_work(struct work_struct *work);
void kv_queue(struct kv_channel *channel);

/* peer.c */
extern const struct kmorph_door_client kv_door_client;
void kv_ring(struct kv_area *area);
void kv_left_work(struct work_struct *work);
void kv_check_peer(struct kv_area *area);

/* stats.c */
enum kv_stat {
	KV_ST_IRQS,
	KV_ST_KICKS,
	KV_ST_SMALL,
	KV_ST_SMALL_KICKS,
	KV_ST_POLL_HITS,
	KV_ST_THREADS,
	KV_ST_WORKS,
	KV_ST_LOST,
	KV_ST_BAD,
	KV_ST_BAD_DOOR,
	KV_ST_CONNECTS,
	KV_ST_ACCEPTS,
	KV_ST_REFUSED,
	KV_ST_RESETS,
	KV_ST_NO_CHANNEL,
	KV_ST_COUNT,
};

struct kv_stats {
	u64 count[KV_ST_COUNT];
};

DECLARE_PER_CPU(struct kv_stats, kv_stats);

static inline void kv_count(enum kv_stat stat)
{
	this_cpu_inc(kv_stats.count[stat]);
}

#endif /* KERF_VSOCK_H */
