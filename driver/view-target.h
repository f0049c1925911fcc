/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The target "qcow2-view": reads what a view shows.
 */
#ifndef DM_QCOW2_VIEW_TARGET_H
#define DM_QCOW2_VIEW_TARGET_H

struct target_type;

extern struct target_type qcow2_view_target;

#endif /* DM_QCOW2_VIEW_TARGET_H */
