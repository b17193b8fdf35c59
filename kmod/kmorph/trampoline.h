/* SPDX-License-Identifier: GPL-2.0 */
/* The words of the trampoline page, offsets from kmorph_t_data. */
#ifndef KMORPH_TRAMPOLINE_H
#define KMORPH_TRAMPOLINE_H

#define KMORPH_T_MODE		0x00
#define KMORPH_T_STAGE		0x04
#define KMORPH_T_CR3		0x08
#define KMORPH_T_MTRR		0x0c	/* MTRRdefType to set where the MTRRs are off; 0: leave */
#define KMORPH_T_ENTRY		0x10
#define KMORPH_T_RSI		0x18
#define KMORPH_T_COUNT		0x20
#define KMORPH_T_NONCE		0x24
#define KMORPH_T_CPUS		0x40	/* { apicid, acknowledgement } a CPU */
#define KMORPH_T_DATA_SIZE	(KMORPH_T_CPUS + 64 * 8)

#define KMORPH_T_MODE_BOOT	1
#define KMORPH_T_MODE_PARK	2

#define KMORPH_T_STAGE_REAL		1
#define KMORPH_T_STAGE_PROTECTED	2
#define KMORPH_T_STAGE_LONG		3

#ifndef __ASSEMBLY__

#include <linux/types.h>

struct kmorph_t_cpu {
	u32 apicid;
	u32 acknowledged;
};

struct kmorph_t_data {
	u32 mode;
	u32 stage;
	u32 cr3;
	u32 mtrr;
	u64 entry;
	u64 rsi;
	u32 count;
	u32 nonce;
	u32 reserved[6];
	struct kmorph_t_cpu cpu[64];
};

extern const char kmorph_trampoline[], kmorph_trampoline_end[];
extern const char kmorph_t_gdt[], kmorph_t_gdtr_base[], kmorph_t_pm32[], kmorph_t_far32[];
extern const char kmorph_t_lm64[], kmorph_t_far64[], kmorph_t_data[];

#endif /* __ASSEMBLY__ */
#endif /* KMORPH_TRAMPOLINE_H */
