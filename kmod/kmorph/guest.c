// SPDX-License-Identifier: GPL-2.0
/*
 * The instance role: this kernel's half of its control area.
 */
#include "kmorph.h"

#include <linux/cpu.h>
#include <linux/ioport.h>
#include <linux/random.h>
#include <linux/spinlock.h>
#include <linux/utsname.h>

#define MAX_ID		511
#define MIN_PULSE_US	1000
#define MAX_PULSE_US	1000000

static void *area;
/* One notice at a time, from any context; a dying CPU must not wait for another. */
static arch_spinlock_t notice_lock = __ARCH_SPIN_LOCK_UNLOCKED;

struct kmorph_ctl_primary *kmorph_guest_primary(void)
{
	return area + KMORPH_CTL_OFF_PRIMARY;
}

struct kmorph_ctl_grants *kmorph_guest_grants(void)
{
	return area + KMORPH_CTL_OFF_GRANTS;
}

struct kmorph_ctl_links *kmorph_guest_links(void)
{
	return area + KMORPH_CTL_OFF_LINKS;
}

struct kmorph_ctl_handovers *kmorph_guest_handovers(void)
{
	return area + KMORPH_CTL_OFF_HANDOVERS;
}

struct kmorph_ctl_instance *kmorph_guest_self(void)
{
	return area + KMORPH_CTL_OFF_INSTANCE;
}

struct kmorph_ctl_pulse *kmorph_guest_pulse(unsigned int cpu)
{
	struct kmorph_ctl_pulse *lines = area + KMORPH_CTL_OFF_PULSE;

	return &lines[cpu];
}

/* Ring the primary: at the address it has published, and nowhere else. */
void kmorph_guest_ring(void)
{
	u64 address = READ_ONCE(kmorph_guest_primary()->door);

	if (kmorph_vector_ok(address))
		kmorph_ipi(address >> 32, (u32)address);
}

int kmorph_guest_ring_peer(u32 peer, u64 address)
{
	if (peer == KMORPH_PRIMARY_ID) {
		/* The area of the link says it as well, but this word is the primary's own. */
		kmorph_guest_ring();
		return 0;
	}
	if (!kmorph_guest_link_apicid_ok(peer, address >> 32))
		return -EINVAL;
	kmorph_ipi(address >> 32, (u32)address);
	return 0;
}

void kmorph_guest_publish_door(u64 address)
{
	WRITE_ONCE(kmorph_guest_self()->door, address);
}

/**
 * kmorph_guest_state - tell the primary how this kernel is
 * @state: enum kmorph_ctl_state
 * @text: why, may be NULL
 *
 * Any context, also the last one of a dying CPU: so a CPU that finds another
 * one writing tries for a while, then writes all the same.
 */
void kmorph_guest_state(u32 state, const char *text)
{
	struct kmorph_ctl_instance *self = kmorph_guest_self();
	unsigned long flags;
	unsigned int tries;
	bool locked = false;

	local_irq_save(flags);
	for (tries = 0; tries < 100000 && !locked; tries++) {
		locked = arch_spin_trylock(&notice_lock);
		cpu_relax();
	}
	if (state != KMORPH_CTL_READY) {
		self->end_tsc = rdtsc();
		self->end_cpu = raw_smp_processor_id();
	}
	strscpy(self->text, text ?: "", sizeof(self->text));
	smp_store_release(&self->state, state);
	smp_store_release(&self->notices, self->notices + 1);
	smp_mb();	/* the notice before the ring */
	if (locked)
		arch_spin_unlock(&notice_lock);
	local_irq_restore(flags);
	kmorph_guest_ring();
}

bool kmorph_guest_hard(void)
{
	return kmorph_guest_link_changed() || kmorph_guest_handover_changed() ||
	       kmorph_guest_grants_changed();
}

void kmorph_guest_thread(void)
{
	/* First, and here: a kernel that takes over waits for the answer. */
	if (kmorph_guest_handover_changed())
		kmorph_guest_handover_follow();
	WRITE_ONCE(kmorph_guest_self()->cpus_online, num_online_cpus());
	if (kmorph_guest_link_changed())
		kmorph_guest_link_kick();
	if (kmorph_guest_grants_changed())
		kmorph_guest_grants_kick();
}

static int validate(phys_addr_t control)
{
	const struct kmorph_ctl_primary *ctl = kmorph_guest_primary();

	if (smp_load_acquire(&ctl->magic) != KMORPH_CTL_MAGIC) {
		pr_err("no control area at %pa\n", &control);
		return -ENXIO;
	}
	if (ctl->version != KMORPH_CTL_VERSION || ctl->size != KMORPH_CTL_SIZE) {
		pr_err("control area of version %u, size %#x: this module knows %u, %#llx\n",
		       ctl->version, ctl->size, KMORPH_CTL_VERSION, KMORPH_CTL_SIZE);
		return -EPROTO;
	}
	if (!ctl->instance_id || ctl->instance_id > MAX_ID ||
	    !kmorph_inside(control, KMORPH_CTL_SIZE, ctl->base, ctl->region_size) ||
	    ctl->pulse_us < MIN_PULSE_US || ctl->pulse_us > MAX_PULSE_US) {
		pr_err("control area at %pa: bad values\n", &control);
		return -EINVAL;
	}
	if (kmorph_guest_self()->state == KMORPH_CTL_READY)
		pr_warn("the control area has an owner already; it is taken over\n");
	return 0;
}

int kmorph_guest_init(phys_addr_t control)
{
	struct kmorph_ctl_instance *self;
	int ret;

	if (!kmorph_range_ok(control, KMORPH_CTL_SIZE))
		return -EINVAL;
	if (region_intersects(control, KMORPH_CTL_SIZE, IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) != REGION_DISJOINT) {
		pr_err("control=%pa is this kernel's own memory\n", &control);
		return -EINVAL;
	}
	area = kmorph_map(control, KMORPH_CTL_SIZE);
	if (!area)
		return -ENOMEM;
	ret = validate(control);
	if (ret)
		goto unmap;
	ret = kmorph_guest_grants_init();
	if (ret)
		goto unmap;
	ret = kmorph_guest_link_init();
	if (ret)
		goto grants;
	ret = kmorph_door_init();
	if (ret)
		goto links;
	ret = kmorph_pulse_init(kmorph_guest_primary()->pulse_us);
	if (ret)
		goto door;
	ret = kmorph_last_words_init();
	if (ret)
		goto pulse;
	ret = kmorph_dev_init();
	if (ret)
		goto last_words;
	ret = kmorph_guest_handover_init();
	if (ret)
		goto dev;

	self = kmorph_guest_self();
	do {
		self->boot_nonce = get_random_u64();
	} while (!self->boot_nonce);
	strscpy(self->release, init_utsname()->release, sizeof(self->release));
	self->cpus_online = num_online_cpus();
	self->ready_tsc = rdtsc();
	kmorph_guest_state(KMORPH_CTL_READY, NULL);
	kmorph_guest_handover_start();
	kmorph_guest_grants_kick();
	kmorph_guest_link_kick();
	pr_info("instance %u, pulse every %u us\n", kmorph_self_id(),
		kmorph_guest_primary()->pulse_us);
	return 0;

dev:
	kmorph_dev_exit();
last_words:
	kmorph_last_words_exit();
pulse:
	kmorph_pulse_exit();
door:
	kmorph_door_exit();
links:
	kmorph_guest_link_exit();
grants:
	kmorph_guest_grants_exit();
unmap:
	kmorph_unmap(area);
	return ret;
}

void kmorph_guest_exit(void)
{
	kmorph_dev_exit();
	kmorph_guest_handover_exit();
	kmorph_last_words_exit();
	kmorph_pulse_exit();
	WRITE_ONCE(kmorph_guest_self()->door, 0);
	kmorph_guest_state(KMORPH_CTL_LEFT, "kmorph.ko unloaded");
	kmorph_door_exit();
	WRITE_ONCE(kmorph_guest_self()->door, 0);
	kmorph_guest_link_exit();
	kmorph_guest_grants_exit();
	kmorph_unmap(area);
}
