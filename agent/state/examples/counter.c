// SPDX-License-Identifier: Apache-2.0
/*
 * Counts, and goes on counting when kmorph replaces the kernel under it (docs/state.md).
 *
 * Every line of a client is answered with the next number. Clients keep their connections, too: publish
 * the port with `--publish tcp:8080=vsock:5000,sessions`.
 *
 *   cc -std=c11 -O2 -Wall -Wextra -Werror -o counter counter.c
 *   counter [--port 5000 | --listen PATH]
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum {
	LINE_LIMIT = 1024,       /* of the agent's lines, and of a client's */
	GREETING_LIMIT = 128,
	PIECE_LIMIT = 256 << 10, /* bytes of a piece of state */
	FRAME_LIMIT = 64 << 10,  /* bytes of a frame of a session */
	WINDOW = 256 << 10,      /* answers that may be kept because the switch has not confirmed them */
	CONFIRM = 32 << 10,      /* bytes of requests that are confirmed at the latest */
	HEAD = 16,
	END = 1,                 /* flag of a frame: nothing comes after it */
	CLIENTS = 64,            /* at once; more wait */
	LONGEST_GAP = 1000,      /* ms between two changes of the state when it is throttled */
	AGAIN = 200,             /* ms before a lost agent is sought again */
};

struct buffer {
	unsigned char *bytes;
	size_t length, room;
};

/* A client's connection, whichever kernel carries it. */
struct session {
	uint64_t id, consumed, first; /* bytes of requests taken; number of the first byte in answers */
	bool ended;                   /* there will be no more answers */
	struct buffer answers;        /* sent, and not confirmed */
	struct connection *carrier;   /* NULL: its client has not come back yet */
	struct session *next;
};

struct connection {
	int fd; /* -1: none */
	struct buffer in, out, requests;
	struct session *session; /* NULL: not greeted yet */
	uint64_t told;           /* bytes of requests the switch knows to be taken */
	bool ended;              /* the client has sent everything */
	bool waits;              /* what came may be more than was taken: the state could not change */
};

static enum { NEW, ACTIVE, FROZEN, RETIRED } state;
static const char *const names[] = { "new", "active", "frozen", "retired" };
static uint64_t count;
static uint64_t changes;   /* times requests were taken */
static struct {
	double since;      /* ms: when a morph began to copy */
	uint64_t changes;  /* until then */
	double mean;       /* ms from one change to the next, as it was seen */
	double gap, next;  /* ms: from one to the next at least, 0: it is not throttled; when the next may come */
} pace;
static struct session *sessions;
static struct buffer exported, arriving; /* the state as the agent has it, and as it comes from the kernel before */
static struct connection agent = { .fd = -1 }, clients[CLIENTS];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* Change at no more than the rest of the pace seen since the morph began to copy. */
static void throttle(uint64_t percent)
{
	if (!pace.gap) {
		uint64_t seen = changes - pace.changes;
		pace.mean = (now() - pace.since) / (seen ? seen : 1);
	}
	pace.gap = percent ? pace.mean * 100 / (100 - percent) : 0;
	if (pace.gap > LONGEST_GAP)
		pace.gap = LONGEST_GAP;
}

/* Whole ms until the state may change. */
static int throttled(void)
{
	double left = pace.gap ? pace.next - now() : 0;

	return left > 0 ? (int)left + 1 : 0;
}

static void put(struct buffer *b, const void *bytes, size_t length)
{
	if (!length)
		return;
	if (length > b->room - b->length) {
		b->room = 2 * (b->length + length);
		b->bytes = realloc(b->bytes, b->room);
		if (!b->bytes) {
			perror("counter");
			exit(1);
		}
	}
	memcpy(b->bytes + b->length, bytes, length);
	b->length += length;
}

static void say(struct buffer *b, const char *format, ...)
{
	char line[LINE_LIMIT];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	if (length > 0)
		put(b, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

/* Take bytes off the front. */
static void drop(struct buffer *b, size_t length)
{
	b->length -= length;
	if (b->length && length)
		memmove(b->bytes, b->bytes + length, b->length);
}

static void empty(struct buffer *b)
{
	free(b->bytes);
	*b = (struct buffer){ 0 };
}

static void put_number(struct buffer *b, uint64_t value, int bytes)
{
	for (; bytes; bytes--, value >>= 8)
		put(b, &(unsigned char){ value & 255 }, 1);
}

static uint64_t number(const unsigned char *at, int bytes)
{
	uint64_t value = 0;

	while (bytes--)
		value = value << 8 | at[bytes];
	return value;
}

/* Copy the first line, without removing it. Its length with the newline; 0: it is not all there; -1: too long. */
static int first_line(const struct buffer *b, char *line, size_t limit)
{
	size_t there = b->length < limit ? b->length : limit;
	const unsigned char *end = there ? memchr(b->bytes, '\n', there) : NULL;

	if (!end)
		return there == limit ? -1 : 0;
	size_t length = (size_t)(end - b->bytes);
	memcpy(line, b->bytes, length);
	line[length] = 0;
	return (int)length + 1;
}

/* ---- what is taken along ---- */

static struct session *add(uint64_t id)
{
	struct session **end = &sessions, *s = calloc(1, sizeof *s);

	if (!s) {
		perror("counter");
		exit(1);
	}
	while (*end)
		end = &(*end)->next;
	s->id = id;
	return *end = s;
}

static void forget(struct session *s)
{
	struct session **at = &sessions;

	while (*at != s)
		at = &(*at)->next;
	*at = s->next;
	if (s->carrier)
		s->carrier->session = NULL;
	empty(&s->answers);
	free(s);
}

static void forget_those(bool all)
{
	for (struct session *s = sessions, *next; s; s = next) {
		next = s->next;
		if (all || !s->carrier)
			forget(s);
	}
}

static struct buffer encode(void)
{
	struct buffer out = { 0 };

	put_number(&out, count, 8);
	for (struct session *s = sessions; s; s = s->next) {
		const uint64_t fields[] = { s->id, s->consumed, s->first, s->ended, s->answers.length };
		for (int n = 0; n < 5; n++)
			put_number(&out, fields[n], 8);
		put(&out, s->answers.bytes, s->answers.length);
	}
	return out;
}

static bool decode(const struct buffer *in)
{
	size_t at = 8;

	forget_those(true);
	if (in->length < at)
		return false;
	count = number(in->bytes, 8);
	while (in->length - at >= 40) {
		const unsigned char *field = in->bytes + at;
		uint64_t length = number(field + 32, 8);
		at += 40;
		if (length > in->length - at)
			return false;
		struct session *s = add(number(field, 8));
		s->consumed = number(field + 8, 8);
		s->first = number(field + 16, 8);
		s->ended = number(field + 24, 8);
		put(&s->answers, field + 40, length);
		at += length;
	}
	return at == in->length;
}

/* FNV-1a: it finds mistakes. */
static uint64_t digest(void)
{
	struct buffer all = encode();
	uint64_t hash = 0xcbf29ce484222325;

	for (size_t n = 0; n < all.length; n++)
		hash = (hash ^ all.bytes[n]) * 0x100000001b3;
	empty(&all);
	return hash;
}

/* The whole state in pieces; nothing when it is what was last exported. */
static void export(bool full)
{
	struct buffer all = encode();

	if (full) {
		pace.since = now();
		pace.changes = changes;
	}
	if (full || all.length != exported.length || memcmp(all.bytes, exported.bytes, all.length)) {
		for (size_t at = 0, length; at < all.length; at += length) {
			length = all.length - at < PIECE_LIMIT ? all.length - at : PIECE_LIMIT;
			say(&agent.out, "piece offset=%zu bytes=%zu\n", at, length);
			put(&agent.out, all.bytes + at, length);
		}
	}
	say(&agent.out, "done\n");
	empty(&exported);
	exported = all;
}

/* ---- the agent's side ---- */

static uint64_t value(const char *line, const char *key)
{
	const char *found = strstr(line, key);

	return found ? strtoull(found + strlen(key), NULL, 10) : 0;
}

static bool refused(bool fits)
{
	if (!fits)
		say(&agent.out, "error the counter is %s\n", names[state]);
	return !fits;
}

/* Carry out the first order. 1: done; 0: it is not all there; -1: it makes no sense. */
static int obey(struct connection *c)
{
	char line[LINE_LIMIT];
	int length = first_line(&c->in, line, sizeof line);

	if (length <= 0)
		return length;
	if (!strncmp(line, "import ", 7)) {
		uint64_t bytes = value(line, " bytes="), offset = value(line, " offset=");
		if (bytes > PIECE_LIMIT)
			return -1;
		if (c->in.length < (size_t)length + bytes)
			return 0;
		if (offset < arriving.length)
			arriving.length = offset;
		put(&arriving, c->in.bytes + length, bytes);
		drop(&c->in, (size_t)length + bytes);
		return 1; /* this alone is not answered */
	}
	drop(&c->in, (size_t)length);
	if (!strncmp(line, "export ", 7)) {
		export(value(line, " full="));
		return 1;
	}
	if (!strncmp(line, "digest ", 7)) {
		say(&agent.out, "digest value=%016" PRIx64 "\n", digest());
		return 1;
	}
	if (!strcmp(line, "activate")) {
		if (refused(state == NEW || state == ACTIVE))
			return 1;
		state = ACTIVE;
	} else if (!strcmp(line, "freeze")) {
		if (refused(state == ACTIVE || state == FROZEN))
			return 1;
		/* Clients that did not come back since the kernel before this one never will. */
		if (state == ACTIVE)
			forget_those(false);
		state = FROZEN;
	} else if (!strcmp(line, "thaw")) {
		state = state == FROZEN ? ACTIVE : state;
		throttle(0);
	} else if (!strncmp(line, "throttle ", 9)) {
		uint64_t percent = value(line, " percent=");
		if (percent > 99)
			return -1;
		throttle(percent);
	} else if (!strcmp(line, "retire")) {
		state = RETIRED;
		throttle(0);
	} else if (!strcmp(line, "discard")) {
		if (refused(state == NEW))
			return 1;
		forget_those(true);
		empty(&arriving);
		count = 0;
	} else if (!strncmp(line, "imported ", 9)) {
		if (refused(state == NEW))
			return 1;
		/* A round in which nothing changed brings nothing. */
		bool fits = !arriving.length || decode(&arriving);
		empty(&arriving);
		if (!fits) {
			say(&agent.out, "error what was imported is not the state of a counter\n");
			return 1;
		}
	} else {
		return -1;
	}
	say(&agent.out, "ok\n");
	return 1;
}

static struct sockaddr_un unix_address(const char *path, socklen_t *length)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	*length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(address.sun_path));
	/* A name in the abstract namespace begins with a zero, and is as long as its address. */
	if (*path == '@')
		address.sun_path[0] = 0;
	else
		++*length;
	return address;
}

static void seek_agent(void)
{
	const char *path = getenv("KMORPH_STATE");
	socklen_t length;
	struct sockaddr_un address = unix_address(path && *path ? path : "@kmorph-state", &length);

	agent.fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (agent.fd < 0 || connect(agent.fd, (struct sockaddr *)&address, length)) {
		close(agent.fd);
		agent.fd = -1;
		return;
	}
	fcntl(agent.fd, F_SETFL, O_NONBLOCK);
	say(&agent.out, "hello version=1 name=counter state=%s knows=throttle\n", names[state]);
	say(&agent.out, "section name=state compatible=example,counter-binary version=1 size=67108864\nready\n");
}

/* ---- the clients' side ---- */

static void hang_up(struct connection *c)
{
	/* The switch holds the client: when it lets go of the session, nobody comes back for it. */
	if (c->session)
		forget(c->session);
	if (c == &agent)
		throttle(0);
	close(c->fd);
	empty(&c->in);
	empty(&c->out);
	empty(&c->requests);
	*c = (struct connection){ .fd = -1 };
}

/* Send bytes in frames: one at least, which confirms what was taken. */
static void frames(struct connection *c, const unsigned char *bytes, size_t length, bool end)
{
	do {
		size_t now = length < FRAME_LIMIT ? length : FRAME_LIMIT;
		length -= now;
		put_number(&c->out, now, 4);
		put_number(&c->out, end && !length ? END : 0, 4);
		put_number(&c->out, c->session->consumed, 8);
		put(&c->out, bytes, now);
		bytes = bytes ? bytes + now : NULL;
	} while (length);
	c->told = c->session->consumed;
}

/* Take whole requests. Both count and answers are state: they change together, or not at all. */
static bool answer(struct connection *c)
{
	struct session *s = c->session;
	size_t before = s->answers.length, taken = 0;
	const unsigned char *end;

	while (!s->ended && s->answers.length < WINDOW && taken < c->requests.length &&
	       (end = memchr(c->requests.bytes + taken, '\n', c->requests.length - taken))) {
		taken = (size_t)(end - c->requests.bytes) + 1;
		say(&s->answers, "%" PRIu64 "\n", ++count);
	}
	drop(&c->requests, taken);
	s->consumed += taken;
	bool full = s->answers.length >= WINDOW, last = c->ended && !full && !s->ended;
	if (!full && c->requests.length > LINE_LIMIT)
		return false;
	s->ended |= last;
	size_t more = s->answers.length - before;
	if (more || last || s->consumed - c->told >= CONFIRM)
		frames(c, more ? s->answers.bytes + before : NULL, more, last);
	return true;
}

/* 1: a step was taken; 0: more has to come; -1: the session is over. */
static int greeted(struct connection *c)
{
	char line[GREETING_LIMIT];
	uint64_t id;
	int resume, length = first_line(&c->in, line, sizeof line);

	if (length <= 0)
		return length;
	if (sscanf(line, "kmorph-session version=1 id=%" SCNx64 " resume=%d", &id, &resume) != 2)
		return -1;
	drop(&c->in, (size_t)length);
	struct session *s = sessions;
	while (s && s->id != id)
		s = s->next;
	if (!resume && !s)
		s = add(id);
	if (!s) {
		if (write(c->fd, "unknown\n", 8) < 0)
			perror("counter: a session");
		return -1;
	}
	if (s->carrier) {
		s->carrier->session = NULL;
		hang_up(s->carrier);
	}
	s->carrier = c;
	c->session = s;
	say(&c->out, "ok consumed=%" PRIu64 " from=%" PRIu64 "\n", s->consumed, s->first);
	/* The client may not have these answers. */
	frames(c, s->answers.bytes, s->answers.length, s->ended);
	return 1;
}

static int serve(struct connection *c)
{
	if (!c->session)
		return greeted(c);
	if (c->in.length < HEAD)
		return 0;
	uint64_t length = number(c->in.bytes, 4), flags = number(c->in.bytes + 4, 4);
	if (length > FRAME_LIMIT || flags & ~(uint64_t)END)
		return -1;
	if (c->in.length < HEAD + length)
		return 0;
	struct session *s = c->session;
	uint64_t confirmed = number(c->in.bytes + 8, 8);
	if (confirmed < s->first || confirmed > s->first + s->answers.length)
		return -1;
	drop(&s->answers, confirmed - s->first);
	s->first = confirmed;
	put(&c->requests, c->in.bytes + HEAD, length);
	c->ended |= flags & END;
	drop(&c->in, HEAD + length);
	changes++;
	pace.next = now() + pace.gap;
	return answer(c) ? 1 : -1;
}

/* ---- both ---- */

/* Read what is there. */
static bool receive(struct connection *c)
{
	static unsigned char bytes[FRAME_LIMIT];
	ssize_t n = read(c->fd, bytes, sizeof bytes);

	if (n > 0)
		put(&c->in, bytes, (size_t)n);
	return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

/* Write what there is room for. */
static bool flush(struct connection *c)
{
	while (c->out.length) {
		ssize_t n = write(c->fd, c->out.bytes, c->out.length);
		if (n < 0)
			return errno == EAGAIN || errno == EINTR;
		drop(&c->out, (size_t)n);
	}
	return true;
}

static void turn(struct connection *c, int (*step)(struct connection *))
{
	bool whole = receive(c);
	int stepped = 1;

	while (whole && stepped > 0 && !(step == serve && throttled()))
		stepped = step(c);
	c->waits = stepped > 0;
	if (!whole || stepped < 0 || !flush(c))
		hang_up(c);
}

static int listen_on(int argc, char **argv)
{
	socklen_t length;
	int fd, failed;

	if (argc == 3 && !strcmp(argv[1], "--listen")) {
		struct sockaddr_un address = unix_address(argv[2], &length);
		unlink(argv[2]);
		fd = socket(AF_UNIX, SOCK_STREAM, 0);
		failed = bind(fd, (struct sockaddr *)&address, length);
	} else if (argc == 1 || (argc == 3 && !strcmp(argv[1], "--port"))) {
		struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
		address.svm_port = argc == 1 ? 5000 : (unsigned)strtoul(argv[2], NULL, 10);
		fd = socket(AF_VSOCK, SOCK_STREAM, 0);
		failed = bind(fd, (struct sockaddr *)&address, sizeof address);
	} else {
		fprintf(stderr, "usage: counter [--port PORT | --listen PATH]\n");
		exit(2);
	}
	if (failed || listen(fd, 128)) {
		perror("counter: listen");
		exit(1);
	}
	return fd;
}

static struct connection *free_place(void)
{
	for (int n = 0; n < CLIENTS; n++)
		if (clients[n].fd < 0)
			return &clients[n];
	return NULL;
}

int main(int argc, char **argv)
{
	int listener = listen_on(argc, argv), first = 0;

	signal(SIGPIPE, SIG_IGN);
	for (int n = 0; n < CLIENTS; n++)
		clients[n].fd = -1;
	for (;;) {
		struct pollfd polled[CLIENTS + 2];
		if (agent.fd < 0)
			seek_agent();
		/* Clients are heard while it is active, and only then: what they send meanwhile waits. */
		bool active = state == ACTIVE, waits = false;
		int until = throttled();
		polled[0] = (struct pollfd){ .fd = agent.fd, .events = POLLIN };
		polled[1] = (struct pollfd){ .fd = active && free_place() ? listener : -1, .events = POLLIN };
		for (int n = 0; n < CLIENTS; n++)
			polled[n + 2] = (struct pollfd){ .fd = active && !until ? clients[n].fd : -1, .events = POLLIN };
		for (int n = 0; n < CLIENTS; n++)
			waits |= active && clients[n].waits;
		for (int n = 0; n < CLIENTS + 2; n++)
			if (n != 1 && (n ? &clients[n - 2] : &agent)->out.length)
				polled[n].events |= POLLOUT;
		poll(polled, CLIENTS + 2, until ? until : waits ? 0 : agent.fd < 0 ? AGAIN : -1);
		if (agent.fd >= 0 && polled[0].revents)
			turn(&agent, obey);
		/* Each in turn: while it is throttled there may be time for one of them only. */
		for (int all = 0, from = first; all < CLIENTS; all++) {
			int n = (from + all) % CLIENTS;
			bool calls = clients[n].fd >= 0 && (clients[n].waits || polled[n + 2].revents);
			if (state == ACTIVE && calls && !throttled()) {
				turn(&clients[n], serve);
				first = (n + 1) % CLIENTS;
			}
			if (state == RETIRED && clients[n].fd >= 0)
				hang_up(&clients[n]);
		}
		if (state == ACTIVE && polled[1].revents) {
			struct connection *c = free_place();
			int fd = c ? accept(listener, NULL, NULL) : -1;
			if (fd >= 0) {
				fcntl(fd, F_SETFL, O_NONBLOCK);
				c->fd = fd;
			}
		}
	}
}
