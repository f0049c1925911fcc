/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that this module builds for.  The code is
 * written to the newest interface; this is the only file that looks at
 * versions or at features of the kernel's headers.
 */
#ifndef DM_QCOW2_COMPAT_H
#define DM_QCOW2_COMPAT_H

#include <linux/blkdev.h>
#include <linux/device-mapper.h>

/* 6.5 renamed the open modes of block devices */
#ifndef BLK_OPEN_READ
#define blk_mode_t	fmode_t
#define BLK_OPEN_READ	FMODE_READ
#define BLK_OPEN_WRITE	FMODE_WRITE
#endif

#endif /* DM_QCOW2_COMPAT_H */
