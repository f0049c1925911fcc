/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How far something is that takes long.  On a terminal it is drawn, on stderr, from the second
 * on after it began: bytes, share, rate, time left.  For programs there is a line of JSON on
 * stdout each second, and one at the end; else nothing.
 */
#ifndef QCOW2SETUP_PROGRESS_H
#define QCOW2SETUP_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct progress {
	const char *what;
	uint64_t total, done;		/* bytes */
	bool json;
	/* kept there */
	bool terminal;
	int width;			/* of what is drawn; 0: nothing */
	uint64_t begun, next;		/* milliseconds */
	/* Since when, and from where on, the rate is that of now */
	uint64_t since, since_done, rate;
};

/*
 * Not while a device is suspended: a terminal can be stopped.  @json: lines for programs, and
 * nothing is drawn.
 */
void progress_begin(struct progress *p, const char *what, uint64_t total,
		    bool json);
/* So many bytes more are done, and were not done now. */
void progress_skip(struct progress *p, uint64_t bytes);
/* It never goes back. */
void progress_at(struct progress *p, uint64_t done);
/* Leaves nothing on the terminal; before anything else is said.  @complete: it was all of it */
void progress_finish(struct progress *p, bool complete);

/*
 * The line for a terminal, at @now milliseconds: "copy: 1.0 GiB of 4.0 GiB (25%), 512.0 MiB/s,
 * 6 s left".  Pure; returns its length.
 */
int progress_text(const struct progress *p, uint64_t now, char *out, size_t size);

/* The same for what is one at a time, and begins with its first call */
void progress(const char *what, uint64_t done, uint64_t total);
void progress_end(void);

#endif
