// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/progress.h"
#include "lib/util.h"
#include "stack/copying.h"
#include "system/claim.h"
#include "system/copier.h"
#include "system/device.h"
#include "system/locks.h"

/* How long is waited for a copier before somebody is told how far it is */
#define STEP_MS		200
/* How often that is noted for who goes on with it */
#define NOTE_S		5
/* Who else has the target open is looked for so often, ten times a second */
#define USERS_TRIES	30

bool copy_is_increment(const char *path)
{
	char side[PATH_MAX + 8];

	snprintf(side, sizeof(side), "%s" INCREMENT_DATA, path);
	return !access(side, F_OK);
}

int copy_list_add(struct copy_list *l, const struct copy_piece *p)
{
	struct copy_piece *more;

	if (l->n == l->room) {
		l->room = 2 * l->room + 1024;
		more = realloc(l->p, l->room * sizeof(*more));
		if (!more)
			return fail_nomem();
		l->p = more;
	}
	l->p[l->n++] = *p;
	l->bytes += p->length;
	return 0;
}

/*
 * How far it is: which copy, and up to where all is on the target's disk
 */

/* Was it stopped there? */
static bool read_state(struct copying *c)
{
	FILE *f = fopen(c->state, "re");
	char id[80];
	bool good;

	good = f && fscanf(f, "%79s %" SCNu64, id, &c->begin) == 2;
	if (f)
		fclose(f);
	return good && c->id && !strcmp(id, c->id);
}

static int write_state(struct copying *c, uint64_t reached)
{
	FILE *f;

	if (!c->id)
		return 0;
	if (fdatasync(c->to.fd))
		return fail_errno("%s: cannot write it", esc(c->target));
	f = fopen(c->state, "we");
	if (!f)
		return fail_errno("%s: cannot note there how far the copy is", esc(c->state));
	fprintf(f, "%s %" PRIu64 "\n", c->id, reached);
	if (fclose(f))
		return fail_errno("%s: cannot note there how far the copy is", esc(c->state));
	return 0;
}

/*
 * The target
 */

static int make_file(struct copying *c)
{
	bool exists;

	c->to.fd = open(c->target, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	exists = c->to.fd < 0 && errno == EEXIST;
	if (exists && read_state(c))
		return fail(EX_BUSY,
			    "%s: exists; go on with --resume, remove it, or choose another name",
			    esc(c->target));
	if (exists)
		return fail(EX_BUSY, "%s: exists; remove it, or choose another name",
			    esc(c->target));
	if (c->to.fd < 0 || ftruncate(c->to.fd, c->size)) {
		int ret = fail_errno("%s: cannot create it", esc(c->target));

		if (c->to.fd >= 0)
			unlink(c->target);
		return ret;
	}
	c->fresh = true;
	return 0;
}

/* A copy that is to be brought up to date, or that was stopped */
static int open_file(struct copying *c)
{
	int ret = node_lock(&c->to, true);

	if (ret)
		return ret;
	if (c->to.size > c->size)
		return fail(EX_WRONG,
			    "%s: file of %s is larger than %s: not a copy of it; choose another name",
			    esc(c->target), human_size(c->to.size), esc(c->source));
	if (ftruncate(c->to.fd, c->size))
		return fail_errno("%s: cannot make it longer", esc(c->target));
	return 0;
}

/* A guest that runs from it, for example; whoever looks at a new device, as udev does, ends soon. */
static int check_unused(const struct copying *c)
{
	const struct timespec pause = { .tv_nsec = 100000000 };
	unsigned int tries;
	char users[512];

	for (tries = 0; tries < USERS_TRIES; tries++) {
		if (!device_users(c->to.rdev, users, sizeof(users)))
			return 0;
		nanosleep(&pause, NULL);
	}
	return fail(EX_BUSY, "%s: is in use: %s; end that, and try again",
		    esc(c->target), users);
}

static int open_device(struct copying *c)
{
	int ret;

	if (!c->overwrite_device && !c->update && !c->resume)
		return fail(EX_BUSY,
			    "%s: is a block device; give --overwrite-device to destroy what is on it",
			    esc(c->target));
	if (c->to.size < c->size)
		return fail(EX_WRONG,
			    "%s: device of %s is smaller than %s, of %s; enlarge it, or choose another one",
			    esc(c->target), human_size(c->to.size), esc(c->source),
			    human_size(c->size));
	ret = node_lock(&c->to, true);
	if (!ret)
		ret = claim_check(&c->to, true);
	return ret ? ret : check_unused(c);
}

int copying_open(struct copying *c)
{
	struct stat st;
	int ret;

	snprintf(c->state, sizeof(c->state), "%s.qcow2setup-copy", c->target);
	if (c->resume && !read_state(c))
		return fail(EX_WRONG,
			    "%s: no copy of this backup was stopped there; leave --resume out, and begin anew",
			    esc(c->target));
	if (stat(c->target, &st) || (S_ISREG(st.st_mode) && !c->resume &&
				     !c->update)) {
		if (c->update)
			return fail(EX_WRONG,
				    "%s: no such copy to be brought up to date; copy all first, without --bitmap",
				    esc(c->target));
		return make_file(c);
	}
	ret = node_open(&c->to, AT_FDCWD, c->target, 0);
	if (ret)
		return ret;
	return c->to.bdev ? open_device(c) : open_file(c);
}

/*
 * Copying
 */

static int went_wrong(const struct copying *c, const struct copier *k)
{
	int ret;

	if (k->differs)
		return fail(EX_WRONG,
			    "%s: differs from what was copied at byte %" PRIu64 "; do not trust it, and copy to another place",
			    esc(c->target), k->where);
	errno = k->error;
	if (!k->reading)
		return fail_errno("%s: cannot be %s at byte %" PRIu64, esc(c->target),
				  k->compare ? "read" : "written", k->where);
	ret = c->why ? c->why(c) : 0;
	if (ret)
		return ret;
	errno = k->error;
	return fail_errno("%s: cannot be read at byte %" PRIu64, esc(c->source), k->where);
}

/* All pieces from c->begin on, or all of them to be compared. */
static int run_copier(struct copying *c, bool compare)
{
	struct copier k = {
		.to = c->to.fd, .device = c->to.bdev,
		.fresh = c->fresh, .compare = compare,
	};
	uint64_t at = 0, skipped = 0;
	struct timespec noted, now;
	bool stop = false;
	size_t i;
	int ret;

	ret = copier_start(&k);
	if (ret) {
		errno = -ret;
		return fail_errno("no threads to copy with");
	}
	clock_gettime(CLOCK_MONOTONIC, &noted);
	progress_begin(&c->progress, compare ? "compare" : "copy", c->list.bytes,
		       c->json);
	for (i = 0; !stop && i < c->list.n; i++) {
		const struct copy_piece *p = &c->list.p[i];
		uint64_t end = p->start + p->length;

		for (at = p->start; !stop && at < end;) {
			struct copier_piece piece = {
				.start = at, .from = p->from, .zero = p->zero,
				.length = min_u64(end - at, COPIER_BYTES),
			};

			if (!compare && at + piece.length <= c->begin) {
				skipped += piece.length;
				progress_skip(&c->progress, piece.length);
				at += piece.length;
				continue;
			}
			ret = copier_add(&k, &piece, STEP_MS);
			if (ret > 0)
				at += piece.length;
			stop = ret < 0 || interrupted();
			progress_at(&c->progress, copier_done(&k) + skipped);
			clock_gettime(CLOCK_MONOTONIC, &now);
			if (!compare && !stop && now.tv_sec >= noted.tv_sec + NOTE_S) {
				noted = now;
				stop = write_state(c, copier_reached(&k, at));
			}
		}
	}
	if (!compare && (stop || interrupted()))
		write_state(c, copier_reached(&k, at));
	copier_finish(&k, stop);
	progress_finish(&c->progress, !k.error && !stop && !interrupted());
	if (k.error)
		return went_wrong(c, &k);
	if (stop || interrupted())
		return EX_WRONG;
	return 0;
}

/*
 * Past the page cache of a device, where there is nothing that would be read again: as far as all
 * that is copied are whole blocks of it.
 */
static void go_direct(const struct copying *c)
{
	uint64_t block = c->to.block_size;
	size_t i;

	if (!c->to.bdev || block > COPIER_ALIGN)
		return;
	for (i = 0; i < c->list.n; i++)
		if (c->list.p[i].start % block || c->list.p[i].length % block)
			return;
	/* If it cannot be, it goes on as it is. */
	fcntl(c->to.fd, F_SETFL, O_DIRECT);
}

int copying_run(struct copying *c)
{
	int ret;

	go_direct(c);
	ret = c->resume ? 0 : write_state(c, 0);

	if (!ret)
		ret = run_copier(c, false);
	if (!ret && fsync(c->to.fd))
		ret = fail_errno("%s: cannot write it", esc(c->target));
	if (!ret && c->verify) {
		/* From the disk, not from memory. */
		posix_fadvise(c->to.fd, 0, 0, POSIX_FADV_DONTNEED);
		ret = run_copier(c, true);
	}
	return ret;
}

int copying_done(struct copying *c)
{
	if (c->id && unlink(c->state))
		return fail_errno("%s: cannot remove it", esc(c->state));
	return 0;
}

void copying_close(struct copying *c)
{
	free(c->list.p);
	node_close(&c->to);
}
