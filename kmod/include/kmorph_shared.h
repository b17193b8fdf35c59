/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * kmorph_shared.h - the control area: memory shared by the primary and one
 * instance, 16 KiB in the instance's region, write-back in both kernels.
 *
 * Each cache line has exactly one writing side. A reader takes every value
 * once and checks it: the other side may be dying. Stamps are TSC values (the
 * TSC is common to all kernels of the machine).
 */
#ifndef KMORPH_SHARED_H
#define KMORPH_SHARED_H

#include <linux/types.h>

#define KMORPH_CTL_MAGIC	0x4c54434850524d4bULL	/* "KMRPHCTL" */
#define KMORPH_CTL_VERSION	3
#define KMORPH_CTL_SIZE		0x4000ULL
#define KMORPH_CTL_LINKS	16
#define KMORPH_CTL_CPUS		64
#define KMORPH_CTL_HANDOVERS	32
#define KMORPH_CTL_EXTENTS	8
#define KMORPH_CTL_TEXT		192
#define KMORPH_PULSE_US		10000	/* default pulse period */

/* Offsets of the parts within the area. */
#define KMORPH_CTL_OFF_PRIMARY	0x0000	/* written by the primary */
#define KMORPH_CTL_OFF_GRANTS	0x0200	/* written by the primary */
#define KMORPH_CTL_OFF_LINKS	0x0400	/* written by the primary */
#define KMORPH_CTL_OFF_INSTANCE	0x1000	/* written by the instance */
#define KMORPH_CTL_OFF_PULSE	0x2000	/* written by the instance, a line a CPU */
#define KMORPH_CTL_OFF_HANDOVERS 0x3000	/* written by the primary */

/* A doorbell address: apicid << 32 | vector, one store, never torn; 0: none. */

struct kmorph_ctl_primary {
	__u64 magic;		/* written last */
	__u32 version;
	__u32 size;		/* KMORPH_CTL_SIZE */
	__u32 instance_id;
	__u32 pulse_us;
	__u64 incarnation;
	__u64 base;		/* the instance's region */
	__u64 region_size;
	__u32 tsc_khz;
	__u32 cpu_count;
	__u64 door;		/* the primary's doorbell; changes when it moves */
	__u32 gone;		/* 1: the primary's module has left */
	__u32 reserved;
};

#define KMORPH_CTL_GRANTS_FIRST	2	/* generation at START: what the kernel boots with */

struct kmorph_ctl_extent {
	__u64 base;
	__u64 size;
};

/*
 * What the instance's kernel may use: its CPUs, and memory beside its region. In
 * one life both only grow, except that a CPU it has offlined can be withdrawn.
 */
struct kmorph_ctl_grants {
	__u32 generation;	/* odd while the primary changes it, even when it is whole */
	__u32 cpu_count;
	__u32 extent_count;
	__u32 reserved;
	__u32 apicid[KMORPH_CTL_CPUS];
	struct kmorph_ctl_extent extent[KMORPH_CTL_EXTENTS];
};

enum kmorph_link_state {
	KMORPH_LINK_NONE = 0,
	KMORPH_LINK_LIVE = 1,
	KMORPH_LINK_DEAD = 2,	/* reset every socket of this epoch */
};

/* One vsock area this instance shares with another kernel. */
struct kmorph_ctl_link {
	__u64 base;
	__u64 size;
	__u32 peer_id;
	__u32 epoch;
	__u32 state;		/* enum kmorph_link_state, written last */
	__u32 peer_apicids[8];	/* bitmap: where the peer's door may be; 0: primary */
	__u32 reserved;
};

struct kmorph_ctl_links {
	__u32 generation;	/* odd while the primary changes the table, even when it is whole */
	__u32 reserved[15];
	struct kmorph_ctl_link link[KMORPH_CTL_LINKS];
};

/* One handover region this instance may map. An unused entry has key 0. */
struct kmorph_ctl_handover {
	__u64 key;
	__u64 base;
	__u64 size;
	__u32 writer;		/* the instance that may write; 0: nobody */
	__u32 reserved[9];
};

struct kmorph_ctl_handovers {
	__u32 generation;	/* odd while the primary changes the table, even when it is whole */
	__u32 reserved[15];
	struct kmorph_ctl_handover region[KMORPH_CTL_HANDOVERS];
};

enum kmorph_ctl_state {
	KMORPH_CTL_ABSENT = 0,
	KMORPH_CTL_READY = 1,	/* kmorph.ko is loaded in the instance */
	KMORPH_CTL_PANIC = 2,
	KMORPH_CTL_PARKED = 3,	/* a reboot was caught, the CPU is parked */
	KMORPH_CTL_LEFT = 4,	/* kmorph.ko was unloaded */
};

struct kmorph_ctl_instance {
	__u32 state;		/* enum kmorph_ctl_state, written last */
	__u32 cpus_online;
	__u64 boot_nonce;	/* random, one a boot; never 0 once READY */
	__u64 door;		/* the instance's doorbell */
	__u64 ready_tsc;
	__u64 end_tsc;		/* when it panicked or parked */
	__u32 end_cpu;		/* the CPU number that did, in the instance */
	__u32 notices;		/* bumped with every state change */
	__u32 links_seen;	/* the last generation of the links acted upon */
	__u32 handovers_seen;	/* the same of the handover regions */
	char release[64];
	char text[KMORPH_CTL_TEXT];	/* reason, NUL terminated */
	__u32 grants_seen;	/* the last generation of the grants acted upon */
	__u32 grants_error;	/* errno of what went wrong there; 0: nothing */
	__u64 grants_what;	/* the APIC id or the address it went wrong with */
	__u64 memory_block;	/* bytes: memory comes and goes in multiples of it */
	__u64 memory_added;	/* bytes beside the region that are online */
};

/* One line a CPU of the instance, by its CPU number there. */
struct kmorph_ctl_pulse {
	__u64 count;		/* +1 every pulse period while the CPU is online */
	__u64 tsc;		/* of the last one */
	__u64 max_gap_tsc;	/* longest gap between two */
	__u32 online;		/* 1 while this CPU is online and pulses */
	__u32 apicid;
	__u64 reserved[4];
};

#endif /* KMORPH_SHARED_H */
