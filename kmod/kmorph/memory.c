// SPDX-License-Identifier: GPL-2.0
/*
 * Mapping physical memory that is not this kernel's RAM.
 *
 * A cacheable mapping is asked for everywhere. Where the MTRRs do not say
 * write-back (an emulator's INIT clears them, a device range never had it) the
 * kernel silently gives an uncached one: slow, and not coherent with the other
 * kernel's view of what it has in its caches. So the result is looked at.
 */
#include "kmorph.h"

#include <linux/io.h>
#include <linux/mm.h>
#include <asm/pgtable.h>

bool kmorph_range_ok(u64 base, u64 size)
{
	u64 limit = 1ULL << boot_cpu_data.x86_phys_bits;

	return size && PAGE_ALIGNED(base) && PAGE_ALIGNED(size) &&
	       base < limit && size <= limit - base;
}

static bool is_write_back(unsigned long addr)
{
	unsigned int level;
	pte_t *pte = lookup_address(addr, &level);

	return pte && pte_present(*pte) && !(pte_flags(*pte) & (_PAGE_PCD | _PAGE_PWT));
}

/**
 * kmorph_map - map memory shared between kernels
 * @base: physical address, page aligned
 * @size: bytes
 *
 * Returns the address of a write-back mapping, or NULL.
 */
void *kmorph_map(phys_addr_t base, size_t size)
{
	void *addr = memremap(base, size, MEMREMAP_WB);
	unsigned long start = (unsigned long)addr;

	if (!addr) {
		pr_err("cannot map %pa+%#zx\n", &base, size);
		return NULL;
	}
	if (!is_write_back(start) || !is_write_back(start + size - 1)) {
		pr_err("%pa+%#zx does not map write-back: are the MTRRs off, or is it no memory?\n",
		       &base, size);
		memunmap(addr);
		return NULL;
	}
	return addr;
}
EXPORT_SYMBOL_GPL(kmorph_map);

void kmorph_unmap(void *addr)
{
	if (addr)
		memunmap(addr);
}
EXPORT_SYMBOL_GPL(kmorph_unmap);
