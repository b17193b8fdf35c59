/* SPDX-License-Identifier: GPL-2.0 */
/*
 * kmorph.h - inside kmorph.ko
 *
 * Locks, outermost first:
 *   kmorph_inst.op	one long operation (start, stop, destroy) on an instance
 *   link_mutex		the links and the calls to their user
 *   handover_mutex	the handover regions. Never held while waiting for an instance
 *   cpu_mutex		taking and giving CPUs (holds the hot-plug locks inside)
 *   kmorph_lock	the tables: pool, CPUs, instances. Never held while waiting
 *   ctl_lock		(raw) the mapped control areas; taken in hard interrupts
 */
#ifndef KMORPH_INTERNAL_H
#define KMORPH_INTERNAL_H

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/types.h>

#include <kmorph_abi.h>
#include <kmorph_api.h>
#include <kmorph_shared.h>

extern struct mutex kmorph_lock;
extern unsigned int kmorph_role;

static inline bool kmorph_is_primary(void)
{
	return kmorph_role == KMORPH_ROLE_PRIMARY;
}

static inline bool kmorph_overlaps(u64 a, u64 a_size, u64 b, u64 b_size)
{
	return a < b + b_size && b < a + a_size;
}

static inline bool kmorph_inside(u64 a, u64 a_size, u64 b, u64 b_size)
{
	return a >= b && a_size <= b_size && a - b <= b_size - a_size;
}

/* Page aligned, not empty, no wrap-around, within the CPU's physical space. */
bool kmorph_range_ok(u64 base, u64 size);

/* low memory: one slot an instance */
struct kmorph_slot {
	u32 index;
	phys_addr_t trampoline;
	phys_addr_t base;
	u64 size;
	bool usable;
	bool used;
	atomic_t mappings;
};

int kmorph_lowmem_init(void);
struct kmorph_slot *kmorph_lowmem_get(void);
void kmorph_lowmem_put(struct kmorph_slot *slot);
void kmorph_lowmem_span(u64 *base, u64 *size);

/* pool */
struct kmorph_range {
	struct list_head list;
	u64 base;
	u64 size;
	u32 source;
	atomic_t mappings;
};

int kmorph_pool_init(void);
void kmorph_pool_exit(void);
int kmorph_pool_add(struct kmorph_pool *req);
int kmorph_pool_remove(struct kmorph_pool *req);
int kmorph_pool_list(struct kmorph_pool_list *req);
struct kmorph_range *kmorph_pool_find(u64 base, u64 size);
u64 kmorph_pool_place(u64 size, u64 align);

/* CPUs */
int kmorph_cpu_init(void);
void kmorph_cpu_exit(void);
int kmorph_cpu_take(struct kmorph_cpu *req);
int kmorph_cpu_give(struct kmorph_cpu *req);
int kmorph_cpu_list(struct kmorph_cpu_list *req);
int kmorph_cpu_lend(u32 apicid, u32 instance);
void kmorph_cpu_unlend(u32 apicid, u32 instance);
void kmorph_cpu_describe(struct kmorph_cpu *req);
u32 kmorph_boot_apicid(void);

/* local APIC */
void kmorph_icr(u32 apicid, u32 low);
void kmorph_init_assert(u32 apicid);
void kmorph_init_deassert(u32 apicid);
void kmorph_sipi(u32 apicid, phys_addr_t page);
void kmorph_nmi(u32 apicid);
void kmorph_ipi(u32 apicid, u32 vector);

/* instances */
struct kmorph_inst {
	struct kref ref;
	struct mutex op;
	u32 id;
	u32 state;
	bool gone;
	u64 incarnation;
	u64 base;
	u64 size;
	u64 control;
	u32 pulse_us;
	u32 cpu_count;
	u32 apicid[KMORPH_MAX_CPUS];
	u32 extent_count;
	struct kmorph_extent extent[KMORPH_MAX_EXTENTS];
	struct kmorph_slot *slot;
	void *ctl;
	void *low;			/* the trampoline page */
	u64 started_ns;
	u64 stopped_cpus;
	struct page **tables;
	unsigned int table_count;
	bool elcr_held;
	/* what the primary has seen of the control area; under ctl_lock */
	bool watched;
	u32 notices;
	u64 nonce_seen;
	u32 end_seen;
	u32 grants_generation;		/* last one written; under op */
	u32 links_generation;		/* last one written; under link_mutex */
	u32 handovers_generation;	/* last one written; under handover_mutex */
};

int kmorph_instance_create(struct kmorph_instance *req);
int kmorph_instance_query(struct kmorph_instance *req);
int kmorph_instance_destroy(struct kmorph_ref *req);
int kmorph_instance_list(struct kmorph_instance_list *req);
int kmorph_instance_nmi(struct kmorph_ref *req);
int kmorph_cpu_assign(struct kmorph_cpu *req);
int kmorph_cpu_withdraw(struct kmorph_cpu *req);
int kmorph_memory_assign(struct kmorph_memory *req);
struct kmorph_inst *kmorph_inst_get(u32 id);
void kmorph_inst_put(struct kmorph_inst *inst);
struct kmorph_inst *kmorph_inst_lock(u32 id, int *err);
void kmorph_inst_unlock(struct kmorph_inst *inst);
bool kmorph_inst_covers(u64 base, u64 size);
struct kmorph_slot *kmorph_inst_slot_at(u64 base, u64 size);

int kmorph_start(struct kmorph_start *req);
int kmorph_stop(struct kmorph_stop *req);
bool kmorph_fence_one(struct kmorph_inst *inst, u32 index);

int kmorph_tables_build(struct kmorph_inst *inst);
void kmorph_tables_free(struct kmorph_inst *inst);
u32 kmorph_tables_root(const struct kmorph_inst *inst);

/* control areas, seen from the primary */
void kmorph_ctl_format(struct kmorph_inst *inst);
void kmorph_ctl_grants(struct kmorph_inst *inst);
u64 kmorph_ctl_memory_block(struct kmorph_inst *inst);
bool kmorph_ctl_absent(struct kmorph_inst *inst);
bool kmorph_ctl_ready(struct kmorph_inst *inst);
bool kmorph_ctl_cpu_online(struct kmorph_inst *inst, u32 apicid);
void kmorph_ctl_watch(struct kmorph_inst *inst);
void kmorph_ctl_unwatch(struct kmorph_inst *inst);
void kmorph_ctl_publish_door(u64 address);
bool kmorph_ctl_hard(void);
void kmorph_ctl_thread(void);
void kmorph_ctl_ring(struct kmorph_inst *inst);
void kmorph_elcr_hold(struct kmorph_inst *inst);
void kmorph_elcr_restore(struct kmorph_inst *inst);

/* doorbell */
int kmorph_door_init(void);
void kmorph_door_exit(void);
int kmorph_door_move(struct kmorph_door_req *req);
void kmorph_door_where(u32 *apicid, u32 *vector);
bool kmorph_vector_ok(u64 address);
int kmorph_owner_set(u32 apicid, u32 instance);
void kmorph_owner_clear(u32 apicid);

/* links, seen from the primary */
int kmorph_link_add(struct kmorph_link_req *req);
int kmorph_link_del(struct kmorph_link_req *req);
void kmorph_links_stop(struct kmorph_inst *inst);
int kmorph_links_forget(struct kmorph_inst *inst);
int kmorph_links_settle(struct kmorph_inst *inst);
void kmorph_links_reap(void);
void kmorph_links_write(struct kmorph_inst *inst);
void kmorph_links_write_peers(struct kmorph_inst *inst);
bool kmorph_link_covers(u64 base, u64 size);
int kmorph_primary_link_register(const struct kmorph_link_ops *ops);
void kmorph_primary_link_unregister(void);
void kmorph_links_exit(void);

/* handover regions, seen from the primary */
int kmorph_handover_create(struct kmorph_handover *req);
int kmorph_handover_destroy(struct kmorph_handover *req);
int kmorph_handover_list(struct kmorph_handover_list *req);
int kmorph_handover_share(struct kmorph_handover_share *req);
int kmorph_handover_unshare(struct kmorph_handover_share *req);
int kmorph_handover_assign(struct kmorph_handover_assign *req);
bool kmorph_handover_covers(u64 base, u64 size);
void kmorph_handover_stop(struct kmorph_inst *inst);
void kmorph_handover_exit(void);

/* events */
void kmorph_event(u32 type, const struct kmorph_inst *inst, u32 cpu, u64 tsc,
		  u64 data, const char *text);

/* character device */
int kmorph_dev_init(void);
void kmorph_dev_exit(void);
int kmorph_events_open(struct file *file);
void kmorph_events_release(struct file *file);
ssize_t kmorph_events_read(struct file *file, char __user *buf, size_t count, loff_t *pos);
__poll_t kmorph_events_poll(struct file *file, struct poll_table_struct *wait);
u32 kmorph_events_lost(struct file *file);

/* instance role */
int kmorph_guest_init(phys_addr_t control);
void kmorph_guest_exit(void);
void kmorph_guest_publish_door(u64 address);
bool kmorph_guest_hard(void);
void kmorph_guest_thread(void);
void kmorph_guest_ring(void);
int kmorph_guest_ring_peer(u32 peer, u64 address);
int kmorph_guest_link_init(void);
void kmorph_guest_link_exit(void);
bool kmorph_guest_link_changed(void);
void kmorph_guest_link_kick(void);
int kmorph_guest_link_register(const struct kmorph_link_ops *ops);
void kmorph_guest_link_unregister(void);
bool kmorph_guest_link_apicid_ok(u32 peer, u32 apicid);
int kmorph_guest_handover_init(void);
void kmorph_guest_handover_start(void);
void kmorph_guest_handover_exit(void);
bool kmorph_guest_handover_changed(void);
void kmorph_guest_handover_follow(void);
int kmorph_guest_grants_init(void);
void kmorph_guest_grants_exit(void);
bool kmorph_guest_grants_changed(void);
void kmorph_guest_grants_kick(void);
struct kmorph_ctl_primary *kmorph_guest_primary(void);
struct kmorph_ctl_grants *kmorph_guest_grants(void);
struct kmorph_ctl_instance *kmorph_guest_self(void);
struct kmorph_ctl_links *kmorph_guest_links(void);
struct kmorph_ctl_handovers *kmorph_guest_handovers(void);
struct kmorph_ctl_pulse *kmorph_guest_pulse(unsigned int cpu);
void kmorph_guest_state(u32 state, const char *text);
int kmorph_pulse_init(u32 period_us);
void kmorph_pulse_exit(void);
int kmorph_last_words_init(void);
void kmorph_last_words_exit(void);

#endif /* KMORPH_INTERNAL_H */
