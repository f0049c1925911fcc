/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Copy pieces of files or devices to another one, at the same offsets, several at a time.
 */
#ifndef QCOW2SETUP_COPIER_H
#define QCOW2SETUP_COPIER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define COPIER_THREADS	8
#define COPIER_BYTES	(1U << 20)	/* of one request */

struct copier_piece {
	uint64_t start;
	uint32_t length;		/* 0: none */
	int from;			/* that it is read from */
	bool zero;			/* it reads as zeros: nothing need be read */
};

struct copier {
	/* Constant */
	int to;
	bool device;			/* the target is a block device */
	bool fresh;			/* the target reads as zeros where nothing was written */
	bool compare;			/* read both, write nothing */

	pthread_t thread[COPIER_THREADS];
	unsigned int threads;
	pthread_mutex_t lock;		/* of the rest */
	pthread_cond_t change;
	struct copier_piece next;	/* for who comes first */
	struct copier_piece at[COPIER_THREADS];	/* what they work on */
	bool over;			/* nothing comes any more, or it shall end */
	uint64_t done;			/* bytes */
	/* The first thing that went wrong */
	int error;			/* errno; 0: nothing */
	bool reading, differs;
	uint64_t where;
};

/* After the constant fields have been set.  0, or -errno. */
int copier_start(struct copier *c);
/*
 * Hand on a piece of at most COPIER_BYTES; waits @ms milliseconds at most until somebody takes it.
 * 1: taken, 0: not yet, -1: something has gone wrong.
 */
int copier_add(struct copier *c, const struct copier_piece *p, unsigned int ms);
/* Bytes that have been done */
uint64_t copier_done(struct copier *c);
/* All up to here has been done, of what was handed on in order of its offsets. */
uint64_t copier_reached(struct copier *c, uint64_t next);
/* Wait for all that has been handed on, or for nothing more if @stop; all threads are gone then. */
void copier_finish(struct copier *c, bool stop);

#endif
