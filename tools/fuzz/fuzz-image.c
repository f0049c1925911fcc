// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A whole image, in the hands of the commands that read one and of the steps that
 * change one.  Input: what to do, how large clusters may be, and how the file
 * ends; then pieces of 512 bytes, each the beginning of a cluster, so that small
 * inputs make images with large clusters.
 *
 * What is found besides crashes: output that a terminal or a JSON parser could
 * choke on, a command that changes what it should read only, a step that is not
 * undone, one that makes an image worse or changes what the disk holds, and a
 * repair that does not last.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "commands/commands.h"
#include "fuzz.h"
#include "image/image.h"
#include "image/prepare.h"
#include "image/verify.h"
#include "lib/util.h"
#include "system/loop.h"

/* No command line is parsed here. */
const struct action actions[] = { { 0 } };

#define PIECE		512
#define HEAD		3
#define MAX_PIECES	64
#define SPACE		(128 << 20)

bool __wrap_loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
		      size_t size);
int __wrap_fsync(int fd);
int __real_fallocate64(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate64(int fd, int mode, off_t off, off_t len);

/* It reads all of /sys/block, for a file that no one else can have. */
bool __wrap_loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
		      size_t size)
{
	(void)dev;
	(void)ino;
	(void)skip_read_only;
	(void)name;
	(void)size;
	return false;
}

int __wrap_fsync(int fd)
{
	(void)fd;
	return 0;
}

/* The file is in memory, of which an image could want any amount. */
int __wrap_fallocate64(int fd, int mode, off_t off, off_t len)
{
	if (!mode && off + len > SPACE) {
		errno = ENOSPC;
		return -1;
	}
	return __real_fallocate64(fd, mode, off, len);
}

/*
 * Output
 */

struct output {
	char *text[2];			/* of stdout and stderr */
	size_t len[2];
	FILE *real[2];
};

static void capture(struct output *o)
{
	FILE *f[2];
	int i;

	for (i = 0; i < 2; i++) {
		f[i] = open_memstream(&o->text[i], &o->len[i]);
		MUST(f[i]);
	}
	o->real[0] = stdout;
	o->real[1] = stderr;
	stdout = f[0];
	stderr = f[1];
}

static void captured(struct output *o)
{
	fclose(stdout);
	fclose(stderr);
	stdout = o->real[0];
	stderr = o->real[1];
}

static void output_free(struct output *o)
{
	free(o->text[0]);
	free(o->text[1]);
}

static void must_be_plain(const char *text, size_t len)
{
	size_t i;

	for (i = 0; i < len; i++)
		MUST(text[i] == '\n' || (text[i] >= ' ' && text[i] <= '~'));
}

/* Bytes of the UTF-8 character at @p, 0 if it is none. */
static unsigned int utf8(const unsigned char *p)
{
	unsigned int n, i;
	uint32_t c;

	if (*p < 0x80)
		return 1;
	n = *p >= 0xf0 ? 4 : *p >= 0xe0 ? 3 : 2;
	if (*p < 0xc2 || *p > 0xf4)
		return 0;
	c = *p & (0xff >> (n + 1));
	for (i = 1; i < n; i++) {
		if ((p[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (p[i] & 0x3f);
	}
	if (c < (n == 3 ? 0x800 : n == 4 ? 0x10000 : 0x80) || c > 0x10ffff ||
	    (c >= 0xd800 && c < 0xe000))
		return 0;
	return n;
}

static const char *json_value(const char *p);

static const char *blank(const char *p)
{
	return p + strspn(p, " \n\t");
}

static const char *json_text(const char *p)
{
	MUST(*p++ == '"');
	while (*p != '"') {
		if (*p == '\\') {
			p++;
			MUST(strchr("\"\\/bfnrtu", *p) && *p);
			if (*p == 'u')
				MUST(strspn(p + 1, "0123456789abcdefABCDEF") >= 4);
			p++;
			continue;
		}
		MUST((unsigned char)*p >= ' ' && *p != 0x7f);
		/* C1 control characters do what escapes do */
		MUST(!(*p == '\xc2' && (unsigned char)p[1] < 0xa0));
		MUST(utf8((const unsigned char *)p));
		p += utf8((const unsigned char *)p);
	}
	return p + 1;
}

static const char *json_list(const char *p, char end, bool names)
{
	p = blank(p + 1);
	while (*p != end) {
		if (names) {
			p = blank(json_text(p));
			MUST(*p++ == ':');
		}
		p = blank(json_value(blank(p)));
		MUST(*p == ',' || *p == end);
		if (*p == ',') {
			p = blank(p + 1);
			MUST(*p != end);
		}
	}
	return p + 1;
}

static const char *json_value(const char *p)
{
	size_t n;

	if (*p == '{')
		return json_list(p, '}', true);
	if (*p == '[')
		return json_list(p, ']', false);
	if (*p == '"')
		return json_text(p);
	n = strspn(p, "0123456789");
	if (n)
		return p + n;
	if (!strncmp(p, "true", 4) || !strncmp(p, "null", 4))
		return p + 4;
	MUST(!strncmp(p, "false", 5));
	return p + 5;
}

static void must_be_json(const char *text)
{
	MUST(!*blank(json_value(blank(text))));
}

/*
 * The file
 */

static uint64_t file_hash(int fd)
{
	uint64_t hash = 0xcbf29ce484222325ULL, word;
	off_t size = lseek(fd, 0, SEEK_END), off;
	const uint8_t *p;
	size_t n;

	p = size ? mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0) : NULL;
	MUST(p != MAP_FAILED);
	for (off = 0; off < size; off += 8) {
		word = 0;
		n = size - off < 8 ? size - off : 8;
		memcpy(&word, p + off, n);
		hash = (hash ^ word) * 0x100000001b3ULL;
		hash ^= hash >> 29;
	}
	if (size)
		munmap((void *)p, size);
	return hash ^ size;
}

/* Fills @fd with the image that the input is. */
static void build(int fd, const uint8_t *data, size_t size)
{
	/* large ones take their time */
	static const uint8_t bits[] = {
		9, 9, 9, 9, 9, 9, 9, 9, 9, 12, 12, 14, 14, 16, 16, 21
	};
	uint64_t cs = 1ULL << bits[data[1] % ARRAY_SIZE(bits)], bytes;
	size_t pieces = (size - HEAD + PIECE - 1) / PIECE, i;

	if (pieces > MAX_PIECES)
		pieces = MAX_PIECES;
	MUST(!ftruncate(fd, 0));
	bytes = pieces * cs;
	MUST(!ftruncate(fd, bytes));
	for (i = 0; i < pieces; i++) {
		size_t at = HEAD + i * PIECE;
		size_t n = size - at < PIECE ? size - at : PIECE;

		MUST(pwrite(fd, data + at, n, i * cs) == (ssize_t)n);
	}
	if (data[2] >= 128)
		bytes += (data[2] - 128) * cs;
	else
		bytes -= data[2] * 16 < (int)cs ? data[2] * 16 : cs - 1;
	MUST(!ftruncate(fd, bytes));
}

typedef int command(const struct options *opt, char **args);

/* Run a command; returns its exit code, and its output if it is wanted. */
static int do_command(command *cmd, const struct options *opt, char *path,
		      struct output *out)
{
	struct output o = { .text[0] = NULL };
	char *args[] = { path, NULL };
	int ret;

	capture(&o);
	ret = cmd(opt, args);
	captured(&o);
	must_be_plain(o.text[1], o.len[1]);
	MUST(ret >= 0 && ret <= 5);
	if (!opt->json)
		must_be_plain(o.text[0], o.len[0]);
	else if (!ret)
		must_be_json(o.text[0]);
	/* What fails says why, and nobody else says so. */
	MUST(!ret || o.len[1]);
	if (out)
		*out = o;
	else
		output_free(&o);
	return ret;
}

static void only_read(int fd, char *path, struct output *map)
{
	static command * const commands[] = { cmd_info, cmd_check, cmd_map };
	struct options opt = { 0 };
	uint64_t before = file_hash(fd);
	unsigned int i;
	int ret[2];

	for (i = 0; i < ARRAY_SIZE(commands); i++) {
		opt.json = false;
		ret[0] = do_command(commands[i], &opt, path, NULL);
		opt.json = true;
		ret[1] = do_command(commands[i], &opt, path,
				    commands[i] == cmd_map ? map : NULL);
		MUST(ret[0] == ret[1]);
	}
	MUST(file_hash(fd) == before);
}

static uint64_t corruptions(struct image *img)
{
	struct verify v = { .img = img };
	uint64_t n = ~0ULL;

	if (!verify_image(&v, img) && !v.errors)
		n = v.corruptions;
	verify_free(&v);
	return n;
}

/* Prepare, undo or grow, and trim: as open and close, and resize, do it. */
static void change(int fd, char *path, unsigned int what,
		   const struct output *map)
{
	struct reasons reasons;
	struct output o = { .text[0] = NULL }, after = { .text[0] = NULL };
	struct options opt = { .json = true };
	struct growth growth = { 0 };
	uint64_t before = file_hash(fd), bad = 0, cut;
	struct image img;
	int ret;

	capture(&o);
	ret = image_open(&img, AT_FDCWD, path, 0);
	if (!ret) {
		image_reasons(&img, false, &reasons);
		ret = reasons.n ? EX_WRONG : 0;
	}
	if (!ret)
		bad = corruptions(&img);
	if (!ret)
		ret = image_load_tables(&img, true);
	if (!ret) {
		growth.size = img.geo.size + (1ULL << what % 40) * 512;
		ret = what & 64 ? image_grow(&img, &growth) :
				  image_prepare(&img);
		if (ret || what & 128) {
			image_undo(&img);
			ret = EX_WRONG;
		}
	}
	if (ret) {
		image_close(&img);
		captured(&o);
		must_be_plain(o.text[1], o.len[1]);
		output_free(&o);
		MUST(file_hash(fd) == before);
		return;
	}
	image_close(&img);
	if (!image_open(&img, AT_FDCWD, path, 0)) {
		uint64_t now = corruptions(&img);

		if (now <= bad)
			image_trim(&img, &cut);
		captured(&o);
		MUST(now <= bad);
		must_be_plain(o.text[1], o.len[1]);
		output_free(&o);
	} else {
		captured(&o);
		MUST(!"the image cannot be opened any more");
	}
	image_close(&img);
	/* A larger one has more behind the same. */
	if (what & 64 || map->len[0] < 2)
		return;
	ret = do_command(cmd_map, &opt, path, &after);
	if (map->text[0][map->len[0] - 2] == ']') {
		MUST(!ret);
		MUST(!strcmp(after.text[0], map->text[0]));
	}
	output_free(&after);
}

static void repair(char *path, bool all)
{
	struct options opt = { .repair = all ? REPAIR_ALL : REPAIR_LEAKS };
	int ret = do_command(cmd_check, &opt, path, NULL);
	uint64_t hash;
	int fd;

	opt.repair = REPAIR_NONE;
	MUST(ret == 1 || do_command(cmd_check, &opt, path, NULL) == ret);
	if (ret)
		return;
	/* There is nothing left to do. */
	fd = open(path, O_RDONLY);
	MUST(fd >= 0);
	hash = file_hash(fd);
	opt.repair = REPAIR_ALL;
	ret = do_command(cmd_check, &opt, path, NULL);
	if (all)
		MUST(!ret && file_hash(fd) == hash);
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct output map = { .text[0] = NULL };
	static char path[40];
	static int fd = -1;

	if (size <= HEAD)
		return 0;
	if (fd < 0) {
		fd = memfd_create("fuzz", 0);
		MUST(fd >= 0);
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	}
	build(fd, data, size);
	only_read(fd, path, &map);
	change(fd, path, data[0], &map);
	output_free(&map);
	if (data[0] & 1)
		build(fd, data, size);
	repair(path, data[0] & 2);
	return 0;
}
