// SPDX-License-Identifier: GPL-2.0
/*
 * What an instance says last: panic, halt, power-off, and the reboots it must
 * not carry out. Resetting "its" machine would reset everybody's, so the one
 * function every reset goes through parks the CPU instead. A triple fault and a
 * write to a reset port by other code go past it: nothing can catch those.
 */
#include "kmorph.h"

#include <linux/kprobes.h>
#include <linux/notifier.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>
#include <asm/irqflags.h>

static int on_panic(struct notifier_block *nb, unsigned long event, void *reason)
{
	kmorph_guest_state(KMORPH_CTL_PANIC, reason);
	return NOTIFY_DONE;
}

/* First: a later notifier may hang. */
static struct notifier_block panic_nb = {
	.notifier_call = on_panic,
	.priority = INT_MAX,
};

static int on_reboot(struct notifier_block *nb, unsigned long event, void *command)
{
	switch (event) {
	case SYS_HALT:
		kmorph_guest_state(KMORPH_CTL_PARKED, "halted");
		break;
	case SYS_POWER_OFF:
		kmorph_guest_state(KMORPH_CTL_PARKED, "powered off");
		break;
	}
	return NOTIFY_DONE;
}

/* Last: the others still have work to do. */
static struct notifier_block reboot_nb = {
	.notifier_call = on_reboot,
	.priority = INT_MIN,
};

static int park_instead(struct kprobe *probe, struct pt_regs *regs)
{
	/* A panic that ends in a reboot stays a panic. */
	if (READ_ONCE(kmorph_guest_self()->state) != KMORPH_CTL_PANIC)
		kmorph_guest_state(KMORPH_CTL_PARKED, "reboot");
	pr_emerg("this kernel must not reset the machine: CPU %d is parked\n",
		 raw_smp_processor_id());
	for (;;) {
		native_irq_disable();
		native_halt();
	}
	return 0;
}
NOKPROBE_SYMBOL(park_instead);

static struct kprobe reset_probe = {
	.symbol_name = "native_machine_emergency_restart",
	.pre_handler = park_instead,
};

int kmorph_last_words_init(void)
{
	int ret = register_kprobe(&reset_probe);

	if (ret) {
		pr_err("cannot guard against resets (%d): a reboot here would reset the machine\n",
		       ret);
		return ret;
	}
	atomic_notifier_chain_register(&panic_notifier_list, &panic_nb);
	register_reboot_notifier(&reboot_nb);
	return 0;
}

void kmorph_last_words_exit(void)
{
	unregister_reboot_notifier(&reboot_nb);
	atomic_notifier_chain_unregister(&panic_notifier_list, &panic_nb);
	unregister_kprobe(&reset_probe);
}
