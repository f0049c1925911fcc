// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/image.h"
#include "image/plan.h"
#include "lib/util.h"

#define SECTOR	512


/* One change, or (len 0) a point at which all before was made durable. */
struct undo {
	struct undo *next;
	bool failed;		/* it did not work, or not for certain */
	uint64_t off;
	size_t len;
	uint8_t old[];
};

static uint64_t cluster_size(const struct image *img)
{
	return 1ULL << img->h.cluster_bits;
}

/*
 * Bytes of the first cluster, by what its beginning says; less if that is all there
 * is.  What is behind need not be readable.
 */
static size_t first_len(const struct node *node, uint64_t size)
{
	unsigned int bits = 0;
	struct qcow2_header raw;

	if (size >= sizeof(raw) && !node_read(node, &raw, sizeof(raw), 0) &&
	    be32_to_cpu(raw.magic) == QCOW2_MAGIC)
		bits = be32_to_cpu(raw.cluster_bits);
	if (bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
		bits = QCOW2_MIN_CLUSTER_BITS;
	return min_u64(size, 1ULL << bits);
}

int image_attach(struct image *img, const struct node *node)
{
	enum header_fault fault;
	struct stat st;
	size_t len;
	int ret;

	*img = (struct image){ .node = *node, .space.fd = -1 };
	/* It may have grown between the time it was opened, and locked. */
	if (!node->bdev) {
		if (fstat(node->fd, &st))
			return fail_errno("%s: cannot stat it", esc(node->path));
		img->node.size = st.st_size;
		img->space.fd = node->fd;
		img->space.path = node->path;
	}
	len = first_len(node, img->node.size);
	/* never empty, so that NULL always means out of memory */
	img->first = malloc(len + 1);
	if (!img->first)
		return fail_nomem();
	ret = node_read(node, img->first, len, 0);
	if (ret) {
		errno = -ret;
		return fail_errno("%s: cannot read the header", esc(node->path));
	}
	fault = header_parse(img->first, len, &img->h);
	if (fault == HEADER_OK)
		return 0;
	if (fault == HEADER_MAGIC)
		return fail(EX_WRONG,
			    "%s: not a qcow2 image; check the name, or if it is a raw disk, make an image for it: qcow2setup create NEW --data-file %s --data-file-raw",
			    esc(node->path), shell_quote(node->path));
	/* The format before qcow2 has the same magic. */
	if (fault == HEADER_VERSION && img->h.version == 1)
		return fail(EX_WRONG,
			    "%s: a qcow image of version 1; make a qcow2 image of it: qemu-img convert -f qcow -O qcow2 -o data_file=FILE %s NEW",
			    esc(node->path), shell_quote(node->path));
	if (fault == HEADER_VERSION)
		return fail(EX_WRONG,
			    "%s: qcow2 version %u is not known; use the program that made it, or a newer qcow2setup",
			    esc(node->path), img->h.version);
	return fail(EX_WRONG, "%s: malformed image: %s; restore it from a backup",
		    esc(node->path), header_fault_str(fault));
}

int image_open(struct image *img, int dirfd, const char *path,
	       unsigned int node_flags)
{
	struct node node;
	int ret;

	*img = (struct image)IMAGE_CLOSED;
	ret = node_open(&node, dirfd, path, node_flags);
	if (ret) {
		node_close(&node);
		return ret;
	}
	return image_attach(img, &node);
}

int image_virtual_size(const struct node *node, uint64_t *size)
{
	struct image img;
	int ret = image_attach(&img, node);

	*size = img.h.size;
	img.node.fd = -1;
	image_close(&img);
	return ret;
}

void image_close(struct image *img)
{
	while (img->undo) {
		struct undo *u = img->undo;

		img->undo = u->next;
		free(u);
	}
	free(img->first);
	free(img->l1);
	free(img->reftable);
	free(img->bitmap_dir);
	space_free(&img->space);
	node_close(&img->node);
	*img = (struct image)IMAGE_CLOSED;
}

static void add_reason(struct reasons *r, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));
static void add_remedy(struct reasons *r, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static void add_reason(struct reasons *r, const char *fmt, ...)
{
	va_list ap;

	if (r->n < MAX_REASONS) {
		va_start(ap, fmt);
		vsnprintf(r->r[r->n].cause, sizeof(r->r[0].cause), fmt, ap);
		va_end(ap);
	}
	r->n++;
}

/* What can be done about the reason that was added last */
static void add_remedy(struct reasons *r, const char *fmt, ...)
{
	va_list ap;

	if (r->n <= MAX_REASONS) {
		va_start(ap, fmt);
		vsnprintf(r->r[r->n - 1].remedy, sizeof(r->r[0].remedy), fmt,
			  ap);
		va_end(ap);
	} else {
		r->n = MAX_REASONS;
	}
}

/* Name the features that are not known, as the image itself calls them. */
static void add_unknown_features(struct reasons *r, const struct header *h)
{
	uint64_t unknown = h->incompatible & ~QCOW2_INCOMPAT_KNOWN;
	char list[512];
	size_t n = 0;
	int bit;

	for (bit = 0; bit < 64 && n < 400; bit++) {
		struct span name;

		if (!(unknown & 1ULL << bit))
			continue;
		name = header_feature_name(h, 0, bit);
		n += snprintf(list + n, sizeof(list) - n, "%sbit %d",
			      n ? ", " : "", bit);
		if (name.len && n < 400)
			n += snprintf(list + n, sizeof(list) - n, " (%.60s)",
				      escn(name.s, name.len));
	}
	add_reason(r, "unknown incompatible features: %s", list);
	add_remedy(r, "use the program that made it, or a newer qcow2setup");
}

/* The backing file as it is found from here: the name starts in the image's folder. */
static void backing_path(char *out, size_t size, const struct image *img)
{
	const struct span *name = &img->h.backing_file;
	const char *slash = strrchr(img->node.path, '/');
	int dir = slash && *name->s != '/' ? slash + 1 - img->node.path : 0;

	snprintf(out, size, "%.*s%.*s", dir, img->node.path, (int)name->len,
		 name->s);
}

/* A format that is not recorded would have to be guessed, which is unsafe. */
static void add_backing_reasons(struct reasons *r, const struct image *img)
{
	const struct span *f = &img->h.backing_format;
	const struct span *name = &img->h.backing_file;
	const char *path = img->node.path;
	char backing[PATH_MAX];

	if (!f->s) {
		add_reason(r, "the format of the backing file is not recorded, and is not guessed");
		add_remedy(r, "record it: qemu-img rebase -u -F raw -b %s --image-opts %s (or -F qcow2)",
			   shell_word(name->s, name->len),
			   qemu_image_opts(path, QEMU_NO_DATA));
	} else if (!(f->len == 3 && !memcmp(f->s, "raw", 3)) &&
		   !(f->len == 5 && !memcmp(f->s, "qcow2", 5))) {
		backing_path(backing, sizeof(backing), img);
		add_reason(r, "the backing file is of format %s",
			   escn(f->s, f->len));
		add_remedy(r, "convert it, and record that: qemu-img convert -f %s -O raw %s NEW && qemu-img rebase -u -F raw -b NEW --image-opts %s (NEW with its full name)",
			   shell_word(f->s, f->len), shell_quote(backing),
			   qemu_image_opts(path, QEMU_NO_DATA));
	}
}

static void add_fault(struct reasons *r, const struct image *img,
		      enum qcow2_fault fault)
{
	const char *path = shell_quote(img->node.path);

	add_reason(r, "%s", qcow2_fault_str(fault));
	switch (fault) {
	case QCOW2_FAULT_L1_BEYOND:
	case QCOW2_FAULT_REFTABLE_BEYOND:
		add_remedy(r, "the file is truncated: restore it from a backup");
		break;
	case QCOW2_FAULT_SIZE_ZERO:
		add_remedy(r, "enlarge it with qemu-img resize -f qcow2 %s SIZE",
			   path);
		break;
	case QCOW2_FAULT_REFTABLE_NONE:
	case QCOW2_FAULT_REFTABLE_HEADER:
		add_remedy(r, "repair it with qcow2setup check --repair all %s",
			   path);
		break;
	default:
		add_remedy(r, "restore it from a backup");
		break;
	}
}

/* For what only another image can be made of */
static void add_convert(struct reasons *r, const struct image *img)
{
	add_remedy(r, "make an image that can be mapped: " QEMU_CONVERT,
		   shell_quote(img->node.path));
}

void image_reasons(struct image *img, bool read_only, struct reasons *r)
{
	const char *path = img->node.path;
	const struct header *h = &img->h;
	enum qcow2_fault fault;

	r->n = 0;
	if (h->version != 3) {
		add_reason(r, "image is of qcow2 version %u, external data files need version 3",
			   h->version);
		add_convert(r, img);
	}
	if (h->incompatible & ~QCOW2_INCOMPAT_KNOWN)
		add_unknown_features(r, h);
	if (h->crypt_method) {
		add_reason(r, "image is encrypted");
		add_remedy(r, "decrypt it with qemu-img convert --object secret,id=s,file=PASSPHRASE -O qcow2 -o data_file=FILE --image-opts %s NEW",
			   qemu_image_opts(path, ",encrypt.key-secret=s"));
	}
	if (h->version == 3 && !(h->incompatible & QCOW2_INCOMPAT_DATA_FILE)) {
		add_reason(r, "image has no external data file");
		add_convert(r, img);
	}
	if (h->snapshots) {
		add_reason(r, "image has %u internal snapshots", h->snapshots);
		add_remedy(r, "convert it, which leaves them behind: " QEMU_CONVERT,
			   shell_quote(path));
	}
	if (h->backing_file.s && h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA) {
		add_reason(r, "%s", qcow2_fault_str(QCOW2_FAULT_RAW_BACKING));
		add_convert(r, img);
	} else if (h->backing_file.s) {
		add_backing_reasons(r, img);
	}
	if (!read_only && h->incompatible & QCOW2_INCOMPAT_CORRUPT) {
		add_reason(r, "%s", qcow2_fault_str(QCOW2_FAULT_CORRUPT));
		add_remedy(r, OR_READONLY("find and repair the fault with qcow2setup check --repair all %s"),
			   shell_quote(path));
	}
	if (!read_only && h->incompatible & QCOW2_INCOMPAT_DIRTY) {
		add_reason(r, "%s", qcow2_fault_str(QCOW2_FAULT_DIRTY));
		add_remedy(r, OR_READONLY("repair it with qcow2setup check --repair all %s"),
			   shell_quote(path));
	}
	if (r->n)
		return;

	/* The judgement that the kernel will repeat. */
	fault = qcow2_header_check(&h->raw, read_only, &img->geo);
	if (!fault)
		fault = qcow2_geometry_check(&img->geo, img->node.size);
	if (fault) {
		add_fault(r, img, fault);
		return;
	}
	if (img->node.bdev &&
	    img->node.block_size > min_u64(cluster_size(img), 4 * KIB)) {
		add_reason(r, "the device's blocks of %u bytes are larger than what is written of clusters of %llu bytes",
			   img->node.block_size,
			   (unsigned long long)cluster_size(img));
		add_remedy(r, "put the image on a device with smaller blocks, or in a file (dd bs=1M if=%s of=FILE)",
			   shell_quote(path));
	}
}

/* Where a metadata cluster is that a table names. */
struct claim {
	uint64_t off;
	bool l2;		/* else a refcount block */
	uint32_t index;
};

static int claim_cmp(const void *a, const void *b)
{
	const struct claim *x = a, *y = b;

	return x->off < y->off ? -1 : x->off > y->off;
}

/* Report an impossible entry; refuse it only if the image will be written. */
static int bad_entry(const struct image *img, bool strict, bool l2,
		     uint32_t index, uint64_t entry, const char *what)
{
	const char *table = l2 ? "L1" : "refcount table";
	const char *path = img->node.path;

	if (strict && l2)
		return fail(EX_WRONG,
			    OR_READONLY("%s: corrupt image: L1 entry %u (0x%llx): %s; see what qcow2setup check says, and restore it from a backup"),
			    esc(path), index, (unsigned long long)entry, what);
	if (strict)
		return fail(EX_WRONG,
			    OR_READONLY("%s: corrupt image: refcount table entry %u (0x%llx): %s; repair it with qcow2setup check --repair all %s"),
			    esc(path), index, (unsigned long long)entry, what,
			    shell_quote(path));
	warning("%s: corrupt image: %s entry %u (0x%llx): %s",
		esc(img->node.path), table, index, (unsigned long long)entry,
		what);
	return 0;
}

static uint32_t reftable_entries(const struct image *img)
{
	return (uint64_t)img->geo.reftable_clusters << (img->geo.cluster_bits - 3);
}

/* Check all entries of both tables; see image_load_tables(). */
static int check_tables(const struct image *img, bool strict)
{
	const struct qcow2_geometry *g = &img->geo;
	uint32_t entries = reftable_entries(img), i;
	struct claim *claims;
	enum qcow2_fault fault;
	size_t n = 0, k;
	int ret = 0, warned = 0;

	claims = calloc((size_t)g->l1_entries + entries + 1, sizeof(*claims));
	if (!claims)
		return fail_nomem();
	for (i = 0; i < g->l1_entries + entries; i++) {
		bool l2 = i < g->l1_entries;
		uint32_t index = l2 ? i : i - g->l1_entries;
		uint64_t entry = be64_to_cpu(l2 ? img->l1[index] :
					     img->reftable[index]);
		uint64_t off = entry & QCOW2_OFFSET_MASK;

		fault = l2 ? qcow2_l1_check(entry, g->cluster_bits,
					    img->node.size) :
			     qcow2_reftable_check(entry, g->cluster_bits,
						  img->node.size);
		if (!fault && off && qcow2_in_fixed_area(&img->geo, off))
			fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (!fault && off) {
			claims[n].off = off;
			claims[n].l2 = l2;
			claims[n++].index = index;
		}
		if (!fault)
			continue;
		ret = bad_entry(img, strict, l2, index, entry,
				qcow2_fault_str(fault));
		if (ret || ++warned == 8)
			goto out;
	}
	qsort(claims, n, sizeof(*claims), claim_cmp);
	for (k = 1; k < n; k++) {
		if (claims[k].off != claims[k - 1].off)
			continue;
		ret = bad_entry(img, strict, claims[k].l2,
				claims[k].index, claims[k].off,
				qcow2_fault_str(QCOW2_FAULT_ENTRY_OVERLAP));
		if (ret || ++warned == 8)
			goto out;
	}
out:
	free(claims);
	return ret;
}

int image_load_tables(struct image *img, bool strict)
{
	const struct qcow2_geometry *g = &img->geo;
	size_t l1_bytes = (size_t)g->l1_entries * 8;
	size_t rt_bytes = (size_t)g->reftable_clusters << g->cluster_bits;
	int ret;

	free(img->l1);
	free(img->reftable);
	img->l1 = malloc(l1_bytes + 1);
	img->reftable = malloc(rt_bytes);
	if (!img->l1 || !img->reftable)
		return fail_nomem();
	ret = node_read(&img->node, img->l1, l1_bytes, g->l1_offset);
	if (!ret)
		ret = node_read(&img->node, img->reftable, rt_bytes,
			      g->reftable_offset);
	if (ret) {
		errno = -ret;
		return fail_errno("%s: cannot read its tables",
				  esc(img->node.path));
	}
	return check_tables(img, strict);
}

bool image_has_bitmaps(const struct image *img)
{
	return img->h.has_bitmaps &&
	       img->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS;
}

/*
 * The tables of all bitmaps are read as often as the image is opened, and each of
 * their entries is remembered by a check.  So much of them is 512 GiB of bitmaps,
 * with clusters of 64 KiB.
 */
#define MAX_BITMAP_TABLES	(64ULL << 20)

/* For image_load_bitmaps(): tables lie in the file, and are not too many. */
struct table_sum {
	const struct image *img;
	uint64_t bytes;
	const char *why;
};

static int add_table(const struct bitmap *b, void *arg)
{
	struct table_sum *sum = arg;
	uint64_t bytes = (uint64_t)b->head.table_size * 8;

	sum->bytes += bytes;
	if (sum->bytes > MAX_BITMAP_TABLES) {
		sum->why = "bitmap tables have more than 64 MiB";
		return -1;
	}
	if (b->head.table_offset > sum->img->node.size ||
	    bytes > sum->img->node.size - b->head.table_offset) {
		sum->why = "bitmap table lies beyond the end of the metadata";
		return -1;
	}
	return 0;
}

int image_load_bitmaps(struct image *img, const char **why)
{
	struct table_sum sum = { .img = img };
	uint64_t len = img->h.bitmap_dir_size;

	*why = NULL;
	free(img->bitmap_dir);
	img->bitmap_dir = NULL;
	if (!img->h.has_bitmaps)
		return 0;
	if (img->h.bitmap_dir_offset > img->node.size ||
	    len > img->node.size - img->h.bitmap_dir_offset) {
		*why = "bitmap directory lies beyond the end of the metadata";
		return EX_WRONG;
	}
	img->bitmap_dir = malloc(len);
	if (!img->bitmap_dir) {
		*why = "out of memory";
		return EX_MEMORY;
	}
	if (node_read(&img->node, img->bitmap_dir, len,
		    img->h.bitmap_dir_offset)) {
		*why = "bitmap directory cannot be read";
		return EX_WRONG;
	}
	if (bitmaps_parse(img->bitmap_dir, len, img->h.bitmap_count,
			  img->h.cluster_bits, add_table, &sum, why)) {
		if (!*why)
			*why = sum.why;
		free(img->bitmap_dir);
		img->bitmap_dir = NULL;
		return EX_WRONG;
	}
	return 0;
}

static int read_failed(const struct image *img, int err)
{
	errno = -err;
	return fail_errno("%s: cannot read its metadata", esc(img->node.path));
}

/* For bitmap_end(): where the last cluster ends that a bitmap uses. */
struct bitmap_end {
	const struct image *img;
	uint64_t end, bytes, bitmaps;
	int err;
	bool beyond;		/* it would lie behind the end of the file */
};

/* So many bitmaps are not asked what they are good for. */
#define USUAL_BITMAPS	64

/* What a bitmap takes if all of it is in use. */
static uint64_t bitmap_bytes(const struct image *img, const struct bitmap *b)
{
	uint64_t cs = cluster_size(img);
	uint64_t data = qcow2_bitmap_entries(img->h.size,
					     b->head.granularity_bits,
					     img->h.cluster_bits);

	return (data + div_up(data * 8, cs)) * cs;
}

static int bitmap_end(const struct bitmap *b, void *arg)
{
	struct bitmap_end *e = arg;
	uint64_t off = b->head.table_offset, left = (uint64_t)b->head.table_size * 8;
	__be64 chunk[512];
	size_t i, n;

	e->end = max_u64(e->end, off + left);
	if (e->bitmaps++ < USUAL_BITMAPS)
		e->bytes += bitmap_bytes(e->img, b);
	for (; left; left -= n, off += n) {
		n = min_u64(left, sizeof(chunk));
		e->err = node_read(&e->img->node, chunk, n, off);
		if (e->err)
			return 1;
		for (i = 0; i < n / 8; i++) {
			uint64_t at = be64_to_cpu(chunk[i]) & QCOW2_OFFSET_MASK;

			if (at >= e->img->node.size) {
				e->beyond = true;
				return 1;
			}
			if (at)
				e->end = max_u64(e->end,
						 at + cluster_size(e->img));
		}
	}
	return 0;
}

static int referenced_by_bitmaps(struct image *img, uint64_t *end)
{
	struct bitmap_end b = { .img = img };
	const char *why;
	int ret;

	ret = image_load_bitmaps(img, &why);
	if (!ret)
		bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
			      img->h.bitmap_count, img->h.cluster_bits,
			      bitmap_end, &b, &why);
	if (b.beyond) {
		why = "bitmap refers to clusters beyond the end of the metadata";
		ret = EX_WRONG;
	}
	if (b.err)
		return read_failed(img, b.err);
	if (ret == EX_MEMORY)
		return fail_nomem();
	/* Bitmaps that the header does not vouch for may be anything. */
	if (ret && !image_has_bitmaps(img))
		return 0;
	if (ret)
		return fail(ret,
			    OR_READONLY("%s: %s; remove the bitmaps: qcow2setup check --repair bitmaps %s"),
			    esc(img->node.path), why,
			    shell_quote(img->node.path));
	*end = max_u64(*end, img->h.bitmap_dir_offset + img->h.bitmap_dir_size);
	*end = max_u64(*end, b.end);
	img->bitmap_bytes = b.bytes;
	return 0;
}

/* End of everything that something in the image refers to. */
static int referenced_end(struct image *img, uint64_t *end)
{
	const struct qcow2_geometry *g = &img->geo;
	uint64_t cs = cluster_size(img), max = cs;
	uint32_t i;
	int ret;

	img->bitmap_bytes = 0;
	max = max_u64(max, g->l1_offset + (uint64_t)g->l1_entries * 8);
	max = max_u64(max, g->reftable_offset +
			   ((uint64_t)g->reftable_clusters << g->cluster_bits));
	for (i = 0; i < g->l1_entries; i++) {
		uint64_t off = be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK;

		if (off)
			max = max_u64(max, off + cs);
	}
	for (i = 0; i < reftable_entries(img); i++) {
		uint64_t off = be64_to_cpu(img->reftable[i]) &
			       QCOW2_OFFSET_MASK;

		if (off)
			max = max_u64(max, off + cs);
	}
	if (img->h.has_bitmaps) {
		ret = referenced_by_bitmaps(img, &max);
		if (ret)
			return ret;
	}
	*end = max;
	return 0;
}

/* Last entry that is not 0 in the first @n of @block, plus one; 0: none. */
static uint64_t refcounts_used(const uint8_t *block, uint64_t n,
			       unsigned int order)
{
	while (n) {
		/* whole zero bytes at once where entries are that small */
		if (order < 3 && !(n & ((8U >> order) - 1)) &&
		    !block[((n << order) >> 3) - 1]) {
			n -= 8U >> order;
			continue;
		}
		if (qcow2_refcount_get(block, n - 1, order))
			break;
		n--;
	}
	return n;
}

/*
 * Read the refcount block that entry @i of @table names; *off is where it is,
 * or 0 if it names none: then @block is not touched.
 */
static int read_refblock(const struct image *img, const __be64 *table,
			 uint64_t i, uint8_t *block, uint64_t *off)
{
	int ret;

	*off = be64_to_cpu(table[i]) & QCOW2_REFTABLE_OFFSET_MASK;
	if (!*off)
		return 0;
	ret = node_read(&img->node, block, cluster_size(img), *off);
	return ret ? read_failed(img, ret) : 0;
}

/* First cluster from which on all refcounts below cluster @limit are 0. */
static int counted_end(const struct image *img, uint64_t limit, uint64_t *end)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint64_t i = min_u64(div_up(limit, per_block), reftable_entries(img));
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	*end = 0;
	if (!block)
		return fail_nomem();
	while (i--) {
		uint64_t off, n;

		ret = read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off)
			continue;
		n = refcounts_used(block, min_u64(per_block,
						  limit - i * per_block),
				   img->geo.refcount_order);
		if (n) {
			*end = i * per_block + n;
			break;
		}
	}
	free(block);
	return ret;
}

/* How many clusters in [@from, @to) have a refcount that is not 0? */
static int count_used(const struct image *img, uint64_t from, uint64_t to,
		      uint64_t *used)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint8_t *block = malloc(cluster_size(img));
	uint64_t i, c;
	int ret = 0;

	*used = 0;
	if (!block)
		return fail_nomem();
	for (i = from / per_block; i < reftable_entries(img) &&
	     i * per_block < to; i++) {
		uint64_t off;

		ret = read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off)
			continue;
		for (c = max_u64(from, i * per_block);
		     c < min_u64(to, (i + 1) * per_block); c++)
			if (qcow2_refcount_get(block, c - i * per_block,
					       img->geo.refcount_order))
				++*used;
	}
	free(block);
	return ret;
}

int image_end(struct image *img, uint64_t *end)
{
	uint64_t cs = cluster_size(img), counted;
	int ret;

	ret = referenced_end(img, end);
	if (ret)
		return ret;
	/* Refcounts behind the end of the file count nothing that is there. */
	ret = counted_end(img, div_up(img->node.size, cs), &counted);
	if (ret)
		return ret;
	*end = max_u64(align_up(*end, cs), counted * cs);
	return 0;
}

/*
 * Changes, and their undoing
 */

static int undo_add(struct image *img, uint64_t off, size_t len)
{
	struct undo *u = malloc(sizeof(*u) + len);

	if (!u)
		return fail_nomem();
	u->off = off;
	u->len = len;
	u->failed = false;
	if (len && node_read(&img->node, u->old, len, off)) {
		free(u);
		return fail(EX_WRONG, "%s: cannot read its metadata: %s",
			    esc(img->node.path), strerror(EIO));
	}
	if (img->changing) {
		int ret = img->changing(img, off, u->old, len);

		if (ret) {
			free(u);
			return ret;
		}
	}
	u->next = img->undo;
	img->undo = u;
	return 0;
}

static int write_failed(const struct image *img, int err)
{
	errno = err;
	return fail_errno("%s: cannot write its metadata", esc(img->node.path));
}

int image_change(struct image *img, const void *buf, size_t len, uint64_t off)
{
	int ret = undo_add(img, off, len);

	if (ret)
		return ret;
	ret = write_at(img->node.fd, buf, len, off);
	if (!ret)
		return 0;
	img->undo->failed = true;
	return write_failed(img, -ret);
}

int image_sync(struct image *img)
{
	int ret = undo_add(img, 0, 0);

	if (ret)
		return ret;
	if (fsync(img->node.fd)) {
		img->undo->failed = true;
		return write_failed(img, errno);
	}
	node_drop_cache(&img->node);
	return 0;
}

void image_undo(struct image *img)
{
	bool failed = false, stuck = false;
	int ret = 0;

	if (img->node.fd < 0)
		return;
	while (img->undo) {
		struct undo *u = img->undo;

		/*
		 * Backwards through the same steps: as crash-safe as forward, if
		 * each comes when the one before it is known to be done.
		 */
		if (stuck)
			;
		else if (u->len)
			ret = write_at(img->node.fd, u->old, u->len, u->off);
		else
			ret = fsync(img->node.fd);
		/* What has failed before may do so again: it was the last step. */
		if (ret) {
			failed = true;
			stuck = !u->failed;
		}
		img->undo = u->next;
		free(u);
	}
	if (!img->node.read_only && fsync(img->node.fd))
		failed = true;
	if (!stuck && img->space.taken) {
		node_drop_cache(&img->node);
		if (space_give_back(&img->space) ||
		    (img->resized && img->resized(img)))
			failed = true;
		if (!img->node.bdev)
			img->node.size = img->space.length;
	}
	if (failed)
		warning("%s: could not be put back as it was: %s; check it with qcow2setup check %s",
			esc(img->node.path), strerror(errno),
			shell_quote(img->node.path));
}

/* All header fields that change lie in the first sector: one atomic write. */
int image_change_header(struct image *img)
{
	int ret;

	memcpy(img->first, &img->h.raw,
	       min_u64(img->h.header_length, sizeof(img->h.raw)));
	ret = image_change(img, img->first, SECTOR, 0);
	return ret ? ret : image_sync(img);
}

/* Set the refcounts of clusters [@from, @to) that @block counts. */
static void set_refcounts(uint8_t *block, uint64_t first, uint64_t per_block,
			  uint64_t from, uint64_t to, unsigned int order)
{
	uint64_t c = max_u64(from, first);

	for (; c < min_u64(to, first + per_block); c++)
		qcow2_refcount_set(block, c - first, order, 1);
}

/*
 * A block may be counted by one that follows it, so that the last ones come first;
 * a sector is written as a whole.
 */
int image_name_refblocks(struct image *img, uint64_t from, uint64_t to,
			 const __be64 *table)
{
	const uint64_t per_sector = SECTOR / 8;
	uint64_t first;
	int ret = 0;

	while (!ret && to > from) {
		first = max_u64(from, (to - 1) / per_sector * per_sector);
		if (memcmp(table + first - from, img->reftable + first,
			   (to - first) * 8)) {
			memcpy(img->reftable + first, table + first - from,
			       (to - first) * 8);
			ret = image_change(img, img->reftable + first,
					   (to - first) * 8,
					   img->geo.reftable_offset + first * 8);
			if (!ret)
				ret = image_sync(img);
		}
		to = first;
	}
	return ret;
}

/* Take one from the refcounts of @n clusters from cluster @from on. */
int image_put_clusters(struct image *img, uint64_t from, uint64_t n)
{
	uint64_t per_block = refcounts_per_block(&img->geo), c = from;
	unsigned int order = img->geo.refcount_order;
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	if (!block)
		return fail_nomem();
	img->put_end = max_u64(img->put_end, from + n);
	while (!ret && c < from + n) {
		uint64_t i = c / per_block;
		uint64_t to = min_u64(from + n, (i + 1) * per_block);
		uint64_t off = 0;

		if (i < reftable_entries(img))
			ret = read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off) {
			c = to;
			continue;
		}
		for (; c < to; c++) {
			uint64_t v = qcow2_refcount_get(block, c - i * per_block,
							order);

			if (v)
				qcow2_refcount_set(block, c - i * per_block,
						   order, v - 1);
		}
		ret = image_change(img, block, cluster_size(img), off);
	}
	free(block);
	return ret ? ret : image_sync(img);
}

/*
 * Give the image a refcount table of @clusters clusters, at cluster @at, with
 * the refcount blocks that are needed to count it and themselves behind it.
 *
 * A crash before the header is switched leaves clusters that are counted but
 * not used, one after it a table that is: nothing that qemu-img check would
 * call more than a leak.
 */
static int grow_reftable(struct image *img, uint64_t at, uint32_t clusters)
{
	struct qcow2_geometry *g = &img->geo;
	uint64_t per_block = refcounts_per_block(g), cs = cluster_size(img);
	uint64_t old_at = g->reftable_offset / cs, old = g->reftable_clusters;
	uint64_t next = at + clusters, end = next, last, i;
	uint64_t entries = clusters * blocks_per_reftable_cluster(g);
	uint8_t *block = malloc(cs);
	__be64 *table = calloc(clusters, cs);
	int ret = 0;

	if (!block || !table) {
		ret = fail_nomem();
		goto out;
	}
	memcpy(table, img->reftable, old * cs);

	/* [at, end) is what is new; blocks for it may need more blocks. */
	do {
		last = end;
		end = next;
		for (i = at / per_block; i <= (last - 1) / per_block; i++)
			if (i < entries && !table[i])
				end++;
	} while (end != last);
	if ((end - 1) / per_block >= entries) {
		ret = fail(EX_WRONG,
			   "%s: no refcount table could reach the end of the file; make another image: " QEMU_CONVERT,
			   esc(img->node.path), shell_quote(img->node.path));
		goto out;
	}

	for (i = at / per_block; i <= (end - 1) / per_block; i++) {
		uint64_t off;

		ret = read_refblock(img, table, i, block, &off);
		if (ret)
			goto out;
		if (!off) {
			memset(block, 0, cs);
			off = next++ * cs;
			table[i] = cpu_to_be64(off);
		}
		set_refcounts(block, i * per_block, per_block, at, end,
			      g->refcount_order);
		ret = image_change(img, block, cs, off);
		if (ret)
			goto out;
	}
	ret = image_change(img, table, clusters * cs, at * cs);
	if (!ret)
		ret = image_sync(img);
	if (ret)
		goto out;

	img->h.raw.refcount_table_offset = cpu_to_be64(at * cs);
	img->h.raw.refcount_table_clusters = cpu_to_be32(clusters);
	ret = image_change_header(img);
	if (ret)
		goto out;
	free(img->reftable);
	img->reftable = table;
	table = NULL;
	g->reftable_offset = at * cs;
	g->reftable_clusters = clusters;

	ret = image_put_clusters(img, old_at, old);
out:
	free(block);
	free(table);
	return ret;
}

/*
 * So much, and not more, can be meant for the metadata of an image of @size bytes:
 * twice what a new one could need.  The rest is for old tables that are larger
 * than that, and for clusters that crashes have leaked.
 */
static uint64_t most_space(const struct image *img, uint64_t size)
{
	struct qcow2_geometry geo = img->geo;
	struct plan_new p;

	geo.size = size;
	plan_new(&geo, true, &p);
	return 2 * (p.worst_case * cluster_size(img) + img->bitmap_bytes) +
	       64 * MIB;
}

/*
 * Make the file longer, or the one behind the device, and all of it real: up to
 * @need bytes, or to its end.  Who made the image said where its clusters lie: he
 * must not be able to take more of the file system than such an image needs.
 */
static int take_space(struct image *img, uint64_t need, uint64_t virtual_size)
{
	uint64_t size = max_u64(align_up(img->node.size, cluster_size(img)),
				need);
	uint64_t real = SPACE_SPARSE, most;
	int ret;

	if (img->space_kind == IMAGE_REAL) {
		most = most_space(img, virtual_size);
		if (need > most)
			return fail(EX_WRONG,
				    "%s: metadata is spread over %s, far more than an image of %s can need, and all of that would have to take space; free what is leaked (qcow2setup check --repair leaks %s), or use --sparse",
				    esc(img->node.path), human_size(need),
				    human_size(virtual_size),
				    shell_quote(img->node.path));
		/* What is longer than it can need was made so by somebody. */
		real = size > most ? need : size;
	} else if (img->space_kind == IMAGE_SPARSE && !img->space.said) {
		img->space.said = true;
		warning("%s: stays sparse: when its file system is full, writes that need more metadata fail",
			esc(img->space.path));
	}
	ret = space_take(&img->space, size, real);
	if (ret || size == img->node.size)
		return ret;
	if (!img->resized)
		img->node.size = size;
	else
		ret = img->resized(img);
	if (!ret && img->node.size < size)
		ret = fail(EX_WRONG,
			   "%s: device has %llu bytes, less than the %llu that are needed; enlarge the device",
			   esc(img->node.path),
			   (unsigned long long)img->node.size,
			   (unsigned long long)size);
	if (!ret)
		note("%s: extended to %s", esc(img->node.path),
		     human_size(size));
	return ret;
}

/* A device that cannot get longer has only so much room. */
static int check_limit(const struct image *img, const struct room *room,
		       const struct plan *plan, uint64_t limit)
{
	uint64_t need = plan->clusters * cluster_size(img);

	if (plan->clusters <= limit)
		return 0;
	if (room->required)
		return fail(EX_WRONG,
			    "%s: device has %llu bytes, the metadata of an image of %s can need %llu; enlarge the device",
			    esc(img->node.path),
			    (unsigned long long)img->node.size,
			    human_size(room->size), (unsigned long long)need);
	warning("%s: device of %s may become too small for the metadata, which can need %s: enlarge it, or allocating writes can fail",
		esc(img->node.path), human_size(img->node.size),
		human_size(need));
	return 0;
}

/* Clusters below cluster @to that the kernel takes before it takes others. */
static int count_holes(const struct image *img, uint64_t to, uint64_t *holes)
{
	uint64_t reach = reftable_entries(img) * refcounts_per_block(&img->geo);
	uint64_t used;
	int ret;

	to = min_u64(to, reach);
	ret = count_used(img, 0, to, &used);
	*holes = ret ? 0 : to - used;
	return ret;
}

/* First cluster behind all that is in use, or that image_undo() would need again. */
static int end_cluster(struct image *img, uint64_t *end)
{
	int ret = image_end(img, end);

	*end = max_u64(*end / cluster_size(img), img->put_end);
	return ret;
}

/* L2 tables that an image of that geometry can come to need. */
static uint64_t missing_tables(const struct image *img,
			       const struct qcow2_geometry *g)
{
	uint32_t needed = qcow2_l1_entries_needed(g), i;
	uint64_t n = 0;

	for (i = 0; i < needed; i++)
		if (i >= img->geo.l1_entries ||
		    !(be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK))
			n++;
	return n;
}

/*
 * A plan within @limit clusters, and one without a limit.  *@at is where what is
 * built goes to.
 */
static int make_plan(struct image *img, const struct room *room,
		     uint64_t limit, uint64_t *at, struct plan *plan,
		     struct plan *unlimited)
{
	uint64_t max = UINT64_MAX / cluster_size(img), leaked = 0, found;
	struct qcow2_geometry geo = img->geo;
	uint64_t rest, holes, end;
	int ret, tries;

	geo.size = room->size;
	rest = missing_tables(img, &geo) - room->tables;
	ret = end_cluster(img, at);
	if (room->from)
		*at = room->from;
	if (!ret)
		ret = count_holes(img, *at, &holes);
	if (ret)
		return ret;
	rest -= min_u64(rest, holes);
	end = *at + room->more + room->tables;

	/*
	 * A crash can leave refcounts of clusters that the file never got;
	 * they will not be handed out, so the file must be longer for it.
	 */
	for (tries = 0; tries < 8; tries++) {
		*plan = plan_worst_case(&geo, img->reftable, end, leaked,
					rest, limit);
		ret = count_used(img, *at, plan->clusters, &found);
		if (ret)
			return ret;
		if (found <= leaked)
			break;
		leaked = found;
	}
	*unlimited = plan_worst_case(&geo, img->reftable, end, leaked, rest,
				     max);
	/* A larger table must itself find room, with its blocks. */
	if (limit < max && plan->reftable_clusters &&
	    end + 2 * plan->reftable_clusters + 2 > limit)
		plan->reftable_clusters = 0;
	return 0;
}

static uint64_t room_limit(const struct image *img)
{
	uint64_t cs = cluster_size(img);

	return img->space.fd < 0 ? img->node.size / cs : UINT64_MAX / cs;
}

int image_plan_room(struct image *img, const struct room *room,
		    uint64_t *reftable_clusters, bool *fits)
{
	struct plan plan, unlimited;
	uint64_t at;
	int ret;

	ret = make_plan(img, room, room_limit(img), &at, &plan, &unlimited);
	*reftable_clusters = plan.reftable_clusters;
	*fits = unlimited.clusters <= room_limit(img);
	return ret;
}

int image_take_room(struct image *img, const struct room *room, uint64_t *at,
		    uint64_t *reftable_clusters)
{
	struct plan plan, unlimited;
	int ret;

	ret = make_plan(img, room, room_limit(img), at, &plan, &unlimited);
	if (ret)
		return ret;
	*reftable_clusters = plan.reftable_clusters;
	if (!plan.addressable && room->required)
		return fail(EX_WRONG,
			    "%s: no refcount table could count the metadata of an image of %s; make one with larger clusters of it: " QEMU_CONVERT,
			    esc(img->node.path), human_size(room->size),
			    shell_quote(img->node.path));
	if (!plan.addressable && !room->quiet)
		warning("%s: no refcount table could count all the metadata that the image may need: allocating writes can fail",
			esc(img->node.path));
	if (img->space.fd < 0)
		return check_limit(img, room, &unlimited, room_limit(img));
	return take_space(img, plan.clusters * cluster_size(img), room->size);
}

int image_make_room(struct image *img, const struct room *room)
{
	uint64_t at, clusters;
	int ret;

	ret = image_take_room(img, room, &at, &clusters);
	if (ret || !clusters)
		return ret;
	note("%s: refcount table grows from %u to %llu clusters",
	     esc(img->node.path), img->geo.reftable_clusters,
	     (unsigned long long)clusters);
	return grow_reftable(img, at, clusters);
}

/* Clusters that the kernel can fail to write, and then takes others instead. */
#define MOST_SKIPPED	64

int image_live_end(struct image *img, uint64_t *end)
{
	uint64_t cs = cluster_size(img), device = img->node.size / cs;
	struct plan plan;
	int ret;

	ret = end_cluster(img, end);
	if (ret)
		return ret;
	plan = plan_worst_case(&img->geo, img->reftable, *end, 0,
			       missing_tables(img, &img->geo) + MOST_SKIPPED,
			       UINT64_MAX / cs);
	*end = align_up(min_u64(plan.clusters, device) * cs,
			max_u64(sysconf(_SC_PAGESIZE), cs)) / cs;
	return 0;
}

int image_clear_autoclear(struct image *img)
{
	uint64_t keep = QCOW2_AUTOCLEAR_KNOWN;

	if (!img->h.has_bitmaps && img->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS) {
		/* QEMU would corrupt the image later, so do not leave it. */
		warning("%s: header speaks of bitmaps that are not there: its bit is cleared",
			esc(img->node.path));
		keep &= ~QCOW2_AUTOCLEAR_BITMAPS;
	}
	if (!(img->h.autoclear & ~keep))
		return 0;
	img->h.autoclear &= keep;
	img->h.raw.autoclear_features = cpu_to_be64(img->h.autoclear);
	return image_change_header(img);
}

int image_trim(struct image *img, uint64_t *cut)
{
	struct reasons reasons;
	uint64_t end;
	int ret;

	*cut = 0;
	if (img->node.bdev)
		return 0;
	image_reasons(img, false, &reasons);
	if (reasons.n) {
		note("%s: not trimmed: %s", esc(img->node.path),
		     reasons.r[0].cause);
		return 0;
	}
	ret = image_load_tables(img, true);
	if (!ret)
		ret = image_end(img, &end);
	if (ret || end >= img->node.size)
		return ret;
	if (ftruncate(img->node.fd, end) || fsync(img->node.fd))
		return fail_errno("%s: cannot cut off its unused end",
				  esc(img->node.path));
	*cut = img->node.size - end;
	img->node.size = end;
	return 0;
}
