// SPDX-License-Identifier: GPL-2.0
/*
 * Channels: finding a free one, tying a socket to it, saying things about it.
 */
#include "vsock.h"

#include <linux/minmax.h>
#include <net/sock.h>
#include <asm/sync_bitops.h>

/*
 * Tell the other side to look at a channel. At most one interrupt until it has.
 * With the kernel's own atomic bit operations a bit could stay without its
 * summary, and the channel would be silent for ever: a kernel that has one CPU
 * patches their lock prefixes away. The sync ones keep them.
 */
void kv_kick(struct kv_area *area, u32 ch)
{
	struct kv_pending *pending = &area->shared->pending[!area->me];

	if (sync_test_and_set_bit(ch, pending->word))
		return;
	if (sync_test_and_set_bit(ch / 64, &pending->summary))
		return;
	kv_count(KV_ST_KICKS);
	kv_ring(area);
}

/* Called with area->lock held: a leaving cannot come between. */
void kv_set_word(struct kv_area *area, u32 ch, u32 word)
{
	lockdep_assert_held(&area->lock);
	if (area->dead)
		return;
	area->channel[ch].word = word;
	smp_store_release(&area->shared->control[area->me].word[ch], word);
	smp_mb();	/* the word before the bit that points to it */
	kv_kick(area, ch);
}

void kv_add_flags(struct kv_sock *kv, u32 flags)
{
	struct kv_area *area = kv->area;
	unsigned long irq;

	if (!area)
		return;
	spin_lock_irqsave(&area->lock, irq);
	kv_set_word(area, kv->ch, area->channel[kv->ch].word | flags);
	spin_unlock_irqrestore(&area->lock, irq);
}

static const struct kv_class *class_of(const struct kv_area *area, u32 ch)
{
	const struct kv_class *class = area->class;

	while (ch - class->first >= class->count)
		class++;
	return class;
}

/* Both sides are through with it, in the same generation. Under area->lock. */
static bool is_free(struct kv_area *area, u32 ch)
{
	u32 mine = area->channel[ch].word;
	u32 his;

	if (area->channel[ch].vsk)
		return false;
	if (!mine)
		return true;
	his = kv_his_word(area, ch);
	return (mine & KV_REL) && (his & KV_REL) && kv_gen(mine) == kv_gen(his);
}

static bool find_in_class(struct kv_area *area, unsigned int c, u32 *found)
{
	const struct kv_class *class = &area->class[c];
	u32 ch;

	for (ch = class->first; ch < class->first + class->count; ch++) {
		if (kv_opener(area, ch) != area->me || !is_free(area, ch))
			continue;
		*found = ch;
		return true;
	}
	return false;
}

/* The smallest class that holds the wanted size, else the largest below. */
static bool find_free(struct kv_area *area, u64 want, u32 *found)
{
	int c, fits = 0;

	while (fits < KV_CLASSES && area->class[fits].ring < want)
		fits++;
	for (c = fits; c < KV_CLASSES; c++)
		if (find_in_class(area, c, found))
			return true;
	for (c = fits - 1; c >= 0; c--)
		if (find_in_class(area, c, found))
			return true;
	return false;
}

/* Point the socket at its rings. Under the socket lock and area->lock. */
static void tie(struct kv_sock *kv, struct kv_area *area, u32 ch)
{
	const struct kv_class *class = class_of(area, ch);
	u8 *rings = (u8 *)area->shared + class->data + (u64)(ch - class->first) * 2 * class->ring;

	kref_get(&area->ref);
	kv->area = area;
	kv->ch = ch;
	kv->size = class->ring;
	kv->head = 0;
	kv->tail = 0;
	kv->tx = rings + area->me * class->ring;
	kv->rx = rings + !area->me * class->ring;
	kv->txc = &area->shared->cursors[ch][area->me];
	kv->rxc = &area->shared->cursors[ch][!area->me];
	WRITE_ONCE(kv->dead, area->dead);
	area->channel[ch].vsk = kv->vsk;
}

void kv_attach(struct kv_sock *kv, struct kv_area *area, u32 ch)
{
	unsigned long flags;

	spin_lock_irqsave(&area->lock, flags);
	tie(kv, area, ch);
	spin_unlock_irqrestore(&area->lock, flags);
}

/**
 * kv_channel_open - take a channel to the socket's remote CID and ask for a connection
 * @kv: the socket, locked, without a channel
 */
int kv_channel_open(struct kv_sock *kv)
{
	struct vsock_sock *vsk = kv->vsk;
	struct kv_area *area = kv_area_find(vsk->remote_addr.svm_cid);
	unsigned long flags;
	int ret = 0;
	u32 ch;

	if (!area)
		return -ENODEV;
	spin_lock_irqsave(&area->lock, flags);
	if (area->dead) {
		ret = -ENODEV;
	} else if (!find_free(area, vsk->buffer_size, &ch)) {
		kv_count(KV_ST_NO_CHANNEL);
		ret = -ENOBUFS;
	} else {
		u32 gen = kv_gen(area->channel[ch].word) + 1;

		/* Both sides have let go of it: the cursors are nobody's but ours. */
		memset(area->shared->cursors[ch], 0, sizeof(area->shared->cursors[ch]));
		area->shared->control[area->me].request[ch] = (struct kv_request){
			.src_port = vsk->local_addr.svm_port,
			.dst_port = vsk->remote_addr.svm_port,
		};
		area->channel[ch].seen = kv_his_word(area, ch);
		tie(kv, area, ch);
		kv_set_word(area, ch, gen << KV_GEN_SHIFT | KV_OPEN);
	}
	spin_unlock_irqrestore(&area->lock, flags);
	kv_area_put(area);
	return ret;
}

/* Let go of the channel. Under the socket lock, or its spin lock with no owner. */
void kv_detach(struct kv_sock *kv, u32 flags)
{
	struct kv_area *area = kv->area;
	unsigned long irq;

	if (!area)
		return;
	spin_lock_irqsave(&area->lock, irq);
	area->channel[kv->ch].vsk = NULL;
	kv_set_word(area, kv->ch, area->channel[kv->ch].word | KV_SHUT | KV_REL | flags);
	kv->area = NULL;
	spin_unlock_irqrestore(&area->lock, irq);
	kv_area_put(area);
}

/* The other side has written what cannot be: the connection is reset. */
void kv_bad(struct kv_sock *kv)
{
	struct sock *sk = sk_vsock(kv->vsk);

	kv_count(KV_ST_BAD);
	WRITE_ONCE(kv->dead, true);
	kv_add_flags(kv, KV_RST);
	sk->sk_err = ECONNRESET;
	sk_error_report(sk);
}
