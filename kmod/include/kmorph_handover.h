/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * kmorph_handover.h - the ABI of /dev/kmorph-handover, for workloads in an
 * instance: memory shared with workloads of other kernels, one of which may
 * write.
 *
 * Open the device, select a region by its key, mmap() it shared. The offset is
 * that within the region; address, length and offset are multiples of 2 MiB
 * (mmap() chooses such an address). A mapping can be made writable at any time;
 * it can be read as long as the region is shared with this kernel, and written
 * while this kernel is the writer. A write at any other time raises SIGBUS, or
 * fails with EFAULT where a system call writes. When this kernel becomes the
 * writer the same mapping can be written.
 *
 * pread() and pwrite() (also read(), write(), lseek(), preadv(), pwritev()) need
 * no mapping, and fail with an error where one would raise SIGBUS: EBADFD without
 * a region selected, ENODEV when it is no longer shared with this kernel, EPERM
 * for a write while this kernel is not the writer. They are cut at the region's
 * end: there a read gives 0, and a write ENOSPC. What was copied before an error
 * is told instead of it; the next call tells the error.
 *
 * poll(): POLLIN when the writer has changed since SELECT or STATE was last
 * called on this open file (without a region selected: when the list of regions
 * has changed since KEYS), POLLHUP when the region is no longer shared.
 *
 * The memory cannot be pinned: O_DIRECT, io_uring buffers, shared futexes and
 * ptrace do not work on it.
 */
#ifndef KMORPH_HANDOVER_H
#define KMORPH_HANDOVER_H

#include <kmorph_abi.h>

/* Of these calls alone: workloads are built for it, and not for that of /dev/kmorph. */
#define KMORPH_HANDOVER_ABI_VERSION	1

#define KMORPH_HANDOVER_DEVICE	"/dev/kmorph-handover"

/* Keys with this bit are kmorph's own: KEYS does not list them, SELECT takes them. */
#define KMORPH_HANDOVER_HIDDEN	(1ULL << 63)

/*
 * SELECT: the region this open file is for, once. ENOENT when no region of this
 * key is shared with this kernel; EBUSY when one is selected already. STATE:
 * how it is now. ENOENT when it is no longer shared, EBADFD without a selected
 * region.
 */
struct kmorph_handover_state {
	struct kmorph_head head;
	__u64 key;		/* SELECT: in; STATE: out */
	__u64 size;		/* out */
	__u64 changes;		/* out: changes of the writer seen by this kernel */
	__u32 writer;		/* out: the instance that may write, 0 for nobody */
	__u32 writable;		/* out: 1 when that is this kernel */
};

/* KEYS: the regions shared with this kernel, without the hidden ones. */
struct kmorph_handover_keys {
	struct kmorph_head head;
	__u32 count;		/* out */
	__u32 reserved;
	__u64 key[KMORPH_MAX_HANDOVERS];
};

#define KMORPH_HANDOVER_SELECT	_IOWR(KMORPH_IOC, 0x40, struct kmorph_handover_state)
#define KMORPH_HANDOVER_STATE	_IOWR(KMORPH_IOC, 0x41, struct kmorph_handover_state)
#define KMORPH_HANDOVER_KEYS	_IOWR(KMORPH_IOC, 0x42, struct kmorph_handover_keys)

#endif /* KMORPH_HANDOVER_H */
