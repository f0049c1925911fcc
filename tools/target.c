// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "target.h"
#include "util.h"

#define MAX_WORDS	(16 + TARGET_MAX_FEATURES)

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

/* One feature and its value from @words; how many words that was, 0: wrong. */
static unsigned int feature(char **words, unsigned int n,
			    struct target_features *f)
{
	const char *name = words[0];

	if (f->count == TARGET_MAX_FEATURES)
		return 0;
	f->name[f->count++] = name;
	if (!strcmp(name, "backing_dev")) {
		if (n < 2)
			return 0;
		f->backing_dev = words[1];
		return 2;
	}
	if (!strcmp(name, "cache_limit"))
		return n >= 2 && number(words[1], UINT64_MAX, &f->cache_limit) ?
		       2 : 0;
	if (!strcmp(name, "read_only"))
		f->read_only = true;
	else if (!strcmp(name, "data_file_raw"))
		f->data_file_raw = true;
	else if (!strcmp(name, "extended_l2"))
		f->extended_l2 = true;
	else if (!strcmp(name, "no_discard_passdown"))
		f->no_discard_passdown = true;
	return 1;
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

bool target_parse_status(const char *params, struct target_status *s)
{
	char *words[MAX_WORDS], *slash;
	unsigned int n, used;

	memset(s, 0, sizeof(*s));
	if (!copy_line(s->line, sizeof(s->line), params))
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
	used = features(words + 11, n - 11, &s->f);
	/* exactly the mode must be left */
	if (!used || 11 + used + 1 != n)
		return false;
	s->mode = words[n - 1];
	return !strcmp(s->mode, "rw") || !strcmp(s->mode, "ro") ||
	       !strcmp(s->mode, "fail");
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
			     2 * !!f->cache_limit;
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
		       (unsigned long long)f->cache_limit));
}
