// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup backup restore: a full copy, or an increment and all that it is one of, back to a
 * device, or to a new file.
 *
 * From the top down each copy says which pieces of what was not known yet it has.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "image/walk.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/copying.h"
#include "system/locks.h"

#define MOST_COPIES	256

struct one_copy {
	char path[PATH_MAX];
	bool increment;
	struct node node;		/* of the data */
	struct image img;		/* of an increment */
};

struct restore {
	struct copying c;
	struct one_copy *copy[MOST_COPIES];	/* the newest first; they stay where they are */
	unsigned int n;
	/* What is to be looked for in the next copy, and which part of that is asked about */
	struct copy_list wanted, left;
	size_t at;
	uint64_t done;			/* in it, bytes of the disk */
	int from;
};

/*
 * The copy before: in the folder of the one that names it, since a folder of copies may have been
 * moved; elsewhere only if that is trusted.
 */
static int before(const struct one_copy *x, bool trusted, char *path)
{
	const struct span *s = &x->img.h.backing_file;
	char name[PATH_MAX], folder[PATH_MAX], base[PATH_MAX];

	if (!s->s || s->len >= sizeof(name))
		return fail(EX_WRONG,
			    "%s: not an increment that backup copy has made, for it names no copy before it; use qemu-img convert",
			    esc(x->path));
	memcpy(name, s->s, s->len);
	name[s->len] = 0;
	snprintf(folder, sizeof(folder), "%s", x->path);
	snprintf(base, sizeof(base), "%s", name);
	if (snprintf(path, PATH_MAX, "%s/%s", dirname(folder), basename(base)) >= PATH_MAX)
		return fail(EX_WRONG, "%s: name is too long; use a shorter one", esc(name));
	if (!access(path, F_OK))
		return 0;
	if (!trusted)
		return fail(EX_WRONG,
			    "%s: an increment of %s, which is not in the same folder; put it there, or give --trust-image-paths",
			    esc(x->path), esc(name));
	snprintf(path, PATH_MAX, "%s", name);
	return 0;
}

static int open_copy(struct one_copy *x)
{
	char side[PATH_MAX + 8];
	struct reasons reasons;
	int ret;

	x->increment = copy_is_increment(x->path);
	if (!x->increment) {
		ret = node_open(&x->node, AT_FDCWD, x->path, NODE_READ_ONLY);
		return ret ? ret : node_lock(&x->node, false);
	}
	snprintf(side, sizeof(side), "%s" INCREMENT_DATA, x->path);
	ret = image_open(&x->img, AT_FDCWD, x->path, NODE_READ_ONLY);
	if (!ret)
		ret = node_lock(&x->img.node, false);
	if (ret)
		return ret;
	image_reasons(&x->img, true, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(x->path), reasons.r[0].cause,
			    reasons.r[0].remedy);
	ret = image_geometry(&x->img, &x->img.geo);
	if (!ret)
		ret = node_open(&x->node, AT_FDCWD, side, NODE_READ_ONLY);
	if (ret)
		return ret;
	/* Messages would name what is on the stack. */
	x->node.path = x->path;
	return node_lock(&x->node, false);
}

/* The copy that was asked for, and all those that it is made of */
static int open_chain(struct restore *r, const char *path, bool trusted)
{
	char next[PATH_MAX];
	struct one_copy *x;
	int ret;

	if (snprintf(next, sizeof(next), "%s", path) >= (int)sizeof(next))
		return fail(EX_WRONG, "%s: name is too long; use a shorter one", esc(path));
	do {
		if (r->n == MOST_COPIES)
			return fail(EX_WRONG,
				    "%s: more than %d copies are one of the other; merge some with qemu-img commit",
				    esc(path), MOST_COPIES);
		x = malloc(sizeof(*x));
		if (!x)
			return fail_nomem();
		r->copy[r->n++] = x;
		*x = (struct one_copy){ .node = NODE_CLOSED, .img = IMAGE_CLOSED };
		memcpy(x->path, next, sizeof(next));
		ret = open_copy(x);
		if (!ret && x->increment)
			ret = before(x, trusted, next);
	} while (!ret && x->increment);
	return ret;
}

/*
 * Which piece is read from which copy
 */

/* [@start, @end) of the disk: the copy has it, as data or zeros, or (@from -1) has nothing there. */
static int put(struct restore *r, uint64_t start, uint64_t end, int from, bool zero)
{
	int ret = 0;

	for (; !ret && r->at < r->wanted.n; r->at++) {
		const struct copy_piece *w = &r->wanted.p[r->at];
		uint64_t stop = min_u64(end, w->start + w->length);
		struct copy_piece piece = {
			.start = max_u64(start, w->start), .from = from, .zero = zero,
		};

		if (piece.start < stop) {
			piece.length = stop - piece.start;
			ret = copy_list_add(from < 0 && !zero ? &r->left : &r->c.list, &piece);
		}
		/* The next part of the copy may be about this one, too. */
		if (w->start + w->length > end)
			break;
	}
	r->done = end;
	return ret;
}

static int put_extent(const struct extent *e, void *arg)
{
	struct restore *r = arg;
	bool zero = e->state == QCOW2_ZERO;
	int ret;

	ret = put(r, e->start, e->start + e->length,
		  e->state == QCOW2_DATA ? r->from : -1, zero);
	return !ret && interrupted() ? EX_WRONG : ret;
}

/* What was written of a file, and what is a hole; a device has all of it. */
static int put_raw(struct restore *r, const struct node *node)
{
	uint64_t size = min_u64(node->size, r->c.size), at = 0;
	off_t data, hole;
	int ret = 0;

	while (!ret && at < size) {
		data = node->bdev ? (off_t)at : lseek(node->fd, at, SEEK_DATA);
		if (data < 0 && errno != ENXIO)
			return fail_errno("%s: cannot read it", esc(node->path));
		if (data < 0 || (uint64_t)data > size)
			data = size;
		hole = node->bdev || (uint64_t)data == size ? (off_t)size :
		       lseek(node->fd, data, SEEK_HOLE);
		if (hole < 0)
			return fail_errno("%s: cannot read it", esc(node->path));
		hole = min_u64(hole, size);
		if ((uint64_t)data > at)
			ret = put(r, at, data, -1, true);
		if (!ret && hole > data)
			ret = put(r, data, hole, node->fd, false);
		at = hole;
	}
	return ret;
}

static int put_copy(struct restore *r, const struct one_copy *x)
{
	struct extents e = {
		.states_only = true, .fn = put_extent, .arg = r,
	};
	int ret;

	r->at = 0;
	r->done = 0;
	r->from = x->node.fd;
	if (x->increment) {
		e.size = x->img.geo.size;
		ret = image_walk(&x->img, &x->img.geo, &e);
	} else {
		ret = put_raw(r, &x->node);
	}
	/* It was smaller then. */
	if (!ret && r->done < r->c.size)
		ret = put(r, r->done, r->c.size, -1, true);
	free(r->wanted.p);
	r->wanted = r->left;
	r->left = (struct copy_list){ NULL };
	return ret;
}

static int compare_pieces(const void *a, const void *b)
{
	const struct copy_piece *x = a, *y = b;

	return x->start < y->start ? -1 : x->start > y->start;
}

static int find_pieces(struct restore *r)
{
	const struct one_copy *x = r->copy[0];
	struct copy_piece all = { .from = -1 };
	unsigned int i;
	int ret;

	r->c.size = x->increment ? x->img.geo.size : x->node.size;
	all.length = r->c.size;
	ret = copy_list_add(&r->wanted, &all);
	for (i = 0; !ret && i < r->n; i++)
		ret = put_copy(r, r->copy[i]);
	if (!ret)
		qsort(r->c.list.p, r->c.list.n, sizeof(*r->c.list.p), compare_pieces);
	return ret;
}

int backup_restore(const struct options *opt, char **names, unsigned int n)
{
	struct restore r = {
		.c = {
			.json = opt->json, .verify = opt->verify,
			.overwrite_device = opt->overwrite_device,
			.to = NODE_CLOSED,
		},
	};
	unsigned int i;
	int ret;

	if (n != 2)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup backup restore COPY TARGET [--verify] [--overwrite-device]");
	r.c.source = names[0];
	r.c.target = r.c.to.path = names[1];
	ret = open_chain(&r, names[0], opt->trust_image_paths);
	if (!ret)
		ret = find_pieces(&r);
	if (!ret)
		ret = copying_open(&r.c);
	if (!ret)
		ret = copying_run(&r.c);
	copying_close(&r.c);
	free(r.wanted.p);
	free(r.left.p);
	for (i = 0; i < r.n; i++) {
		image_close(&r.copy[i]->img);
		node_close(&r.copy[i]->node);
		free(r.copy[i]);
	}
	return ret;
}
