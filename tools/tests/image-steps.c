// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Run the steps that prepare an image for the kernel, without a kernel:
 *
 *	image-steps prepare IMAGE	as open does before it makes a device
 *	image-steps undo IMAGE		the same, then undo it
 *	image-steps sparse IMAGE	prepare with --sparse
 *	image-steps space IMAGE FREE ROOM ERRNO
 *					prepare, and undo it if it fails, where the
 *					file system has FREE bytes left, and from byte
 *					ROOM on no space is to be had, but ERRNO
 *	image-steps signal IMAGE N	the same, with a signal in the Nth call that
 *					takes space
 *	image-steps trim IMAGE		as close does in the end
 *	image-steps crash IMAGE N SEED	prepare, with a power cut after N writes:
 *					of what was not yet made durable only a
 *					part, chosen by SEED, is kept
 *	image-steps grow IMAGE SIZE BACKING
 *					give it another size, also a smaller one;
 *					BACKING is that of its backing file, 0 if
 *					there is none
 *	image-steps undo-grow IMAGE SIZE BACKING
 *	image-steps crash-grow IMAGE SIZE BACKING N SEED
 *	image-steps fail-grow IMAGE SIZE BACKING N M
 *					the write or sync after N others fails, and
 *					in the undoing of those that were made the
 *					one after M others
 *	image-steps grow-live IMAGE SIZE BACKING COMMAND
 *					grow as if the image were live: COMMAND is
 *					run between what is done before the suspend,
 *					and in it
 *	image-steps undo-live IMAGE SIZE BACKING COMMAND
 *	image-steps crash-live IMAGE SIZE BACKING COMMAND N SEED
 *	image-steps crash-repair IMAGE N SEED
 *					repair it as check --repair all does
 *	image-steps bitmap IMAGE WHAT NAME ARG
 *					add (ARG: log2 of the granularity), remove,
 *					clear, enable, disable; merge (ARG into NAME);
 *					rotate (NAME stops, ARG begins); ready: make
 *					what records ready for the kernel
 *	image-steps undo-bitmap IMAGE WHAT NAME ARG
 *	image-steps crash-bitmap IMAGE WHAT NAME ARG N SEED
 *	image-steps fail-bitmap IMAGE WHAT NAME ARG N M
 *
 * Exits with 9 if there are no N (or M) writes; crash-grow, crash-live, crash-bitmap,
 * fail-grow and fail-bitmap then print how many there are.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "image/bitmaps.h"
#include "image/image.h"
#include "image/prepare.h"
#include "image/repair.h"
#include "image/shrink.h"
#include "image/verify.h"
#include "lib/interrupt.h"
#include "lib/util.h"

#define NO_SUCH_WRITE	9
#define BYTES_KEPT	512	/* what a disk writes as a whole */

int __real_write_at(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_write_at(int fd, const void *buf, size_t len, uint64_t off);
int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __real_fallocate64(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate64(int fd, int mode, off_t off, off_t len);
int __real_fstatvfs64(int fd, struct statvfs *v);
int __wrap_fstatvfs64(int fd, struct statvfs *v);

/* Sectors that were written since the last fsync(), newest first. */
struct pending {
	struct pending *next;
	uint64_t off;
	size_t len;
	uint8_t old[BYTES_KEPT];
};

static struct pending *pending;
static long writes_left = -1;
static long until_failure = -1;

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

	if (until_failure >= 0 && !until_failure--)
		return -EIO;
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
	if (until_failure >= 0 && !until_failure--) {
		errno = EIO;
		return -1;
	}
	forget_pending();
	/* Nothing is going to fail here, and many syncs take long. */
	return fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}

static struct {
	unsigned long long left, room;
	int err;
	long signal_at;
} fs = { .left = ~0ULL, .room = ~0ULL };

int __wrap_fallocate64(int fd, int mode, off_t off, off_t len)
{
	uint64_t end = off + len;
	int ret;

	if (fs.signal_at && !--fs.signal_at)
		raise(SIGTERM);
	if (mode || end <= fs.room)
		return __real_fallocate64(fd, mode, off, len);
	ret = fs.room > (uint64_t)off ?
	      __real_fallocate64(fd, mode, off, fs.room - off) : 0;
	if (!ret)
		errno = fs.err;
	return -1;
}

int __wrap_fstatvfs64(int fd, struct statvfs *v)
{
	int ret = __real_fstatvfs64(fd, v);

	if (!ret && fs.left != ~0ULL) {
		v->f_blocks = ~0ULL;
		v->f_bavail = fs.left / v->f_frsize;
	}
	return ret;
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

static int grow(struct image *img, const char *size, const char *backing)
{
	struct growth g = {
		.size = strtoull(size, NULL, 10),
		.backing_size = strtoull(backing, NULL, 10),
	};
	struct reasons reasons;
	int ret;

	image_reasons(img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s", reasons.r[0].cause);
	ret = image_load_tables(img, true);
	if (ret)
		return ret;
	return g.size < img->geo.size ? image_shrink(img, g.size) :
					image_grow(img, &g);
}

/* What is new must be there, and nothing that is used may have been changed. */
static int grow_live(struct image *img, const char *size, const char *backing,
		     const char *command)
{
	struct growth g = {
		.size = strtoull(size, NULL, 10),
		.backing_size = strtoull(backing, NULL, 10),
	};
	struct image before = *img;
	struct grower *w = NULL;
	struct reasons reasons;
	int ret;

	image_reasons(&before, false, &reasons);
	before.space.in_use = true;
	ret = reasons.n ? EX_WRONG : image_load_tables(&before, true);
	if (!ret)
		ret = image_grow_begin(&before, &g, &w);
	if (!ret && system(command))
		ret = fail(EX_WRONG, "command has failed");
	*img = (struct image)IMAGE_CLOSED;
	if (!ret)
		ret = image_open(img, AT_FDCWD, before.node.path, 0);
	if (!ret) {
		img->space = before.space;
		img->space.fd = img->node.fd;
		before.space = (struct space){ .fd = -1 };
		image_reasons(img, false, &reasons);
		ret = reasons.n ? EX_WRONG : image_load_tables(img, true);
	}
	if (!ret)
		ret = image_grow_end(img, w);
	image_grow_free(w);
	image_close(&before);
	return ret;
}

static int repair(struct image *img)
{
	struct verify v = { .img = img };
	int ret;

	ret = verify_image(&v, img);
	if (!ret)
		ret = repair_all(&v);
	if (!ret)
		ret = repair_marks(img);
	verify_free(&v);
	return ret;
}

static int change_bitmap(struct bitmaps *s, const char *what, const char *name,
			 const char *arg)
{
	int ret;

	if (!strcmp(what, "add"))
		return bitmaps_add(s, name, atoi(arg), true);
	if (!strcmp(what, "remove"))
		return bitmaps_remove(s, name);
	if (!strcmp(what, "clear"))
		return bitmaps_clear(s, name);
	if (!strcmp(what, "enable"))
		return bitmaps_record(s, name, true);
	if (!strcmp(what, "disable"))
		return bitmaps_record(s, name, false);
	if (!strcmp(what, "merge"))
		return bitmaps_merge(s, name, arg);
	if (strcmp(what, "rotate"))
		return EX_PARAMETER;
	ret = bitmaps_record(s, name, false);
	return ret ? ret : bitmaps_add(s, arg, 16, true);
}

/* @args: what, which, and how */
static int bitmap(struct image *img, char **args)
{
	struct bitmaps s = { .img = NULL };
	struct reasons reasons;
	unsigned int n;
	int ret;

	image_reasons(img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s", reasons.r[0].cause);
	ret = image_load_tables(img, true);
	if (!ret && !strcmp(args[0], "ready"))
		return image_bitmaps_ready(img, &n);
	if (!ret)
		ret = bitmaps_load(&s, img);
	if (!ret)
		ret = change_bitmap(&s, args[0], args[1], args[2]);
	if (!ret)
		ret = bitmaps_write(&s);
	bitmaps_free(&s);
	return ret;
}

/* Let the power fail after @n writes. */
static void set_power_cut(const char *n, const char *seed)
{
	verbose = false;
	writes_left = atol(n);
	srandom(atol(seed));
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
	} else if (!strcmp(argv[1], "sparse")) {
		img.space_kind = IMAGE_SPARSE;
		ret = prepare(&img);
	} else if ((!strcmp(argv[1], "space") && argc == 6) ||
		   (!strcmp(argv[1], "signal") && argc == 4)) {
		if (argc == 4) {
			interrupt_catch();
			fs.signal_at = atol(argv[3]);
		} else {
			fs.left = strtoull(argv[3], NULL, 10);
			fs.room = strtoull(argv[4], NULL, 10);
			fs.err = atoi(argv[5]);
		}
		verbose = false;
		ret = prepare(&img);
		if (ret)
			image_undo(&img);
	} else if (!strcmp(argv[1], "trim")) {
		ret = image_trim(&img, &cut);
	} else if (!strcmp(argv[1], "crash") && argc == 5) {
		set_power_cut(argv[3], argv[4]);
		ret = prepare(&img);
		if (!ret)
			ret = NO_SUCH_WRITE;
		forget_pending();
	} else if (!strcmp(argv[1], "grow") && argc == 5) {
		ret = grow(&img, argv[3], argv[4]);
	} else if (!strcmp(argv[1], "undo-grow") && argc == 5) {
		ret = grow(&img, argv[3], argv[4]);
		image_undo(&img);
	} else if (!strcmp(argv[1], "crash-grow") && argc == 7) {
		set_power_cut(argv[5], argv[6]);
		ret = grow(&img, argv[3], argv[4]);
		if (!ret) {
			printf("%ld\n", atol(argv[5]) - writes_left);
			ret = NO_SUCH_WRITE;
		}
		forget_pending();
	} else if (!strcmp(argv[1], "fail-grow") && argc == 7) {
		until_failure = atol(argv[5]);
		ret = grow(&img, argv[3], argv[4]) ? 0 : NO_SUCH_WRITE;
		if (ret)
			printf("%ld\n", atol(argv[5]) - until_failure);
		until_failure = atol(argv[6]);
		image_undo(&img);
		if (until_failure >= 0)
			ret = NO_SUCH_WRITE;
	} else if (!strcmp(argv[1], "grow-live") && argc == 6) {
		ret = grow_live(&img, argv[3], argv[4], argv[5]);
	} else if (!strcmp(argv[1], "undo-live") && argc == 6) {
		ret = grow_live(&img, argv[3], argv[4], argv[5]);
		image_undo(&img);
	} else if (!strcmp(argv[1], "crash-live") && argc == 8) {
		set_power_cut(argv[6], argv[7]);
		ret = grow_live(&img, argv[3], argv[4], argv[5]);
		if (!ret) {
			printf("%ld\n", atol(argv[6]) - writes_left);
			ret = NO_SUCH_WRITE;
		}
		forget_pending();
	} else if (!strcmp(argv[1], "crash-repair") && argc == 5) {
		set_power_cut(argv[3], argv[4]);
		ret = repair(&img);
		if (!ret)
			ret = NO_SUCH_WRITE;
		forget_pending();
	} else if (!strcmp(argv[1], "bitmap") && argc == 6) {
		ret = bitmap(&img, argv + 3);
	} else if (!strcmp(argv[1], "undo-bitmap") && argc == 6) {
		ret = bitmap(&img, argv + 3);
		image_undo(&img);
	} else if (!strcmp(argv[1], "crash-bitmap") && argc == 8) {
		set_power_cut(argv[6], argv[7]);
		ret = bitmap(&img, argv + 3);
		if (!ret) {
			printf("%ld\n", atol(argv[6]) - writes_left);
			ret = NO_SUCH_WRITE;
		}
		forget_pending();
	} else if (!strcmp(argv[1], "fail-bitmap") && argc == 8) {
		until_failure = atol(argv[6]);
		ret = bitmap(&img, argv + 3) ? 0 : NO_SUCH_WRITE;
		if (ret)
			printf("%ld\n", atol(argv[6]) - until_failure);
		until_failure = atol(argv[7]);
		image_undo(&img);
		if (until_failure >= 0)
			ret = NO_SUCH_WRITE;
	} else {
		ret = EX_PARAMETER;
	}
out:
	image_close(&img);
	return ret;
}
