// SPDX-License-Identifier: GPL-2.0-or-later
#include <libsmartcols.h>
#include <limits.h>
#include <stdio.h>

#include "lib/util.h"
#include "stack/report_table.h"

void report_name_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", r->name);
}

void report_size_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", human_size(r->size));
}

static int fill_line(struct libscols_table *table, const struct report *r,
		     const struct report_column *column, size_t columns)
{
	struct libscols_line *line = scols_table_new_line(table, NULL);
	char cell[PATH_MAX];
	size_t i;
	int ret = line ? 0 : -1;

	/* libsmartcols escapes what it prints. */
	for (i = 0; !ret && i < columns; i++) {
		column[i].cell(cell, sizeof(cell), r);
		ret = scols_line_set_data(line, i, cell);
	}
	return ret;
}

int report_table(const struct report_list *list, const struct report_column *column,
		 size_t columns)
{
	struct libscols_table *table;
	size_t i;
	int ret = 0;

	if (!list->n)
		return 0;
	scols_init_debug(0);
	table = scols_new_table();
	if (!table)
		return fail_nomem();
	for (i = 0; !ret && i < columns; i++)
		ret = !scols_table_new_column(table, column[i].name, 0,
					      column[i].right ? SCOLS_FL_RIGHT : 0);
	for (i = 0; !ret && i < list->n; i++)
		if (!list->r[i].gone)
			ret = fill_line(table, &list->r[i], column, columns);
	if (!ret)
		ret = scols_print_table(table);
	scols_unref_table(table);
	return ret ? fail_nomem() : 0;
}
