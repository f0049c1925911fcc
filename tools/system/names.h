/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How devices are named, by which they and their kind are known again. */
#ifndef QCOW2SETUP_NAMES_H
#define QCOW2SETUP_NAMES_H

#define DM_TARGET		"qcow2"
#define DM_UUID_PREFIX		"QCOW2-"
/* Those of them that are the host's own: open --host */
#define DM_UUID_HOST_PREFIX	"QCOW2-HOST-"
/* Helpers that vanish with the device they serve. */
#define DM_UUID_TAIL_PREFIX	"QCOW2TAIL-"
#define DM_TAIL_SUFFIX		"-tail"
#define DM_BACKING_TAIL_SUFFIX	"-backing-tail"
/* Images that were opened for those above them, and go with the last of them. */
#define DM_BACKING_PREFIX	"qcow2-backing-"
/* So that name, prefix, a hash and a suffix fit the kernel's limits. */
#define DM_NAME_MAX		100

#endif
