// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Run the steps that prepare an image for the kernel, without a kernel:
 *
 *	image-steps prepare IMAGE	as open does before it makes a device
 *	image-steps undo IMAGE		the same, then undo it
 *	image-steps trim IMAGE		as close does in the end
 *	image-steps crash IMAGE N SEED	prepare, with a power cut after N writes:
 *					of what was not yet made durable only a
 *					part, chosen by SEED, is kept
 *
 * Exits with 9 if there are no N writes.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image.h"
#include "util.h"

#define NO_SUCH_WRITE	9
#define BYTES_KEPT	512	/* what a disk writes as a whole */

int __real_write_at(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_write_at(int fd, const void *buf, size_t len, uint64_t off);
int __real_fsync(int fd);
int __wrap_fsync(int fd);

/* Sectors that were written since the last fsync(), newest first. */
struct pending {
	struct pending *next;
	uint64_t off;
	size_t len;
	uint8_t old[BYTES_KEPT];
};

static struct pending *pending;
static long writes_left = -1;

static void forget_pending(void)
{
	while (pending) {
		struct pending *p = pending;

		pending = p->next;
		free(p);
	}
}

static void power_cut(int fd)
{
	struct pending *p;

	for (p = pending; p; p = p->next)
		if (random() & 1 &&
		    __real_write_at(fd, p->old, p->len, p->off))
			exit(EX_WRONG);
	forget_pending();
	exit(0);
}

int __wrap_write_at(int fd, const void *buf, size_t len, uint64_t off)
{
	size_t done, n;

	if (writes_left < 0)
		return __real_write_at(fd, buf, len, off);
	for (done = 0; done < len; done += n) {
		struct pending *p = malloc(sizeof(*p));

		if (!p)
			exit(EX_MEMORY);
		n = min_u64(len - done, BYTES_KEPT - (off + done) % BYTES_KEPT);
		p->next = pending;
		p->off = off + done;
		p->len = n;
		if (read_at(fd, p->old, n, p->off))
			exit(EX_WRONG);
		pending = p;
	}
	n = __real_write_at(fd, buf, len, off);
	if (!writes_left--)
		power_cut(fd);
	return n;
}

int __wrap_fsync(int fd)
{
	forget_pending();
	/* Nothing is going to fail here, and many syncs take long. */
	return fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}

static int prepare(struct image *img)
{
	struct reasons reasons;
	int ret;

	image_reasons(img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s", reasons.r[0].cause);
	ret = image_load_tables(img, true);
	return ret ? ret : image_prepare(img);
}

int main(int argc, char **argv)
{
	struct image img;
	uint64_t cut;
	int ret;

	if (argc < 3)
		return EX_PARAMETER;
	verbose = true;
	ret = image_open(&img, AT_FDCWD, argv[2], 0);
	if (ret)
		goto out;
	if (!strcmp(argv[1], "prepare")) {
		ret = prepare(&img);
	} else if (!strcmp(argv[1], "undo")) {
		ret = prepare(&img);
		image_undo(&img);
	} else if (!strcmp(argv[1], "trim")) {
		ret = image_trim(&img, &cut);
	} else if (!strcmp(argv[1], "crash") && argc == 5) {
		verbose = false;
		writes_left = atol(argv[3]);
		srandom(atol(argv[4]));
		ret = prepare(&img);
		if (!ret)
			ret = NO_SUCH_WRITE;
		forget_pending();
	} else {
		ret = EX_PARAMETER;
	}
out:
	image_close(&img);
	return ret;
}
