/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Other people's programs that do a part of the work. */
#ifndef QCOW2SETUP_PROGRAM_H
#define QCOW2SETUP_PROGRAM_H

#include <stddef.h>

/* A line of its output, which a carriage return ends, too */
typedef void program_line_fn(const char *line, void *arg);

/*
 * Run @argv, found in PATH, to its end: with SIGTERM, if this program is interrupted, and
 * also if it is killed.  It has no terminal to ask; of descriptors it inherits @fd1 and @fd2 (-1:
 * none), and output, which goes to @line.  Returns its exit status, or -1 if it could not be
 * run, or died; @why is what it said last, harmless to a terminal, or the reason.
 */
int program_run(const char *const *argv, int fd1, int fd2, program_line_fn *line,
		void *arg, char *why, size_t why_size);

#endif
