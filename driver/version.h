/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The version of the project: of the module, of the tool and of the packages.
 * Makefiles read it from this line; what cannot (dkms.conf, debian/changelog,
 * rpm/dm-qcow2.spec, CHANGELOG.md) is compared with it by "make lint".  The
 * target's own version, for those who talk to it, is another one: that in
 * target.c.
 */
#ifndef DM_QCOW2_VERSION_H
#define DM_QCOW2_VERSION_H

#define DM_QCOW2_VERSION "0.1.0"

#endif
