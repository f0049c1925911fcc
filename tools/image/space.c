// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "image/space.h"
#include "lib/interrupt.h"
#include "lib/util.h"

/* Taken at a time, so that a signal is seen in between. */
#define STEP	(256 * MIB)

struct hole {
	off_t from, to;
};

static uint64_t allocated(const struct stat *st)
{
	return (uint64_t)st->st_blocks * 512;
}

/* Write down the holes before @end; sets *@sum to what they have in all. */
static int find_holes(struct space *s, off_t end, uint64_t *sum)
{
	struct hole *holes;
	off_t from, to = 0;

	*sum = 0;
	for (;;) {
		from = lseek(s->fd, to, SEEK_HOLE);
		/* An error: not to be found out here, so none are known. */
		if (from < 0 || from >= end)
			return 0;
		to = lseek(s->fd, from, SEEK_DATA);
		if (to < 0 || to > end)
			to = end;
		if (!(s->nr_holes & (s->nr_holes - 1))) {
			holes = reallocarray(s->holes, 2 * s->nr_holes + 1,
					     sizeof(*holes));
			if (!holes)
				return fail_nomem();
			s->holes = holes;
		}
		s->holes[s->nr_holes++] = (struct hole){ from, to };
		*sum += to - from;
	}
}

/* What an ordinary user can have of the file system; UINT64_MAX: not known */
static uint64_t space_left(int fd)
{
	struct statvfs v;

	/* Those without a limit have no blocks. */
	if (fstatvfs(fd, &v) || !v.f_blocks || !v.f_frsize ||
	    v.f_bavail > UINT64_MAX / v.f_frsize)
		return UINT64_MAX;
	return (uint64_t)v.f_bavail * v.f_frsize;
}

static int no_space(const struct space *s, uint64_t real, uint64_t missing,
		    uint64_t left, int err)
{
	char why[80] = "its file system has no space for that";

	if (err == EDQUOT)
		snprintf(why, sizeof(why), "the disk quota is used up");
	else if (left < missing)
		snprintf(why, sizeof(why), "its file system has only %s left",
			 human_size(left));
	return fail(EX_WRONG,
		    "%s: metadata can need %s, %s more than it has now, but %s; %s, or use --sparse",
		    esc(s->path), human_size(real), human_size(missing), why,
		    err == EDQUOT ? "raise the quota" : "free some space there");
}

static int fill(int fd, off_t from, off_t to)
{
	off_t len;

	for (; from < to; from += len) {
		len = min_u64(to - from, STEP);
		while (fallocate(fd, 0, from, len)) {
			if (errno != EINTR)
				return -errno;
			if (interrupted())
				break;
		}
		if (interrupted())
			return -EINTR;
	}
	return 0;
}

/*
 * Holes first: whether they took space tells them from what was allocated
 * before, which looks like a hole, too, as long as nothing is written there.
 */
static int fill_all(struct space *s, const struct stat *before, off_t real)
{
	off_t old = min_u64(s->length, real);
	struct stat now;
	int ret = 0;

	if (s->nr_holes) {
		ret = fill(s->fd, 0, old);
		s->filled = fstat(s->fd, &now) ||
			    now.st_blocks != before->st_blocks;
	}
	return ret ? ret : fill(s->fd, old, real);
}

/* Make [0, @real) real; or as long as it shall be, if that is not to be had. */
static int take_real(struct space *s, const struct stat *before, uint64_t real)
{
	uint64_t size = before->st_size, missing, left;
	int ret;

	ret = find_holes(s, min_u64(size, real), &missing);
	if (ret)
		return ret;
	if (!s->nr_holes && size >= real)
		return 0;
	/*
	 * Each can be too much: one takes what was set aside before for holes,
	 * the other sees less where the file is compressed.
	 */
	missing += real > size ? real - size : 0;
	missing = min_u64(missing, real - min_u64(real, allocated(before)));
	left = space_left(s->fd);
	/* Not tried: it would take from all others what there is. */
	if (missing > left)
		return no_space(s, real, missing, left, ENOSPC);
	s->taken = true;
	ret = fill_all(s, before, real);
	switch (ret) {
	case 0:
		s->zeros = max_u64(s->length, 1);
		note("%s: has all the space that its metadata can need, %s",
		     esc(s->path), human_size(real));
		return 0;
	case -EINTR:
		return EX_WRONG;
	case -ENOSPC:
	case -EDQUOT:
		return no_space(s, real, missing, left, -ret);
	case -EOPNOTSUPP:
	case -ENOSYS:
		warning("%s: its file system cannot set space aside, so it stays sparse: when that is full, writes that need more metadata fail",
			esc(s->path));
		return 0;
	default:
		errno = -ret;
		return fail_errno("%s: cannot extend it to %s", esc(s->path),
				  human_size(real));
	}
}

/* Some has been taken: more of the same kind, with what is known from then. */
static int take_more(struct space *s, uint64_t size, uint64_t real)
{
	struct stat st;
	int ret = 0;

	if (fstat(s->fd, &st))
		return fail_errno("%s: cannot stat it", esc(s->path));
	if ((uint64_t)st.st_size < real) {
		ret = fill(s->fd, st.st_size, real);
		if (ret == -EINTR)
			return EX_WRONG;
	}
	if (ret && ret != -EOPNOTSUPP && ret != -ENOSYS) {
		errno = -ret;
		return fail_errno("%s: cannot extend it to %s", esc(s->path),
				  human_size(real));
	}
	if (((uint64_t)st.st_size < size && ftruncate(s->fd, size)) ||
	    fsync(s->fd))
		return fail_errno("%s: cannot extend it to %s", esc(s->path),
				  human_size(size));
	return 0;
}

int space_take(struct space *s, uint64_t size, uint64_t real)
{
	struct stat st;
	int ret;

	if (s->taken)
		return take_more(s, size, real);
	if (fstat(s->fd, &st))
		return fail_errno("%s: cannot stat it", esc(s->path));
	s->length = st.st_size;
	if (real != SPACE_SPARSE) {
		ret = take_real(s, &st, real);
		if (ret)
			return ret;
		if (fstat(s->fd, &st))
			return fail_errno("%s: cannot stat it", esc(s->path));
	}
	if ((uint64_t)st.st_size < size) {
		s->taken = true;
		if (ftruncate(s->fd, size))
			return fail_errno("%s: cannot extend it to %s",
					  esc(s->path), human_size(size));
	}
	if (s->taken && fsync(s->fd))
		return fail_errno("%s: cannot extend it to %s", esc(s->path),
				  human_size(size));
	return 0;
}

int space_give_back(struct space *s)
{
	int ret = 0;
	size_t i;

	if (!s->taken)
		return 0;
	s->taken = false;
	for (i = 0; s->filled && !s->in_use && i < s->nr_holes; i++)
		if (fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      s->holes[i].from,
			      s->holes[i].to - s->holes[i].from))
			ret = -errno;
	/* Also if its length has not changed: it may have blocks behind that. */
	if (ftruncate(s->fd, s->length) || fsync(s->fd))
		ret = -errno;
	return ret;
}

void space_free(struct space *s)
{
	free(s->holes);
	*s = (struct space){ .fd = -1 };
}
