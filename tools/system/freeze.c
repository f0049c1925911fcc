// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/freeze.h"

/* What is said while they rest must not have to wait for them. */
static int check_output(dev_t dev, const char *where)
{
	struct stat st;
	int fd;

	for (fd = STDOUT_FILENO; fd <= STDERR_FILENO; fd++)
		if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_dev == dev)
			return fail(EX_WRONG,
				    "%s: is to be frozen, and what this command says goes to a file there; put that elsewhere",
				    esc(where));
	return 0;
}

struct finding {
	struct freezer *f;
	dev_t below;
	int ret;
};

/* Another file system may be mounted over this one: its name stands for that then. */
static bool is_mount(int fd, unsigned long id)
{
	struct statx st;

	return !statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &st) &&
	       (!(st.stx_mask & STATX_MNT_ID) || st.stx_mnt_id == id);
}

static void found(dev_t rdev, unsigned long id, const char *where, void *arg)
{
	struct finding *x = arg;
	struct freezer *f = x->f;
	struct stat st;
	unsigned int i;
	int fd;

	if (x->ret || !device_is_above(rdev, x->below))
		return;
	fd = open(where, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0 || fstat(fd, &st)) {
		x->ret = fail_errno("%s: cannot open it to freeze its file system", esc(where));
		if (fd >= 0)
			close(fd);
		return;
	}
	if (!is_mount(fd, id)) {
		x->ret = fail(EX_WRONG,
			      "%s: another file system is mounted over the one to be frozen; unmount that, or leave --freeze out",
			      esc(where));
		close(fd);
		return;
	}
	/* A file system may be mounted more than once, or be above more of the devices. */
	for (i = 0; i < f->n; i++)
		if (f->fs[i].dev == st.st_dev) {
			close(fd);
			return;
		}
	x->ret = check_output(st.st_dev, where);
	if (!x->ret && f->n == FREEZE_MOST)
		x->ret = fail(EX_WRONG,
			      "more than %d file systems are to be frozen; do it with fsfreeze, and leave --freeze out",
			      FREEZE_MOST);
	if (!x->ret) {
		f->fs[f->n].where = strdup(where);
		if (!f->fs[f->n].where)
			x->ret = fail_nomem();
	}
	if (x->ret) {
		close(fd);
		return;
	}
	f->fs[f->n].fd = fd;
	f->fs[f->n].dev = st.st_dev;
	f->fs[f->n].rdev = rdev;
	f->fs[f->n++].frozen = false;
}

int freezer_find(struct freezer *f, dev_t rdev)
{
	struct finding x = { .f = f, .below = rdev };

	device_each_mount(found, &x);
	return x.ret;
}

int freezer_check(const struct freezer *f, dev_t rdev, const char *name)
{
	unsigned int i;

	for (i = 0; i < f->n; i++)
		if (rdev != f->fs[i].rdev && device_is_above(rdev, f->fs[i].rdev))
			return fail(EX_WRONG,
				    "%s: is on %s, and would wait for that when it is frozen; leave --freeze out, or back them up one after the other",
				    esc(name), esc(f->fs[i].where));
	return 0;
}

int freezer_start(struct freezer *f)
{
	return f->n ? keeper_start(&f->keeper) : 0;
}

static enum keeper_result undo_freeze(const void *data, size_t len)
{
	int fd;

	(void)len;
	memcpy(&fd, data, sizeof(fd));
	/* It may not have come to that. */
	if (!ioctl(fd, FITHAW, 0))
		warning("a command was killed, and a file system that it had frozen goes on");
	return KEEPER_GO_ON;
}

int freezer_freeze(struct freezer *f)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; !ret && i < f->n; i++) {
		ret = keeper_tell(&f->keeper, undo_freeze, &f->fs[i].fd,
				  sizeof(f->fs[i].fd));
		if (ret)
			break;
		if (!ioctl(f->fs[i].fd, FIFREEZE, 0))
			f->fs[i].frozen = true;
		else if (errno == EOPNOTSUPP)
			ret = fail(EX_WRONG,
				   "%s: its file system cannot be frozen; unmount it, or leave --freeze out",
				   esc(f->fs[i].where));
		else if (errno != EBUSY)
			ret = fail_errno("%s: cannot freeze its file system", esc(f->fs[i].where));
		if (!ret && interrupted())
			ret = EX_WRONG;
	}
	if (ret)
		freezer_thaw(f);
	return ret;
}

void freezer_thaw(struct freezer *f)
{
	unsigned int i;

	for (i = f->n; i > 0; i--) {
		if (!f->fs[i - 1].frozen)
			continue;
		f->fs[i - 1].frozen = false;
		/* Somebody else may have let it go on. */
		if (ioctl(f->fs[i - 1].fd, FITHAW, 0) && errno != EINVAL)
			warning("%s: stays frozen: %s; try fsfreeze --unfreeze %s",
				esc(f->fs[i - 1].where), strerror(errno),
				shell_quote(f->fs[i - 1].where));
	}
	keeper_dismiss(&f->keeper);
}

void freezer_close(struct freezer *f)
{
	unsigned int i;

	freezer_thaw(f);
	for (i = 0; i < f->n; i++) {
		close(f->fs[i].fd);
		free(f->fs[i].where);
	}
	f->n = 0;
}
