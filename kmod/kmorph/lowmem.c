// SPDX-License-Identifier: GPL-2.0
/*
 * Low memory. A CPU leaves INIT in real mode, so each instance needs two things
 * below 1 MiB: a page for our trampoline, and a slice its kernel finds in its
 * memory map for its own real-mode code (28 KiB, never below 64 KiB).
 *
 *	0x10000 + 0x1000 * i	trampoline of slot i
 *	0x20000 + 0x8000 * i	slice of slot i
 *
 * Linux reserves the whole first MiB and uses only its own real-mode blob there,
 * which it allocates top-down below 640 KiB. That is checked, not assumed.
 */
#include "kmorph.h"

#include <linux/ioport.h>
#include <linux/mm.h>

#define SLOT_TRAMPOLINE(i)	(0x10000UL + 0x1000UL * (i))
#define SLOT_BASE(i)		(0x20000UL + 0x8000UL * (i))
#define SLOT_SIZE		0x8000UL
#define SCAN_BASE		0x10000UL
#define SCAN_END		0x9f000UL

/* The last word of the kernel's real-mode blob: REALMODE_END_SIGNATURE. */
#define BLOB_SIGNATURE		0x65a22c82U
#define BLOB_MAX		0x8000UL

static struct kmorph_slot slots[KMORPH_MAX_INSTANCES];
static unsigned int usable_slots;

static bool page_unused(phys_addr_t addr)
{
	unsigned long pfn = PHYS_PFN(addr);

	return !pfn_valid(pfn) || PageReserved(pfn_to_page(pfn));
}

/* Memory, by the firmware's map or kept by memmap=; no hole, no device. */
static bool page_is_memory(phys_addr_t addr)
{
	return region_intersects(addr, PAGE_SIZE, IORESOURCE_SYSTEM_RAM,
				 IORES_DESC_NONE) == REGION_INTERSECTS ||
	       region_intersects(addr, PAGE_SIZE, IORESOURCE_MEM,
				 IORES_DESC_RESERVED) == REGION_INTERSECTS;
}

static bool range_free(phys_addr_t base, u64 size)
{
	phys_addr_t addr;

	for (addr = base; addr < base + size; addr += PAGE_SIZE)
		if (!page_unused(addr) || !page_is_memory(addr))
			return false;
	return true;
}

static void refuse_blob(phys_addr_t signature)
{
	phys_addr_t start = signature - BLOB_MAX;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(slots); i++) {
		struct kmorph_slot *slot = &slots[i];

		if (!slot->usable)
			continue;
		if (kmorph_overlaps(slot->base, slot->size, start, BLOB_MAX + sizeof(u32)) ||
		    kmorph_overlaps(slot->trampoline, PAGE_SIZE, start, BLOB_MAX + sizeof(u32))) {
			pr_warn("low memory slot %u: a real-mode blob ends at %pa, not used\n",
				i, &signature);
			slot->usable = false;
		}
	}
}

int kmorph_lowmem_init(void)
{
	phys_addr_t addr;
	u32 *low;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(slots); i++) {
		struct kmorph_slot *slot = &slots[i];

		slot->index = i;
		slot->trampoline = SLOT_TRAMPOLINE(i);
		slot->base = SLOT_BASE(i);
		slot->size = SLOT_SIZE;
		atomic_set(&slot->mappings, 0);
		slot->usable = range_free(slot->trampoline, PAGE_SIZE) &&
			       range_free(slot->base, slot->size);
	}
	/* Page by page: a mapping cannot span reserved memory and RAM. */
	for (addr = SCAN_BASE; addr < SCAN_END; addr += PAGE_SIZE) {
		low = kmorph_map(addr, PAGE_SIZE);
		if (!low)
			return -ENOMEM;
		for (i = 0; i < PAGE_SIZE / sizeof(u32); i++)
			if (READ_ONCE(low[i]) == BLOB_SIGNATURE)
				refuse_blob(addr + i * sizeof(u32));
		kmorph_unmap(low);
	}

	for (i = 0; i < ARRAY_SIZE(slots); i++)
		usable_slots += slots[i].usable;
	if (!usable_slots)
		pr_err("no usable low memory at %#lx-%#lx: boot this kernel with memmap=448K$64K\n",
		       SCAN_BASE, SLOT_BASE(KMORPH_MAX_INSTANCES) - 1);
	else if (usable_slots < ARRAY_SIZE(slots))
		pr_warn("low memory for %u of %zu instances\n", usable_slots, ARRAY_SIZE(slots));
	return 0;
}

void kmorph_lowmem_span(u64 *base, u64 *size)
{
	*base = usable_slots ? SLOT_BASE(0) : 0;
	*size = usable_slots ? SLOT_SIZE * KMORPH_MAX_INSTANCES : 0;
}

/* A free slot, cleared; NULL when there is none. Called with kmorph_lock held. */
struct kmorph_slot *kmorph_lowmem_get(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(slots); i++) {
		struct kmorph_slot *slot = &slots[i];
		void *addr;

		if (!slot->usable || slot->used || atomic_read(&slot->mappings))
			continue;
		addr = kmorph_map(slot->base, slot->size);
		if (!addr)
			return NULL;
		memset(addr, 0, slot->size);
		kmorph_unmap(addr);
		slot->used = true;
		return slot;
	}
	return NULL;
}

/* Clears it, too: what a kernel left there looks like a blob in use. */
void kmorph_lowmem_put(struct kmorph_slot *slot)
{
	void *addr = kmorph_map(slot->base, slot->size);

	if (addr) {
		memset(addr, 0, slot->size);
		kmorph_unmap(addr);
	}
	slot->used = false;
}
