// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Cut the power: make of the log of a dm-log-writes device the states that the
 * disks could have been in, and judge each.
 *
 * The folder holds what test_powercut.py recorded:
 *	conf	"KEY NUMBER" lines, see struct conf
 *	meta	the metadata device before the load
 *	log	the log device, as far as it was used
 *	flushes	a line for each flush in the log: whether it was one of the metadata
 *		device (m), of the data device (d), or that cannot be said (?); and how
 *		many flushes were sent before
 *	journal	what the load requested, see qcow2load.c
 *
 * Metadata and data device are two ranges of the logged device, but each has a
 * write cache of its own here: a flush of one says nothing about the other.  What
 * a state may consist of is thus
 *	- what each device had at its last flush, with FUA writes since then, and
 *	- of each later write in the log any sectors, or none.
 * Reordering of writes is no case of its own: a disk shows of the writes to one
 * sector the last one that it has got.
 *
 * States are made
 *	- after each entry of the log: all of the log up to there
 *	- after each flush, FUA write and mark: only what must be there
 *	- in between: random choices, with writes torn at sectors
 *
 * Each state is judged
 *	- in here, by the definitions that the driver is built from: the header, L1
 *	  and L2 tables, every refcount
 *	- in here: each sector that a guest would see must be one that the requests
 *	  allow, given those that were acknowledged before a flush that ended before
 *	  (or another command judges the content: -c); with data_file_raw, those that
 *	  the data device has, too
 *	- in here: bitmaps that record are valid, and have the bit of each granule set
 *	  whose content is not what it was before the load, and each bit that was set then;
 *	  of others than those that requests have asked to change so far at most 2 percent,
 *	  and none when the device has been closed
 *	- by "qemu-img check" and "qcow2setup check", if the metadata is not that of
 *	  a state that they have seen; all three have to agree about leaks
 *	- a share of them by "qemu-img compare" with the view of this program
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../driver/format.h"
#include "qcow2stamp.h"

#define NAME		"qcow2replay"
#define MAX_REPORTS	5
/* Percent of the granules that may be marked without a reason */
#define MAX_OVER	2

extern char **environ;

/* dm-log-writes' format */
#define LOG_MAGIC	0x6a736677736872ULL
enum { LOG_FLUSH = 1, LOG_FUA = 2, LOG_DISCARD = 4, LOG_MARK = 8 };

struct log_super {
	uint64_t magic, version, nr_entries;
	uint32_t sectorsize;
};

struct log_entry {
	uint64_t sector, nr_sectors, flags, data_len;
};

static struct conf {
	uint64_t meta_sectors;		/* of the logged device, its first ones */
	uint64_t data_sectors;		/* behind them */
	uint64_t backing_sectors;
	uint64_t seed;			/* of the load; 0: content is not stamped */
	uint64_t closed;		/* the log ends with the device's removal */
	uint64_t raw;			/* the data device is a raw disk, too */
	uint64_t chain;			/* bitmaps end, and others begin: one of them has each change */
} conf;

struct entry {
	bool meta;			/* which device */
	unsigned int flags;
	uint64_t sector, nr;		/* on that device */
	uint32_t content;		/* sector in the log */
	char owner;			/* of a flush */
	unsigned int rank;		/* of a flush, by when it was sent */
	char mark;			/* kind, and number */
	unsigned int number;
	uint64_t began;			/* no request sent from this time on is in the log yet */
};

struct request {
	char kind;
	uint64_t sector, nr, submitted, acked, marked;
	uint64_t size;			/* of the device */
};

/* What is in a sector of the data device; above, a sector of the log */
enum { INITIAL, DISCARDED };

/* What a sector reads as */
enum class { GARBAGE, FOREIGN, POISON, TRIMMED, ZEROS, BACKING, STAMPED };

struct state {
	uint8_t *meta;
	uint32_t *data;
};

struct list {
	unsigned int *entry, nr;
};

static const uint8_t *log_base;
static uint64_t log_sectors;
static struct entry *entries;
static unsigned int nr_entries, nr_requests, max_requests;
static struct request *requests;
static uint32_t *class_of;		/* per sector of the log */
static const uint8_t *meta_before;
static uint8_t *used_at_ends;		/* clusters referenced before or after the load */

static struct state written, base, draft;
static uint32_t *base_order[2];		/* latest entry applied to base, data and meta */
static struct list pending[2];
static uint32_t *must;			/* per sector: oldest version that may be seen */
static int64_t *zero_version;		/* latest that consists of zeros */
static uint64_t size_must;		/* sectors */
static uint64_t *asked;			/* per sector: when a request to change it was sent first */
static int last_sync = -1;		/* number of the last mark 's' */

/* Of all workers */
static struct {
	unsigned long states, prefixes, minimal, subsets, checks, compares, commands;
	unsigned long failures, max_leaks;
	unsigned long max_over;		/* granules of 10,000 that are marked without need */
} *sum;

static unsigned int jobs = 1, worker, subsets = 2, share = 1;
static uint64_t seed = 1;
static const char *folder, *work, *command, *tool = "qcow2setup";
static unsigned long counter;		/* of states, the same in all workers */
static unsigned int compare_share = 100, check_share = 1, command_share = 8;
static char name[64];

static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, NAME ": ");
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(2);
}

__attribute__((format(printf, 2, 3)))
static bool fault(const char *reason, const char *format, ...)
{
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (__atomic_fetch_add(&sum->failures, 1, __ATOMIC_RELAXED) < MAX_REPORTS) {
		printf("# %s: %s: %s: %s\n", folder, name, reason, text);
		fflush(stdout);
	}
	return false;
}

static void count(unsigned long *what)
{
	__atomic_fetch_add(what, 1, __ATOMIC_RELAXED);
}

static void *zalloc(size_t nr, size_t each)
{
	void *p = calloc(nr ? nr : 1, each);

	if (!p)
		die("no memory");
	return p;
}

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

static uint64_t rng;

static uint64_t below(uint64_t n)
{
	rng = mix(rng);
	return rng % n;
}

/*
 * The recording
 */

static const void *map_file(const char *file, uint64_t *bytes)
{
	char path[PATH_MAX];
	struct stat st;
	void *p;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, file);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st))
		die("%s: %s", path, strerror(errno));
	*bytes = st.st_size;
	if (!st.st_size) {
		close(fd);
		return "";
	}
	p = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (p == MAP_FAILED)
		die("%s: %s", path, strerror(errno));
	close(fd);
	return p;
}

static FILE *open_text(const char *file)
{
	char path[PATH_MAX];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", folder, file);
	f = fopen(path, "r");
	if (!f)
		die("%s: %s", path, strerror(errno));
	return f;
}

static void read_conf(void)
{
	FILE *f = open_text("conf");
	uint64_t value;
	char key[32];

	while (fscanf(f, "%31s %" SCNu64, key, &value) == 2) {
		if (!strcmp(key, "meta_sectors"))
			conf.meta_sectors = value;
		else if (!strcmp(key, "data_sectors"))
			conf.data_sectors = value;
		else if (!strcmp(key, "backing_sectors"))
			conf.backing_sectors = value;
		else if (!strcmp(key, "seed"))
			conf.seed = value;
		else if (!strcmp(key, "closed"))
			conf.closed = value;
		else if (!strcmp(key, "raw"))
			conf.raw = value;
		else if (!strcmp(key, "chain"))
			conf.chain = value;
	}
	fclose(f);
	if (!conf.meta_sectors || !conf.data_sectors)
		die("%s/conf is not complete", folder);
}

static void read_journal(void)
{
	FILE *f = open_text("journal");
	struct request r;
	unsigned int number;
	uint64_t size = 0;

	while (fscanf(f, " %c %" SCNu64 " %" SCNu64 " %u %" SCNu64 " %" SCNu64 " %" SCNu64,
		      &r.kind, &r.sector, &r.nr, &number, &r.submitted, &r.acked, &r.marked) == 7) {
		if (r.kind == 's') {
			size = r.nr;
			continue;
		}
		if (number != nr_requests || r.sector + r.nr > conf.data_sectors)
			die("the journal is not in order at request %u", number);
		if (nr_requests == max_requests) {
			max_requests = max_requests * 2 + 1024;
			requests = realloc(requests, max_requests * sizeof(*requests));
			if (!requests)
				die("no memory");
		}
		r.size = size;
		requests[nr_requests++] = r;
	}
	if (!feof(f))
		die("the journal cannot be read after request %u", nr_requests);
	fclose(f);
}

static enum class classify(const uint8_t *p, uint64_t sector)
{
	uint64_t w[4];

	memcpy(w, p, sizeof(w));
	if (!w[0] && !memcmp(p, p + 8, SECTOR - 8))
		return ZEROS;
	if (!stamp_valid(p))
		return GARBAGE;
	if (w[1] != sector)
		return FOREIGN;
	switch (w[0] & 0xff) {
	case STAMP_REQUEST:
		if (w[3] != conf.seed || w[2] >= nr_requests)
			return FOREIGN;
		return STAMPED + w[2];
	case STAMP_POISON:
		return POISON;
	case STAMP_BACKING:
		return BACKING;
	default:
		return FOREIGN;
	}
}

static uint64_t mark_time(const struct entry *e)
{
	if ((e->mark != 'f' && e->mark != 'u') || e->number >= nr_requests)
		return UINT64_MAX;
	return requests[e->number].marked;
}

/*
 * dm-log-writes puts what a flush makes durable right before it when it ends.  A
 * flush that was sent later, and so makes that durable as well, but ended earlier
 * is before all that: move it there.
 */
static void order_flushes(void)
{
	const unsigned int others = LOG_FLUSH | LOG_FUA | LOG_MARK;
	unsigned int n, first, to, i, batch;
	struct entry *moved = zalloc(nr_entries, sizeof(*moved));

	for (n = 0; n < nr_entries; n++) {
		if (!(entries[n].flags & LOG_FLUSH))
			continue;
		first = n;
		while (first && !(entries[first - 1].flags & others))
			first--;
		batch = n - first;
		for (i = to = first; i-- > 0;)
			if ((entries[i].flags & LOG_FLUSH) && entries[i].rank > entries[n].rank)
				to = i;
		if (to == first || !batch)
			continue;
		while (to && !(entries[to - 1].flags & others))
			to--;
		memcpy(moved, entries + first, batch * sizeof(*moved));
		memmove(entries + to + batch, entries + to, (first - to) * sizeof(*moved));
		memcpy(entries + to, moved, batch * sizeof(*moved));
	}
	free(moved);
}

static void read_log(void)
{
	const struct log_super *super;
	FILE *flushes = open_text("flushes");
	uint64_t bytes, at, time = UINT64_MAX, i;
	unsigned int n;
	char more;

	log_base = map_file("log", &bytes);
	log_sectors = bytes / SECTOR;
	super = (const void *)log_base;
	if (!log_sectors || super->magic != LOG_MAGIC || super->sectorsize != SECTOR)
		die("%s/log is not a log with sectors of 512 bytes", folder);
	nr_entries = super->nr_entries;
	entries = zalloc(nr_entries, sizeof(*entries));
	class_of = zalloc(log_sectors, sizeof(*class_of));
	for (n = 0, at = 1; n < nr_entries; n++) {
		const struct log_entry *l = (const void *)(log_base + at * SECTOR);
		struct entry *e = entries + n;

		if (at >= log_sectors)
			die("the log ends before its entry %u", n);
		at++;
		e->flags = l->flags;
		e->sector = l->sector;
		e->nr = l->nr_sectors;
		e->content = at;
		if (e->flags & LOG_MARK) {
			e->mark = *(const char *)(l + 1);
			e->number = atoi((const char *)(l + 1) + 1);
			continue;
		}
		if ((e->flags & LOG_FLUSH) && fscanf(flushes, " %c %u", &e->owner, &e->rank) != 2)
			die("more flushes are in the log than were seen");
		e->meta = e->sector < conf.meta_sectors;
		if (!e->meta)
			e->sector -= conf.meta_sectors;
		if (e->nr > (e->meta ? conf.meta_sectors : conf.data_sectors) - e->sector)
			die("entry %u of the log is not within one device", n);
		if (e->flags & LOG_DISCARD)
			continue;
		if (at + e->nr > log_sectors)
			die("the log ends in its entry %u", n);
		if (conf.seed && !e->meta)
			for (i = 0; i < e->nr; i++)
				class_of[at + i] = classify(log_base + (at + i) * SECTOR,
							    e->sector + i);
		at += e->nr;
	}
	if (fscanf(flushes, " %c", &more) == 1)
		die("more flushes were seen than are in the log");
	fclose(flushes);
	order_flushes();
	for (n = nr_entries; n-- > 0;) {
		if (entries[n].flags & LOG_MARK && mark_time(entries + n) < time)
			time = mark_time(entries + n);
		entries[n].began = time;
	}
}

/*
 * What the requests allow
 */

/* The sectors that a request changes, in whole units for discards. */
static void effect(const struct request *r, unsigned int unit, uint64_t *from, uint64_t *to)
{
	*from = r->sector;
	*to = r->sector + r->nr;
	if (r->kind != 'd')
		return;
	*from = (*from + unit - 1) / unit * unit;
	if (*to != r->size)
		*to -= *to % unit;
}

static void make_durable(unsigned int n, unsigned int unit)
{
	uint64_t from, to;

	if (requests[n].kind == 'f')
		return;
	for (effect(requests + n, unit, &from, &to); from < to; from++)
		if (must[from] < n + 1)
			must[from] = n + 1;
}

static void follow_requests(const struct entry *e, unsigned int unit)
{
	static unsigned int begun;
	static bool *durable;
	static unsigned int low;
	uint64_t from, to;
	unsigned int n;

	for (; begun < nr_requests && requests[begun].submitted < e->began; begun++) {
		const struct request *r = requests + begun;

		if (r->kind != 'z' && r->kind != 'd')
			continue;
		for (effect(r, unit, &from, &to); from < to; from++)
			zero_version[from] = begun + 1;
	}
	if (!(e->flags & LOG_MARK))
		return;
	if (e->mark == 'r')
		size_must = e->number;
	else if (e->mark == 's')
		last_sync = e->number;
	if ((e->mark != 'f' && e->mark != 'u') || e->number >= nr_requests)
		return;
	if (!durable)
		durable = zalloc(nr_requests, sizeof(*durable));
	if (e->mark == 'u')
		make_durable(e->number, unit);
	else
		for (n = low; n < e->number; n++) {
			if (durable[n] || !requests[n].acked ||
			    requests[n].acked > requests[e->number].submitted)
				continue;
			durable[n] = true;
			make_durable(n, unit);
		}
	while (low < nr_requests && durable[low])
		low++;
}

static enum class content(const struct state *st, uint64_t s)
{
	if (st->data[s] == INITIAL)
		return conf.raw ? ZEROS : POISON;
	return st->data[s] == DISCARDED ? TRIMMED : class_of[st->data[s]];
}

static bool judge_sector(uint64_t s, enum class c, enum qcow2_state state)
{
	static const char *const names[] = {
		[QCOW2_UNALLOCATED] = "unallocated", [QCOW2_ZERO] = "zero", [QCOW2_DATA] = "data",
	};
	const char *where = names[state];

	switch (c) {
	case GARBAGE:
		return fault("garbage", "sector %" PRIu64 " (%s)", s, where);
	case FOREIGN:
		return fault("foreign", "sector %" PRIu64 " (%s) has another one's content", s, where);
	case POISON:
		return fault("poison", "sector %" PRIu64 " (%s) was never written", s, where);
	case TRIMMED:
		return fault("discarded", "sector %" PRIu64 " (%s) was discarded on the data device", s, where);
	case ZEROS:
		if (zero_version[s] < must[s])
			return fault("zeros", "sector %" PRIu64 " (%s) must have the content of request %d or later",
				     s, where, (int)must[s] - 1);
		return true;
	case BACKING:
		if (must[s] || s >= conf.backing_sectors)
			return fault("old", "sector %" PRIu64 " (%s) has the backing device's content, request %d is durable",
				     s, where, (int)must[s] - 1);
		return true;
	default:
		if (c - STAMPED + 1 < must[s])
			return fault("old", "sector %" PRIu64 " (%s) has the content of request %u, but %d is durable",
				     s, where, c - STAMPED, (int)must[s] - 1);
		return true;
	}
}

/*
 * The image
 */

#define MAX_BITMAPS	20

struct recorded {
	struct qcow2_bitmap b;
	const uint8_t *table;
};

struct image {
	struct qcow2_geometry g;
	unsigned int nr_bitmaps;
	struct recorded bitmaps[MAX_BITMAPS];	/* that record, or (conf.chain) all */
	uint64_t clusters;		/* of the metadata device */
	uint64_t leaks;
	uint8_t *refs;
};

static struct image now;

static uint64_t be64_at(const uint8_t *p)
{
	__be64 v;

	memcpy(&v, p, sizeof(v));
	return be64_to_cpu(v);
}

static bool refer(struct image *im, uint64_t offset, uint64_t nr, const char *what)
{
	uint64_t c = offset >> im->g.cluster_bits;

	while (nr--) {
		if (im->refs[c])
			return fault("corrupt", "cluster %#" PRIx64 " is used twice, by %s", c, what);
		im->refs[c++] = 1;
	}
	return true;
}

static bool bad_bitmaps(enum qcow2_fault f)
{
	return fault("corrupt", "bitmaps: %s", qcow2_fault_str(f));
}

/* The entries of a bitmap's table */
static bool walk_bitmap(struct image *im, const uint8_t *meta, const struct qcow2_bitmap *b)
{
	uint64_t bytes = conf.meta_sectors * SECTOR, cs = 1ULL << im->g.cluster_bits;
	enum qcow2_fault f;
	__u64 off = 0;
	uint32_t i;

	f = qcow2_bitmap_record_check(b, im->g.size, im->g.cluster_bits, bytes);
	if (f)
		return bad_bitmaps(f);
	if (!refer(im, b->table_offset, (b->table_size * 8ULL + cs - 1) >> im->g.cluster_bits, "a bitmap's table"))
		return false;
	for (i = 0; i < b->table_size; i++) {
		f = qcow2_bitmap_entry_check(be64_at(meta + b->table_offset + 8 * i), im->g.cluster_bits, bytes, &off);
		if (f)
			return bad_bitmaps(f);
		if (off && !refer(im, off, 1, "a bitmap"))
			return false;
	}
	return true;
}

static bool walk_directory(struct image *im, const uint8_t *meta, const struct qcow2_bitmap_dir *dir)
{
	uint64_t pos = dir->offset, left = dir->size, cs = 1ULL << im->g.cluster_bits;
	struct qcow2_bitmap_head head;
	struct qcow2_bitmap b;
	enum qcow2_fault f;
	uint32_t i;

	if (dir->offset > conf.meta_sectors * SECTOR || left > conf.meta_sectors * SECTOR - dir->offset)
		return fault("corrupt", "bitmap directory is not there");
	if (!refer(im, dir->offset, (left + cs - 1) >> im->g.cluster_bits, "the bitmap directory"))
		return false;
	for (i = 0; i < dir->count; i++) {
		if (left < sizeof(head))
			return bad_bitmaps(QCOW2_FAULT_BITMAP_CUT);
		memcpy(&head, meta + pos, sizeof(head));
		f = qcow2_bitmap_decode(&head, left, im->g.cluster_bits, &b);
		if (f)
			return bad_bitmaps(f);
		pos += qcow2_bitmap_bytes(&b);
		left -= qcow2_bitmap_bytes(&b);
		if (b.flags & QCOW2_BITMAP_IN_USE)
			return fault("bitmap", "bitmap %u is not valid", i);
		if (!walk_bitmap(im, meta, &b))
			return false;
		if (!qcow2_bitmap_records(&b) && !conf.chain)
			continue;
		if (im->nr_bitmaps == MAX_BITMAPS)
			die("there are too many bitmaps");
		im->bitmaps[im->nr_bitmaps++] = (struct recorded){ b, meta + b.table_offset };
	}
	return true;
}

/* The bitmaps extension, if there is one; the header vouches for it then. */
static bool walk_bitmaps(struct image *im, const uint8_t *meta, const struct qcow2_header *header)
{
	uint64_t pos = be32_to_cpu(header->header_length), end = 1ULL << im->g.cluster_bits;
	struct qcow2_bitmaps_ext data;
	struct qcow2_bitmap_dir dir;
	struct qcow2_extension e;
	enum qcow2_fault f;

	im->nr_bitmaps = 0;
	while (pos + sizeof(e) <= end) {
		memcpy(&e, meta + pos, sizeof(e));
		pos += sizeof(e);
		if (be32_to_cpu(e.type) == QCOW2_EXT_END)
			break;
		if (be32_to_cpu(e.type) == QCOW2_EXT_BITMAPS) {
			memcpy(&data, meta + pos, sizeof(data));
			f = qcow2_bitmaps_ext_check(&data, be32_to_cpu(e.len), im->g.cluster_bits, &dir);
			if (f)
				return bad_bitmaps(f);
			if (!(be64_to_cpu(header->autoclear_features) & QCOW2_AUTOCLEAR_BITMAPS))
				return fault("bitmap", "the header does not vouch for the bitmaps");
			return walk_directory(im, meta, &dir);
		}
		pos += (be32_to_cpu(e.len) + 7ULL) & ~7ULL;
	}
	return true;
}

/* Header, L1 entries, refcounts; counts leaks. */
static bool walk(struct image *im, const uint8_t *meta)
{
	unsigned int between = 0;
	uint64_t bytes = conf.meta_sectors * SECTOR, i, c, off, count, per_block;
	struct qcow2_geometry *g = &im->g;
	struct qcow2_header header;
	enum qcow2_fault f;

	memcpy(&header, meta, sizeof(header));
	f = qcow2_header_check(&header, false, g);
	if (!f)
		f = qcow2_geometry_check(g, bytes);
	if (f)
		return fault("corrupt", "header: %s", qcow2_fault_str(f));
	im->clusters = bytes >> g->cluster_bits;
	if (!im->refs)
		im->refs = zalloc(bytes >> QCOW2_MIN_CLUSTER_BITS, 1);
	memset(im->refs, 0, im->clusters);
	im->leaks = 0;

	count = ((uint64_t)g->l1_entries * 8 + (1ULL << g->cluster_bits) - 1) >> g->cluster_bits;
	if (!refer(im, 0, 1, "the header") || !refer(im, g->l1_offset, count, "the L1 table") ||
	    !refer(im, g->reftable_offset, g->reftable_clusters, "the refcount table"))
		return false;
	for (i = 0; i < g->l1_entries; i++) {
		uint64_t entry = be64_at(meta + g->l1_offset + 8 * i);

		f = qcow2_l1_check(entry, g->cluster_bits, bytes);
		if (f)
			return fault("corrupt", "L1 entry %" PRIu64 ": %s", i, qcow2_fault_str(f));
		if (!(entry & QCOW2_OFFSET_MASK))
			continue;
		if (!(entry & QCOW2_OFLAG_COPIED))
			return fault("corrupt", "L1 entry %" PRIu64 " is not marked as the only one", i);
		if (!refer(im, entry & QCOW2_OFFSET_MASK, 1, "an L2 table"))
			return false;
	}
	if (!walk_bitmaps(im, meta, &header))
		return false;
	count = ((uint64_t)g->reftable_clusters << g->cluster_bits) / 8;
	for (i = 0; i < count; i++) {
		uint64_t entry = be64_at(meta + g->reftable_offset + 8 * i);

		f = qcow2_reftable_check(entry, g->cluster_bits, bytes);
		if (f)
			return fault("corrupt", "refcount table entry %" PRIu64 ": %s", i, qcow2_fault_str(f));
		if ((entry & QCOW2_REFTABLE_OFFSET_MASK) &&
		    !refer(im, entry & QCOW2_REFTABLE_OFFSET_MASK, 1, "a refcount block"))
			return false;
	}
	per_block = (8ULL << g->cluster_bits) >> g->refcount_order;
	for (c = 0; c < im->clusters; c++) {
		uint64_t refcount = 0;

		off = c / per_block < count ? be64_at(meta + g->reftable_offset + 8 * (c / per_block)) : 0;
		if (off)
			refcount = qcow2_refcount_get(meta + off, c % per_block, g->refcount_order);
		if (refcount < im->refs[c])
			return fault("refcount", "cluster %#" PRIx64 " is in use and has refcount 0", c);
		if (refcount > 1 || (refcount && im->refs[c] == 0))
			im->leaks++;
		/* With bitmaps that end, the directory before this one, or the next one */
		if (refcount && !im->refs[c] && used_at_ends && !used_at_ends[c] &&
		    (!conf.chain || between++))
			return fault("leak", "cluster %#" PRIx64 " is not what the load came to use", c);
	}
	return true;
}

typedef bool unit_fn(const struct state *st, uint64_t sector, uint64_t end, enum qcow2_state state);

/* Call a function with the state of each unit. */
static bool each_unit(const struct image *im, const struct state *st, unit_fn *fn)
{
	const struct qcow2_geometry *g = &im->g;
	unsigned int unit_bits = qcow2_unit_bits(g) - 9, subs = g->ext_l2 ? QCOW2_SUBCLUSTERS : 1;
	uint64_t guest = 0, size = g->size / SECTOR, cs = 1ULL << g->cluster_bits, sector, end;
	uint64_t per_table = cs >> qcow2_l2_entry_bits(g), i, k;
	bool good = true;
	unsigned int n;

	for (i = 0; guest < g->size; i++) {
		uint64_t table = be64_at(st->meta + g->l1_offset + 8 * i) & QCOW2_OFFSET_MASK;

		for (k = 0; k < per_table && guest < g->size; k++, guest += cs) {
			const uint8_t *p = st->meta + table + (k << qcow2_l2_entry_bits(g));
			enum qcow2_state state = QCOW2_UNALLOCATED;
			struct qcow2_ext_entry e = {};
			enum qcow2_fault f = QCOW2_OK;

			if (table && g->ext_l2) {
				e = qcow2_ext_entry(be64_at(p), be64_at(p + 8));
				f = qcow2_l2_ext_check(&e, guest, g->cluster_bits);
			} else if (table) {
				f = qcow2_l2_decode(be64_at(p), guest, g->cluster_bits, &state);
			}
			if (f)
				return fault("corrupt", "L2 entry of guest offset %#" PRIx64 ": %s",
					     guest, qcow2_fault_str(f));
			for (n = 0; n < subs; n++) {
				sector = (guest >> 9) + ((uint64_t)n << unit_bits);
				end = sector + (1ULL << unit_bits);
				if (end > size)
					end = size;
				if (g->ext_l2)
					state = qcow2_ext_state(&e, n);
				if (sector < end)
					good &= fn(st, sector, end, state);
			}
		}
	}
	return good;
}

static bool judge_unit(const struct state *st, uint64_t sector, uint64_t end, enum qcow2_state state)
{
	bool good = true;

	for (; sector < end; sector++) {
		enum class c = ZEROS;

		if (state == QCOW2_DATA)
			c = content(st, sector);
		else if (state == QCOW2_UNALLOCATED && sector < conf.backing_sectors)
			c = BACKING;
		good &= judge_sector(sector, c, state);
		/* Who reads the data device alone must not miss anything. */
		if (conf.raw && state != QCOW2_DATA)
			good &= judge_sector(sector, content(st, sector), QCOW2_DATA);
	}
	return good;
}

/*
 * Bitmaps
 */

static bool is_set(const struct state *st, const struct recorded *r, uint64_t bit)
{
	uint64_t bits = 8ULL << now.g.cluster_bits;
	uint64_t entry = be64_at(r->table + bit / bits * 8), off = entry & QCOW2_OFFSET_MASK;

	if (!off)
		return entry & QCOW2_BITMAP_ENTRY_ONES;
	return st->meta[off + bit % bits / 8] >> bit % 8 & 1;
}

/* Is each sector marked that does not read as before the load? */
static bool judge_marks(const struct state *st, uint64_t sector, uint64_t end, enum qcow2_state state)
{
	unsigned int i;

	for (; sector < end; sector++) {
		enum class before = sector < conf.backing_sectors ? BACKING : ZEROS, c = ZEROS;

		if (state == QCOW2_DATA)
			c = content(st, sector);
		else if (state == QCOW2_UNALLOCATED)
			c = before;
		if (c == before && (!conf.raw || content(st, sector) == before))
			continue;
		if (conf.chain) {
			for (i = 0; i < now.nr_bitmaps; i++)
				if (is_set(st, now.bitmaps + i, sector >> (now.bitmaps[i].b.granularity_bits - 9)))
					break;
			if (i == now.nr_bitmaps)
				return fault("unmarked", "sector %" PRIu64 " has changed, and none of %u bitmaps says so",
					     sector, i);
			continue;
		}
		for (i = 0; i < now.nr_bitmaps; i++)
			if (!is_set(st, now.bitmaps + i, sector >> (now.bitmaps[i].b.granularity_bits - 9)))
				return fault("unmarked", "sector %" PRIu64 " has changed, and bitmap %u does not say so",
					     sector, i);
	}
	return true;
}

/*
 * Count bits that are set and that no request is the reason of which has been sent so far, nor
 * one from before the load: not many are, and none if @exact.
 */
static bool judge_excess(const struct state *st, unsigned int n, bool exact)
{
	const struct state before = { .meta = (uint8_t *)meta_before };
	unsigned int i;

	for (i = 0; i < now.nr_bitmaps; i++) {
		struct recorded *r = now.bitmaps + i;
		uint64_t sectors = 1ULL << (r->b.granularity_bits - 9), size = now.g.size / SECTOR;
		uint64_t bits = qcow2_bitmap_bits(now.g.size, r->b.granularity_bits), bit, s, over = 0;

		for (bit = 0; bit < bits; bit++) {
			bool wanted = is_set(&before, r, bit);

			if (wanted && !is_set(st, r, bit))
				return fault("unmarked", "granule %" PRIu64 " of bitmap %u was set before the load",
					     bit, i);
			for (s = bit * sectors; s < (bit + 1) * sectors && s < size && !wanted; s++)
				wanted = asked[s] < entries[n].began;
			if (is_set(st, r, bit) && !wanted)
				over++;
		}
		if (over && (exact || over * 100 > bits * MAX_OVER))
			return fault("excess", "%" PRIu64 " of %" PRIu64 " granules of bitmap %u are set without a reason",
				     over, bits, i);
		if (over * 10000 / bits > sum->max_over)
			sum->max_over = over * 10000 / bits;
	}
	return true;
}

/*
 * Files, for those who judge from outside
 */

static uint8_t *view;

static void data_sector(const struct state *st, uint64_t s, uint8_t *p)
{
	if (st->data[s] > DISCARDED)
		memcpy(p, log_base + (uint64_t)st->data[s] * SECTOR, SECTOR);
	else if (st->data[s] == INITIAL && conf.raw)
		memset(p, 0, SECTOR);
	else
		stamp(p, st->data[s] == INITIAL ? STAMP_POISON : 'D', 0, s, 0);
}

static bool view_unit(const struct state *st, uint64_t sector, uint64_t end, enum qcow2_state state)
{
	for (; sector < end; sector++) {
		uint8_t *p = view + sector * SECTOR;

		if (state == QCOW2_DATA)
			data_sector(st, sector, p);
		else if (state == QCOW2_UNALLOCATED && sector < conf.backing_sectors)
			stamp(p, STAMP_BACKING, 0, sector, 0);
		else
			memset(p, 0, SECTOR);
	}
	return true;
}

static char *work_path(const char *file)
{
	static char paths[16][PATH_MAX];
	static unsigned int next;
	char *p = paths[next++ % 16];

	snprintf(p, PATH_MAX, "%s/%u.%s", work, worker, file);
	return p;
}

static void put_file(const char *file, const void *p, size_t bytes)
{
	int fd = open(work_path(file), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || ftruncate(fd, bytes) || (p && pwrite(fd, p, bytes, 0) != (ssize_t)bytes))
		die("%s: %s", work_path(file), strerror(errno));
	close(fd);
}

/* The exit status of a command; what it says is shown if that is not wanted. */
static int run(char *const argv[], unsigned int wanted)
{
	posix_spawn_file_actions_t actions;
	char text[512];
	int status;
	ssize_t n;
	pid_t pid;
	int fd;

	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 1, work_path("out"), O_RDWR | O_CREAT | O_TRUNC, 0600);
	posix_spawn_file_actions_adddup2(&actions, 1, 2);
	if (posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ))
		die("%s: %s", argv[0], strerror(errno));
	posix_spawn_file_actions_destroy(&actions);
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid: %s", strerror(errno));
	status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
	if (status > 31 || !(wanted & 1U << status)) {
		fd = open(work_path("out"), O_RDONLY | O_CLOEXEC);
		n = read(fd, text, sizeof(text) - 1);
		close(fd);
		text[n < 0 ? 0 : n] = 0;
		if (strchr(text, '\n'))
			*strchr(text, '\n') = 0;
		fault(strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0], "status %d: %s", status, text);
		return -1;
	}
	return status;
}

static char *image_json(bool backing)
{
	static char text[4 * PATH_MAX];
	int n;

	n = snprintf(text, sizeof(text),
		     "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\",\"locking\":\"off\"},"
		     "\"data-file\":{\"driver\":\"file\",\"filename\":\"%s\",\"locking\":\"off\"},\"backing\":",
		     work_path("meta"), work_path("data"));
	if (backing)
		n += snprintf(text + n, sizeof(text) - n,
			      "{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"%s\",\"locking\":\"off\"}}}",
			      work_path("backing"));
	else
		snprintf(text + n, sizeof(text) - n, "null}");
	return text;
}

static bool seen_before(const uint8_t *meta)
{
	static uint64_t seen[1 << 20];
	uint64_t hash = 1, w, i;

	for (i = 0; i < conf.meta_sectors * STAMP_WORDS; i++) {
		memcpy(&w, meta + 8 * i, 8);
		hash = (hash ^ w) * 0x9fb21c651e98df25ULL;
		hash ^= hash >> 28;
	}
	for (i = hash;; i++) {
		i %= sizeof(seen) / sizeof(*seen);
		if (seen[i] == hash)
			return true;
		if (!seen[i])
			break;
	}
	seen[i] = hash;
	return false;
}

/* Do others find the image as sound as we do? */
static bool check_outside(const struct state *st)
{
	char *qemu[] = { "qemu-img", "check", "-q", "-U", image_json(false), NULL };
	char *ours[] = { (char *)tool, "check", work_path("meta"), NULL };
	int status, status2;

	count(&sum->checks);
	put_file("meta", st->meta, conf.meta_sectors * SECTOR);
	status = run(qemu, 1 << 0 | 1 << 3);
	status2 = run(ours, 1 << 0 | 1 << 3);
	if (status < 0 || status2 < 0)
		return false;
	if (!status != !now.leaks || !status2 != !now.leaks)
		return fault("leaks", "%" PRIu64 " clusters; qemu-img's status is %d, qcow2setup's %d",
			     now.leaks, status, status2);
	return true;
}

static void make_view(const struct state *st)
{
	if (!view)
		view = zalloc(conf.data_sectors, SECTOR);
	each_unit(&now, st, view_unit);
	put_file("view", view, now.g.size);
}

/* Does QEMU read the same from the image as we do? */
static bool compare_outside(const struct state *st)
{
	char *argv[] = { "qemu-img", "compare", "-U", "-F", "raw", NULL, work_path("view"), NULL };
	uint8_t *data;
	uint64_t s;

	count(&sum->compares);
	make_view(st);
	put_file("meta", st->meta, conf.meta_sectors * SECTOR);
	data = zalloc(conf.data_sectors, SECTOR);
	for (s = 0; s < conf.data_sectors; s++)
		data_sector(st, s, data + s * SECTOR);
	put_file("data", data, conf.data_sectors * SECTOR);
	if (conf.backing_sectors) {
		for (s = 0; s < conf.backing_sectors; s++)
			stamp(data + s * SECTOR, STAMP_BACKING, 0, s, 0);
		put_file("backing", data, conf.backing_sectors * SECTOR);
	}
	free(data);
	argv[5] = image_json(conf.backing_sectors);
	return run(argv, 1 << 0) == 0;
}

static bool judge_by_command(const struct state *st)
{
	char number[16];
	char *argv[] = { (char *)command, work_path("view"), number, NULL };

	count(&sum->commands);
	make_view(st);
	snprintf(number, sizeof(number), "%d", last_sync);
	return run(argv, 1 << 0) == 0;
}

static bool mine(unsigned long *kind)
{
	if (counter++ % (jobs * share) != worker * share)
		return false;
	count(&sum->states);
	count(kind);
	rng = mix(seed * 1000003 + counter);
	return true;
}

/* Judge a state. */
static void judge(const struct state *st, unsigned int n, const char *what, bool important)
{
	snprintf(name, sizeof(name), "entry %u, %s", n, what);
	if (!walk(&now, st->meta))
		return;
	if (now.leaks > sum->max_leaks)
		sum->max_leaks = now.leaks;
	if (now.g.size / SECTOR < size_must) {
		fault("size", "%" PRIu64 " sectors, of %" PRIu64, (uint64_t)now.g.size / SECTOR, size_must);
		return;
	}
	if (conf.seed && !each_unit(&now, st, judge_unit))
		return;
	if (now.nr_bitmaps &&
	    (!each_unit(&now, st, judge_marks) ||
	     (!conf.chain && !judge_excess(st, n, conf.closed && n + 1 == nr_entries && !strcmp(what, "all writes")))))
		return;
	if (check_share && (important || !below(check_share)) &&
	    !seen_before(st->meta) && !check_outside(st))
		return;
	if (compare_share && !below(compare_share) && !compare_outside(st))
		return;
	if (command && last_sync >= 0 && !below(important ? 1 + command_share / 8 : command_share))
		judge_by_command(st);
}

/*
 * States
 */

static void apply(struct state *st, unsigned int n, uint64_t i)
{
	const struct entry *e = entries + n;
	uint64_t s = e->sector + i;

	if (!e->meta)
		st->data[s] = e->flags & LOG_DISCARD ? DISCARDED : e->content + i;
	else if (e->flags & LOG_DISCARD)
		stamp(st->meta + s * SECTOR, 'D', 0, s, 0);
	else
		memcpy(st->meta + s * SECTOR, log_base + (e->content + i) * SECTOR, SECTOR);
}

static bool overtaken(unsigned int n, uint64_t i)
{
	return base_order[entries[n].meta][entries[n].sector + i] > n + 1;
}

static void settle(unsigned int n)
{
	const struct entry *e = entries + n;
	uint64_t i;

	for (i = 0; i < e->nr; i++) {
		if (overtaken(n, i))
			continue;
		apply(&base, n, i);
		base_order[e->meta][e->sector + i] = n + 1;
	}
}

static void settle_device(bool meta)
{
	struct list *l = pending + meta;
	unsigned int i;

	for (i = 0; i < l->nr; i++)
		settle(l->entry[i]);
	l->nr = 0;
}

/* Take a part of a write, or of many. */
static void take(unsigned int n, unsigned int percent)
{
	const struct entry *e = entries + n;
	uint64_t i, from = 0, to = e->nr, mask = ~0ULL;

	if (below(100) >= percent)
		return;
	if (e->nr > 1 && !below(3)) {
		switch (below(3)) {
		case 0:
			to = 1 + below(e->nr);
			break;
		case 1:
			from = below(e->nr);
			break;
		default:
			mask = mix(rng);
			break;
		}
	}
	for (i = from; i < to; i++)
		if ((mask >> i % 64 & 1) && !overtaken(n, i))
			apply(&draft, n, i);
}

static void draw(unsigned int n)
{
	unsigned int percent[2], i, lost[2] = { UINT_MAX, UINT_MAX };
	unsigned int way = below(6);
	int meta;

	memcpy(draft.meta, base.meta, conf.meta_sectors * SECTOR);
	memcpy(draft.data, base.data, conf.data_sectors * sizeof(*draft.data));
	switch (way) {
	case 0:		/* one device has everything, the other nothing */
		percent[0] = below(2) * 100;
		percent[1] = 100 - percent[0];
		break;
	case 1:		/* everything but one write of each */
		percent[0] = percent[1] = 100;
		for (i = 0; i < 2; i++)
			if (pending[i].nr)
				lost[i] = below(pending[i].nr);
		break;
	case 2:		/* one device has everything, the other a few */
		i = below(2);
		percent[i] = 100;
		percent[!i] = 20;
		break;
	default:
		percent[0] = 10 + below(90);
		percent[1] = 10 + below(90);
	}
	for (meta = 0; meta < 2; meta++)
		for (i = 0; i < pending[meta].nr; i++)
			if (i != lost[meta])
				take(pending[meta].entry[i], percent[meta]);
	judge(&draft, n, "some writes", false);
}

static void init_state(struct state *st)
{
	st->meta = zalloc(conf.meta_sectors, SECTOR);
	memcpy(st->meta, meta_before, conf.meta_sectors * SECTOR);
	st->data = zalloc(conf.data_sectors, sizeof(*st->data));
}

/* Which clusters are used before the load, or after it?  Others never leak. */
static void look_at_ends(void)
{
	uint8_t *used = zalloc(conf.meta_sectors, 1);
	struct state st;
	unsigned int n;
	uint64_t i;

	init_state(&st);
	for (n = 0; n <= nr_entries; n++) {
		if (!n || n == nr_entries) {
			snprintf(name, sizeof(name), n ? "after the load" : "before the load");
			if (!walk(&now, st.meta))
				break;
			for (i = 0; i < now.clusters; i++)
				used[i] |= now.refs[i];
			if (now.leaks && (!n || conf.closed))
				fault("leak", "%" PRIu64 " clusters", now.leaks);
		}
		if (n < nr_entries && entries[n].meta)
			for (i = 0; i < entries[n].nr; i++)
				apply(&st, n, i);
	}
	used_at_ends = used;
	free(st.meta);
	free(st.data);
}

static void replay(void)
{
	unsigned int n, k, unit;
	uint64_t i;

	put_file("data", NULL, conf.data_sectors * SECTOR);
	unit = 1U << (qcow2_unit_bits(&now.g) - 9);
	for (n = 0; n < nr_entries; n++) {
		const struct entry *e = entries + n;

		follow_requests(e, unit);
		if (!(e->flags & LOG_MARK)) {
			for (i = 0; i < e->nr; i++)
				apply(&written, n, i);
			if (e->flags & LOG_FUA)
				settle(n);
			else if (e->nr)
				pending[e->meta].entry[pending[e->meta].nr++] = n;
			if (e->flags & LOG_FLUSH) {
				if (e->owner != 'd')
					settle_device(true);
				if (e->owner != 'm')
					settle_device(false);
			}
		}
		if (mine(&sum->prefixes))
			judge(&written, n, "all writes", e->flags & (LOG_FLUSH | LOG_FUA | LOG_MARK));
		if ((e->flags & (LOG_FLUSH | LOG_FUA | LOG_MARK)) && mine(&sum->minimal))
			judge(&base, n, "flushed writes", true);
		for (k = 0; k < subsets && (pending[0].nr || pending[1].nr); k++)
			if (mine(&sum->subsets))
				draw(n);
	}
}

static void usage(void)
{
	fprintf(stderr, "usage: " NAME " [OPTION]... FOLDER WORK_FOLDER\n"
		"  -s SEED     of the choices (default 1)\n"
		"  -n NUMBER   random choices after each entry of the log (default 2)\n"
		"  -x SHARE    judge one in SHARE of all states (default 1: all)\n"
		"  -j JOBS     processes (default 1)\n"
		"  -k SHARE    let one in SHARE of the random choices be checked by qemu-img and\n"
		"              qcow2setup (default 1: all; 0: nothing is)\n"
		"  -m SHARE    let qemu-img compare one in SHARE of all states (default 100; 0: none)\n"
		"  -c COMMAND  judges content: called with the guest's view, a file, and the number\n"
		"              of the last mark s<NUMBER>\n"
		"  -e SHARE    let the command judge one in SHARE of the random choices, and eight\n"
		"              times as many of the others (default 8)\n"
		"  -t TOOL     qcow2setup\n"
		"Exit status: 0, 1 if a state was faulty, 2 if the recording cannot be used.\n");
	exit(2);
}

int main(int argc, char **argv)
{
	uint64_t bytes, s;
	int c, status;
	unsigned int i;
	bool good = true;
	pid_t *pids;

	while ((c = getopt(argc, argv, "s:n:x:j:k:m:c:e:t:")) >= 0) {
		switch (c) {
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 'n':
			subsets = atoi(optarg);
			break;
		case 'x':
			share = atoi(optarg);
			break;
		case 'j':
			jobs = atoi(optarg);
			break;
		case 'k':
			check_share = atoi(optarg);
			break;
		case 'm':
			compare_share = atoi(optarg);
			break;
		case 'c':
			command = optarg;
			break;
		case 'e':
			command_share = atoi(optarg);
			break;
		case 't':
			tool = optarg;
			break;
		default:
			usage();
		}
	}
	if (argc - optind != 2 || !jobs || !share || !command_share)
		usage();
	folder = argv[optind];
	work = argv[optind + 1];
	sum = mmap(NULL, sizeof(*sum), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (sum == MAP_FAILED)
		die("no memory");

	read_conf();
	read_journal();
	read_log();
	meta_before = map_file("meta", &bytes);
	if (bytes != conf.meta_sectors * SECTOR)
		die("%s/meta has not the size of the metadata device", folder);
	init_state(&written);
	init_state(&base);
	init_state(&draft);
	for (i = 0; i < 2; i++) {
		base_order[i] = zalloc(i ? conf.meta_sectors : conf.data_sectors, sizeof(**base_order));
		pending[i].entry = zalloc(nr_entries, sizeof(*pending[i].entry));
	}
	must = zalloc(conf.data_sectors, sizeof(*must));
	zero_version = zalloc(conf.data_sectors, sizeof(*zero_version));
	for (s = 0; s < conf.backing_sectors && s < conf.data_sectors; s++)
		zero_version[s] = -1;
	asked = zalloc(conf.data_sectors, sizeof(*asked));
	memset(asked, 0xff, conf.data_sectors * sizeof(*asked));
	for (i = nr_requests; i-- > 0;)
		for (s = requests[i].sector; s < requests[i].sector + requests[i].nr; s++)
			asked[s] = requests[i].submitted;
	look_at_ends();
	if (!now.clusters)
		die("%s: the image was not sound before the load", folder);

	pids = zalloc(jobs, sizeof(*pids));
	fflush(stdout);
	for (i = 0; i < jobs; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			die("fork: %s", strerror(errno));
		if (!pids[i]) {
			worker = i;
			replay();
			exit(0);
		}
	}
	for (i = 0; i < jobs; i++)
		good &= waitpid(pids[i], &status, 0) == pids[i] && !status;
	if (!good)
		die("a worker did not come to its end");
	printf("# %s: %u requests, %u entries in the log, %lu states (%lu with all writes so far, %lu with only\n"
	       "#   what was flushed, %lu with some of the others), %lu different metadata checked, %lu compared,\n"
	       "#   %lu judged by content command; at most %lu clusters leaked; %lu faults\n",
	       folder, nr_requests, nr_entries, sum->states, sum->prefixes, sum->minimal, sum->subsets,
	       sum->checks, sum->compares, sum->commands, sum->max_leaks, sum->failures);
	if (now.nr_bitmaps)
		printf("#   of the granules of a bitmap at most %lu.%02lu percent were set without a reason, none at the end\n",
		       sum->max_over / 100, sum->max_over % 100);
	printf("states %lu faults %lu\n", sum->states, sum->failures);
	return sum->failures ? 1 : 0;
}
