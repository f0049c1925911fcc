// SPDX-License-Identifier: GPL-2.0-or-later
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mapping.h"
#include "util.h"

bool plain_path(const struct span *name, const char **why)
{
	size_t i;

	*why = NULL;
	if (!name->len)
		*why = "empty";
	else if (name->len >= PATH_MAX)
		*why = "longer than a path can be";
	else if (memchr(name->s, 0, name->len))
		*why = "no string";
	/* "json:{...}", "nbd://..." and the like, as QEMU tells them apart */
	for (i = 0; !*why && i < name->len && name->s[i] != '/'; i++)
		if (name->s[i] == ':')
			*why = "a protocol and not a path";
	return !*why;
}

/* The folder that @path is in; relative names in an image start there. */
static int open_folder_of(const char *path)
{
	const char *slash = strrchr(path, '/');
	char *dir;
	int fd;

	if (!slash)
		return open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	dir = strndup(path, slash - path + 1);
	if (!dir)
		return -1;
	fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	free(dir);
	return fd;
}

static int open_recorded(struct mapping *m, const struct options *opt, int dir)
{
	const struct span *name = &m->img.h.data_file;
	const char *path = m->img.node.path, *why;

	if (!opt->trust_image_paths && name->s)
		return fail(EX_PARAMETER,
			    "%s: the data file is not named; give --data-file (the image says %s), or --trust-image-paths",
			    esc(path), escn(name->s, name->len));
	if (!name->s)
		return fail(EX_PARAMETER,
			    "%s: the data file is not named, nor does the image name one; give --data-file DEV|FILE",
			    esc(path));
	if (!plain_path(name, &why))
		return fail(EX_WRONG,
			    "%s: the data file that the image names (%s) is %s; give --data-file DEV|FILE",
			    esc(path), escn(name->s, name->len), why);
	m->data_path = strndup(name->s, name->len);
	if (!m->data_path)
		return fail_nomem();
	return node_open(&m->data, dir, m->data_path,
			 NODE_NOFOLLOW | (opt->read_only ? NODE_READ_ONLY : 0));
}

static int open_data(struct mapping *m, const struct options *opt, int dir)
{
	const struct node *image = &m->img.node;
	int ret;

	if (opt->data_file)
		ret = node_open(&m->data, AT_FDCWD, opt->data_file,
				opt->read_only ? NODE_READ_ONLY : 0);
	else
		ret = open_recorded(m, opt, dir);
	if (ret)
		return ret;
	if (node_same(image, &m->data))
		return fail(EX_WRONG,
			    "%s: image and data are the same file or device; give the data file of the image with --data-file",
			    esc(m->data.path));
	ret = node_lock(&m->data, !opt->read_only);
	if (!ret)
		ret = node_check_unused(&m->data, !opt->read_only);
	return ret;
}

static int check_data(const struct mapping *m)
{
	const struct node *data = &m->data;
	uint64_t size = m->img.geo.size;

	if (data->size >= size)
		return 0;
	if (data->bdev)
		return fail(EX_WRONG,
			    "%s: data device has %llu bytes, the image needs %llu; enlarge the device",
			    esc(data->path), (unsigned long long)data->size,
			    (unsigned long long)size);
	return fail(EX_WRONG,
		    "%s: data file has %llu bytes, the image needs %llu; enlarge it with truncate -s %llu",
		    esc(data->path), (unsigned long long)data->size,
		    (unsigned long long)size, (unsigned long long)size);
}

int mapping_open(struct mapping *m, const struct options *opt, const char *path)
{
	struct reasons reasons;
	struct node node;
	int dir, ret;

	*m = (struct mapping)MAPPING_CLOSED;
	dir = open_folder_of(path);
	ret = node_open(&node, AT_FDCWD, path,
			opt->read_only ? NODE_READ_ONLY : 0);
	/* Nothing is read before the lock, so that nothing read is stale. */
	if (!ret)
		ret = node_lock(&node, !opt->read_only);
	if (!ret)
		ret = node_check_unused(&node, !opt->read_only);
	if (ret) {
		node_close(&node);
		goto out;
	}
	ret = image_attach(&m->img, &node);
	if (ret)
		goto out;
	image_reasons(&m->img, opt->read_only, &reasons);
	if (reasons.n) {
		ret = fail(EX_WRONG, "%s: %s; %s", esc(path),
			   reasons.r[0].cause, reasons.r[0].remedy);
		goto out;
	}
	ret = open_data(m, opt, dir);
	if (!ret)
		ret = check_data(m);
	if (!ret)
		ret = image_load_tables(&m->img, !opt->read_only);
out:
	if (dir >= 0)
		close(dir);
	return ret;
}

void mapping_close(struct mapping *m)
{
	image_close(&m->img);
	node_close(&m->data);
	free(m->data_path);
	m->data_path = NULL;
}

bool mapping_raw(const struct mapping *m)
{
	return m->img.h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA;
}
