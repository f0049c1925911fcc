/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What systemd has to know of a line of qcow2tab, as text. */
#ifndef QCOW2SETUP_UNITS_H
#define QCOW2SETUP_UNITS_H

#include <stdio.h>

#include "lib/tab.h"

/* "qcow2setup@NAME.service" and the like: four bytes for one, and the rest */
#define UNIT_NAME_SIZE	(4 * 4096 + 64)

/* The service of a line, the device that it makes, and the target that it is part of. */
void unit_service(char *out, size_t size, const struct tab_entry *e);
void unit_device(char *out, size_t size, const struct tab_entry *e);
const char *unit_target(const struct tab_entry *e);

/* The part of the service that is of this line alone; @tab: the file that it is in. */
void unit_write(FILE *f, const char *tab, const struct tab_entry *e);

/*
 * Call @fn with the unit of each block device that the line needs.  Returns what @fn
 * does if that is not 0, else 0.
 */
int unit_each_device(const struct tab_entry *e, int (*fn)(const char *unit, void *arg),
		     void *arg);

#endif
