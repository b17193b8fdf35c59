// SPDX-License-Identifier: GPL-2.0
/*
 * The pool: physical ranges this kernel does not use, kept for instances.
 *
 * A page qualifies when it was kept from Linux at boot (memmap=...$..., shown as
 * "Reserved" in /proc/iomem) or when its memory block is offline. Blocks of the
 * pool cannot be onlined while they are in it.
 */
#include "kmorph.h"

#include <linux/ioport.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/slab.h>

#define FIRST_MIB	0x100000ULL

static LIST_HEAD(ranges);
static unsigned int range_count;
/* For the memory notifier, which must not take kmorph_lock; nests inside it. */
static DEFINE_SPINLOCK(ranges_lock);

static int memory_event(struct notifier_block *nb, unsigned long action, void *data)
{
	struct memory_notify *arg = data;
	u64 base = PFN_PHYS((u64)arg->start_pfn);
	u64 size = PFN_PHYS((u64)arg->nr_pages);
	struct kmorph_range *range;
	bool ours = false;

	if (action != MEM_GOING_ONLINE)
		return NOTIFY_OK;
	spin_lock(&ranges_lock);
	list_for_each_entry(range, &ranges, list)
		if (kmorph_overlaps(base, size, range->base, range->size))
			ours = true;
	spin_unlock(&ranges_lock);
	return ours ? notifier_from_errno(-EBUSY) : NOTIFY_OK;
}

static struct notifier_block memory_nb = {
	.notifier_call = memory_event,
};

int kmorph_pool_init(void)
{
	return register_memory_notifier(&memory_nb);
}

void kmorph_pool_exit(void)
{
	struct kmorph_range *range, *next;

	unregister_memory_notifier(&memory_nb);
	list_for_each_entry_safe(range, next, &ranges, list) {
		list_del(&range->list);
		kfree(range);
	}
	range_count = 0;
}

static int count_reserved(struct resource *res, void *arg)
{
	u64 *covered = arg;

	*covered += resource_size(res);
	return 0;
}

static bool all_reserved(u64 base, u64 size)
{
	u64 covered = 0;

	walk_iomem_res_desc(IORES_DESC_RESERVED, IORESOURCE_MEM, base, base + size - 1,
			    &covered, count_reserved);
	return covered == size;
}

/* What is this page? 0 when Linux uses it, or when it is no memory. */
static u32 page_source(u64 addr)
{
	struct page *page = pfn_to_online_page(PHYS_PFN(addr));

	if (region_intersects(addr, PAGE_SIZE, IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) != REGION_DISJOINT)
		return page ? 0 : KMORPH_POOL_OFFLINED;
	if (page && !PageReserved(page))
		return 0;
	return all_reserved(addr, PAGE_SIZE) ? KMORPH_POOL_RESERVED : 0;
}

/*
 * Check every page. The resource tree is asked once for the range, and only
 * page by page to find the culprit: it is slow and can be long.
 */
static int verify(u64 base, u64 size, u32 *source, u64 *bad)
{
	u64 addr;

	if (region_intersects(base, size, IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) == REGION_INTERSECTS)
		*source = KMORPH_POOL_OFFLINED;
	else if (all_reserved(base, size))
		*source = KMORPH_POOL_RESERVED;
	else
		*source = 0;

	for (addr = base; addr < base + size; addr += PAGE_SIZE) {
		struct page *page = pfn_to_online_page(PHYS_PFN(addr));
		bool good;

		if (*source == KMORPH_POOL_OFFLINED)
			good = !page && pfn_valid(PHYS_PFN(addr));
		else if (*source == KMORPH_POOL_RESERVED)
			good = !page || PageReserved(page);
		else
			good = page_source(addr) && page_source(addr) == page_source(base);
		if (!good) {
			*bad = addr;
			return -EBUSY;
		}
		if (!(addr & (SZ_16M - 1)))
			cond_resched();
	}
	return *source ? 0 : -EINVAL;
}

static int probe_write_back(u64 base, u64 size)
{
	void *addr = kmorph_map(base, PAGE_SIZE);

	if (!addr)
		return -EINVAL;
	kmorph_unmap(addr);
	addr = kmorph_map(base + size - PAGE_SIZE, PAGE_SIZE);
	if (!addr)
		return -EINVAL;
	kmorph_unmap(addr);
	return 0;
}

static void insert(struct kmorph_range *range)
{
	spin_lock(&ranges_lock);
	list_add_tail(&range->list, &ranges);
	spin_unlock(&ranges_lock);
	range_count++;
}

static void remove(struct kmorph_range *range)
{
	spin_lock(&ranges_lock);
	list_del(&range->list);
	spin_unlock(&ranges_lock);
	range_count--;
	kfree(range);
}

int kmorph_pool_add(struct kmorph_pool *req)
{
	struct kmorph_range *range, *other;
	int ret;

	req->bad_address = 0;
	req->mappings = 0;
	if (!kmorph_range_ok(req->base, req->size) || req->base < FIRST_MIB)
		return -EINVAL;
	range = kzalloc(sizeof(*range), GFP_KERNEL);
	if (!range)
		return -ENOMEM;
	range->base = req->base;
	range->size = req->size;
	atomic_set(&range->mappings, 0);

	mutex_lock(&kmorph_lock);
	ret = -ENOSPC;
	if (range_count >= KMORPH_MAX_POOL)
		goto fail;
	ret = -EEXIST;
	list_for_each_entry(other, &ranges, list) {
		if (kmorph_overlaps(range->base, range->size, other->base, other->size)) {
			req->bad_address = max(range->base, other->base);
			goto fail;
		}
	}
	/* In the list first: from here on its blocks cannot come online. */
	insert(range);
	ret = verify(range->base, range->size, &range->source, &req->bad_address);
	if (!ret)
		ret = probe_write_back(range->base, range->size);
	if (ret) {
		remove(range);
		mutex_unlock(&kmorph_lock);
		return ret;
	}
	req->source = range->source;
	mutex_unlock(&kmorph_lock);
	pr_info("pool: %#llx+%#llx %s\n", req->base, req->size,
		req->source == KMORPH_POOL_RESERVED ? "reserved" : "offlined");
	return 0;
fail:
	mutex_unlock(&kmorph_lock);
	kfree(range);
	return ret;
}

int kmorph_pool_remove(struct kmorph_pool *req)
{
	struct kmorph_range *range;
	int ret = -ENOENT;

	if (!kmorph_range_ok(req->base, req->size))
		return -EINVAL;
	kmorph_links_reap();
	mutex_lock(&kmorph_lock);
	list_for_each_entry(range, &ranges, list) {
		if (range->base != req->base || range->size != req->size)
			continue;
		req->source = range->source;
		req->mappings = atomic_read(&range->mappings);
		req->bad_address = 0;
		if (req->mappings || kmorph_inst_covers(range->base, range->size) ||
		    kmorph_link_covers(range->base, range->size) ||
		    kmorph_handover_covers(range->base, range->size)) {
			ret = -EBUSY;
		} else {
			remove(range);
			ret = 0;
		}
		break;
	}
	mutex_unlock(&kmorph_lock);
	return ret;
}

int kmorph_pool_list(struct kmorph_pool_list *req)
{
	struct kmorph_range *range;
	u32 n = 0;

	if (req->reserved)
		return -EINVAL;
	memset(req->range, 0, sizeof(req->range));
	mutex_lock(&kmorph_lock);
	list_for_each_entry(range, &ranges, list) {
		req->range[n++] = (struct kmorph_pool){
			.head = { sizeof(struct kmorph_pool), KMORPH_ABI_VERSION },
			.base = range->base,
			.size = range->size,
			.source = range->source,
			.mappings = atomic_read(&range->mappings),
		};
	}
	mutex_unlock(&kmorph_lock);
	req->count = n;
	return 0;
}

/* The range that holds all of [base, base + size). Called with kmorph_lock held. */
struct kmorph_range *kmorph_pool_find(u64 base, u64 size)
{
	struct kmorph_range *range;

	list_for_each_entry(range, &ranges, list)
		if (kmorph_inside(base, size, range->base, range->size))
			return range;
	return NULL;
}

/* A free piece of the pool, from the top down; 0 if none. Called with kmorph_lock held. */
u64 kmorph_pool_place(u64 size, u64 align)
{
	struct kmorph_range *range;
	u64 at;

	list_for_each_entry(range, &ranges, list) {
		if (size > range->size)
			continue;
		for (at = round_down(range->base + range->size - size, align);
		     at >= range->base; at -= align)
			if (!kmorph_inst_covers(at, size) && !kmorph_link_covers(at, size) &&
			    !kmorph_handover_covers(at, size))
				return at;
	}
	return 0;
}
