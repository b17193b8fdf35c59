// SPDX-License-Identifier: GPL-2.0
/*
 * kerf-vsock.ko - AF_VSOCK between the kernels of one machine.
 *
 * The primary is CID 2 and registers as the host side, instance n is CID n + 2
 * and registers as a guest. Which links there are comes from kmorph.ko.
 */
#include "vsock.h"

#include <linux/module.h>

struct workqueue_struct *kv_wq;

static int __init kv_module_init(void)
{
	bool primary = kmorph_self_id() == KMORPH_PRIMARY_ID;
	int ret;

	kv_wq = alloc_workqueue("kerf-vsock", WQ_UNBOUND | WQ_HIGHPRI, 0);
	if (!kv_wq)
		return -ENOMEM;
	ret = vsock_core_register(&kv_transport, primary ? VSOCK_TRANSPORT_F_H2G :
							   VSOCK_TRANSPORT_F_G2H);
	if (ret) {
		pr_err("cannot register as the %s transport (%d): %s\n", primary ? "host" : "guest",
		       ret, primary ? "is vhost_vsock loaded?" : "is another one loaded?");
		goto destroy;
	}
	ret = kmorph_door_register(&kv_door_client);
	if (ret)
		goto unregister;
	ret = kmorph_link_register(&kv_link_ops);
	if (ret)
		goto door;
	return 0;

door:
	kmorph_door_unregister(&kv_door_client);
unregister:
	vsock_core_unregister(&kv_transport);
destroy:
	destroy_workqueue(kv_wq);
	return ret;
}

/* No socket is left: each one holds the module. */
static void __exit kv_module_exit(void)
{
	vsock_core_unregister(&kv_transport);
	kmorph_link_unregister(&kv_link_ops);
	kmorph_door_unregister(&kv_door_client);
	destroy_workqueue(kv_wq);
	rcu_barrier();
}

module_init(kv_module_init);
module_exit(kv_module_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("AF_VSOCK between the kernels of one machine");
