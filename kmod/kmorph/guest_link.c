// SPDX-License-Identifier: GPL-2.0
/*
 * Links, seen from an instance: follow the table in the control area, tell the
 * user of the links, and answer with the generation acted upon.
 */
#include "kmorph.h"

#include <linux/ioport.h>
#include <linux/workqueue.h>

struct known {
	struct kmorph_link link;
	u32 apicids[8];
	bool live;
};

static struct known known[KMORPH_CTL_LINKS];
static const struct kmorph_link_ops *link_ops;
static DEFINE_MUTEX(table_mutex);
static u32 generation_seen;

static void follow(struct work_struct *work);
static DECLARE_WORK(follow_work, follow);

/* Hard interrupt: is there a table we have not acted upon? */
bool kmorph_guest_link_changed(void)
{
	return READ_ONCE(kmorph_guest_links()->generation) != READ_ONCE(generation_seen);
}

void kmorph_guest_link_kick(void)
{
	schedule_work(&follow_work);
}

/* May the doorbell of a peer be at this APIC id? Any context. */
bool kmorph_guest_link_apicid_ok(u32 peer, u32 apicid)
{
	unsigned int i;

	if (apicid >= 256)
		return false;
	for (i = 0; i < ARRAY_SIZE(known); i++)
		if (READ_ONCE(known[i].live) && known[i].link.peer == peer)
			return known[i].apicids[apicid / 32] & BIT(apicid % 32);
	return false;
}

/* A whole copy of the table, or false when the primary is just changing it. */
static bool copy_table(struct kmorph_ctl_links *copy)
{
	struct kmorph_ctl_links *table = kmorph_guest_links();
	u32 before = smp_load_acquire(&table->generation);

	if (before & 1)
		return false;
	memcpy(copy, table, sizeof(*copy));
	smp_rmb();	/* the copy before the second look at the generation */
	copy->generation = before;
	return READ_ONCE(table->generation) == before;
}

static bool acceptable(const struct kmorph_ctl_link *entry)
{
	return kmorph_range_ok(entry->base, entry->size) && entry->size >= KMORPH_LINK_MIN &&
	       entry->epoch && entry->peer_id != kmorph_self_id() &&
	       region_intersects(entry->base, entry->size, IORESOURCE_SYSTEM_RAM,
				 IORES_DESC_NONE) == REGION_DISJOINT;
}

static bool still_live(const struct kmorph_ctl_links *table, const struct known *one)
{
	unsigned int i;

	for (i = 0; i < KMORPH_CTL_LINKS; i++)
		if (table->link[i].state == KMORPH_LINK_LIVE &&
		    table->link[i].epoch == one->link.epoch &&
		    table->link[i].peer_id == one->link.peer)
			return true;
	return false;
}

static struct known *find_known(const struct kmorph_ctl_link *entry)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(known); i++)
		if (known[i].live && known[i].link.epoch == entry->epoch &&
		    known[i].link.peer == entry->peer_id)
			return &known[i];
	return NULL;
}

static void take_up(const struct kmorph_ctl_link *entry)
{
	unsigned int i;

	if (!acceptable(entry)) {
		pr_err("link to %u: bad entry %#llx+%#llx\n", entry->peer_id, entry->base,
		       entry->size);
		return;
	}
	for (i = 0; i < ARRAY_SIZE(known) && known[i].live; i++)
		;
	if (i == ARRAY_SIZE(known))
		return;
	known[i].link = (struct kmorph_link){
		.base = entry->base,
		.size = entry->size,
		.peer = entry->peer_id,
		.epoch = entry->epoch,
	};
	memcpy(known[i].apicids, entry->peer_apicids, sizeof(known[i].apicids));
	smp_store_release(&known[i].live, true);
	if (link_ops->add(&known[i].link))
		pr_err("link to %u: cannot be joined\n", entry->peer_id);
}

/* Called with table_mutex held. */
static void follow_table(void)
{
	static struct kmorph_ctl_links table;
	bool all_gone = true;
	unsigned int i;

	if (!copy_table(&table))
		return;		/* a ring follows, and the slow scan */
	for (i = 0; i < ARRAY_SIZE(known); i++) {
		if (!known[i].live || still_live(&table, &known[i]))
			continue;
		if (link_ops && link_ops->del(&known[i].link) == -EBUSY)
			all_gone = false;	/* the scan comes back to it */
		else
			WRITE_ONCE(known[i].live, false);
	}
	for (i = 0; i < KMORPH_CTL_LINKS && link_ops; i++) {
		struct known *one;

		if (table.link[i].state != KMORPH_LINK_LIVE)
			continue;
		one = find_known(&table.link[i]);
		if (one)	/* the peer's CPUs may have changed */
			memcpy(one->apicids, table.link[i].peer_apicids, sizeof(one->apicids));
		else
			take_up(&table.link[i]);
	}
	if (!all_gone)
		return;
	WRITE_ONCE(generation_seen, table.generation);
	smp_store_release(&kmorph_guest_self()->links_seen, table.generation);
}

static void follow(struct work_struct *work)
{
	mutex_lock(&table_mutex);
	follow_table();
	mutex_unlock(&table_mutex);
}

int kmorph_guest_link_register(const struct kmorph_link_ops *ops)
{
	int ret = 0;

	mutex_lock(&table_mutex);
	if (link_ops) {
		ret = -EBUSY;
	} else {
		link_ops = ops;
		follow_table();
	}
	mutex_unlock(&table_mutex);
	return ret;
}

void kmorph_guest_link_unregister(void)
{
	unsigned int i;

	mutex_lock(&table_mutex);
	for (i = 0; i < ARRAY_SIZE(known); i++) {
		if (!known[i].live)
			continue;
		link_ops->del(&known[i].link);
		WRITE_ONCE(known[i].live, false);
	}
	link_ops = NULL;
	mutex_unlock(&table_mutex);
}

int kmorph_guest_link_init(void)
{
	generation_seen = ~0U;
	return 0;
}

void kmorph_guest_link_exit(void)
{
	cancel_work_sync(&follow_work);
}
