// SPDX-License-Identifier: GPL-2.0-or-later
/* Why an image cannot be mapped, and what can be done about it. */
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "image/tables.h"
#include "lib/util.h"

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
