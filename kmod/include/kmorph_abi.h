/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * kmorph_abi.h - the ioctl ABI of /dev/kmorph
 *
 * Every structure starts with its size and the ABI version the caller was
 * built for. A call with a wrong version fails with EPROTO, one with a wrong
 * size with EINVAL. All calls need CAP_SYS_ADMIN. Addresses are physical,
 * CPUs are named by APIC id. A failed call changes nothing.
 */
#ifndef KMORPH_ABI_H
#define KMORPH_ABI_H

#include <linux/types.h>
#include <linux/ioctl.h>

#define KMORPH_ABI_VERSION	2
#define KMORPH_DEVICE		"/dev/kmorph"

#define KMORPH_MAX_INSTANCES	14	/* low-memory slices below 640 KiB */
#define KMORPH_MAX_CPUS		64	/* CPUs of one instance */
#define KMORPH_MAX_POOL		32	/* pool ranges */
#define KMORPH_MAX_MACHINE_CPUS	256
#define KMORPH_TEXT		128
#define KMORPH_MAX_HANDOVERS	32	/* handover regions */
#define KMORPH_MAX_EXTENTS	8	/* ranges an instance got while it ran */

struct kmorph_head {
	__u32 size;
	__u32 version;
};

enum kmorph_role {
	KMORPH_ROLE_PRIMARY = 1,
	KMORPH_ROLE_INSTANCE = 2,
};

/* KMORPH_INFO: what this kernel and this machine are. */
struct kmorph_info {
	struct kmorph_head head;
	__u32 role;		/* enum kmorph_role */
	__u32 instance_id;	/* 0 in the primary */
	__u32 tsc_khz;
	__u32 x2apic;		/* 1 when the local APICs run in x2APIC mode */
	__u64 memory_block_size;	/* bytes; the step of memory hot-unplug */
	__u32 boot_apicid;	/* the boot processor: never lent */
	__u32 door_apicid;	/* where this kernel's doorbell is now */
	__u32 door_vector;
	__u32 events_lost;	/* events this open file lost to a full queue */
	__u64 low_base;		/* low memory handed out to instances */
	__u64 low_size;
	char release[64];	/* utsname()->release */
};

enum kmorph_pool_source {
	KMORPH_POOL_RESERVED = 1,	/* kept from Linux by memmap= */
	KMORPH_POOL_OFFLINED = 2,	/* memory blocks taken offline */
};

/*
 * KMORPH_POOL_ADD: every page must be reserved at boot or offline, else EBUSY
 * with bad_address set. KMORPH_POOL_REMOVE: EBUSY while an instance, a link, a
 * handover region or a mapping uses the range.
 */
struct kmorph_pool {
	struct kmorph_head head;
	__u64 base;		/* page aligned */
	__u64 size;
	__u32 source;		/* out: enum kmorph_pool_source */
	__u32 mappings;		/* out: user mappings that exist */
	__u64 bad_address;	/* out: first page refused */
};

/* KMORPH_POOL_LIST */
struct kmorph_pool_list {
	struct kmorph_head head;
	__u32 count;		/* out */
	__u32 reserved;
	struct kmorph_pool range[KMORPH_MAX_POOL];
};

enum kmorph_cpu_state {
	KMORPH_CPU_ONLINE = 1,	/* runs the primary kernel */
	KMORPH_CPU_OFFLINE = 2,	/* offline, the primary may online it */
	KMORPH_CPU_TAKEN = 3,	/* kept for instances, runs nothing */
	KMORPH_CPU_LENT = 4,	/* belongs to an instance */
};

/*
 * KMORPH_CPU_TAKE: take a CPU offline and keep it from being onlined.
 * KMORPH_CPU_GIVE: let it go and online it. EBUSY for the boot processor and
 * for a CPU an instance owns; ENODEV for an unknown APIC id; EALREADY when
 * there is nothing to do.
 */
struct kmorph_cpu {
	struct kmorph_head head;
	__u32 apicid;
	__u32 cpu;		/* out: the primary's CPU number */
	__u32 state;		/* out: enum kmorph_cpu_state */
	__u32 instance;		/* out: owner, 0 when none */
};

/* KMORPH_CPU_LIST */
struct kmorph_cpu_list {
	struct kmorph_head head;
	__u32 count;		/* out */
	__u32 reserved;
	struct kmorph_cpu cpu[KMORPH_MAX_MACHINE_CPUS];
};

enum kmorph_instance_state {
	KMORPH_INST_CREATED = 1,	/* owns CPUs and memory, runs nothing */
	KMORPH_INST_RUNNING = 2,	/* started */
	KMORPH_INST_STOPPED = 3,	/* every CPU seen stopped */
	KMORPH_INST_STUCK = 4,	/* a stop was asked for and not every CPU confirmed it */
};

/* A range of the pool that an instance got while it ran, beside its region. */
struct kmorph_extent {
	__u64 base;
	__u64 size;
};

/*
 * KMORPH_CREATE claims CPUs (all TAKEN) and a range of the pool for an
 * instance, hands out its low memory, and formats the control area.
 * KMORPH_QUERY reads it back; KMORPH_DESTROY (only when CREATED or STOPPED)
 * returns CPUs to TAKEN and the range to the pool.
 */
struct kmorph_instance {
	struct kmorph_head head;
	__u32 id;		/* 1..511 */
	__u32 state;		/* out: enum kmorph_instance_state */
	__u64 incarnation;	/* chosen by the caller, shown in every event */
	__u64 base;		/* the region: page aligned, inside one pool range */
	__u64 size;
	__u64 control;		/* the control area: inside the region, page aligned */
	__u32 pulse_us;		/* pulse period asked of the instance, 0 for the default */
	__u32 cpu_count;
	__u32 apicid[KMORPH_MAX_CPUS];	/* the first one boots the kernel */
	__u64 trampoline;	/* out: page below 1 MiB */
	__u64 low_base;		/* out: slice for the kernel's own real-mode code */
	__u64 low_size;		/* out */
	__u64 started_ns;	/* out: CLOCK_MONOTONIC of the last START, 0 if never */
	__u64 stopped_cpus;	/* out: bit n: apicid[n] was seen stopped */
	__u32 extent_count;	/* out */
	__u32 reserved;
	struct kmorph_extent extent[KMORPH_MAX_EXTENTS];	/* out */
};

/*
 * KMORPH_CPU_ASSIGN gives one more taken CPU (apicid) to an instance that
 * exists (instance), running or not. A kernel that runs is told in its control
 * area and onlines it, if its tables name it. It is fenced with the others.
 * KMORPH_CPU_WITHDRAW takes one back to TAKEN, once
 * the instance's kernel has offlined it, and makes it prove that it has left:
 * EBUSY for the boot CPU, for one whose pulse says online, and while nobody
 * says so because kmorph.ko is not loaded there; ETIMEDOUT when it did not
 * confirm (it then stays with the instance).
 */

/*
 * KMORPH_MEMORY_ASSIGN gives a free range of the pool to a running instance,
 * whose kernel is told in its control area and adds it to its memory: whole
 * memory blocks of that kernel (memory_block), which it onlines as its command
 * line says. The range is the instance's until it is destroyed. EINVAL not
 * whole blocks; ENOENT not in the pool; EBUSY somebody has it; ENOSPC it has
 * KMORPH_MAX_EXTENTS already; ENXIO it does not run, or kmorph.ko is not loaded
 * in it.
 */
struct kmorph_memory {
	struct kmorph_head head;
	__u32 instance;
	__u32 reserved;
	__u64 base;
	__u64 size;
	__u64 memory_block;	/* out: bytes, 0 while it is not known */
};

/* KMORPH_INSTANCE_LIST: ids of all instances the module holds. */
struct kmorph_instance_list {
	struct kmorph_head head;
	__u32 count;		/* out */
	__u32 reserved;
	__u32 id[KMORPH_MAX_INSTANCES + 2];
};

/* KMORPH_START: jump to a 64-bit Linux entry point on the first CPU. */
struct kmorph_start {
	struct kmorph_head head;
	__u32 id;
	__u32 stage;		/* out: how far the trampoline came; 3 is long mode */
	__u64 entry;		/* inside the region */
	__u64 boot_params;	/* inside the region; passed in %rsi */
	__u64 started_ns;	/* out: CLOCK_MONOTONIC */
	__u64 started_tsc;	/* out */
};

/*
 * KMORPH_STOP: INIT every CPU of the instance, then make each one prove it has
 * left its kernel by running a parking stub. ETIMEDOUT when one did not: the
 * instance is then STUCK and keeps everything. Every socket to the instance is
 * reset and its doorbell is retired before the call returns.
 */
struct kmorph_stop {
	struct kmorph_head head;
	__u32 id;
	__u32 reserved;
	__u64 stopped_cpus;	/* out: bit n: apicid[n] confirmed */
	__u64 duration_ns;	/* out */
};

/*
 * KMORPH_DESTROY, and KMORPH_NMI to the instance's CPU `cpu`: ENXIO where an NMI
 * would find no interrupt table, before kmorph.ko is loaded or the CPU online.
 */
struct kmorph_ref {
	struct kmorph_head head;
	__u32 id;
	__u32 cpu;		/* index into apicid[] */
};

/*
 * KMORPH_LINK_ADD: format a vsock area between two kernels and announce it to
 * both. Between the primary (id 0) and an instance it lies in the instance's
 * region; between two instances in a part of the pool no region covers.
 * KMORPH_LINK_DEL: reset every socket of the link and forget it.
 */
struct kmorph_link_req {
	struct kmorph_head head;
	__u32 id_a;		/* the lower id */
	__u32 id_b;
	__u64 base;		/* page aligned */
	__u64 size;		/* at least KMORPH_LINK_MIN */
	__u32 epoch;		/* out */
	__u32 reserved;
};
#define KMORPH_LINK_MIN		0x100000ULL

/* KMORPH_DOOR: move this kernel's doorbell to a CPU (number, not APIC id). */
struct kmorph_door_req {
	struct kmorph_head head;
	__u32 cpu;
	__u32 reserved;
};

/*
 * Handover regions: pieces of the pool that are no kernel's RAM. Workloads of
 * several instances map one at the same time (kmorph_handover.h), and one of
 * these kernels at the most may write. A region outlives the kernels that use
 * it: only KMORPH_HANDOVER_DESTROY and the unloading of the module end it.
 *
 * KMORPH_HANDOVER_CREATE: reserve a region and clear it. EEXIST for a key in
 * use; ENOSPC when there is no room; for a place asked for, ENOENT when it is
 * not in the pool and EBUSY when somebody has it. KMORPH_HANDOVER_DESTROY:
 * EBUSY while it is shared. Only the key counts there.
 */
struct kmorph_handover {
	struct kmorph_head head;
	__u64 key;		/* chosen by the caller, unique, not 0 */
	__u64 size;		/* a multiple of KMORPH_HANDOVER_ALIGN */
	__u64 base;		/* in: a place, 0 for any; out: where it is */
	__u32 writer;		/* out: the instance that may write, 0 for nobody */
	__u32 share_count;	/* out */
	__u32 share[KMORPH_MAX_INSTANCES + 2];	/* out: instances that may map it */
};
#define KMORPH_HANDOVER_ALIGN	0x200000ULL

/* KMORPH_HANDOVER_LIST */
struct kmorph_handover_list {
	struct kmorph_head head;
	__u32 count;		/* out */
	__u32 reserved;
	struct kmorph_handover region[KMORPH_MAX_HANDOVERS];
};

/*
 * KMORPH_HANDOVER_SHARE: a running instance may map the region from now on, and
 * read it. It loses that with its STOP. ENOENT for an unknown key or instance,
 * ESTALE for another incarnation, ENXIO when it does not run, EALREADY.
 *
 * KMORPH_HANDOVER_UNSHARE: it may no longer, and has confirmed that nothing of
 * it maps the region. EBUSY for the writer; ENOENT when it is not shared with
 * it; ETIMEDOUT when it did not confirm: it is then still shared.
 */
struct kmorph_handover_share {
	struct kmorph_head head;
	__u64 key;
	__u64 incarnation;
	__u32 instance;
	__u32 timeout_us;	/* UNSHARE: how long it may take; else 0 */
};

/*
 * KMORPH_HANDOVER_ASSIGN: make this instance the one writer. The one before it
 * is revoked first: it has confirmed that no mapping of it is writable, or is
 * seen stopped. ETIMEDOUT when it did not confirm; EACCES when the region is
 * not shared with the new one; EBUSY while another call changes the region.
 * After every error the writer is the one it was.
 */
struct kmorph_handover_assign {
	struct kmorph_head head;
	__u64 key;
	__u32 instance;		/* 0: nobody */
	__u32 timeout_us;	/* for the confirmation, at most KMORPH_HANDOVER_MAX_US */
	__u64 revoke_ns;	/* out: how long the confirmation took */
};
#define KMORPH_HANDOVER_MAX_US	10000000U

enum kmorph_event_type {
	KMORPH_EV_READY = 1,	/* the instance's kmorph.ko is up; data = boot nonce */
	KMORPH_EV_PANIC = 2,	/* panic notice; text = reason */
	KMORPH_EV_PARKED = 3,	/* a reboot was caught and the CPU parked; text = what */
	KMORPH_EV_LINK_UP = 4,	/* both sides of a link are there; data = peer id */
	KMORPH_EV_LINK_DOWN = 5,	/* the other side's module left; data = peer id */
	KMORPH_EV_STOPPED = 6,	/* STOP finished; data = stopped_cpus */
	KMORPH_EV_LEFT = 7,	/* the instance's kmorph.ko was unloaded */
};

/* read() returns whole events, oldest first; poll() says when there is one. */
struct kmorph_event {
	__u32 size;
	__u32 type;		/* enum kmorph_event_type */
	__u32 instance;
	__u32 cpu;		/* index of the CPU in the instance, where known */
	__u64 incarnation;
	__u64 tsc;		/* when it happened; the instance's own stamp if it gave one */
	__u64 seen_ns;		/* CLOCK_MONOTONIC when the primary saw it */
	__u64 data;
	char text[KMORPH_TEXT];
};

#define KMORPH_IOC		'm'
#define KMORPH_INFO		_IOWR(KMORPH_IOC, 0x01, struct kmorph_info)
#define KMORPH_POOL_ADD		_IOWR(KMORPH_IOC, 0x02, struct kmorph_pool)
#define KMORPH_POOL_REMOVE	_IOWR(KMORPH_IOC, 0x03, struct kmorph_pool)
#define KMORPH_POOL_LIST	_IOWR(KMORPH_IOC, 0x04, struct kmorph_pool_list)
#define KMORPH_CPU_TAKE		_IOWR(KMORPH_IOC, 0x05, struct kmorph_cpu)
#define KMORPH_CPU_GIVE		_IOWR(KMORPH_IOC, 0x06, struct kmorph_cpu)
#define KMORPH_CPU_LIST		_IOWR(KMORPH_IOC, 0x07, struct kmorph_cpu_list)
#define KMORPH_CREATE		_IOWR(KMORPH_IOC, 0x08, struct kmorph_instance)
#define KMORPH_QUERY		_IOWR(KMORPH_IOC, 0x09, struct kmorph_instance)
#define KMORPH_INSTANCE_LIST	_IOWR(KMORPH_IOC, 0x0a, struct kmorph_instance_list)
#define KMORPH_START		_IOWR(KMORPH_IOC, 0x0b, struct kmorph_start)
#define KMORPH_STOP		_IOWR(KMORPH_IOC, 0x0c, struct kmorph_stop)
#define KMORPH_DESTROY		_IOWR(KMORPH_IOC, 0x0d, struct kmorph_ref)
#define KMORPH_NMI		_IOWR(KMORPH_IOC, 0x0e, struct kmorph_ref)
#define KMORPH_LINK_ADD		_IOWR(KMORPH_IOC, 0x0f, struct kmorph_link_req)
#define KMORPH_LINK_DEL		_IOWR(KMORPH_IOC, 0x10, struct kmorph_link_req)
#define KMORPH_DOOR		_IOWR(KMORPH_IOC, 0x11, struct kmorph_door_req)
#define KMORPH_CPU_ASSIGN	_IOWR(KMORPH_IOC, 0x12, struct kmorph_cpu)
#define KMORPH_CPU_WITHDRAW	_IOWR(KMORPH_IOC, 0x13, struct kmorph_cpu)
#define KMORPH_HANDOVER_CREATE	_IOWR(KMORPH_IOC, 0x14, struct kmorph_handover)
#define KMORPH_HANDOVER_DESTROY	_IOWR(KMORPH_IOC, 0x15, struct kmorph_handover)
#define KMORPH_HANDOVER_LIST	_IOWR(KMORPH_IOC, 0x16, struct kmorph_handover_list)
#define KMORPH_HANDOVER_SHARE	_IOWR(KMORPH_IOC, 0x17, struct kmorph_handover_share)
#define KMORPH_HANDOVER_UNSHARE	_IOWR(KMORPH_IOC, 0x18, struct kmorph_handover_share)
#define KMORPH_HANDOVER_ASSIGN	_IOWR(KMORPH_IOC, 0x19, struct kmorph_handover_assign)
#define KMORPH_MEMORY_ASSIGN	_IOWR(KMORPH_IOC, 0x1a, struct kmorph_memory)

/*
 * mmap(): offset = physical address. Only ranges inside the pool, and the low
 * slices of existing instances. Mappings are write-back.
 */

#endif /* KMORPH_ABI_H */
