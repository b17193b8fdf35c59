// SPDX-License-Identifier: GPL-2.0
/*
 * The doorbell: one interrupt vector of this kernel that other kernels may send
 * by physical APIC id. It comes from a child domain of the vector domain, which
 * lets us see every move: on each, the new address is published and the rings
 * looked at once, because an interrupt sent to the old place may be lost.
 */
#include "kmorph.h"

#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/jiffies.h>
#include <linux/rcupdate.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <asm/apic.h>
#include <asm/hw_irq.h>
#include <asm/irqdomain.h>

#ifdef HAVE_IRQ_MOVE_PCNTXT
#define DOOR_STATUS	(IRQ_MOVE_PCNTXT | IRQ_NO_BALANCING)
#else
#define DOOR_STATUS	IRQ_NO_BALANCING
#endif

/* Vectors a doorbell can have: above the exceptions, below the system's own. */
#define DOOR_VECTOR_MIN	0x20
#define DOOR_VECTOR_MAX	0xef

#define STORM_REST_MS	10

static struct door {
	unsigned int virq;
	u64 address;
	u64 moves;
	u64 storms;
	unsigned long window;		/* the jiffy the rings are counted in */
	unsigned int rings;
	bool late;
} door;

static unsigned int door_cpu;
module_param(door_cpu, uint, 0444);
MODULE_PARM_DESC(door_cpu, "CPU that takes the doorbell at first (default 0)");

static unsigned int storm_rate = 400000;
module_param(storm_rate, uint, 0644);
MODULE_PARM_DESC(storm_rate, "rings a second that are a storm: the doorbell then rests for 10 ms");

module_param_named(door_moves, door.moves, ullong, 0444);
MODULE_PARM_DESC(door_moves, "how often the doorbell has moved (read only)");
module_param_named(door_storms, door.storms, ullong, 0444);
MODULE_PARM_DESC(door_storms, "how often rings came so fast that the doorbell rested (read only)");

static struct irq_domain *domain;
static struct fwnode_handle *fwnode;
static const struct kmorph_door_client __rcu *client;

static void wake_thread(struct work_struct *work);
static void scan(struct work_struct *work);
static void storm_over(struct work_struct *work);
static DECLARE_WORK(wake_work, wake_thread);
static DECLARE_DELAYED_WORK(scan_work, scan);
static DECLARE_DELAYED_WORK(storm_work, storm_over);

/* Which instance runs on a CPU, by APIC id: who may be rung there. */
static DEFINE_XARRAY(owners);

int kmorph_owner_set(u32 apicid, u32 instance)
{
	return xa_err(xa_store(&owners, apicid, xa_mk_value(instance), GFP_KERNEL));
}

void kmorph_owner_clear(u32 apicid)
{
	xa_erase(&owners, apicid);
}

bool kmorph_vector_ok(u64 address)
{
	u32 vector = (u32)address;

	return vector >= DOOR_VECTOR_MIN && vector <= DOOR_VECTOR_MAX;
}

static int ring_instance(u32 instance, u64 address)
{
	void *entry;

	rcu_read_lock();
	entry = xa_load(&owners, address >> 32);
	if (entry && xa_to_value(entry) == instance)
		kmorph_ipi(address >> 32, (u32)address);
	rcu_read_unlock();
	if (entry && xa_to_value(entry) != instance)
		return -EINVAL;
	return entry ? 0 : -ENXIO;
}

int kmorph_ring(u32 peer, u64 address)
{
	if (!address)
		return -ENXIO;
	if (!kmorph_vector_ok(address))
		return -EINVAL;
	if (!kmorph_is_primary())
		return kmorph_guest_ring_peer(peer, address);
	return ring_instance(peer, address);
}
EXPORT_SYMBOL_GPL(kmorph_ring);

/**
 * kmorph_door_address - where this kernel may be rung, for publication
 */
u64 kmorph_door_address(void)
{
	return READ_ONCE(door.address);
}
EXPORT_SYMBOL_GPL(kmorph_door_address);

void kmorph_door_where(u32 *apicid, u32 *vector)
{
	u64 address = kmorph_door_address();

	*apicid = address >> 32;
	*vector = (u32)address;
}

/*
 * Interrupts are off and the descriptor is locked. irq_cfg.dest_apicid will not
 * do for the address: with flat logical delivery it is a mask.
 */
static void publish(struct irq_data *data)
{
	const struct kmorph_door_client *user;
	unsigned int cpu = cpumask_first(irq_data_get_effective_affinity_mask(data));
	u64 address;

	if (cpu >= nr_cpu_ids)
		return;
	address = kmorph_door_make(per_cpu(x86_cpu_to_apicid, cpu), irqd_cfg(data)->vector);
	WRITE_ONCE(door.address, address);
	if (kmorph_is_primary())
		kmorph_ctl_publish_door(address);
	else
		kmorph_guest_publish_door(address);
	rcu_read_lock();
	user = rcu_dereference(client);
	if (user)
		user->moved(address);
	rcu_read_unlock();
	smp_mb();	/* the new address before the look at the rings that follows */
}

static int door_set_affinity(struct irq_data *data, const struct cpumask *mask, bool force)
{
	struct irq_data *parent = data->parent_data;
	int ret = parent->chip->irq_set_affinity(parent, mask, force);

	if (ret >= 0) {
		door.moves++;
		publish(data);
		/* irq_wake_thread() takes the lock we are under. */
		schedule_work(&wake_work);
	}
	return ret;
}

static void door_mask_nothing(struct irq_data *data)
{
}

static struct irq_chip door_chip = {
	.name = "KMORPH",
	.irq_ack = irq_chip_ack_parent,
	.irq_mask = door_mask_nothing,
	.irq_unmask = door_mask_nothing,
	.irq_set_affinity = door_set_affinity,
};

static int domain_alloc(struct irq_domain *dom, unsigned int virq, unsigned int nr, void *arg)
{
	int ret = irq_domain_alloc_irqs_parent(dom, virq, nr, arg);

	if (ret)
		return ret;
	irq_domain_set_info(dom, virq, virq, &door_chip, &door, handle_edge_irq, NULL, "edge");
	irq_set_status_flags(virq, DOOR_STATUS);
	return 0;
}

static void domain_free(struct irq_domain *dom, unsigned int virq, unsigned int nr)
{
	irq_clear_status_flags(virq, DOOR_STATUS);
	irq_domain_free_irqs_common(dom, virq, nr);
}

static int domain_activate(struct irq_domain *dom, struct irq_data *data, bool early)
{
	publish(data);
	return 0;
}

static const struct irq_domain_ops domain_ops = {
	.alloc = domain_alloc,
	.free = domain_free,
	.activate = domain_activate,
};

static bool storming(void)
{
	unsigned long now = jiffies;

	if (now != door.window) {
		door.window = now;
		door.rings = 0;
	}
	return ++door.rings > max(READ_ONCE(storm_rate) / HZ, 16U);
}

static irqreturn_t door_hard(int irq, void *data)
{
	const struct kmorph_door_client *user;
	bool more;

	if (unlikely(storming())) {
		door.storms++;
		disable_irq_nosync(irq);
		schedule_delayed_work(&storm_work, msecs_to_jiffies(STORM_REST_MS));
		return IRQ_HANDLED;
	}
	more = kmorph_is_primary() ? kmorph_ctl_hard() : kmorph_guest_hard();
	rcu_read_lock();
	user = rcu_dereference(client);
	if (user)
		more |= user->hard();
	rcu_read_unlock();
	return more ? IRQ_WAKE_THREAD : IRQ_HANDLED;
}

static irqreturn_t door_thread(int irq, void *data)
{
	const struct kmorph_door_client *user = rcu_access_pointer(client);
	bool late = xchg(&door.late, false);

	if (kmorph_is_primary())
		kmorph_ctl_thread();
	else
		kmorph_guest_thread();
	/* kmorph_door_unregister() waits for this thread. */
	if (user)
		user->thread(late);
	return IRQ_HANDLED;
}

static void wake_thread(struct work_struct *work)
{
	irq_wake_thread(door.virq, &door);
}

/* A ring can be lost when the doorbell moves. Nothing may depend on it for ever. */
static void scan(struct work_struct *work)
{
	WRITE_ONCE(door.late, true);
	irq_wake_thread(door.virq, &door);
	schedule_delayed_work(&scan_work, msecs_to_jiffies(KMORPH_SCAN_MS));
}

static void storm_over(struct work_struct *work)
{
	enable_irq(door.virq);
	irq_wake_thread(door.virq, &door);
}

/**
 * kmorph_door_wake - run the doorbell's thread as if it had been rung
 *
 * Any context, also with the descriptor of the interrupt locked.
 */
void kmorph_door_wake(void)
{
	schedule_work(&wake_work);
}
EXPORT_SYMBOL_GPL(kmorph_door_wake);

/**
 * kmorph_door_sync - wait until no handler or thread that runs now runs any more
 */
void kmorph_door_sync(void)
{
	synchronize_irq(door.virq);
}
EXPORT_SYMBOL_GPL(kmorph_door_sync);

/**
 * kmorph_door_register - hear the doorbell
 * @user: the client; one at a time, -EBUSY for a second one
 */
int kmorph_door_register(const struct kmorph_door_client *user)
{
	if (rcu_access_pointer(client))
		return -EBUSY;
	rcu_assign_pointer(client, user);
	kmorph_door_wake();
	return 0;
}
EXPORT_SYMBOL_GPL(kmorph_door_register);

/**
 * kmorph_door_unregister - hear it no more
 * @user: the client; on return none of its callbacks runs
 */
void kmorph_door_unregister(const struct kmorph_door_client *user)
{
	if (rcu_access_pointer(client) != user)
		return;
	RCU_INIT_POINTER(client, NULL);
	synchronize_rcu();
	synchronize_irq(door.virq);
}
EXPORT_SYMBOL_GPL(kmorph_door_unregister);

static int move_to(unsigned int cpu)
{
	int ret, tries;

	/* EBUSY: the last move has not been completed by an interrupt yet. */
	for (tries = 0; tries < 20; tries++) {
		ret = irq_set_affinity(door.virq, cpumask_of(cpu));
		if (ret != -EBUSY)
			break;
		kmorph_ipi(door.address >> 32, (u32)door.address);
		usleep_range(500, 1000);
	}
	return ret;
}

int kmorph_door_move(struct kmorph_door_req *req)
{
	if (req->reserved)
		return -EINVAL;
	if (req->cpu >= nr_cpu_ids || !cpu_online(req->cpu))
		return -ENODEV;
	return move_to(req->cpu);
}

int kmorph_door_init(void)
{
	struct irq_alloc_info info = {};
	unsigned int cpu = door_cpu < nr_cpu_ids && cpu_online(door_cpu) ? door_cpu : 0;
	int ret;

	if (!x86_vector_domain)
		return -ENODEV;
	fwnode = irq_domain_alloc_named_fwnode("KMORPH");
	if (!fwnode)
		return -ENOMEM;
	domain = irq_domain_create_hierarchy(x86_vector_domain, 0, 0, fwnode, &domain_ops, NULL);
	if (!domain) {
		ret = -ENOMEM;
		goto free_fwnode;
	}
	/* With a CPU named, a real vector at once and not a reservation. */
	info.mask = cpumask_of(cpu);
	ret = __irq_domain_alloc_irqs(domain, -1, 1, cpu_to_node(cpu), &info, false, NULL);
	if (ret < 0)
		goto remove_domain;
	door.virq = ret;
	ret = irq_set_affinity(door.virq, cpumask_of(cpu));
	if (ret)
		goto dispose;
	ret = request_threaded_irq(door.virq, door_hard, door_thread, IRQF_NO_THREAD,
				   "kmorph-door", &door);
	if (ret)
		goto dispose;
	schedule_delayed_work(&scan_work, msecs_to_jiffies(KMORPH_SCAN_MS));
	pr_info("doorbell: irq %u at apicid %llu vector %#x\n", door.virq, door.address >> 32,
		(u32)door.address);
	return 0;

dispose:
	/* Setting the affinity has queued it. */
	cancel_work_sync(&wake_work);
	irq_dispose_mapping(door.virq);
remove_domain:
	irq_domain_remove(domain);
free_fwnode:
	irq_domain_free_fwnode(fwnode);
	return ret;
}

void kmorph_door_exit(void)
{
	cancel_delayed_work_sync(&scan_work);
	if (cancel_delayed_work_sync(&storm_work))
		enable_irq(door.virq);
	cancel_work_sync(&wake_work);
	free_irq(door.virq, &door);
	/* No move can follow: the work it may have left behind goes, too. */
	cancel_work_sync(&wake_work);
	cancel_delayed_work_sync(&storm_work);
	irq_dispose_mapping(door.virq);
	irq_domain_remove(domain);
	irq_domain_free_fwnode(fwnode);
	xa_destroy(&owners);
}
