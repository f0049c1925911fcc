/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DM_QCOW2_MAP_BIO_H
#define DM_QCOW2_MAP_BIO_H

#include <linux/device-mapper.h>

/* The target's .map and .end_io: any request begins and ends there. */
int qcow2_map_bio(struct dm_target *ti, struct bio *bio);
int qcow2_end_bio(struct dm_target *ti, struct bio *bio, blk_status_t *error);

#endif /* DM_QCOW2_MAP_BIO_H */
