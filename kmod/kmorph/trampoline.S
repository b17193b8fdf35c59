/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The page a CPU starts in after INIT and SIPI, below 1 MiB. Copied there by the
 * module, which fills in the words at the end (trampoline.h).
 *
 * mode 1: go to long mode with the module's identity map and jump to the
 *         kernel's 64-bit entry point with boot_params in %rsi.
 * mode 2: park. The CPU proves that it has left its kernel by writing the
 *         nonce into the line of its own APIC id, and halts for good.
 */
#include <linux/linkage.h>
#include "trampoline.h"

#define OFF(symbol)	(symbol - kmorph_trampoline)

	.section .rodata, "a"
	.balign 16
	.globl kmorph_trampoline, kmorph_trampoline_end
	.globl kmorph_t_gdt, kmorph_t_gdtr_base, kmorph_t_pm32, kmorph_t_far32
	.globl kmorph_t_lm64, kmorph_t_far64, kmorph_t_data

	.code16
kmorph_trampoline:
	cli
	cld
	movw	%cs, %ax
	movw	%ax, %ds
	movzwl	%ax, %ebx
	shll	$4, %ebx			/* linear address of this page */
	cmpl	$KMORPH_T_MODE_PARK, OFF(kmorph_t_data) + KMORPH_T_MODE
	je	park
	movl	$KMORPH_T_STAGE_REAL, OFF(kmorph_t_data) + KMORPH_T_STAGE
	lgdtl	OFF(kmorph_t_gdtr)
	movl	$0x11, %eax			/* PE|ET; clears CD and NW, which INIT sets */
	movl	%eax, %cr0
	ljmpl	*OFF(kmorph_t_far32)

park:
	/* The APIC id: leaf 0xb where there is one, else eight bits of leaf 1. */
	xorl	%eax, %eax
	cpuid
	cmpl	$0xb, %eax
	jb	1f
	movl	$0xb, %eax
	xorl	%ecx, %ecx
	cpuid
	movl	%edx, %edi
	testl	%ebx, %ebx
	jnz	2f
1:	movl	$1, %eax
	cpuid
	movl	%ebx, %edi
	shrl	$24, %edi
2:	movl	OFF(kmorph_t_data) + KMORPH_T_COUNT, %ecx
	movw	$(OFF(kmorph_t_data) + KMORPH_T_CPUS), %si
3:	jecxz	5f
	cmpl	%edi, (%si)
	je	4f
	addw	$8, %si
	decl	%ecx
	jmp	3b
4:	movl	OFF(kmorph_t_data) + KMORPH_T_NONCE, %eax
	movl	%eax, 4(%si)
5:	cli
	hlt
	jmp	5b

	.code32
kmorph_t_pm32:
	movw	$0x18, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$KMORPH_T_STAGE_PROTECTED, OFF(kmorph_t_data) + KMORPH_T_STAGE(%ebx)
	movl	$0x20, %eax			/* CR4.PAE */
	movl	%eax, %cr4
	movl	OFF(kmorph_t_data) + KMORPH_T_CR3(%ebx), %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx		/* EFER.LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	$0x80000011, %eax		/* PG|ET|PE */
	movl	%eax, %cr0
	ljmpl	*OFF(kmorph_t_far64)(%ebx)

	.code64
kmorph_t_lm64:
	/*
	 * INIT leaves the MTRRs of a real CPU alone; an emulator clears them. With
	 * them off, Linux maps nothing write-back that is not its own RAM.
	 */
	cmpl	$0, OFF(kmorph_t_data) + KMORPH_T_MTRR(%rbx)
	je	1f
	movl	$0x2ff, %ecx			/* MTRRdefType */
	rdmsr
	testl	$0x800, %eax			/* E */
	jnz	1f
	movl	OFF(kmorph_t_data) + KMORPH_T_MTRR(%rbx), %eax
	xorl	%edx, %edx
	wrmsr
1:	movq	OFF(kmorph_t_data) + KMORPH_T_RSI(%rbx), %rsi
	movq	OFF(kmorph_t_data) + KMORPH_T_ENTRY(%rbx), %rax
	leaq	0xff0(%rbx), %rsp
	movl	$KMORPH_T_STAGE_LONG, OFF(kmorph_t_data) + KMORPH_T_STAGE(%rbx)
	xorl	%ebp, %ebp
	xorl	%edi, %edi
	xorl	%ebx, %ebx
	jmp	*%rax

	.balign 16
kmorph_t_gdt:
	.quad	0
	.quad	0x00cf9b000000ffff		/* 0x08: 32-bit code */
	.quad	0x00af9b000000ffff		/* 0x10: 64-bit code, __BOOT_CS */
	.quad	0x00cf93000000ffff		/* 0x18: data, __BOOT_DS */
kmorph_t_gdtr:
	.word	31
kmorph_t_gdtr_base:
	.long	0
	.balign 8
kmorph_t_far32:
	.long	0
	.word	0x08
	.balign 8
kmorph_t_far64:
	.long	0
	.word	0x10
	.balign 64
kmorph_t_data:
	.fill	KMORPH_T_DATA_SIZE, 1, 0
kmorph_trampoline_end:

	.section .note.GNU-stack, "", @progbits
