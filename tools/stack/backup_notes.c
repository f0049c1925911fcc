// SPDX-License-Identifier: GPL-2.0-or-later
/* Notes of backups: a line for each, with a word and a value in hexadecimal digits */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"
#include "stack/backup_parts.h"

void backup_device_name(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%s%s", name, BACKUP_SUFFIX);
}

static void notes_path(char *path, size_t size, const char *name)
{
	snprintf(path, size, "%s/%s.backup", RUN, name);
}

static void put_note(FILE *f, const char *word, const char *value)
{
	fprintf(f, "%s ", word);
	for (; *value; value++)
		fprintf(f, "%02x", (unsigned char)*value);
	fprintf(f, "\n");
}

int backup_notes_write(const char *name, const struct backup_notes *n)
{
	char path[400];
	unsigned int i;
	FILE *f;

	if (mkdir(RUN, 0755) && errno != EEXIST)
		return fail_errno("%s: cannot create the folder", RUN);
	notes_path(path, sizeof(path), name);
	f = fopen(path, "we");
	if (!f)
		return fail_errno("%s: cannot create it", esc(path));
	if (n->image)
		put_note(f, "image", n->image);
	if (n->checkpoint)
		put_note(f, "checkpoint", n->checkpoint);
	if (n->id)
		put_note(f, "id", n->id);
	for (i = 0; i < n->bitmaps; i++)
		put_note(f, "bitmap", n->bitmap[i]);
	if (fflush(f) || ferror(f)) {
		fclose(f);
		unlink(path);
		return fail_errno("%s: cannot write it", esc(path));
	}
	fclose(f);
	return 0;
}

static char *decode(const char *hex)
{
	size_t n = strspn(hex, "0123456789abcdef") / 2, i;
	char *s = calloc(1, n + 1);
	unsigned int byte;

	for (i = 0; s && i < n; i++)
		if (sscanf(hex + 2 * i, "%2x", &byte) == 1)
			s[i] = byte;
	return s;
}

bool backup_notes_read(const char *name, struct backup_notes *n)
{
	char path[400], *line = NULL;
	size_t size = 0;
	FILE *f;

	*n = (struct backup_notes){ NULL };
	notes_path(path, sizeof(path), name);
	f = fopen(path, "re");
	if (!f)
		return false;
	while (getline(&line, &size, f) > 0) {
		if (starts_with(line, "image ") && !n->image)
			n->image = decode(line + 6);
		else if (starts_with(line, "checkpoint ") && !n->checkpoint)
			n->checkpoint = decode(line + 11);
		else if (starts_with(line, "id ") && !n->id)
			n->id = decode(line + 3);
		else if (starts_with(line, "bitmap ") &&
			 n->bitmaps < BACKUP_MAX_BITMAPS)
			n->bitmap[n->bitmaps++] = decode(line + 7);
	}
	free(line);
	fclose(f);
	return true;
}

void backup_notes_free(struct backup_notes *n)
{
	unsigned int i;

	free(n->image);
	free(n->checkpoint);
	free(n->id);
	for (i = 0; i < n->bitmaps; i++)
		free(n->bitmap[i]);
	*n = (struct backup_notes){ NULL };
}

void backup_notes_remove(const char *name)
{
	char path[400];

	notes_path(path, sizeof(path), name);
	unlink(path);
}
