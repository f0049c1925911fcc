// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup backup copy: what a view shows, or what has changed of it, to a file or device.
 *
 * What has changed can also be kept by itself, as an increment: an image, TARGET, whose data file is
 * TARGET.data, and whose backing file is the copy before it, full or an increment, too.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "image/make.h"
#include "lib/util.h"
#include "stack/backup.h"
#include "stack/copying.h"
#include "system/device.h"

/* Clusters of an increment: as granules of bitmaps are, within these */
#define INCREMENT_MIN_BITS	12
#define INCREMENT_MAX_BITS	16

struct copy {
	struct copying c;
	const char *name;
	struct backup_notes notes;
	struct copy_list list;		/* of what has changed, to the byte */
	int from;
	char id[80];
	/* Of an increment */
	unsigned int bits;
	char data[PATH_MAX];
	size_t at;			/* in c.list, when its tables are written */
};

static int add_piece(const struct backup_piece *p, void *arg)
{
	struct copy *k = arg;
	const struct copy_piece piece = {
		.start = p->start, .length = p->length, .from = k->from,
		.zero = p->zero,
	};

	return p->dirty ? copy_list_add(&k->list, &piece) : 0;
}

/* The backup, and what of it */
static void make_id(struct copy *k, const struct options *opt)
{
	uint64_t hash = 1469598103934665603ULL;
	unsigned int i;
	const char *s;

	for (i = 0; i < opt->bitmaps; i++)
		for (s = opt->bitmap[i]; ; s++) {
			hash = (hash ^ (unsigned char)*s) * 1099511628211ULL;
			if (!*s)
				break;
		}
	snprintf(k->id, sizeof(k->id), "%.40s-%016" PRIx64,
		 k->notes.id ? k->notes.id : "", hash);
	k->c.id = k->id;
}

/* The view is over, most likely, and this says why. */
static int why(const struct copying *c)
{
	struct copy *k = c->arg;
	struct backup_notes notes;
	int ret;

	ret = backup_find(k->name, &notes);
	backup_notes_free(&notes);
	return ret;
}

/*
 * An increment
 */

static int put_run(struct copy *k, uint64_t from, uint64_t to, bool zero)
{
	struct copy_list *l = &k->c.list;
	uint64_t start = from << k->bits, end = to << k->bits;
	const struct copy_piece *last = l->n ? &l->p[l->n - 1] : NULL;
	struct copy_piece piece = { .from = k->from, .zero = zero };

	/* A cluster that two pieces are in is data already. */
	if (last && start < last->start + last->length)
		start = last->start + last->length;
	end = min_u64(end, k->c.size);
	if (start >= end)
		return 0;
	piece.start = start;
	piece.length = end - start;
	return copy_list_add(l, &piece);
}

/* Whole clusters: those of which not all is known to be zeros are data. */
static int round_pieces(struct copy *k)
{
	uint64_t cs = 1ULL << k->bits, from, to, first, last;
	size_t i;
	int ret = 0;

	for (i = 0; !ret && i < k->list.n; i++) {
		const struct copy_piece *p = &k->list.p[i];
		uint64_t end = p->start + p->length;

		from = p->start >> k->bits;
		to = align_up(end, cs) >> k->bits;
		first = align_up(p->start, cs) >> k->bits;
		last = end == k->c.size ? to : end >> k->bits;
		if (!p->zero || first >= last) {
			ret = put_run(k, from, to, false);
			continue;
		}
		ret = put_run(k, from, first, false);
		if (!ret)
			ret = put_run(k, first, last, true);
		if (!ret)
			ret = put_run(k, last, to, false);
	}
	return ret;
}

static enum qcow2_state state_of(void *arg, uint64_t cluster)
{
	struct copy *k = arg;
	const struct copy_list *l = &k->c.list;
	uint64_t at = cluster << k->bits;

	while (k->at < l->n && l->p[k->at].start + l->p[k->at].length <= at)
		k->at++;
	if (k->at == l->n || l->p[k->at].start > at)
		return QCOW2_UNALLOCATED;
	return l->p[k->at].zero ? QCOW2_ZERO : QCOW2_DATA;
}

/* Its name in the new image: QEMU looks for a data file in its own folder. */
static int full_name(const char *path, char *name)
{
	if (realpath(path, name))
		return 0;
	return fail_errno("%s: cannot tell where it is", esc(path));
}

static int write_increment(struct copy *k, const char *target,
			   const struct options *opt)
{
	char data[PATH_MAX], backing[PATH_MAX];
	uint8_t *header = calloc(1, 1UL << k->bits);
	struct new_image n = {
		.path = target, .fresh = true, .dir = -1,
		.state = state_of, .arg = k, .fd = -1,
		.data_file = data, .backing = backing,
	};
	int ret;

	if (!header)
		return fail_nomem();
	n.backing_format = copy_is_increment(opt->increment_of) ? "qcow2" : "raw";
	ret = full_name(k->data, data);
	if (!ret)
		ret = full_name(opt->increment_of, backing);
	if (!ret && !new_image_plan(&n, k->c.size, k->bits))
		ret = fail(EX_WRONG, "%s: is too large for an increment of that granularity; use a bitmap with a larger one",
			   esc(k->name));
	if (!ret && !new_image_header(&n, header))
		ret = fail(EX_WRONG, "%s: its name, and that of %s, are too long; choose shorter ones",
			   esc(n.path), esc(opt->increment_of));
	if (!ret) {
		n.fd = open(n.path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (n.fd < 0)
			ret = fail_errno("%s: cannot create it", esc(n.path));
	}
	if (!ret) {
		ret = new_image_write(&n, header);
		if (ret)
			unlink(n.path);
	}
	if (n.fd >= 0)
		close(n.fd);
	free(header);
	return ret;
}

static int check_increment(struct copy *k, const char *target,
			   const struct options *opt)
{
	struct stat st;

	if (!opt->bitmaps)
		return fail(EX_PARAMETER,
			    "an increment is of what has changed; give --bitmap NAME, too");
	if (stat(opt->increment_of, &st))
		return fail_errno("%s: cannot find the copy that came before", esc(opt->increment_of));
	if (!access(target, F_OK))
		return fail(EX_BUSY, "%s: exists; remove it, or choose another name",
			    esc(target));
	if (snprintf(k->data, sizeof(k->data), "%s" INCREMENT_DATA, target) >=
	    (int)sizeof(k->data))
		return fail(EX_WRONG, "%s: name is too long; choose a shorter one", esc(target));
	return 0;
}

/*
 * What the action does
 */

static int open_view(struct copy *k)
{
	char device[160], path[200];

	backup_device_name(device, sizeof(device), k->name);
	snprintf(path, sizeof(path), "/dev/mapper/%s", device);
	k->from = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	return k->from < 0 ? fail_errno("%s: cannot open it", esc(path)) : 0;
}

static int list_pieces(struct copy *k, const struct options *opt)
{
	unsigned int bits = INCREMENT_MAX_BITS;
	int ret;

	ret = backup_pieces(&k->notes, opt->bitmap, opt->bitmaps, add_piece, k,
			    &k->c.size, &bits);
	if (ret || !opt->increment_of) {
		k->c.list = k->list;
		k->list = (struct copy_list){ NULL };
		return ret;
	}
	k->bits = bits < INCREMENT_MIN_BITS ? INCREMENT_MIN_BITS :
		  bits > INCREMENT_MAX_BITS ? INCREMENT_MAX_BITS : bits;
	return round_pieces(k);
}

int backup_copy(const struct options *opt, char **names, unsigned int n)
{
	struct copy k = {
		.c = {
			.json = opt->json, .resume = opt->resume,
			.verify = opt->verify, .to = NODE_CLOSED,
			.overwrite_device = opt->overwrite_device,
		},
		.from = -1,
	};
	int ret;

	if (n != 2)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup backup copy NAME TARGET [--bitmap BITMAP]... [--increment-of COPY] [--resume] [--verify]");
	k.name = k.c.source = device_name(names[0]);
	k.c.target = k.c.to.path = names[1];
	k.c.why = why;
	k.c.arg = &k;
	k.c.update = opt->bitmaps && !opt->increment_of;
	ret = opt->increment_of ? check_increment(&k, names[1], opt) : 0;
	if (opt->increment_of)
		k.c.target = k.c.to.path = k.data;
	if (!ret)
		ret = backup_find(k.name, &k.notes);
	if (!ret)
		ret = open_view(&k);
	if (!ret)
		ret = list_pieces(&k, opt);
	if (!ret) {
		make_id(&k, opt);
		ret = copying_open(&k.c);
	}
	if (!ret)
		ret = copying_run(&k.c);
	if (!ret && opt->increment_of)
		ret = write_increment(&k, names[1], opt);
	if (!ret)
		ret = copying_done(&k.c);
	copying_close(&k.c);
	free(k.list.p);
	backup_notes_free(&k.notes);
	if (k.from >= 0)
		close(k.from);
	return ret;
}
