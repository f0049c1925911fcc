// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Many threads on few units of a block device, without a lock between them.
 *
 * usage: qcow2race [OPTION]... DEVICE MODEL RANGE...
 *        qcow2race -f ID FILE RANGE...	fill ranges with content, and end
 *
 * RANGE is OFFSET+LENGTH in bytes: borders of units, or the device's end.
 *
 *   -s SEED    of the random numbers
 *   -r COUNT   rounds (default 6)
 *   -n COUNT   requests of each thread in each round (default 50)
 *   -t COUNT   threads (default 16)
 *   -u BYTES   size of a unit
 *   -b BYTES   size of the backing device, whose ranges have content BACKING
 *   -x         a discard zeroes just its range (default: the units within it)
 *   -d         send no discards
 *   -p         plain requests only: none that may not wait, no write zeroes that must
 *              not be written
 *
 * Each sector belongs to one thread, units to one or to all of them.  Only the owner
 * writes a sector, and so knows what it must read; the content of others' sectors
 * says who wrote it and in which order, and must not be older than what its owner
 * knows to be written.  Before each round units are zeroed, so that the threads meet
 * in first writes; in each third round one thread zeroes units while the others
 * write: what its owner wrote last must then be there, or zeros.  At the end
 * everything is read once more, and written to MODEL.
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
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PROGRAM		"qcow2race"
#include "pattern.h"

#define MAX_THREADS	64
#define MAX_REQUEST	(1UL << 20)
#define MAX_RANGES	16

/* The number of an owner's write is its place in their order. */
#define ID(owner, number)	(0xa5ULL << 56 | (uint64_t)(owner) << 48 | (number))
#define ID_OWNER(id)		((id) >> 48 & 0xff)
#define ID_NUMBER(id)		((id) & ((1ULL << 48) - 1))
#define BACKING			(0xbbULL << 56)

/* Of 1000 requests */
static const unsigned int weights[KINDS] = { 250, 30, 480, 60, 50, 35, 35, 35, 25 };

struct worker {
	pthread_t thread;
	unsigned int number;
	uint64_t rng;
	uint64_t writes;		/* so far */
	unsigned char *buffer;
	unsigned long counts[KINDS], again;
};

/* A sector that is used. */
struct spot {
	uint64_t sector;
	unsigned int owner;
	uint64_t id;			/* what it holds; 0: zeros.  The owner's */
	uint64_t floor;			/* no older write may be seen.  Atomic */
};

static uint64_t size, unit;
static uint64_t seed = 1;
static unsigned long rounds = 6, requests = 50;
static unsigned int threads = 16;
static uint64_t backing;
static bool exact, plain, discards = true;
static int fd = -1, fd_sync = -1;
static struct worker workers[MAX_THREADS];
static struct { uint64_t start, end; } ranges[MAX_RANGES];
static unsigned int nr_ranges;
static struct spot *spots;
static unsigned long nr_spots;
static pthread_barrier_t barrier;

static uint64_t below(struct worker *w, uint64_t limit)
{
	return next(&w->rng) % limit;
}

/* Sectors of the units of a range take turns, or one thread has the unit. */
static unsigned int owner_of(uint64_t sector)
{
	uint64_t per = unit / SECTOR, n = sector / per, rng = seed ^ (n / 2 << 32), way = next(&rng);

	if (per == 1 || way % 4 == 0)
		return (way >> 8) % threads;
	if (way % 4 == 1)
		return (n + (sector % per >= per / 2)) % threads;
	return ((sector >> (way >> 8) % 5) + n) % threads;
}

static void make_spots(void)
{
	uint64_t sector;
	unsigned int i;

	for (i = 0; i < nr_ranges; i++)
		nr_spots += (ranges[i].end - ranges[i].start) / SECTOR;
	spots = calloc(nr_spots, sizeof(*spots));
	if (!spots)
		die("no memory");
	nr_spots = 0;
	for (i = 0; i < nr_ranges; i++) {
		for (sector = ranges[i].start / SECTOR; sector < ranges[i].end / SECTOR; sector++) {
			struct spot *s = &spots[nr_spots++];

			s->sector = sector;
			s->owner = owner_of(sector);
			s->id = sector < backing / SECTOR ? BACKING : 0;
		}
	}
}

/* Do two neighbours lie next to each other on the device, too? */
static bool joined(unsigned long i)
{
	return i + 1 < nr_spots && spots[i + 1].sector == spots[i].sector + 1;
}

static void __attribute__((noreturn)) differs(const struct worker *w, unsigned long round,
					      const struct spot *s, const unsigned char *got,
					      const char *what)
{
	uint64_t word[2];

	memcpy(word, got, sizeof(word));
	die("%s: round %lu, thread %u, sector %#llx at byte %llu of unit %llu, owner %u, should be %#llx or not older than write %llu: found %016llx for sector %#llx",
	    what, round, w->number, (unsigned long long)s->sector,
	    (unsigned long long)(s->sector * SECTOR % unit),
	    (unsigned long long)(s->sector * SECTOR / unit), s->owner, (unsigned long long)s->id,
	    (unsigned long long)s->floor, (unsigned long long)word[0], (unsigned long long)word[1]);
}

/*
 * Check a sector, and return its id.  @wild: it may have been zeroed.  @floor: what
 * spot->floor was before it was read.
 */
static uint64_t check(const struct worker *w, unsigned long round, const struct spot *s,
		      const unsigned char *got, uint64_t floor, bool wild)
{
	static const unsigned char zeros[SECTOR];
	unsigned char want[SECTOR];
	uint64_t id;

	memcpy(&id, got, sizeof(id));
	if (!id) {
		if (memcmp(got, zeros, SECTOR))
			differs(w, round, s, got, "neither zeros nor content");
	} else {
		fill(want, s->sector * SECTOR, SECTOR, id);
		if (memcmp(got, want, SECTOR))
			differs(w, round, s, got, "nobody's content");
	}
	if (s->owner == w->number) {
		if (id != s->id && !(wild && !id))
			differs(w, round, s, got, "not what was written");
	} else if (id == BACKING) {
		if (floor || s->sector >= backing / SECTOR)
			differs(w, round, s, got, "backing device");
	} else if (id) {
		if (id >> 56 != 0xa5 || ID_OWNER(id) != s->owner)
			differs(w, round, s, got, "a stranger's content");
		if (ID_NUMBER(id) < floor)
			differs(w, round, s, got, "old content");
	}
	return id;
}

static void transfer(struct worker *w, enum kind kind, uint64_t start, uint64_t length)
{
	uint64_t done = 0;
	struct iovec iov;
	ssize_t n;

	while (done < length) {
		iov.iov_base = w->buffer + done;
		iov.iov_len = length - done;
		if (kind == WRITE || kind == WRITE_FUA) {
			n = pwritev(kind == WRITE ? fd : fd_sync, &iov, 1, start + done);
		} else {
			n = preadv2(fd, &iov, 1, start + done, kind == READ_NOWAIT ? RWF_NOWAIT : 0);
			if (n < 0 && errno == EAGAIN && kind == READ_NOWAIT) {
				w->again++;
				n = preadv(fd, &iov, 1, start + done);
			}
		}
		if (n <= 0)
			die("%s at %#llx+%#llx: %s", names[kind], (unsigned long long)start,
			    (unsigned long long)length, n ? strerror(errno) : "end of the device");
		done += n;
	}
}

/* Requests without data */
static void command(struct worker *w, enum kind kind, uint64_t start, uint64_t length)
{
	uint64_t range[2] = { start, length };
	int r;

	if (kind == DISCARD)
		r = ioctl(fd, BLKDISCARD, range);
	else if (kind == ZERO_OUT)
		r = ioctl(fd, BLKZEROOUT, range);
	else if (kind == FLUSH)
		r = fdatasync(fd);
	else if (kind == PUNCH_HOLE)
		r = errno = punch_hole(fd, start, length, exact);
	else
		r = fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, start, length);
	if (r)
		die("%s at %#llx+%#llx: %s", names[kind], (unsigned long long)start,
		    (unsigned long long)length, strerror(errno));
	w->counts[kind]++;
}

/* What is sent in place of a kind that the device does not do. */
static enum kind possible(enum kind kind)
{
	if (plain && kind == READ_NOWAIT)
		return READ;
	if (plain && kind == PUNCH_HOLE)
		return ZERO_OUT;
	return kind == DISCARD && !discards ? WRITE : kind;
}

static enum kind choose(struct worker *w)
{
	unsigned int sum = 0, way = below(w, 1000);
	enum kind kind;

	for (kind = 0; kind < KINDS - 1; kind++) {
		sum += weights[kind];
		if (way < sum)
			break;
	}
	return possible(kind);
}

static enum kind choose_zeroing(struct worker *w)
{
	return possible(discards ? DISCARD + below(w, 4) : ZERO_OUT + below(w, 3));
}

/* Spots from @i that a request of this kind can cover, all of them the thread's own. */
static bool own(struct worker *w, unsigned long *i, unsigned long *nr)
{
	unsigned long first = below(w, nr_spots), last, tries;

	for (tries = 0; spots[first].owner != w->number; tries++) {
		if (tries == nr_spots)
			return false;
		first = (first + 1) % nr_spots;
	}
	last = first;
	while (first > 0 && joined(first - 1) && spots[first - 1].owner == w->number)
		first--;
	while (joined(last) && spots[last + 1].owner == w->number)
		last++;
	if (below(w, 2)) {
		first += below(w, last - first + 1);
		last = first + below(w, last - first + 1);
	}
	*i = first;
	*nr = MIN(last - first + 1, MAX_REQUEST / SECTOR);
	return true;
}

static void request(struct worker *w, unsigned long round, bool wild)
{
	uint64_t floors[MAX_REQUEST / SECTOR], start, end, from, to, id = 0;
	enum kind kind = choose(w);
	unsigned long first, nr, i;

	if (kind == FLUSH) {
		command(w, kind, 0, 0);
		return;
	}
	if (kind <= READ_NOWAIT && below(w, 2)) {
		/* Others' sectors as well */
		first = below(w, nr_spots);
		for (nr = 1; nr < MAX_REQUEST / SECTOR && joined(first + nr - 1) && below(w, 128); nr++)
			;
	} else if (!own(w, &first, &nr)) {
		return;
	}
	start = spots[first].sector * SECTOR;
	end = start + nr * SECTOR;

	if (kind <= READ_NOWAIT) {
		for (i = 0; i < nr; i++)
			floors[i] = __atomic_load_n(&spots[first + i].floor, __ATOMIC_ACQUIRE);
		transfer(w, kind, start, nr * SECTOR);
		for (i = 0; i < nr; i++)
			check(w, round, &spots[first + i], w->buffer + i * SECTOR, floors[i], wild);
		w->counts[kind]++;
		return;
	}

	from = start;
	to = end;
	w->writes++;
	if (kind == WRITE || kind == WRITE_FUA) {
		id = ID(w->number, w->writes);
		fill(w->buffer, start, nr * SECTOR, id);
		transfer(w, kind, start, nr * SECTOR);
		w->counts[kind]++;
	} else {
		command(w, kind, start, nr * SECTOR);
		if (kind == DISCARD && !exact) {
			from = (start + unit - 1) / unit * unit;
			to = end == size ? size : end / unit * unit;
		}
	}
	for (i = 0; i < nr; i++) {
		struct spot *s = &spots[first + i];

		if (s->sector * SECTOR < from || s->sector * SECTOR >= to)
			continue;
		s->id = id;
		__atomic_store_n(&s->floor, w->writes, __ATOMIC_RELEASE);
	}
}

/* Zero whole units, whoever's they are: up to @max of them, or a range. */
static void zero_units(struct worker *w, uint64_t max)
{
	unsigned int r = below(w, nr_ranges);
	uint64_t start = ranges[r].start, end = ranges[r].end, n = (end - start + unit - 1) / unit;

	if (max) {
		start += below(w, n) * unit;
		n = start + (1 + below(w, max)) * unit;
		end = MIN(end, n);
	}
	command(w, choose_zeroing(w), start, end - start);
}

/*
 * Nobody else is at work.  Every other time what is discarded is also committed, so that
 * the others find it being discarded below.
 */
static void reset(struct worker *w)
{
	bool commit = below(w, 2);
	unsigned long i;
	unsigned int r;

	for (r = 0; r < nr_ranges; r++)
		if (below(w, 4))
			command(w, commit && discards ? DISCARD : choose_zeroing(w), ranges[r].start,
				ranges[r].end - ranges[r].start);
		else
			ranges[r].start |= 1;	/* spared */
	if (commit)
		command(w, FLUSH, 0, 0);
	r = 0;
	for (i = 0; i < nr_spots; i++) {
		struct spot *s = &spots[i];

		while (s->sector * SECTOR >= ranges[r].end || s->sector * SECTOR < (ranges[r].start & ~1ULL))
			r++;
		if (ranges[r].start & 1)
			continue;
		s->id = 0;
		s->floor = workers[s->owner].writes + 1;
	}
	for (r = 0; r < nr_ranges; r++)
		ranges[r].start &= ~1ULL;
}

/* Read everything, and check what is the thread's own; @keep it as what is right. */
static void read_own(struct worker *w, unsigned long round, bool wild)
{
	unsigned long first, nr, i;

	for (first = 0; first < nr_spots; first += nr) {
		for (nr = 1; nr < MAX_REQUEST / SECTOR && joined(first + nr - 1); nr++)
			;
		transfer(w, READ, spots[first].sector * SECTOR, nr * SECTOR);
		for (i = first; i < first + nr; i++)
			if (spots[i].owner == w->number)
				spots[i].id = check(w, round, &spots[i],
						    w->buffer + (i - first) * SECTOR, 0, wild);
	}
}

static void *work(void *argument)
{
	struct worker *w = argument;
	unsigned long round, i;

	for (round = 0; round < rounds; round++) {
		bool wild = round % 3 == 2;

		pthread_barrier_wait(&barrier);
		if (!w->number && round)
			reset(w);
		pthread_barrier_wait(&barrier);
		for (i = 0; i < requests; i++) {
			if (wild && !w->number)
				zero_units(w, below(w, 4) ? 4 : 0);
			else
				request(w, round, wild);
		}
		pthread_barrier_wait(&barrier);
		read_own(w, round, wild);
	}
	return NULL;
}

static void save(const char *path)
{
	unsigned char buffer[SECTOR];
	int file = open(path, O_WRONLY | O_CLOEXEC);
	unsigned long i;

	if (file < 0)
		die("%s: %s", path, strerror(errno));
	for (i = 0; i < nr_spots; i++) {
		memset(buffer, 0, SECTOR);
		if (spots[i].id)
			fill(buffer, spots[i].sector * SECTOR, SECTOR, spots[i].id);
		if (pwrite(file, buffer, SECTOR, spots[i].sector * SECTOR) != SECTOR)
			die("%s: %s", path, strerror(errno));
	}
	close(file);
}

static void parse_ranges(char **argv, int argc)
{
	char *end;
	int i;

	if (argc > MAX_RANGES)
		die("too many ranges");
	for (i = 0; i < argc; i++) {
		ranges[i].start = strtoull(argv[i], &end, 0);
		if (*end != '+')
			die("not a range: %s", argv[i]);
		ranges[i].end = ranges[i].start + strtoull(end + 1, NULL, 0);
		if (i && ranges[i].start < ranges[i - 1].end)
			die("not in order: %s", argv[i]);
	}
	nr_ranges = argc;
}

static int fill_ranges(const char *path, uint64_t id)
{
	unsigned char buffer[SECTOR];
	int file = open(path, O_WRONLY | O_CLOEXEC);
	unsigned int i;
	uint64_t at;

	for (i = 0; i < nr_ranges; i++) {
		for (at = ranges[i].start; at < ranges[i].end; at += SECTOR) {
			fill(buffer, at, SECTOR, id);
			if (pwrite(file, buffer, SECTOR, at) != SECTOR)
				die("%s: %s", path, strerror(errno));
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	unsigned long sum[KINDS + 1] = {};
	uint64_t only_fill = 0;
	unsigned int i, k;
	int c;

	while ((c = getopt(argc, argv, "f:s:r:n:t:u:b:xdp")) != -1) {
		switch (c) {
		case 'f':	only_fill = strtoull(optarg, NULL, 0) ? : BACKING; break;
		case 's':	seed = strtoull(optarg, NULL, 0); break;
		case 'r':	rounds = strtoul(optarg, NULL, 0); break;
		case 'n':	requests = strtoul(optarg, NULL, 0); break;
		case 't':	threads = strtoul(optarg, NULL, 0); break;
		case 'u':	unit = strtoull(optarg, NULL, 0); break;
		case 'b':	backing = strtoull(optarg, NULL, 0); break;
		case 'x':	exact = true; break;
		case 'd':	discards = false; break;
		case 'p':	plain = true; break;
		default:	return 2;
		}
	}
	if (only_fill && argc - optind >= 2) {
		parse_ranges(argv + optind + 1, argc - optind - 1);
		return fill_ranges(argv[optind], only_fill);
	}
	if (argc - optind < 3 || threads < 2 || threads > MAX_THREADS || unit < SECTOR) {
		fprintf(stderr, "usage: qcow2race -u UNIT [OPTION]... DEVICE MODEL RANGE...\n");
		return 2;
	}
	fd = open(argv[optind], O_RDWR | O_DIRECT | O_CLOEXEC);
	fd_sync = open(argv[optind], O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
	if (fd < 0 || fd_sync < 0 || ioctl(fd, BLKGETSIZE64, &size))
		die("%s: %s", argv[optind], strerror(errno));
	parse_ranges(argv + optind + 2, argc - optind - 2);
	for (i = 0; i < nr_ranges; i++)
		if (ranges[i].start % unit || (ranges[i].end % unit && ranges[i].end != size))
			die("not on borders of units: %s", argv[optind + 2 + i]);
	make_spots();

	pthread_barrier_init(&barrier, NULL, threads);
	for (i = 0; i < threads; i++) {
		struct worker *w = &workers[i];

		w->number = i;
		w->rng = seed * 1000003 + i;
		if (posix_memalign((void **)&w->buffer, 4096, MAX_REQUEST))
			die("no memory");
	}
	for (i = 0; i < threads; i++)
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			die("no thread");
	for (i = 0; i < threads; i++)
		pthread_join(workers[i].thread, NULL);
	for (i = 0; i < threads; i++)
		read_own(&workers[i], rounds, false);
	save(argv[optind + 1]);
	for (i = 0; i < threads; i++) {
		for (k = 0; k < KINDS; k++)
			sum[k] += workers[i].counts[k];
		sum[KINDS] += workers[i].again;
	}
	for (k = 0; k < KINDS; k++)
		printf("%s%s %lu", k ? ", " : "", names[k], sum[k]);
	printf(", nowait refused %lu\n", sum[KINDS]);
	return 0;
}
