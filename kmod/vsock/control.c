// SPDX-License-Identifier: GPL-2.0
/*
 * What the other side says about a channel. Each channel has a work of its own,
 * because acting takes the socket lock: a task that holds one for long (a page
 * fault in its copy) delays its own channel only.
 */
#include "vsock.h"

#include <net/sock.h>

/* May be called in a hard interrupt, with area->lock held. */
void kv_queue(struct kv_channel *channel)
{
	kref_get(&channel->area->ref);
	if (!queue_work(kv_wq, &channel->work))
		kv_area_put(channel->area);	/* never the last one: it is in the table */
}

static void answer(struct kv_area *area, u32 ch, u32 word)
{
	unsigned long flags;

	spin_lock_irqsave(&area->lock, flags);
	kv_set_word(area, ch, word);
	spin_unlock_irqrestore(&area->lock, flags);
}

/* A child of the listener, tied to the channel; NULL when it could not be. */
static struct sock *new_child(struct sock *listener, struct kv_area *area, u32 ch,
			      const struct kv_request *request)
{
	struct sock *child = vsock_create_connected(listener);
	struct vsock_sock *vsk;

	if (!child)
		return NULL;
	lock_sock_nested(child, SINGLE_DEPTH_NESTING);
	vsk = vsock_sk(child);
	vsock_addr_init(&vsk->local_addr, kv_cid(kmorph_self_id()), request->dst_port);
	/* Whose area it is says who is calling; the memory does not. */
	vsock_addr_init(&vsk->remote_addr, kv_cid(area->link.peer), request->src_port);
	if (vsock_assign_transport(vsk, vsock_sk(listener)) || vsk->transport != &kv_transport) {
		release_sock(child);
		sock_put(child);
		return NULL;
	}
	child->sk_state = TCP_ESTABLISHED;
	kv_attach(kv_sock(vsk), area, ch);
	return child;
}

static void reset_socket(struct sock *sk, struct kv_sock *kv)
{
	WRITE_ONCE(kv->dead, true);
	kv_count(KV_ST_RESETS);
	if (sk->sk_state == TCP_SYN_SENT)
		sk->sk_state = TCP_CLOSE;
	sk->sk_err = ECONNRESET;
	sk_error_report(sk);
}

/* Under the socket lock. */
static void apply(struct sock *sk, struct vsock_sock *vsk, u32 word)
{
	u32 shut = (word & KV_SHUT) >> 2;	/* RCV_SHUTDOWN, SEND_SHUTDOWN */

	if (word & KV_RST) {
		if (!kv_sock(vsk)->dead)
			reset_socket(sk, kv_sock(vsk));
		return;
	}
	if ((word & KV_EST) && sk->sk_state == TCP_SYN_SENT) {
		sk->sk_state = TCP_ESTABLISHED;
		sk->sk_socket->state = SS_CONNECTED;
		vsock_insert_connected(vsk);
		kv_count(KV_ST_CONNECTS);
		sk->sk_state_change(sk);
	}
	if (shut & ~vsk->peer_shutdown) {
		WRITE_ONCE(vsk->peer_shutdown, vsk->peer_shutdown | shut);
		sk->sk_state_change(sk);
	}
}

static bool accept_request(struct kv_area *area, u32 ch, u32 word)
{
	const struct kv_request *asked = &area->shared->control[!area->me].request[ch];
	struct kv_request request = {
		.src_port = READ_ONCE(asked->src_port),
		.dst_port = READ_ONCE(asked->dst_port),
	};
	struct sock *listener, *child = NULL;
	struct sockaddr_vm address;

	vsock_addr_init(&address, kv_cid(kmorph_self_id()), request.dst_port);
	listener = vsock_find_bound_socket(&address);
	if (!listener)
		return false;
	lock_sock(listener);
	if (listener->sk_state == TCP_LISTEN && listener->sk_type == SOCK_STREAM &&
	    !sk_acceptq_is_full(listener) && listener->sk_shutdown != SHUTDOWN_MASK)
		child = new_child(listener, area, ch, &request);
	if (child) {
		sk_acceptq_added(listener);
		vsock_insert_connected(vsock_sk(child));
		vsock_enqueue_accept(listener, child);
		answer(area, ch, kv_gen(word) << KV_GEN_SHIFT | KV_OPEN | KV_EST);
		/* Whoever asked may have shut down already, and will not say so again. */
		apply(child, vsock_sk(child), word);
		release_sock(child);
	}
	release_sock(listener);
	if (child)
		listener->sk_data_ready(listener);
	sock_put(listener);
	return child;
}

/* A new generation on a channel the other side opens. */
static void handle_request(struct kv_area *area, u32 ch, u32 word)
{
	struct kv_channel *channel = &area->channel[ch];
	u32 gen = kv_gen(word);
	unsigned long flags;
	bool free;

	spin_lock_irqsave(&area->lock, flags);
	free = !channel->vsk && (!channel->word || (channel->word & KV_REL));
	if (free)
		channel->word = gen << KV_GEN_SHIFT;	/* said aloud by the answer */
	spin_unlock_irqrestore(&area->lock, flags);
	if (!free) {
		kv_count(KV_ST_BAD);
		return;
	}
	if (!(word & KV_REL) && (word & KV_OPEN) && accept_request(area, ch, word)) {
		kv_count(KV_ST_ACCEPTS);
		return;
	}
	kv_count(KV_ST_REFUSED);
	answer(area, ch, gen << KV_GEN_SHIFT | KV_RST | KV_REL);
}

static void handle_word(struct kv_area *area, u32 ch, u32 word)
{
	struct kv_channel *channel = &area->channel[ch];
	struct vsock_sock *vsk;
	unsigned long flags;
	struct sock *sk;
	bool same;

	spin_lock_irqsave(&area->lock, flags);
	same = kv_gen(word) == kv_gen(channel->word);
	vsk = same ? channel->vsk : NULL;
	if (vsk)
		sock_hold(sk_vsock(vsk));
	spin_unlock_irqrestore(&area->lock, flags);

	if (!same && kv_opener(area, ch) != area->me) {
		handle_request(area, ch, word);
		return;
	}
	if (!vsk)
		return;
	sk = sk_vsock(vsk);
	lock_sock(sk);
	/* Ties change under the socket lock only. */
	if (READ_ONCE(area->channel[ch].vsk) == vsk)
		apply(sk, vsk, word);
	release_sock(sk);
	sock_put(sk);
}

static void wake(struct kv_area *area, u32 ch)
{
	struct vsock_sock *vsk;
	unsigned long flags;

	spin_lock_irqsave(&area->lock, flags);
	vsk = area->channel[ch].vsk;
	if (vsk)
		sock_hold(sk_vsock(vsk));
	spin_unlock_irqrestore(&area->lock, flags);
	if (!vsk)
		return;
	sk_vsock(vsk)->sk_data_ready(sk_vsock(vsk));
	sk_vsock(vsk)->sk_write_space(sk_vsock(vsk));
	sock_put(sk_vsock(vsk));
}

void kv_channel_work(struct work_struct *work)
{
	struct kv_channel *channel = container_of(work, struct kv_channel, work);
	struct kv_area *area = channel->area;
	u32 ch = channel - area->channel;
	unsigned long flags;
	bool news = false;
	u32 word = 0;

	kv_count(KV_ST_WORKS);
	atomic_inc(&area->running);
	smp_mb__after_atomic();	/* against kv_area_reset() */
	if (READ_ONCE(area->dead))
		goto out;
	if (xchg(&channel->wake, false))
		wake(area, ch);
	spin_lock_irqsave(&area->lock, flags);
	word = kv_his_word(area, ch);
	news = word != channel->seen;
	channel->seen = word;
	spin_unlock_irqrestore(&area->lock, flags);
	if (news)
		handle_word(area, ch, word);
out:
	smp_mb__before_atomic();
	atomic_dec(&area->running);
	kv_area_put(area);
}
