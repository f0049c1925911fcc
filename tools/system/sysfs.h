/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_SYSFS_H
#define QCOW2SETUP_SYSFS_H

#include <stdbool.h>
#include <stddef.h>

/* First line of a file in sysfs, without newline; false if there is none. */
bool sysfs_read(char *buf, size_t size, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#endif
