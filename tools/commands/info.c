// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup info: what an image is.  Opens the image and nothing else, takes
 * no lock, follows no path.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/image.h"
#include "lib/json.h"
#include "lib/util.h"
#include "system/users.h"

/* What can be done with an image, and what stands against more. */
struct verdict {
	struct reasons rw, ro;
	const char *mappable;		/* "read-write", "read-only", "no" */
	const char *now;		/* the same while others have it open */
	const char *bitmap_fault;	/* the directory is malformed */
	struct bitmaps bitmaps;		/* what is known of those that are valid */
	bool vouched;			/* the header says that there are valid ones */
	struct users users;
};

/* So much of bitmaps is read; what somebody has made up can be far more. */
#define MOST_BITMAP_BYTES	(1024 * MIB)

/* The bitmaps that the header vouches for, if that is not too much to be read. */
static void find_bitmaps(struct image *img, struct verdict *v)
{
	uint64_t bytes = 0;
	size_t i;

	v->bitmaps = (struct bitmaps){ .img = img };
	v->vouched = image_has_bitmaps(img);
	if (v->ro.n || v->bitmap_fault)
		return;
	if (bitmaps_load(&v->bitmaps, img)) {
		bitmaps_free(&v->bitmaps);
		return;
	}
	for (i = 0; i < v->bitmaps.n; i++)
		bytes += (uint64_t)v->bitmaps.item[i].head.table_size <<
			 img->h.cluster_bits;
	if (bytes > MOST_BITMAP_BYTES)
		bitmaps_free(&v->bitmaps);
}

/* How much is dirty, of one that is in the directory at @at; false: not known. */
static bool count(const struct verdict *v, uint64_t at, uint64_t *bytes,
		  const char **why)
{
	size_t from = 0, to = v->bitmaps.n;

	*why = v->vouched ? NULL : "not valid";
	while (from < to) {
		size_t mid = from + (to - from) / 2;
		const struct bitmap_item *b = &v->bitmaps.item[mid];

		if (b->at == at)
			return bitmaps_count(&v->bitmaps, b, bytes, why);
		if (b->at < at)
			from = mid + 1;
		else
			to = mid;
	}
	return false;
}

static void judge(struct image *img, struct verdict *v)
{
	v->bitmap_fault = NULL;
	image_load_bitmaps(img, &v->bitmap_fault);
	image_reasons(img, true, &v->ro);
	image_reasons(img, false, &v->rw);
	if (v->bitmap_fault && image_has_bitmaps(img) &&
	    v->rw.n < MAX_REASONS) {
		snprintf(v->rw.r[v->rw.n].cause, sizeof(v->rw.r[0].cause),
			 "%s", v->bitmap_fault);
		snprintf(v->rw.r[v->rw.n].remedy, sizeof(v->rw.r[0].remedy),
			 "remove the bitmaps: qcow2setup check --repair bitmaps %s, or use --readonly",
			 shell_quote(img->node.path));
		v->rw.n++;
	}
	find_bitmaps(img, v);
	if (!v->rw.n)
		v->mappable = "read-write";
	else if (!v->ro.n)
		v->mappable = "read-only";
	else
		v->mappable = "no";

	users_find(&img->node, &v->users);
	if (!v->rw.n && users_let_write(&v->users))
		v->now = "read-write";
	else if (!v->ro.n && users_let_read(&v->users))
		v->now = "read-only";
	else
		v->now = "no";
}

/* As QEMU names it; a type that it does not know is a number. */
static const char *compression(const struct header *h)
{
	switch (h->compression_type) {
	case 0:
		return "zlib";
	case 1:
		return "zstd";
	default:
		return "unknown";
	}
}

static const char *encryption(const struct header *h)
{
	switch (h->crypt_method) {
	case 1:
		return "aes";
	case 2:
		return "luks";
	default:
		return "unknown";
	}
}

static int json_bitmap(const struct bitmap *b, void *arg)
{
	struct json *j = arg;

	json_object(j, NULL);
	json_array(j, "flags");
	if (b->head.flags & QCOW2_BITMAP_IN_USE)
		json_string(j, NULL, "in-use");
	if (b->head.flags & QCOW2_BITMAP_AUTO)
		json_string(j, NULL, "auto");
	json_array_end(j);
	json_stringn(j, "name", b->name.s, b->name.len);
	json_number(j, "granularity", 1ULL << b->head.granularity_bits);
	json_object_end(j);
	return 0;
}

/* As the action bitmap lists them */
static void json_counts(struct json *j, const struct verdict *v)
{
	const struct bitmap_item *b;
	const char *why;
	uint64_t bytes;

	json_array(j, "bitmaps");
	for (b = v->bitmaps.item; b < v->bitmaps.item + v->bitmaps.n; b++) {
		json_object(j, NULL);
		json_stringn(j, "name", b->name, b->head.name_size);
		if (count(v, b->at, &bytes, &why))
			json_number(j, "count", bytes);
		json_bool(j, "inconsistent", bitmap_inconsistent(b));
		json_object_end(j);
	}
	json_array_end(j);
}

static void json_reasons(struct json *j, const struct reasons *r)
{
	unsigned int i;

	json_array(j, "reasons");
	for (i = 0; i < r->n; i++) {
		json_object(j, NULL);
		json_string(j, "cause", r->r[i].cause);
		json_string(j, "remedy", r->r[i].remedy);
		json_object_end(j);
	}
	json_array_end(j);
}

static void print_json(const struct image *img, const struct verdict *v)
{
	const struct header *h = &img->h;
	bool data_file = h->incompatible & QCOW2_INCOMPAT_DATA_FILE;
	const char *why;
	struct json j;

	json_start(&j, stdout);
	json_object(&j, NULL);
	json_number(&j, "virtual-size", h->size & ~511ULL);
	json_string(&j, "filename", img->node.path);
	json_number(&j, "cluster-size", 1ULL << h->cluster_bits);
	json_string(&j, "format", "qcow2");
	json_number(&j, "actual-size", img->node.disk_usage);
	if (h->crypt_method)
		json_bool(&j, "encrypted", true);
	if (h->backing_file.s)
		json_stringn(&j, "backing-filename", h->backing_file.s,
			     h->backing_file.len);
	if (h->backing_format.s)
		json_stringn(&j, "backing-filename-format",
			     h->backing_format.s, h->backing_format.len);
	json_object(&j, "format-specific");
	json_string(&j, "type", "qcow2");
	json_object(&j, "data");
	json_string(&j, "compat", h->version == 2 ? "0.10" : "1.1");
	json_string(&j, "compression-type", compression(h));
	if (h->version == 3)
		json_bool(&j, "lazy-refcounts",
			  h->compatible & QCOW2_COMPAT_LAZY_REFCOUNTS);
	if (img->bitmap_dir) {
		json_array(&j, "bitmaps");
		bitmaps_parse(img->bitmap_dir, h->bitmap_dir_size,
			      h->bitmap_count, h->cluster_bits, json_bitmap,
			      &j, &why);
		json_array_end(&j);
	}
	json_number(&j, "refcount-bits", 1ULL << (h->refcount_order & 63));
	if (data_file && h->data_file.s)
		json_stringn(&j, "data-file", h->data_file.s,
			     h->data_file.len);
	if (data_file)
		json_bool(&j, "data-file-raw",
			  h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA);
	if (h->version == 3) {
		json_bool(&j, "corrupt",
			  h->incompatible & QCOW2_INCOMPAT_CORRUPT);
		json_bool(&j, "extended-l2",
			  h->incompatible & QCOW2_INCOMPAT_EXT_L2);
	}
	if (h->crypt_method) {
		json_object(&j, "encrypt");
		json_string(&j, "format", encryption(h));
		json_object_end(&j);
	}
	json_object_end(&j);
	json_object_end(&j);
	json_bool(&j, "dirty-flag", h->incompatible & QCOW2_INCOMPAT_DIRTY);
	/* ours */
	json_object(&j, "dm-qcow2");
	json_version(&j);
	json_string(&j, "mappable", v->mappable);
	json_reasons(&j, &v->rw);
	json_string(&j, "mappable-now", v->now);
	json_bool(&j, "locked", v->users.locked_write);
	users_json(&j, &v->users);
	json_counts(&j, v);
	json_object_end(&j);
	json_object_end(&j);
	json_end(&j);
}

static void print_span(const char *what, const struct span *s)
{
	if (!s->s)
		return;
	printf("%s: ", what);
	put_escaped(stdout, s->s, s->len);
	putchar('\n');
}

static void print_flag(const char *what, uint64_t flag)
{
	printf("%s: %s\n", what, flag ? "yes" : "no");
}

static int print_bitmap(const struct bitmap *b, void *arg)
{
	const struct verdict *v = arg;
	uint64_t bytes;
	const char *why;

	printf("bitmap: ");
	put_escaped(stdout, b->name.s, b->name.len);
	printf(" (granularity %llu%s%s", 1ULL << b->head.granularity_bits,
	       b->head.flags & QCOW2_BITMAP_AUTO ? ", auto" : "",
	       b->head.flags & QCOW2_BITMAP_IN_USE ? ", in use" : "");
	if (count(v, b->at, &bytes, &why))
		printf(", %" PRIu64 " bytes dirty", bytes);
	else if (why)
		printf(", %s", why);
	puts(")");
	return 0;
}

/* Who has it */
static void print_users(const struct users *users)
{
	unsigned int i;

	for (i = 0; i < users->n; i++)
		printf("  in use: %s\n", user_phrase(&users->u[i]));
	if (users->more)
		printf("  in use: and %u more\n", users->more);
	if (!users->n && users->locked_write)
		printf("  in use: QEMU's locks are held by a process that is not seen from here%s\n",
		       geteuid() ? "; run as root to see more" :
		       "; look on the other machines or in the containers that share the file");
}

static void print_text(const struct image *img, const struct verdict *v)
{
	const struct header *h = &img->h;
	/* QEMU works in whole sectors, and so do we. */
	uint64_t size = h->size & ~511ULL;
	const char *why;
	unsigned int i;

	printf("image: ");
	put_escaped(stdout, img->node.path, strlen(img->node.path));
	printf("\nformat: qcow2 version %u\n", h->version);
	printf("virtual size: %s (%" PRIu64 " bytes)\n",
	       human_size(size), size);
	if (img->node.bdev)
		printf("device size: %s (%" PRIu64 " bytes)\n",
		       human_size(img->node.size), img->node.size);
	else
		printf("disk usage: %s\n", human_size(img->node.disk_usage));
	printf("cluster size: %s\n", human_size(1ULL << h->cluster_bits));
	printf("refcount bits: %llu\n", 1ULL << (h->refcount_order & 63));
	print_span("backing file", &h->backing_file);
	print_span("backing format", &h->backing_format);
	if (h->incompatible & QCOW2_INCOMPAT_DATA_FILE) {
		if (h->data_file.s)
			print_span("data file", &h->data_file);
		else
			puts("data file: none recorded");
		print_flag("data file raw",
			   h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA);
	}
	if (h->crypt_method)
		printf("encryption: %s\n", encryption(h));
	if (h->incompatible & QCOW2_INCOMPAT_COMPRESSION)
		printf("compression: %s\n", compression(h));
	if (h->snapshots)
		printf("internal snapshots: %u\n", h->snapshots);
	if (h->incompatible & QCOW2_INCOMPAT_EXT_L2)
		puts("extended L2 entries: yes");
	if (h->incompatible & QCOW2_INCOMPAT_DIRTY)
		puts("dirty: yes");
	if (h->incompatible & QCOW2_INCOMPAT_CORRUPT)
		puts("corrupt: yes");
	if (img->bitmap_dir)
		bitmaps_parse(img->bitmap_dir, h->bitmap_dir_size,
			      h->bitmap_count, h->cluster_bits, print_bitmap,
			      (void *)v, &why);
	if (h->unknown_extensions)
		printf("unknown header extensions: %u\n",
		       h->unknown_extensions);
	printf("can be opened: %s%s\n", v->mappable,
	       !strcmp(v->now, v->mappable) ? "" : !strcmp(v->now, "no") ?
	       ", but not now: it is in use" :
	       ", but now only read-only: it is in use");
	for (i = 0; i < v->rw.n; i++)
		printf("  %s; %s\n", v->rw.r[i].cause, v->rw.r[i].remedy);
	print_users(&v->users);
}

int cmd_info(const struct options *opt, char **args)
{
	struct verdict v;
	struct image img;
	int ret;

	ret = image_open(&img, AT_FDCWD, args[0], NODE_READ_ONLY);
	if (!ret) {
		judge(&img, &v);
		if (opt->json)
			print_json(&img, &v);
		else
			print_text(&img, &v);
		bitmaps_free(&v.bitmaps);
	}
	image_close(&img);
	return ret;
}
