// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup backup: disks as they were at one instant, while they are used
 * (stack/backup.h).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "commands/commands.h"
#include "lib/interrupt.h"
#include "lib/json.h"
#include "lib/util.h"
#include "stack/backup.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/mark.h"

static int begin(const struct options *opt, char **names, unsigned int n)
{
	const struct backup_request r = {
		.cow = opt->cow, .checkpoint = opt->checkpoint,
		.bitmap = opt->bitmap, .bitmaps = opt->bitmaps,
		.dirty_only = opt->dirty_only, .sparse = opt->sparse,
		.freeze = opt->freeze, .most = opt->size,
	};
	unsigned int i, k;

	if (!n)
		return fail(EX_PARAMETER,
			    "backup begin needs to know of what; usage: qcow2setup backup begin NAME... --cow DEV|DIR");
	if (!opt->cow)
		return fail(EX_PARAMETER,
			    "a backup keeps what changes meanwhile; give --cow DEV|DIR");
	if (opt->bitmaps && !opt->checkpoint)
		return fail(EX_PARAMETER,
			    "with a bitmap that ends another one has to begin; give --checkpoint NAME, too");
	if (opt->dirty_only && !opt->bitmaps)
		return fail(EX_PARAMETER,
			    "--dirty-only is about bitmaps; give --bitmap NAME, too");
	if (opt->backup_image && n > 1)
		return fail(EX_PARAMETER,
			    "--image names one file; leave it out for more than one device");
	for (i = 0; i < n; i++) {
		names[i] = (char *)device_name(names[i]);
		for (k = 0; k < i; k++)
			if (!strcmp(names[i], names[k]))
				return fail(EX_PARAMETER, "%s: is given twice; name it once",
					    esc(names[i]));
	}
	return backup_begin(&r, names, n, opt->backup_image);
}

static int end(const struct options *opt, char **names, unsigned int n)
{
	int ret = 0, first = 0;
	unsigned int i;

	if (!n)
		return fail(EX_PARAMETER,
			    "backup end needs to know of what; usage: qcow2setup backup end NAME... [--failed]");
	/* One that cannot be ended keeps no other one. */
	for (i = 0; i < n; i++) {
		ret = backup_end(device_name(names[i]), opt->failed);
		if (!first)
			first = ret;
	}
	mark_sweep();
	return first;
}

/* A list begins with what is in it: an error before that is all there is. */
static void begin_list(struct json *j)
{
	if (j->f)
		return;
	json_start(j, stdout);
	json_array(j, NULL);
}

static void end_list(struct json *j)
{
	begin_list(j);
	json_array_end(j);
	json_end(j);
}

struct listing {
	struct json j;
	bool json;
	const char *only;
	unsigned int found;
};

/* How many bytes of the view are kept; of the end they are counted as a granule. */
static uint64_t kept_bytes(const struct target_status *s)
{
	uint64_t granule = s->f.view_granularity ? s->f.view_granularity : 65536;

	return s->view_kept * granule;
}

static void show(struct listing *l, const char *name,
		 const struct target_status *s)
{
	struct backup_notes notes;
	char device[160];
	unsigned int i;

	backup_notes_read(name, &notes);
	backup_device_name(device, sizeof(device), name);
	if (l->json) {
		struct json *j = &l->j;

		begin_list(j);
		json_object(j, NULL);
		json_version(j);
		json_string(j, "name", name);
		json_string(j, "view", s->view);
		json_bool(j, "valid", !strcmp(s->view, "valid"));
		json_number(j, "kept", kept_bytes(s));
		json_string(j, "device", device);
		if (notes.image)
			json_string(j, "image", notes.image);
		if (notes.checkpoint)
			json_string(j, "checkpoint", notes.checkpoint);
		json_array(j, "bitmaps");
		for (i = 0; i < notes.bitmaps; i++)
			json_string(j, NULL, notes.bitmap[i]);
		json_array_end(j);
		json_object_end(j);
	} else {
		printf("%s: %s, %s kept, /dev/mapper/%s", esc(name),
		       backup_view_text(s->view), human_size(kept_bytes(s)), esc(device));
		if (notes.image)
			printf(", %s", esc(notes.image));
		for (i = 0; i < notes.bitmaps; i++)
			printf(", bitmap %s", esc(notes.bitmap[i]));
		if (notes.checkpoint)
			printf(", checkpoint %s", esc(notes.checkpoint));
		printf("\n");
	}
	backup_notes_free(&notes);
}

static int list_one(const char *name, void *arg)
{
	struct listing *l = arg;
	struct target_status s;
	struct dm_dev_info info;
	char type[64];

	if (l->only && strcmp(name, l->only))
		return 0;
	/* One that goes at this moment is no error. */
	if (dm_query(name, &info) || !info.exists ||
	    device_kind(name, info.uuid, type, sizeof(type)) != DEVICE_OURS ||
	    live_status(name, &s) || !s.view)
		return 0;
	l->found++;
	show(l, name, &s);
	return 0;
}

static int status(const struct options *opt, char **names, unsigned int n)
{
	struct listing l = { .json = opt->json };
	int ret;

	if (n > 1)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup backup status [NAME] [--json]");
	l.only = n ? device_name(names[0]) : NULL;
	ret = dm_check(true);
	if (ret)
		return ret;
	ret = dm_each(list_one, &l);
	if (!ret && n && !l.found)
		ret = fail(EX_WRONG, "%s: no backup of it is under way; begin one with qcow2setup backup begin %s --cow DEV|DIR",
			   esc(l.only), shell_quote(l.only));
	if (l.json && !ret)
		end_list(&l.j);
	return ret;
}

/*
 * What others may want to copy of it
 */

struct extents_out {
	struct json j;
	bool json;
};

static int put_piece(const struct backup_piece *p, void *arg)
{
	struct extents_out *o = arg;

	if (o->json) {
		begin_list(&o->j);
		json_object(&o->j, NULL);
		json_number(&o->j, "start", p->start);
		json_number(&o->j, "length", p->length);
		json_bool(&o->j, "dirty", p->dirty);
		json_bool(&o->j, "zero", p->zero);
		json_object_end(&o->j);
	} else {
		printf("%" PRIu64 " %" PRIu64 " %s%s\n", p->start, p->length,
		       p->dirty ? "dirty" : "clean", p->zero ? ", zero" : "");
	}
	return 0;
}

static int extents(const struct options *opt, char **names, unsigned int n)
{
	struct extents_out o = { .json = opt->json };
	struct backup_notes notes = { NULL };
	uint64_t size;
	int ret;

	if (n != 1)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup backup extents NAME [--bitmap BITMAP]... [--json]");
	ret = backup_find(device_name(names[0]), &notes);
	if (!ret)
		ret = backup_pieces(&notes, opt->bitmap, opt->bitmaps, put_piece,
				    &o, &size, NULL);
	if (!ret && o.json)
		end_list(&o.j);
	backup_notes_free(&notes);
	return ret;
}

/*
 * For other people's clients: stock qemu-nbd
 */

#define SERVE_MOST	(32 + 2 * BACKUP_MAX_BITMAPS)

static int serve(const struct options *opt, char **names, unsigned int n)
{
	struct backup_notes notes = { NULL };
	char *argv[SERVE_MOST] = { (char *)"qemu-nbd", (char *)"--read-only",
				   (char *)"--persistent", (char *)"--shared=0",
				   (char *)"--format=qcow2" };
	char *host = NULL, *port;
	unsigned int k = 5, i;
	int ret;

	if (!n)
		return fail(EX_PARAMETER,
			    "backup serve needs to know of what; usage: qcow2setup backup serve NAME --socket PATH|--listen HOST:PORT [-- OPTION...]");
	if (!opt->socket == !opt->listen)
		return fail(EX_PARAMETER,
			    "clients have to find it; give --socket PATH, or --listen HOST:PORT");
	if (n > 16)
		return fail(EX_PARAMETER, "more than 15 options for qemu-nbd; leave some out");
	ret = backup_find(device_name(names[0]), &notes);
	if (ret)
		return ret;
	for (i = 0; i < notes.bitmaps; i++) {
		argv[k++] = (char *)"-B";
		argv[k++] = notes.bitmap[i];
	}
	if (opt->socket) {
		argv[k++] = (char *)"-k";
		argv[k++] = (char *)opt->socket;
	} else {
		host = strdup(opt->listen);
		port = host ? strrchr(host, ':') : NULL;
		if (!port || port == host || !port[1]) {
			free(host);
			return fail(EX_PARAMETER, "--listen %s is no HOST:PORT; use one such as localhost:10809",
				    esc(opt->listen));
		}
		*port = 0;
		argv[k++] = (char *)"-b";
		argv[k++] = host;
		argv[k++] = (char *)"-p";
		argv[k++] = port + 1;
	}
	for (i = 1; i < n; i++)
		argv[k++] = names[i];
	argv[k++] = notes.image;
	argv[k] = NULL;
	execvp(argv[0], argv);
	ret = fail_errno("qemu-nbd: cannot be run");
	free(host);
	backup_notes_free(&notes);
	return ret;
}

static const struct what {
	const char *name;
	int (*fn)(const struct options *opt, char **names, unsigned int n);
	const char *options;		/* that it takes: words */
} verbs[] = {
	{ "begin", begin, "cow checkpoint bitmap image dirty-only sparse freeze size" },
	{ "status", status, "json" },
	{ "extents", extents, "bitmap json" },
	{ "copy", backup_copy,
	  "bitmap json resume verify overwrite-device increment-of" },
	{ "restore", backup_restore,
	  "json verify overwrite-device trust-image-paths" },
	{ "serve", serve, "socket listen" },
	{ "end", end, "failed" },
};

static int check_options(const struct what *what, const struct options *opt)
{
	const struct {
		const char *name;
		bool given;
	} options[] = {
		{ "cow", opt->cow }, { "checkpoint", opt->checkpoint },
		{ "bitmap", opt->bitmaps }, { "image", opt->backup_image },
		{ "dirty-only", opt->dirty_only }, { "sparse", opt->sparse },
		{ "json", opt->json }, { "failed", opt->failed },
		{ "freeze", opt->freeze }, { "size", opt->size },
		{ "resume", opt->resume }, { "verify", opt->verify },
		{ "overwrite-device", opt->overwrite_device },
		{ "increment-of", opt->increment_of },
		{ "trust-image-paths", opt->trust_image_paths },
		{ "socket", opt->socket }, { "listen", opt->listen },
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(options); i++)
		if (options[i].given && !strstr(what->options, options[i].name)) {
			json_refused = opt->json && !strstr(what->options, "json");
			return fail(EX_PARAMETER,
				    "backup %s takes no option --%s; see qcow2setup help backup",
				    what->name, options[i].name);
		}
	return 0;
}

int cmd_backup(const struct options *opt, char **args)
{
	unsigned int n = 0;
	size_t i;
	int ret;

	while (args[1 + n])
		n++;
	for (i = 0; i < ARRAY_SIZE(verbs); i++) {
		if (strcmp(verbs[i].name, args[0]))
			continue;
		ret = check_options(&verbs[i], opt);
		if (ret)
			return ret;
		interrupt_catch();
		return interrupt_result(verbs[i].fn(opt, args + 1, n));
	}
	return fail(EX_PARAMETER, "backup %s is not known; use backup begin, status, extents, copy, restore, serve or end",
		    esc(args[0]));
}
