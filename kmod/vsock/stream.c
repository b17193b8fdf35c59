// SPDX-License-Identifier: GPL-2.0
/*
 * Bytes. One copy in, one copy out, through the ring of the direction; credit is
 * the distance of the cursors. The heart is arming on empty: a look that finds
 * nothing (or no room) asks to be told, then looks again, and af_vsock always
 * looks right before it sleeps. So no wake-up is lost, and none is sent unasked.
 */
#include "vsock.h"

#include <linux/minmax.h>
#include <linux/moduleparam.h>
#include <linux/sched/signal.h>
#include <linux/uio.h>
#include <net/sock.h>
#include <asm/msr.h>
#include <asm/tsc.h>

/* How much is written before the reader may have it. */
#define PUBLISH_BYTES	16384U

static int kv_init(struct vsock_sock *vsk, struct vsock_sock *parent)
{
	struct kv_sock *kv = kzalloc(sizeof(*kv), GFP_KERNEL_ACCOUNT);

	if (!kv)
		return -ENOMEM;
	kv->vsk = vsk;
	vsk->trans = kv;
	return 0;
}

static void kv_destruct(struct vsock_sock *vsk)
{
	struct kv_sock *kv = kv_sock(vsk);

	if (!kv)
		return;
	kv_detach(kv, 0);
	vsk->trans = NULL;
	kfree(kv);
}

static s64 kv_has_data(struct vsock_sock *vsk);

/* Unread data or SO_LINGER with zero seconds: the other side is to know. */
static bool is_abort(struct vsock_sock *vsk)
{
	struct sock *sk = sk_vsock(vsk);

	if (sock_flag(sk, SOCK_LINGER) && !sk->sk_lingertime)
		return true;
	return sk->sk_state == TCP_ESTABLISHED && kv_has_data(vsk) > 0;
}

static void kv_release(struct vsock_sock *vsk)
{
	struct kv_sock *kv = kv_sock(vsk);

	if (kv && kv->area)
		kv_detach(kv, is_abort(vsk) ? KV_RST : 0);
	sock_set_flag(sk_vsock(vsk), SOCK_DONE);
	vsock_remove_sock(vsk);
}

/* A connect that timed out or was interrupted. */
static int kv_cancel(struct vsock_sock *vsk)
{
	kv_detach(kv_sock(vsk), KV_RST);
	return 0;
}

static int kv_connect(struct vsock_sock *vsk)
{
	struct kv_sock *kv = kv_sock(vsk);
	int ret;

	/*
	 * An earlier try may have left its channel behind, and a place among the
	 * connected, when it was reset before connect() saw that it was there.
	 */
	kv_detach(kv, KV_RST);
	vsock_remove_connected(vsk);
	WRITE_ONCE(vsk->peer_shutdown, 0);
	ret = kv_channel_open(kv);
	if (ret)
		return ret;
	vsk->local_addr.svm_cid = kv_cid(kmorph_self_id());
	return 0;
}

static int kv_shutdown(struct vsock_sock *vsk, int mode)
{
	/* RCV_SHUTDOWN and SEND_SHUTDOWN have the order of our flags. */
	kv_add_flags(kv_sock(vsk), (mode & SHUTDOWN_MASK) << 2);
	return 0;
}

/* A dead socket says so on every call: whoever asked for sk_err has cleared it. */
static bool is_dead(struct kv_sock *kv)
{
	if (likely(!READ_ONCE(kv->dead)))
		return false;
	sk_vsock(kv->vsk)->sk_err = ECONNRESET;
	return true;
}

/* Say how far we have come, and tell the other side if it wants to know. */
static bool publish(struct kv_sock *kv, u32 *cursor, u32 value, u32 *wait)
{
	smp_store_release(cursor, value);
	smp_mb();	/* the cursor before the look at who waits */
	if (!READ_ONCE(*wait) || !xchg(wait, 0))
		return false;
	kv_kick(kv->area, kv->ch);
	return true;
}

/* Bytes to read; when there are fewer than wanted the other side is asked to tell. */
static u32 readable(struct kv_sock *kv, u32 wanted)
{
	bool armed = false;
	u32 bytes;

	if (is_dead(kv) || !kv->area)
		return 0;
	for (;;) {
		bytes = smp_load_acquire(&kv->rxc->head) - kv->tail;
		if (unlikely(bytes > kv->size)) {
			kv_bad(kv);
			return 0;
		}
		if (bytes >= wanted || armed)
			return bytes;
		/* Who wants more than half a ring must not wait for who waits for half a ring. */
		if (bytes && READ_ONCE(kv->rxc->wr_wait))
			publish(kv, &kv->rxc->tail, kv->tail, &kv->rxc->wr_wait);
		WRITE_ONCE(kv->rxc->rd_wait, 1);
		smp_mb();	/* armed before the second look */
		armed = true;
	}
}

static u32 writable(struct kv_sock *kv)
{
	bool armed = false;
	u32 used;

	if (is_dead(kv) || !kv->area)
		return 0;
	for (;;) {
		used = kv->head - smp_load_acquire(&kv->txc->tail);
		if (unlikely(used > kv->size)) {
			kv_bad(kv);
			return 0;
		}
		if (used < kv->size || armed)
			return kv->size - used;
		WRITE_ONCE(kv->txc->wr_wait, 1);
		smp_mb();	/* armed before the second look */
		armed = true;
	}
}

static s64 kv_has_data(struct vsock_sock *vsk)
{
	return kv_sock(vsk) ? readable(kv_sock(vsk), 1) : 0;
}

static s64 kv_has_space(struct vsock_sock *vsk)
{
	return kv_sock(vsk) ? writable(kv_sock(vsk)) : 0;
}

static ssize_t kv_enqueue(struct vsock_sock *vsk, struct msghdr *msg, size_t length)
{
	struct kv_sock *kv = kv_sock(vsk);
	/* A small message is published whole: one doorbell at the most. */
	bool small = length <= KV_INLINE, kicked;
	u32 step = small ? KV_INLINE : PUBLISH_BYTES;
	size_t done = 0;

	length = min_t(size_t, length, writable(kv));
	while (done < length && !READ_ONCE(kv->dead)) {
		u32 at = kv->head & (kv->size - 1);
		size_t n = min_t(size_t, length - done, min(kv->size - at, step));

		if (!copy_from_iter_full(kv->tx + at, n, &msg->msg_iter))
			break;
		kv->head += n;
		done += n;
		if (!small)
			publish(kv, &kv->txc->head, kv->head, &kv->txc->rd_wait);
	}
	if (small && done) {
		kicked = publish(kv, &kv->txc->head, kv->head, &kv->txc->rd_wait);
		kv_count(KV_ST_SMALL);
		if (kicked)
			kv_count(KV_ST_SMALL_KICKS);
	}
	return length && !done && !kv->dead ? -EFAULT : done;
}

static ssize_t kv_dequeue(struct vsock_sock *vsk, struct msghdr *msg, size_t length, int flags)
{
	struct kv_sock *kv = kv_sock(vsk);
	size_t done = 0;
	u32 tail, bytes;

	bytes = readable(kv, 1);
	tail = kv->tail;
	length = min_t(size_t, length, bytes);
	while (done < length) {
		u32 at = tail & (kv->size - 1);
		size_t n = min_t(size_t, length - done, kv->size - at);

		n = copy_to_iter(kv->rx + at, n, &msg->msg_iter);
		if (!n)
			break;
		tail += n;
		done += n;
	}
	if (length && !done)
		return -EFAULT;
	if (flags & MSG_PEEK || !done)
		return done;
	kv->tail = tail;
	/* Half empty is soon enough for a waiting writer: fewer, larger turns. */
	if (bytes - done <= kv->size / 2)
		publish(kv, &kv->rxc->tail, tail, &kv->rxc->wr_wait);
	else
		smp_store_release(&kv->rxc->tail, tail);
	return done;
}

#ifdef HAVE_UNSENT_BYTES
/* For SIOCOUTQ: what the other side has not taken yet. */
static ssize_t kv_unsent(struct vsock_sock *vsk)
{
	struct kv_sock *kv = kv_sock(vsk);

	if (READ_ONCE(kv->dead) || !kv->area)
		return 0;
	return min(kv->head - READ_ONCE(kv->txc->tail), kv->size);
}
#endif

/* Only MSG_WAITALL asks: the core reads in turns, so any length will do. */
static u64 kv_rcvhiwat(struct vsock_sock *vsk)
{
	return U32_MAX;
}

static bool kv_is_active(struct vsock_sock *vsk)
{
	return sk_vsock(vsk)->sk_state == TCP_ESTABLISHED;
}

static bool kv_allow(u32 cid, u32 port)
{
	struct kv_area *area = kv_area_find(cid);

	if (!area)
		return false;
	kv_area_put(area);
	return true;
}

static int kv_poll_in(struct vsock_sock *vsk, size_t target, bool *ready)
{
	struct kv_sock *kv = kv_sock(vsk);
	u32 wanted = clamp_t(size_t, target, 1, kv->size ?: 1);

	/* A read of a dead socket does not block: it fails. */
	*ready = READ_ONCE(kv->dead) || readable(kv, wanted) >= wanted;
	return 0;
}

static int kv_poll_out(struct vsock_sock *vsk, size_t target, bool *ready)
{
	struct kv_sock *kv = kv_sock(vsk);

	*ready = READ_ONCE(kv->dead) || writable(kv) > 0;
	return 0;
}

/*
 * A reader about to sleep looks on for a moment first: an answer that is on its
 * way then costs neither an interrupt nor a wake-up. Who finds nothing several
 * times in a row looks on more rarely, so a quiet socket costs next to nothing.
 */
static unsigned int busy_poll_us = 100;
module_param(busy_poll_us, uint, 0644);
MODULE_PARM_DESC(busy_poll_us,
		 "how long a blocking reader looks on before it sleeps; 0: not at all");

#define POLL_MISSES	4	/* after so many in a row only ... */
#define POLL_EACH	16	/* ... every so many reads look on */

static bool poll_worthwhile(struct kv_sock *kv)
{
	return kv->poll_misses < POLL_MISSES || kv->poll_misses % POLL_EACH == 0;
}

/*
 * Does nobody but the caller wait on the socket? Who is on the queue already may
 * rely on the ring being armed; who comes later arms it, after we let go of the
 * socket's lock.
 */
static bool only_waiter(struct sock *sk)
{
	struct wait_queue_head *queue = sk_sleep(sk);
	unsigned long flags;
	bool only;

	spin_lock_irqsave(&queue->lock, flags);
	only = list_is_singular(&queue->head);
	spin_unlock_irqrestore(&queue->lock, flags);
	return only;
}

static int kv_recv_pre_block(struct vsock_sock *vsk, size_t target,
			     struct vsock_transport_recv_notify_data *data)
{
	u64 span = (u64)min(READ_ONCE(busy_poll_us), (unsigned int)USEC_PER_MSEC) * tsc_khz;
	struct kv_sock *kv = kv_sock(vsk);
	u64 begun;

	if (!span || !kv->area || READ_ONCE(kv->dead))
		return 0;
	if (!poll_worthwhile(kv)) {
		kv->poll_misses++;
		return 0;
	}
	span /= 1000;	/* kHz times microseconds to cycles */
	if (only_waiter(sk_vsock(vsk)))
		WRITE_ONCE(kv->rxc->rd_wait, 0);	/* nobody needs to tell us now */
	begun = rdtsc();
	while (smp_load_acquire(&kv->rxc->head) == kv->tail && !READ_ONCE(kv->dead) &&
	       rdtsc() - begun < span && !need_resched() && !signal_pending(current))
		cpu_relax();
	if (!readable(kv, 1) && !READ_ONCE(kv->dead)) {	/* this armed again */
		kv->poll_misses++;
		return 0;
	}
	kv->poll_misses = 0;
	kv_count(KV_ST_POLL_HITS);
	__set_current_state(TASK_RUNNING);	/* the caller looks again instead of sleeping */
	return 0;
}

static int kv_recv_notify(struct vsock_sock *vsk, size_t target,
			  struct vsock_transport_recv_notify_data *data)
{
	return 0;
}

static int kv_recv_done(struct vsock_sock *vsk, size_t target, ssize_t copied, bool data_read,
			struct vsock_transport_recv_notify_data *data)
{
	return 0;
}

static int kv_send_notify(struct vsock_sock *vsk, struct vsock_transport_send_notify_data *data)
{
	return 0;
}

static int kv_send_done(struct vsock_sock *vsk, ssize_t written,
			struct vsock_transport_send_notify_data *data)
{
	return 0;
}

static int kv_no_dgram_bind(struct vsock_sock *vsk, struct sockaddr_vm *addr)
{
	return -EOPNOTSUPP;
}

static int kv_no_dgram_dequeue(struct vsock_sock *vsk, struct msghdr *msg, size_t length,
			       int flags)
{
	return -EOPNOTSUPP;
}

static int kv_no_dgram_enqueue(struct vsock_sock *vsk, struct sockaddr_vm *addr,
			       struct msghdr *msg, size_t length)
{
	return -EOPNOTSUPP;
}

static bool kv_no_dgram_allow(u32 cid, u32 port)
{
	return false;
}

static u32 kv_local_cid(void)
{
	return kv_cid(kmorph_self_id());
}

const struct vsock_transport kv_transport = {
	.module = THIS_MODULE,
	.init = kv_init,
	.destruct = kv_destruct,
	.release = kv_release,
	.cancel_pkt = kv_cancel,
	.connect = kv_connect,
	.dgram_bind = kv_no_dgram_bind,
	.dgram_dequeue = kv_no_dgram_dequeue,
	.dgram_enqueue = kv_no_dgram_enqueue,
	.dgram_allow = kv_no_dgram_allow,
	.stream_dequeue = kv_dequeue,
	.stream_enqueue = kv_enqueue,
	.stream_has_data = kv_has_data,
	.stream_has_space = kv_has_space,
	.stream_rcvhiwat = kv_rcvhiwat,
	.stream_is_active = kv_is_active,
	.stream_allow = kv_allow,
	.notify_poll_in = kv_poll_in,
	.notify_poll_out = kv_poll_out,
	.notify_recv_init = kv_recv_notify,
	.notify_recv_pre_block = kv_recv_pre_block,
	.notify_recv_pre_dequeue = kv_recv_notify,
	.notify_recv_post_dequeue = kv_recv_done,
	.notify_send_init = kv_send_notify,
	.notify_send_pre_block = kv_send_notify,
	.notify_send_pre_enqueue = kv_send_notify,
	.notify_send_post_enqueue = kv_send_done,
#ifdef HAVE_UNSENT_BYTES
	.unsent_bytes = kv_unsent,
#endif
	.shutdown = kv_shutdown,
	.get_local_cid = kv_local_cid,
};
