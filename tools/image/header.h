/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Header and header extensions of a qcow2 image: bytes in, structure or fault
 * out.  Pure code (no I/O, nothing kept), since it reads what others wrote:
 * this is what the unit tests and fuzzers aim at.
 *
 * Any version 2 or 3 image is parsed, also those that cannot be mapped, so that
 * `info` can say what they are.  Whether an image can be mapped is decided in
 * reasons.c.
 */
#ifndef QCOW2SETUP_HEADER_H
#define QCOW2SETUP_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../driver/format.h"

enum header_fault {
	HEADER_OK = 0,
	HEADER_SHORT,
	HEADER_MAGIC,
	HEADER_VERSION,
	HEADER_CLUSTER_BITS,
	HEADER_LENGTH,
	HEADER_BACKING_OFFSET,
	HEADER_BACKING_NAME,
	HEADER_BACKING_NUL,
	HEADER_EXT_CUT,
	HEADER_EXT_LEN,
	HEADER_EXT_TWICE,
	HEADER_FORMAT_LEN,
	HEADER_FORMAT_NUL,
	HEADER_FEATURES_LEN,
	HEADER_DATA_FILE_LEN,
	HEADER_DATA_FILE_NUL,
	HEADER_LUKS_LEN,
	HEADER_BITMAPS_LEN,
	HEADER_BITMAPS_RESERVED,
	HEADER_BITMAPS_COUNT,
	HEADER_BITMAPS_DIR_SIZE,
	HEADER_BITMAPS_DIR_OFFSET,
	HEADER_FAULT_LAST
};

const char *header_fault_str(enum header_fault fault);

/* A string inside the buffer that was parsed; not NUL-terminated. */
struct span {
	const char *s;		/* NULL: not there */
	size_t len;
};

/* An extension of ours that says nothing: to move another one into one sector. */
#define HEADER_EXT_PADDING	0x70616464U	/* "padd" */

/*
 * Of ours, too: which files clone has made, by their numbers in their folder, so that
 * neither a copy nor a moved file is taken for one.
 */
#define HEADER_EXT_CLONE	0x636c6f6eU	/* "clon" */

struct header_clone {
	__be64 image_ino, data_ino;
};

struct header {
	struct qcow2_header raw;	/* as on disk; v2: the rest is zero */
	uint32_t version;
	uint32_t header_length;		/* v2: 72 */
	uint32_t cluster_bits;
	uint32_t refcount_order;	/* v2: 4 */
	uint32_t crypt_method;
	uint32_t snapshots;
	uint64_t size;			/* not rounded */
	uint64_t incompatible, compatible, autoclear;
	uint8_t compression_type;

	struct span backing_file;
	struct span backing_format;
	struct span data_file;
	struct span features;		/* the feature name table */
	bool has_bitmaps;
	uint32_t bitmap_count;
	uint64_t bitmap_dir_size, bitmap_dir_offset;
	bool clone;
	uint64_t clone_image, clone_data;	/* then: inodes; see HEADER_EXT_CLONE */
	unsigned int unknown_extensions;
};

/**
 * header_parse() - take the first cluster of an image apart
 * @buf: start of the image
 * @len: bytes in @buf; at least a cluster, if the image has that much
 * @h: filled in; spans point into @buf
 *
 * After HEADER_SHORT..HEADER_LENGTH @h holds nothing of use.
 */
enum header_fault header_parse(const void *buf, size_t len, struct header *h);

/*
 * Name of feature @bit of @type (0 incompatible, 1 compatible, 2 autoclear) in
 * the image's own feature name table, or an empty span.
 */
struct span header_feature_name(const struct header *h, unsigned int type,
				unsigned int bit);

struct bitmap {
	struct qcow2_bitmap head;
	struct span name;
	size_t at;			/* where in the directory its entry is, bytes */
};

/* Called for each bitmap; a result other than 0 ends the walk. */
typedef int bitmap_fn(const struct bitmap *b, void *arg);

/**
 * bitmaps_parse() - walk a bitmap directory
 * @dir: its bytes; the spans given to @fn point into it
 * @len: bitmap_dir_size of the header
 * @count: bitmap_count of the header
 * @cluster_bits: of the image
 * @fn: called once for each bitmap, may be NULL
 * @arg: passed to @fn
 * @why: set to what is wrong
 *
 * Returns 0, the result of @fn, or -1 with @why set.  Nothing is known about
 * entries that follow a wrong one, so look before you change anything: walk
 * once with @fn NULL.
 */
int bitmaps_parse(const void *dir, size_t len, uint32_t count,
		  unsigned int cluster_bits, bitmap_fn *fn, void *arg,
		  const char **why);

#endif
