/* SPDX-License-Identifier: GPL-2.0 */
/*
 * kmorph_api.h - what kmorph.ko offers other modules of the same kernel: the
 * doorbell between kernels, and the links (shared areas) this kernel is part
 * of. The same in the primary and in an instance.
 */
#ifndef KMORPH_API_H
#define KMORPH_API_H

#include <linux/types.h>

#define KMORPH_PRIMARY_ID	0

/* The identity of this kernel: 0 in the primary, else the instance id. */
u32 kmorph_self_id(void);

/*
 * A doorbell address as it is published in shared memory:
 * apicid << 32 | vector, 0 for none.
 */
static inline u64 kmorph_door_make(u32 apicid, u32 vector)
{
	return (u64)apicid << 32 | vector;
}

/**
 * struct kmorph_door_client - who else wants to hear the doorbell
 * @hard: in hard interrupt context on every ring; true asks for @thread
 * @thread: in a thread, after @hard asked for it, after the doorbell moved,
 *	and with @late set every KMORPH_SCAN_MS in case a ring was lost
 * @moved: the doorbell has a new address. Interrupts are off and the
 *	descriptor of the interrupt is locked: publish the address, no more
 */
struct kmorph_door_client {
	bool (*hard)(void);
	void (*thread)(bool late);
	void (*moved)(u64 address);
};

#define KMORPH_SCAN_MS	100

int kmorph_door_register(const struct kmorph_door_client *client);
void kmorph_door_unregister(const struct kmorph_door_client *client);
u64 kmorph_door_address(void);
void kmorph_door_wake(void);
void kmorph_door_sync(void);

/**
 * kmorph_ring - ring the doorbell of another kernel
 * @peer: id of the kernel
 * @address: its doorbell, as read (once) from shared memory
 *
 * Callable from any context. Returns 0; -EINVAL when @address cannot be a
 * doorbell of @peer; -ENXIO when @peer is not known to run.
 */
int kmorph_ring(u32 peer, u64 address);

/**
 * struct kmorph_link - a shared area between this kernel and another one
 * @epoch: never used before for this pair; a new one for every formatting
 */
struct kmorph_link {
	phys_addr_t base;
	u64 size;
	u32 peer;
	u32 epoch;
};

/**
 * struct kmorph_link_ops - who uses the links
 * @format: (primary only) lay out an area between kernels @id_a and @id_b;
 *	neither of them knows of it yet
 * @add: the area is formatted: join it
 * @del: the link is over: reset all that uses it. On return nothing in this
 *	kernel touches the area any more; -EBUSY when that could not be had
 *	within a bounded time: the area is then never used again
 *
 * All are called in process context, one at a time.
 */
struct kmorph_link_ops {
	int (*format)(phys_addr_t base, u64 size, u32 id_a, u32 id_b, u32 epoch);
	int (*add)(const struct kmorph_link *link);
	int (*del)(const struct kmorph_link *link);
};

int kmorph_link_register(const struct kmorph_link_ops *ops);
void kmorph_link_unregister(const struct kmorph_link_ops *ops);

/* The other side of a link has come (@up) or its module has left. */
void kmorph_link_report(const struct kmorph_link *link, bool up);

/* Map shared memory write-back, or fail; kmorph_unmap() undoes it. */
void *kmorph_map(phys_addr_t base, size_t size);
void kmorph_unmap(void *addr);

#endif /* KMORPH_API_H */
