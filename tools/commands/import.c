// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup import: any image that qemu-img reads becomes a raw disk, in a new file or on
 * a device.  qemu-img does the copying; what it is given is decided here.
 *
 * A format that was found by looking is the word of whoever wrote the image, which for a raw
 * disk is its guest.  It is taken only if nothing but the image itself is read then.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/progress.h"
#include "lib/util.h"
#include "stack/copying.h"
#include "system/program.h"

/* Of images that can be read by themselves, as qemu-img calls them */
static const char *const alone[] = {
	"raw", "qcow2", "vdi", "vhdx", "vpc", "qed", "qcow", "bochs", "cloop", "dmg",
	"parallels", "luks", NULL
};

struct import {
	const char *source;
	char *name;			/* as qemu-img is given it */
	char format[32];
	struct copying c;
	struct progress progress;
	bool compare;
};

/* "nbd://HOST", and not the name of a file */
static bool is_protocol(const char *s)
{
	size_t n = strcspn(s, ":/");

	return s[n] == ':' && access(s, F_OK);
}

/* A name that is neither an option nor a protocol */
static char *plain_name(const char *path)
{
	char *name;

	if (*path == '/' || is_protocol(path))
		return strdup(path);
	return asprintf(&name, "./%s", path) < 0 ? NULL : name;
}

/* Other files that it names: a header of ours is parsed here, and by nobody else. */
static int check_qcow2(const struct import *i, const struct node *node, bool trust)
{
	struct image img;
	int ret;

	ret = image_attach(&img, node);
	if (!ret && !trust &&
	    (img.h.backing_file.s || img.h.data_file.s ||
	     img.h.incompatible & QCOW2_INCOMPAT_DATA_FILE))
		ret = fail(EX_WRONG,
			   "%s: names other files, which would be read; use --trust-image-paths if they are the right ones",
			   esc(i->source));
	img.node.fd = -1;
	image_close(&img);
	return ret;
}

/* One line of "qemu-img info"; the name is ours, so that no line is somebody else's. */
static void found_format(const char *line, void *arg)
{
	struct import *i = arg;

	if (starts_with(line, "file format: ") && !*i->format)
		snprintf(i->format, sizeof(i->format), "%s", line + 13);
}

static int find_format(struct import *i, const struct node *node)
{
	char fd[32], why[512];
	const char *argv[] = { "qemu-img", "info", "-U", "--", fd, NULL };
	size_t k;
	int ret;

	snprintf(fd, sizeof(fd), "/dev/fd/%d", node->fd);
	ret = program_run(argv, node->fd, -1, found_format, i, why, sizeof(why));
	if (ret < 0)
		return fail(EX_WRONG, "%s", why);
	for (k = 0; *i->format && alone[k] && strcmp(alone[k], i->format); k++)
		;
	if (!ret && *i->format && alone[k])
		return 0;
	return fail(EX_WRONG,
		    "%s: its format (%s) can mean that other files are read, and is not guessed; give --format",
		    esc(i->source), *i->format ? esc(i->format) : "unknown");
}

/* Sets i->format and i->name. */
static int look_at_source(struct import *i, const struct options *opt)
{
	struct node node = NODE_CLOSED;
	int ret;

	i->name = plain_name(i->source);
	if (!i->name)
		return fail_nomem();
	if (opt->format)
		snprintf(i->format, sizeof(i->format), "%s", opt->format);
	if (is_protocol(i->source))
		return opt->format ? 0 :
		       fail(EX_PARAMETER,
			    "%s: the format of what others serve is not guessed; give --format raw, or what it is",
			    esc(i->source));
	ret = node_open(&node, AT_FDCWD, i->source, NODE_READ_ONLY);
	if (!ret && !opt->format && image_has_magic(&node))
		snprintf(i->format, sizeof(i->format), "qcow2");
	/* A guest can write such a header into its own disk, but nothing is followed from there. */
	if (!ret && !strcmp(i->format, "qcow2"))
		ret = check_qcow2(i, &node, opt->trust_image_paths);
	if (!ret && !*i->format)
		ret = find_format(i, &node);
	node_close(&node);
	return ret;
}

/* Of the disk, in the words of "qemu-img measure" */
static void found_size(const char *line, void *arg)
{
	struct import *i = arg;

	if (starts_with(line, "fully allocated size: "))
		parse_u64(line + 22, &i->c.size);
}

static int find_size(struct import *i)
{
	const char *argv[] = { "qemu-img", "measure", "-f", i->format, "-O", "raw",
			       i->name, NULL };
	char why[512];
	int ret;

	ret = program_run(argv, -1, -1, found_size, i, why, sizeof(why));
	if (!ret && i->c.size)
		return 0;
	if (ret < 0)
		return fail(EX_WRONG, "%s", why);
	return fail(EX_WRONG, "%s: cannot be read as an image of format %s: %s; check --format, and who has it open",
		    esc(i->source), esc(i->format), *why ? why : "it is empty");
}

/* "    (12.34/100%)" */
static void copied(const char *line, void *arg)
{
	struct import *i = arg;
	const char *s = strchr(line, '(');
	double part = s ? strtod(s + 1, NULL) : 0;

	if (s && part >= 0 && part <= 100)
		progress_at(&i->progress, i->c.size * (part / 100));
}

static int went_wrong(struct import *i, int ret, const char *why)
{
	if (interrupted())
		return EX_WRONG;
	if (i->compare && ret == 1)
		return fail(EX_WRONG,
			    "%s: differs from %s; do not use it, and import it to another place",
			    esc(i->c.target), esc(i->source));
	return fail(EX_WRONG, "%s: cannot be %s: %s; free some space, or see dmesg",
		    esc(i->c.target), i->compare ? "compared" : "written", why);
}

static int run_qemu(struct import *i, const char *const *argv, bool compare)
{
	char why[512];
	int ret;

	i->compare = compare;
	progress_begin(&i->progress, compare ? "compare" : "import", i->c.size,
		       i->c.json);
	ret = program_run(argv, i->c.to.fd, i->c.to.fd, copied, i, why,
			  sizeof(why));
	progress_finish(&i->progress, !ret);
	return ret ? went_wrong(i, ret, why) : 0;
}

static int copy(struct import *i)
{
	char to[32];
	const char *argv[] = {
		"qemu-img", "convert", "-p", "-n", "-W", "-m", "8",
		"-f", i->format, "-O", "raw", i->name, to, NULL, NULL
	};
	int ret;

	snprintf(to, sizeof(to), "/dev/fd/%d", i->c.to.fd);
	/* What is not written of a new file is a hole. */
	if (i->c.fresh) {
		memmove(argv + 4, argv + 3, sizeof(argv) - 4 * sizeof(*argv));
		argv[3] = "--target-is-zero";
	}
	ret = run_qemu(i, argv, false);
	if (!ret && fsync(i->c.to.fd))
		ret = fail_errno("%s: cannot write it", esc(i->c.target));
	return ret;
}

static int verify(struct import *i)
{
	char to[160];
	/* A device may be longer; what is behind the disk is not looked at. */
	const char *argv[] = {
		"qemu-img", "compare", "-p", "-U", "-f", i->format, i->name, to, NULL
	};

	snprintf(to, sizeof(to),
		 "json:{\"driver\":\"raw\",\"size\":%llu,\"file\":{\"driver\":\"%s\",\"filename\":\"/dev/fd/%d\"}}",
		 (unsigned long long)i->c.size,
		 i->c.to.bdev ? "host_device" : "file", i->c.to.fd);
	/* From the disk, not from memory */
	posix_fadvise(i->c.to.fd, 0, 0, POSIX_FADV_DONTNEED);
	return run_qemu(i, argv, true);
}

/* It was looked at under a lock; qemu-img takes its own. */
static int unlock_target(struct import *i)
{
	int fd = reopen(i->c.to.fd, O_RDWR);

	if (fd < 0)
		return fail_errno("%s: cannot open it", esc(i->c.target));
	close(i->c.to.fd);
	i->c.to.fd = fd;
	/* qemu-img inherits it. */
	return fcntl(fd, F_SETFD, 0) ? fail_errno("%s: cannot open it", esc(i->c.target)) : 0;
}

int cmd_import(const struct options *opt, char **args)
{
	struct import i = {
		.source = args[0],
		.c = {
			.source = args[0], .target = args[1],
			.json = opt->json,
			.overwrite_device = opt->overwrite_device,
			.to = NODE_CLOSED,
		},
	};
	int ret;

	i.c.to.path = args[1];
	interrupt_catch();
	ret = look_at_source(&i, opt);
	if (!ret)
		ret = find_size(&i);
	if (!ret)
		ret = copying_open(&i.c);
	if (!ret)
		ret = unlock_target(&i);
	if (!ret)
		ret = copy(&i);
	if (!ret && opt->verify)
		ret = verify(&i);
	if (ret && i.c.fresh && unlink(args[1]))
		warning("%s: cannot remove the unfinished file: %s", esc(args[1]),
			strerror(errno));
	copying_close(&i.c);
	free(i.name);
	return interrupt_result(ret);
}
