/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * On-disk format of qcow2, as far as images with an external data file use it.
 *
 * Shared by the driver and by qcow2setup: everything here is pure (no
 * allocation, no I/O, no state, callable from any context), so that the code
 * that trusts nothing can be tested and fuzzed in userspace.  Section names in
 * the comments are those of QEMU's docs/interop/qcow2 specification.
 *
 * All integers on disk are big endian.
 */
#ifndef DM_QCOW2_FORMAT_H
#define DM_QCOW2_FORMAT_H

#include <linux/types.h>

#ifdef __KERNEL__
#include <linux/bits.h>
#include <linux/kernel.h>
#include <linux/stddef.h>
#include <asm/byteorder.h>
#else
#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#define BIT_ULL(n)	(1ULL << (n))
#define be16_to_cpu(x)	be16toh((__u16)(x))
#define be32_to_cpu(x)	be32toh((__u32)(x))
#define be64_to_cpu(x)	be64toh((__u64)(x))
#define cpu_to_be16(x)	((__be16)htobe16(x))
#define cpu_to_be32(x)	((__be32)htobe32(x))
#define cpu_to_be64(x)	((__be64)htobe64(x))
#endif

/* "Header"; all fields of all structures are naturally aligned */
#define QCOW2_MAGIC			0x514649fbU	/* "QFI\xfb" */
#define QCOW2_HEADER_V3_MIN		104	/* bytes */
#define QCOW2_MIN_CLUSTER_BITS		9
#define QCOW2_MAX_CLUSTER_BITS		21
#define QCOW2_MIN_CLUSTER_BITS_EXT_L2	14
#define QCOW2_MAX_REFCOUNT_ORDER	6
/* QEMU's limits, which every other implementation relies on. */
#define QCOW2_MAX_L1_BYTES		(32U << 20)
#define QCOW2_MAX_REFTABLE_BYTES	(8U << 20)
#define QCOW2_MAX_L1_ENTRIES		(QCOW2_MAX_L1_BYTES / 8)
/* Host offsets, and with a data file guest offsets too, have 56 bits. */
#define QCOW2_MAX_OFFSET		(BIT_ULL(56) - 1)

#define QCOW2_INCOMPAT_DIRTY		BIT_ULL(0)
#define QCOW2_INCOMPAT_CORRUPT		BIT_ULL(1)
#define QCOW2_INCOMPAT_DATA_FILE	BIT_ULL(2)
#define QCOW2_INCOMPAT_COMPRESSION	BIT_ULL(3)
#define QCOW2_INCOMPAT_EXT_L2		BIT_ULL(4)
#define QCOW2_INCOMPAT_KNOWN		(QCOW2_INCOMPAT_DIRTY | \
					 QCOW2_INCOMPAT_CORRUPT | \
					 QCOW2_INCOMPAT_DATA_FILE | \
					 QCOW2_INCOMPAT_COMPRESSION | \
					 QCOW2_INCOMPAT_EXT_L2)
#define QCOW2_COMPAT_LAZY_REFCOUNTS	BIT_ULL(0)
#define QCOW2_AUTOCLEAR_BITMAPS		BIT_ULL(0)
#define QCOW2_AUTOCLEAR_RAW_DATA	BIT_ULL(1)
#define QCOW2_AUTOCLEAR_KNOWN		(QCOW2_AUTOCLEAR_BITMAPS | \
					 QCOW2_AUTOCLEAR_RAW_DATA)

struct qcow2_header {
	__be32 magic;
	__be32 version;
	__be64 backing_file_offset;
	__be32 backing_file_size;
	__be32 cluster_bits;
	__be64 size;			/* bytes */
	__be32 crypt_method;
	__be32 l1_size;			/* entries */
	__be64 l1_table_offset;
	__be64 refcount_table_offset;
	__be32 refcount_table_clusters;
	__be32 nb_snapshots;
	__be64 snapshots_offset;
	/* version 3 */
	__be64 incompatible_features;
	__be64 compatible_features;
	__be64 autoclear_features;
	__be32 refcount_order;
	__be32 header_length;
	/* present if header_length > 104 */
	__u8 compression_type;
	__u8 padding[7];
};

/* "Bitmaps extension", "Bitmaps"; limits are QEMU's */
#define QCOW2_MAX_BITMAPS		65535U
#define QCOW2_MAX_BITMAP_DIR_BYTES	(1024ULL * QCOW2_MAX_BITMAPS)
#define QCOW2_MAX_BITMAP_NAME		1023U	/* bytes */
#define QCOW2_MAX_BITMAP_TABLE		0x8000000U	/* entries */
#define QCOW2_MIN_GRANULARITY_BITS	9
#define QCOW2_MAX_GRANULARITY_BITS	31
#define QCOW2_BITMAP_TYPE_DIRTY		1

struct qcow2_bitmaps_ext {
	__be32 nb_bitmaps;
	__be32 reserved;
	__be64 directory_size;		/* bytes */
	__be64 directory_offset;
};

/* "Bitmap directory entry": extra data, the name, and padding to 8 follow. */
struct qcow2_bitmap_head {
	__be64 table_offset;
	__be32 table_size;		/* entries */
	__be32 flags;
	__u8 type;
	__u8 granularity_bits;
	__be16 name_size;
	__be32 extra_size;
};

#define QCOW2_BITMAP_IN_USE		0x1U	/* not up to date */
#define QCOW2_BITMAP_AUTO		0x2U	/* records what is written */
#define QCOW2_BITMAP_EXTRA_COMPAT	0x4U
#define QCOW2_BITMAP_KNOWN		(QCOW2_BITMAP_IN_USE | \
					 QCOW2_BITMAP_AUTO | \
					 QCOW2_BITMAP_EXTRA_COMPAT)

/* "Bitmap table entry" */
#define QCOW2_BITMAP_ENTRY_ONES		BIT_ULL(0)	/* if there is no offset */
#define QCOW2_BITMAP_ENTRY_RESERVED	0xff000000000001feULL

/* "Header extensions" */
#define QCOW2_EXT_END			0x00000000U
#define QCOW2_EXT_BACKING_FORMAT	0xe2792acaU
#define QCOW2_EXT_FEATURE_NAMES		0x6803f857U
#define QCOW2_EXT_BITMAPS		0x23852875U
#define QCOW2_EXT_LUKS			0x0537be77U
#define QCOW2_EXT_DATA_FILE		0x44415441U

struct qcow2_extension {
	__be32 type;
	__be32 len;			/* bytes, without the padding to 8 */
};

/* "L1 table entry", "Standard Cluster Descriptor" */
#define QCOW2_OFLAG_COPIED		BIT_ULL(63)
#define QCOW2_OFLAG_COMPRESSED		BIT_ULL(62)
#define QCOW2_OFLAG_ZERO		BIT_ULL(0)
#define QCOW2_OFFSET_MASK		0x00fffffffffffe00ULL
#define QCOW2_L1_RESERVED		0x7f000000000001ffULL
#define QCOW2_L2_RESERVED		0x3f000000000001feULL

/* "Extended L2 Entries": a cluster has 32 subclusters */
#define QCOW2_SUBCLUSTER_BITS		5
#define QCOW2_SUBCLUSTERS		32U
#define QCOW2_EXT_L2_RESERVED		(QCOW2_L2_RESERVED | QCOW2_OFLAG_ZERO)

/* "Refcount table entry" */
#define QCOW2_REFTABLE_OFFSET_MASK	0xfffffffffffffe00ULL
#define QCOW2_REFTABLE_RESERVED		0x00000000000001ffULL

/*
 * State of a unit (a cluster; with extended L2 entries, a subcluster).  The
 * values are those of the driver's two-bit state words.
 */
enum qcow2_state {
	QCOW2_UNALLOCATED	= 0,	/* reads as the backing file, or zeros */
	QCOW2_ZERO		= 1,	/* reads as zeros */
	QCOW2_DATA		= 2,	/* in the data file, offset = guest offset */
	QCOW2_BUSY		= 3,	/* in core only: ask the slow path */
};

/*
 * What can be wrong with an image.  qcow2_fault_str() has the text; the tool
 * adds the remedy.
 */
enum qcow2_fault {
	QCOW2_OK = 0,
	/* geometry */
	QCOW2_FAULT_CLUSTER_BITS,
	QCOW2_FAULT_EXT_L2_CLUSTER_BITS,
	QCOW2_FAULT_REFCOUNT_ORDER,
	QCOW2_FAULT_SIZE_ZERO,
	QCOW2_FAULT_SIZE_BIG,
	QCOW2_FAULT_L1_OFFSET,
	QCOW2_FAULT_L1_BIG,
	QCOW2_FAULT_L1_SMALL,
	QCOW2_FAULT_L1_BEYOND,
	QCOW2_FAULT_L1_HEADER,
	QCOW2_FAULT_REFTABLE_OFFSET,
	QCOW2_FAULT_REFTABLE_NONE,
	QCOW2_FAULT_REFTABLE_BIG,
	QCOW2_FAULT_REFTABLE_BEYOND,
	QCOW2_FAULT_REFTABLE_HEADER,
	QCOW2_FAULT_L1_REFTABLE,
	/* header */
	QCOW2_FAULT_MAGIC,
	QCOW2_FAULT_VERSION,
	QCOW2_FAULT_HEADER_LENGTH,
	QCOW2_FAULT_UNKNOWN_INCOMPAT,
	QCOW2_FAULT_NO_DATA_FILE,
	QCOW2_FAULT_CRYPT,
	QCOW2_FAULT_SNAPSHOTS,
	QCOW2_FAULT_COMPRESSION,
	QCOW2_FAULT_BACKING_OFFSET,
	QCOW2_FAULT_BACKING_NAME,
	QCOW2_FAULT_RAW_BACKING,
	QCOW2_FAULT_CORRUPT,
	QCOW2_FAULT_DIRTY,
	/* entries */
	QCOW2_FAULT_ENTRY_RESERVED,
	QCOW2_FAULT_ENTRY_UNALIGNED,
	QCOW2_FAULT_ENTRY_BEYOND,
	QCOW2_FAULT_ENTRY_OVERLAP,
	QCOW2_FAULT_ENTRY_COMPRESSED,
	QCOW2_FAULT_ENTRY_OFFSET,
	QCOW2_FAULT_ENTRY_SHARED,
	QCOW2_FAULT_SUBCLUSTER_BOTH,
	QCOW2_FAULT_SUBCLUSTER_NONE,
	QCOW2_FAULT_REFCOUNT_ZERO,
	/* header extensions */
	QCOW2_FAULT_EXT_LEN,
	QCOW2_FAULT_EXT_TWICE,
	QCOW2_FAULT_BITMAPS_LEN,
	QCOW2_FAULT_BITMAPS_RESERVED,
	QCOW2_FAULT_BITMAPS_COUNT,
	QCOW2_FAULT_BITMAPS_DIR_SIZE,
	QCOW2_FAULT_BITMAPS_DIR_OFFSET,
	/* bitmaps */
	QCOW2_FAULT_BITMAP_CUT,
	QCOW2_FAULT_BITMAP_NAME,
	QCOW2_FAULT_BITMAP_GRANULARITY,
	QCOW2_FAULT_BITMAP_TABLE_OFFSET,
	QCOW2_FAULT_BITMAP_TABLE_BIG,
	QCOW2_FAULT_BITMAP_TABLE_BEYOND,
	QCOW2_FAULT_BITMAP_LEFT,
	QCOW2_FAULT_BITMAP_TYPE,
	QCOW2_FAULT_BITMAP_FLAGS,
	QCOW2_FAULT_BITMAP_EXTRA,
	QCOW2_FAULT_BITMAP_TABLE_SIZE,
	QCOW2_FAULT_BITMAP_NONE,
	QCOW2_FAULT_BITMAP_MANY,
	QCOW2_FAULT_LAST
};

/**
 * qcow2_fault_str() - one phrase for a fault, lower case, no full stop
 * @fault: what was found
 */
static inline const char *qcow2_fault_str(enum qcow2_fault fault)
{
	switch (fault) {
	case QCOW2_OK:
		return "no fault";
	case QCOW2_FAULT_CLUSTER_BITS:
		return "cluster_bits is not in 9..21";
	case QCOW2_FAULT_EXT_L2_CLUSTER_BITS:
		return "extended L2 entries need cluster_bits in 14..21";
	case QCOW2_FAULT_REFCOUNT_ORDER:
		return "refcount_order is greater than 6";
	case QCOW2_FAULT_SIZE_ZERO:
		return "virtual size is less than one sector";
	case QCOW2_FAULT_SIZE_BIG:
		return "virtual size is beyond 2^56 bytes";
	case QCOW2_FAULT_L1_OFFSET:
		return "L1 table offset is not a multiple of the cluster size";
	case QCOW2_FAULT_L1_BIG:
		return "L1 table is larger than 32 MiB";
	case QCOW2_FAULT_L1_SMALL:
		return "L1 table is too small for the virtual size";
	case QCOW2_FAULT_L1_BEYOND:
		return "L1 table reaches beyond the end of the metadata";
	case QCOW2_FAULT_L1_HEADER:
		return "L1 table overlaps the header";
	case QCOW2_FAULT_REFTABLE_OFFSET:
		return "refcount table offset is not a multiple of the cluster size";
	case QCOW2_FAULT_REFTABLE_NONE:
		return "refcount table is empty";
	case QCOW2_FAULT_REFTABLE_BIG:
		return "refcount table is larger than 8 MiB";
	case QCOW2_FAULT_REFTABLE_BEYOND:
		return "refcount table reaches beyond the end of the metadata";
	case QCOW2_FAULT_REFTABLE_HEADER:
		return "refcount table overlaps the header";
	case QCOW2_FAULT_L1_REFTABLE:
		return "L1 table overlaps the refcount table";
	case QCOW2_FAULT_MAGIC:
		return "not a qcow2 image";
	case QCOW2_FAULT_VERSION:
		return "external data files need qcow2 version 3";
	case QCOW2_FAULT_HEADER_LENGTH:
		return "header_length is less than 104, no multiple of 8 or longer than a cluster";
	case QCOW2_FAULT_UNKNOWN_INCOMPAT:
		return "unknown incompatible feature bits are set";
	case QCOW2_FAULT_NO_DATA_FILE:
		return "image has no external data file";
	case QCOW2_FAULT_CRYPT:
		return "image is encrypted";
	case QCOW2_FAULT_SNAPSHOTS:
		return "internal snapshots cannot exist with an external data file";
	case QCOW2_FAULT_COMPRESSION:
		return "compression type and its feature bit disagree";
	case QCOW2_FAULT_BACKING_OFFSET:
		return "backing file name lies outside the header cluster";
	case QCOW2_FAULT_BACKING_NAME:
		return "backing file name is longer than 1023 bytes";
	case QCOW2_FAULT_RAW_BACKING:
		return "raw external data and a backing file exclude each other";
	case QCOW2_FAULT_CORRUPT:
		return "image is marked corrupt";
	case QCOW2_FAULT_DIRTY:
		return "image is marked dirty, its refcounts may be wrong";
	case QCOW2_FAULT_ENTRY_RESERVED:
		return "reserved bits are set";
	case QCOW2_FAULT_ENTRY_UNALIGNED:
		return "offset is not a multiple of the cluster size";
	case QCOW2_FAULT_ENTRY_BEYOND:
		return "offset lies beyond the end of the metadata";
	case QCOW2_FAULT_ENTRY_OVERLAP:
		return "offset points into another metadata structure";
	case QCOW2_FAULT_ENTRY_COMPRESSED:
		return "compressed cluster in an image with an external data file";
	case QCOW2_FAULT_ENTRY_OFFSET:
		return "offset does not equal the guest offset";
	case QCOW2_FAULT_ENTRY_SHARED:
		return "L2 table is not exclusively owned (bit 63 is clear)";
	case QCOW2_FAULT_SUBCLUSTER_BOTH:
		return "a subcluster is both allocated and zero";
	case QCOW2_FAULT_SUBCLUSTER_NONE:
		return "a subcluster is allocated in a cluster that is not";
	case QCOW2_FAULT_REFCOUNT_ZERO:
		return "cluster is in use but its refcount is 0";
	case QCOW2_FAULT_EXT_LEN:
		return "header extension is longer than the room for it";
	case QCOW2_FAULT_EXT_TWICE:
		return "header extension is there twice";
	case QCOW2_FAULT_BITMAPS_LEN:
		return "bitmaps extension is not 24 bytes long";
	case QCOW2_FAULT_BITMAPS_RESERVED:
		return "reserved field of the bitmaps extension is not zero";
	case QCOW2_FAULT_BITMAPS_COUNT:
		return "bitmaps extension counts no bitmap, or more than 65535";
	case QCOW2_FAULT_BITMAPS_DIR_SIZE:
		return "size of the bitmap directory is impossible";
	case QCOW2_FAULT_BITMAPS_DIR_OFFSET:
		return "bitmap directory is not at a cluster of its own";
	case QCOW2_FAULT_BITMAP_CUT:
		return "bitmap directory ends in the middle of an entry";
	case QCOW2_FAULT_BITMAP_NAME:
		return "bitmap name is empty, too long or contains a NUL byte";
	case QCOW2_FAULT_BITMAP_GRANULARITY:
		return "bitmap granularity is not in 512..2G";
	case QCOW2_FAULT_BITMAP_TABLE_OFFSET:
		return "bitmap table is not at a cluster of its own";
	case QCOW2_FAULT_BITMAP_TABLE_BIG:
		return "bitmap table is too large";
	case QCOW2_FAULT_BITMAP_TABLE_BEYOND:
		return "bitmap table lies beyond the end of the metadata";
	case QCOW2_FAULT_BITMAP_LEFT:
		return "bitmap directory is longer than its entries";
	case QCOW2_FAULT_BITMAP_TYPE:
		return "bitmap is of an unknown type";
	case QCOW2_FAULT_BITMAP_FLAGS:
		return "bitmap has unknown flags";
	case QCOW2_FAULT_BITMAP_EXTRA:
		return "bitmap has extra data";
	case QCOW2_FAULT_BITMAP_TABLE_SIZE:
		return "bitmap table does not fit the virtual size";
	case QCOW2_FAULT_BITMAP_NONE:
		return "bitmap table has an entry without a cluster";
	case QCOW2_FAULT_BITMAP_MANY:
		return "more than 16 bitmaps record";
	case QCOW2_FAULT_LAST:
		break;
	}
	return "unknown fault";
}

/* Where the structures are that table line and header both name. */
struct qcow2_geometry {
	__u64 size;			/* virtual size, bytes */
	__u64 l1_offset;		/* bytes */
	__u64 reftable_offset;		/* bytes */
	__u32 l1_entries;
	__u32 reftable_clusters;
	__u32 cluster_bits;
	__u32 refcount_order;
	bool ext_l2;
};

/* Size of an L2 entry as a power of two, bytes ("Extended L2 Entries"). */
static inline unsigned int qcow2_l2_entry_bits(const struct qcow2_geometry *g)
{
	return g->ext_l2 ? 4 : 3;
}

/* log2 of the guest bytes that one L2 table maps */
static inline unsigned int qcow2_l2_cover_bits(const struct qcow2_geometry *g)
{
	return 2 * g->cluster_bits - qcow2_l2_entry_bits(g);
}

/* L1 entries that the virtual size needs. */
static inline __u64 qcow2_l1_entries_needed(const struct qcow2_geometry *g)
{
	unsigned int bits = qcow2_l2_cover_bits(g);

	return (g->size >> bits) + !!(g->size & ((1ULL << bits) - 1));
}

/* Does [a, a + alen) meet [b, b + blen)?  Sums must not overflow. */
static inline bool qcow2_overlap(__u64 a, __u64 alen, __u64 b, __u64 blen)
{
	return a < b + blen && b < a + alen;
}

/* log2 of the bytes of a unit: a cluster or, with extended L2, a subcluster */
static inline unsigned int qcow2_unit_bits(const struct qcow2_geometry *g)
{
	return g->cluster_bits - (g->ext_l2 ? QCOW2_SUBCLUSTER_BITS : 0);
}

/**
 * qcow2_in_fixed_area() - does a cluster lie in what the header names?
 * @g: checked with qcow2_geometry_check()
 * @offset: of the cluster, bytes
 *
 * That is the header's own cluster, the L1 table and the refcount table.
 */
static inline bool qcow2_in_fixed_area(const struct qcow2_geometry *g,
				       __u64 offset)
{
	__u64 cs = 1ULL << g->cluster_bits;
	__u64 l1_bytes = ((__u64)g->l1_entries * 8 + cs - 1) & ~(cs - 1);

	return offset < cs ||
	       qcow2_overlap(offset, cs, g->l1_offset, l1_bytes) ||
	       qcow2_overlap(offset, cs, g->reftable_offset,
			     (__u64)g->reftable_clusters << g->cluster_bits);
}

/**
 * qcow2_geometry_check() - is a geometry possible, and safe to work with?
 * @g: from a table line or a header
 * @meta_size: size of the metadata file or device in bytes; the tables must
 *	lie inside it.  Pass U64_MAX to leave that out.
 *
 * After QCOW2_OK all products and sums of the fields fit into 64 bits, and
 * header, L1 table and refcount table are disjoint.
 */
static inline enum qcow2_fault
qcow2_geometry_check(const struct qcow2_geometry *g, __u64 meta_size)
{
	__u64 cs, l1_bytes, rt_bytes;

	if (g->cluster_bits < QCOW2_MIN_CLUSTER_BITS ||
	    g->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
		return QCOW2_FAULT_CLUSTER_BITS;
	if (g->ext_l2 && g->cluster_bits < QCOW2_MIN_CLUSTER_BITS_EXT_L2)
		return QCOW2_FAULT_EXT_L2_CLUSTER_BITS;
	if (g->refcount_order > QCOW2_MAX_REFCOUNT_ORDER)
		return QCOW2_FAULT_REFCOUNT_ORDER;
	if (g->size < 512)
		return QCOW2_FAULT_SIZE_ZERO;
	if (g->size > QCOW2_MAX_OFFSET)
		return QCOW2_FAULT_SIZE_BIG;

	cs = 1ULL << g->cluster_bits;
	if (g->l1_offset & (cs - 1))
		return QCOW2_FAULT_L1_OFFSET;
	if (g->l1_entries > QCOW2_MAX_L1_ENTRIES)
		return QCOW2_FAULT_L1_BIG;
	if (g->l1_entries < qcow2_l1_entries_needed(g))
		return QCOW2_FAULT_L1_SMALL;
	l1_bytes = (__u64)g->l1_entries * 8;
	if (!g->l1_offset)
		return QCOW2_FAULT_L1_HEADER;
	if (g->l1_offset > QCOW2_MAX_OFFSET || g->l1_offset > meta_size ||
	    l1_bytes > meta_size - g->l1_offset)
		return QCOW2_FAULT_L1_BEYOND;

	if (g->reftable_offset & (cs - 1))
		return QCOW2_FAULT_REFTABLE_OFFSET;
	if (!g->reftable_clusters)
		return QCOW2_FAULT_REFTABLE_NONE;
	if (g->reftable_clusters > QCOW2_MAX_REFTABLE_BYTES >> g->cluster_bits)
		return QCOW2_FAULT_REFTABLE_BIG;
	rt_bytes = (__u64)g->reftable_clusters << g->cluster_bits;
	if (!g->reftable_offset)
		return QCOW2_FAULT_REFTABLE_HEADER;
	if (g->reftable_offset > QCOW2_MAX_OFFSET ||
	    g->reftable_offset > meta_size ||
	    rt_bytes > meta_size - g->reftable_offset)
		return QCOW2_FAULT_REFTABLE_BEYOND;

	l1_bytes = (l1_bytes + cs - 1) & ~(cs - 1);
	if (qcow2_overlap(g->l1_offset, l1_bytes, g->reftable_offset, rt_bytes))
		return QCOW2_FAULT_L1_REFTABLE;
	return QCOW2_OK;
}

/**
 * qcow2_header_check() - can an image with this header be mapped?
 * @h: the first sizeof(*h) bytes of the image
 * @read_only: the image will not be written
 * @g: filled in with the header's geometry if the result is QCOW2_OK, or if it
 *	is one of the faults from QCOW2_FAULT_CORRUPT on
 *
 * Looks at the fixed fields only: the caller checks the geometry against the
 * size of the metadata with qcow2_geometry_check().  The virtual size is
 * rounded down to whole sectors, as QEMU does.
 */
static inline enum qcow2_fault
qcow2_header_check(const struct qcow2_header *h, bool read_only,
		   struct qcow2_geometry *g)
{
	__u64 incompat, autoclear, backing;
	__u32 bits, header_length;
	bool nonzero_type;

	if (be32_to_cpu(h->magic) != QCOW2_MAGIC)
		return QCOW2_FAULT_MAGIC;
	if (be32_to_cpu(h->version) != 3)
		return QCOW2_FAULT_VERSION;
	bits = be32_to_cpu(h->cluster_bits);
	if (bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
		return QCOW2_FAULT_CLUSTER_BITS;
	header_length = be32_to_cpu(h->header_length);
	if (header_length < QCOW2_HEADER_V3_MIN || (header_length & 7) ||
	    header_length > 1U << bits)
		return QCOW2_FAULT_HEADER_LENGTH;
	incompat = be64_to_cpu(h->incompatible_features);
	autoclear = be64_to_cpu(h->autoclear_features);
	if (incompat & ~QCOW2_INCOMPAT_KNOWN)
		return QCOW2_FAULT_UNKNOWN_INCOMPAT;
	if (!(incompat & QCOW2_INCOMPAT_DATA_FILE))
		return QCOW2_FAULT_NO_DATA_FILE;
	if (h->crypt_method)
		return QCOW2_FAULT_CRYPT;
	if (h->nb_snapshots)
		return QCOW2_FAULT_SNAPSHOTS;
	/* "compression_type": absent means deflate (0) */
	nonzero_type = header_length > QCOW2_HEADER_V3_MIN &&
		       h->compression_type;
	if (nonzero_type != !!(incompat & QCOW2_INCOMPAT_COMPRESSION))
		return QCOW2_FAULT_COMPRESSION;
	backing = be64_to_cpu(h->backing_file_offset);
	if (backing) {
		__u32 len = be32_to_cpu(h->backing_file_size);

		if (len > 1023)
			return QCOW2_FAULT_BACKING_NAME;
		if (backing < header_length || len > 1U << bits ||
		    backing > (1ULL << bits) - len)
			return QCOW2_FAULT_BACKING_OFFSET;
		/* An empty name is none. */
		if (len && (autoclear & QCOW2_AUTOCLEAR_RAW_DATA))
			return QCOW2_FAULT_RAW_BACKING;
	}

	g->size = be64_to_cpu(h->size) & ~511ULL;
	g->l1_offset = be64_to_cpu(h->l1_table_offset);
	g->l1_entries = be32_to_cpu(h->l1_size);
	g->reftable_offset = be64_to_cpu(h->refcount_table_offset);
	g->reftable_clusters = be32_to_cpu(h->refcount_table_clusters);
	g->cluster_bits = bits;
	g->refcount_order = be32_to_cpu(h->refcount_order);
	g->ext_l2 = incompat & QCOW2_INCOMPAT_EXT_L2;

	if (!read_only && (incompat & QCOW2_INCOMPAT_CORRUPT))
		return QCOW2_FAULT_CORRUPT;
	if (!read_only && (incompat & QCOW2_INCOMPAT_DIRTY))
		return QCOW2_FAULT_DIRTY;
	return QCOW2_OK;
}

/**
 * qcow2_l1_check() - validate an L1 entry ("L1 table entry")
 * @entry: in CPU byte order
 * @cluster_bits: of the image
 * @meta_size: bytes; the L2 table must lie inside
 *
 * An entry with offset 0 means that there is no L2 table.
 */
static inline enum qcow2_fault
qcow2_l1_check(__u64 entry, unsigned int cluster_bits, __u64 meta_size)
{
	__u64 off = entry & QCOW2_OFFSET_MASK, cs = 1ULL << cluster_bits;

	if (entry & QCOW2_L1_RESERVED)
		return QCOW2_FAULT_ENTRY_RESERVED;
	if (off & (cs - 1))
		return QCOW2_FAULT_ENTRY_UNALIGNED;
	if (off && (off > meta_size || cs > meta_size - off))
		return QCOW2_FAULT_ENTRY_BEYOND;
	return QCOW2_OK;
}

/**
 * qcow2_l2_decode() - validate and decode a standard L2 entry
 * @entry: in CPU byte order ("Standard Cluster Descriptor")
 * @guest: guest offset of the cluster, bytes
 * @cluster_bits: of the image
 * @state: set to the cluster's state if the result is QCOW2_OK
 *
 * Offset 0 with bit 63 set is the data of guest cluster 0; elsewhere it is a
 * wrong offset.  Bit 63 of other data clusters "should" be set: a clear one is
 * accepted, since there is no one to share the data file's cluster with.
 */
static inline enum qcow2_fault
qcow2_l2_decode(__u64 entry, __u64 guest, unsigned int cluster_bits,
		enum qcow2_state *state)
{
	__u64 off = entry & QCOW2_OFFSET_MASK;

	if (entry & QCOW2_OFLAG_COMPRESSED)
		return QCOW2_FAULT_ENTRY_COMPRESSED;
	if (entry & QCOW2_L2_RESERVED)
		return QCOW2_FAULT_ENTRY_RESERVED;
	if (off & ((1ULL << cluster_bits) - 1))
		return QCOW2_FAULT_ENTRY_UNALIGNED;
	if (off && off != guest)
		return QCOW2_FAULT_ENTRY_OFFSET;
	if (entry & QCOW2_OFLAG_ZERO) {
		*state = QCOW2_ZERO;
	} else if (off) {
		*state = QCOW2_DATA;
	} else if (entry & QCOW2_OFLAG_COPIED) {
		if (guest)
			return QCOW2_FAULT_ENTRY_OFFSET;
		*state = QCOW2_DATA;
	} else {
		*state = QCOW2_UNALLOCATED;
	}
	return QCOW2_OK;
}

/* An extended L2 entry, in CPU byte order ("Extended L2 Entries") */
struct qcow2_ext_entry {
	__u64 entry;			/* standard cluster descriptor */
	__u32 alloc;			/* bit per subcluster: allocated */
	__u32 zero;			/* bit per subcluster: reads as zeros */
};

/* Take the bitmap that follows an extended entry apart; CPU byte order. */
static inline struct qcow2_ext_entry qcow2_ext_entry(__u64 entry, __u64 bitmap)
{
	struct qcow2_ext_entry e = { entry, (__u32)bitmap, (__u32)(bitmap >> 32) };

	return e;
}

/**
 * qcow2_l2_ext_check() - validate an extended L2 entry
 * @e: the entry
 * @guest: guest offset of the cluster, bytes
 * @cluster_bits: of the image
 *
 * After QCOW2_OK subcluster i is data if bit i of @e->alloc is set, zero if that
 * of @e->zero is set, else unallocated.
 */
static inline enum qcow2_fault
qcow2_l2_ext_check(const struct qcow2_ext_entry *e, __u64 guest,
		   unsigned int cluster_bits)
{
	__u64 off = e->entry & QCOW2_OFFSET_MASK;
	bool normal = off || (e->entry & QCOW2_OFLAG_COPIED);

	if (e->entry & QCOW2_OFLAG_COMPRESSED)
		return QCOW2_FAULT_ENTRY_COMPRESSED;
	if (e->entry & QCOW2_EXT_L2_RESERVED)
		return QCOW2_FAULT_ENTRY_RESERVED;
	if (off & ((1ULL << cluster_bits) - 1))
		return QCOW2_FAULT_ENTRY_UNALIGNED;
	if (normal && off != guest)
		return QCOW2_FAULT_ENTRY_OFFSET;
	if (e->alloc & e->zero)
		return QCOW2_FAULT_SUBCLUSTER_BOTH;
	if (!normal && e->alloc)
		return QCOW2_FAULT_SUBCLUSTER_NONE;
	return QCOW2_OK;
}

/* State of subcluster @i of an entry that is QCOW2_OK. */
static inline enum qcow2_state
qcow2_ext_state(const struct qcow2_ext_entry *e, unsigned int i)
{
	if (e->alloc >> i & 1)
		return QCOW2_DATA;
	return e->zero >> i & 1 ? QCOW2_ZERO : QCOW2_UNALLOCATED;
}

/* The L2 entry of a data cluster at guest offset @guest (bytes). */
static inline __u64 qcow2_l2_data_entry(__u64 guest)
{
	return guest | QCOW2_OFLAG_COPIED;
}

/**
 * qcow2_reftable_check() - validate a refcount table entry
 * @entry: in CPU byte order; offset 0 means that there is no block
 * @cluster_bits: of the image
 * @meta_size: bytes; the refcount block must lie inside
 */
static inline enum qcow2_fault
qcow2_reftable_check(__u64 entry, unsigned int cluster_bits, __u64 meta_size)
{
	__u64 off = entry & QCOW2_REFTABLE_OFFSET_MASK;
	__u64 cs = 1ULL << cluster_bits;

	if (entry & QCOW2_REFTABLE_RESERVED)
		return QCOW2_FAULT_ENTRY_RESERVED;
	if (off & (cs - 1))
		return QCOW2_FAULT_ENTRY_UNALIGNED;
	if (off && (off > meta_size || cs > meta_size - off))
		return QCOW2_FAULT_ENTRY_BEYOND;
	return QCOW2_OK;
}

/**
 * qcow2_refcount_get() - read one refcount ("Refcount block entry")
 * @block: a refcount block, or a part of one that starts at a multiple of
 *	eight bytes
 * @i: entry, counted from @block
 * @order: refcount_order, 0..6: the width is 2^order bits
 */
static inline __u64 qcow2_refcount_get(const void *block, __u64 i,
				       unsigned int order)
{
	const __u8 *p = block;
	unsigned int n, width;
	__u64 v = 0;

	if (order < 3) {
		/* sub-byte entries start at the least significant bit */
		__u64 bit = i << order;

		return (p[bit >> 3] >> (bit & 7)) & ((1U << (1U << order)) - 1);
	}
	width = 1U << (order - 3);
	p += i * width;
	for (n = 0; n < width; n++)
		v = v << 8 | p[n];
	return v;
}

/**
 * qcow2_refcount_set() - store one refcount
 * @block: see qcow2_refcount_get()
 * @i: entry, counted from @block
 * @order: refcount_order, 0..6
 * @v: the value; higher bits than the width has are cut off
 */
static inline void qcow2_refcount_set(void *block, __u64 i, unsigned int order,
				      __u64 v)
{
	__u8 *p = block;
	unsigned int n, width;

	if (order < 3) {
		__u64 bit = i << order;
		__u8 mask = ((1U << (1U << order)) - 1) << (bit & 7);

		p += bit >> 3;
		*p = (*p & ~mask) | ((v << (bit & 7)) & mask);
		return;
	}
	width = 1U << (order - 3);
	p += i * width;
	for (n = width; n-- > 0; v >>= 8)
		p[n] = v;
}

/*----------------------------------------------------------------
 * Bitmaps
 *----------------------------------------------------------------
 */

/* Where the bitmap directory is */
struct qcow2_bitmap_dir {
	__u64 offset;			/* bytes */
	__u64 size;			/* bytes */
	__u32 count;			/* of bitmaps */
};

/* An entry of it, without its name */
struct qcow2_bitmap {
	__u64 table_offset;		/* bytes */
	__u32 table_size;		/* entries */
	__u32 flags;
	__u32 extra_size;		/* bytes, between the entry and its name */
	__u16 name_size;
	__u8 type;
	__u8 granularity_bits;
};

/**
 * qcow2_bitmaps_ext_check() - validate and decode the bitmaps extension
 * @ext: its data; looked at only if @len is right
 * @len: the extension's length, bytes
 * @cluster_bits: of the image
 * @dir: filled in if the result is QCOW2_OK
 */
static inline enum qcow2_fault
qcow2_bitmaps_ext_check(const struct qcow2_bitmaps_ext *ext, __u32 len,
			unsigned int cluster_bits, struct qcow2_bitmap_dir *dir)
{
	if (len != sizeof(*ext))
		return QCOW2_FAULT_BITMAPS_LEN;
	dir->count = be32_to_cpu(ext->nb_bitmaps);
	dir->size = be64_to_cpu(ext->directory_size);
	dir->offset = be64_to_cpu(ext->directory_offset);
	if (ext->reserved)
		return QCOW2_FAULT_BITMAPS_RESERVED;
	if (!dir->count || dir->count > QCOW2_MAX_BITMAPS)
		return QCOW2_FAULT_BITMAPS_COUNT;
	/* an entry without a name still has its head */
	if (dir->size > QCOW2_MAX_BITMAP_DIR_BYTES ||
	    dir->size < (__u64)dir->count * sizeof(struct qcow2_bitmap_head))
		return QCOW2_FAULT_BITMAPS_DIR_SIZE;
	if (!dir->offset || dir->offset > QCOW2_MAX_OFFSET ||
	    dir->offset & ((1ULL << cluster_bits) - 1))
		return QCOW2_FAULT_BITMAPS_DIR_OFFSET;
	return QCOW2_OK;
}

/* Bytes of a directory entry, from its head to the next one's */
static inline __u64 qcow2_bitmap_bytes(const struct qcow2_bitmap *b)
{
	return (sizeof(struct qcow2_bitmap_head) + (__u64)b->extra_size +
		b->name_size + 7) & ~7ULL;
}

/**
 * qcow2_bitmap_decode() - validate and decode an entry of the bitmap directory
 * @h: its head
 * @left: bytes from @h to the end of the directory
 * @cluster_bits: of the image
 * @b: filled in, unless the directory ends before the head does
 *
 * The caller looks at the name, which lies within @left if the result is QCOW2_OK.
 * Type, flags and extra data can be any: see qcow2_bitmap_record_check().
 */
static inline enum qcow2_fault
qcow2_bitmap_decode(const struct qcow2_bitmap_head *h, __u64 left,
		    unsigned int cluster_bits, struct qcow2_bitmap *b)
{
	if (left < sizeof(*h))
		return QCOW2_FAULT_BITMAP_CUT;
	b->table_offset = be64_to_cpu(h->table_offset);
	b->table_size = be32_to_cpu(h->table_size);
	b->flags = be32_to_cpu(h->flags);
	b->type = h->type;
	b->granularity_bits = h->granularity_bits;
	b->name_size = be16_to_cpu(h->name_size);
	b->extra_size = be32_to_cpu(h->extra_size);
	if (qcow2_bitmap_bytes(b) > left)
		return QCOW2_FAULT_BITMAP_CUT;
	if (!b->name_size || b->name_size > QCOW2_MAX_BITMAP_NAME)
		return QCOW2_FAULT_BITMAP_NAME;
	if (b->granularity_bits < QCOW2_MIN_GRANULARITY_BITS ||
	    b->granularity_bits > QCOW2_MAX_GRANULARITY_BITS)
		return QCOW2_FAULT_BITMAP_GRANULARITY;
	if (!b->table_offset || b->table_offset > QCOW2_MAX_OFFSET ||
	    b->table_offset & ((1ULL << cluster_bits) - 1))
		return QCOW2_FAULT_BITMAP_TABLE_OFFSET;
	if (b->table_size > QCOW2_MAX_BITMAP_TABLE)
		return QCOW2_FAULT_BITMAP_TABLE_BIG;
	return QCOW2_OK;
}

/* Does a bitmap ask whoever writes to the image to record that? */
static inline bool qcow2_bitmap_records(const struct qcow2_bitmap *b)
{
	return (b->flags & (QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE)) ==
	       QCOW2_BITMAP_AUTO;
}

/* Bits of a bitmap of a disk of @size bytes, at least 1 */
static inline __u64 qcow2_bitmap_bits(__u64 size, unsigned int granularity_bits)
{
	return ((size - 1) >> granularity_bits) + 1;
}

/* Entries that its table has to have: one for each cluster of bits */
static inline __u64 qcow2_bitmap_entries(__u64 size,
					 unsigned int granularity_bits,
					 unsigned int cluster_bits)
{
	return ((qcow2_bitmap_bits(size, granularity_bits) - 1) >>
		(cluster_bits + 3)) + 1;
}

/**
 * qcow2_bitmap_record_check() - can a bitmap be kept up to date?
 * @b: it has been decoded without a fault
 * @size: virtual size of the image, bytes
 * @cluster_bits: of the image
 * @meta_size: of the device that has the image's metadata, bytes
 */
static inline enum qcow2_fault
qcow2_bitmap_record_check(const struct qcow2_bitmap *b, __u64 size,
			  unsigned int cluster_bits, __u64 meta_size)
{
	__u64 bytes = (__u64)b->table_size * 8;

	if (b->type != QCOW2_BITMAP_TYPE_DIRTY)
		return QCOW2_FAULT_BITMAP_TYPE;
	if (b->flags & ~QCOW2_BITMAP_KNOWN)
		return QCOW2_FAULT_BITMAP_FLAGS;
	if (b->extra_size)
		return QCOW2_FAULT_BITMAP_EXTRA;
	if (b->table_size != qcow2_bitmap_entries(size, b->granularity_bits,
						  cluster_bits))
		return QCOW2_FAULT_BITMAP_TABLE_SIZE;
	if (b->table_offset > meta_size || bytes > meta_size - b->table_offset)
		return QCOW2_FAULT_BITMAP_TABLE_BEYOND;
	return QCOW2_OK;
}

/**
 * qcow2_bitmap_entry_check() - validate an entry of a bitmap's table
 * @entry: in CPU byte order
 * @cluster_bits: of the image
 * @meta_size: of the device that has the image's metadata, bytes
 * @offset: set to where the cluster is, bytes; 0 = there is none, and the bits are all
 *	those of QCOW2_BITMAP_ENTRY_ONES
 */
static inline enum qcow2_fault
qcow2_bitmap_entry_check(__u64 entry, unsigned int cluster_bits,
			 __u64 meta_size, __u64 *offset)
{
	__u64 off = entry & QCOW2_OFFSET_MASK, cluster = 1ULL << cluster_bits;

	if (entry & QCOW2_BITMAP_ENTRY_RESERVED ||
	    (off && entry & QCOW2_BITMAP_ENTRY_ONES))
		return QCOW2_FAULT_ENTRY_RESERVED;
	if (off & (cluster - 1))
		return QCOW2_FAULT_ENTRY_UNALIGNED;
	if (off && (off > meta_size || cluster > meta_size - off))
		return QCOW2_FAULT_ENTRY_BEYOND;
	*offset = off;
	return QCOW2_OK;
}

#endif /* DM_QCOW2_FORMAT_H */
