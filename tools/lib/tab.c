// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/names.h"
#include "lib/tab.h"
#include "lib/util.h"

/* The parser of one line */
struct line {
	struct tab_entry *e;
	char *at;			/* free memory for texts, in e->text */
	char why[1400];
};

static bool wrong(struct line *l, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static bool wrong(struct line *l, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(l->why, sizeof(l->why), fmt, ap);
	va_end(ap);
	return false;
}

static bool blank(char c)
{
	return c == ' ' || c == '\t' || c == '\r';
}

/* "\040" and the like are bytes, as in fstab; in place, for it gets no longer. */
static void unescape(char *s)
{
	char *out = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] >= '0' &&
		    s[2] <= '7' && s[3] >= '0' && s[3] <= '7' &&
		    strncmp(s + 1, "000", 3)) {
			*out++ = (s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0');
			s += 3;
		} else {
			*out++ = *s;
		}
	}
	*out = 0;
}

/* Numbers with units of time, or "infinity": what systemd takes, as far as it is sane */
static bool is_time(const char *s)
{
	static const char * const units[] = {
		"", "us", "usec", "ms", "msec", "s", "sec", "second", "seconds", "m",
		"min", "minute", "minutes", "h", "hr", "hour", "hours", "d", "day",
		"days", "w", "week", "weeks",
	};
	size_t i, n;

	if (!strcmp(s, "infinity"))
		return true;
	if (!*s)
		return false;
	while (*s) {
		n = strspn(s, "0123456789");
		if (!n)
			return false;
		s += n;
		n = strspn(s, "abcdefghijklmnopqrstuvwxyz");
		for (i = 0; i < ARRAY_SIZE(units); i++)
			if (strlen(units[i]) == n && !strncmp(s, units[i], n))
				break;
		if (i == ARRAY_SIZE(units))
			return false;
		s += n;
	}
	return true;
}

/* Is "." or ".." one of its parts?  Units are named by paths, and systemd takes none such. */
static bool has_dots(const char *path)
{
	const char *p;

	for (p = path; (p = strstr(p, "/.")); p++)
		if (!p[2 + (p[2] == '.')] || p[2 + (p[2] == '.')] == '/')
			return true;
	return false;
}

/* A path out of @spec, which is a word of the line; NULL if it is none. */
static const char *take_path(struct line *l, const char *what, const char *spec)
{
	char path[PATH_MAX];
	char *out = l->at;

	if (!spec_path(path, sizeof(path), spec)) {
		wrong(l, "%s %s is too long; give a shorter name, such as a link", what,
		      esc(spec));
		return NULL;
	}
	if (strpbrk(path, "\n\r")) {
		wrong(l, "%s %s has a line break in its name; give another name, such as a link",
		      what, esc(spec));
		return NULL;
	}
	if (has_dots(path)) {
		wrong(l, "%s %s has . or .. in it; give the path without them", what,
		      esc(spec));
		return NULL;
	}
	if (*path != '/') {
		wrong(l, "%s %s is not a full path; begin it with /, UUID=, LABEL=, PARTUUID= or PARTLABEL=",
		      what, esc(spec));
		return NULL;
	}
	l->at = stpcpy(out, path) + 1;
	return out;
}

/*
 * --backing-file PATH[,data-file=PATH]: each path is looked up for itself; @data is
 * what the next word says, or NULL.
 */
static const char *take_backing(struct line *l, const char *value,
				const char *data)
{
	const char *path = take_path(l, "backing file", value);

	if (!path || !data)
		return path;
	/* Both lie behind each other: what ended the first joins them. */
	strcpy(l->at - 1, ",data-file=");
	l->at += strlen(l->at);
	return take_path(l, "data file", data) ? path : NULL;
}

/* A word that is not for open; true if it was one.  *@ok: nothing is wrong with it. */
static bool own_word(struct line *l, const char *name, const char *value, bool *ok)
{
	const struct {
		const char *name;
		bool *flag, set;
	} flags[] = {
		{ "nofail", &l->e->nofail, true }, { "fail", &l->e->nofail, false },
		{ "noauto", &l->e->noauto, true }, { "auto", &l->e->noauto, false },
		{ "_netdev", &l->e->netdev, true },
		{ "x-initrd.attach", &l->e->initrd, true },
	};
	size_t i;

	*ok = true;
	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		if (strcmp(name, flags[i].name))
			continue;
		*flags[i].flag = flags[i].set;
		if (value)
			*ok = wrong(l, "option %s takes no value; leave =%s out",
				    name, esc(value));
		return true;
	}
	if (!strcmp(name, "x-systemd.device-timeout")) {
		l->e->device_timeout = value;
		if (!value || !is_time(value))
			*ok = wrong(l, "x-systemd.device-timeout=%s is not a time; use a number of seconds, such as 90, or 5min",
				    value ? esc(value) : "");
		return true;
	}
	/* For other programs, or for people */
	return starts_with(name, "x-");
}

/* Cut the next word off *@s, which is a list with commas; NULL at its end. */
static char *next_word(char **s)
{
	char *word;

	do {
		word = strsep(s, ",");
	} while (word && !*word);
	return word;
}

static bool add_word(struct line *l, const char *name, const char *value)
{
	struct tab_entry *e = l->e;

	if (!strcmp(name, "data-file"))
		return wrong(l, "the data device is not an option; give it in the third field, or that of a backing file directly behind backing-file=");
	if (!strcmp(name, "read-only"))
		name = "readonly";
	e->words[e->nr_words++] = (struct tab_word){ name, value };
	return true;
}

static char *value_of(char *word)
{
	char *value = strchr(word, '=');

	if (value)
		*value++ = 0;
	unescape(word);
	if (value)
		unescape(value);
	return value;
}

static bool parse_options(struct line *l, char *options)
{
	char *word = next_word(&options), *next, *value;
	const char *data;
	bool ok;

	for (; word; word = next) {
		next = next_word(&options);
		value = value_of(word);
		if (own_word(l, word, value, &ok)) {
			if (!ok)
				return false;
			continue;
		}
		if (!strcmp(word, "backing-file") && value) {
			data = next && starts_with(next, "data-file=") ?
			       value_of(next) : NULL;
			if (data)
				next = next_word(&options);
			value = (char *)take_backing(l, value, data);
			if (!value)
				return false;
		}
		if (!add_word(l, word, value))
			return false;
	}
	return true;
}

static bool is_none(const char *field)
{
	return !strcmp(field, "-") || !strcmp(field, "none");
}

static bool has_word(const struct tab_entry *e, const char *name)
{
	size_t i;

	for (i = 0; i < e->nr_words; i++)
		if (!strcmp(e->words[i].name, name))
			return true;
	return false;
}

/* The fields as they are, cut apart, in @field */
static bool parse_fields(struct line *l, char **field, unsigned int n)
{
	struct tab_entry *e = l->e;

	if (n < 3)
		return wrong(l, "a line has a name, an image and a data device; give all three, or put # in front of it");
	if (n > 4)
		return wrong(l, "there are more than four fields; put no blanks between options, and write \\040 for one in a path");
	unescape(field[0]);
	unescape(field[1]);
	unescape(field[2]);
	e->name = field[0];
	if (!device_name_valid(e->name))
		return wrong(l, "%s cannot be the name of a device; use letters, digits and #+-.:=@_",
			     esc(e->name));
	e->image = take_path(l, "image", field[1]);
	if (!e->image)
		return false;
	if (!is_none(field[2])) {
		e->data = take_path(l, "data device", field[2]);
		if (!e->data)
			return false;
	}
	if (n == 4 && !is_none(field[3]) && !parse_options(l, field[3]))
		return false;
	if (!e->data && !has_word(e, "trust-image-paths"))
		return wrong(l, "there is no data device; give it in the third field, or add the option trust-image-paths");
	return true;
}

/* Room for the longest path that any "UUID=" can become, for each word */
#define PATH_ROOM	32

/* Cut the copy of the line into words.  @l->e: zeros; false: see l->why. */
static bool parse_line(struct line *l, char *s)
{
	char *field[5];
	unsigned int n = 0;

	while (n < ARRAY_SIZE(field)) {
		while (blank(*s))
			s++;
		if (!*s)
			break;
		field[n++] = s;
		while (*s && !blank(*s))
			s++;
		if (*s)
			*s++ = 0;
	}
	return parse_fields(l, field, n);
}

static void entry_free(struct tab_entry *e)
{
	free(e->text);
	free(e->words);
}

/* Memory for a line of @len bytes: what is read, and paths that are made of it */
static bool entry_new(struct tab_entry *e, struct line *l, const char *s, size_t len)
{
	size_t words = 1, i;

	for (i = 0; i < len; i++)
		words += s[i] == ',' || blank(s[i]);
	*e = (struct tab_entry){
		/* A byte can become four. */
		.text = malloc(len + 1 + 4 * len + words * PATH_ROOM),
		.words = calloc(words, sizeof(*e->words)),
	};
	if (!e->text || !e->words) {
		entry_free(e);
		return false;
	}
	memcpy(e->text, s, len);
	e->text[len] = 0;
	l->e = e;
	l->at = e->text + len + 1;
	*l->why = 0;
	return true;
}

static bool add_line(struct tab *t, unsigned int number, const char *s, size_t len,
		     tab_wrong_fn *tell, void *arg)
{
	const struct tab_entry *other;
	struct tab_entry *e;
	struct line l;

	e = realloc(t->entries, (t->nr + 1) * sizeof(*e));
	if (!e)
		return false;
	t->entries = e;
	e += t->nr;
	if (!entry_new(e, &l, s, len))
		return false;
	e->line = number;
	if (memchr(s, 0, len))
		wrong(&l, "there is a byte of value 0 in it; write the line again as text");
	else
		parse_line(&l, e->text);
	if (!*l.why) {
		other = tab_find(t, e->name);
		if (other)
			wrong(&l, "%s is the name of line %u, too; choose another name",
			      e->name, other->line);
	}
	if (*l.why) {
		tell(number, e->text, l.why, arg);
		entry_free(e);
		return true;
	}
	t->nr++;
	return true;
}

bool tab_parse(struct tab *t, const char *text, size_t len, tab_wrong_fn *tell,
	       void *arg)
{
	const char *end = text + len, *eol;
	unsigned int number = 1;

	*t = (struct tab){ 0 };
	for (; text < end; text = eol + 1, number++) {
		eol = memchr(text, '\n', end - text);
		if (!eol)
			eol = end;
		while (text < eol && blank(*text))
			text++;
		if (text == eol || *text == '#')
			continue;
		if (!add_line(t, number, text, eol - text, tell, arg)) {
			tab_free(t);
			return false;
		}
	}
	return true;
}

void tab_free(struct tab *t)
{
	size_t i;

	for (i = 0; i < t->nr; i++)
		entry_free(&t->entries[i]);
	free(t->entries);
	*t = (struct tab){ 0 };
}

const struct tab_entry *tab_find(const struct tab *t, const char *name)
{
	size_t i;

	for (i = 0; i < t->nr; i++)
		if (!strcmp(t->entries[i].name, name))
			return &t->entries[i];
	return NULL;
}
