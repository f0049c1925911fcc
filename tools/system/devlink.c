// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/devlink.h"

#define MAX_DEPTH	16
#define MAX_LINKS	16

/* Where a walk has come to: [0] is /, [1] is /dev, and so on down. */
struct walk {
	int fd[MAX_DEPTH];
	unsigned int depth;
	unsigned int links;
	char rest[2 * PATH_MAX];	/* of the name */
};

static bool roots_alone(const struct stat *st)
{
	return !st->st_uid && (S_ISLNK(st->st_mode) ||
			       !(st->st_mode & (S_IWGRP | S_IWOTH)));
}

/* Go up until @depth folders are left. */
static void climb(struct walk *w, unsigned int depth)
{
	while (w->depth > depth)
		close(w->fd[--w->depth]);
}

static int descend(struct walk *w, int fd)
{
	if (w->depth == MAX_DEPTH) {
		close(fd);
		return -ELOOP;
	}
	w->fd[w->depth++] = fd;
	return 0;
}

static int start(struct walk *w)
{
	int fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	struct stat st;

	if (fd < 0)
		return -errno;
	climb(w, 0);
	descend(w, fd);
	return fstat(fd, &st) ? -errno : roots_alone(&st) ? 0 : -ELOOP;
}

/* Put what a link says before the rest of the name. */
static int follow(struct walk *w, int fd)
{
	char target[sizeof(w->rest)];
	ssize_t n = readlinkat(fd, "", target, PATH_MAX);
	size_t rest = strlen(w->rest);

	if (n < 0)
		return -errno;
	if (!n || n + 1 + rest >= sizeof(target) || ++w->links > MAX_LINKS)
		return -ELOOP;
	target[n] = '/';
	memcpy(target + n + 1, w->rest, rest + 1);
	memcpy(w->rest, target, n + 1 + rest + 1);
	return *w->rest == '/' ? start(w) : 0;
}

/* Take the first part off the rest of the name; false if there is none. */
static bool next_part(struct walk *w, char *part, size_t size)
{
	const char *from = w->rest + strspn(w->rest, "/");
	size_t len = strcspn(from, "/");

	if (!len || len >= size)
		return false;
	memcpy(part, from, len);
	part[len] = 0;
	from += len;
	memmove(w->rest, from, strlen(from) + 1);
	return true;
}

/* One part further; > 0: the descriptor of the device that it ends with */
static int step(struct walk *w, const char *part)
{
	struct stat st;
	int fd, ret;

	if (!strcmp(part, "."))
		return 0;
	if (!strcmp(part, "..")) {
		climb(w, w->depth > 1 ? w->depth - 1 : 1);
		return 0;
	}
	if (w->depth == 1 && strcmp(part, "dev"))
		return -ELOOP;
	fd = openat(w->fd[w->depth - 1], part,
		    O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (fstat(fd, &st)) {
		ret = -errno;
	} else if (S_ISDIR(st.st_mode) && roots_alone(&st)) {
		return descend(w, fd);
	} else if (S_ISLNK(st.st_mode) && roots_alone(&st)) {
		ret = follow(w, fd);
	} else if (S_ISBLK(st.st_mode) && w->depth > 1 &&
		   !w->rest[strspn(w->rest, "/")]) {
		return fd;
	} else {
		ret = -ELOOP;
	}
	close(fd);
	return ret;
}

int devlink_find(const char *path)
{
	struct walk w = { .depth = 0 };
	char part[NAME_MAX + 1];
	int ret;

	if (*path != '/' || strlen(path) >= PATH_MAX)
		return -ELOOP;
	memcpy(w.rest, path, strlen(path) + 1);
	ret = start(&w);
	while (!ret)
		ret = next_part(&w, part, sizeof(part)) ? step(&w, part) :
							  -ELOOP;
	climb(&w, 0);
	return ret;
}
