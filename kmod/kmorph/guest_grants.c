// SPDX-License-Identifier: GPL-2.0
/*
 * What the primary grants this kernel while it runs: CPUs that another kernel
 * has left, and memory that was another kernel's. Each is taken into use when
 * the table in the control area shows it; when all of it has been tried, the
 * primary is told how that went.
 *
 * The CPUs this kernel was booted with are none of this module's business: one
 * that its operator keeps offline stays so. But a CPU the table does not show
 * cannot be onlined: the INIT would hit the kernel that runs there.
 */
#include "kmorph.h"

#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/delay.h>
#include <linux/ioport.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/workqueue.h>
#include <asm/smp.h>

#define NODE		0	/* the tables of an instance describe no others */
#define GUARD_TRIES	100	/* to find the table whole */

/* Ours alone: onlining waits for other CPUs' work. */
static struct workqueue_struct *queue;
static u32 generation_seen;
/* Taken up so far; of the work alone. */
static struct kmorph_ctl_grants known;
static u64 memory_added;
static enum cpuhp_state guard_state;

/* Hard interrupt: is there a table we have not acted upon? */
bool kmorph_guest_grants_changed(void)
{
	return READ_ONCE(kmorph_guest_grants()->generation) != READ_ONCE(generation_seen);
}

/* A whole copy of the table, or false when the primary is just changing it. */
static bool copy_table(struct kmorph_ctl_grants *copy)
{
	struct kmorph_ctl_grants *table = kmorph_guest_grants();
	u32 before = smp_load_acquire(&table->generation);

	if (before & 1)
		return false;
	memcpy(copy, table, sizeof(*copy));
	smp_rmb();	/* the copy before the second look at the generation */
	copy->generation = before;
	return READ_ONCE(table->generation) == before && copy->cpu_count <= KMORPH_CTL_CPUS &&
	       copy->extent_count <= KMORPH_CTL_EXTENTS;
}

static bool knows_cpu(u32 apicid)
{
	u32 i;

	for (i = 0; i < known.cpu_count; i++)
		if (known.apicid[i] == apicid)
			return true;
	return false;
}

static bool knows_extent(u64 base)
{
	u32 i;

	for (i = 0; i < known.extent_count; i++)
		if (known.extent[i].base == base)
			return true;
	return false;
}

/* Is it this kernel's? The table itself is asked: what has been withdrawn counts at once. */
static bool is_granted(u32 apicid)
{
	struct kmorph_ctl_grants *table = kmorph_guest_grants();
	unsigned int tries;

	for (tries = 0; tries < GUARD_TRIES; tries++) {
		u32 before = smp_load_acquire(&table->generation);
		u32 count = min_t(u32, READ_ONCE(table->cpu_count), KMORPH_CTL_CPUS);
		bool found = false;
		u32 i;

		for (i = 0; i < count; i++)
			found |= READ_ONCE(table->apicid[i]) == apicid;
		smp_rmb();	/* the entries before the second look at the generation */
		if (!(before & 1) && READ_ONCE(table->generation) == before)
			return found;
		usleep_range(50, 100);
	}
	return false;
}

static int guard_prepare(unsigned int cpu)
{
	return is_granted(per_cpu(x86_cpu_to_apicid, cpu)) ? 0 : -EBUSY;
}

static int find_cpu(u32 apicid)
{
	int cpu;

	for_each_present_cpu(cpu)
		if (per_cpu(x86_cpu_to_apicid, cpu) == apicid)
			return cpu;
	/* The tables this kernel was booted with do not name it. */
	return -ENODEV;
}

static int online_cpu(u32 apicid)
{
	int cpu = find_cpu(apicid), ret;

	if (cpu < 0)
		return cpu;
	ret = cpu_online(cpu) ? 0 : add_cpu(cpu);
	/* Somebody else onlines it. */
	return ret > 0 || cpu_online(cpu) ? 0 : ret;
}

static int acceptable(const struct kmorph_ctl_extent *extent)
{
	const struct kmorph_ctl_primary *ctl = kmorph_guest_primary();
	u64 block = memory_block_size_bytes();

	if (!kmorph_range_ok(extent->base, extent->size) ||
	    !IS_ALIGNED(extent->base | extent->size, block) ||
	    kmorph_overlaps(extent->base, extent->size, ctl->base, ctl->region_size))
		return -EINVAL;
	return 0;
}

/* Block by block, so that each holds its own page structures where this kernel can do that. */
static int add_extent(const struct kmorph_ctl_extent *extent, u64 *what)
{
	u64 block = memory_block_size_bytes();
	u64 at;
	int ret = acceptable(extent);

	*what = extent->base;
	for (at = extent->base; !ret && at < extent->base + extent->size; at += block) {
		*what = at;
		ret = add_memory_driver_managed(NODE, at, block, "System RAM (kmorph)",
						MHP_MEMMAP_ON_MEMORY);
		/* Added, and left offline: memhp_default_state= says so. */
		if (!ret && !pfn_to_online_page(PHYS_PFN(at + block - PAGE_SIZE)))
			ret = -EAGAIN;
		if (!ret)
			memory_added += block;
	}
	return ret;
}

/* Memory first: it is quick, and a CPU that comes then has what it needs. */
static int take_up(const struct kmorph_ctl_grants *table, u64 *what)
{
	int first = 0, ret;
	u64 at;
	u32 i;

	for (i = 0; i < table->extent_count; i++) {
		if (knows_extent(table->extent[i].base))
			continue;
		ret = add_extent(&table->extent[i], &at);
		pr_info("memory %#llx+%#llx: %d\n", table->extent[i].base,
			table->extent[i].size, ret);
		if (ret && !first) {
			first = ret;
			*what = at;
		}
	}
	for (i = 0; i < table->cpu_count; i++) {
		if (knows_cpu(table->apicid[i]))
			continue;
		ret = online_cpu(table->apicid[i]);
		pr_info("CPU with APIC id %u: %d\n", table->apicid[i], ret);
		if (ret && !first) {
			first = ret;
			*what = table->apicid[i];
		}
	}
	return first;
}

static void follow(struct work_struct *work)
{
	static struct kmorph_ctl_grants table;
	struct kmorph_ctl_instance *self = kmorph_guest_self();
	u64 what = 0;
	int ret;

	if (!copy_table(&table))
		return;		/* a ring follows, and the slow scan */
	if (table.generation == generation_seen)
		return;
	ret = take_up(&table, &what);
	/* What did not work is not tried again by itself: whoever grants it may do so anew. */
	known = table;
	WRITE_ONCE(generation_seen, table.generation);
	WRITE_ONCE(self->cpus_online, num_online_cpus());
	WRITE_ONCE(self->memory_added, memory_added);
	WRITE_ONCE(self->grants_what, what);
	WRITE_ONCE(self->grants_error, -ret);
	smp_store_release(&self->grants_seen, table.generation);
}

static DECLARE_WORK(work, follow);

void kmorph_guest_grants_kick(void)
{
	queue_work(queue, &work);
}

/* Granted since START, before this module was there: only what is in use is known. */
static void forget_unused(void)
{
	u32 i, n = 0;
	int cpu;

	for (i = 0; i < known.cpu_count; i++) {
		cpu = find_cpu(known.apicid[i]);
		if (cpu >= 0 && cpu_online(cpu))
			known.apicid[n++] = known.apicid[i];
	}
	known.cpu_count = n;
	for (i = 0, n = 0; i < known.extent_count; i++)
		if (region_intersects(known.extent[i].base, known.extent[i].size,
				      IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) != REGION_DISJOINT)
			known.extent[n++] = known.extent[i];
	known.extent_count = n;
}

/* What this kernel was booted with is there already, as is what an earlier load took up. */
static void know_first(void)
{
	bool copied = copy_table(&known);
	unsigned int tries;

	for (tries = 1; !copied && tries < GUARD_TRIES; tries++) {
		usleep_range(50, 100);
		copied = copy_table(&known);
	}
	if (!copied) {
		memset(&known, 0, sizeof(known));
		return;
	}
	if (known.generation == KMORPH_CTL_GRANTS_FIRST ||
	    known.generation == READ_ONCE(kmorph_guest_self()->grants_seen))
		WRITE_ONCE(generation_seen, known.generation);
	else
		forget_unused();
}

int kmorph_guest_grants_init(void)
{
	int ret;

	queue = alloc_ordered_workqueue("kmorph_grants", 0);
	if (!queue)
		return -ENOMEM;
	WRITE_ONCE(kmorph_guest_self()->memory_block, memory_block_size_bytes());
	know_first();
	smp_store_release(&kmorph_guest_self()->grants_seen, generation_seen);
	ret = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "kmorph:granted", guard_prepare,
					NULL);
	if (ret < 0) {
		destroy_workqueue(queue);
		return ret;
	}
	guard_state = ret;
	return 0;
}

void kmorph_guest_grants_exit(void)
{
	destroy_workqueue(queue);
	cpuhp_remove_state_nocalls(guard_state);
}
