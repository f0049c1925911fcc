// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/image.h"
#include "image/make.h"
#include "lib/util.h"
#include "stack/clone.h"
#include "stack/mapping.h"
#include "system/device.h"
#include "system/loop.h"

#define CLUSTER_BITS	16

/* As long as it can be, so that a suffix still fits. */
static bool fits(int len)
{
	return len < PATH_MAX - (int)sizeof(CLONE_RESET);
}

int clone_names(struct clone *c, const char *dir, const char *name)
{
	char full[PATH_MAX];

	*c = (struct clone){ .image_made = false };
	if (!realpath(dir, full))
		return errno == ENOENT ?
		       fail(EX_WRONG, "%s: no such folder; create it, or check the name",
			    esc(dir)) :
		       fail_errno("%s: cannot open the folder", esc(dir));
	if (fits(snprintf(c->image, PATH_MAX, "%s/%s.qcow2", full, name)) &&
	    fits(snprintf(c->data, PATH_MAX, "%s/%s.data", full, name)))
		return 0;
	return fail(EX_WRONG, "%s: name is too long; choose another folder",
		    esc(dir));
}

static int make_file(const char *path, int *fd, ino_t *ino)
{
	struct stat st;

	*fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW,
		   0600);
	if (*fd < 0 && errno == EEXIST)
		return fail(EX_BUSY,
			    "%s: exists; open it as before (qcow2setup open), remove it, or choose another name",
			    esc(path));
	if (*fd < 0 || fstat(*fd, &st))
		return fail_errno("%s: cannot create it", esc(path));
	*ino = st.st_ino;
	return 0;
}

/* The name that it is to have in the end; false if it has it. */
/* Where it begins, or NULL */
static const char *find_suffix(const char *path)
{
	size_t n = strlen(path), len = sizeof(CLONE_RESET) - 1;

	return n > len && !strcmp(path + n - len, CLONE_RESET) ? path + n - len : NULL;
}

static bool cut_suffix(char *path)
{
	const char *suffix = find_suffix(path);

	if (suffix)
		path[suffix - path] = 0;
	return suffix;
}

static int write_image(const struct clone *c, int fd,
		       const struct clone_base *base)
{
	char data[PATH_MAX];
	const struct header_clone mark = {
		.image_ino = cpu_to_be64(c->image_ino),
		.data_ino = cpu_to_be64(c->data_ino),
	};
	struct new_image n = {
		.g = {
			.size = base->size, .cluster_bits = CLUSTER_BITS,
			.refcount_order = 4,
		},
		.path = c->image, .fd = fd, .fresh = true,
		.data_file = data,
		.backing = base->name, .backing_format = base->format,
		.clone = &mark,
	};
	uint8_t *header;
	int ret;

	/* In full: QEMU looks for another one in the folder that it is started in. */
	snprintf(data, sizeof(data), "%s", c->data);
	cut_suffix(data);
	if (!plan_new(&n.g, false, &n.p))
		return fail(EX_WRONG, "%s: %s is more than a clone can have; give a smaller --size",
			    esc(c->image), human_size(base->size));
	plan_place(&n.g, &n.p);
	header = calloc(1, 1UL << CLUSTER_BITS);
	if (!header)
		return fail_nomem();
	n.dir = open_folder_of(c->image);
	/* What can be made durable is not what can only be named. */
	if (n.dir >= 0) {
		int dir = openat(n.dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		close(n.dir);
		n.dir = dir;
	}
	if (!new_image_header(&n, header))
		ret = fail(EX_WRONG, "%s: name is too long for a header; use a shorter path",
			   esc(base->name));
	else
		ret = new_image_write(&n, header);
	if (n.dir >= 0)
		close(n.dir);
	free(header);
	return ret;
}

int clone_make(struct clone *c, const struct clone_base *base)
{
	int image = -1, data = -1, ret;

	ret = make_file(c->data, &data, &c->data_ino);
	c->data_made = data >= 0;
	if (!ret)
		ret = make_file(c->image, &image, &c->image_ino);
	c->image_made = image >= 0;
	if (!ret && ftruncate(data, base->size))
		ret = fail_errno("%s: cannot be made %s long", esc(c->data),
				 human_size(base->size));
	if (!ret)
		ret = write_image(c, image, base);
	if (image >= 0)
		close(image);
	if (data >= 0)
		close(data);
	if (ret)
		clone_unmake(c);
	return ret;
}

static void unmake(const char *path, bool *made)
{
	if (*made && unlink(path) && errno != ENOENT)
		warning("%s: cannot be removed: %s", esc(path), strerror(errno));
	*made = false;
}

void clone_unmake(struct clone *c)
{
	/* Without its image the data is nothing. */
	unmake(c->image, &c->image_made);
	unmake(c->data, &c->data_made);
}

/* Is @path a regular file of that number?  @ino 0: of any; it is set. */
static bool is_file(const char *path, ino_t *ino)
{
	struct stat st;

	if (lstat(path, &st) || !S_ISREG(st.st_mode) ||
	    (*ino && st.st_ino != *ino))
		return false;
	*ino = st.st_ino;
	return true;
}

/* Does the image at c->image say that it, and the data file, are these? */
static bool is_marked(struct clone *c)
{
	uint8_t *first = malloc(1UL << CLUSTER_BITS);
	struct header h = { .clone = false };
	int fd = open(c->image, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	ssize_t n = -1;
	bool marked;

	if (fd >= 0 && first)
		n = pread(fd, first, 1UL << CLUSTER_BITS, 0);
	marked = n > 0 && header_parse(first, n, &h) == HEADER_OK && h.clone &&
		 h.clone_image == c->image_ino && h.clone_data == c->data_ino;
	if (fd >= 0)
		close(fd);
	free(first);
	return marked;
}

/* The file that a loop device of ours shows, by the name that it has now. */
static bool file_of(const char *number, char *path, ino_t *ino)
{
	struct loop_view v;
	struct device d;

	if (!device_look_up(number, &d) || !d.loop || !d.ours || !*d.file ||
	    !loop_look_at(d.kernel_name, &v) ||
	    !fits(snprintf(path, PATH_MAX, "%s", d.file)))
		return false;
	*ino = v.ino;
	return is_file(path, ino);
}

/* Both names without the suffix; false if neither had it. */
static bool final_names(struct clone *c)
{
	bool cut = cut_suffix(c->image);

	return cut_suffix(c->data) || cut;
}

/* May what has the names of @c be replaced: is it a clone, or part of one that is gone? */
static bool may_replace(const struct clone *c)
{
	struct clone old = *c;

	old.image_ino = 0;
	old.data_ino = 0;
	if (!is_file(old.image, &old.image_ino))
		return access(old.image, F_OK) && access(old.data, F_OK);
	return is_file(old.data, &old.data_ino) && is_marked(&old);
}

bool clone_needs_names(const char *image, const char *data)
{
	return find_suffix(image) || find_suffix(data);
}

bool clone_find(struct clone *c, const char *metadata_dev, const char *data_dev)
{
	struct clone plain;

	*c = (struct clone){ .image_made = false };
	if (!file_of(metadata_dev, c->image, &c->image_ino) ||
	    !file_of(data_dev, c->data, &c->data_ino) || !is_marked(c))
		return false;
	plain = *c;
	if (!final_names(&plain))
		return true;
	/* Killed between the two: the image is there already, and is the right one. */
	if (!strcmp(plain.image, c->image) || may_replace(&plain)) {
		if (clone_rename(c, &plain))
			return false;
		*c = plain;
	}
	return true;
}

/* The header, which makes it an image, is what is written last. */
static bool is_unfinished(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	uint8_t buf[4096];
	ssize_t n = -1;

	if (fd >= 0) {
		n = pread(fd, buf, sizeof(buf), 0);
		close(fd);
	}
	return n >= 0 && all_zero(buf, n);
}

void clone_sweep(const struct clone *c)
{
	struct clone left = *c;
	struct stat st;

	strcat(left.image, CLONE_RESET);
	strcat(left.data, CLONE_RESET);
	left.image_ino = 0;
	left.data_ino = 0;
	if (is_file(left.image, &left.image_ino))
		left.image_made = (is_file(left.data, &left.data_ino) &&
				   is_marked(&left)) || is_unfinished(left.image);
	/* Without an image, or one that is finished, nothing was written there. */
	left.data_made = (left.image_made && is_marked(&left)) ||
			 ((left.image_made || access(left.image, F_OK)) &&
			  !lstat(left.data, &st) && S_ISREG(st.st_mode) &&
			  !st.st_blocks);
	clone_unmake(&left);
}

int clone_delete(const struct clone *c)
{
	struct clone x = *c;

	clone_sweep(c);
	if (!is_file(x.image, &x.image_ino) || !is_file(x.data, &x.data_ino) ||
	    !is_marked(&x))
		return fail(EX_WRONG,
			    "%s: is not what clone has made any more; remove it, and %s, if that is what you want",
			    esc(x.image), esc(x.data));
	if (unlink(x.image) || unlink(x.data))
		return fail_errno("%s: cannot be removed", esc(x.image));
	return 0;
}

static int rename_one(const char *from, const char *to)
{
	if (!strcmp(from, to) || !rename(from, to))
		return 0;
	return fail_errno("%s: cannot get the name %s", esc(from), esc(to));
}

int clone_rename(const struct clone *fresh, const struct clone *c)
{
	int ret, dir;

	/* First the image: its clusters are all unallocated, whatever is in the data. */
	ret = rename_one(fresh->image, c->image);
	if (!ret)
		ret = rename_one(fresh->data, c->data);
	dir = open_folder_of(c->image);
	if (dir >= 0) {
		int sync = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		if (sync >= 0 && fsync(sync))
			note("%s: %s", esc(c->image), strerror(errno));
		if (sync >= 0)
			close(sync);
		close(dir);
	}
	return ret;
}
