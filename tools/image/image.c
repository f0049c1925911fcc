// SPDX-License-Identifier: GPL-2.0-or-later
/* Images are opened and closed; the header is all that is read. */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "image/image.h"
#include "lib/util.h"

size_t image_first_len(const struct node *node, uint64_t size)
{
	unsigned int bits = 0;
	struct qcow2_header raw;

	if (size >= sizeof(raw) && !node_read(node, &raw, sizeof(raw), 0) &&
	    be32_to_cpu(raw.magic) == QCOW2_MAGIC)
		bits = be32_to_cpu(raw.cluster_bits);
	if (bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
		bits = QCOW2_MIN_CLUSTER_BITS;
	return min_u64(size, 1ULL << bits);
}

bool image_has_magic(const struct node *node)
{
	__be32 magic;

	return !node_read(node, &magic, sizeof(magic), 0) &&
	       be32_to_cpu(magic) == QCOW2_MAGIC;
}

int image_attach(struct image *img, const struct node *node)
{
	enum header_fault fault;
	struct stat st;
	size_t len;
	int ret;

	*img = (struct image){ .node = *node, .space.fd = -1 };
	/* It may have grown between the time it was opened, and locked. */
	if (!node->bdev) {
		if (fstat(node->fd, &st))
			return fail_errno("%s: cannot stat it", esc(node->path));
		img->node.size = st.st_size;
		img->space.fd = node->fd;
		img->space.path = node->path;
	}
	len = image_first_len(node, img->node.size);
	/* never empty, so that NULL always means out of memory */
	img->first = malloc(len + 1);
	if (!img->first)
		return fail_nomem();
	ret = node_read(node, img->first, len, 0);
	if (ret) {
		errno = -ret;
		return fail_errno("%s: cannot read the header", esc(node->path));
	}
	fault = header_parse(img->first, len, &img->h);
	if (fault == HEADER_OK)
		return 0;
	if (fault == HEADER_MAGIC)
		return fail(EX_WRONG,
			    "%s: not a qcow2 image; check the name, or if it is a raw disk, make an image for it: qcow2setup create NEW --data-file %s --data-file-raw",
			    esc(node->path), shell_quote(node->path));
	/* The format before qcow2 has the same magic. */
	if (fault == HEADER_VERSION && img->h.version == 1)
		return fail(EX_WRONG,
			    "%s: a qcow image of version 1; make a qcow2 image of it: qemu-img convert -f qcow -O qcow2 -o data_file=FILE %s NEW",
			    esc(node->path), shell_quote(node->path));
	if (fault == HEADER_VERSION)
		return fail(EX_WRONG,
			    "%s: qcow2 version %u is not known; use the program that made it, or a newer qcow2setup",
			    esc(node->path), img->h.version);
	return fail(EX_WRONG, "%s: malformed image: %s; restore it from a backup",
		    esc(node->path), header_fault_str(fault));
}

int image_open(struct image *img, int dirfd, const char *path,
	       unsigned int node_flags)
{
	struct node node;
	int ret;

	*img = (struct image)IMAGE_CLOSED;
	ret = node_open(&node, dirfd, path, node_flags);
	if (ret) {
		node_close(&node);
		return ret;
	}
	return image_attach(img, &node);
}

int image_virtual_size(const struct node *node, uint64_t *size)
{
	struct image img;
	int ret = image_attach(&img, node);

	*size = img.h.size;
	img.node.fd = -1;
	image_close(&img);
	return ret;
}

void image_close(struct image *img)
{
	image_forget_changes(img);
	free(img->first);
	free(img->l1);
	free(img->reftable);
	free(img->bitmap_dir);
	space_free(&img->space);
	node_close(&img->node);
	*img = (struct image)IMAGE_CLOSED;
}
