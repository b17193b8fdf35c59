// SPDX-License-Identifier: GPL-2.0
/*
 * Counters, in /sys/module/kerf_vsock/parameters/stats, one "name value" a line;
 * the links in .../links,
 * and their channels in use in .../channels.
 */
#include "vsock.h"

#include <linux/moduleparam.h>
#include <linux/percpu.h>

DEFINE_PER_CPU(struct kv_stats, kv_stats);

static const char * const names[KV_ST_COUNT] = {
	[KV_ST_IRQS] = "irqs",
	[KV_ST_KICKS] = "kicks",
	[KV_ST_SMALL] = "small_messages",
	[KV_ST_SMALL_KICKS] = "small_message_kicks",
	[KV_ST_POLL_HITS] = "poll_hits",
	[KV_ST_THREADS] = "thread_runs",
	[KV_ST_WORKS] = "control_works",
	[KV_ST_LOST] = "lost_doorbells",
	[KV_ST_BAD] = "bad_values",
	[KV_ST_BAD_DOOR] = "bad_doorbells",
	[KV_ST_CONNECTS] = "connects",
	[KV_ST_ACCEPTS] = "accepts",
	[KV_ST_REFUSED] = "refused",
	[KV_ST_RESETS] = "resets",
	[KV_ST_NO_CHANNEL] = "no_channel",
};

static int stats_get(char *buf, const struct kernel_param *param)
{
	int length = 0, i, cpu;

	for (i = 0; i < KV_ST_COUNT; i++) {
		u64 sum = 0;

		for_each_possible_cpu(cpu)
			sum += READ_ONCE(per_cpu(kv_stats, cpu).count[i]);
		length += scnprintf(buf + length, PAGE_SIZE - length, "%s %llu\n", names[i], sum);
	}
	return length;
}

static int links_get(char *buf, const struct kernel_param *param)
{
	return kv_areas_show(buf, PAGE_SIZE);
}

static int channels_get(char *buf, const struct kernel_param *param)
{
	return kv_channels_show(buf, PAGE_SIZE);
}

static const struct kernel_param_ops stats_ops = { .get = stats_get };
static const struct kernel_param_ops links_ops = { .get = links_get };
static const struct kernel_param_ops channels_ops = { .get = channels_get };

module_param_cb(stats, &stats_ops, NULL, 0444);
MODULE_PARM_DESC(stats, "counters (read only)");
module_param_cb(links, &links_ops, NULL, 0444);
MODULE_PARM_DESC(links, "links and their channels (read only)");
module_param_cb(channels, &channels_ops, NULL, 0400);
MODULE_PARM_DESC(channels, "channels in use: words of both sides, cursors of rings (read only)");
