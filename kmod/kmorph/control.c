// SPDX-License-Identifier: GPL-2.0
/*
 * The control areas of the instances, seen from the primary: written once when
 * an instance is made or started, then watched for what its kernel says. Every
 * value is read once; the writer may be dying or worse.
 */
#include "kmorph.h"

#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/spinlock.h>
#include <asm/tsc.h>

/* Edge/level register of the PIC: an instance that boots writes it once. */
#define PIC_ELCR_LOW	0x4d0
#define PIC_ELCR_HIGH	0x4d1

static DEFINE_RAW_SPINLOCK(ctl_lock);
static struct kmorph_inst *watched[KMORPH_MAX_INSTANCES];

static DEFINE_MUTEX(elcr_lock);
static unsigned int elcr_holders;
static u8 elcr[2];

static struct kmorph_ctl_primary *ctl_primary(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_PRIMARY;
}

static struct kmorph_ctl_instance *ctl_instance(struct kmorph_inst *inst)
{
	return inst->ctl + KMORPH_CTL_OFF_INSTANCE;
}

/* Make the area anew. Nothing runs in the instance, and it is not watched. */
void kmorph_ctl_format(struct kmorph_inst *inst)
{
	struct kmorph_ctl_primary *ctl = ctl_primary(inst);

	BUILD_BUG_ON(sizeof(struct kmorph_ctl_primary) > KMORPH_CTL_OFF_GRANTS);
	BUILD_BUG_ON(KMORPH_CTL_OFF_GRANTS + sizeof(struct kmorph_ctl_grants) >
		     KMORPH_CTL_OFF_LINKS);
	BUILD_BUG_ON(KMORPH_CTL_OFF_INSTANCE + sizeof(struct kmorph_ctl_instance) >
		     KMORPH_CTL_OFF_PULSE);
	BUILD_BUG_ON(KMORPH_MAX_CPUS > KMORPH_CTL_CPUS);
	BUILD_BUG_ON(KMORPH_MAX_EXTENTS > KMORPH_CTL_EXTENTS);
	BUILD_BUG_ON(KMORPH_CTL_OFF_LINKS + sizeof(struct kmorph_ctl_links) >
		     KMORPH_CTL_OFF_INSTANCE);
	BUILD_BUG_ON(sizeof(struct kmorph_ctl_pulse) != 64);
	BUILD_BUG_ON(KMORPH_CTL_OFF_PULSE + KMORPH_CTL_CPUS * sizeof(struct kmorph_ctl_pulse) >
		     KMORPH_CTL_OFF_HANDOVERS);
	BUILD_BUG_ON(KMORPH_CTL_OFF_HANDOVERS + sizeof(struct kmorph_ctl_handovers) >
		     KMORPH_CTL_SIZE);
	BUILD_BUG_ON(sizeof(struct kmorph_ctl_link) != 64);
	BUILD_BUG_ON(sizeof(struct kmorph_ctl_handover) != 64);

	memset(inst->ctl, 0, KMORPH_CTL_SIZE);
	inst->handovers_generation = 0;
	inst->grants_generation = 0;
	ctl->version = KMORPH_CTL_VERSION;
	ctl->size = KMORPH_CTL_SIZE;
	ctl->instance_id = inst->id;
	ctl->pulse_us = inst->pulse_us ?: KMORPH_PULSE_US;
	ctl->incarnation = inst->incarnation;
	ctl->base = inst->base;
	ctl->region_size = inst->size;
	ctl->tsc_khz = tsc_khz;
	ctl->cpu_count = inst->cpu_count;
	ctl->door = kmorph_door_address();
	kmorph_ctl_grants(inst);
	smp_store_release(&ctl->magic, KMORPH_CTL_MAGIC);
}

/*
 * Write what the instance may use anew, and ring it. Called with its lock held,
 * or before anybody else knows it.
 */
void kmorph_ctl_grants(struct kmorph_inst *inst)
{
	struct kmorph_ctl_grants *grants = inst->ctl + KMORPH_CTL_OFF_GRANTS;
	u32 i;

	WRITE_ONCE(grants->generation, inst->grants_generation + 1);
	smp_wmb();	/* odd before any entry changes */
	grants->cpu_count = inst->cpu_count;
	memcpy(grants->apicid, inst->apicid, inst->cpu_count * sizeof(u32));
	grants->extent_count = inst->extent_count;
	for (i = 0; i < inst->extent_count; i++) {
		grants->extent[i].base = inst->extent[i].base;
		grants->extent[i].size = inst->extent[i].size;
	}
	inst->grants_generation += 2;
	smp_store_release(&grants->generation, inst->grants_generation);
	WRITE_ONCE(ctl_primary(inst)->cpu_count, inst->cpu_count);
	smp_mb();	/* the table before the ring */
	if (inst->state == KMORPH_INST_RUNNING)
		kmorph_ctl_ring(inst);
}

/* Has nothing been heard of its kernel since it was started? */
bool kmorph_ctl_absent(struct kmorph_inst *inst)
{
	return smp_load_acquire(&ctl_instance(inst)->state) == KMORPH_CTL_ABSENT;
}

/* Does the instance's kernel say of itself what it does? */
bool kmorph_ctl_ready(struct kmorph_inst *inst)
{
	return smp_load_acquire(&ctl_instance(inst)->state) == KMORPH_CTL_READY;
}

/* Bytes of a memory block of the instance's kernel; 0 while it has not said so. */
u64 kmorph_ctl_memory_block(struct kmorph_inst *inst)
{
	return kmorph_ctl_ready(inst) ? READ_ONCE(ctl_instance(inst)->memory_block) : 0;
}

/* Does the instance say that it runs on this CPU? */
bool kmorph_ctl_cpu_online(struct kmorph_inst *inst, u32 apicid)
{
	struct kmorph_ctl_pulse *line = inst->ctl + KMORPH_CTL_OFF_PULSE;
	unsigned int i;

	for (i = 0; i < KMORPH_CTL_CPUS; i++)
		if (READ_ONCE(line[i].online) && READ_ONCE(line[i].apicid) == apicid)
			return true;
	return false;
}

/* From now on the doorbell's address is kept up to date there, and notices are seen. */
void kmorph_ctl_watch(struct kmorph_inst *inst)
{
	unsigned long flags;

	kref_get(&inst->ref);
	raw_spin_lock_irqsave(&ctl_lock, flags);
	inst->notices = 0;
	inst->nonce_seen = 0;
	inst->end_seen = 0;
	watched[inst->slot->index] = inst;
	WRITE_ONCE(ctl_primary(inst)->door, kmorph_door_address());
	raw_spin_unlock_irqrestore(&ctl_lock, flags);
}

void kmorph_ctl_unwatch(struct kmorph_inst *inst)
{
	unsigned long flags;
	bool was;

	raw_spin_lock_irqsave(&ctl_lock, flags);
	was = watched[inst->slot->index] == inst;
	if (was)
		watched[inst->slot->index] = NULL;
	raw_spin_unlock_irqrestore(&ctl_lock, flags);
	if (was) {
		/* What the doorbell's thread has read is of this life. */
		kmorph_door_sync();
		kmorph_inst_put(inst);
	}
}

void kmorph_ctl_publish_door(u64 address)
{
	unsigned long flags;
	unsigned int i;

	raw_spin_lock_irqsave(&ctl_lock, flags);
	for (i = 0; i < ARRAY_SIZE(watched); i++)
		if (watched[i])
			WRITE_ONCE(ctl_primary(watched[i])->door, address);
	raw_spin_unlock_irqrestore(&ctl_lock, flags);
}

/* Hard interrupt: has anybody said something new? */
bool kmorph_ctl_hard(void)
{
	unsigned int i;
	bool news = false;

	raw_spin_lock(&ctl_lock);
	for (i = 0; i < ARRAY_SIZE(watched); i++)
		if (watched[i] &&
		    READ_ONCE(ctl_instance(watched[i])->notices) != watched[i]->notices)
			news = true;
	raw_spin_unlock(&ctl_lock);
	return news;
}

static u32 end_event(u32 state)
{
	switch (state) {
	case KMORPH_CTL_PANIC:
		return KMORPH_EV_PANIC;
	case KMORPH_CTL_PARKED:
		return KMORPH_EV_PARKED;
	case KMORPH_CTL_LEFT:
		return KMORPH_EV_LEFT;
	default:
		return 0;
	}
}

static void report(struct kmorph_inst *inst, u32 state)
{
	struct kmorph_ctl_instance *ctl = ctl_instance(inst);
	u64 nonce = READ_ONCE(ctl->boot_nonce);
	char text[KMORPH_CTL_TEXT];
	u32 event = end_event(state);

	/* It may have died before we saw it come: both are told, in order. */
	if (nonce && nonce != inst->nonce_seen) {
		inst->nonce_seen = nonce;
		inst->end_seen = 0;
		kmorph_elcr_restore(inst);
		kmorph_event(KMORPH_EV_READY, inst, 0, READ_ONCE(ctl->ready_tsc), nonce, NULL);
	}
	if (!event || state == inst->end_seen)
		return;
	inst->end_seen = state;
	memcpy(text, ctl->text, sizeof(text));
	text[sizeof(text) - 1] = '\0';
	kmorph_event(event, inst, READ_ONCE(ctl->end_cpu), READ_ONCE(ctl->end_tsc), 0, text);
}

/* The doorbell's thread: the only one that looks, so inst->*_seen need no lock. */
void kmorph_ctl_thread(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(watched); i++) {
		struct kmorph_inst *inst;
		unsigned long flags;
		u32 notices, state;

		raw_spin_lock_irqsave(&ctl_lock, flags);
		inst = watched[i];
		if (inst)
			kref_get(&inst->ref);
		raw_spin_unlock_irqrestore(&ctl_lock, flags);
		if (!inst)
			continue;
		notices = smp_load_acquire(&ctl_instance(inst)->notices);
		if (notices != inst->notices) {
			state = smp_load_acquire(&ctl_instance(inst)->state);
			WRITE_ONCE(inst->notices, notices);
			report(inst, state);
		}
		kmorph_inst_put(inst);
	}
}

/* Tell an instance to look at its control area. */
void kmorph_ctl_ring(struct kmorph_inst *inst)
{
	kmorph_ring(inst->id, READ_ONCE(ctl_instance(inst)->door));
}

/*
 * Its ACPI set-up makes a booting kernel write the ELCR, for it sees no I/O
 * APIC. We put back what was there once it has booted, or is stopped.
 */
void kmorph_elcr_hold(struct kmorph_inst *inst)
{
	mutex_lock(&elcr_lock);
	if (!inst->elcr_held) {
		inst->elcr_held = true;
		if (!elcr_holders++) {
			elcr[0] = inb(PIC_ELCR_LOW);
			elcr[1] = inb(PIC_ELCR_HIGH);
		}
	}
	mutex_unlock(&elcr_lock);
}

void kmorph_elcr_restore(struct kmorph_inst *inst)
{
	mutex_lock(&elcr_lock);
	if (inst->elcr_held) {
		inst->elcr_held = false;
		elcr_holders--;
		/* All ones: there is no such register on this machine. */
		if (elcr[0] != 0xff || elcr[1] != 0xff) {
			outb(elcr[0], PIC_ELCR_LOW);
			outb(elcr[1], PIC_ELCR_HIGH);
		}
	}
	mutex_unlock(&elcr_lock);
}
