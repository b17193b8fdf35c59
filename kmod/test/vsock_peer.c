// SPDX-License-Identifier: GPL-2.0
/*
 * The serving side of vsock_check, and what both sides need.
 */
#define _GNU_SOURCE
#include "vsock_check.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static volatile int watched = -1;

/* Tells who gave an order that it was read, and its first part done. */
static void say(int fd)
{
	write_all(fd, "", 1);
}

/* Wait for that. False: the connection has ended instead. */
bool heard(int fd)
{
	char byte;

	return !read_all(fd, &byte, 1);
}

void sleep_ms(unsigned int ms)
{
	usleep(ms * 1000);
}

struct sockaddr_vm address(unsigned int to_cid, unsigned int to_port)
{
	return (struct sockaddr_vm){
		.svm_family = AF_VSOCK, .svm_cid = to_cid, .svm_port = to_port,
	};
}

static int listen_on(unsigned int at, int backlog)
{
	struct sockaddr_vm here = address(VMADDR_CID_ANY, at);
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0 || bind(fd, (void *)&here, sizeof(here)) || listen(fd, backlog))
		return -errno;
	return fd;
}

/* 0, or -errno; a short count shows as -EPIPE. */
int read_all(int fd, void *data, size_t size)
{
	for (size_t done = 0; done < size; ) {
		ssize_t n = read(fd, (char *)data + done, size - done);

		if (n <= 0)
			return n ? -errno : -EPIPE;
		done += n;
	}
	return 0;
}

int write_all(int fd, const void *data, size_t size)
{
	for (size_t done = 0; done < size; ) {
		ssize_t n = write(fd, (const char *)data + done, size - done);

		if (n < 0)
			return -errno;
		done += n;
	}
	return 0;
}

/* Bytes up to end of file; *err is 0 or how it ended. */
size_t drain(int fd, int *err)
{
	char data[4096];
	size_t all = 0;
	ssize_t n;

	while ((n = read(fd, data, sizeof(data))) > 0)
		all += n;
	*err = n ? errno : 0;
	return all;
}

void linger_zero(int fd)
{
	struct linger none = { .l_onoff = 1 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
}

void send_zeroes(int fd, size_t size)
{
	static const char zeroes[65536];

	for (size_t n; size; size -= n) {
		n = size < sizeof(zeroes) ? size : sizeof(zeroes);
		if (write_all(fd, zeroes, n))
			return;
	}
}

static void echo(int fd)
{
	char data[16384];
	ssize_t n;

	while ((n = read(fd, data, sizeof(data))) > 0)
		if (write_all(fd, data, n))
			return;
}

static void *obey(void *arg)
{
	int fd = (intptr_t)arg, err, other;
	struct pollfd some = { .fd = fd, .events = POLLIN };
	struct order order;
	uint64_t count;
	char byte;

	/* Who shuts down before ordering anything is told how little came. */
	if (read_all(fd, &order, sizeof(order)))
		order.kind = COUNT;
	switch (order.kind) {
	case ECHO:
		echo(fd);
		break;
	case COUNT:
		count = drain(fd, &err);
		write_all(fd, &count, sizeof(count));
		break;
	case LEAVE:
		poll(&some, 1, -1);
		break;
	case ABORT:
		linger_zero(fd);
		break;
	case SEND:
		send_zeroes(fd, order.arg);
		shutdown(fd, SHUT_WR);
		drain(fd, &err);
		break;
	case DEAF:
		shutdown(fd, SHUT_RD);
		say(fd);
		sleep_ms(order.arg);
		break;
	case LISTEN:
		other = listen_on(order.arg, 2);
		write_all(fd, &other, sizeof(other));
		err = read(fd, &byte, 1);
		close(other);
		break;
	case WATCH:
		say(fd);
		drain(fd, &err);
		watched = err;
		break;
	case HOW:
		for (err = 0; watched == -1 && err < 300; err++)
			sleep_ms(10);
		err = watched;
		watched = -1;
		write_all(fd, &err, sizeof(err));
		break;
	case IDLE:
		say(fd);
		pause();
		break;
	}
	close(fd);
	return NULL;
}

int serve(unsigned int at)
{
	int listener = listen_on(at, 128);

	if (listener < 0) {
		fprintf(stderr, "listen: %s\n", strerror(-listener));
		return 1;
	}
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		pthread_t thread;

		if (fd < 0)
			continue;
		if (pthread_create(&thread, NULL, obey, (void *)(intptr_t)fd))
			close(fd);
		else
			pthread_detach(thread);
	}
}
