/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /etc/qcow2tab, as text: see qcow2tab(5).  Pure code. */
#ifndef QCOW2SETUP_TAB_H
#define QCOW2SETUP_TAB_H

#include <stdbool.h>
#include <stddef.h>

#define TAB_FILE	"/etc/qcow2tab"

/* One word of the options, "NAME" or "NAME=VALUE"; @value is NULL then. */
struct tab_word {
	const char *name, *value;
};

/* A line.  All texts are parts of @text. */
struct tab_entry {
	unsigned int line;		/* from 1 on */
	const char *name;
	const char *image, *data;	/* paths; @data is NULL if there is none */
	bool nofail, noauto, netdev, initrd;
	const char *device_timeout;	/* as systemd reads it; NULL: its default */
	/* What is for "qcow2setup open", as its options are called. */
	struct tab_word *words;
	size_t nr_words;
	char *text;
};

struct tab {
	struct tab_entry *entries;
	size_t nr;
};

/* A mistake in a line; @name: what it begins with; @why: "cause; remedy" */
typedef void tab_wrong_fn(unsigned int line, const char *name, const char *why,
			  void *arg);

/*
 * Read @text, of @len bytes.  Lines with mistakes are told to @wrong, and left out.
 * Returns false, with nothing in @t, if there is no memory.  tab_free() is due.
 */
bool tab_parse(struct tab *t, const char *text, size_t len, tab_wrong_fn *wrong,
	       void *arg);
void tab_free(struct tab *t);
/* The line for a device, or NULL. */
const struct tab_entry *tab_find(const struct tab *t, const char *name);

#endif
