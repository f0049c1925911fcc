/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The image's header: it has to agree with the table, and it can be marked
 * corrupt.
 */
#ifndef DM_QCOW2_HEADER_H
#define DM_QCOW2_HEADER_H

#include "format.h"
#include "mdio.h"

/* What the table line says about the image. */
struct qcow2_config {
	struct qcow2_geometry geo;	/* checked with qcow2_geometry_check() */
	bool raw;			/* data_file_raw */
	bool backing;			/* there is a backing device */
	bool read_only;			/* nothing is written */
};

/**
 * qcow2_header_compare() - compare the header on disk with the table
 * @io: the metadata device
 * @config: from the table line
 * @read_only: the image will not be written, so that it may be corrupt or dirty
 * @error: set to the cause on failure
 *
 * Returns 0, -EINVAL if they do not agree, or another negative errno.  Process
 * context; may run while another table for the same device is live.
 */
int qcow2_header_compare(struct qcow2_mdio *io,
			 const struct qcow2_config *config, bool read_only,
			 char **error);

/*
 * Set the corrupt bit, durably: one write of a sector.  Needs a writer's @io.
 * Returns 0 or a negative errno, -EUCLEAN if there is no header.  Process context.
 */
int qcow2_header_set_corrupt(struct qcow2_mdio *io);

#endif /* DM_QCOW2_HEADER_H */
