// SPDX-License-Identifier: GPL-2.0
/*
 * kmorph.ko - several kernels side by side on one machine.
 *
 * Loaded plainly, this kernel is the primary: it lends CPUs and memory to other
 * kernels, starts and stops them. Loaded with control=<address>, this kernel is
 * one of those, and says there how it is.
 */
#include "kmorph.h"

#include <linux/module.h>

DEFINE_MUTEX(kmorph_lock);
unsigned int kmorph_role;

static unsigned long control;
module_param(control, ulong, 0444);
MODULE_PARM_DESC(control, "physical address of the control area: makes this kernel an instance");

u32 kmorph_self_id(void)
{
	return kmorph_is_primary() ? KMORPH_PRIMARY_ID : kmorph_guest_primary()->instance_id;
}
EXPORT_SYMBOL_GPL(kmorph_self_id);

/**
 * kmorph_link_register - use the links of this kernel
 * @ops: one user at a time, -EBUSY for a second one. Links that exist are
 *	announced before this returns
 */
int kmorph_link_register(const struct kmorph_link_ops *ops)
{
	return kmorph_is_primary() ? kmorph_primary_link_register(ops) :
				     kmorph_guest_link_register(ops);
}
EXPORT_SYMBOL_GPL(kmorph_link_register);

/**
 * kmorph_link_unregister - end the use of the links
 * @ops: gets a del() for each of them before this returns
 */
void kmorph_link_unregister(const struct kmorph_link_ops *ops)
{
	if (kmorph_is_primary())
		kmorph_primary_link_unregister();
	else
		kmorph_guest_link_unregister();
}
EXPORT_SYMBOL_GPL(kmorph_link_unregister);

/**
 * kmorph_link_report - the other side of a link has come or left
 * @link: the link
 * @up: it has come
 *
 * Becomes an event in the primary. Process context.
 */
void kmorph_link_report(const struct kmorph_link *link, bool up)
{
	struct kmorph_inst *inst;

	if (!kmorph_is_primary())
		return;
	inst = kmorph_inst_get(link->peer);
	if (!inst)
		return;
	kmorph_event(up ? KMORPH_EV_LINK_UP : KMORPH_EV_LINK_DOWN, inst, 0, 0,
		     KMORPH_PRIMARY_ID, NULL);
	kmorph_inst_put(inst);
}
EXPORT_SYMBOL_GPL(kmorph_link_report);

static int __init primary_init(void)
{
	int ret = kmorph_lowmem_init();

	if (ret)
		return ret;
	ret = kmorph_pool_init();
	if (ret)
		return ret;
	ret = kmorph_cpu_init();
	if (ret)
		goto pool;
	ret = kmorph_door_init();
	if (ret)
		goto cpu;
	ret = kmorph_dev_init();
	if (ret)
		goto door;
	return 0;

door:
	kmorph_door_exit();
cpu:
	kmorph_cpu_exit();
pool:
	kmorph_pool_exit();
	return ret;
}

static void primary_exit(void)
{
	kmorph_dev_exit();
	kmorph_door_exit();
	kmorph_cpu_exit();
	kmorph_links_exit();
	kmorph_handover_exit();
	kmorph_pool_exit();
}

static int __init kmorph_init(void)
{
	if (control) {
		kmorph_role = KMORPH_ROLE_INSTANCE;
		return kmorph_guest_init(control);
	}
	kmorph_role = KMORPH_ROLE_PRIMARY;
	return primary_init();
}

static void __exit kmorph_exit(void)
{
	if (kmorph_is_primary())
		primary_exit();
	else
		kmorph_guest_exit();
}

module_init(kmorph_init);
module_exit(kmorph_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Several kernels side by side on one machine");
