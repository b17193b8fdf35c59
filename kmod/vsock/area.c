// SPDX-License-Identifier: GPL-2.0
/*
 * Areas: laying one out, joining it, leaving it.
 */
#include "vsock.h"

#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <net/sock.h>

/* How long a leaving waits for tasks that are inside a copy. */
#define LEAVE_MS	1000

struct kv_area __rcu *kv_areas[KV_AREAS];

/* Areas nobody uses any more but a task or two stuck in them; under areas_mutex. */
static LIST_HEAD(retired);
static DEFINE_MUTEX(areas_mutex);

static const u32 ring_size[KV_CLASSES] = { 8 * 1024, 64 * 1024, 256 * 1024 };

/*
 * Share the space out: three tenths for the largest class, two for the middle
 * one, the rest for the small ones. The counts are multiples of four, so that
 * every class has channels of both openers. Both sides compute this and must
 * agree with what the header says.
 */
static int lay_out(u64 size, u32 id_a, struct kv_header *header)
{
	u64 room, offset = KV_META;
	u32 first = 0;
	int i;

	if (size < KV_META + 4 * 2 * ring_size[0])
		return -EINVAL;
	room = size - KV_META;
	memset(header->class, 0, sizeof(header->class));
	header->class[2].count = round_down(room * 3 / 10 / (2 * ring_size[2]), 4);
	header->class[1].count = round_down(room * 2 / 10 / (2 * ring_size[1]), 4);
	/* Bounded by the control words, with a good part left for the small ones. */
	header->class[2].count = min_t(u32, header->class[2].count, KV_CHANNELS / 4);
	header->class[1].count = min_t(u32, header->class[1].count, KV_CHANNELS / 4);
	for (i = 1; i < KV_CLASSES; i++)
		room -= (u64)header->class[i].count * 2 * ring_size[i];
	header->class[0].count =
		min_t(u64, round_down(room / (2 * ring_size[0]), 4),
		      KV_CHANNELS - header->class[1].count - header->class[2].count);
	for (i = 0; i < KV_CLASSES; i++) {
		header->class[i].ring = ring_size[i];
		header->class[i].first = first;
		header->class[i].data = offset;
		first += header->class[i].count;
		offset += (u64)header->class[i].count * 2 * ring_size[i];
	}
	header->channels = first;
	/* The primary opens most connections to an instance; two instances share. */
	header->split = id_a == KMORPH_PRIMARY_ID ? 4 : 2;
	return 0;
}

static int format(phys_addr_t base, u64 size, u32 id_a, u32 id_b, u32 epoch)
{
	struct kv_header header = {
		.version = KV_VERSION,
		.epoch = epoch,
		.size = size,
		.id = { id_a, id_b },
	};
	struct kv_layout *shared;
	int ret = lay_out(size, id_a, &header);

	if (ret)
		return ret;
	shared = kmorph_map(base, KV_META);
	if (!shared)
		return -ENOMEM;
	memset(shared, 0, KV_META);
	shared->header = header;
	smp_store_release(&shared->header.magic, KV_MAGIC);
	kmorph_unmap(shared);
	return 0;
}

/* Is this the area we were told of, laid out as we would? */
static int validate(const struct kv_layout *shared, const struct kmorph_link *link,
		    struct kv_header *want)
{
	struct kv_header header = shared->header;
	u32 self = kmorph_self_id();

	*want = (struct kv_header){
		.magic = KV_MAGIC,
		.version = KV_VERSION,
		.epoch = link->epoch,
		.size = link->size,
		.id = { min(self, link->peer), max(self, link->peer) },
	};
	if (header.magic != KV_MAGIC || header.version != KV_VERSION) {
		pr_err("link to %u: no area of version %u\n", link->peer, KV_VERSION);
		return -EPROTO;
	}
	if (lay_out(link->size, want->id[0], want) ||
	    memcmp(&header, want, sizeof(header))) {
		pr_err("link to %u: the area is not laid out as announced\n", link->peer);
		return -EPROTO;
	}
	return 0;
}

static void area_release(struct kref *ref)
{
	struct kv_area *area = container_of(ref, struct kv_area, ref);

	kvfree(area);
}

void kv_area_put(struct kv_area *area)
{
	kref_put(&area->ref, area_release);
}

/* A live area to a CID, with a reference; NULL when there is none. */
struct kv_area *kv_area_find(u32 cid)
{
	struct kv_area *found = NULL;
	int i;

	rcu_read_lock();
	for (i = 0; i < KV_AREAS && !found; i++) {
		struct kv_area *area = rcu_dereference(kv_areas[i]);

		if (area && kv_cid(area->link.peer) == cid && READ_ONCE(area->up) &&
		    !READ_ONCE(area->dead) && kref_get_unless_zero(&area->ref))
			found = area;
	}
	rcu_read_unlock();
	return found;
}

static int insert(struct kv_area *area)
{
	int i;

	for (i = 0; i < KV_AREAS; i++) {
		if (rcu_access_pointer(kv_areas[i]))
			continue;
		rcu_assign_pointer(kv_areas[i], area);
		return 0;
	}
	return -ENOSPC;
}

static struct kv_area *new_area(const struct kmorph_link *link, const struct kv_header *header)
{
	struct kv_area *area;
	u32 ch;

	area = kvzalloc(struct_size(area, channel, header->channels), GFP_KERNEL);
	if (!area)
		return NULL;
	kref_init(&area->ref);
	INIT_LIST_HEAD(&area->list);
	spin_lock_init(&area->lock);
	INIT_WORK(&area->left_work, kv_left_work);
	area->link = *link;
	area->me = header->id[1] == kmorph_self_id();
	area->channels = header->channels;
	area->split = header->split;
	memcpy(area->class, header->class, sizeof(area->class));
	for (ch = 0; ch < area->channels; ch++) {
		area->channel[ch].area = area;
		INIT_WORK(&area->channel[ch].work, kv_channel_work);
	}
	return area;
}

static int join(const struct kmorph_link *link)
{
	struct kv_header header;
	struct kv_layout *shared;
	struct kv_area *area;
	struct kv_side *side;
	u64 door;
	int ret;

	BUILD_BUG_ON(KMORPH_LINK_MIN < KV_META + 4 * 2 * 8192);
	shared = kmorph_map(link->base, link->size);
	if (!shared)
		return -ENOMEM;
	ret = validate(shared, link, &header);
	if (ret)
		goto unmap;
	ret = -ENOMEM;
	area = new_area(link, &header);
	if (!area)
		goto unmap;
	area->shared = shared;
	side = &shared->side[area->me];
	/* Our counters would start again where the other side's went on. */
	ret = -EALREADY;
	if (READ_ONCE(side->state)) {
		pr_err("link to %u: this epoch has been used, a new one is needed\n", link->peer);
		goto free;
	}
	mutex_lock(&areas_mutex);
	ret = insert(area);
	mutex_unlock(&areas_mutex);
	if (ret)
		goto free;
	/* Each side stores its own, then looks at the other's: at least one sees both. */
	WRITE_ONCE(side->door, kmorph_door_address());
	smp_store_release(&side->state, link->epoch);
	smp_mb();	/* our state before the look at the other's */
	/* The doorbell may have moved before the area was in the table, and may move now. */
	do {
		door = kmorph_door_address();
		WRITE_ONCE(side->door, door);
		smp_mb();	/* stored before the look whether it still holds */
	} while (door != kmorph_door_address());
	kv_ring(area);
	kmorph_door_wake();
	pr_info("link to %u: epoch %u, %u channels\n", link->peer, link->epoch, area->channels);
	return 0;

free:
	kv_area_put(area);
unmap:
	kmorph_unmap(shared);
	return ret;
}

/* From now on everything on the area fails at once. Nobody has let go of it yet. */
void kv_area_reset(struct kv_area *area)
{
	unsigned long flags;
	u32 ch;

	spin_lock_irqsave(&area->lock, flags);
	if (!area->dead) {
		WRITE_ONCE(area->dead, true);
		for (ch = 0; ch < area->channels; ch++) {
			struct vsock_sock *vsk = area->channel[ch].vsk;
			struct sock *sk;

			if (!vsk)
				continue;
			sk = sk_vsock(vsk);
			WRITE_ONCE(kv_sock(vsk)->dead, true);
			sk->sk_err = ECONNRESET;
			sk_error_report(sk);
			kv_count(KV_ST_RESETS);
		}
	}
	spin_unlock_irqrestore(&area->lock, flags);
	smp_mb();	/* against atomic_inc(&area->running) */
}

/* Cut a socket off, unless a task is inside; true when it is off. */
static bool cut_off(struct kv_area *area, u32 ch)
{
	struct vsock_sock *vsk;
	unsigned long flags;
	struct sock *sk;
	bool off = false;

	spin_lock_irqsave(&area->lock, flags);
	vsk = area->channel[ch].vsk;
	if (vsk)
		sock_hold(sk_vsock(vsk));
	spin_unlock_irqrestore(&area->lock, flags);
	if (!vsk)
		return true;
	sk = sk_vsock(vsk);
	local_bh_disable();
	bh_lock_sock(sk);
	if (READ_ONCE(area->channel[ch].vsk) != vsk) {
		off = true;	/* let go of meanwhile */
	} else if (!sock_owned_by_user(sk)) {
		/* connect() clears sk_err on its way to sleep: say it again. */
		sk->sk_err = ECONNRESET;
		if (sk->sk_state == TCP_SYN_SENT)
			sk->sk_state = TCP_CLOSE;
		kv_detach(kv_sock(vsk), 0);
		sk_error_report(sk);
		off = true;
	}
	bh_unlock_sock(sk);
	local_bh_enable();
	sock_put(sk);
	return off;
}

/* Is nobody in the area any more? */
static bool drained(struct kv_area *area)
{
	/* First: a work that is still running may tie a socket behind the loop. */
	bool all = !atomic_read(&area->running);
	u32 ch;

	smp_rmb();	/* the count before the look at the ties */
	for (ch = 0; ch < area->channels; ch++)
		if (!cut_off(area, ch))
			all = false;
	return all;
}

static struct kv_area *find_retired(const struct kmorph_link *link)
{
	struct kv_area *area;

	list_for_each_entry(area, &retired, list)
		if (area->link.peer == link->peer && area->link.epoch == link->epoch)
			return area;
	return NULL;
}

/* Out of the table: on return no interrupt looks at it any more. */
static struct kv_area *take_out(const struct kmorph_link *link)
{
	struct kv_area *area = NULL;
	int i;

	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *one = rcu_dereference_protected(kv_areas[i],
								lockdep_is_held(&areas_mutex));

		if (!one || one->link.peer != link->peer || one->link.epoch != link->epoch)
			continue;
		area = one;
		RCU_INIT_POINTER(kv_areas[i], NULL);
	}
	if (area) {
		synchronize_rcu_expedited();
		kmorph_door_sync();
		cancel_work_sync(&area->left_work);
	}
	return area;
}

static bool wait_drained(struct kv_area *area, unsigned int ms)
{
	ktime_t limit = ktime_add_ms(ktime_get(), ms);

	while (!drained(area)) {
		if (ktime_after(ktime_get(), limit))
			return false;
		usleep_range(500, 1000);
	}
	return true;
}

static int leave(const struct kmorph_link *link)
{
	struct kv_area *area;
	bool fresh = false;
	int ret = 0;

	mutex_lock(&areas_mutex);
	area = find_retired(link);
	if (!area) {
		area = take_out(link);
		fresh = true;
	}
	if (!area)
		goto out;
	if (fresh) {
		kv_area_reset(area);
		smp_store_release(&area->shared->side[area->me].state, KV_LEFT);
		smp_mb();	/* the state before the ring */
		kv_ring(area);
	}
	if (wait_drained(area, fresh ? LEAVE_MS : 0)) {
		if (!fresh)
			list_del(&area->list);
		kmorph_unmap(area->shared);
		area->shared = NULL;
		kv_area_put(area);
	} else {
		if (fresh)
			list_add(&area->list, &retired);
		ret = -EBUSY;
	}
out:
	mutex_unlock(&areas_mutex);
	return ret;
}

const struct kmorph_link_ops kv_link_ops = {
	.format = format,
	.add = join,
	.del = leave,
};

int kv_areas_show(char *buf, size_t size)
{
	int length = 0, i;

	mutex_lock(&areas_mutex);
	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *area = rcu_dereference_protected(kv_areas[i],
								 lockdep_is_held(&areas_mutex));
		u32 used[KV_CLASSES] = {};
		u32 ch, c;

		if (!area)
			continue;
		for (ch = 0; ch < area->channels; ch++)
			for (c = 0; c < KV_CLASSES; c++)
				if (READ_ONCE(area->channel[ch].vsk) &&
				    ch - area->class[c].first < area->class[c].count)
					used[c]++;
		length += scnprintf(buf + length, size - length,
				    "peer %u epoch %u %s", area->link.peer, area->link.epoch,
				    area->dead ? "dead" : area->up ? "up" : "waiting");
		for (c = 0; c < KV_CLASSES; c++)
			length += scnprintf(buf + length, size - length, " %uK %u/%u",
					    area->class[c].ring / 1024, used[c],
					    area->class[c].count);
		length += scnprintf(buf + length, size - length, "\n");
	}
	mutex_unlock(&areas_mutex);
	return length;
}

static int channel_show(struct kv_area *area, u32 ch, char *buf, size_t size)
{
	const struct kv_cursors *out = &area->shared->cursors[ch][area->me];
	const struct kv_cursors *in = &area->shared->cursors[ch][!area->me];

	return scnprintf(buf, size, "peer %u channel %u word %#x/%#x out %u %u%s%s in %u %u%s%s\n",
			 area->link.peer, ch, READ_ONCE(area->channel[ch].word),
			 kv_his_word(area, ch),
			 READ_ONCE(out->head), READ_ONCE(out->tail),
			 READ_ONCE(out->wr_wait) ? " full" : "",
			 READ_ONCE(out->rd_wait) ? " awaited" : "",
			 READ_ONCE(in->head), READ_ONCE(in->tail),
			 READ_ONCE(in->wr_wait) ? " full" : "",
			 READ_ONCE(in->rd_wait) ? " awaited" : "");
}

/* One line a channel in use: what both sides say of it, and where its rings stand. */
int kv_channels_show(char *buf, size_t size)
{
	int length = 0, i;
	u32 ch;

	mutex_lock(&areas_mutex);
	for (i = 0; i < KV_AREAS; i++) {
		struct kv_area *area = rcu_dereference_protected(kv_areas[i],
								 lockdep_is_held(&areas_mutex));

		for (ch = 0; area && ch < area->channels; ch++)
			if (READ_ONCE(area->channel[ch].vsk))
				length += channel_show(area, ch, buf + length, size - length);
	}
	mutex_unlock(&areas_mutex);
	return length;
}
