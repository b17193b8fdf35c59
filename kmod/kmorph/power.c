// SPDX-License-Identifier: GPL-2.0
/*
 * Starting and stopping the CPUs of an instance.
 *
 * Stopping is a fence, and a fence is believed only when confirmed: every CPU is
 * INITed, then started again in the trampoline's parking stub, where it writes
 * this stop's nonce into the line of its own APIC id. A CPU that does so has left
 * the instance's kernel for good. The last INIT leaves it waiting for a SIPI.
 */
#include "kmorph.h"
#include "trampoline.h"

#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/random.h>
#include <linux/rcupdate.h>
#include <asm/cpufeature.h>
#include <asm/msr.h>

#define INIT_WAIT_US		10000
#define SIPI_WAIT_US		300
/*
 * A CPU answers within 20 ms. The limits are for one that cannot be stopped or
 * started at all; a virtual one may stand still for a second and still come.
 */
#define START_TIMEOUT_US	3000000
#define PARK_TIMEOUT_US		1000000
#define PARK_TRIES		2

/*
 * What MTRRdefType becomes on a CPU whose INIT has cleared the MTRRs: on, all
 * memory write-back. Not a copy of this CPU's: its ranges are cleared as well,
 * and the default of a firmware that lists its RAM in ranges is uncached. The
 * fixed ranges stay off, since those have been cleared, too.
 */
#define MTRR_DEFTYPE		(BIT(11) | 6)

static struct kmorph_t_data *page_data(struct kmorph_inst *inst)
{
	return inst->low + (kmorph_t_data - kmorph_trampoline);
}

static void fill_page(struct kmorph_inst *inst, u32 mode)
{
	phys_addr_t page = inst->slot->trampoline;
	size_t length = kmorph_trampoline_end - kmorph_trampoline;
	struct kmorph_t_data *data = page_data(inst);
	u32 i;

	BUILD_BUG_ON(sizeof(struct kmorph_t_data) != KMORPH_T_DATA_SIZE);
	memset(inst->low, 0, PAGE_SIZE);
	memcpy(inst->low, kmorph_trampoline, length);
#define PATCH(at, to) \
	(*(u32 *)(inst->low + ((at) - kmorph_trampoline)) = page + ((to) - kmorph_trampoline))
	PATCH(kmorph_t_gdtr_base, kmorph_t_gdt);
	PATCH(kmorph_t_far32, kmorph_t_pm32);
	PATCH(kmorph_t_far64, kmorph_t_lm64);
#undef PATCH
	data->mode = mode;
	data->mtrr = boot_cpu_has(X86_FEATURE_MTRR) ? MTRR_DEFTYPE : 0;
	data->count = inst->cpu_count;
	for (i = 0; i < inst->cpu_count; i++)
		data->cpu[i].apicid = inst->apicid[i];
}

/* INIT; with @wait long enough for a SIPI to follow at once. */
static void init_cpus(struct kmorph_inst *inst, u64 mask, bool wait)
{
	u32 i;

	for (i = 0; i < inst->cpu_count; i++)
		if (mask & BIT_ULL(i))
			kmorph_init_assert(inst->apicid[i]);
	if (wait)
		usleep_range(INIT_WAIT_US, INIT_WAIT_US + 500);
	for (i = 0; i < inst->cpu_count; i++)
		if (mask & BIT_ULL(i))
			kmorph_init_deassert(inst->apicid[i]);
}

static u64 all_cpus(const struct kmorph_inst *inst)
{
	return GENMASK_ULL(inst->cpu_count - 1, 0);
}

/* Start the CPUs of the mask in the parking stub; returns those that got there. */
static u64 park_cpus(struct kmorph_inst *inst, u64 mask)
{
	struct kmorph_t_data *data = page_data(inst);
	ktime_t limit;
	u64 parked = 0;
	u32 i;

	fill_page(inst, KMORPH_T_MODE_PARK);
	data->nonce = get_random_u32() | 1;
	smp_mb();	/* the page before the SIPI */
	for (i = 0; i < inst->cpu_count; i++)
		if (mask & BIT_ULL(i))
			kmorph_sipi(inst->apicid[i], inst->slot->trampoline);
	limit = ktime_add_us(ktime_get(), PARK_TIMEOUT_US);
	for (;;) {
		bool last = ktime_after(ktime_get(), limit);

		for (i = 0; i < inst->cpu_count; i++)
			if ((mask & BIT_ULL(i)) &&
			    READ_ONCE(data->cpu[i].acknowledged) == data->nonce)
				parked |= BIT_ULL(i);
		if (parked == mask || last)
			return parked;
		usleep_range(50, 150);
	}
}

/* The fence. Returns the CPUs seen stopped. */
static u64 fence(struct kmorph_inst *inst)
{
	u64 all = all_cpus(inst), stopped = 0;
	unsigned int try;

	for (try = 0; try < PARK_TRIES && stopped != all; try++) {
		init_cpus(inst, all & ~stopped, true);
		stopped |= park_cpus(inst, all & ~stopped);
	}
	init_cpus(inst, stopped, false);
	return stopped;
}

/* The same for one CPU of an instance that goes on running on the others. */
bool kmorph_fence_one(struct kmorph_inst *inst, u32 index)
{
	u64 mask = BIT_ULL(index), stopped = 0;
	unsigned int try;

	for (try = 0; try < PARK_TRIES && !stopped; try++) {
		init_cpus(inst, mask, true);
		stopped = park_cpus(inst, mask);
	}
	init_cpus(inst, stopped, false);
	return stopped;
}

static void set_state(struct kmorph_inst *inst, u32 state, u64 stopped)
{
	mutex_lock(&kmorph_lock);
	inst->state = state;
	inst->stopped_cpus = stopped;
	mutex_unlock(&kmorph_lock);
}

/* Nobody may ring there any more; on return nobody is about to. */
static void disown(struct kmorph_inst *inst)
{
	u32 i;

	for (i = 0; i < inst->cpu_count; i++)
		kmorph_owner_clear(inst->apicid[i]);
	synchronize_rcu_expedited();
}

static int own(struct kmorph_inst *inst)
{
	u32 i;
	int ret = 0;

	for (i = 0; i < inst->cpu_count && !ret; i++)
		ret = kmorph_owner_set(inst->apicid[i], inst->id);
	if (ret)
		disown(inst);
	return ret;
}

static u32 boot_first_cpu(struct kmorph_inst *inst, u64 entry, u64 boot_params)
{
	struct kmorph_t_data *data = page_data(inst);
	ktime_t limit;
	u32 stage;
	unsigned int try;

	fill_page(inst, KMORPH_T_MODE_BOOT);
	data->cr3 = kmorph_tables_root(inst);
	data->entry = entry;
	data->rsi = boot_params;
	smp_mb();	/* the page before the SIPI */
	init_cpus(inst, BIT_ULL(0), true);
	for (try = 0; try < 2 && !READ_ONCE(data->stage); try++) {
		kmorph_sipi(inst->apicid[0], inst->slot->trampoline);
		udelay(SIPI_WAIT_US);
	}
	limit = ktime_add_us(ktime_get(), START_TIMEOUT_US);
	for (;;) {
		bool last = ktime_after(ktime_get(), limit);

		stage = READ_ONCE(data->stage);
		if (stage == KMORPH_T_STAGE_LONG || last)
			return stage;
		usleep_range(50, 150);
	}
}

static int start_locked(struct kmorph_inst *inst, struct kmorph_start *req)
{
	u32 before = inst->state;
	u64 stopped;
	int ret;

	if (before != KMORPH_INST_CREATED && before != KMORPH_INST_STOPPED)
		return -EBUSY;
	if (!kmorph_inside(req->entry, 1, inst->base, inst->size) ||
	    !kmorph_inside(req->boot_params, PAGE_SIZE, inst->base, inst->size))
		return -EINVAL;
	/* Nothing of this kernel may still be using an area of its last life. */
	ret = kmorph_links_settle(inst);
	if (ret)
		return ret;
	ret = kmorph_tables_build(inst);
	if (ret)
		return ret;
	ret = own(inst);
	if (ret)
		goto free_tables;
	kmorph_ctl_format(inst);
	kmorph_links_write(inst);
	kmorph_ctl_watch(inst);
	kmorph_elcr_hold(inst);

	mutex_lock(&kmorph_lock);
	inst->state = KMORPH_INST_RUNNING;
	inst->stopped_cpus = 0;
	inst->started_ns = ktime_get_ns();
	mutex_unlock(&kmorph_lock);
	req->started_ns = inst->started_ns;
	req->started_tsc = rdtsc();
	req->stage = boot_first_cpu(inst, req->entry, req->boot_params);
	if (req->stage == KMORPH_T_STAGE_LONG) {
		pr_info("instance %u: started at %#llx on apicid %u\n", inst->id, req->entry,
			inst->apicid[0]);
		return 0;
	}

	pr_err("instance %u: apicid %u came to stage %u only\n", inst->id, inst->apicid[0],
	       req->stage);
	kmorph_elcr_restore(inst);
	kmorph_ctl_unwatch(inst);
	stopped = fence(inst);
	disown(inst);
	if (stopped != all_cpus(inst)) {
		set_state(inst, KMORPH_INST_STUCK, stopped);
		return -ETIMEDOUT;
	}
	set_state(inst, before, before == KMORPH_INST_STOPPED ? stopped : 0);
	ret = -ETIMEDOUT;
free_tables:
	kmorph_tables_free(inst);
	return ret;
}

int kmorph_start(struct kmorph_start *req)
{
	struct kmorph_inst *inst;
	int ret;

	req->stage = 0;
	inst = kmorph_inst_lock(req->id, &ret);
	if (!inst)
		return ret;
	ret = start_locked(inst, req);
	kmorph_inst_unlock(inst);
	return ret;
}

static int stop_locked(struct kmorph_inst *inst, struct kmorph_stop *req)
{
	ktime_t begin = ktime_get();
	u64 all = all_cpus(inst), stopped;

	/* No kernel has run, or it has been seen stopped: there is nothing to fence. */
	if (inst->state == KMORPH_INST_CREATED || inst->state == KMORPH_INST_STOPPED) {
		req->stopped_cpus = all;
		req->duration_ns = 0;
		return 0;
	}
	stopped = fence(inst);
	/* Even where a CPU did not confirm: to the outside the instance is gone. */
	disown(inst);
	kmorph_ctl_unwatch(inst);
	kmorph_elcr_restore(inst);
	/* Before the links, whose lock may be held by who waits for just this. */
	set_state(inst, stopped == all ? KMORPH_INST_STOPPED : KMORPH_INST_STUCK, stopped);
	kmorph_links_stop(inst);
	if (stopped == all) {
		kmorph_handover_stop(inst);
		kmorph_tables_free(inst);
	}
	req->stopped_cpus = stopped;
	req->duration_ns = ktime_to_ns(ktime_sub(ktime_get(), begin));
	kmorph_event(KMORPH_EV_STOPPED, inst, 0, 0, stopped, NULL);
	if (stopped == all) {
		pr_info("instance %u: stopped in %llu us\n", inst->id, req->duration_ns / 1000);
		return 0;
	}
	pr_err("instance %u: CPUs %#llx of %#llx confirmed the stop\n", inst->id, stopped, all);
	return -ETIMEDOUT;
}

/*
 * Holds the instance's own lock only, so that several instances can be stopped
 * at once, beside all other calls.
 */
int kmorph_stop(struct kmorph_stop *req)
{
	struct kmorph_inst *inst;
	int ret;

	if (req->reserved)
		return -EINVAL;
	req->stopped_cpus = 0;
	req->duration_ns = 0;
	inst = kmorph_inst_lock(req->id, &ret);
	if (!inst)
		return ret;
	ret = stop_locked(inst, req);
	kmorph_inst_unlock(inst);
	return ret;
}
