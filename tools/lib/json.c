// SPDX-License-Identifier: GPL-2.0-or-later
#include <string.h>

#include "lib/json.h"
#include "lib/util.h"

bool json_refused;

/* What there is on stdout */
static enum { NOTHING, BEGUN, COMPLETE } printed;

size_t json_utf8_len(const char *string, size_t len)
{
	const unsigned char *s = (const unsigned char *)string;
	unsigned int code, min;
	size_t n, i;

	if (s[0] < 0x80)
		return 1;
	if (s[0] >= 0xc2 && s[0] <= 0xdf) {
		n = 2;
		code = s[0] & 0x1f;
		min = 0x80;
	} else if (s[0] >= 0xe0 && s[0] <= 0xef) {
		n = 3;
		code = s[0] & 0x0f;
		min = 0x800;
	} else if (s[0] >= 0xf0 && s[0] <= 0xf4) {
		n = 4;
		code = s[0] & 0x07;
		min = 0x10000;
	} else {
		return 0;
	}
	if (len < n)
		return 0;
	for (i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80)
			return 0;
		code = code << 6 | (s[i] & 0x3f);
	}
	/* overlong, surrogate, or beyond Unicode */
	if (code < min || (code >= 0xd800 && code <= 0xdfff) || code > 0x10ffff)
		return 0;
	return n;
}

static void put_string(FILE *f, const char *string, size_t len)
{
	const unsigned char *s = (const unsigned char *)string;

	fputc('"', f);
	while (len) {
		size_t n = json_utf8_len((const char *)s, len);

		if (!n) {
			fputs("\\ufffd", f);
			n = 1;
		} else if (*s == '"' || *s == '\\') {
			fprintf(f, "\\%c", *s);
		} else if (*s < 0x20 || *s == 0x7f) {
			fprintf(f, "\\u%04x", *s);
		} else if (*s == 0xc2 && s[1] < 0xa0) {
			/* U+0080 to U+009f are control characters, too. */
			fprintf(f, "\\u%04x", s[1]);
		} else {
			fwrite(s, 1, n, f);
		}
		s += n;
		len -= n;
	}
	fputc('"', f);
}

static void new_line(struct json *j)
{
	fprintf(j->f, "\n%*s", 4 * j->depth, "");
}

/* What comes before a value: comma, line, key. */
static void begin(struct json *j, const char *key)
{
	if (j->depth) {
		if (!j->first)
			fputc(',', j->f);
		new_line(j);
	}
	j->first = false;
	if (key) {
		put_string(j->f, key, strlen(key));
		fputs(": ", j->f);
	}
}

static void open_container(struct json *j, const char *key, char c)
{
	begin(j, key);
	fputc(c, j->f);
	j->depth++;
	j->first = true;
}

static void close_container(struct json *j, char c)
{
	j->depth--;
	if (!j->first)
		new_line(j);
	fputc(c, j->f);
	j->first = false;
}

void json_start(struct json *j, FILE *f)
{
	*j = (struct json){ .f = f, .first = true };
	printed = BEGUN;
}

void json_end(struct json *j)
{
	fputc('\n', j->f);
	printed = COMPLETE;
}

void json_object(struct json *j, const char *key)
{
	open_container(j, key, '{');
}

void json_object_end(struct json *j)
{
	close_container(j, '}');
}

void json_array(struct json *j, const char *key)
{
	open_container(j, key, '[');
}

void json_array_end(struct json *j)
{
	close_container(j, ']');
}

void json_stringn(struct json *j, const char *key, const char *s, size_t len)
{
	begin(j, key);
	put_string(j->f, s, len);
}

void json_string(struct json *j, const char *key, const char *s)
{
	json_stringn(j, key, s, strlen(s));
}

void json_number(struct json *j, const char *key, uint64_t v)
{
	begin(j, key);
	fprintf(j->f, "%llu", (unsigned long long)v);
}

void json_bool(struct json *j, const char *key, bool v)
{
	begin(j, key);
	fputs(v ? "true" : "false", j->f);
}

void json_version(struct json *j)
{
	json_number(j, "version", JSON_VERSION);
}

void json_failure(FILE *f, int status)
{
	static const char * const words[] = {
		[EX_PARAMETER] = "parameter", [EX_PERMISSION] = "permission",
		[EX_MEMORY] = "memory", [EX_WRONG] = "wrong", [EX_BUSY] = "busy",
	};
	const struct failure *e = first_failure();
	unsigned int code = e ? e->code : EX_WRONG;

	if (!e || printed == COMPLETE)
		return;
	if (code >= ARRAY_SIZE(words) || !words[code])
		code = EX_WRONG;
	fprintf(f, "%s{\"version\": %d, \"error\": {\"exit\": %d, \"kind\": \"%s\", \"message\": ",
		printed == BEGUN ? "\n" : "", JSON_VERSION, status, words[code]);
	put_string(f, e->message, strlen(e->message));
	if (e->remedy) {
		fputs(", \"remedy\": ", f);
		put_string(f, e->remedy, strlen(e->remedy));
	}
	fputs("}}\n", f);
}
