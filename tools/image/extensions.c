// SPDX-License-Identifier: GPL-2.0-or-later
#include <string.h>

#include "image/extensions.h"
#include "lib/util.h"

#define SECTOR		512
#define HEAD		sizeof(struct qcow2_extension)
#define BITMAPS		sizeof(struct qcow2_bitmaps_ext)

/* Where the extensions are, in bytes from the start of the cluster. */
struct layout {
	size_t cluster;
	size_t bitmaps;		/* the bitmaps extension; 0: there is none */
	size_t behind;		/* and what follows it */
	size_t padding;		/* some that it could be in the place of; 0: none */
	size_t end;		/* the end marker, or where it would be */
	size_t limit;		/* what is behind that is no extension */
	bool marked;		/* there is an end marker */
	size_t name, name_len;	/* of the backing file; 0: none */
};

static struct qcow2_extension get_head(const uint8_t *first, size_t at)
{
	struct qcow2_extension head;

	memcpy(&head, first + at, sizeof(head));
	return head;
}

static void put_head(uint8_t *first, size_t at, uint32_t type, uint32_t len)
{
	struct qcow2_extension head = {
		.type = cpu_to_be32(type), .len = cpu_to_be32(len),
	};

	memcpy(first + at, &head, sizeof(head));
}

static size_t padded(size_t len)
{
	return (len + 7) & ~(size_t)7;
}

/* Is what the extension at @at says in one sector? */
static bool in_one_sector(size_t at)
{
	return (at + HEAD) % SECTOR <= SECTOR - BITMAPS;
}

/* Room for it, and for nothing else or for the head of what is left? */
static bool has_room(size_t at, uint32_t len)
{
	return in_one_sector(at) && !(len % 8) && len >= BITMAPS;
}

/* The extensions are well formed. */
static struct layout find(const uint8_t *first, size_t cluster)
{
	struct layout l = { .cluster = cluster, .limit = cluster };
	struct qcow2_header h;
	size_t at;

	memcpy(&h, first, sizeof(h));
	at = be32_to_cpu(h.header_length);
	if (h.backing_file_offset) {
		l.name = be64_to_cpu(h.backing_file_offset);
		l.name_len = be32_to_cpu(h.backing_file_size);
		l.limit = l.name;
	}
	while (at + HEAD <= l.limit) {
		struct qcow2_extension head = get_head(first, at);
		size_t next = at + HEAD + padded(be32_to_cpu(head.len));

		if (be32_to_cpu(head.type) == QCOW2_EXT_END) {
			l.marked = true;
			break;
		}
		if (be32_to_cpu(head.type) == QCOW2_EXT_BITMAPS) {
			l.bitmaps = at;
			l.behind = next;
		}
		if (be32_to_cpu(head.type) == HEADER_EXT_PADDING &&
		    !l.padding && has_room(at, be32_to_cpu(head.len)))
			l.padding = at;
		at = next;
	}
	l.end = at;
	return l;
}

/* Write it; was it not there already? */
static bool put(uint8_t *to, const void *from, size_t len)
{
	bool differs = memcmp(to, from, len);

	memmove(to, from, len);
	return differs;
}

/* Extensions that follow the bitmaps, but for padding: their length, or a copy of them. */
static size_t rest_len(const uint8_t *first, const struct layout *l)
{
	size_t at, next, n = 0;

	for (at = l->behind; l->bitmaps && at < l->end; at = next) {
		struct qcow2_extension head = get_head(first, at);

		next = at + HEAD + padded(be32_to_cpu(head.len));
		if (be32_to_cpu(head.type) != HEADER_EXT_PADDING)
			n += next - at;
	}
	return n;
}

static bool put_rest(uint8_t *first, const struct layout *l, size_t to)
{
	bool differs = false;
	size_t at, next;

	for (at = l->behind; l->bitmaps && at < l->end; at = next) {
		struct qcow2_extension head = get_head(first, at);

		next = at + HEAD + padded(be32_to_cpu(head.len));
		if (be32_to_cpu(head.type) == HEADER_EXT_PADDING)
			continue;
		differs |= put(first + to, first + at, next - at);
		to += next - at;
	}
	return differs;
}

/*
 * The name goes where the extensions do not come to, and not over itself: until the
 * header says where it is, it is where it was.
 */
static enum extension_step move_name(uint8_t *first, const struct layout *l,
				     size_t need)
{
	size_t to = padded(need);
	struct qcow2_header h;

	if (!l->name || !l->marked)
		return EXTENSION_NO_ROOM;
	if (l->cluster > SECTOR)
		to = max_u64(to, padded(l->name + l->name_len));
	if (to > l->cluster || l->name_len > l->cluster - to)
		return EXTENSION_NO_ROOM;
	if (l->cluster > SECTOR &&
	    memcmp(first + to, first + l->name, l->name_len)) {
		memcpy(first + to, first + l->name, l->name_len);
		return EXTENSION_MORE;
	}
	memmove(first + to, first + l->name, l->name_len);
	memcpy(&h, first, sizeof(h));
	h.backing_file_offset = cpu_to_be64(to);
	/* not what a shorter header has behind it */
	memcpy(first, &h, offsetof(struct qcow2_header, backing_file_size));
	return EXTENSION_MORE;
}

/* What padding says is not looked at, and neither is what follows in it. */
static enum extension_step put_in_padding(uint8_t *first, size_t at,
					  const struct qcow2_bitmaps_ext *ext)
{
	uint32_t left = be32_to_cpu(get_head(first, at).len) - BITMAPS;
	struct qcow2_extension rest = {
		.type = cpu_to_be32(HEADER_EXT_PADDING),
		.len = cpu_to_be32(left - HEAD),
	};
	bool differs;

	differs = put(first + at + HEAD, ext, BITMAPS);
	if (left)
		differs |= put(first + at + HEAD + BITMAPS, &rest, HEAD);
	if (differs)
		return EXTENSION_MORE;
	put_head(first, at, QCOW2_EXT_BITMAPS, BITMAPS);
	return EXTENSION_DONE;
}

enum extension_step extension_put(uint8_t *first, size_t cluster,
				  const struct qcow2_bitmaps_ext *ext)
{
	const struct qcow2_extension head = {
		.type = cpu_to_be32(QCOW2_EXT_BITMAPS),
		.len = cpu_to_be32(BITMAPS),
	}, none = { 0 };
	struct layout l = find(first, cluster);
	size_t from = l.bitmaps ? l.bitmaps : l.end, at, end;
	bool differs;

	if (l.bitmaps && in_one_sector(l.bitmaps)) {
		memcpy(first + l.bitmaps + HEAD, ext, BITMAPS);
		return EXTENSION_DONE;
	}
	if (!l.bitmaps && l.padding)
		return put_in_padding(first, l.padding, ext);
	/*
	 * What is behind the end marker is not seen.  When all is there, the end marker
	 * becomes the head of the extension; or, if that is not to be in that place, it
	 * or the head of the old one becomes that of padding up to the new place.
	 */
	at = l.bitmaps ? l.end + HEAD : l.end;
	while (!in_one_sector(at))
		at += HEAD;
	end = at + HEAD + BITMAPS + rest_len(first, &l);
	if (end + HEAD > l.limit && end != l.limit)
		return move_name(first, &l, end + HEAD);
	if (!l.marked)
		return EXTENSION_NO_ROOM;
	differs = put(first + at + HEAD, ext, BITMAPS);
	differs |= put_rest(first, &l, at + HEAD + BITMAPS);
	if (end < l.limit)
		differs |= put(first + end, &none, HEAD);
	if (at != from)
		differs |= put(first + at, &head, HEAD);
	if (differs)
		return EXTENSION_MORE;
	if (at == from)
		memcpy(first + at, &head, HEAD);
	else
		put_head(first, from, HEADER_EXT_PADDING, at - from - HEAD);
	return EXTENSION_DONE;
}

void extension_drop(uint8_t *first, size_t cluster)
{
	struct layout l = find(first, cluster);

	if (!l.bitmaps)
		return;
	if (l.behind == l.end)
		put_head(first, l.bitmaps, QCOW2_EXT_END, 0);
	else
		put_head(first, l.bitmaps, HEADER_EXT_PADDING, BITMAPS);
}
