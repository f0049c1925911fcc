/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * JSON as qemu-img prints it: nested objects and arrays, four blanks of
 * indentation.  (libsmartcols can only print tables.)  Strings may hold any
 * bytes: what is no UTF-8 becomes U+FFFD, so the result is always valid.
 *
 * @key is NULL inside arrays and for the outermost value.
 */
#ifndef QCOW2SETUP_JSON_H
#define QCOW2SETUP_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Of the names and meanings of keys: Documentation/qcow2setup-json.7 */
#define JSON_VERSION	1

struct json {
	FILE *f;
	unsigned int depth;
	bool first;		/* nothing yet in the innermost container */
};

/* Bytes of the UTF-8 sequence that @s, of @len bytes and not empty, starts with; 0: it is none. */
size_t json_utf8_len(const char *s, size_t len);

void json_start(struct json *j, FILE *f);
void json_end(struct json *j);
void json_object(struct json *j, const char *key);
void json_object_end(struct json *j);
void json_array(struct json *j, const char *key);
void json_array_end(struct json *j);
void json_string(struct json *j, const char *key, const char *s);
void json_stringn(struct json *j, const char *key, const char *s, size_t len);
void json_number(struct json *j, const char *key, uint64_t v);
void json_bool(struct json *j, const char *key, bool v);
void json_version(struct json *j);

/*
 * The error that fail() has told, as an object in a line of its own, with the
 * program's exit code @status.  Nothing if a whole value was printed: that says it.
 */
void json_failure(FILE *f, int status);

/* --json was given, but what was asked for has none: no reader waits for it. */
extern bool json_refused;

#endif
