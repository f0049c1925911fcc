// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup-generator: what systemd has to know of /etc/qcow2tab, before it starts
 * anything.  Each line becomes an instance of qcow2setup@.service, which runs
 * "qcow2setup attach NAME"; what is written here says only what it comes after, what
 * comes after it, and what wants it.
 *
 * Nothing that is wrong in the file keeps a machine from booting: the line is left
 * out, and the log says why.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "generator/units.h"
#include "lib/tabfile.h"
#include "lib/util.h"
#include "options.h"

/* What an option is for: of open alone, for that is what a line stands for. */
const struct action actions[] = {
	{ .name = "open" }, { 0 }
};

/*
 * Where messages go: systemd has no other place for them that early.  Containers do
 * not always have a log of the kernel's: then it stays as it is.
 */
static void log_to_kernel(void)
{
	/* A record is one write, and lost if it is longer than 976 bytes. */
	static char record[960];
	int fd;

	if (!getenv("SYSTEMD_SCOPE"))
		return;
	fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return;
	if (dup2(fd, STDERR_FILENO) >= 0)
		setvbuf(stderr, record, _IOFBF, sizeof(record));
	if (fd != STDERR_FILENO)
		close(fd);
}

static int write_failed(const char *path)
{
	return fail_errno("cannot write %s", esc(path));
}

static int make_folder(char *path)
{
	char *slash = strrchr(path, '/');
	int ret = 0;

	*slash = 0;
	if (mkdir(path, 0755) && errno != EEXIST)
		ret = write_failed(path);
	*slash = '/';
	return ret;
}

/* A new file DIR/FOLDER/NAME */
static int new_file(const char *dir, const char *folder, const char *name,
		    char **path, FILE **f)
{
	int ret;

	*f = NULL;
	if (asprintf(path, "%s/%s/%s", dir, folder, name) < 0) {
		*path = NULL;
		return fail_nomem();
	}
	ret = make_folder(*path);
	if (ret)
		return ret;
	*f = fopen(*path, "we");
	return *f ? 0 : write_failed(*path);
}

static int close_file(FILE *f, const char *path)
{
	int bad = ferror(f);

	return fclose(f) || bad ? write_failed(path) : 0;
}

/* UNIT.d/50-qcow2tab.conf for the service */
static int write_service(const char *dir, const char *service,
			 const struct tab_entry *e)
{
	char folder[UNIT_NAME_SIZE + 2], *path;
	FILE *f;
	int ret;

	snprintf(folder, sizeof(folder), "%s.d", service);
	ret = new_file(dir, folder, "50-qcow2tab.conf", &path, &f);
	if (!ret) {
		unit_write(f, tab_file(), e);
		ret = close_file(f, path);
	}
	free(path);
	return ret;
}

struct timeout {
	const char *dir, *setting, *value;
};

static int write_timeout(const char *unit, void *arg)
{
	char folder[UNIT_NAME_SIZE + 2], *path;
	const struct timeout *t = arg;
	FILE *f;
	int ret;

	snprintf(folder, sizeof(folder), "%s.d", unit);
	ret = new_file(t->dir, folder, "50-qcow2tab-timeout.conf", &path, &f);
	if (!ret) {
		fprintf(f, "# Written by qcow2setup-generator, from %s\n[Unit]\n%s=%s\n",
			tab_file(), t->setting, t->value);
		ret = close_file(f, path);
	}
	free(path);
	return ret;
}

/* @unit wants, or requires, @what: a link in its folder; @from: where that is */
static int add_link(const char *dir, const char *unit, const char *how,
		    const char *from, const char *what)
{
	char *path = NULL, *to = NULL;
	int ret = 0;

	if (asprintf(&path, "%s/%s.%s/%s", dir, unit, how, what) < 0 ||
	    asprintf(&to, "%s%s", from, what) < 0)
		ret = fail_nomem();
	if (!ret)
		ret = make_folder(path);
	if (!ret && symlink(to, path) && errno != EEXIST)
		ret = write_failed(path);
	free(path);
	free(to);
	return ret;
}

#define UNITS	SYSTEMDUNITDIR "/"
#define SERVICE	UNITS "qcow2setup@.service"

/* A link to the template with the name of an instance */
static int add_service(const char *dir, const char *unit, const char *how,
		       const char *service)
{
	char *path = NULL;
	int ret = 0;

	if (asprintf(&path, "%s/%s.%s/%s", dir, unit, how, service) < 0)
		return fail_nomem();
	ret = make_folder(path);
	if (!ret && symlink(SERVICE, path) && errno != EEXIST)
		ret = write_failed(path);
	free(path);
	return ret;
}

/* Folders are named by units, and systemd takes no longer names than those can be. */
static int check_unit(const char *unit, void *arg)
{
	(void)arg;
	if (strlen(unit) + strlen(".requires") <= NAME_MAX)
		return 0;
	return fail(EX_PARAMETER, "%s is too long for the name of a unit; use a shorter name, such as a link",
		    esc(unit));
}

static int generate(const char *dir, const struct tab_entry *e)
{
	char service[UNIT_NAME_SIZE], device[UNIT_NAME_SIZE];
	struct timeout wait = { dir, "JobRunningTimeoutSec", e->device_timeout };
	/* Its service knows how long it takes. */
	struct timeout forever = { dir, "JobTimeoutSec", "infinity" };
	struct options opt = { 0 };
	int ret;

	/* What is wrong with the options that only open knows? */
	ret = options_tab(&actions[0], e, &opt);
	if (ret)
		return ret;
	unit_service(service, sizeof(service), e);
	unit_device(device, sizeof(device), e);
	ret = check_unit(service, NULL);
	if (!ret)
		ret = check_unit(device, NULL);
	if (!ret)
		ret = unit_each_device(e, check_unit, NULL);
	if (!ret)
		ret = write_service(dir, service, e);
	/* Whoever needs the device starts the service, and hears of its failure at once. */
	if (!ret)
		ret = add_service(dir, device, "requires", service);
	if (!ret)
		ret = write_timeout(device, &forever);
	if (!ret && e->device_timeout)
		ret = unit_each_device(e, write_timeout, &wait);
	if (ret || e->noauto)
		return ret;
	ret = add_service(dir, unit_target(e), e->nofail ? "wants" : "requires", service);
	/* There is nothing to be enabled by hand. */
	if (!ret)
		ret = add_link(dir, e->netdev ? "multi-user.target" : "sysinit.target",
			       "wants", UNITS, unit_target(e));
	return ret;
}

static void tell(unsigned int line, const char *name, const char *why, void *arg)
{
	(void)arg;
	(void)name;
	fail(EX_PARAMETER, "%s:%u: %s", tab_file(), line, why);
	fflush(stderr);
}

int main(int argc, char **argv)
{
	char place[300];
	struct tab tab;
	int ret, failed;
	size_t i;

	log_to_kernel();
	umask(0022);
	if (argc != 4)
		return fail(EX_PARAMETER,
			    "qcow2setup-generator is for systemd; give it three folders");
	failed = tab_load(&tab, tell, NULL);
	for (i = 0; i < tab.nr; i++) {
		snprintf(place, sizeof(place), "%s:%u", tab_file(), tab.entries[i].line);
		message_place = place;
		ret = generate(argv[1], &tab.entries[i]);
		fflush(stderr);
		if (ret && ret != EX_PARAMETER)
			failed = ret;
	}
	message_place = NULL;
	tab_free(&tab);
	return failed;
}
