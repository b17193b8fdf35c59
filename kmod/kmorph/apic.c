// SPDX-License-Identifier: GPL-2.0
/*
 * Inter-processor interrupts by physical APIC id. The kernel's own helpers send
 * to its own CPUs only; an instance's CPUs are not among them.
 */
#include "kmorph.h"

#include <linux/delay.h>
#include <linux/irqflags.h>
#include <asm/apic.h>
#include <asm/msr.h>

#define X2APIC_ICR_MSR	(APIC_BASE_MSR + (APIC_ICR >> 4))

/* Wait until the last command has left; bounded, since a stuck bus must not hang us. */
static void icr_wait_idle(void)
{
	unsigned int i;

	for (i = 0; i < 100000; i++) {
		if (!(native_apic_mem_read(APIC_ICR) & APIC_ICR_BUSY))
			return;
		cpu_relax();
	}
}

/**
 * kmorph_icr - write the interrupt command register
 * @apicid: physical APIC id of the target
 * @low: delivery mode, level, vector
 *
 * Stores made before are visible to the target before the interrupt.
 */
void kmorph_icr(u32 apicid, u32 low)
{
	unsigned long flags;

	if (x2apic_mode) {
		/* Unlike a store to the register page, the MSR write orders nothing. */
		asm volatile("mfence; lfence" ::: "memory");
		wrmsrl(X2APIC_ICR_MSR, (u64)apicid << 32 | low);
		return;
	}
	mb();	/* what the target is to see comes first */
	local_irq_save(flags);
	icr_wait_idle();
	native_apic_mem_write(APIC_ICR2, SET_XAPIC_DEST_FIELD(apicid));
	native_apic_mem_write(APIC_ICR, low);
	local_irq_restore(flags);
}

void kmorph_init_assert(u32 apicid)
{
	kmorph_icr(apicid, APIC_INT_LEVELTRIG | APIC_INT_ASSERT | APIC_DM_INIT);
}

void kmorph_init_deassert(u32 apicid)
{
	kmorph_icr(apicid, APIC_INT_LEVELTRIG | APIC_DM_INIT);
}

/* Start a CPU in real mode at a page below 1 MiB. */
void kmorph_sipi(u32 apicid, phys_addr_t page)
{
	kmorph_icr(apicid, APIC_DM_STARTUP | (u32)(page >> PAGE_SHIFT));
}

void kmorph_nmi(u32 apicid)
{
	kmorph_icr(apicid, APIC_DM_NMI);
}

void kmorph_ipi(u32 apicid, u32 vector)
{
	kmorph_icr(apicid, APIC_DM_FIXED | vector);
}
