// SPDX-License-Identifier: GPL-2.0-or-later
#include <limits.h>
#include <stdbool.h>
#include <string.h>

#include "generator/units.h"
#include "lib/names.h"
#include "lib/util.h"

#define DATA_FILE	",data-file="

/* @before, @path as systemd writes it, @after; cut off if there is no room. */
static void unit_name(char *out, size_t size, const char *before, const char *path,
		      const char *after)
{
	char escaped[UNIT_NAME_SIZE];

	if (!unit_escape(escaped, sizeof(escaped), path))
		*escaped = 0;
	snprintf(out, size, "%s%s%s", before, escaped, after);
}

static void mapper_path(char *out, size_t size, const struct tab_entry *e)
{
	snprintf(out, size, "/dev/mapper/%s", e->name);
}

void unit_service(char *out, size_t size, const struct tab_entry *e)
{
	unit_name(out, size, "qcow2setup@", e->name, ".service");
}

void unit_device(char *out, size_t size, const struct tab_entry *e)
{
	char path[PATH_MAX];

	mapper_path(path, sizeof(path), e);
	unit_name(out, size, "", path, ".device");
}

const char *unit_target(const struct tab_entry *e)
{
	return e->netdev ? "remote-qcow2setup.target" : "qcow2setup.target";
}

/* Each file or device that is named in the line */
typedef int path_fn(const char *path, void *arg);

static int each_path(const struct tab_entry *e, path_fn *fn, void *arg)
{
	char path[PATH_MAX];
	const char *data;
	int ret;
	size_t i;

	ret = fn(e->image, arg);
	if (!ret && e->data)
		ret = fn(e->data, arg);
	for (i = 0; !ret && i < e->nr_words; i++) {
		if (strcmp(e->words[i].name, "backing-file") || !e->words[i].value)
			continue;
		data = strstr(e->words[i].value, DATA_FILE);
		snprintf(path, sizeof(path), "%.*s",
			 data ? (int)(data - e->words[i].value) : PATH_MAX - 1,
			 e->words[i].value);
		ret = fn(path, arg);
		if (!ret && data)
			ret = fn(data + strlen(DATA_FILE), arg);
	}
	return ret;
}

struct each_device {
	int (*fn)(const char *unit, void *arg);
	void *arg;
};

static int if_device(const char *path, void *arg)
{
	const struct each_device *each = arg;
	char unit[UNIT_NAME_SIZE];

	if (!path_is_device(path))
		return 0;
	unit_name(unit, sizeof(unit), "", path, ".device");
	return each->fn(unit, each->arg);
}

int unit_each_device(const struct tab_entry *e, int (*fn)(const char *unit, void *arg),
		     void *arg)
{
	struct each_device each = { fn, arg };

	return each_path(e, if_device, &each);
}

/*
 * As one word of a setting: neither quotes nor specifiers in it mean anything.  No other
 * escapes are known there, and no path has the bytes that would end the line.
 */
static void put_word(FILE *f, const char *s)
{
	fputc('"', f);
	for (; *s; s++) {
		unsigned char c = *s;

		if (c == '"' || c == '\\')
			fprintf(f, "\\%c", c);
		else if (c == '%')
			fputs("%%", f);
		else
			fputc(c, f);
	}
	fputc('"', f);
}

/* Devices come when they come; what has a service of its own goes after this one. */
static int write_need(const char *path, void *arg)
{
	char unit[UNIT_NAME_SIZE], blockdev[UNIT_NAME_SIZE];
	FILE *f = arg;

	if (path_is_device(path)) {
		unit_name(unit, sizeof(unit), "", path, ".device");
		unit_name(blockdev, sizeof(blockdev), "blockdev@", path, ".target");
		fprintf(f, "BindsTo=%s\nAfter=%s %s\n", unit, unit, blockdev);
	} else {
		fputs("RequiresMountsFor=", f);
		put_word(f, path);
		fputc('\n', f);
	}
	return 0;
}

void unit_write(FILE *f, const char *tab, const struct tab_entry *e)
{
	char path[PATH_MAX], blockdev[UNIT_NAME_SIZE];

	mapper_path(path, sizeof(path), e);
	unit_name(blockdev, sizeof(blockdev), "blockdev@", path, ".target");
	fprintf(f, "# Written by qcow2setup-generator, from line %u of %s\n"
		"[Unit]\nSourcePath=%s\n", e->line, tab, tab);
	fprintf(f, "Wants=%s\nBefore=%s\n", blockdev, blockdev);
	/* What the initramfs has opened may be the root: it goes last of all. */
	if (!e->initrd)
		fputs("Conflicts=umount.target\nBefore=umount.target\n", f);
	fprintf(f, "After=%s\n", e->netdev ? "remote-fs-pre.target" : "qcow2setup-pre.target");
	if (!e->nofail)
		fprintf(f, "Before=%s\n", unit_target(e));
	each_path(e, write_need, f);
}
