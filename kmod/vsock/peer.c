// SPDX-License-Identifier: GPL-2.0
/*
 * The doorbell: who has news, and is the other side there at all.
 */
#include "vsock.h"

#include <linux/bits.h>
#include <linux/delay.h>
#include <linux/rcupdate.h>
#include <net/sock.h>

/* On PREEMPT_RT a wait queue's lock sleeps: nobody is woken in the hard interrupt. */
#define WAKE_IN_THREAD	IS_ENABLED(CONFIG_PREEMPT_RT)

/* Ring the other side, if it is there. Any context. */
void kv_ring(struct kv_area *area)
{
	struct kv_side *side = &area->shared->side[!area->me];

	if (smp_load_acquire(&side->state) != area->link.epoch)
		return;
	if (kmorph_ring(area->link.peer, READ_ONCE(side->door)) == -EINVAL)
		kv_count(KV_ST_BAD_DOOR);
}

/* Under area->lock. */
static void channel_news(struct kv_area *area, u32 ch)
{
	struct kv_channel *channel = &area->channel[ch];
	struct vsock_sock *vsk = channel->vsk;

	if (vsk) {
		struct sock *sk = sk_vsock(vsk);

		/* The callbacks of a kernel user of the socket are not made for this context. */
		if (WAKE_IN_THREAD || READ_ONCE(sk->sk_user_data)) {
			WRITE_ONCE(channel->wake, true);
			kv_queue(channel);
		} else {
			sk->sk_data_ready(sk);
			sk->sk_write_space(sk);
		}
	}
	if (READ_ONCE(area->shared->control[!area->me].word[ch]) != channel->seen)
		kv_queue(channel);
}

/*
 * One look at what is pending: each bit once, however fast the other side sets them. @late also
 * looks where the summary says nothing: then nothing depends on it for longer than a scan.
 */
static void take_pending(struct kv_area *area, bool late)
{
	struct kv_pending *pending = &area->shared->pending[area->me];
	unsigned long summary, bits, flags;
	unsigned int w, b;

	if (!READ_ONCE(pending->summary) && !late)
		return;
	summary = xchg(&pending->summary, 0);
	if (late)
		summary = GENMASK(KV_WORDS - 1, 0);
	for_each_set_bit(w, &summary, KV_WORDS) {
		bits = xchg(&pending->word[w], 0);
		spin_lock_irqsave(&area->lock, flags);
		for_each_set_bit(b, &bits, 64)
			if (w * 64 + b < area->channels && !area->dead)
				channel_news(area, w * 64 + b);
		spin_unlock_irqrestore(&area->lock, flags);
	}
}

/* Has the other side come or gone since we last looked? */
static bool peer_changed(struct kv_area *area)
{
	u32 state = READ_ONCE(area->shared->side[!area->me].state);

	return READ_ONCE(area->up) ? state != area->link.epoch : state == area->link.epoch;
}

static bool door_hard(void)
{
	bool more = false;
	int i;

	kv_count(KV_ST_IRQS);
	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *area = rcu_dereference(kv_areas[i]);

		if (!area || READ_ONCE(area->dead))
			continue;
		if (peer_changed(area))
			more = true;
		if (WAKE_IN_THREAD)
			more = true;
		else
			take_pending(area, false);
	}
	return more;
}

/* The other side's module has left: for us it is dead. Sleeps, so not in the thread. */
void kv_left_work(struct work_struct *work)
{
	struct kv_area *area = container_of(work, struct kv_area, left_work);

	kv_area_reset(area);
	pr_info("link to %u: the other side has left\n", area->link.peer);
	kmorph_link_report(&area->link, false);
}

void kv_check_peer(struct kv_area *area)
{
	if (!peer_changed(area))
		return;
	if (!area->up) {
		WRITE_ONCE(area->up, true);
		pr_info("link to %u: up\n", area->link.peer);
		kmorph_link_report(&area->link, true);
	} else {
		schedule_work(&area->left_work);
	}
}

static bool is_pending(struct kv_area *area)
{
	struct kv_pending *pending = &area->shared->pending[area->me];
	unsigned int w;

	for (w = 0; w < KV_WORDS; w++)
		if (READ_ONCE(pending->word[w]))
			return true;
	return READ_ONCE(pending->summary);
}

/*
 * The slow look: what is pending although nothing rings was a lost doorbell. A
 * ring on its way gets a moment to arrive.
 */
static void look_late(struct kv_area *area)
{
	unsigned long flags;
	bool found = false;
	u32 ch;

	if (is_pending(area)) {
		usleep_range(100, 200);
		if (is_pending(area))
			kv_count(KV_ST_LOST);
	}
	spin_lock_irqsave(&area->lock, flags);
	for (ch = 0; ch < area->channels && !area->dead; ch++) {
		if (kv_his_word(area, ch) == area->channel[ch].seen)
			continue;
		kv_queue(&area->channel[ch]);
		found = true;
	}
	spin_unlock_irqrestore(&area->lock, flags);
	if (found)
		cond_resched();
}

static void door_thread(bool late)
{
	int i;

	kv_count(KV_ST_THREADS);
	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *area;

		/* An area leaves the table, waits for this thread, and only then goes. */
		area = rcu_access_pointer(kv_areas[i]);
		if (!area || READ_ONCE(area->dead))
			continue;
		kv_check_peer(area);
		if (late)
			look_late(area);
		take_pending(area, late);
	}
}

static void door_moved(u64 address)
{
	int i;

	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *area = rcu_dereference(kv_areas[i]);
		struct kv_side *side;

		if (!area)
			continue;
		side = &area->shared->side[area->me];
		WRITE_ONCE(side->door, address);
		WRITE_ONCE(side->moves, side->moves + 1);
	}
}

const struct kmorph_door_client kv_door_client = {
	.hard = door_hard,
	.thread = door_thread,
	.moved = door_moved,
};
