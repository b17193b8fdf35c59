// SPDX-License-Identifier: GPL-2.0
/*
 * Events: each open file of /dev/kmorph has its own bounded queue, so that a
 * reader that sleeps loses its own events only, and is told how many.
 */
#include "kmorph.h"

#include <linux/kfifo.h>
#include <linux/ktime.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#define EVENT_QUEUE	256

struct reader {
	struct list_head list;
	struct mutex read_lock;
	u32 lost;
	DECLARE_KFIFO(queue, struct kmorph_event, EVENT_QUEUE);
};

static LIST_HEAD(readers);
static DEFINE_SPINLOCK(readers_lock);
static DECLARE_WAIT_QUEUE_HEAD(event_wait);

int kmorph_events_open(struct file *file)
{
	struct reader *reader = kvzalloc(sizeof(*reader), GFP_KERNEL);

	if (!reader)
		return -ENOMEM;
	mutex_init(&reader->read_lock);
	INIT_KFIFO(reader->queue);
	file->private_data = reader;
	spin_lock(&readers_lock);
	list_add(&reader->list, &readers);
	spin_unlock(&readers_lock);
	return 0;
}

void kmorph_events_release(struct file *file)
{
	struct reader *reader = file->private_data;

	spin_lock(&readers_lock);
	list_del(&reader->list);
	spin_unlock(&readers_lock);
	kvfree(reader);
}

u32 kmorph_events_lost(struct file *file)
{
	struct reader *reader = file->private_data;

	return READ_ONCE(reader->lost);
}

/**
 * kmorph_event - tell every reader
 * @type: enum kmorph_event_type
 * @inst: the instance it is about
 * @cpu: index of the CPU in the instance, where known
 * @tsc: when it happened, 0 for now
 * @data: depends on @type
 * @text: may be NULL; cut to what an event holds
 *
 * Process context.
 */
void kmorph_event(u32 type, const struct kmorph_inst *inst, u32 cpu, u64 tsc,
		  u64 data, const char *text)
{
	struct kmorph_event event = {
		.size = sizeof(event),
		.type = type,
		.instance = inst->id,
		.cpu = cpu,
		.incarnation = inst->incarnation,
		.tsc = tsc ?: rdtsc(),
		.seen_ns = ktime_get_ns(),
		.data = data,
	};
	struct reader *reader;

	if (text)
		strscpy(event.text, text, sizeof(event.text));
	spin_lock(&readers_lock);
	list_for_each_entry(reader, &readers, list)
		if (!kfifo_put(&reader->queue, event))
			reader->lost++;
	spin_unlock(&readers_lock);
	wake_up_interruptible(&event_wait);
}

ssize_t kmorph_events_read(struct file *file, char __user *buf, size_t count, loff_t *pos)
{
	struct reader *reader = file->private_data;
	unsigned int copied;
	int ret;

	if (count < sizeof(struct kmorph_event))
		return -EINVAL;
	ret = mutex_lock_interruptible(&reader->read_lock);
	if (ret)
		return ret;
	while (kfifo_is_empty(&reader->queue)) {
		mutex_unlock(&reader->read_lock);
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		ret = wait_event_interruptible(event_wait, !kfifo_is_empty(&reader->queue));
		if (ret)
			return ret;
		ret = mutex_lock_interruptible(&reader->read_lock);
		if (ret)
			return ret;
	}
	/* One reader (read_lock), one writer (readers_lock): no further lock. */
	ret = kfifo_to_user(&reader->queue, buf,
			    rounddown(count, sizeof(struct kmorph_event)), &copied);
	mutex_unlock(&reader->read_lock);
	return ret ?: copied;
}

__poll_t kmorph_events_poll(struct file *file, struct poll_table_struct *wait)
{
	struct reader *reader = file->private_data;

	poll_wait(file, &event_wait, wait);
	return kfifo_is_empty(&reader->queue) ? 0 : EPOLLIN | EPOLLRDNORM;
}
