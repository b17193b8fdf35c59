// SPDX-License-Identifier: GPL-2.0
/*
 * Links, seen from the primary: which area joins which two kernels, in which
 * epoch. The primary alone decides; the instances read it in their control area.
 *
 * A link that has died is remembered until nobody can touch its area any more:
 * not this kernel (its user may have had to give up waiting for a task stuck
 * in a copy), not a surviving instance that has not answered yet. Until then
 * the area cannot be used again.
 */
#include "kmorph.h"

#include <linux/delay.h>
#include <linux/slab.h>

#define SETTLE_MS	1000

enum link_life {
	LINK_PENDING,		/* no user has formatted it yet */
	LINK_LIVE,
	LINK_DEAD,
};

struct link {
	struct list_head list;
	u32 id[2];
	u64 base;
	u64 size;
	u32 epoch;
	enum link_life life;
	bool busy;		/* this kernel's user still touches the area */
};

/* Changed under link_mutex and kmorph_lock, read under either. */
static LIST_HEAD(links);
static DEFINE_MUTEX(link_mutex);
static const struct kmorph_link_ops *link_ops;
static u32 last_epoch;

static struct kmorph_ctl_links *ctl_links(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_LINKS;
}

static struct kmorph_ctl_instance *ctl_instance(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_INSTANCE;
}

static bool involves(const struct link *link, u32 id)
{
	return link->id[0] == id || link->id[1] == id;
}

static struct kmorph_link as_seen_here(const struct link *link)
{
	return (struct kmorph_link){
		.base = link->base,
		.size = link->size,
		.peer = link->id[1],
		.epoch = link->epoch,
	};
}

/* Does any link touch the range? Called with kmorph_lock held. */
bool kmorph_link_covers(u64 base, u64 size)
{
	struct link *link;

	list_for_each_entry(link, &links, list)
		/* The primary's links lie in regions, which are looked at themselves. */
		if (link->id[0] != KMORPH_PRIMARY_ID &&
		    kmorph_overlaps(base, size, link->base, link->size))
			return true;
	return false;
}

static void fill_entry(struct kmorph_ctl_link *entry, const struct link *link, u32 self)
{
	u32 peer = link->id[0] == self ? link->id[1] : link->id[0];
	struct kmorph_inst *inst;
	u32 i;

	memset(entry, 0, sizeof(*entry));
	entry->base = link->base;
	entry->size = link->size;
	entry->peer_id = peer;
	entry->epoch = link->epoch;
	inst = peer == KMORPH_PRIMARY_ID ? NULL : kmorph_inst_get(peer);
	if (inst) {
		for (i = 0; i < inst->cpu_count; i++)
			if (inst->apicid[i] < 32 * ARRAY_SIZE(entry->peer_apicids))
				entry->peer_apicids[inst->apicid[i] / 32] |=
					BIT(inst->apicid[i] % 32);
		kmorph_inst_put(inst);
	}
	smp_store_release(&entry->state,
			  link->life == LINK_LIVE ? KMORPH_LINK_LIVE : KMORPH_LINK_DEAD);
}

/* Write the table of an instance anew and ring it. Called with link_mutex held. */
static void write_table(struct kmorph_inst *inst)
{
	struct kmorph_ctl_links *table = ctl_links(inst);
	unsigned int n = 0;
	struct link *link;

	WRITE_ONCE(table->generation, inst->links_generation + 1);
	smp_wmb();	/* odd before any entry changes */
	list_for_each_entry(link, &links, list) {
		if (!involves(link, inst->id) || link->life == LINK_PENDING ||
		    n >= KMORPH_CTL_LINKS)
			continue;
		fill_entry(&table->link[n++], link, inst->id);
	}
	for (; n < KMORPH_CTL_LINKS; n++)
		memset(&table->link[n], 0, sizeof(table->link[n]));
	inst->links_generation += 2;
	smp_store_release(&table->generation, inst->links_generation);
	smp_mb();	/* the table before the ring, and before its answer is read */
	kmorph_ctl_ring(inst);
}

void kmorph_links_write(struct kmorph_inst *inst)
{
	mutex_lock(&link_mutex);
	write_table(inst);
	mutex_unlock(&link_mutex);
}

static void write_tables_of(const struct link *link)
{
	unsigned int side;

	for (side = 0; side < 2; side++) {
		struct kmorph_inst *inst;

		if (link->id[side] == KMORPH_PRIMARY_ID)
			continue;
		inst = kmorph_inst_get(link->id[side]);
		if (!inst)
			continue;
		write_table(inst);
		kmorph_inst_put(inst);
	}
}

/* Its CPUs have changed: the others are told where its doorbell may be. */
void kmorph_links_write_peers(struct kmorph_inst *inst)
{
	struct link *link;

	mutex_lock(&link_mutex);
	list_for_each_entry(link, &links, list)
		if (involves(link, inst->id) && link->life == LINK_LIVE)
			write_tables_of(link);
	mutex_unlock(&link_mutex);
}

/* May a running kernel still use what its table no longer shows as live? */
static bool unanswered(u32 id, bool *hopeless)
{
	struct kmorph_inst *inst;
	bool ret = false;

	if (id == KMORPH_PRIMARY_ID)
		return false;
	inst = kmorph_inst_get(id);
	if (!inst)
		return false;
	if (READ_ONCE(inst->state) == KMORPH_INST_RUNNING ||
	    READ_ONCE(inst->state) == KMORPH_INST_STUCK) {
		u32 state = smp_load_acquire(&ctl_instance(inst)->state);

		/*
		 * Not there yet: it will read the table as it is now. Not there
		 * any more: nor is its transport.
		 */
		ret = state != KMORPH_CTL_ABSENT && state != KMORPH_CTL_LEFT &&
		      READ_ONCE(ctl_instance(inst)->links_seen) != inst->links_generation;
		if (ret && state != KMORPH_CTL_READY)
			*hopeless = true;
	}
	kmorph_inst_put(inst);
	return ret;
}

static void forget(struct link *link)
{
	mutex_lock(&kmorph_lock);
	list_del(&link->list);
	mutex_unlock(&kmorph_lock);
	kfree(link);
}

/* Is the area of a dead link free? Waits, if asked, as long as there is hope. */
static bool settled(struct link *link, bool wait)
{
	struct kmorph_link here = as_seen_here(link);
	unsigned int ms;

	if (link->busy && link_ops)
		link->busy = link_ops->del(&here) == -EBUSY;
	if (link->busy)
		return false;
	for (ms = 0; ; ms++) {
		bool hopeless = false;

		if (!unanswered(link->id[0], &hopeless) && !unanswered(link->id[1], &hopeless))
			return true;
		if (!wait || hopeless || ms >= SETTLE_MS)
			return false;
		usleep_range(900, 1100);
	}
}

/* End a link's life: this kernel's user first, then the instances are told. */
static void kill_link(struct link *link)
{
	struct kmorph_link here = as_seen_here(link);

	if (link->life == LINK_LIVE && link->id[0] == KMORPH_PRIMARY_ID && link_ops)
		link->busy = link_ops->del(&here) == -EBUSY;
	if (link->busy)
		pr_warn("link 0-%u: its area is still in use and is retired\n", link->id[1]);
	link->life = LINK_DEAD;
	write_tables_of(link);
}

/* Format the area and announce it. Called with link_mutex held. */
static int bring_up(struct link *link)
{
	struct kmorph_link here;
	int ret;

	link->life = LINK_PENDING;
	link->epoch = ++last_epoch;
	if (!link_ops)
		return 0;
	ret = link_ops->format(link->base, link->size, link->id[0], link->id[1], link->epoch);
	if (ret)
		return ret;
	if (link->id[0] == KMORPH_PRIMARY_ID) {
		here = as_seen_here(link);
		ret = link_ops->add(&here);
		if (ret)
			return ret;
	}
	link->life = LINK_LIVE;
	write_tables_of(link);
	return 0;
}

/*
 * Forget the dead links whose areas are free, waiting for those of one kernel
 * (or none). Called with link_mutex held.
 */
static void reap(u32 wait_for)
{
	struct link *link, *next;

	list_for_each_entry_safe(link, next, &links, list)
		if (link->life == LINK_DEAD &&
		    settled(link, wait_for && involves(link, wait_for)))
			forget(link);
}

/* Where may the area of a link lie? Called with link_mutex and kmorph_lock held. */
static int check_place(const struct link *want, const struct kmorph_inst *owner)
{
	struct link *link;

	list_for_each_entry(link, &links, list)
		if (kmorph_overlaps(want->base, want->size, link->base, link->size))
			return -EBUSY;
	if (owner) {
		if (!kmorph_inside(want->base, want->size, owner->base, owner->size))
			return -EINVAL;
		if (kmorph_overlaps(want->base, want->size, owner->control, KMORPH_CTL_SIZE))
			return -EINVAL;
		return 0;
	}
	if (!kmorph_pool_find(want->base, want->size))
		return -ENOENT;
	return kmorph_inst_covers(want->base, want->size) ||
	       kmorph_handover_covers(want->base, want->size) ? -EBUSY : 0;
}

static struct link *find_pair(u32 a, u32 b)
{
	struct link *link;

	list_for_each_entry(link, &links, list)
		if (link->id[0] == a && link->id[1] == b)
			return link;
	return NULL;
}

static int check_members(const struct kmorph_link_req *req, struct kmorph_inst *a,
			 struct kmorph_inst *b)
{
	if (!b || (req->id_a != KMORPH_PRIMARY_ID && !a))
		return -ENOENT;
	if (b->state == KMORPH_INST_STUCK || (a && a->state == KMORPH_INST_STUCK))
		return -EBUSY;
	return 0;
}

static int add_locked(struct kmorph_link_req *req, struct kmorph_inst *a, struct kmorph_inst *b)
{
	struct link *link;
	int ret = check_members(req, a, b);

	if (ret)
		return ret;
	reap(req->id_b);
	if (a)
		reap(req->id_a);
	link = find_pair(req->id_a, req->id_b);
	if (link)
		return link->life == LINK_DEAD ? -EBUSY : -EEXIST;
	link = kzalloc(sizeof(*link), GFP_KERNEL);
	if (!link)
		return -ENOMEM;
	link->id[0] = req->id_a;
	link->id[1] = req->id_b;
	link->base = req->base;
	link->size = req->size;
	mutex_lock(&kmorph_lock);
	/* A member may be on its way out, with its links ended already. */
	ret = b->gone || (a && a->gone) ? -ENOENT : check_place(link, a ? NULL : b);
	if (!ret)
		list_add_tail(&link->list, &links);
	mutex_unlock(&kmorph_lock);
	if (ret) {
		kfree(link);
		return ret;
	}
	ret = bring_up(link);
	if (ret) {
		forget(link);
		return ret;
	}
	req->epoch = link->epoch;
	return 0;
}

static int check_request(const struct kmorph_link_req *req)
{
	return req->reserved || req->id_a >= req->id_b ? -EINVAL : 0;
}

int kmorph_link_add(struct kmorph_link_req *req)
{
	struct kmorph_inst *a = NULL, *b;
	int ret = check_request(req);

	if (ret || !kmorph_range_ok(req->base, req->size) || req->size < KMORPH_LINK_MIN)
		return -EINVAL;
	if (req->id_a != KMORPH_PRIMARY_ID)
		a = kmorph_inst_get(req->id_a);
	b = kmorph_inst_get(req->id_b);
	mutex_lock(&link_mutex);
	ret = add_locked(req, a, b);
	mutex_unlock(&link_mutex);
	if (a)
		kmorph_inst_put(a);
	if (b)
		kmorph_inst_put(b);
	return ret;
}

int kmorph_link_del(struct kmorph_link_req *req)
{
	struct link *link;
	int ret = check_request(req);

	if (ret)
		return ret;
	mutex_lock(&link_mutex);
	link = find_pair(req->id_a, req->id_b);
	if (!link) {
		ret = -ENOENT;
	} else {
		req->epoch = link->epoch;
		if (link->life != LINK_DEAD)
			kill_link(link);
		if (settled(link, true)) {
			struct link old = *link;

			forget(link);
			write_tables_of(&old);
		} else {
			ret = -EBUSY;
		}
	}
	mutex_unlock(&link_mutex);
	return ret;
}

/* The instance has been stopped: all its links die. */
void kmorph_links_stop(struct kmorph_inst *inst)
{
	struct link *link;

	mutex_lock(&link_mutex);
	list_for_each_entry(link, &links, list)
		if (involves(link, inst->id) && link->life != LINK_DEAD)
			kill_link(link);
	mutex_unlock(&link_mutex);
}

/*
 * Before the region gets another use: is this kernel out of the areas in it?
 * Areas between instances lie elsewhere. -EBUSY if not.
 */
int kmorph_links_settle(struct kmorph_inst *inst)
{
	struct link *link;
	int ret = 0;

	mutex_lock(&link_mutex);
	reap(0);
	list_for_each_entry(link, &links, list)
		if (link->id[0] == KMORPH_PRIMARY_ID && link->id[1] == inst->id && link->busy)
			ret = -EBUSY;
	mutex_unlock(&link_mutex);
	return ret;
}

/* Before the end of the instance: end its links. -EBUSY while one is in use. */
int kmorph_links_forget(struct kmorph_inst *inst)
{
	kmorph_links_stop(inst);
	return kmorph_links_settle(inst);
}

/* Forget the links that nobody can use any more. */
void kmorph_links_reap(void)
{
	mutex_lock(&link_mutex);
	reap(0);
	mutex_unlock(&link_mutex);
}

static void bring_up_again(struct link *link)
{
	if (link->life != LINK_PENDING)
		return;
	if (!settled(link, true)) {
		/* Who has not left its last epoch would disturb the next one. */
		link->life = LINK_DEAD;
		pr_err("link %u-%u: its last epoch is still in use: add it again\n",
		       link->id[0], link->id[1]);
	} else if (bring_up(link)) {
		pr_err("link %u-%u: cannot be brought up\n", link->id[0], link->id[1]);
	}
}

int kmorph_primary_link_register(const struct kmorph_link_ops *ops)
{
	struct link *link;
	int ret = 0;

	mutex_lock(&link_mutex);
	if (link_ops) {
		ret = -EBUSY;
	} else {
		link_ops = ops;
		list_for_each_entry(link, &links, list)
			bring_up_again(link);
	}
	mutex_unlock(&link_mutex);
	return ret;
}

/* Links of the primary end, and wait for the next user; the others live on. */
void kmorph_primary_link_unregister(void)
{
	struct link *link;

	mutex_lock(&link_mutex);
	list_for_each_entry(link, &links, list) {
		if (link->id[0] != KMORPH_PRIMARY_ID || link->life != LINK_LIVE)
			continue;
		kill_link(link);
		link->life = LINK_PENDING;
	}
	/* Areas that are free by now are given up by who knows them. */
	reap(0);
	link_ops = NULL;
	mutex_unlock(&link_mutex);
}

void kmorph_links_exit(void)
{
	struct link *link, *next;

	list_for_each_entry_safe(link, next, &links, list)
		forget(link);
}
