// SPDX-License-Identifier: GPL-2.0-or-later
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

/*
 * "<#features> <feature>..." from @words on.  Returns how many words that was,
 * 0 if it is wrong.
 */
static unsigned int features(char **words, unsigned int n,
			     const char **feature, unsigned int *count)
{
	uint64_t v;
	unsigned int i;

	if (!n || !number(words[0], TARGET_MAX_FEATURES, &v) || v > n - 1)
		return 0;
	*count = v;
	for (i = 0; i < v; i++)
		feature[i] = words[1 + i];
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
	       features(words + 8, n - 8, t->feature, &t->features) == n - 8;
}

bool target_parse_status(const char *params, struct target_status *s)
{
	char *words[MAX_WORDS], *slash;
	unsigned int n, used;

	memset(s, 0, sizeof(*s));
	if (!copy_line(s->line, sizeof(s->line), params))
		return false;
	n = split(s->line, words);
	if (n < 12)
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
	    !number(words[9], UINT64_MAX, &s->drops))
		return false;
	used = features(words + 10, n - 10, s->feature, &s->features);
	/* exactly the mode must be left */
	if (!used || 10 + used + 1 != n)
		return false;
	s->mode = words[n - 1];
	return !strcmp(s->mode, "rw") || !strcmp(s->mode, "ro") ||
	       !strcmp(s->mode, "fail");
}

bool target_format_table(char *out, size_t size, const char *metadata_dev,
			 const char *data_dev, const struct qcow2_geometry *g,
			 bool read_only, bool data_file_raw)
{
	unsigned int count = read_only + data_file_raw;
	int n;

	n = snprintf(out, size, "%s %s %u %llu %u %llu %u %u", metadata_dev,
		     data_dev, g->cluster_bits,
		     (unsigned long long)g->l1_offset, g->l1_entries,
		     (unsigned long long)g->reftable_offset,
		     g->reftable_clusters, g->refcount_order);
	if (n >= 0 && (size_t)n < size && count)
		n += snprintf(out + n, size - n, " %u%s%s", count,
			      read_only ? " read_only" : "",
			      data_file_raw ? " data_file_raw" : "");
	return n >= 0 && (size_t)n < size;
}
