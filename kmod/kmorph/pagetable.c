// SPDX-License-Identifier: GPL-2.0
/*
 * The page tables an instance starts with: an identity map of the low 2 MiB
 * (trampoline, low slice) and of its own region, nothing else. The tables are
 * this kernel's memory, below 4 GiB because CR3 is loaded in 32-bit mode. The
 * kernel's decompressor soon makes its own.
 */
#include "kmorph.h"

#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <asm/pgtable.h>

/* Four levels always; pgd_index() follows the paging mode of this kernel. */
#define ROOT_INDEX(addr)	(((addr) >> 39) & (PTRS_PER_PUD - 1))

#define TABLE_FLAGS	(_PAGE_PRESENT | _PAGE_RW)
#define LEAF_FLAGS	(_PAGE_PRESENT | _PAGE_RW | _PAGE_PSE)

static u64 *new_table(struct kmorph_inst *inst, unsigned int limit)
{
	struct page *page;

	if (inst->table_count >= limit)
		return NULL;
	page = alloc_page(GFP_KERNEL | GFP_DMA32 | __GFP_ZERO);
	if (!page)
		return NULL;
	inst->tables[inst->table_count++] = page;
	return page_address(page);
}

/* The table an entry leads to, made when it is not there. */
static u64 *descend(struct kmorph_inst *inst, u64 *table, unsigned int index, unsigned int limit)
{
	u64 *next;

	if (table[index])
		return phys_to_virt(table[index] & PTE_PFN_MASK);
	next = new_table(inst, limit);
	if (next)
		table[index] = virt_to_phys(next) | TABLE_FLAGS;
	return next;
}

static int map_identity(struct kmorph_inst *inst, u64 base, u64 size, unsigned int limit)
{
	u64 addr = round_down(base, PMD_SIZE);
	u64 end = round_up(base + size, PMD_SIZE);
	u64 *pml4 = page_address(inst->tables[0]);

	for (; addr < end; addr += PMD_SIZE) {
		u64 *pdpt, *pd;

		pdpt = descend(inst, pml4, ROOT_INDEX(addr), limit);
		if (!pdpt)
			return -ENOMEM;
		pd = descend(inst, pdpt, pud_index(addr), limit);
		if (!pd)
			return -ENOMEM;
		pd[pmd_index(addr)] = addr | LEAF_FLAGS;
	}
	return 0;
}

/**
 * kmorph_tables_build - make the tables of an instance
 * @inst: the instance; keeps the tables until kmorph_tables_free()
 */
int kmorph_tables_build(struct kmorph_inst *inst)
{
	/* One PD a GiB, one PDPT each 512 GiB, with both ends, the low ones, the root. */
	unsigned int limit = (inst->size >> PUD_SHIFT) + 2 + (inst->size >> 39) + 2 + 3;
	int ret;

	/* Four-level tables reach 48 bits, identity-mapped: the lower half. */
	if (inst->base + inst->size > 1ULL << 47)
		return -ERANGE;
	inst->tables = kvcalloc(limit, sizeof(*inst->tables), GFP_KERNEL);
	if (!inst->tables)
		return -ENOMEM;
	inst->table_count = 0;
	ret = new_table(inst, limit) ? 0 : -ENOMEM;
	if (!ret)
		ret = map_identity(inst, 0, PMD_SIZE, limit);
	if (!ret)
		ret = map_identity(inst, inst->base, inst->size, limit);
	if (ret)
		kmorph_tables_free(inst);
	return ret;
}

void kmorph_tables_free(struct kmorph_inst *inst)
{
	while (inst->table_count)
		__free_page(inst->tables[--inst->table_count]);
	kvfree(inst->tables);
	inst->tables = NULL;
}

u32 kmorph_tables_root(const struct kmorph_inst *inst)
{
	return page_to_phys(inst->tables[0]);
}
