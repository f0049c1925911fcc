// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "lib/tabfile.h"
#include "lib/util.h"

const char *tab_file(void)
{
	const char *file = secure_getenv("QCOW2TAB");

	return file && *file ? file : TAB_FILE;
}

static int read_all(FILE *f, char **text, size_t *len)
{
	FILE *out = open_memstream(text, len);
	char part[4096];
	int ret = 0;
	size_t n;

	if (!out)
		return fail_nomem();
	while ((n = fread(part, 1, sizeof(part), f)))
		fwrite(part, 1, n, out);
	if (ferror(f))
		ret = fail_errno("%s: cannot read it", esc(tab_file()));
	if (fclose(out) && !ret)
		ret = fail_nomem();
	return ret;
}

int tab_load(struct tab *t, tab_wrong_fn *wrong, void *arg)
{
	char *text = NULL;
	size_t len = 0;
	FILE *f;
	int ret;

	*t = (struct tab){ 0 };
	f = fopen(tab_file(), "re");
	if (!f)
		return errno == ENOENT ? 0 :
			fail_errno("%s: cannot open it", esc(tab_file()));
	ret = read_all(f, &text, &len);
	fclose(f);
	if (!ret && !tab_parse(t, text, len, wrong, arg))
		ret = fail_nomem();
	free(text);
	return ret;
}
