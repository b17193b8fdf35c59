// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/kmorph: the checks every call shares, and mmap.
 */
#include "kmorph.h"

#include <linux/capability.h>
#include <linux/memory.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/utsname.h>
#include <asm/apic.h>
#include <asm/tsc.h>

#define ROLE(role)	BIT(KMORPH_ROLE_##role)

static int do_info(struct file *file, struct kmorph_info *info)
{
	struct kmorph_head head = info->head;

	memset(info, 0, sizeof(*info));
	info->head = head;
	info->role = kmorph_role;
	info->instance_id = kmorph_self_id();
	info->tsc_khz = tsc_khz;
	info->x2apic = x2apic_mode;
	info->memory_block_size = memory_block_size_bytes();
	info->boot_apicid = kmorph_boot_apicid();
	kmorph_door_where(&info->door_apicid, &info->door_vector);
	info->events_lost = kmorph_events_lost(file);
	if (kmorph_is_primary())
		kmorph_lowmem_span(&info->low_base, &info->low_size);
	strscpy(info->release, init_utsname()->release, sizeof(info->release));
	return 0;
}

#define HANDLER(name, type)						\
static int call_##name(struct file *file, void *arg)			\
{									\
	return kmorph_##name(arg);					\
}									\
static_assert(sizeof(struct type) >= sizeof(struct kmorph_head))

HANDLER(pool_add, kmorph_pool);
HANDLER(pool_remove, kmorph_pool);
HANDLER(pool_list, kmorph_pool_list);
HANDLER(cpu_take, kmorph_cpu);
HANDLER(cpu_give, kmorph_cpu);
HANDLER(cpu_list, kmorph_cpu_list);
HANDLER(cpu_assign, kmorph_cpu);
HANDLER(cpu_withdraw, kmorph_cpu);
HANDLER(memory_assign, kmorph_memory);
HANDLER(instance_create, kmorph_instance);
HANDLER(instance_query, kmorph_instance);
HANDLER(instance_list, kmorph_instance_list);
HANDLER(instance_destroy, kmorph_ref);
HANDLER(instance_nmi, kmorph_ref);
HANDLER(start, kmorph_start);
HANDLER(stop, kmorph_stop);
HANDLER(link_add, kmorph_link_req);
HANDLER(link_del, kmorph_link_req);
HANDLER(door_move, kmorph_door_req);
HANDLER(handover_create, kmorph_handover);
HANDLER(handover_destroy, kmorph_handover);
HANDLER(handover_list, kmorph_handover_list);
HANDLER(handover_share, kmorph_handover_share);
HANDLER(handover_unshare, kmorph_handover_share);
HANDLER(handover_assign, kmorph_handover_assign);

static int call_info(struct file *file, void *arg)
{
	return do_info(file, arg);
}

static const struct call {
	unsigned int cmd;
	unsigned int roles;
	int (*handler)(struct file *file, void *arg);
} calls[] = {
	{ KMORPH_INFO, ROLE(PRIMARY) | ROLE(INSTANCE), call_info },
	{ KMORPH_POOL_ADD, ROLE(PRIMARY), call_pool_add },
	{ KMORPH_POOL_REMOVE, ROLE(PRIMARY), call_pool_remove },
	{ KMORPH_POOL_LIST, ROLE(PRIMARY), call_pool_list },
	{ KMORPH_CPU_TAKE, ROLE(PRIMARY), call_cpu_take },
	{ KMORPH_CPU_GIVE, ROLE(PRIMARY), call_cpu_give },
	{ KMORPH_CPU_LIST, ROLE(PRIMARY), call_cpu_list },
	{ KMORPH_CREATE, ROLE(PRIMARY), call_instance_create },
	{ KMORPH_QUERY, ROLE(PRIMARY), call_instance_query },
	{ KMORPH_INSTANCE_LIST, ROLE(PRIMARY), call_instance_list },
	{ KMORPH_START, ROLE(PRIMARY), call_start },
	{ KMORPH_STOP, ROLE(PRIMARY), call_stop },
	{ KMORPH_DESTROY, ROLE(PRIMARY), call_instance_destroy },
	{ KMORPH_NMI, ROLE(PRIMARY), call_instance_nmi },
	{ KMORPH_LINK_ADD, ROLE(PRIMARY), call_link_add },
	{ KMORPH_LINK_DEL, ROLE(PRIMARY), call_link_del },
	{ KMORPH_DOOR, ROLE(PRIMARY) | ROLE(INSTANCE), call_door_move },
	{ KMORPH_CPU_ASSIGN, ROLE(PRIMARY), call_cpu_assign },
	{ KMORPH_CPU_WITHDRAW, ROLE(PRIMARY), call_cpu_withdraw },
	{ KMORPH_MEMORY_ASSIGN, ROLE(PRIMARY), call_memory_assign },
	{ KMORPH_HANDOVER_CREATE, ROLE(PRIMARY), call_handover_create },
	{ KMORPH_HANDOVER_DESTROY, ROLE(PRIMARY), call_handover_destroy },
	{ KMORPH_HANDOVER_LIST, ROLE(PRIMARY), call_handover_list },
	{ KMORPH_HANDOVER_SHARE, ROLE(PRIMARY), call_handover_share },
	{ KMORPH_HANDOVER_UNSHARE, ROLE(PRIMARY), call_handover_unshare },
	{ KMORPH_HANDOVER_ASSIGN, ROLE(PRIMARY), call_handover_assign },
};

/* By number alone, so that a caller built for another layout is told so. */
static const struct call *find_call(unsigned int cmd)
{
	unsigned int i;

	if (_IOC_TYPE(cmd) != KMORPH_IOC)
		return NULL;
	for (i = 0; i < ARRAY_SIZE(calls); i++)
		if (_IOC_NR(calls[i].cmd) == _IOC_NR(cmd))
			return &calls[i];
	return NULL;
}

static long dev_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;
	const struct call *call = find_call(cmd);
	struct kmorph_head head;
	size_t size;
	void *buf;
	long ret;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!call)
		return -ENOTTY;
	if (copy_from_user(&head, user, sizeof(head)))
		return -EFAULT;
	size = _IOC_SIZE(call->cmd);
	if (head.version != KMORPH_ABI_VERSION)
		return -EPROTO;
	if (cmd != call->cmd || head.size != size)
		return -EINVAL;
	if (!(call->roles & BIT(kmorph_role)))
		return -EOPNOTSUPP;
	buf = memdup_user(user, size);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	*(struct kmorph_head *)buf = head;
	ret = call->handler(file, buf);
	/* After an error as well: several calls say there what was wrong. */
	if (copy_to_user(user, buf, size) && !ret)
		ret = -EFAULT;
	kfree(buf);
	return ret;
}

static void mapping_open(struct vm_area_struct *vma)
{
	atomic_inc(vma->vm_private_data);
}

static void mapping_close(struct vm_area_struct *vma)
{
	atomic_dec(vma->vm_private_data);
}

static const struct vm_operations_struct mapping_ops = {
	.open = mapping_open,
	.close = mapping_close,
};

static int dev_mmap(struct file *file, struct vm_area_struct *vma)
{
	u64 size = vma->vm_end - vma->vm_start;
	struct kmorph_range *range;
	struct kmorph_slot *slot;
	atomic_t *count = NULL;
	u64 base;
	int ret;

	if (!kmorph_is_primary())
		return -EOPNOTSUPP;
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (vma->vm_pgoff > U64_MAX >> PAGE_SHIFT)
		return -EINVAL;
	base = (u64)vma->vm_pgoff << PAGE_SHIFT;
	if (!kmorph_range_ok(base, size))
		return -EINVAL;

	mutex_lock(&kmorph_lock);
	range = kmorph_pool_find(base, size);
	slot = kmorph_inst_slot_at(base, size);
	if (range)
		count = &range->mappings;
	else if (slot)
		count = &slot->mappings;
	if (count)
		atomic_inc(count);
	mutex_unlock(&kmorph_lock);
	if (!count)
		return -EPERM;

	/* The default protection is write-back. Counted already: nothing goes away. */
	ret = remap_pfn_range(vma, vma->vm_start, vma->vm_pgoff, size, vma->vm_page_prot);
	if (ret) {
		atomic_dec(count);
		return ret;
	}
	vma->vm_private_data = count;
	vma->vm_ops = &mapping_ops;
	return 0;
}

static int dev_open(struct inode *inode, struct file *file)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	return kmorph_events_open(file);
}

static int dev_release(struct inode *inode, struct file *file)
{
	kmorph_events_release(file);
	return 0;
}

static const struct file_operations dev_fops = {
	.owner = THIS_MODULE,
	.open = dev_open,
	.release = dev_release,
	.read = kmorph_events_read,
	.poll = kmorph_events_poll,
	.unlocked_ioctl = dev_ioctl,
	.mmap = dev_mmap,
	.llseek = noop_llseek,
};

static struct miscdevice dev = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kmorph",
	.fops = &dev_fops,
	.mode = 0600,
};

int kmorph_dev_init(void)
{
	return misc_register(&dev);
}

void kmorph_dev_exit(void)
{
	misc_deregister(&dev);
}
