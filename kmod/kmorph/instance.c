// SPDX-License-Identifier: GPL-2.0
/*
 * Instances: who owns which CPUs and which memory. They belong to the module,
 * not to the open file: a daemon that comes back finds them.
 */
#include "kmorph.h"

#include <linux/delay.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#define MAX_ID		511
#define MIN_PULSE_US	1000
#define MAX_PULSE_US	1000000

/* By slot; under kmorph_lock. */
static struct kmorph_inst *instances[KMORPH_MAX_INSTANCES];

static void inst_release(struct kref *ref)
{
	struct kmorph_inst *inst = container_of(ref, struct kmorph_inst, ref);

	kmorph_tables_free(inst);
	kmorph_unmap(inst->ctl);
	kmorph_unmap(inst->low);
	kfree(inst);
}

void kmorph_inst_put(struct kmorph_inst *inst)
{
	kref_put(&inst->ref, inst_release);
}

static struct kmorph_inst *find(u32 id)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(instances); i++)
		if (instances[i] && instances[i]->id == id)
			return instances[i];
	return NULL;
}

struct kmorph_inst *kmorph_inst_get(u32 id)
{
	struct kmorph_inst *inst;

	mutex_lock(&kmorph_lock);
	inst = find(id);
	if (inst)
		kref_get(&inst->ref);
	mutex_unlock(&kmorph_lock);
	return inst;
}

/* The instance, held for a long operation; others go on with other instances. */
struct kmorph_inst *kmorph_inst_lock(u32 id, int *err)
{
	struct kmorph_inst *inst = kmorph_inst_get(id);

	*err = -ENOENT;
	if (!inst)
		return NULL;
	if (mutex_lock_interruptible(&inst->op)) {
		*err = -ERESTARTSYS;
		kmorph_inst_put(inst);
		return NULL;
	}
	if (inst->gone) {
		kmorph_inst_unlock(inst);
		*err = -ENOENT;
		return NULL;
	}
	return inst;
}

void kmorph_inst_unlock(struct kmorph_inst *inst)
{
	mutex_unlock(&inst->op);
	kmorph_inst_put(inst);
}

static bool owns(const struct kmorph_inst *inst, u64 base, u64 size)
{
	u32 i;

	if (kmorph_overlaps(base, size, inst->base, inst->size))
		return true;
	for (i = 0; i < inst->extent_count; i++)
		if (kmorph_overlaps(base, size, inst->extent[i].base, inst->extent[i].size))
			return true;
	return false;
}

/* Does any instance own a part of the range? Called with kmorph_lock held. */
bool kmorph_inst_covers(u64 base, u64 size)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(instances); i++)
		if (instances[i] && owns(instances[i], base, size))
			return true;
	return false;
}

/* Is the range free for an instance? Called with kmorph_lock held. */
static int check_free(u64 base, u64 size)
{
	if (!kmorph_pool_find(base, size))
		return -ENOENT;
	if (kmorph_inst_covers(base, size) || kmorph_link_covers(base, size) ||
	    kmorph_handover_covers(base, size))
		return -EBUSY;
	return 0;
}

/* The low slice that holds the range. Called with kmorph_lock held. */
struct kmorph_slot *kmorph_inst_slot_at(u64 base, u64 size)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(instances); i++)
		if (instances[i] && kmorph_inside(base, size, instances[i]->slot->base,
						  instances[i]->slot->size))
			return instances[i]->slot;
	return NULL;
}

static void describe(struct kmorph_inst *inst, struct kmorph_instance *out)
{
	out->id = inst->id;
	out->state = inst->state;
	out->incarnation = inst->incarnation;
	out->base = inst->base;
	out->size = inst->size;
	out->control = inst->control;
	out->pulse_us = inst->pulse_us;
	out->cpu_count = inst->cpu_count;
	memset(out->apicid, 0, sizeof(out->apicid));
	memcpy(out->apicid, inst->apicid, inst->cpu_count * sizeof(u32));
	out->trampoline = inst->slot->trampoline;
	out->low_base = inst->slot->base;
	out->low_size = inst->slot->size;
	out->started_ns = inst->started_ns;
	out->stopped_cpus = inst->stopped_cpus;
	out->extent_count = inst->extent_count;
	memset(out->extent, 0, sizeof(out->extent));
	memcpy(out->extent, inst->extent, inst->extent_count * sizeof(inst->extent[0]));
}

static void set_gone(struct kmorph_inst *inst, bool gone)
{
	mutex_lock(&kmorph_lock);
	inst->gone = gone;
	mutex_unlock(&kmorph_lock);
}

static int check_request(const struct kmorph_instance *req)
{
	u32 i, j;

	if (!req->id || req->id > MAX_ID)
		return -EINVAL;
	if (!kmorph_range_ok(req->base, req->size))
		return -EINVAL;
	if (!PAGE_ALIGNED(req->control) ||
	    !kmorph_inside(req->control, KMORPH_CTL_SIZE, req->base, req->size))
		return -EINVAL;
	if (req->pulse_us && (req->pulse_us < MIN_PULSE_US || req->pulse_us > MAX_PULSE_US))
		return -EINVAL;
	if (!req->cpu_count || req->cpu_count > KMORPH_MAX_CPUS)
		return -EINVAL;
	for (i = 0; i < req->cpu_count; i++)
		for (j = 0; j < i; j++)
			if (req->apicid[i] == req->apicid[j])
				return -EINVAL;
	return 0;
}

static int lend_cpus(struct kmorph_inst *inst)
{
	u32 i;
	int ret = 0;

	for (i = 0; i < inst->cpu_count && !ret; i++)
		ret = kmorph_cpu_lend(inst->apicid[i], inst->id);
	if (ret)
		for (i--; i > 0; i--)
			kmorph_cpu_unlend(inst->apicid[i - 1], inst->id);
	return ret;
}

static int claim(struct kmorph_inst *inst)
{
	int ret;

	if (find(inst->id))
		return -EEXIST;
	ret = check_free(inst->base, inst->size);
	if (ret)
		return ret;
	inst->slot = kmorph_lowmem_get();
	if (!inst->slot)
		return -ENOSPC;
	ret = lend_cpus(inst);
	if (ret)
		kmorph_lowmem_put(inst->slot);
	return ret;
}

static void unclaim(struct kmorph_inst *inst)
{
	u32 i;

	for (i = 0; i < inst->cpu_count; i++)
		kmorph_cpu_unlend(inst->apicid[i], inst->id);
	kmorph_lowmem_put(inst->slot);
}

int kmorph_instance_create(struct kmorph_instance *req)
{
	struct kmorph_inst *inst;
	int ret = check_request(req);

	if (ret)
		return ret;
	inst = kzalloc(sizeof(*inst), GFP_KERNEL);
	if (!inst)
		return -ENOMEM;
	kref_init(&inst->ref);
	mutex_init(&inst->op);
	inst->id = req->id;
	inst->state = KMORPH_INST_CREATED;
	inst->incarnation = req->incarnation;
	inst->base = req->base;
	inst->size = req->size;
	inst->control = req->control;
	inst->pulse_us = req->pulse_us;
	inst->cpu_count = req->cpu_count;
	memcpy(inst->apicid, req->apicid, req->cpu_count * sizeof(u32));

	kmorph_links_reap();
	mutex_lock(&kmorph_lock);
	ret = claim(inst);
	if (ret)
		goto put;
	ret = -ENOMEM;
	inst->ctl = kmorph_map(inst->control, KMORPH_CTL_SIZE);
	if (!inst->ctl)
		goto unclaim;
	inst->low = kmorph_map(inst->slot->trampoline, PAGE_SIZE);
	if (!inst->low)
		goto unclaim;
	kmorph_ctl_format(inst);
	instances[inst->slot->index] = inst;
	/* The module stays while it has an instance to answer for. */
	__module_get(THIS_MODULE);
	describe(inst, req);
	mutex_unlock(&kmorph_lock);
	pr_info("instance %u: %#llx+%#llx, %u CPU(s), low memory %#llx\n", inst->id, inst->base,
		inst->size, inst->cpu_count, (u64)inst->slot->base);
	return 0;

unclaim:
	unclaim(inst);
put:
	mutex_unlock(&kmorph_lock);
	kmorph_inst_put(inst);
	return ret;
}

int kmorph_instance_query(struct kmorph_instance *req)
{
	struct kmorph_inst *inst;
	int ret = -ENOENT;

	mutex_lock(&kmorph_lock);
	inst = find(req->id);
	if (inst) {
		describe(inst, req);
		ret = 0;
	}
	mutex_unlock(&kmorph_lock);
	return ret;
}

int kmorph_instance_list(struct kmorph_instance_list *req)
{
	unsigned int i;

	if (req->reserved)
		return -EINVAL;
	memset(req->id, 0, sizeof(req->id));
	req->count = 0;
	mutex_lock(&kmorph_lock);
	for (i = 0; i < ARRAY_SIZE(instances); i++)
		if (instances[i])
			req->id[req->count++] = instances[i]->id;
	mutex_unlock(&kmorph_lock);
	return 0;
}

int kmorph_instance_destroy(struct kmorph_ref *req)
{
	struct kmorph_inst *inst;
	int ret;

	inst = kmorph_inst_lock(req->id, &ret);
	if (!inst)
		return ret;
	if (inst->state != KMORPH_INST_CREATED && inst->state != KMORPH_INST_STOPPED) {
		ret = -EBUSY;
		goto unlock;
	}
	/* First: no link may come after those that are ended. */
	set_gone(inst, true);
	ret = kmorph_links_forget(inst);
	if (ret) {
		set_gone(inst, false);
		goto unlock;
	}
	mutex_lock(&kmorph_lock);
	instances[inst->slot->index] = NULL;
	unclaim(inst);
	mutex_unlock(&kmorph_lock);
	pr_info("instance %u: destroyed\n", inst->id);
	kmorph_inst_put(inst);
	kmorph_inst_unlock(inst);
	module_put(THIS_MODULE);
	return 0;
unlock:
	kmorph_inst_unlock(inst);
	return ret;
}

/* A CPU that has no interrupt table yet would reset the machine. */
static bool may_take_nmi(struct kmorph_inst *inst, u32 index)
{
	return !kmorph_ctl_absent(inst) &&
	       (index == 0 || kmorph_ctl_cpu_online(inst, inst->apicid[index]));
}

int kmorph_instance_nmi(struct kmorph_ref *req)
{
	struct kmorph_inst *inst;
	int ret;

	/* Not while a CPU may be in the trampoline, where an NMI ends the machine. */
	inst = kmorph_inst_lock(req->id, &ret);
	if (!inst)
		return ret;
	ret = 0;
	if (req->cpu >= inst->cpu_count)
		ret = -EINVAL;
	else if (inst->state != KMORPH_INST_RUNNING || !may_take_nmi(inst, req->cpu))
		ret = -ENXIO;
	else
		kmorph_nmi(inst->apicid[req->cpu]);
	kmorph_inst_unlock(inst);
	return ret;
}

static int find_apicid(const struct kmorph_inst *inst, u32 apicid)
{
	u32 i;

	for (i = 0; i < inst->cpu_count; i++)
		if (inst->apicid[i] == apicid)
			return i;
	return -ENOENT;
}

static int assign(struct kmorph_inst *inst, struct kmorph_cpu *req)
{
	int ret = -ENOSPC;

	mutex_lock(&kmorph_lock);
	if (inst->cpu_count < KMORPH_MAX_CPUS)
		ret = kmorph_cpu_lend(req->apicid, inst->id);
	if (!ret && inst->state == KMORPH_INST_RUNNING) {
		ret = kmorph_owner_set(req->apicid, inst->id);
		if (ret)
			kmorph_cpu_unlend(req->apicid, inst->id);
	}
	if (!ret) {
		inst->apicid[inst->cpu_count++] = req->apicid;
		kmorph_ctl_grants(inst);
	}
	kmorph_cpu_describe(req);
	mutex_unlock(&kmorph_lock);
	return ret;
}

static int withdraw(struct kmorph_inst *inst, struct kmorph_cpu *req)
{
	int index = find_apicid(inst, req->apicid);

	if (index < 0)
		return index;
	if (index == 0)
		return -EBUSY;
	if (inst->state == KMORPH_INST_RUNNING) {
		/* Without its module nobody says where the kernel runs. */
		if (!kmorph_ctl_ready(inst) || kmorph_ctl_cpu_online(inst, req->apicid))
			return -EBUSY;
		if (!kmorph_fence_one(inst, index))
			return -ETIMEDOUT;
		kmorph_owner_clear(req->apicid);
		/* On return nobody is about to ring there. */
		synchronize_rcu_expedited();
	}
	mutex_lock(&kmorph_lock);
	inst->cpu_count--;
	memmove(&inst->apicid[index], &inst->apicid[index + 1],
		(inst->cpu_count - index) * sizeof(u32));
	kmorph_cpu_unlend(req->apicid, inst->id);
	kmorph_ctl_grants(inst);
	kmorph_cpu_describe(req);
	mutex_unlock(&kmorph_lock);
	return 0;
}

static int change_cpus(struct kmorph_cpu *req,
		       int (*change)(struct kmorph_inst *inst, struct kmorph_cpu *req))
{
	struct kmorph_inst *inst;
	int ret;

	inst = kmorph_inst_lock(req->instance, &ret);
	if (!inst)
		return ret;
	ret = inst->state == KMORPH_INST_STUCK ? -EBUSY : change(inst, req);
	if (!ret)
		kmorph_links_write_peers(inst);
	kmorph_inst_unlock(inst);
	return ret;
}

int kmorph_cpu_assign(struct kmorph_cpu *req)
{
	return change_cpus(req, assign);
}

int kmorph_cpu_withdraw(struct kmorph_cpu *req)
{
	return change_cpus(req, withdraw);
}

static int add_extent(struct kmorph_inst *inst, const struct kmorph_memory *req)
{
	struct kmorph_extent *extent;
	int ret;

	mutex_lock(&kmorph_lock);
	ret = inst->extent_count < KMORPH_MAX_EXTENTS ? check_free(req->base, req->size) : -ENOSPC;
	if (!ret) {
		extent = &inst->extent[inst->extent_count++];
		extent->base = req->base;
		extent->size = req->size;
	}
	mutex_unlock(&kmorph_lock);
	return ret;
}

int kmorph_memory_assign(struct kmorph_memory *req)
{
	struct kmorph_inst *inst;
	int ret;

	req->memory_block = 0;
	if (req->reserved || !kmorph_range_ok(req->base, req->size))
		return -EINVAL;
	kmorph_links_reap();
	inst = kmorph_inst_lock(req->instance, &ret);
	if (!inst)
		return ret;
	req->memory_block = kmorph_ctl_memory_block(inst);
	if (inst->state != KMORPH_INST_RUNNING || !req->memory_block) {
		ret = -ENXIO;
	} else if (!is_power_of_2(req->memory_block) || req->memory_block < PAGE_SIZE ||
		   !IS_ALIGNED(req->base | req->size, req->memory_block)) {
		ret = -EINVAL;
	} else {
		ret = add_extent(inst, req);
		if (!ret) {
			kmorph_ctl_grants(inst);
			pr_info("instance %u: memory %#llx+%#llx\n", inst->id, req->base,
				req->size);
		}
	}
	kmorph_inst_unlock(inst);
	return ret;
}
