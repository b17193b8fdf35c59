// SPDX-License-Identifier: GPL-2.0
/*
 * Handover regions, seen from the primary: which pieces of the pool are shared
 * by which instances, and which one of these may write.
 *
 * The primary alone decides. It takes the right to write from one kernel, waits
 * until that kernel has confirmed it, and only then gives it to the next one, so
 * that there are never two. A kernel whose CPUs have all been seen stopped need
 * not confirm anything.
 */
#include "kmorph.h"

#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#define CLEAR_CHUNK	SZ_16M
#define SPIN_US		200	/* an instance that is alive answers within this */
#define SLEEP_MIN_US	20
#define SLEEP_MAX_US	50
#define RING_AGAIN_US	1000	/* a ring is lost when the doorbell moves meanwhile */

struct region {
	struct list_head list;
	u64 key;
	u64 base;
	u64 size;
	u32 writer;		/* 0: nobody */
	u32 share_count;
	u32 share[KMORPH_MAX_INSTANCES];
	u32 leaving;		/* an instance that is asked to unmap, not in its table */
	bool moving;		/* no table shows a writer */
	bool busy;		/* a call changes it, outside handover_mutex */
};

/* Changed under handover_mutex and kmorph_lock, read under either. */
static LIST_HEAD(regions);
static unsigned int region_count;
static DEFINE_MUTEX(handover_mutex);

static struct kmorph_ctl_handovers *ctl_table(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_HANDOVERS;
}

static struct kmorph_ctl_instance *ctl_instance(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_INSTANCE;
}

/* Does any region touch the range? Called with kmorph_lock held. */
bool kmorph_handover_covers(u64 base, u64 size)
{
	struct region *region;

	list_for_each_entry(region, &regions, list)
		if (kmorph_overlaps(base, size, region->base, region->size))
			return true;
	return false;
}

static struct region *find(u64 key)
{
	struct region *region;

	list_for_each_entry(region, &regions, list)
		if (region->key == key)
			return region;
	return NULL;
}

/* A region that no other call is changing. Called with handover_mutex held. */
static struct region *find_idle(u64 key, int *err)
{
	struct region *region = find(key);

	*err = !region ? -ENOENT : region->busy ? -EBUSY : 0;
	return *err ? NULL : region;
}

static int share_index(const struct region *region, u32 id)
{
	u32 i;

	for (i = 0; i < region->share_count; i++)
		if (region->share[i] == id)
			return i;
	return -ENOENT;
}

static bool shared_with(const struct region *region, u32 id)
{
	return share_index(region, id) >= 0;
}

/* Write the table of an instance anew and ring it. Called with handover_mutex held. */
static u32 write_table(struct kmorph_inst *inst)
{
	struct kmorph_ctl_handovers *table = ctl_table(inst);
	struct region *region;
	unsigned int n = 0;

	WRITE_ONCE(table->generation, inst->handovers_generation + 1);
	smp_wmb();	/* odd before any entry changes */
	list_for_each_entry(region, &regions, list) {
		struct kmorph_ctl_handover *entry = &table->region[n];

		if (!shared_with(region, inst->id) || region->leaving == inst->id)
			continue;
		memset(entry, 0, sizeof(*entry));
		entry->key = region->key;
		entry->base = region->base;
		entry->size = region->size;
		entry->writer = region->moving ? 0 : region->writer;
		if (++n == KMORPH_CTL_HANDOVERS)
			break;
	}
	for (; n < KMORPH_CTL_HANDOVERS; n++)
		memset(&table->region[n], 0, sizeof(table->region[n]));
	inst->handovers_generation += 2;
	smp_store_release(&table->generation, inst->handovers_generation);
	smp_mb();	/* the table before the ring, and before its answer is read */
	kmorph_ctl_ring(inst);
	return inst->handovers_generation;
}

static void write_table_of(u32 id)
{
	struct kmorph_inst *inst = kmorph_inst_get(id);

	if (!inst)
		return;
	write_table(inst);
	kmorph_inst_put(inst);
}

/* Tell all that share the region, @first before the others. */
static void write_tables(const struct region *region, u32 first)
{
	u32 i;

	if (first)
		write_table_of(first);
	for (i = 0; i < region->share_count; i++)
		if (region->share[i] != first)
			write_table_of(region->share[i]);
}

/* Has the instance acted upon this generation of its table? -EAGAIN: not yet. */
static int confirmed(struct kmorph_inst *inst, u32 generation)
{
	u32 state;

	if (READ_ONCE(inst->state) != KMORPH_INST_RUNNING &&
	    READ_ONCE(inst->state) != KMORPH_INST_STUCK)
		return 0;
	/* The state first: a module that comes now reads the table as it is now. */
	state = smp_load_acquire(&ctl_instance(inst)->state);
	if (state == KMORPH_CTL_ABSENT || state == KMORPH_CTL_LEFT)
		return 0;
	if ((s32)(smp_load_acquire(&ctl_instance(inst)->handovers_seen) - generation) >= 0)
		return 0;
	/* Its CPUs may run all the same. It will not answer; only a STOP helps. */
	return state == KMORPH_CTL_READY ? -EAGAIN : -ETIMEDOUT;
}

/*
 * Wait for the confirmation: spinning at first, for it takes microseconds from an
 * instance that is alive, and somebody's service stands still meanwhile.
 */
static int wait_confirmed(struct kmorph_inst *inst, u32 generation, u32 limit_us, u64 *took_ns)
{
	ktime_t begin = ktime_get();
	ktime_t limit = ktime_add_us(begin, limit_us);
	ktime_t spin = ktime_add_us(begin, SPIN_US);
	ktime_t ring = ktime_add_us(begin, RING_AGAIN_US);
	int ret;

	for (;;) {
		ktime_t now = ktime_get();

		ret = confirmed(inst, generation);
		if (ret != -EAGAIN)
			break;
		if (ktime_after(now, limit)) {
			ret = -ETIMEDOUT;
			break;
		}
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		if (ktime_before(now, spin)) {
			cpu_relax();
			cond_resched();
			continue;
		}
		if (ktime_after(now, ring)) {
			kmorph_ctl_ring(inst);
			ring = ktime_add_us(now, RING_AGAIN_US);
		}
		usleep_range(SLEEP_MIN_US, SLEEP_MAX_US);
	}
	*took_ns = ktime_to_ns(ktime_sub(ktime_get(), begin));
	return ret;
}

static int clear(u64 base, u64 size)
{
	u64 done, chunk;
	void *addr;

	for (done = 0; done < size; done += chunk) {
		chunk = min_t(u64, size - done, CLEAR_CHUNK);
		addr = kmorph_map(base + done, chunk);
		if (!addr)
			return -ENOMEM;
		memset(addr, 0, chunk);
		kmorph_unmap(addr);
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

static void describe(const struct region *region, struct kmorph_handover *out)
{
	out->key = region->key;
	out->size = region->size;
	out->base = region->base;
	out->writer = region->writer;
	out->share_count = region->share_count;
	memset(out->share, 0, sizeof(out->share));
	memcpy(out->share, region->share, region->share_count * sizeof(u32));
}

/* Called with handover_mutex and kmorph_lock held. */
static int place(struct region *region)
{
	if (find(region->key))
		return -EEXIST;
	if (region_count >= KMORPH_MAX_HANDOVERS)
		return -ENOSPC;
	if (!region->base) {
		region->base = kmorph_pool_place(region->size, KMORPH_HANDOVER_ALIGN);
		if (!region->base)
			return -ENOSPC;
	} else if (!kmorph_pool_find(region->base, region->size)) {
		return -ENOENT;
	} else if (kmorph_inst_covers(region->base, region->size) ||
		   kmorph_link_covers(region->base, region->size) ||
		   kmorph_handover_covers(region->base, region->size)) {
		return -EBUSY;
	}
	list_add_tail(&region->list, &regions);
	region_count++;
	return 0;
}

/* Called with handover_mutex held. */
static void forget(struct region *region)
{
	mutex_lock(&kmorph_lock);
	list_del(&region->list);
	region_count--;
	mutex_unlock(&kmorph_lock);
	kfree(region);
}

int kmorph_handover_create(struct kmorph_handover *req)
{
	struct region *region;
	int ret;

	BUILD_BUG_ON(KMORPH_MAX_HANDOVERS > KMORPH_CTL_HANDOVERS);
	BUILD_BUG_ON(KMORPH_HANDOVER_ALIGN != PMD_SIZE);
	if (!req->key || !kmorph_range_ok(req->base, req->size) ||
	    !IS_ALIGNED(req->size, KMORPH_HANDOVER_ALIGN) ||
	    !IS_ALIGNED(req->base, KMORPH_HANDOVER_ALIGN))
		return -EINVAL;
	region = kzalloc(sizeof(*region), GFP_KERNEL);
	if (!region)
		return -ENOMEM;
	region->key = req->key;
	region->size = req->size;
	region->base = req->base;
	region->busy = true;	/* clearing takes long, and nobody may share it before */

	kmorph_links_reap();
	mutex_lock(&handover_mutex);
	mutex_lock(&kmorph_lock);
	ret = place(region);
	mutex_unlock(&kmorph_lock);
	mutex_unlock(&handover_mutex);
	if (ret) {
		kfree(region);
		return ret;
	}
	ret = clear(region->base, region->size);
	mutex_lock(&handover_mutex);
	if (ret) {
		forget(region);
	} else {
		region->busy = false;
		describe(region, req);
	}
	mutex_unlock(&handover_mutex);
	return ret;
}

int kmorph_handover_destroy(struct kmorph_handover *req)
{
	struct region *region;
	int ret;

	mutex_lock(&handover_mutex);
	region = find_idle(req->key, &ret);
	if (region) {
		describe(region, req);
		if (region->share_count)
			ret = -EBUSY;
		else
			forget(region);
	}
	mutex_unlock(&handover_mutex);
	return ret;
}

int kmorph_handover_list(struct kmorph_handover_list *req)
{
	struct region *region;
	u32 n = 0;

	if (req->reserved)
		return -EINVAL;
	memset(req->region, 0, sizeof(req->region));
	mutex_lock(&handover_mutex);
	list_for_each_entry(region, &regions, list) {
		req->region[n].head.size = sizeof(req->region[n]);
		req->region[n].head.version = KMORPH_ABI_VERSION;
		describe(region, &req->region[n++]);
	}
	mutex_unlock(&handover_mutex);
	req->count = n;
	return 0;
}

/* Called with the instance's lock held, so it does not stop meanwhile. */
static int share(struct kmorph_inst *inst, const struct kmorph_handover_share *req)
{
	struct region *region;
	int ret;

	if (inst->incarnation != req->incarnation)
		return -ESTALE;
	if (inst->state != KMORPH_INST_RUNNING)
		return -ENXIO;
	mutex_lock(&handover_mutex);
	region = find_idle(req->key, &ret);
	if (region && shared_with(region, inst->id)) {
		ret = -EALREADY;
	} else if (region) {
		/* One place an instance that can exist. */
		BUILD_BUG_ON(ARRAY_SIZE(region->share) < KMORPH_MAX_INSTANCES);
		region->share[region->share_count++] = inst->id;
		write_table(inst);
	}
	mutex_unlock(&handover_mutex);
	return ret;
}

int kmorph_handover_share(struct kmorph_handover_share *req)
{
	struct kmorph_inst *inst;
	int ret;

	if (req->timeout_us)
		return -EINVAL;
	inst = kmorph_inst_lock(req->instance, &ret);
	if (!inst)
		return ret;
	ret = share(inst, req);
	kmorph_inst_unlock(inst);
	return ret;
}

static void drop_share(struct region *region, u32 id)
{
	int index = share_index(region, id);

	if (index >= 0)
		region->share[index] = region->share[--region->share_count];
}

static int unshare(struct kmorph_inst *inst, const struct kmorph_handover_share *req)
{
	struct region *region;
	u32 generation;
	u64 took_ns;
	int ret;

	if (inst->incarnation != req->incarnation)
		return -ESTALE;
	mutex_lock(&handover_mutex);
	region = find_idle(req->key, &ret);
	if (!region)
		goto unlock;
	ret = -ENOENT;
	if (!shared_with(region, inst->id))
		goto unlock;
	ret = -EBUSY;
	if (region->writer == inst->id)
		goto unlock;
	region->busy = true;
	region->leaving = inst->id;
	generation = write_table(inst);
	mutex_unlock(&handover_mutex);

	ret = wait_confirmed(inst, generation, req->timeout_us, &took_ns);

	mutex_lock(&handover_mutex);
	region->busy = false;
	region->leaving = 0;
	if (!ret)
		drop_share(region, inst->id);
	else if (shared_with(region, inst->id))	/* else stopped, its memory may be another's */
		write_table(inst);
unlock:
	mutex_unlock(&handover_mutex);
	return ret;
}

int kmorph_handover_unshare(struct kmorph_handover_share *req)
{
	struct kmorph_inst *inst;
	int ret;

	if (req->timeout_us > KMORPH_HANDOVER_MAX_US)
		return -EINVAL;
	/* Not its lock: a STOP must not wait for this, but end it. */
	inst = kmorph_inst_get(req->instance);
	if (!inst)
		return -ENOENT;
	ret = unshare(inst, req);
	kmorph_inst_put(inst);
	return ret;
}

/*
 * Take the right to write from the one who has it. Called with handover_mutex
 * held, which is dropped meanwhile; the region is busy until then.
 */
static int revoke(struct region *region, struct kmorph_handover_assign *req)
{
	struct kmorph_inst *inst = kmorph_inst_get(region->writer);
	u32 generation;
	int ret;

	if (!inst)
		return 0;
	region->busy = true;
	region->moving = true;
	generation = write_table(inst);
	mutex_unlock(&handover_mutex);

	ret = wait_confirmed(inst, generation, req->timeout_us, &req->revoke_ns);

	mutex_lock(&handover_mutex);
	region->busy = false;
	region->moving = false;
	/* It may have been stopped meanwhile. */
	if (!ret && req->instance && !shared_with(region, req->instance))
		ret = -EACCES;
	if (ret && region->writer == inst->id)	/* else stopped, its memory may be another's */
		write_table(inst);
	kmorph_inst_put(inst);
	return ret;
}

int kmorph_handover_assign(struct kmorph_handover_assign *req)
{
	struct region *region;
	int ret;

	req->revoke_ns = 0;
	if (req->timeout_us > KMORPH_HANDOVER_MAX_US)
		return -EINVAL;
	mutex_lock(&handover_mutex);
	region = find_idle(req->key, &ret);
	if (!region)
		goto unlock;
	if (req->instance && !shared_with(region, req->instance)) {
		ret = -EACCES;
		goto unlock;
	}
	if (region->writer == req->instance)
		goto unlock;
	if (region->writer) {
		ret = revoke(region, req);
		if (ret)
			goto unlock;
	}
	region->writer = req->instance;
	write_tables(region, req->instance);
unlock:
	mutex_unlock(&handover_mutex);
	return ret;
}

/* Every CPU of the instance has been seen stopped: it writes nowhere any more. */
void kmorph_handover_stop(struct kmorph_inst *inst)
{
	struct region *region;

	mutex_lock(&handover_mutex);
	list_for_each_entry(region, &regions, list) {
		drop_share(region, inst->id);
		if (region->writer != inst->id)
			continue;
		region->writer = 0;
		write_tables(region, 0);
	}
	mutex_unlock(&handover_mutex);
}

void kmorph_handover_exit(void)
{
	struct region *region, *next;

	mutex_lock(&handover_mutex);
	list_for_each_entry_safe(region, next, &regions, list)
		forget(region);
	mutex_unlock(&handover_mutex);
}
