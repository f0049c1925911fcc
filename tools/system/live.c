// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/util.h"
#include "system/dm.h"
#include "system/live.h"

/* @v: the version of the target that says so */
static int read_status(const char *name, struct target_version *v,
		       struct target_status *s)
{
	char *type, *params;
	uint64_t sectors;
	int ret;

	ret = dm_target_version(v);
	if (!ret)
		ret = dm_params(name, true, &type, &params, &sectors);
	if (ret)
		return ret;
	if (strcmp(type, DM_TARGET))
		ret = fail(EX_WRONG,
			   "%s: not a qcow2 device; qcow2setup status lists those that are open",
			   esc(name));
	else if (!target_parse_status(params, v, s))
		ret = fail(EX_WRONG,
			   "%s: status of the dm-qcow2 module, of version %u.%u.%u, is not understood (%s); use the qcow2setup that belongs to the module",
			   esc(name), v->major, v->minor, v->patch,
			   esc(params));
	free(type);
	free(params);
	return ret;
}

int live_status(const char *name, struct target_status *s)
{
	struct target_version v;

	return read_status(name, &v, s);
}

int live_unwritten(const char *name, struct target_status *s,
		   uint64_t *unwritten)
{
	struct target_version v;
	int ret = read_status(name, &v, s);

	if (ret)
		return ret == -ENXIO ? dm_gone(name) : ret;
	/* Version 1.0 does not count them, and what is dirty then, stays so. */
	*unwritten = v.minor ? s->unwritten : s->dirty_slices;
	if (!v.minor || s->given & STATUS_UNWRITTEN)
		return 0;
	return fail(EX_WRONG,
		    "%s: status does not tell whether all metadata is written; use the qcow2setup that belongs to the module",
		    esc(name));
}
