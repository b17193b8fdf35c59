// SPDX-License-Identifier: GPL-2.0
/*
 * ticker PATH - a program that knows nothing of kmorph: two processes with a pipe between them.
 * One counts in a large piece of memory, the other appends what it reads to a file, a number a
 * line. Whatever is lost, doubled or changed on the way ends it.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	PAGES = 1024,
	PERIOD = 20 * 1000 * 1000, /* ns */
};

static int append(int from, const char *path)
{
	int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_TRUNC, 0600);
	uint64_t number, last = 0;

	if (file < 0)
		return 1;
	while (read(from, &number, sizeof number) == sizeof number) {
		char line[32];
		int length = snprintf(line, sizeof line, "%llu\n", (unsigned long long)number);

		if (number != last + 1 || write(file, line, length) != length)
			return 1;
		last = number;
	}
	return 1;
}

int main(int argc, char **argv)
{
	char *memory = calloc(PAGES, PAGE);
	int ends[2];

	if (argc != 2 || !memory || pipe(ends))
		return 2;
	if (!fork()) {
		close(ends[1]);
		return append(ends[0], argv[1]);
	}
	close(ends[0]);
	for (uint64_t number = 1;; number++) {
		/* Each page keeps the number of its latest turn. */
		uint64_t *cell = (uint64_t *)(memory + number % PAGES * PAGE);
		const struct timespec period = { .tv_nsec = PERIOD };

		if (number > PAGES && *cell != number - PAGES)
			return 1;
		*cell = number;
		if (write(ends[1], &number, sizeof number) != sizeof number)
			return 1;
		nanosleep(&period, NULL);
	}
}
