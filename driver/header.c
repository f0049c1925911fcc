// SPDX-License-Identifier: GPL-2.0-only
/*
 * The image's header.
 */
#include <linux/slab.h>

#include "compat.h"
#include "header.h"

static const char *qcow2_header_differs(const struct qcow2_config *config,
					bool read_only,
					const struct qcow2_header *h)
{
	const struct qcow2_geometry *want = &config->geo;
	u64 autoclear = be64_to_cpu(h->autoclear_features);
	struct qcow2_geometry geo;
	enum qcow2_fault fault;
	bool backing;

	fault = qcow2_header_check(h, read_only, &geo);
	if (fault)
		return qcow2_fault_str(fault);
	if (geo.ext_l2 != want->ext_l2)
		return geo.ext_l2 ? "image has extended L2 entries: extended_l2 is needed" :
				    "extended_l2 is given, but the image has standard L2 entries";
	/* An empty name is none. */
	backing = h->backing_file_offset && h->backing_file_size;
	if (backing != config->backing)
		return config->backing ? "backing_dev is given, but the image has no backing file" :
					 "image has a backing file: backing_dev is needed";
	if (geo.cluster_bits != want->cluster_bits)
		return "cluster_bits differ from the image's header";
	if (geo.size != want->size)
		return "length differs from the virtual size in the image's header";
	if (geo.l1_offset != want->l1_offset)
		return "L1 table offset differs from the image's header";
	if (geo.l1_entries != want->l1_entries)
		return "number of L1 entries differs from the image's header";
	if (geo.reftable_offset != want->reftable_offset)
		return "refcount table offset differs from the image's header";
	if (geo.reftable_clusters != want->reftable_clusters)
		return "refcount table clusters differ from the image's header";
	if (geo.refcount_order != want->refcount_order)
		return "refcount order differs from the image's header";
	if (!!(autoclear & QCOW2_AUTOCLEAR_RAW_DATA) != config->raw)
		return config->raw ? "data_file_raw is given, but the image has not the raw bit" :
				     "image has the raw bit: data_file_raw is needed";
	if (!read_only && (autoclear & ~QCOW2_AUTOCLEAR_KNOWN))
		return "unknown autoclear bits are set: use qcow2setup, or read_only";
	return NULL;
}

int qcow2_header_compare(struct qcow2_mdio *io,
			 const struct qcow2_config *config, bool read_only,
			 char **error)
{
	const char *cause;
	void *buf;
	int r;

	buf = kmalloc(io->block_bytes, GFP_NOIO);
	if (!buf) {
		*error = "Cannot allocate memory for the header";
		return -ENOMEM;
	}
	r = qcow2_mdio_rw(io, REQ_OP_READ, 0, buf, io->block_bytes);
	if (r) {
		*error = "Cannot read the image's header";
	} else {
		cause = qcow2_header_differs(config, read_only, buf);
		if (cause) {
			*error = (char *)cause;
			r = -EINVAL;
		}
	}
	kfree(buf);
	return r;
}

int qcow2_header_set_corrupt(struct qcow2_mdio *io)
{
	unsigned int len = bdev_logical_block_size(io->bdev);
	struct qcow2_header *h;
	int r;

	h = qcow2_mdio_get_block(io, true);
	r = qcow2_mdio_rw(io, REQ_OP_READ, 0, h, len);
	/* Whatever lies there now, it is not ours to change. */
	if (!r && h->magic != cpu_to_be32(QCOW2_MAGIC))
		r = -EUCLEAN;
	if (!r) {
		h->incompatible_features |= cpu_to_be64(QCOW2_INCOMPAT_CORRUPT);
		r = qcow2_mdio_rw(io, REQ_OP_WRITE | REQ_FUA, 0, h, len);
	}
	qcow2_mdio_put_block(io, h);
	return r;
}
