/* SPDX-License-Identifier: GPL-2.0 */
/* Between the two files of vsock_check. */
#ifndef VSOCK_CHECK_H
#define VSOCK_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>

/* The first bytes on every connection: what the server is to do with it. */
enum order_kind {
	ECHO = 1,		/* until end of file */
	COUNT,			/* read to end of file, answer with the number of bytes */
	LEAVE,			/* once something is unread */
	ABORT,			/* SO_LINGER 0 */
	SEND,			/* arg bytes, then end of file; read to the end */
	DEAF,			/* shut down reading, say so, for arg ms */
	LISTEN,			/* on port arg with a backlog of two, until told */
	WATCH,			/* say so, read to the end, keep how it ended */
	HOW,			/* tell how the last WATCH ended */
	IDLE,			/* say so and never read */
};

struct order {
	uint32_t kind;
	uint32_t arg;
};

void sleep_ms(unsigned int ms);
struct sockaddr_vm address(unsigned int to_cid, unsigned int to_port);
int read_all(int fd, void *data, size_t size);
int write_all(int fd, const void *data, size_t size);
bool heard(int fd);
size_t drain(int fd, int *err);
void linger_zero(int fd);
void send_zeroes(int fd, size_t size);
int serve(unsigned int at);

#endif /* VSOCK_CHECK_H */
