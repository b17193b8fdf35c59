// SPDX-License-Identifier: GPL-2.0
/*
 * kmorph-hang.ko - fails a kernel on purpose, for the scenarios
 *
 * how=hang   this CPU spins with interrupts off, for ever
 * how=bug    BUG() in module context: kills the loading task only
 */
#include <linux/module.h>
#include <linux/irqflags.h>
#include <linux/string.h>

static char *how = "hang";
module_param(how, charp, 0400);
MODULE_PARM_DESC(how, "hang or bug");

static int __init hang_init(void)
{
	pr_emerg("kmorph-hang: %s\n", how);
	if (!strcmp(how, "hang")) {
		local_irq_disable();
		for (;;)
			cpu_relax();
	}
	if (!strcmp(how, "bug"))
		BUG();
	return -EINVAL;
}
module_init(hang_init);

MODULE_DESCRIPTION("Fails a kernel on purpose");
MODULE_LICENSE("GPL");
