/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /etc/qcow2tab as a file. */
#ifndef QCOW2SETUP_TABFILE_H
#define QCOW2SETUP_TABFILE_H

#include "lib/tab.h"

/* TAB_FILE, or what the environment says in QCOW2TAB */
const char *tab_file(void);

/*
 * Read and parse it; see tab_parse().  If there is no such file, there are no lines.
 * Prints why it failed, and returns an exit code; tab_free() is due if that is 0.
 */
int tab_load(struct tab *t, tab_wrong_fn *wrong, void *arg);

#endif
