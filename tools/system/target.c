// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "lib/util.h"
#include "system/target.h"

/* A status line may have any number of keys that are not known here. */
#define MAX_WORDS	256

/* Cut @line into words; 0 if there are too many. */
static unsigned int split(char *line, char **words)
{
	unsigned int n = 0;
	char *save = NULL, *w;

	for (w = strtok_r(line, " \n", &save); w;
	     w = strtok_r(NULL, " \n", &save)) {
		if (n == MAX_WORDS)
			return 0;
		words[n++] = w;
	}
	return n;
}

static bool copy_line(char *line, size_t size, const char *params)
{
	size_t len = strlen(params);

	if (len >= size)
		return false;
	memcpy(line, params, len + 1);
	return true;
}

static bool number(const char *s, uint64_t max, uint64_t *v)
{
	return parse_u64(s, v) && *v <= max;
}

/* The features, and the minor version from which on the target has them. */
static const struct known {
	const char *name;
	unsigned int minor;
	size_t flag;		/* where a struct target_features has it */
	bool value;
} known_features[] = {
	{ "read_only", 0, offsetof(struct target_features, read_only), false },
	{ "data_file_raw", 0,
	  offsetof(struct target_features, data_file_raw), false },
	{ "extended_l2", 0,
	  offsetof(struct target_features, extended_l2), false },
	{ "no_discard_passdown", 0,
	  offsetof(struct target_features, no_discard_passdown), false },
	{ "backing_dev", 0, 0, true },
	{ "cache_limit", 0, 0, true },
	{ "zeroed_from", TARGET_MINOR_ZEROED, 0, true },
	{ "bitmaps", TARGET_MINOR_BITMAPS,
	  offsetof(struct target_features, bitmaps), false },
	{ "view", TARGET_MINOR_VIEW, 0, true },
	{ "view_granularity", TARGET_MINOR_VIEW, 0, true },
};

static const struct known *find_feature(const char *name)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(known_features); i++)
		if (!strcmp(known_features[i].name, name))
			return &known_features[i];
	return NULL;
}

/* Where the value of a feature goes that is a number */
static uint64_t *number_of(struct target_features *f, const char *name)
{
	if (!strcmp(name, "zeroed_from"))
		return &f->zeroed_from;
	return strcmp(name, "view_granularity") ? &f->cache_limit :
						  &f->view_granularity;
}

/* One feature and its value from @words; how many words that was, 0: wrong. */
static unsigned int feature(char **words, unsigned int n,
			    struct target_features *f)
{
	const char *name = words[0];
	const struct known *known = find_feature(name);

	if (f->count == TARGET_MAX_FEATURES)
		return 0;
	f->name[f->count++] = name;
	if (!known) {
		if (!f->unknown)
			f->unknown = name;
		return 1;
	}
	if (!known->value) {
		*(bool *)((char *)f + known->flag) = true;
		return 1;
	}
	if (n < 2)
		return 0;
	if (!strcmp(name, "backing_dev"))
		f->backing_dev = words[1];
	else if (!strcmp(name, "view"))
		f->view = words[1];
	else if (!number(words[1], UINT64_MAX, number_of(f, name)))
		return 0;
	return 2;
}

/*
 * "<#words> <feature> [<value>]..." from @words on.  Returns how many words
 * that was, 0 if it is wrong.
 */
static unsigned int features(char **words, unsigned int n,
			     struct target_features *f)
{
	unsigned int used = 0, k;
	uint64_t v;

	if (!n || !number(words[0], MAX_WORDS, &v) || v > n - 1)
		return 0;
	while (used < v) {
		k = feature(words + 1 + used, v - used, f);
		if (!k)
			return 0;
		used += k;
	}
	return 1 + v;
}

bool target_parse_table(const char *params, struct target_table *t)
{
	char *words[MAX_WORDS];
	uint64_t bits, order;
	unsigned int n;

	memset(t, 0, sizeof(*t));
	if (!copy_line(t->line, sizeof(t->line), params))
		return false;
	n = split(t->line, words);
	if (n < 8)
		return false;
	t->metadata_dev = words[0];
	t->data_dev = words[1];
	if (!number(words[2], QCOW2_MAX_CLUSTER_BITS, &bits) ||
	    !number(words[3], UINT64_MAX, &t->l1_offset) ||
	    !number(words[4], UINT32_MAX, &t->l1_entries) ||
	    !number(words[5], UINT64_MAX, &t->reftable_offset) ||
	    !number(words[6], UINT32_MAX, &t->reftable_clusters) ||
	    !number(words[7], QCOW2_MAX_REFCOUNT_ORDER, &order))
		return false;
	t->cluster_bits = bits;
	t->refcount_order = order;
	return n == 8 ||
	       features(words + 8, n - 8, &t->f) == n - 8;
}

const char *target_lacks(const struct target_version *v,
			 const struct target_table *t)
{
	unsigned int i;

	for (i = 0; i < t->f.count; i++) {
		const struct known *known = find_feature(t->f.name[i]);

		if (!known || v->major < TARGET_MAJOR ||
		    (v->major == TARGET_MAJOR && v->minor < known->minor))
			return t->f.name[i];
	}
	return NULL;
}

/* A key and its value; those that are not known are for newer programs. */
static bool status_key(const char *key, const char *value,
		       struct target_status *s)
{
	const struct {
		const char *key;
		unsigned int given;
		uint64_t *v;
	} keys[] = {
		{ "unwritten", STATUS_UNWRITTEN, &s->unwritten },
		{ "free_clusters", STATUS_FREE_CLUSTERS, &s->free_clusters },
		{ "trims", STATUS_TRIMS, &s->trims },
		{ "bitmaps", STATUS_BITMAPS, &s->bitmaps },
		{ "exact_granules", STATUS_EXACT_GRANULES, &s->exact_granules },
		{ "durable_granules", STATUS_DURABLE_GRANULES,
		  &s->durable_granules },
		{ "mark_waits", STATUS_MARK_WAITS, &s->mark_waits },
		{ "taken_back", STATUS_TAKEN_BACK, &s->taken_back },
		{ "view_kept", STATUS_VIEW_KEPT, &s->view_kept },
		{ "view_zero", STATUS_VIEW_ZERO, &s->view_zero },
	};
	size_t i;

	if (!strcmp(key, "view")) {
		if (s->view)
			return false;
		s->view = value;
		return true;
	}

	for (i = 0; i < ARRAY_SIZE(keys); i++) {
		if (strcmp(key, keys[i].key))
			continue;
		if (s->given & keys[i].given)
			return false;
		s->given |= keys[i].given;
		return number(value, UINT64_MAX, keys[i].v);
	}
	return true;
}

/*
 * "<#words> [<key> <value>]..." from @words on.  Returns how many words that
 * was, 0 if it is wrong.
 */
static unsigned int status_keys(char **words, unsigned int n,
				struct target_status *s)
{
	unsigned int i;
	uint64_t v;

	if (!n || !number(words[0], MAX_WORDS, &v) || v > n - 1 || v % 2)
		return 0;
	for (i = 1; i <= v; i += 2)
		if (!status_key(words[i], words[i + 1], s))
			return 0;
	return 1 + v;
}

static bool is_mode(const char *word, const struct target_version *v)
{
	return !strcmp(word, "rw") || !strcmp(word, "ro") ||
	       !strcmp(word, "fail") || (v->minor && !strcmp(word, "nospc"));
}

bool target_parse_status(const char *params, const struct target_version *v,
			 struct target_status *s)
{
	char *words[MAX_WORDS], *slash;
	unsigned int n, used, at = 11;

	memset(s, 0, sizeof(*s));
	if (v->major != TARGET_MAJOR ||
	    !copy_line(s->line, sizeof(s->line), params))
		return false;
	n = split(s->line, words);
	if (n < 13)
		return false;
	slash = strchr(words[1], '/');
	if (!slash)
		return false;
	*slash = 0;
	if (!number(words[0], UINT64_MAX, &s->cluster_sectors) ||
	    !number(words[1], UINT64_MAX, &s->l2_tables) ||
	    !number(slash + 1, UINT64_MAX, &s->l1_entries) ||
	    !number(words[2], UINT64_MAX, &s->slices_cached) ||
	    !number(words[3], UINT64_MAX, &s->state_bytes) ||
	    !number(words[4], UINT64_MAX, &s->dirty_slices) ||
	    !number(words[5], UINT64_MAX, &s->hits) ||
	    !number(words[6], UINT64_MAX, &s->misses) ||
	    !number(words[7], UINT64_MAX, &s->first_writes) ||
	    !number(words[8], UINT64_MAX, &s->commits) ||
	    !number(words[9], UINT64_MAX, &s->drops) ||
	    !number(words[10], UINT64_MAX, &s->refused))
		return false;
	used = features(words + at, n - at, &s->f);
	if (!used)
		return false;
	at += used;
	if (v->minor) {
		used = status_keys(words + at, n - at, s);
		if (!used)
			return false;
		at += used;
	}
	/* exactly the mode must be left */
	if (at + 1 != n)
		return false;
	s->mode = words[at];
	return is_mode(s->mode, v);
}

/* Append to @out, of which @len bytes are taken; false if it does not fit. */
static bool append(char *out, size_t size, size_t *len, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));

static bool append(char *out, size_t size, size_t *len, const char *fmt, ...)
{
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(out + *len, size - *len, fmt, ap);
	va_end(ap);
	if (n < 0 || (size_t)n >= size - *len)
		return false;
	*len += n;
	return true;
}

bool target_format_table(char *out, size_t size, const char *metadata_dev,
			 const char *data_dev, const struct qcow2_geometry *g,
			 const struct target_features *f)
{
	unsigned int words = f->read_only + f->data_file_raw + g->ext_l2 +
			     2 * !!f->backing_dev + f->no_discard_passdown +
			     2 * !!f->cache_limit + 2 * !!f->zeroed_from +
			     f->bitmaps + 2 * !!f->view +
			     2 * !!f->view_granularity;
	size_t len = 0;

	if (!append(out, size, &len, "%s %s %u %llu %u %llu %u %u",
		    metadata_dev, data_dev, g->cluster_bits,
		    (unsigned long long)g->l1_offset, g->l1_entries,
		    (unsigned long long)g->reftable_offset,
		    g->reftable_clusters, g->refcount_order))
		return false;
	if (!words)
		return true;
	/* in the order in which the driver shows them */
	return append(out, size, &len, " %u%s%s%s", words,
		      f->read_only ? " read_only" : "",
		      f->data_file_raw ? " data_file_raw" : "",
		      g->ext_l2 ? " extended_l2" : "") &&
	       (!f->backing_dev ||
		append(out, size, &len, " backing_dev %s", f->backing_dev)) &&
	       (!f->no_discard_passdown ||
		append(out, size, &len, " no_discard_passdown")) &&
	       (!f->cache_limit ||
		append(out, size, &len, " cache_limit %llu",
		       (unsigned long long)f->cache_limit)) &&
	       (!f->zeroed_from ||
		append(out, size, &len, " zeroed_from %llu",
		       (unsigned long long)f->zeroed_from)) &&
	       (!f->bitmaps || append(out, size, &len, " bitmaps")) &&
	       (!f->view || append(out, size, &len, " view %s", f->view)) &&
	       (!f->view_granularity ||
		append(out, size, &len, " view_granularity %llu",
		       (unsigned long long)f->view_granularity));
}
