/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who has an image open, and what that means for others.  Looks only. */
#ifndef QCOW2SETUP_USERS_H
#define QCOW2SETUP_USERS_H

#include <stdbool.h>
#include <sys/types.h>

#include "lib/json.h"
#include "system/node.h"

enum user_kind {
	USER_QCOW2,		/* one of our devices */
	USER_DEVICE,		/* another one of device-mapper's, or of md's ... */
	USER_LOOP,		/* a loop device that no other device uses */
	USER_PROCESS,
	USER_MOUNT,		/* it is mounted */
	USER_SWAP,
};

struct user {
	enum user_kind kind;
	char name[160];		/* of the device, as users know it; of the program */
	char on[160];		/* the loop device that is between; where it is mounted */
	pid_t pid;
	bool reads;		/* and does not write */
};

#define MAX_USERS	16

struct users {
	struct user u[MAX_USERS];
	unsigned int n;		/* of these */
	unsigned int more;	/* not listed */
	bool locked_write;	/* QEMU's locks: it cannot be opened to be written */
	bool locked_read;	/* not even to be read */
};

/*
 * Find those who have the file or device @node, other than this program.  Needs no
 * privilege, but sees of others' processes only what it may see.
 */
void users_find(const struct node *node, struct users *users);
/*
 * The same for a block device by its number, which is not opened; @path: its name, by which
 * swap is ended.  Of locks nothing is known.
 */
void users_find_device(dev_t rdev, const char *path, struct users *users);

/* Could it be opened now, by open or by another? */
bool users_let_write(const struct users *users);
bool users_let_read(const struct users *users);

/* One of them as a phrase, with the way to end its use; a static buffer. */
const char *user_phrase(const struct user *user);
/* One of them in a few words; a static buffer. */
const char *user_text(const struct user *user);
/* All of them, as the array "users" of an object. */
void users_json(struct json *j, const struct users *users);

#endif
