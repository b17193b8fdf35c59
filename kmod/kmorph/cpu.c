// SPDX-License-Identifier: GPL-2.0
/*
 * CPUs taken from this kernel. A taken CPU is offline, and a hot-plug callback
 * refuses to online it: the INIT of an onlining would hit a running instance.
 */
#include "kmorph.h"

#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <asm/apic.h>
#include <asm/smp.h>

#define NOT_TAKEN	(-1)

/* Owner by CPU number: NOT_TAKEN, 0 taken, else the instance. Written under kmorph_lock. */
static int owner[NR_CPUS] = { [0 ... NR_CPUS - 1] = NOT_TAKEN };
static enum cpuhp_state guard_state;
static DEFINE_MUTEX(cpu_mutex);

static int guard_prepare(unsigned int cpu)
{
	return READ_ONCE(owner[cpu]) == NOT_TAKEN ? 0 : -EBUSY;
}

int kmorph_cpu_init(void)
{
	int ret = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "kmorph:guard",
					    guard_prepare, NULL);

	if (ret < 0)
		return ret;
	guard_state = ret;
	return 0;
}

void kmorph_cpu_exit(void)
{
	cpuhp_remove_state_nocalls(guard_state);
}

static int find_cpu(u32 apicid)
{
	int cpu;

	for_each_present_cpu(cpu)
		if (per_cpu(x86_cpu_to_apicid, cpu) == apicid)
			return cpu;
	return -ENODEV;
}

u32 kmorph_boot_apicid(void)
{
	return boot_cpu_physical_apicid;
}

static bool is_boot(int cpu, u32 apicid)
{
	return cpu == 0 || apicid == boot_cpu_physical_apicid;
}

static void describe(int cpu, struct kmorph_cpu *out)
{
	int by = owner[cpu];

	out->apicid = per_cpu(x86_cpu_to_apicid, cpu);
	out->cpu = cpu;
	out->instance = by > 0 ? by : 0;
	if (by > 0)
		out->state = KMORPH_CPU_LENT;
	else if (by == 0)
		out->state = KMORPH_CPU_TAKEN;
	else
		out->state = cpu_online(cpu) ? KMORPH_CPU_ONLINE : KMORPH_CPU_OFFLINE;
}

static void set_owner(int cpu, int by)
{
	mutex_lock(&kmorph_lock);
	WRITE_ONCE(owner[cpu], by);
	mutex_unlock(&kmorph_lock);
}

int kmorph_cpu_take(struct kmorph_cpu *req)
{
	int cpu, ret;

	mutex_lock(&cpu_mutex);
	cpu = find_cpu(req->apicid);
	if (cpu < 0) {
		ret = cpu;
		goto out;
	}
	if (is_boot(cpu, req->apicid)) {
		ret = -EBUSY;
		goto describe;
	}
	if (owner[cpu] != NOT_TAKEN) {
		ret = owner[cpu] ? -EBUSY : -EALREADY;
		goto describe;
	}
	/* Mark first: once remove_cpu() has returned nothing can online it. */
	set_owner(cpu, 0);
	/* Also when it is offline: it may be coming online, past the mark, and this waits. */
	ret = remove_cpu(cpu);
	if (ret > 0)	/* it was offline */
		ret = 0;
	if (!ret && cpu_online(cpu))
		ret = -EBUSY;
	if (ret)
		set_owner(cpu, NOT_TAKEN);
describe:
	describe(cpu, req);
out:
	mutex_unlock(&cpu_mutex);
	return ret;
}

int kmorph_cpu_give(struct kmorph_cpu *req)
{
	int cpu, ret;

	mutex_lock(&cpu_mutex);
	cpu = find_cpu(req->apicid);
	if (cpu < 0) {
		ret = cpu;
		goto out;
	}
	mutex_lock(&kmorph_lock);
	ret = owner[cpu] == NOT_TAKEN ? -EALREADY : owner[cpu] ? -EBUSY : 0;
	if (!ret)
		WRITE_ONCE(owner[cpu], NOT_TAKEN);
	mutex_unlock(&kmorph_lock);
	if (!ret) {
		ret = add_cpu(cpu);
		if (ret > 0)
			ret = 0;
		if (ret && !cpu_online(cpu))
			set_owner(cpu, 0);
	}
	describe(cpu, req);
out:
	mutex_unlock(&cpu_mutex);
	return ret;
}

int kmorph_cpu_list(struct kmorph_cpu_list *req)
{
	int cpu;
	u32 n = 0;

	if (req->reserved)
		return -EINVAL;
	memset(req->cpu, 0, sizeof(req->cpu));
	mutex_lock(&kmorph_lock);
	for_each_present_cpu(cpu) {
		if (n >= KMORPH_MAX_MACHINE_CPUS)
			break;
		req->cpu[n].head.size = sizeof(req->cpu[n]);
		req->cpu[n].head.version = KMORPH_ABI_VERSION;
		describe(cpu, &req->cpu[n]);
		n++;
	}
	mutex_unlock(&kmorph_lock);
	req->count = n;
	return 0;
}

/* Give a taken CPU to an instance. Called with kmorph_lock held. */
int kmorph_cpu_lend(u32 apicid, u32 instance)
{
	int cpu = find_cpu(apicid);

	if (cpu < 0)
		return cpu;
	if (is_boot(cpu, apicid) || owner[cpu] || cpu_online(cpu))
		return -EBUSY;
	WRITE_ONCE(owner[cpu], instance);
	return 0;
}

/* Back to taken. Called with kmorph_lock held. */
void kmorph_cpu_unlend(u32 apicid, u32 instance)
{
	int cpu = find_cpu(apicid);

	if (cpu >= 0 && owner[cpu] == instance)
		WRITE_ONCE(owner[cpu], 0);
}

/* Fill in what is known of req->apicid. Called with kmorph_lock held. */
void kmorph_cpu_describe(struct kmorph_cpu *req)
{
	int cpu = find_cpu(req->apicid);

	if (cpu >= 0)
		describe(cpu, req);
}
