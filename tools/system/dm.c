// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <libdevmapper.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/dm.h"

/* What libdevmapper said last; it goes into our own one-line message. */
static char dm_said[512];

static void dm_log(int level, const char *file, int line, int dm_errno,
		   const char *fmt, ...)
	__attribute__((format(printf, 5, 6)));

static void dm_log(int level, const char *file, int line, int dm_errno,
		   const char *fmt, ...)
{
	va_list ap;

	(void)file;
	(void)line;
	(void)dm_errno;
	/* Bits above the level say where it should go to. */
	if ((level & 7) > 3)
		return;
	va_start(ap, fmt);
	vsnprintf(dm_said, sizeof(dm_said), fmt, ap);
	va_end(ap);
}

static void dm_setup(void)
{
	static bool done;

	if (done)
		return;
	done = true;
	dm_log_with_errno_init(dm_log);
	/* Names are checked by us; a name is never anything but itself. */
	dm_set_name_mangling_mode(DM_STRING_MANGLING_NONE);
}

void dm_exit(void)
{
	dm_lib_release();
}

static const char *dm_reason(int err)
{
	static char text[600];

	if (*dm_said)
		snprintf(text, sizeof(text), "%s", esc(dm_said));
	else
		snprintf(text, sizeof(text), "%s", strerror(err));
	return text;
}

static struct dm_task *task_new(int type, const char *name)
{
	struct dm_task *dmt;

	dm_setup();
	*dm_said = 0;
	errno = 0;
	dmt = dm_task_create(type);
	if (dmt && name && !dm_task_set_name(dmt, name)) {
		dm_task_destroy(dmt);
		return NULL;
	}
	return dmt;
}

/* Run @dmt; 0 or -errno. */
static int task_run(struct dm_task *dmt)
{
	int err;

	if (dm_task_run(dmt))
		return 0;
	err = dm_task_get_errno(dmt);
	if (!err)
		err = errno;
	return err ? -err : -EIO;
}

/*
 * Run a task that makes or removes device nodes.  Where udev runs, it does
 * that, and a cookie tells when it is done; else libdevmapper does it.
 */
static int task_run_cookie(struct dm_task *dmt, uint16_t flags)
{
	uint32_t cookie = 0;
	int ret;

	if (!dm_task_set_cookie(dmt, &cookie, flags))
		return -ENOMEM;
	ret = task_run(dmt);
	udev_wait(cookie);
	dm_task_update_nodes();
	return ret;
}

#define RELOAD	"reload the module: close all devices, then modprobe -r dm-qcow2 && modprobe dm-qcow2"

int dm_check(bool need_target)
{
	struct target_version version;
	struct dm_task *dmt;
	int ret;

	dmt = task_new(DM_DEVICE_VERSION, NULL);
	ret = dmt ? task_run(dmt) : -ENOMEM;
	if (dmt)
		dm_task_destroy(dmt);
	if (ret && (geteuid() || ret == -EPERM || ret == -EACCES))
		return fail(EX_PERMISSION,
			    "no permission to use device-mapper; run as root (CAP_SYS_ADMIN)");
	if (ret)
		return fail(EX_WRONG,
			    "device-mapper is not available; load the dm_mod module (modprobe dm_mod)");
	return need_target ? dm_target_version(&version) : 0;
}

int dm_target_version(struct target_version *v)
{
	struct dm_versions *versions;
	struct dm_task *dmt;
	int ret;

	/* This makes the kernel look for the module, too. */
	dmt = task_new(DM_DEVICE_GET_TARGET_VERSION, DM_TARGET);
	ret = dmt ? task_run(dmt) : -ENOMEM;
	versions = ret ? NULL : dm_task_get_versions(dmt);
	if (versions)
		*v = (struct target_version){
			versions->version[0], versions->version[1],
			versions->version[2],
		};
	if (dmt)
		dm_task_destroy(dmt);
	if (!versions)
		return fail(EX_WRONG,
			    "target qcow2 is not available: load the dm-qcow2 module (modprobe dm-qcow2)");
	if (v->major < TARGET_MAJOR)
		return fail(EX_WRONG,
			    "the loaded dm-qcow2 module is of version %u.%u.%u, which is too old; " RELOAD,
			    v->major, v->minor, v->patch);
	if (v->major > TARGET_MAJOR)
		return fail(EX_WRONG,
			    "the loaded dm-qcow2 module is of version %u.%u.%u, which is not known; use a newer qcow2setup",
			    v->major, v->minor, v->patch);
	return 0;
}

int dm_check_table(const char *name, const char *params)
{
	struct target_version v;
	struct target_table t;
	const char *lacks;
	int ret;

	ret = dm_target_version(&v);
	if (ret)
		return ret;
	if (!target_parse_table(params, &t))
		return fail(EX_WRONG, "%s: table line is too long", esc(name));
	lacks = target_lacks(&v, &t);
	if (!lacks)
		return 0;
	return fail(EX_WRONG,
		    "%s: the loaded dm-qcow2 module, of version %u.%u.%u, does not know %s; " RELOAD,
		    esc(name), v.major, v.minor, v.patch, esc(lacks));
}

int dm_check_name(const char *name)
{
	if (!*name)
		return fail(EX_PARAMETER, "the device's name is empty; give one");
	if (strlen(name) > DM_NAME_MAX)
		return fail(EX_PARAMETER,
			    "name %s is too long; use at most %d characters",
			    esc(name), DM_NAME_MAX);
	if (!device_name_valid(name))
		return fail(EX_PARAMETER,
			    "%s cannot be the name of a device; use letters, digits and #+-.:=@_",
			    esc(name));
	return 0;
}

int dm_query(const char *name, struct dm_dev_info *info)
{
	struct dm_task *dmt = task_new(DM_DEVICE_INFO, name);
	struct dm_info i;
	const char *uuid;
	int ret;

	*info = (struct dm_dev_info){ .exists = false };
	if (!dmt)
		return fail_nomem();
	ret = task_run(dmt);
	if (!ret && dm_task_get_info(dmt, &i) && i.exists) {
		info->exists = true;
		info->suspended = i.suspended;
		info->inactive = i.inactive_table;
		info->deferred = i.deferred_remove;
		info->read_only = i.read_only;
		info->open_count = i.open_count;
		info->rdev = makedev(i.major, i.minor);
		uuid = dm_task_get_uuid(dmt);
		snprintf(info->uuid, sizeof(info->uuid), "%s",
			 uuid ? uuid : "");
	}
	dm_task_destroy(dmt);
	if (ret && ret != -ENXIO) {
		errno = -ret;
		return fail_errno("%s: cannot ask device-mapper for it",
				  esc(name));
	}
	return 0;
}

int dm_gone(const char *name)
{
	return fail(EX_WRONG,
		    "%s: no such device; qcow2setup status lists those that are open",
		    esc(name));
}

/*
 * The kernel's log has the reason why a table was refused, the ioctl has only
 * a number.  Read what was logged since @fd was opened.
 */
static int kmsg_open(void)
{
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (fd >= 0 && lseek(fd, 0, SEEK_END) < 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static bool kmsg_reason(int fd, char *out, size_t size)
{
	char record[2048], *p, *end;
	bool found = false;
	ssize_t n;
	int i;

	if (fd < 0)
		return false;
	for (i = 0; i < 1000; i++) {
		n = read(fd, record, sizeof(record) - 1);
		if (n < 0 && errno == EPIPE)
			continue;	/* the ring went round */
		if (n <= 0)
			break;
		record[n] = 0;
		p = strchr(record, ';');
		if (!p || !starts_with(p + 1, "device-mapper:"))
			continue;
		end = strchr(p, '\n');
		if (end)
			*end = 0;
		/* "device-mapper: table: 253:0: qcow2: WHY (-EINVAL)" */
		p = strstr(p, DM_TARGET ": ");
		if (!p)
			continue;
		snprintf(out, size, "%s", esc(p));
		found = true;
	}
	return found;
}

static int load_table(const char *name, const struct dm_line *lines,
		      unsigned int count, bool read_only)
{
	struct dm_task *dmt = task_new(DM_DEVICE_RELOAD, name);
	unsigned int i;
	int ret = -ENOMEM;

	if (!dmt)
		return ret;
	for (i = 0; i < count; i++)
		if (!dm_task_add_target(dmt, lines[i].start, lines[i].sectors,
					lines[i].type, lines[i].params))
			goto out;
	if (read_only && !dm_task_set_ro(dmt))
		goto out;
	ret = task_run(dmt);
out:
	dm_task_destroy(dmt);
	return ret;
}

static int simple(int type, const char *name, const char *uuid, uint16_t flags)
{
	struct dm_task *dmt = task_new(type, name);
	int ret = -ENOMEM;

	if (!dmt)
		return ret;
	if (uuid && !dm_task_set_uuid(dmt, uuid))
		goto out;
	if (type == DM_DEVICE_RESUME)
		dm_task_set_add_node(dmt, DM_ADD_NODE_ON_RESUME);
	/* Creation alone makes no event: nodes come with the first resume. */
	if (type == DM_DEVICE_CREATE)
		ret = task_run(dmt);
	else
		ret = task_run_cookie(dmt, flags);
out:
	dm_task_destroy(dmt);
	return ret;
}

static int refused(int log, const char *name, int err)
{
	char why[1100];

	if (kmsg_reason(log, why, sizeof(why)))
		return fail(errno_to_exit(err), "%s: the kernel refused the image: %s",
			    esc(name), why);
	return fail(errno_to_exit(err),
		    "%s: the kernel refused the image: %s; see dmesg for the reason",
		    esc(name), dm_reason(err));
}

/* Why a table that was loaded does not become live. */
static int not_resumed(int log, const char *name, int err)
{
	if (err == EBUSY)
		return fail(EX_BUSY,
			    "%s: the image is in use by another device; close that first",
			    esc(name));
	return refused(log, name, err);
}

int dm_make(const char *name, const char *uuid, const struct dm_line *lines,
	    unsigned int count, bool read_only)
{
	int ret, log;

	log = kmsg_open();
	ret = simple(DM_DEVICE_CREATE, name, uuid, 0);
	if (ret == -EBUSY) {
		ret = fail(EX_BUSY, "%s: a device of that name exists; close it, or choose another name",
			   esc(name));
		goto out;
	}
	if (ret) {
		ret = fail(errno_to_exit(-ret), "%s: cannot create the device: %s",
			   esc(name), dm_reason(-ret));
		goto out;
	}
	ret = load_table(name, lines, count, read_only);
	if (ret) {
		ret = refused(log, name, -ret);
	} else {
		ret = simple(DM_DEVICE_RESUME, name, NULL,
			     udev_flags(name, uuid));
		if (!ret && !interrupted())
			goto out;
		ret = ret ? not_resumed(log, name, -ret) : EX_WRONG;
	}
	if (simple(DM_DEVICE_REMOVE, name, NULL, 0))
		warning("%s: cannot remove the device again; try dmsetup remove %s",
			esc(name), esc(name));
out:
	if (log >= 0)
		close(log);
	return ret;
}

int dm_suspend(const char *name)
{
	struct dm_task *dmt = task_new(DM_DEVICE_SUSPEND, name);
	int ret = -ENOMEM;

	if (dmt && dm_task_skip_lockfs(dmt))
		ret = task_run(dmt);
	if (dmt)
		dm_task_destroy(dmt);
	if (ret)
		return fail(errno_to_exit(-ret),
			    "%s: cannot suspend the device: %s; see dmesg",
			    esc(name), dm_reason(-ret));
	return 0;
}

int dm_load(const char *name, const struct dm_line *line)
{
	int log = kmsg_open();
	int ret = load_table(name, line, 1, false);

	if (ret)
		ret = refused(log, name, -ret);
	if (log >= 0)
		close(log);
	return ret;
}

int dm_resume(const char *name)
{
	int log = kmsg_open(), ret;
	struct dm_dev_info info;

	/* It is resumed in any case. */
	if (dm_query(name, &info))
		*info.uuid = 0;
	ret = simple(DM_DEVICE_RESUME, name, NULL, udev_flags(name, info.uuid));
	if (ret)
		ret = not_resumed(log, name, -ret);
	if (log >= 0)
		close(log);
	return ret;
}

int dm_remove(const char *name, bool deferred)
{
	struct dm_task *dmt = task_new(DM_DEVICE_REMOVE, name);
	int ret;

	if (!dmt)
		return fail_nomem();
	if (deferred && !dm_task_deferred_remove(dmt)) {
		dm_task_destroy(dmt);
		return fail(EX_WRONG, "deferred removal is not supported; close it when it is unused");
	}
	ret = task_run_cookie(dmt, 0);
	dm_task_destroy(dmt);
	/* Somebody was quicker, or it went by itself. */
	if (ret == -ENXIO)
		return 0;
	if (ret && ret != -EBUSY)
		return fail(errno_to_exit(-ret), "%s: cannot remove the device: %s",
			    esc(name), dm_reason(-ret));
	return ret;
}

/* Wait a few seconds for a device to go; @used: also while it is in use. */
static bool wait_gone(const char *name, bool used)
{
	const struct timespec step = { .tv_nsec = 20 * 1000 * 1000 };
	struct dm_dev_info info;
	int i;

	for (i = 0; i < 150; i++) {
		if (dm_query(name, &info) || !info.exists)
			return true;
		if (info.open_count && !used)
			break;
		nanosleep(&step, NULL);
	}
	return false;
}

void dm_wait_gone(const char *name)
{
	wait_gone(name, false);
}

void dm_remove_tails(const char *name)
{
	static const char * const suffixes[] = {
		DM_TAIL_SUFFIX, DM_BACKING_TAIL_SUFFIX
	};
	char tail[DM_NAME_MAX + 32];
	struct dm_dev_info info;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(suffixes); i++) {
		snprintf(tail, sizeof(tail), "%s%s", name, suffixes[i]);
		if (dm_query(tail, &info) || !info.exists ||
		    !starts_with(info.uuid, DM_UUID_TAIL_PREFIX))
			continue;
		/* Its user has no name any more, but may not be gone yet. */
		if (dm_remove(tail, true) || !wait_gone(tail, true))
			warning("%s: helper device is in use; remove it with dmsetup remove %s",
				esc(tail), esc(tail));
	}
}

int dm_message(const char *name, const char *text)
{
	return dm_ask(name, text, NULL);
}

int dm_ask(const char *name, const char *text, char **answer)
{
	struct dm_task *dmt = task_new(DM_DEVICE_TARGET_MSG, name);
	const char *s;
	int ret = -ENOMEM;

	if (dmt && dm_task_set_sector(dmt, 0) && dm_task_set_message(dmt, text))
		ret = task_run(dmt);
	if (!ret && answer) {
		s = dm_task_get_message_response(dmt);
		*answer = strdup(s ? s : "");
		if (!*answer)
			ret = -ENOMEM;
	}
	if (dmt)
		dm_task_destroy(dmt);
	return ret;
}

int dm_params(const char *name, bool status, char **type, char **params,
	      uint64_t *sectors)
{
	struct dm_task *dmt;
	struct dm_info info;
	uint64_t start;
	char *t, *p;
	int ret;

	*type = NULL;
	*params = NULL;
	dmt = task_new(status ? DM_DEVICE_STATUS : DM_DEVICE_TABLE, name);
	if (!dmt)
		return fail_nomem();
	/* A status request commits, unless it is told not to. */
	if (status)
		dm_task_no_flush(dmt);
	ret = task_run(dmt);
	/* libdevmapper takes it for success of some requests. */
	if (!ret && dm_task_get_info(dmt, &info) && !info.exists)
		ret = -ENXIO;
	if (ret == -ENXIO)
		goto out;
	if (ret) {
		ret = fail(errno_to_exit(-ret), "%s: cannot read its %s: %s",
			   esc(name), status ? "status" : "table",
			   dm_reason(-ret));
		goto out;
	}
	dm_get_next_target(dmt, NULL, &start, sectors, &t, &p);
	*type = strdup(t ? t : "");
	*params = strdup(p ? p : "");
	if (!*type || !*params) {
		free(*type);
		free(*params);
		ret = fail_nomem();
	}
out:
	dm_task_destroy(dmt);
	return ret;
}

int dm_each(int (*fn)(const char *name, void *arg), void *arg)
{
	struct dm_task *dmt = task_new(DM_DEVICE_LIST, NULL);
	struct dm_names *names;
	unsigned int next;
	int ret;

	if (!dmt)
		return fail_nomem();
	ret = task_run(dmt);
	if (ret) {
		ret = fail(errno_to_exit(-ret), "cannot list devices: %s",
			   dm_reason(-ret));
		goto out;
	}
	names = dm_task_get_names(dmt);
	if (!names || !names->dev)
		goto out;
	do {
		ret = fn(names->name, arg);
		next = names->next;
		names = (void *)((char *)names + next);
	} while (!ret && next);
out:
	dm_task_destroy(dmt);
	return ret;
}
