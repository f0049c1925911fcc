// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup completion: for shells.  Their scripts (tools/completion) know nothing:
 * with each TAB they ask "qcow2setup completion -- WORD...", so that there is one table
 * of options.  A line is a word that fits, and maybe a tab and its help; or ":files".
 */
#include <stdio.h>
#include <string.h>

#include "commands/commands.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"

/* What there is before the word that is to be completed. */
struct line {
	const struct action *action;
	const char *option;		/* whose value the word is, or NULL */
	const char *first;		/* argument of the action, or NULL */
	unsigned int arguments;		/* of the action */
	const char *word, *value;	/* the word; and behind "--option=" */
};

static void put(const struct line *l, const char *word, size_t len, const char *help)
{
	size_t typed = strlen(l->value);

	if (len < typed || memcmp(word, l->value, typed))
		return;
	printf("%.*s%.*s", (int)(l->value - l->word), l->word, (int)len, word);
	if (help)
		printf("\t%s", help);
	putchar('\n');
}

static void put_words(const struct line *l, const char *words, char between)
{
	size_t len;

	for (; *words; words += len + (words[len] == between)) {
		len = strchrnul(words, between) - words;
		put(l, words, len, NULL);
	}
}

static int put_device(const char *name, void *arg)
{
	struct dm_dev_info info;
	char type[64];

	if (!dm_query(name, &info) && info.exists &&
	    device_kind(name, info.uuid, type, sizeof(type)) == DEVICE_OURS)
		put(arg, name, strlen(name), NULL);
	return 0;
}

/* Something that a usage line names, such as "IMAGE|NAME" */
static void put_kind(struct line *l, const char *kind, size_t len)
{
	static const char *const files[] = {
		"IMAGE", "FILE", "DEV", "DIR", "PATH", "SOURCE", "TARGET", "BASE",
	};
	bool names = memmem(kind, len, "NAME", 4);
	size_t i;

	if (*kind >= 'a' && *kind <= 'z') {
		char words[160];

		snprintf(words, sizeof(words), "%.*s", (int)len, kind);
		put_words(l, words, '|');
		return;
	}
	for (i = 0; i < ARRAY_SIZE(files); i++)
		if (memmem(kind, len, files[i], strlen(files[i]))) {
			puts(":files");
			break;
		}
	/* Without a device-mapper there are none. */
	if (names && !dm_check(false))
		dm_each(put_device, l);
}

static void put_value(struct line *l)
{
	struct option_facts o;
	const char *const *word;

	if (!option_facts(l->action, l->option, &o))
		return;
	for (word = o.words; word && *word; word++)
		put(l, *word, strlen(*word), NULL);
	if (o.words)
		return;
	if (strstr(o.arg, "auto"))
		put_words(l, "auto", ' ');
	/* The names that options take are those of bitmaps. */
	if (!strstr(o.arg, "NAME"))
		put_kind(l, o.arg, strlen(o.arg));
}

/* The next argument: as the usage line has it, where the last one is for the rest. */
static void put_argument(struct line *l)
{
	const char *kind = l->action->arguments, *next;
	unsigned int i;

	for (i = 0; i < l->arguments; i++) {
		next = strchrnul(kind, ' ');
		if (!*next || starts_with(next, " --"))
			break;
		kind = next + 1;
	}
	if (i < l->arguments && !strstr(kind, "..."))
		return;
	if (starts_with(kind, "--") || starts_with(kind, "[BITMAP"))
		return;
	/* A name that is free yet; copies are files. */
	if ((!strcmp(l->action->name, "open") ||
	     !strcmp(l->action->name, "clone")) && l->arguments)
		return;
	if (l->first && (!strcmp(l->first, "restore") ||
			 (!strcmp(l->first, "copy") && l->arguments > 1)))
		kind = "FILE";
	put_kind(l, kind + (*kind == '['), strcspn(kind + (*kind == '['), " ]"));
}

static int put_option(const struct option_facts *o, void *arg)
{
	char name[64];

	snprintf(name, sizeof(name), "--%s", o->name);
	put(arg, name, strlen(name), o->help);
	return 0;
}

static void complete(struct line *l)
{
	static const char *const common[] = { "--verbose", "--help", "--version" };
	const struct action *a;
	size_t i;

	if (l->option) {
		put_value(l);
	} else if (*l->word == '-') {
		if (l->action)
			options_each(l->action, put_option, l);
		for (i = 0; i < ARRAY_SIZE(common); i++)
			put(l, common[i], strlen(common[i]), NULL);
	} else if (l->action) {
		put_argument(l);
	} else {
		for (a = actions; a->name; a++)
			if (a->summary)
				put(l, a->name, strlen(a->name), a->summary);
		put(l, "help", 4, "show what an action takes");
	}
}

/* @words: behind the program's name; the last one is to be completed. */
static int words(char **words)
{
	struct line l = { .word = "" };
	struct option_facts o;
	const struct action *a;

	for (; words[0] && words[1]; words++) {
		if (l.option) {
			l.option = NULL;
		} else if (starts_with(*words, "--")) {
			if (option_facts(NULL, *words + 2, &o) && o.arg)
				l.option = *words + 2;
		} else if (l.action) {
			if (!l.arguments++)
				l.first = *words;
		} else if (**words != '-') {
			for (a = actions; a->name && strcmp(a->name, *words); a++)
				;
			if (!a->name)
				return 0;
			l.action = a;
		}
	}
	if (*words)
		l.word = *words;
	l.value = l.word;
	if (!l.option && starts_with(l.word, "--") && strchr(l.word, '=')) {
		static char name[64];

		l.value = strchr(l.word, '=') + 1;
		snprintf(name, sizeof(name), "%.*s",
			 (int)(l.value - l.word - 3), l.word + 2);
		l.option = name;
	}
	complete(&l);
	return 0;
}

int cmd_completion(const struct options *opt, char **args)
{
	(void)opt;
	return words(args);
}
