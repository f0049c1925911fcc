/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Reports of devices in the text format of Prometheus.  Pure code. */
#ifndef QCOW2SETUP_METRICS_H
#define QCOW2SETUP_METRICS_H

#include <stdio.h>

#include "stack/report.h"

/*
 * All metrics of @n devices, with what they mean; those that are gone are left out.  @all:
 * these are all that there are, so their number is told.
 */
void metrics_print(FILE *f, const struct report *r, size_t n, bool all);

#endif
