// SPDX-License-Identifier: GPL-2.0
/*
 * vsock_check - what AF_VSOCK stream sockets promise, checked between two kernels
 *
 *	vsock_check serve PORT			in one kernel
 *	vsock_check run CID PORT [CASE...]	in the other one
 *
 * One line a case; exits 0 when all have passed. Link it statically: an
 * instance's initramfs has no libraries.
 */
#define _GNU_SOURCE
#include "vsock_check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define BIG		300000
#define UNUSED_PORT	7

static unsigned int cid, port;
static unsigned int failures;

static void fail(int line, const char *what, const char *format, ...)
{
	va_list args;

	failures++;
	printf("  line %d: %s: ", line, what);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
}

#define CHECK(condition, ...) \
	do { if (!(condition)) fail(__LINE__, #condition, __VA_ARGS__); } while (0)

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* A connection to a port of the other kernel, or -errno. */
static int dial(unsigned int to_port, uint64_t buffer, int flags)
{
	struct sockaddr_vm there = address(cid, to_port);
	int fd = socket(AF_VSOCK, SOCK_STREAM | flags, 0), err;

	if (buffer)
		setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &buffer, sizeof(buffer));
	if (!connect(fd, (void *)&there, sizeof(there)) || (flags && errno == EINPROGRESS))
		return fd;
	err = errno;
	close(fd);
	return -err;
}

static int order(enum order_kind kind, uint32_t arg, uint64_t buffer)
{
	struct order what = { kind, arg };
	int fd = dial(port, buffer, 0);

	if (fd < 0)
		fail(__LINE__, "connect", "%s", strerror(-fd));
	else
		write_all(fd, &what, sizeof(what));
	return fd;
}

static int so_error(int fd)
{
	int err = -1;
	socklen_t size = sizeof(err);

	getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &size);
	return err;
}

static int poll_for(int fd, short events, int ms)
{
	struct pollfd one = { .fd = fd, .events = events };

	return poll(&one, 1, ms) > 0 ? one.revents : 0;
}

static int how_it_ended(void)
{
	int fd = order(HOW, 0, 0), err = -1;

	read_all(fd, &err, sizeof(err));
	close(fd);
	return err;
}

static void refused(void)
{
	unsigned int real = cid;
	double start = now();
	int fd, ret;

	ret = dial(UNUSED_PORT, 0, 0);
	CHECK(ret == -ECONNRESET, "%d", ret);
	CHECK(now() - start < 1.5, "%.2f s", now() - start);
	fd = dial(UNUSED_PORT, 0, SOCK_NONBLOCK);
	CHECK(poll_for(fd, POLLOUT, 3000), "no event");
	ret = so_error(fd);
	CHECK(ret == ECONNRESET, "%d", ret);
	close(fd);
	cid = 400;	/* nobody */
	ret = dial(UNUSED_PORT, 0, 0);
	CHECK(ret == -ENETUNREACH || ret == -ENODEV, "%d", ret);
	cid = real;
}

static void nonblocking(void)
{
	struct order what = { ECHO, 0 };
	struct sockaddr_vm name;
	socklen_t size = sizeof(name);
	int fd = dial(port, 0, SOCK_NONBLOCK), full;
	char data[8] = "hello";

	CHECK(poll_for(fd, POLLOUT, 3000) & POLLOUT, "not connected");
	CHECK(!so_error(fd), "error");
	write_all(fd, &what, sizeof(what));
	CHECK(write(fd, data, 5) == 5, "%m");
	CHECK(poll_for(fd, POLLIN, 3000) & POLLIN, "no echo");
	CHECK(read(fd, data, sizeof(data)) == 5, "%m");
	CHECK(read(fd, data, sizeof(data)) == -1 && errno == EAGAIN, "%m");
	getsockname(fd, (void *)&name, &size);
	CHECK(name.svm_cid != VMADDR_CID_ANY && name.svm_cid != cid, "own cid %u", name.svm_cid);
	getpeername(fd, (void *)&name, &size);
	CHECK(name.svm_cid == cid && name.svm_port == port, "peer %u:%u", name.svm_cid,
	      name.svm_port);
	close(fd);

	full = order(IDLE, 0, 0);
	CHECK(heard(full), "%m");	/* the order itself is read */
	fcntl(full, F_SETFL, O_NONBLOCK);
	send_zeroes(full, 8 << 20);
	CHECK(!poll_for(full, POLLOUT, 50), "writable although full");
	close(full);
}

/* A shutdown before the answer to connect() arrives, too, and what is sent back after it. */
static void early_shutdown(void)
{
	for (int i = 0; i < 200 && !failures; i++) {
		int fd = dial(port, 0, SOCK_NONBLOCK);
		uint64_t count = 1;

		CHECK(!shutdown(fd, SHUT_WR), "round %d: %m", i);
		CHECK(poll_for(fd, POLLIN, 3000) & POLLIN, "round %d: the server reads on", i);
		CHECK(read(fd, &count, sizeof(count)) == sizeof(count) && !count,
		      "round %d: %llu, %m", i, (unsigned long long)count);
		close(fd);
	}
}

static void half_close(void)
{
	int fd = order(COUNT, 0, 0), err;
	uint64_t count = 0;
	double start;
	size_t n;

	send_zeroes(fd, BIG);
	shutdown(fd, SHUT_WR);
	CHECK(write(fd, "x", 1) == -1 && errno == EPIPE, "%m");
	CHECK(!read_all(fd, &count, sizeof(count)) && count == BIG, "%llu",
	      (unsigned long long)count);
	close(fd);

	fd = order(SEND, BIG, 0);
	n = drain(fd, &err);
	CHECK(n == BIG && !err, "%zu, %s", n, strerror(err));
	CHECK(poll_for(fd, POLLIN | POLLRDHUP, 100) & POLLRDHUP, "no RDHUP");
	CHECK(write(fd, "x", 1) == 1, "the other direction: %m");
	close(fd);

	fd = order(DEAF, 5000, 0);
	CHECK(heard(fd), "%m");
	/* That it is deaf comes beside what it says, and not before. */
	for (start = now(); write(fd, "x", 1) == 1 && now() - start < 3; )
		sleep_ms(1);
	CHECK(write(fd, "x", 1) == -1 && errno == EPIPE, "%m");
	close(fd);
}

static void closing(void)
{
	char data[16];
	int fd, i, err;

	fd = order(LEAVE, 0, 0);		/* with unread data */
	send_zeroes(fd, 1000);
	for (i = 0; i < 2; i++)
		CHECK(read(fd, data, sizeof(data)) == -1 && errno == ECONNRESET, "%m");
	CHECK(write(fd, "x", 1) == -1 && errno == ECONNRESET, "%m");
	CHECK(poll_for(fd, POLLIN, 1000), "poll sleeps on a dead socket");
	close(fd);

	fd = order(ABORT, 0, 0);
	CHECK(read(fd, data, sizeof(data)) == -1 && errno == ECONNRESET, "%m");
	close(fd);

	fd = order(WATCH, 0, 0);
	CHECK(heard(fd), "%m");
	linger_zero(fd);
	close(fd);
	err = how_it_ended();
	CHECK(err == ECONNRESET, "%d", err);

	fd = order(WATCH, 0, 0);
	CHECK(heard(fd), "%m");
	close(fd);
	err = how_it_ended();
	CHECK(err == 0, "%d", err);
}

static void backlog(void)
{
	int control, ready = -1, fds[8], ok = 0, reset = 0, i, round;

	for (round = 0; round < 3; round++) {	/* the port can be used again */
		control = order(LISTEN, 7100, 0);
		read_all(control, &ready, sizeof(ready));
		CHECK(ready >= 0, "%s", strerror(-ready));
		for (i = ok = reset = 0; i < 8; i++) {
			fds[i] = dial(7100, 0, 0);
			ok += fds[i] >= 0;
			reset += fds[i] == -ECONNRESET;
		}
		CHECK(ok >= 2 && ok <= 3 && ok + reset == 8, "%d ok, %d reset", ok, reset);
		for (i = 0; i < 8; i++)
			close(fds[i]);
		shutdown(control, SHUT_WR);
		CHECK(!heard(control), "it goes on");	/* ends after its listener */
		close(control);
	}
}

static void edge_triggered(void)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP | EPOLLET };
	int fd = order(ECHO, 0, 0), epoll = epoll_create1(0), i, n = 1;
	char data[64];
	ssize_t got;

	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	for (i = 0; i < 50 && n == 1; i++) {
		write_all(fd, data, sizeof(data));
		for (size_t all = 0; all < sizeof(data) && n == 1; ) {
			n = epoll_wait(epoll, &event, 1, 3000);
			CHECK(n == 1, "round %d: no event", i);
			while ((got = recv(fd, data, sizeof(data), MSG_DONTWAIT)) > 0)
				all += got;
		}
	}
	shutdown(fd, SHUT_WR);
	do
		n = epoll_wait(epoll, &event, 1, 3000);
	while (n == 1 && !(event.events & EPOLLRDHUP));
	CHECK(n == 1, "no RDHUP");
	close(fd);
	close(epoll);
}

static void options(void)
{
	int fd = order(ECHO, 0, 8192), low = 5000;
	void *nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct timeval timeout = { .tv_usec = 200000 };
	static char out[6000], in[6000];
	double start;

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = i * 7;
	write_all(fd, out, 100);
	CHECK(recv(fd, in, 50, MSG_PEEK | MSG_WAITALL) > 0 && !memcmp(in, out, 1), "peek: %m");
	CHECK(recv(fd, in, 100, MSG_WAITALL) == 100 && !memcmp(in, out, 100), "%m");

	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low));
	write_all(fd, out, 100);
	CHECK(!poll_for(fd, POLLIN, 200), "readable below SO_RCVLOWAT");
	write_all(fd, out, 4950);
	CHECK(poll_for(fd, POLLIN, 3000), "not readable above SO_RCVLOWAT");
	read_all(fd, in, 5050);
	low = 1;
	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low));

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	start = now();
	CHECK(read(fd, in, 1) == -1 && errno == EAGAIN, "%m");
	CHECK(now() - start < 1.5, "%.2f s", now() - start);

	write_all(fd, out, 64);
	CHECK(poll_for(fd, POLLIN, 3000), "no echo");
	CHECK(read(fd, nowhere, 64) == -1, "read to a bad address");
	CHECK(!read_all(fd, in, 64) && !memcmp(in, out, 64), "lost by a read to a bad address");
	close(fd);
}

static void *read_one(void *arg)
{
	char byte;

	return (void *)(intptr_t)read((intptr_t)arg, &byte, 1);
}

/* One thread polls, another one reads: what the reader takes must not cost the poller its event. */
static void two_waiters(void)
{
	int fd = order(ECHO, 0, 0), epoll = epoll_create1(0), i;
	struct epoll_event event = { .events = EPOLLIN };
	pthread_t reader;
	char byte;

	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	for (i = 0; i < 300; i++) {
		epoll_wait(epoll, &event, 1, 0);	/* arms */
		if (pthread_create(&reader, NULL, read_one, (void *)(intptr_t)fd))
			abort();
		write_all(fd, "r", 1);
		pthread_join(reader, NULL);
		write_all(fd, "p", 1);
		if (epoll_wait(epoll, &event, 1, 3000) != 1) {
			fail(__LINE__, "epoll_wait", "round %d: nobody was told", i);
			break;
		}
		read_all(fd, &byte, 1);
	}
	close(epoll);
	close(fd);
}

#define STREAM_WORDS	(1 << 20)

static void *stream_out(void *arg)
{
	int fd = (intptr_t)arg;
	unsigned int seed = fd;
	uint32_t words[8192];

	for (uint32_t next = 0; next < STREAM_WORDS; ) {
		uint32_t n = 1 + rand_r(&seed) % (rand_r(&seed) % 3 ? 60 : 8192), i;

		for (i = 0; i < n && next < STREAM_WORDS; i++)
			words[i] = next++;
		if (write_all(fd, words, i * sizeof(*words)))
			break;
	}
	shutdown(fd, SHUT_WR);
	return NULL;
}

/* Several full-duplex connections at once, with large and with small rings. */
static void streams(void)
{
	enum { COUNT_OF = 6 };
	static uint32_t words[COUNT_OF][4096];
	pthread_t writers[COUNT_OF];
	int fds[COUNT_OF];

	for (intptr_t i = 0; i < COUNT_OF; i++) {
		fds[i] = order(ECHO, 0, i % 2 ? 0 : 8192);
		if (pthread_create(&writers[i], NULL, stream_out, (void *)(intptr_t)fds[i]))
			abort();
	}
	/* One reader for all of them: the others' rings run full meanwhile. */
	for (int i = 0; i < COUNT_OF; i++) {
		uint32_t want = 0, wrong = 0;

		while (want < STREAM_WORDS && !wrong) {
			if (read_all(fds[i], words[i], sizeof(words[i])))
				break;
			for (size_t w = 0; w < 4096; w++)
				wrong += words[i][w] != want++;
		}
		CHECK(want == STREAM_WORDS && !wrong, "connection %d: %u words, %u wrong", i, want,
		      wrong);
		pthread_join(writers[i], NULL);
		close(fds[i]);
	}
}

static void many(void)
{
	enum { SOCKETS = 60 };
	int fds[SOCKETS], i;
	char data[100];

	for (i = 0; i < SOCKETS; i++)
		fds[i] = order(ECHO, 0, i % 3 ? 0 : 4096);
	for (i = 0; i < SOCKETS; i++) {
		memset(data, i, sizeof(data));
		write_all(fds[i], data, sizeof(data));
	}
	for (i = 0; i < SOCKETS; i++)
		CHECK(!read_all(fds[i], data, sizeof(data)) && data[99] == i, "socket %d", i);
	for (i = 0; i < SOCKETS; i++)
		close(fds[i]);
}

static void churn(void)
{
	char data[32] = "";

	for (int i = 0; i < 1000; i++) {
		int fd = order(ECHO, 0, i % 2 ? 4096 : 0);

		if (i % 3) {
			write_all(fd, data, sizeof(data));
			CHECK(!read_all(fd, data, sizeof(data)), "connection %d", i);
		}
		close(fd);
		if (failures)
			return;
	}
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{ "refused", refused },
	{ "nonblocking", nonblocking },
	{ "early-shutdown", early_shutdown },
	{ "half-close", half_close },
	{ "closing", closing },
	{ "backlog", backlog },
	{ "edge-triggered", edge_triggered },
	{ "options", options },
	{ "two-waiters", two_waiters },
	{ "streams", streams },
	{ "many", many },
	{ "churn", churn },
};

static bool wanted(const char *name, int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		if (!strcmp(argv[i], name))
			return true;
	return argc == 0;
}

int main(int argc, char **argv)
{
	unsigned int bad = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]));
	if (argc < 4 || strcmp(argv[1], "run")) {
		fprintf(stderr, "usage: %s serve PORT | run CID PORT [CASE...]\n", argv[0]);
		return 2;
	}
	cid = atoi(argv[2]);
	port = atoi(argv[3]);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		double start = now();

		if (!wanted(cases[i].name, argc - 4, argv + 4))
			continue;
		failures = 0;
		cases[i].run();
		printf("%s %s (%.2f s)\n", failures ? "FAILED" : "ok", cases[i].name,
		       now() - start);
		bad += failures != 0;
	}
	return bad != 0;
}
