/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How far something is that takes long: on a terminal only, on stderr, from the
 * second on after it began.
 */
#ifndef QCOW2SETUP_PROGRESS_H
#define QCOW2SETUP_PROGRESS_H

#include <stdint.h>

/*
 * Bytes of something that is being done, the first time at its begin.  Not while a
 * device is suspended: a terminal can be stopped.
 */
void progress(const char *what, uint64_t done, uint64_t total);
/* Leaves nothing on the terminal; before anything else is said. */
void progress_end(void);

#endif
