// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "lib/names.h"
#include "lib/util.h"

/* What is neither changed by udev nor refused by device-mapper's users */
#define PLAIN	"#+-.:=@_"

static bool plain(unsigned char c)
{
	return (c < 0x80 && isalnum(c)) || (c && strchr(PLAIN, c));
}

bool device_name_valid(const char *name)
{
	const char *p;

	for (p = name; *p; p++)
		if (!plain(*p))
			return false;
	return *name && p - name <= DEVICE_NAME_MAX && strcmp(name, ".") &&
	       strcmp(name, "..") && strcmp(name, "control");
}

/* Put one byte, as it is or as \xHH; false if there is no room for it and a NUL. */
static bool put(char **out, size_t *room, unsigned char c, bool as_it_is)
{
	size_t n = as_it_is ? 1 : 4;

	if (*room <= n)
		return false;
	if (as_it_is)
		**out = c;
	else
		snprintf(*out, *room, "\\x%02x", c);
	*out += n;
	*room -= n;
	return true;
}

bool unit_escape(char *out, size_t size, const char *path)
{
	const char *p = path;
	bool ok = true;

	/* It has neither "/" at the ends, nor two of them behind each other. */
	while (*p == '/')
		p++;
	if (!*p && *path)
		ok = put(&out, &size, '-', true);
	for (bool first = true; ok && *p; first = false) {
		unsigned char c = *p++;

		if (c == '/') {
			while (*p == '/')
				p++;
			if (*p)
				ok = put(&out, &size, '-', true);
		} else {
			ok = put(&out, &size, c, (c < 0x80 && isalnum(c)) || c == ':' ||
				 c == '_' || (c == '.' && !first));
		}
	}
	if (!ok || !size)
		return false;
	*out = 0;
	return true;
}

bool spec_path(char *out, size_t size, const char *spec)
{
	static const struct {
		const char *tag, *folder;
	} tags[] = {
		{ "UUID=", "/dev/disk/by-uuid/" },
		{ "LABEL=", "/dev/disk/by-label/" },
		{ "PARTUUID=", "/dev/disk/by-partuuid/" },
		{ "PARTLABEL=", "/dev/disk/by-partlabel/" },
	};
	size_t i;
	int n;

	for (i = 0; i < ARRAY_SIZE(tags); i++)
		if (starts_with(spec, tags[i].tag))
			break;
	if (i == ARRAY_SIZE(tags)) {
		n = snprintf(out, size, "%s", spec);
		return n >= 0 && (size_t)n < size;
	}
	n = snprintf(out, size, "%s", tags[i].folder);
	if (n < 0 || (size_t)n >= size)
		return false;
	out += n;
	size -= n;
	/* As udev writes it; what is not ASCII is UTF-8, and stays. */
	for (spec += strlen(tags[i].tag); *spec; spec++)
		if (!put(&out, &size, *spec, plain(*spec) || (unsigned char)*spec >= 0x80))
			return false;
	*out = 0;
	return true;
}

bool path_is_device(const char *path)
{
	return starts_with(path, "/dev/");
}
