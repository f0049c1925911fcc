/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A helper process for the time in which a device is suspended: whoever kills this
 * program then must not leave the device so.
 *
 * It is told, step by step and before each, what puts that step right again.  If
 * this program ends without keeper_dismiss(), it does what it was told, the last
 * first.  What it needs (descriptors, names) is there when it is started: it is a
 * fork.
 *
 * It has a session of its own, minds no signal, is the last one to be killed for
 * memory, and needs none that would have to be waited for.  What it has to say goes
 * to the kernel's log: nobody may be there to read anything else.
 */
#ifndef QCOW2SETUP_KEEPER_H
#define QCOW2SETUP_KEEPER_H

#include <stddef.h>
#include <sys/types.h>

struct keeper {
	int fd;
	pid_t pid;
};

#define KEEPER_NONE	{ .fd = -1 }

enum keeper_result {
	KEEPER_GO_ON,
	KEEPER_STOP,	/* what was told before is void: all has been done */
};

/*
 * Called in the helper, with a copy of what was told.  Must wait for nothing that
 * might not come.
 */
typedef enum keeper_result keeper_fn(const void *data, size_t len);

/*
 * Memory must not be waited for that only a write to the suspended device would
 * free: as far as the system lets us.
 */
void keeper_lock_memory(void);

/* The helper is ready when it returns 0; else it prints why, an exit code. */
int keeper_start(struct keeper *k);
/*
 * The helper has it when this returns 0; else as above.  Without a helper it does
 * nothing.
 */
int keeper_tell(struct keeper *k, keeper_fn *fn, const void *data, size_t len);
/* All is done, or undone; the helper is gone when it returns. */
void keeper_dismiss(struct keeper *k);

#endif
