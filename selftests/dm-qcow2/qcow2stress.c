// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Random requests on a block device, and on a model of what it must contain.
 *
 * usage: qcow2stress [OPTION]... DEVICE MODEL STATES
 *
 * MODEL is a file with the content that DEVICE must have, STATES one with a
 * byte for each unit: 'u' unallocated, 'z' zero, 'd' data.  Both are changed
 * along with the device, so that a later run can go on with them.
 *
 *   -s SEED    of the random numbers; thread N always does the same sequence
 *   -n COUNT   requests in all (default 1000)
 *   -t COUNT   threads, that is requests in flight (default 4)
 *   -u BYTES   size of a unit, -c BYTES: of a cluster
 *   -b BYTES   size of the backing device below unallocated units
 *   -r         data_file_raw: everything goes to the data device as it is
 *   -d WHAT    what a discard does: units (whole ones become zero, the rest
 *              stays), exact (the range reads as zeros), none (send no discards)
 *   -z WHAT    write zeroes: native, or fallback (the kernel writes zeros)
 *   -v         at the end (or with -n 0: only) read everything
 *
 * Requests in flight at the same time never overlap, except for reads, but they
 * do meet in the same units.  What a request must have done is therefore known,
 * whatever the order.  Prints one line of counts at the end; at the first
 * difference what was expected, what was found, and the requests that touched
 * the place.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PROGRAM		"qcow2stress"
#include "pattern.h"

#define MAX_THREADS	64
#define MAX_REQUEST	(2UL << 20)
#define HISTORY		(1U << 16)

/* Of 1000 requests */
static const unsigned int weights[KINDS] = { 290, 30, 370, 30, 110, 40, 40, 70, 20 };

struct request {
	enum kind kind;
	uint64_t start, end;		/* bytes */
	uint64_t id;
};

struct worker {
	pthread_t thread;
	unsigned int number;
	uint64_t rng;
	unsigned long count;
	unsigned char *buffer;
	struct request now;		/* end == 0: none in flight */
};

static uint64_t size, unit, cluster;
static uint64_t seed = 1;
static unsigned long requests = 1000;
static unsigned int threads = 4;
static uint64_t backing;
static bool raw, zeroes_fall_back, discard_exact, discards = true, verify;
static int fd = -1, fd_sync = -1;
static unsigned char *model;
static char *states;

/* Guards what follows, and the model and the states outside of ranges in flight */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;
static struct worker workers[MAX_THREADS];
static struct { struct request request; unsigned long begun, ended; } history[HISTORY];
static unsigned long begun, counts[KINDS], again;

static uint64_t below(struct worker *w, uint64_t limit)
{
	return next(&w->rng) % limit;
}

static void describe(char *text, size_t n, const unsigned char *sector)
{
	uint64_t word[2];
	size_t i;

	memcpy(word, sector, sizeof(word));
	for (i = 0; i < SECTOR && !sector[i]; i++)
		;
	if (i == SECTOR)
		snprintf(text, n, "zeros");
	else if (word[0] >> 56 == 0xa5 && word[1] < size / SECTOR)
		snprintf(text, n, "request %#llx's data for %#llx", (unsigned long long)word[0],
			 (unsigned long long)word[1] * SECTOR);
	else
		snprintf(text, n, "other data (%016llx)", (unsigned long long)word[0]);
}

/* Under the lock, or alone */
static void __attribute__((noreturn)) differs(const unsigned char *got, uint64_t offset,
					      uint64_t length, const char *what)
{
	char is[80], should[80];
	uint64_t at, bad = 0, first = UINT64_MAX;
	unsigned long i, shown = 0;

	for (at = 0; at < length; at += SECTOR) {
		if (!memcmp(got + at, model + offset + at, SECTOR))
			continue;
		bad++;
		if (first == UINT64_MAX)
			first = at;
	}
	describe(is, sizeof(is), got + first);
	describe(should, sizeof(should), model + offset + first);
	first += offset;
	fprintf(stderr, "qcow2stress: %s at %#llx+%#llx: %llu sectors differ, the first at %#llx (unit %llu%+lld, model state %c): %s found, %s expected\n",
		what, (unsigned long long)offset, (unsigned long long)length,
		(unsigned long long)bad, (unsigned long long)first,
		(unsigned long long)(first / unit), (long long)(first % unit),
		states[first / unit], is, should);
	fprintf(stderr, "The last requests to that unit, newest first (begun, ended):\n");
	for (i = begun; i > 0 && begun - i < HISTORY && shown < 16; i--) {
		const struct request *r = &history[i % HISTORY].request;

		if (r->start / unit > first / unit || (r->end - 1) / unit < first / unit || !r->end)
			continue;
		fprintf(stderr, "  %lu-%lu %s %#llx+%#llx id %#llx%s\n", history[i % HISTORY].begun,
			history[i % HISTORY].ended, names[r->kind],
			(unsigned long long)r->start, (unsigned long long)(r->end - r->start),
			(unsigned long long)r->id, r->start <= first && first < r->end ? "" : " (another part)");
		shown++;
	}
	_exit(1);
}

/*
 * Where, and how much: borders of units and clusters are more likely than not,
 * some places are hot, so that there are overwrites, and the end is one.
 */
static void pick(struct worker *w, struct request *r)
{
	uint64_t sectors = size / SECTOR, per = unit / SECTOR, n, at;
	unsigned int way = below(w, 100);

	if (r->kind >= DISCARD && below(w, 2)) {
		/* Many units, ragged edges */
		n = 1 + below(w, MIN(per * 20, MAX_REQUEST / SECTOR));
	} else if (way < 25) {
		n = per * (1 + below(w, 3));
	} else if (way < 50) {
		n = 1 + below(w, per);
	} else if (way < 92) {
		n = 1 + below(w, MIN(64, 3 * per));
	} else {
		n = 1 + below(w, MAX(2, MIN(2048, 8 * per)));
	}
	n = MIN(MIN(n, sectors), MAX_REQUEST / SECTOR);
	at = below(w, sectors - n + 1);
	way = below(w, 100);
	if (way < 40)
		at -= at % per;
	else if (way < 55)
		at -= at % (cluster / SECTOR);
	way = below(w, 100);
	if (way < 30)
		at %= MIN(sectors, 6 * cluster / SECTOR);
	else if (way < 36)
		at = sectors - n;
	else if (way < 39)
		/* The last unit, which may be cut */
		at = (sectors - 1) / per * per;
	at = MIN(at, sectors - 1);
	n = MIN(n, sectors - at);
	r->start = at * SECTOR;
	r->end = r->start + n * SECTOR;
}

static void choose(struct worker *w, struct request *r)
{
	unsigned int sum = 0, way = below(w, 1000);

	for (r->kind = 0; r->kind < KINDS - 1; r->kind++) {
		sum += weights[r->kind];
		if (way < sum)
			break;
	}
	if (r->kind == DISCARD && !discards)
		r->kind = WRITE;
	if (r->kind == PUNCH_HOLE && zeroes_fall_back)
		r->kind = ZERO_OUT;
	pick(w, r);
	if (r->kind == FLUSH)
		r->start = r->end = 0;
}

static bool conflict(const struct request *r)
{
	unsigned int i;

	for (i = 0; i < threads; i++) {
		const struct request *o = &workers[i].now;

		if (o->end && r->start < o->end && o->start < r->end &&
		    (r->kind > READ_NOWAIT || o->kind > READ_NOWAIT))
			return true;
	}
	return false;
}

static int transfer(struct worker *w, const struct request *r)
{
	uint64_t length = r->end - r->start, done = 0;
	struct iovec iov;
	ssize_t n;

	while (done < length) {
		iov.iov_base = w->buffer + done;
		iov.iov_len = length - done;
		if (r->kind == WRITE || r->kind == WRITE_FUA) {
			n = pwritev(r->kind == WRITE ? fd : fd_sync, &iov, 1, r->start + done);
		} else {
			n = preadv2(fd, &iov, 1, r->start + done, r->kind == READ_NOWAIT ? RWF_NOWAIT : 0);
			if (n < 0 && errno == EAGAIN && r->kind == READ_NOWAIT) {
				again++;
				n = preadv(fd, &iov, 1, r->start + done);
			}
		}
		if (n < 0)
			return errno;
		if (!n)
			return EIO;
		done += n;
	}
	return 0;
}

static int perform(struct worker *w, const struct request *r)
{
	uint64_t range[2] = { r->start, r->end - r->start };
	int mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;

	switch (r->kind) {
	case READ:
	case READ_NOWAIT:
		return transfer(w, r);
	case WRITE:
	case WRITE_FUA:
		fill(w->buffer, r->start, r->end - r->start, r->id);
		return transfer(w, r);
	case DISCARD:
		return ioctl(fd, BLKDISCARD, range) ? errno : 0;
	case ZERO_OUT:
		return ioctl(fd, BLKZEROOUT, range) ? errno : 0;
	case PUNCH_HOLE:
		return punch_hole(fd, r->start, r->end - r->start, raw);
	case ZERO_RANGE:
		return fallocate(fd, mode, r->start, r->end - r->start) ? errno : 0;
	case FLUSH:
		return fdatasync(fd) ? errno : 0;
	default:
		return EINVAL;
	}
}

/* The part of a request that is whole units; the device's end completes one. */
static void whole(const struct request *r, uint64_t *from, uint64_t *to)
{
	*from = (r->start + unit - 1) / unit * unit;
	*to = r->end == size ? size : r->end / unit * unit;
	if (*to < *from)
		*to = *from;
}

/* Under the lock: what a request that succeeded has done. */
static void apply(const struct request *r, const unsigned char *buffer)
{
	uint64_t at, from, to;

	whole(r, &from, &to);
	switch (r->kind) {
	case READ:
	case READ_NOWAIT:
		if (memcmp(buffer, model + r->start, r->end - r->start))
			differs(buffer, r->start, r->end - r->start, names[r->kind]);
		break;
	case WRITE:
	case WRITE_FUA:
		memcpy(model + r->start, buffer, r->end - r->start);
		for (at = r->start / unit; at <= (r->end - 1) / unit; at++)
			states[at] = 'd';
		break;
	case DISCARD:
		if (discard_exact)
			memset(model + r->start, 0, r->end - r->start);
		else
			memset(model + from, 0, to - from);
		break;
	default:
		memset(model + r->start, 0, r->end - r->start);
		break;
	}
	if (r->kind < DISCARD)
		return;
	for (at = r->start / unit; at <= (r->end - 1) / unit; at++) {
		bool all = at * unit >= from && at * unit < to;

		if (raw)
			continue;
		else if (r->kind != DISCARD && zeroes_fall_back)
			states[at] = 'd';
		else if (all && (states[at] == 'd' || at * unit < backing))
			states[at] = 'z';
		else if (!all && r->kind != DISCARD && states[at] == 'u' &&
			 (at * unit > r->start ? at * unit : r->start) < backing)
			/* A part of it, over something: as a write */
			states[at] = 'd';
	}
}

static void *work(void *argument)
{
	struct worker *w = argument;
	unsigned long i, slot;
	struct request r;
	int error;

	for (i = 0; i < w->count; i++) {
		choose(w, &r);
		r.id = 0xa5ULL << 56 | (seed & 0xffff) << 40 | (uint64_t)w->number << 32 | i;

		pthread_mutex_lock(&lock);
		while (conflict(&r))
			pthread_cond_wait(&finished, &lock);
		w->now = r;
		slot = ++begun % HISTORY;
		history[slot].request = r;
		history[slot].begun = begun;
		history[slot].ended = 0;
		pthread_mutex_unlock(&lock);

		error = perform(w, &r);

		pthread_mutex_lock(&lock);
		if (error)
			die("%s at %#llx+%#llx: %s", names[r.kind], (unsigned long long)r.start,
			    (unsigned long long)(r.end - r.start), strerror(error));
		if (r.kind != FLUSH)
			apply(&r, w->buffer);
		history[slot].ended = begun;
		w->now.end = 0;
		counts[r.kind]++;
		pthread_cond_broadcast(&finished);
		pthread_mutex_unlock(&lock);
	}
	return NULL;
}

static void read_all(unsigned char *buffer)
{
	uint64_t at, n;

	for (at = 0; at < size; at += n) {
		n = MIN(size - at, MAX_REQUEST / 2);
		if (pread(fd, buffer, n, at) != (ssize_t)n)
			die("read at %#llx+%#llx: %s", (unsigned long long)at, (unsigned long long)n,
			    strerror(errno));
		if (memcmp(buffer, model + at, n))
			differs(buffer, at, n, "reading everything");
	}
}

static void *map_file(const char *path, uint64_t length)
{
	int file = open(path, O_RDWR | O_CLOEXEC);
	struct stat st;
	void *p;

	if (file < 0 || fstat(file, &st))
		die("%s: %s", path, strerror(errno));
	if ((uint64_t)st.st_size != length)
		die("%s has %llu bytes, not %llu", path, (unsigned long long)st.st_size,
		    (unsigned long long)length);
	p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (p == MAP_FAILED)
		die("%s: %s", path, strerror(errno));
	close(file);
	return p;
}

int main(int argc, char **argv)
{
	unsigned int i;
	int c;

	while ((c = getopt(argc, argv, "s:n:t:u:c:b:rd:z:v")) != -1) {
		switch (c) {
		case 's':	seed = strtoull(optarg, NULL, 0); break;
		case 'n':	requests = strtoul(optarg, NULL, 0); break;
		case 't':	threads = strtoul(optarg, NULL, 0); break;
		case 'u':	unit = strtoull(optarg, NULL, 0); break;
		case 'c':	cluster = strtoull(optarg, NULL, 0); break;
		case 'b':	backing = strtoull(optarg, NULL, 0); break;
		case 'r':	raw = true; break;
		case 'd':
			discards = strcmp(optarg, "none");
			discard_exact = !strcmp(optarg, "exact");
			break;
		case 'z':	zeroes_fall_back = strcmp(optarg, "native"); break;
		case 'v':	verify = true; break;
		default:	return 2;
		}
	}
	if (argc - optind != 3 || !threads || threads > MAX_THREADS || unit < SECTOR || cluster < unit) {
		fprintf(stderr, "usage: qcow2stress -u UNIT -c CLUSTER [OPTION]... DEVICE MODEL STATES\n");
		return 2;
	}
	fd = open(argv[optind], O_RDWR | O_DIRECT | O_CLOEXEC);
	fd_sync = open(argv[optind], O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
	if (fd < 0 || fd_sync < 0 || ioctl(fd, BLKGETSIZE64, &size))
		die("%s: %s", argv[optind], strerror(errno));
	model = map_file(argv[optind + 1], size);
	states = map_file(argv[optind + 2], (size + unit - 1) / unit);

	for (i = 0; i < threads; i++) {
		struct worker *w = &workers[i];

		w->number = i;
		w->rng = seed * 1000003 + i;
		w->count = requests / threads + (i < requests % threads);
		if (posix_memalign((void **)&w->buffer, 4096, MAX_REQUEST))
			die("no memory");
	}
	/* All of them are set up before the first one looks at the others. */
	for (i = 0; i < threads; i++)
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			die("no thread");
	for (i = 0; i < threads; i++)
		pthread_join(workers[i].thread, NULL);
	if (verify)
		read_all(workers[0].buffer);
	for (i = 0; i < KINDS; i++)
		printf("%s%s %lu", i ? ", " : "", names[i], counts[i]);
	printf(", nowait refused %lu\n", again);
	return 0;
}
