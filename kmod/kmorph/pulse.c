// SPDX-License-Identifier: GPL-2.0
/*
 * The pulse: a timer on every online CPU that counts in the CPU's line of the
 * control area. It says that the CPU takes interrupts and that time passes.
 */
#include "kmorph.h"

#include <linux/cpuhotplug.h>
#include <linux/hrtimer.h>
#include <linux/percpu.h>
#include <linux/smp.h>
#include <asm/smp.h>

struct pulse {
	struct hrtimer timer;
	struct kmorph_ctl_pulse *line;
	u64 count;
	u64 last_tsc;
	u64 max_gap;
};

static DEFINE_PER_CPU(struct pulse, pulses);
static enum cpuhp_state pulse_state;
static ktime_t period;

static enum hrtimer_restart pulse_beat(struct hrtimer *timer)
{
	struct pulse *pulse = container_of(timer, struct pulse, timer);
	u64 now = rdtsc();

	if (pulse->last_tsc && now - pulse->last_tsc > pulse->max_gap) {
		pulse->max_gap = now - pulse->last_tsc;
		WRITE_ONCE(pulse->line->max_gap_tsc, pulse->max_gap);
	}
	pulse->last_tsc = now;
	WRITE_ONCE(pulse->line->tsc, now);
	smp_store_release(&pulse->line->count, ++pulse->count);
	hrtimer_forward_now(timer, period);
	return HRTIMER_RESTART;
}

static int pulse_online(unsigned int cpu)
{
	struct pulse *pulse = this_cpu_ptr(&pulses);

	if (cpu >= KMORPH_CTL_CPUS)
		return 0;
	pulse->line = kmorph_guest_pulse(cpu);
	pulse->last_tsc = 0;
	WRITE_ONCE(pulse->line->apicid, per_cpu(x86_cpu_to_apicid, cpu));
	smp_store_release(&pulse->line->online, 1);
#ifdef HAVE_HRTIMER_SETUP
	hrtimer_setup(&pulse->timer, pulse_beat, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
#else
	hrtimer_init(&pulse->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	pulse->timer.function = pulse_beat;
#endif
	hrtimer_start(&pulse->timer, period, HRTIMER_MODE_REL_PINNED_HARD);
	return 0;
}

static int pulse_offline(unsigned int cpu)
{
	struct pulse *pulse = this_cpu_ptr(&pulses);

	if (cpu >= KMORPH_CTL_CPUS)
		return 0;
	hrtimer_cancel(&pulse->timer);
	smp_store_release(&pulse->line->online, 0);
	return 0;
}

int kmorph_pulse_init(u32 period_us)
{
	int ret;

	period = ns_to_ktime((u64)period_us * NSEC_PER_USEC);
	ret = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "kmorph:pulse", pulse_online, pulse_offline);
	if (ret < 0)
		return ret;
	pulse_state = ret;
	return 0;
}

void kmorph_pulse_exit(void)
{
	cpuhp_remove_state(pulse_state);
}
