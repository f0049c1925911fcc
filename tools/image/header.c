// SPDX-License-Identifier: GPL-2.0-or-later
#include <string.h>

#include "image/header.h"

#define HEADER_V2_LENGTH	72
#define FEATURE_ENTRY_BYTES	48
#define FEATURE_NAME_BYTES	46

static uint16_t get16(const uint8_t *p)
{
	return p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static uint64_t get64(const uint8_t *p)
{
	return (uint64_t)get32(p) << 32 | get32(p + 4);
}

const char *header_fault_str(enum header_fault fault)
{
	switch (fault) {
	case HEADER_OK:
		return "no fault";
	case HEADER_SHORT:
		return "file is too short for a qcow2 header";
	case HEADER_MAGIC:
		return "not a qcow2 image";
	case HEADER_VERSION:
		return "unknown qcow2 version";
	case HEADER_CLUSTER_BITS:
		return "cluster_bits is not in 9..21";
	case HEADER_LENGTH:
		return "header_length is less than 104, no multiple of 8 or longer than a cluster";
	case HEADER_BACKING_OFFSET:
		return "backing file name lies outside the header cluster";
	case HEADER_BACKING_NAME:
		return "backing file name is longer than 1023 bytes";
	case HEADER_BACKING_NUL:
		return "backing file name contains a NUL byte";
	case HEADER_EXT_CUT:
		return "header extensions end in the middle of an extension";
	case HEADER_EXT_LEN:
		return "header extension is longer than the room for it";
	case HEADER_EXT_TWICE:
		return "header extension appears twice";
	case HEADER_FORMAT_LEN:
		return "backing format name is empty or longer than 15 bytes";
	case HEADER_FORMAT_NUL:
		return "backing format name contains a NUL byte";
	case HEADER_FEATURES_LEN:
		return "feature name table is no multiple of 48 bytes";
	case HEADER_DATA_FILE_LEN:
		return "external data file name is empty";
	case HEADER_DATA_FILE_NUL:
		return "external data file name contains a NUL byte";
	case HEADER_LUKS_LEN:
		return "encryption header extension is not 16 bytes long";
	case HEADER_BITMAPS_LEN:
	case HEADER_BITMAPS_RESERVED:
	case HEADER_BITMAPS_COUNT:
	case HEADER_BITMAPS_DIR_SIZE:
	case HEADER_BITMAPS_DIR_OFFSET:
		return qcow2_fault_str(QCOW2_FAULT_BITMAPS_LEN +
				       (fault - HEADER_BITMAPS_LEN));
	case HEADER_FAULT_LAST:
		break;
	}
	return "unknown fault";
}

static enum header_fault parse_bitmaps(const uint8_t *p, uint32_t len,
				       struct header *h)
{
	struct qcow2_bitmaps_ext ext = { 0 };
	struct qcow2_bitmap_dir dir;
	enum qcow2_fault fault;

	if (len == sizeof(ext))
		memcpy(&ext, p, len);
	fault = qcow2_bitmaps_ext_check(&ext, len, h->cluster_bits, &dir);
	if (fault)
		/* They are in the same order. */
		return HEADER_BITMAPS_LEN + (fault - QCOW2_FAULT_BITMAPS_LEN);
	h->has_bitmaps = true;
	h->bitmap_count = dir.count;
	h->bitmap_dir_size = dir.size;
	h->bitmap_dir_offset = dir.offset;
	return HEADER_OK;
}

/* A bit for each type that may appear only once; 0 if it is not known. */
static unsigned int extension_bit(uint32_t type)
{
	switch (type) {
	case QCOW2_EXT_BACKING_FORMAT:
		return 1;
	case QCOW2_EXT_FEATURE_NAMES:
		return 2;
	case QCOW2_EXT_BITMAPS:
		return 4;
	case QCOW2_EXT_LUKS:
		return 8;
	case QCOW2_EXT_DATA_FILE:
		return 16;
	default:
		return 0;
	}
}

static enum header_fault parse_extension(uint32_t type, const uint8_t *p,
					 uint32_t len, struct header *h)
{
	struct span span = { (const char *)p, len };

	switch (type) {
	case QCOW2_EXT_BACKING_FORMAT:
		if (!len || len > 15)
			return HEADER_FORMAT_LEN;
		if (memchr(p, 0, len))
			return HEADER_FORMAT_NUL;
		h->backing_format = span;
		return HEADER_OK;
	case QCOW2_EXT_FEATURE_NAMES:
		if (len % FEATURE_ENTRY_BYTES)
			return HEADER_FEATURES_LEN;
		h->features = span;
		return HEADER_OK;
	case QCOW2_EXT_DATA_FILE:
		if (!len)
			return HEADER_DATA_FILE_LEN;
		if (memchr(p, 0, len))
			return HEADER_DATA_FILE_NUL;
		h->data_file = span;
		return HEADER_OK;
	case QCOW2_EXT_BITMAPS:
		return parse_bitmaps(p, len, h);
	case QCOW2_EXT_LUKS:
		return len == 16 ? HEADER_OK : HEADER_LUKS_LEN;
	case HEADER_EXT_PADDING:
		return HEADER_OK;
	case HEADER_EXT_CLONE:
		/* What is no mark is none, and no fault. */
		h->clone = len == sizeof(struct header_clone);
		if (h->clone) {
			h->clone_image = get64(p);
			h->clone_data = get64(p + 8);
		}
		return HEADER_OK;
	default:
		h->unknown_extensions++;
		return HEADER_OK;
	}
}

/* Extensions lie in [@off, @end) of the header cluster. */
static enum header_fault parse_extensions(const uint8_t *p, size_t off,
					  size_t end, struct header *h)
{
	unsigned int seen = 0;

	while (off < end) {
		enum header_fault fault;
		uint32_t type, len;
		unsigned int bit;

		if (end - off < sizeof(struct qcow2_extension)) {
			/* Too little for an end marker: that may be padding. */
			for (; off < end; off++)
				if (p[off])
					return HEADER_EXT_CUT;
			return HEADER_OK;
		}
		type = get32(p + off);
		len = get32(p + off + 4);
		if (type == QCOW2_EXT_END)
			return HEADER_OK;
		off += sizeof(struct qcow2_extension);
		if (len > end - off)
			return HEADER_EXT_LEN;
		bit = extension_bit(type);
		if (seen & bit)
			return HEADER_EXT_TWICE;
		seen |= bit;
		fault = parse_extension(type, p + off, len, h);
		if (fault)
			return fault;
		/* The padding's content is free, and the last may have none. */
		off += ((size_t)len + 7) & ~(size_t)7;
	}
	return HEADER_OK;
}

enum header_fault header_parse(const void *buf, size_t len, struct header *h)
{
	const uint8_t *p = buf;
	uint64_t cluster, backing;
	uint32_t backing_len;
	size_t ext_end;

	memset(h, 0, sizeof(*h));
	if (len < 4)
		return HEADER_SHORT;
	if (get32(p) != QCOW2_MAGIC)
		return HEADER_MAGIC;
	if (len < HEADER_V2_LENGTH)
		return HEADER_SHORT;
	h->version = get32(p + 4);
	if (h->version != 2 && h->version != 3)
		return HEADER_VERSION;
	if (h->version == 3 && len < QCOW2_HEADER_V3_MIN)
		return HEADER_SHORT;

	h->cluster_bits = get32(p + 20);
	if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS ||
	    h->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
		return HEADER_CLUSTER_BITS;
	cluster = 1ULL << h->cluster_bits;
	/* All tables have clusters of their own: less is not an image. */
	if (len < cluster)
		return HEADER_SHORT;

	if (h->version == 3) {
		h->header_length = get32(p + 100);
		if (h->header_length < QCOW2_HEADER_V3_MIN ||
		    h->header_length & 7 || h->header_length > cluster)
			return HEADER_LENGTH;
	} else {
		h->header_length = HEADER_V2_LENGTH;
	}
	memcpy(&h->raw, p, h->header_length < sizeof(h->raw) ?
			   h->header_length : sizeof(h->raw));
	h->size = get64(p + 24);
	h->crypt_method = get32(p + 32);
	h->snapshots = get32(p + 60);
	h->refcount_order = 4;
	if (h->version == 3) {
		h->incompatible = be64_to_cpu(h->raw.incompatible_features);
		h->compatible = be64_to_cpu(h->raw.compatible_features);
		h->autoclear = be64_to_cpu(h->raw.autoclear_features);
		h->refcount_order = be32_to_cpu(h->raw.refcount_order);
		h->compression_type = h->raw.compression_type;
	}

	ext_end = cluster;
	backing = get64(p + 8);
	if (backing) {
		backing_len = get32(p + 16);
		if (backing_len > 1023)
			return HEADER_BACKING_NAME;
		if (backing < h->header_length || backing_len > cluster ||
		    backing > cluster - backing_len)
			return HEADER_BACKING_OFFSET;
		if (memchr(p + backing, 0, backing_len))
			return HEADER_BACKING_NUL;
		/* Without a name there is none, as QEMU has it. */
		if (backing_len)
			h->backing_file.s = (const char *)p + backing;
		h->backing_file.len = backing_len;
		ext_end = backing;
	}
	return parse_extensions(p, h->header_length, ext_end, h);
}

struct span header_feature_name(const struct header *h, unsigned int type,
				unsigned int bit)
{
	struct span none = { NULL, 0 };
	size_t i;

	for (i = 0; i + FEATURE_ENTRY_BYTES <= h->features.len;
	     i += FEATURE_ENTRY_BYTES) {
		const char *e = h->features.s + i;

		if ((uint8_t)e[0] == type && (uint8_t)e[1] == bit) {
			struct span name = {
				e + 2, strnlen(e + 2, FEATURE_NAME_BYTES)
			};

			return name;
		}
	}
	return none;
}

int bitmaps_parse(const void *dir, size_t len, uint32_t count,
		  unsigned int cluster_bits, bitmap_fn *fn, void *arg,
		  const char **why)
{
	const char *p = dir;
	size_t off = 0;
	uint32_t i;

	for (i = 0; i < count; i++) {
		struct qcow2_bitmap_head head = { 0 };
		struct bitmap b = { .at = off };
		enum qcow2_fault fault;
		int ret;

		if (len - off >= sizeof(head))
			memcpy(&head, p + off, sizeof(head));
		fault = qcow2_bitmap_decode(&head, len - off, cluster_bits,
					    &b.head);
		if (!fault && b.head.type != QCOW2_BITMAP_TYPE_DIRTY)
			fault = QCOW2_FAULT_BITMAP_TYPE;
		if (!fault) {
			b.name.s = p + off + sizeof(head) + b.head.extra_size;
			b.name.len = b.head.name_size;
			if (memchr(b.name.s, 0, b.name.len))
				fault = QCOW2_FAULT_BITMAP_NAME;
		}
		if (fault) {
			*why = qcow2_fault_str(fault);
			return -1;
		}
		if (fn) {
			ret = fn(&b, arg);
			if (ret)
				return ret;
		}
		off += qcow2_bitmap_bytes(&b.head);
	}
	if (off != len) {
		*why = qcow2_fault_str(QCOW2_FAULT_BITMAP_LEFT);
		return -1;
	}
	return 0;
}
