// SPDX-License-Identifier: GPL-2.0
/*
 * Handover regions, seen from an instance: follow the table in the control area,
 * and let workloads map, read and write what it shows (/dev/kmorph-handover).
 *
 * Mappings are made of whole 2 MiB entries, inserted by faults: read-only ones
 * for reads at any time, writable ones only while this kernel is the writer. A
 * write to a read-only entry faults again, so nothing needs doing when it
 * becomes the writer. When it no longer is, every entry goes, before the primary
 * is told so. There are no 4 KiB entries: making one of them writable ends
 * outside this module, where a revocation could slip in between.
 *
 * read() and write() copy in pieces, each under the rights it needs: a revocation
 * waits for the piece under way, and none comes after it.
 */
#include "kmorph.h"

#include <linux/fs.h>
#include <linux/huge_mm.h>
#include <linux/ioport.h>
#include <linux/miscdevice.h>
#include <linux/mman.h>
#include <linux/pfn_t.h>
#include <linux/poll.h>
#include <linux/rwsem.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

#include <kmorph_handover.h>

#define COPY_PIECE	SZ_64K	/* a revocation waits for one at the most */
#define COPY_TRIES	16	/* to have the user's page stay until it is copied */

/*
 * Nothing may look for the page structures of an entry: there are none. Where
 * there are no special entries, those of a device without a page map serve.
 */
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
#define ENTRY_FLAGS	0
#else
#define ENTRY_FLAGS	(PFN_DEV | PFN_MAP)
#endif

/* A fork takes no entries along: it could copy one that is being revoked. */
#define MAPPING_FLAGS	(VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_WIPEONFORK)

struct region {
	struct list_head list;
	struct kref ref;	/* the list's, and one an open file */
	u64 key;
	u64 base;
	u64 size;
	void *memory;		/* for copies; makes all mappings' memory type write-back */
	/* under rights */
	bool shared;
	bool writable;
	u32 writer;
	u64 changes;
	/* under follow_mutex */
	bool stale;		/* has mappings that may no longer be */
};

struct opened {
	struct region *region;	/* set once, under follow_mutex */
	u64 seen;		/* changes of the region, or of the list */
	bool maps;		/* counted in space_users */
};

/*
 * Outside it: mmap_lock. Held by faults from the check to the insertion, and by
 * copies, which must not fault meanwhile.
 */
static DECLARE_RWSEM(rights);
/* The list, and the address space all mappings are in. Outside rights, inside mmap_lock. */
static DEFINE_MUTEX(follow_mutex);
static LIST_HEAD(regions);
static u64 list_changes;
static struct address_space *space;
static unsigned int space_users;
static DECLARE_WAIT_QUEUE_HEAD(changed);
static u32 generation_seen;
static bool started;

/* Hard interrupt: is there a table we have not acted upon? */
bool kmorph_guest_handover_changed(void)
{
	return READ_ONCE(kmorph_guest_handovers()->generation) != READ_ONCE(generation_seen);
}

/* A whole copy of the table, or false when the primary is just changing it. */
static bool copy_table(struct kmorph_ctl_handovers *copy)
{
	struct kmorph_ctl_handovers *table = kmorph_guest_handovers();
	u32 before = smp_load_acquire(&table->generation);

	if (before & 1)
		return false;
	memcpy(copy, table, sizeof(*copy));
	smp_rmb();	/* the copy before the second look at the generation */
	copy->generation = before;
	return READ_ONCE(table->generation) == before;
}

static bool acceptable(const struct kmorph_ctl_handover *entry)
{
	const struct kmorph_ctl_primary *ctl = kmorph_guest_primary();

	return kmorph_range_ok(entry->base, entry->size) && IS_ALIGNED(entry->base, PMD_SIZE) &&
	       IS_ALIGNED(entry->size, PMD_SIZE) &&
	       !kmorph_overlaps(entry->base, entry->size, ctl->base, ctl->region_size) &&
	       region_intersects(entry->base, entry->size, IORESOURCE_SYSTEM_RAM,
				 IORES_DESC_NONE) == REGION_DISJOINT;
}

static void region_release(struct kref *ref)
{
	struct region *region = container_of(ref, struct region, ref);

	kmorph_unmap(region->memory);
	kfree(region);
}

static struct region *find(const struct kmorph_ctl_handover *entry)
{
	struct region *region;

	list_for_each_entry(region, &regions, list)
		if (region->key == entry->key && region->base == entry->base &&
		    region->size == entry->size)
			return region;
	return NULL;
}

static const struct kmorph_ctl_handover *entry_of(const struct kmorph_ctl_handovers *table,
						  const struct region *region)
{
	unsigned int i;

	for (i = 0; i < KMORPH_CTL_HANDOVERS; i++)
		if (table->region[i].key == region->key && table->region[i].base == region->base &&
		    table->region[i].size == region->size)
			return &table->region[i];
	return NULL;
}

static int take_up(const struct kmorph_ctl_handover *entry)
{
	struct region *region;

	if (!acceptable(entry)) {
		pr_err("handover region %#llx: bad entry %#llx+%#llx\n", entry->key, entry->base,
		       entry->size);
		return 0;
	}
	region = kzalloc(sizeof(*region), GFP_KERNEL);
	if (!region)
		return -ENOMEM;
	kref_init(&region->ref);
	region->key = entry->key;
	region->base = entry->base;
	region->size = entry->size;
	region->shared = true;
	list_add_tail(&region->list, &regions);
	list_changes++;
	return 0;
}

/* What the table says of a region. Called with rights held for writing. */
static void update(struct region *region, const struct kmorph_ctl_handover *entry)
{
	bool writable = entry && entry->writer == kmorph_self_id();

	if ((region->shared && !entry) || (region->writable && !writable))
		region->stale = true;
	if (!entry || region->writer != entry->writer)
		region->changes++;
	region->shared = entry;
	region->writable = writable;
	region->writer = entry ? entry->writer : 0;
}

static void revoke_stale(void)
{
	struct region *region, *next;

	list_for_each_entry_safe(region, next, &regions, list) {
		if (region->stale && space) {
			/* An unmapping takes a device entry that comes meanwhile for a bad one. */
			down_write(&rights);
			unmap_mapping_range(space, region->base, region->size, 1);
			up_write(&rights);
		}
		region->stale = false;
		if (region->shared)
			continue;
		list_del(&region->list);
		list_changes++;
		kref_put(&region->ref, region_release);
	}
}

/* Called with follow_mutex held. */
static void follow_table(void)
{
	static struct kmorph_ctl_handovers table;
	struct region *region;
	unsigned int i;
	int ret = 0;

	if (!copy_table(&table))
		return;		/* a ring follows, and the slow scan */
	for (i = 0; i < KMORPH_CTL_HANDOVERS; i++)
		if (table.region[i].key && !find(&table.region[i]) && take_up(&table.region[i]))
			ret = -ENOMEM;
	down_write(&rights);
	list_for_each_entry(region, &regions, list)
		update(region, entry_of(&table, region));
	up_write(&rights);
	/* Who has checked before that has also inserted before: no entry comes after this. */
	revoke_stale();
	wake_up_interruptible_poll(&changed, EPOLLIN | EPOLLHUP);
	if (ret)
		return;		/* the scan comes back to it */
	WRITE_ONCE(generation_seen, table.generation);
	smp_store_release(&kmorph_guest_self()->handovers_seen, table.generation);
}

void kmorph_guest_handover_follow(void)
{
	mutex_lock(&follow_mutex);
	if (started)
		follow_table();
	mutex_unlock(&follow_mutex);
}

static vm_fault_t mapping_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct region *region = vma->vm_private_data;
	unsigned long offset = (vmf->address & PMD_MASK) - vma->vm_start;
	bool write = vmf->flags & FAULT_FLAG_WRITE;
	vm_fault_t ret = VM_FAULT_SIGBUS;
	phys_addr_t at = PFN_PHYS((phys_addr_t)vma->vm_pgoff) + offset;
	pmd_t entry = READ_ONCE(*vmf->pmd);

	/* All of the mapping is in whole entries; a page table here is a mistake. */
	if (!pmd_none(entry) && !pmd_trans_huge(entry) && !pmd_devmap(entry))
		return VM_FAULT_SIGBUS;
	down_read(&rights);
	if (region->shared && (region->writable || !write))
		ret = vmf_insert_pfn_pmd(vmf, phys_to_pfn_t(at, ENTRY_FLAGS), write);
	up_read(&rights);
	return ret;
}

/* That it exists makes Linux insert read-only entries for reads. */
static vm_fault_t mapping_pfn_mkwrite(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

static int mapping_may_split(struct vm_area_struct *vma, unsigned long addr)
{
	return IS_ALIGNED(addr, PMD_SIZE) ? 0 : -EINVAL;
}

static int mapping_mremap(struct vm_area_struct *vma)
{
	return -EINVAL;
}

static const struct vm_operations_struct mapping_ops = {
	.fault = mapping_fault,
	.pfn_mkwrite = mapping_pfn_mkwrite,
	.may_split = mapping_may_split,
	.mremap = mapping_mremap,
};

/*
 * False for another node of the same device than that of the mappings there are:
 * revocations would not reach it. Inside mmap_lock.
 */
static bool join_space(struct file *file)
{
	struct opened *opened = file->private_data;
	bool same;

	mutex_lock(&follow_mutex);
	same = !space || space == file->f_mapping;
	if (same && !opened->maps) {
		space = file->f_mapping;
		space_users++;
		opened->maps = true;
	}
	mutex_unlock(&follow_mutex);
	return same;
}

static int handover_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct opened *opened = file->private_data;
	struct region *region = smp_load_acquire(&opened->region);
	u64 size = vma->vm_end - vma->vm_start;
	u64 offset = PFN_PHYS((u64)vma->vm_pgoff);

	if (!region)
		return -EBADFD;
	if (!(vma->vm_flags & VM_MAYSHARE) || vma->vm_pgoff > U64_MAX >> PAGE_SHIFT ||
	    !IS_ALIGNED(vma->vm_start | vma->vm_end | offset, PMD_SIZE) ||
	    !kmorph_inside(offset, size, 0, region->size))
		return -EINVAL;
	if (!join_space(file))
		return -EBUSY;
	/* All regions are in one address space: the physical address is the offset there. */
	vma->vm_pgoff += PHYS_PFN(region->base);
#ifdef HAVE_VM_FLAGS_SET
	vm_flags_set(vma, MAPPING_FLAGS);
#else
	vma->vm_flags |= MAPPING_FLAGS;
#endif
	vma->vm_private_data = region;
	vma->vm_ops = &mapping_ops;
	return 0;
}

static unsigned long handover_get_unmapped_area(struct file *file, unsigned long addr,
						unsigned long len, unsigned long pgoff,
						unsigned long flags)
{
	unsigned long room = len + PMD_SIZE;

	if (flags & MAP_FIXED)
		return IS_ALIGNED(addr, PMD_SIZE) ? addr : -EINVAL;
	if (room < len)
		return -ENOMEM;
#ifdef HAVE_MM_GET_UNMAPPED_AREA
	addr = mm_get_unmapped_area(current->mm, file, 0, room, pgoff, flags);
#else
	addr = current->mm->get_unmapped_area(file, 0, room, pgoff, flags);
#endif
	return IS_ERR_VALUE(addr) ? addr : ALIGN(addr, PMD_SIZE);
}

/*
 * One piece. What is held here holds up a revocation, so nothing is waited for: a
 * fault could be for a disk, or for rights once more, when the user's page is a
 * mapping of a region. A page that is not there ends the piece early.
 */
static ssize_t copy_piece(struct region *region, loff_t at, size_t bytes, struct iov_iter *user,
			  bool write)
{
	ssize_t ret = 0;

	down_read(&rights);
	if (!region->shared) {
		ret = -ENODEV;
	} else if (write && !region->writable) {
		ret = -EPERM;
	} else if (bytes) {
		pagefault_disable();
		if (write)
			ret = copy_from_iter(region->memory + at, bytes, user);
		else
			ret = copy_to_iter(region->memory + at, bytes, user);
		pagefault_enable();
	}
	up_read(&rights);
	return ret;
}

/* Have the user's pages there for the next try. False when there are none. */
static bool fault_in(struct iov_iter *user, size_t bytes, bool write)
{
	if (write)
		return fault_in_iov_iter_readable(user, bytes) < bytes;
	return fault_in_iov_iter_writeable(user, bytes) < bytes;
}

static ssize_t transfer(struct kiocb *iocb, struct iov_iter *user, bool write)
{
	struct opened *opened = iocb->ki_filp->private_data;
	struct region *region = smp_load_acquire(&opened->region);
	unsigned int tries = 0;
	ssize_t ret, done = 0;
	u64 room, piece;

	if (!region)
		return -EBADFD;
	for (;;) {
		room = region->size - min_t(u64, iocb->ki_pos, region->size);
		piece = min3(room, (u64)iov_iter_count(user), (u64)COPY_PIECE);
		ret = copy_piece(region, iocb->ki_pos, piece, user, write);
		if (ret < 0)
			break;
		if (!piece) {
			ret = write && iov_iter_count(user) ? -ENOSPC : 0;
			break;
		}
		iocb->ki_pos += ret;
		done += ret;
		if (ret) {
			tries = 0;
		} else if (tries++ == COPY_TRIES || !fault_in(user, piece, write)) {
			/* A page may be gone again before it is copied, but not for ever. */
			ret = -EFAULT;
			break;
		}
		if (fatal_signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		cond_resched();
	}
	return done ?: ret;
}

static ssize_t handover_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	return transfer(iocb, to, false);
}

static ssize_t handover_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	return transfer(iocb, from, true);
}

static loff_t handover_llseek(struct file *file, loff_t offset, int whence)
{
	struct opened *opened = file->private_data;
	struct region *region = smp_load_acquire(&opened->region);

	return region ? fixed_size_llseek(file, offset, whence, region->size) : -EBADFD;
}

static void fill_state(struct opened *opened, struct region *region,
		       struct kmorph_handover_state *state)
{
	state->key = region->key;
	state->size = region->size;
	state->changes = region->changes;
	state->writer = region->writer;
	state->writable = region->writable;
	WRITE_ONCE(opened->seen, region->changes);
}

/* Called with follow_mutex held. */
static int select_region(struct opened *opened, struct kmorph_handover_state *state)
{
	struct region *region;

	if (opened->region)
		return -EBUSY;
	/* Whoever heard of a region from the primary need not wait for its ring. */
	if (started && kmorph_guest_handover_changed())
		follow_table();
	list_for_each_entry(region, &regions, list) {
		if (region->key != state->key)
			continue;
		if (!region->memory)
			region->memory = kmorph_map(region->base, region->size);
		if (!region->memory)
			return -ENOMEM;
		kref_get(&region->ref);
		fill_state(opened, region, state);
		smp_store_release(&opened->region, region);
		return 0;
	}
	return -ENOENT;
}

static int read_state(struct opened *opened, struct kmorph_handover_state *state)
{
	struct region *region = smp_load_acquire(&opened->region);
	int ret = -ENOENT;

	if (!region)
		return -EBADFD;
	down_read(&rights);
	if (region->shared) {
		fill_state(opened, region, state);
		ret = 0;
	}
	up_read(&rights);
	return ret;
}

/* Called with follow_mutex held. */
static int list_keys(struct opened *opened, struct kmorph_handover_keys *keys)
{
	struct region *region;

	if (keys->reserved)
		return -EINVAL;
	memset(keys->key, 0, sizeof(keys->key));
	keys->count = 0;
	list_for_each_entry(region, &regions, list)
		if (!(region->key & KMORPH_HANDOVER_HIDDEN) &&
		    keys->count < ARRAY_SIZE(keys->key))
			keys->key[keys->count++] = region->key;
	if (!opened->region)
		WRITE_ONCE(opened->seen, list_changes);
	return 0;
}

static int call(struct opened *opened, unsigned int cmd, void *arg)
{
	int ret;

	if (cmd == KMORPH_HANDOVER_STATE)
		return read_state(opened, arg);
	mutex_lock(&follow_mutex);
	if (cmd == KMORPH_HANDOVER_SELECT)
		ret = select_region(opened, arg);
	else
		ret = list_keys(opened, arg);
	mutex_unlock(&follow_mutex);
	return ret;
}

static long handover_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	static const unsigned int known[] = {
		KMORPH_HANDOVER_SELECT, KMORPH_HANDOVER_STATE, KMORPH_HANDOVER_KEYS,
	};
	union {
		struct kmorph_head head;
		struct kmorph_handover_state state;
		struct kmorph_handover_keys keys;
	} buf;
	void __user *user = (void __user *)arg;
	struct kmorph_head head;
	unsigned int i;
	long ret;

	for (i = 0; i < ARRAY_SIZE(known) && _IOC_NR(known[i]) != _IOC_NR(cmd); i++)
		;
	if (_IOC_TYPE(cmd) != KMORPH_IOC || i == ARRAY_SIZE(known))
		return -ENOTTY;
	if (copy_from_user(&head, user, sizeof(head)))
		return -EFAULT;
	if (head.version != KMORPH_HANDOVER_ABI_VERSION)
		return -EPROTO;
	if (cmd != known[i] || head.size != _IOC_SIZE(cmd))
		return -EINVAL;
	if (copy_from_user(&buf, user, head.size))
		return -EFAULT;
	buf.head = head;
	ret = call(file->private_data, cmd, &buf);
	if (!ret && copy_to_user(user, &buf, head.size))
		ret = -EFAULT;
	return ret;
}

static __poll_t handover_poll(struct file *file, struct poll_table_struct *wait)
{
	struct opened *opened = file->private_data;
	struct region *region = smp_load_acquire(&opened->region);
	__poll_t ready = 0;

	poll_wait(file, &changed, wait);
	if (!region)
		return READ_ONCE(list_changes) != READ_ONCE(opened->seen) ? EPOLLIN : 0;
	down_read(&rights);
	if (region->changes != READ_ONCE(opened->seen))
		ready |= EPOLLIN;
	if (!region->shared)
		ready |= EPOLLIN | EPOLLHUP;
	up_read(&rights);
	return ready;
}

static int handover_open(struct inode *inode, struct file *file)
{
	struct opened *opened = kzalloc(sizeof(*opened), GFP_KERNEL);

	if (!opened)
		return -ENOMEM;
	file->private_data = opened;
	return 0;
}

static int handover_release(struct inode *inode, struct file *file)
{
	struct opened *opened = file->private_data;

	mutex_lock(&follow_mutex);
	if (opened->maps && !--space_users)
		space = NULL;
	if (opened->region)
		kref_put(&opened->region->ref, region_release);
	mutex_unlock(&follow_mutex);
	kfree(opened);
	return 0;
}

static const struct file_operations handover_fops = {
	.owner = THIS_MODULE,
	.open = handover_open,
	.release = handover_release,
	.read_iter = handover_read_iter,
	.write_iter = handover_write_iter,
	.poll = handover_poll,
	.unlocked_ioctl = handover_ioctl,
	.mmap = handover_mmap,
	.get_unmapped_area = handover_get_unmapped_area,
	.llseek = handover_llseek,
};

static struct miscdevice dev = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kmorph-handover",
	.fops = &handover_fops,
	.mode = 0600,
};

int kmorph_guest_handover_init(void)
{
	generation_seen = ~0U;
	return misc_register(&dev);
}

/**
 * kmorph_guest_handover_start - follow the table from now on
 *
 * Called when this kernel has said that it is READY, not before: the primary
 * does not wait for the answer of a kernel that has not.
 */
void kmorph_guest_handover_start(void)
{
	mutex_lock(&follow_mutex);
	started = true;
	smp_mb();	/* READY before the first look at the table */
	follow_table();
	mutex_unlock(&follow_mutex);
}

/* Nothing is mapped: a mapping would hold the module. */
void kmorph_guest_handover_exit(void)
{
	struct region *region, *next;

	misc_deregister(&dev);
	mutex_lock(&follow_mutex);
	started = false;
	list_for_each_entry_safe(region, next, &regions, list) {
		list_del(&region->list);
		kref_put(&region->ref, region_release);
	}
	mutex_unlock(&follow_mutex);
}
