// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A load for the power cut tests, which leaves a journal to judge by.
 *
 * Threads send requests to a block device: writes, FUA writes, flushes, zeroes and
 * discards of random ranges.  (dm-log-writes takes no write zeroes, and so no
 * device on top of it does; the kernel writes the zeros then.)  Requests that are in flight together
 * share units, tables and slices, but no sector, so that each sector has one
 * history.  All that is written is stamped with its sector and its request.
 *
 * As soon as a flush or FUA write is acknowledged, a mark is put into the log of
 * the dm-log-writes device that is somewhere below.  What is in the log before
 * the mark must hold all that was acknowledged before that flush was sent.
 *
 * The journal has a line for each request, in the order of submission:
 *	KIND SECTOR SECTORS NUMBER SUBMITTED ACKNOWLEDGED MARKED
 * The last three are times, on a clock that counts events; 0: never.  KIND is
 * one letter of "wuzdf".  A line "s 0 SECTORS ..." tells the device's size, for
 * the requests that follow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/aio_abi.h>
#include <linux/dm-ioctl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "qcow2stamp.h"

#define MAX_SECTORS	512	/* of one request with data */
#define NAME		"qcow2load"

enum kind { WRITE, FUA, ZERO, DISCARD, FLUSH, KINDS };
static const char letter[] = "wuzdf";
static unsigned int weight[KINDS] = { 60, 8, 8, 14, 10 };

struct request {
	enum kind kind;
	uint64_t sector, nr;
	uint64_t submitted, acked, marked;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct request *requests;
static unsigned int nr_requests = 500, nr_begun, first_number, nr_threads = 8;
static uint64_t now = 1;		/* the clock */
static uint64_t flushed;		/* when the latest flush that is done was sent */
static uint64_t *touched;		/* when a sector was last written, but not FUA */
static bool *in_flight;			/* per sector */
static uint64_t size, seed = 1;		/* of the device, in sectors */
static unsigned int unit = 8;		/* sectors */
static const char *device, *log_name;
static bool space_runs_out, along;

static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, NAME ": ");
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(1);
}

static uint64_t rnd(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static uint64_t below(uint64_t *state, uint64_t n)
{
	return (rnd(state) >> 16) % n;
}

static void mark(char kind, unsigned int number)
{
	struct {
		struct dm_ioctl dmi;
		uint64_t sector;	/* struct dm_target_msg */
		char text[64];
	} m = {};
	static int control = -1;
	static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;

	if (!log_name)
		return;
	pthread_mutex_lock(&once);
	if (control < 0)
		control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
	pthread_mutex_unlock(&once);
	m.dmi.version[0] = DM_VERSION_MAJOR;
	m.dmi.data_size = sizeof(m);
	m.dmi.data_start = sizeof(m.dmi);
	snprintf(m.dmi.name, sizeof(m.dmi.name), "%s", log_name);
	snprintf(m.text, sizeof(m.text), "mark %c%u", kind, number);
	if (control < 0 || ioctl(control, DM_TARGET_MSG, &m))
		die("no mark for %s: %s", log_name, strerror(errno));
}

/* Where the one before has ended: units, one after the other, from a third of the device on */
static void go_on(uint64_t *rng, struct request *r)
{
	static uint64_t at;

	if (!at || at >= size)
		at = size / 3 / unit * unit;
	r->sector = at;
	r->nr = unit * (1 + below(rng, 3));
	if (r->nr > MAX_SECTORS)
		r->nr = MAX_SECTORS;
	if (r->nr > size - at)
		r->nr = size - at;
	at += r->nr;
}

/* A range, most of them near others, and many that begin or end with a unit. */
static void choose(uint64_t *rng, struct request *r)
{
	uint64_t area = size, at = 0, units;

	if (below(rng, 4)) {
		area = size / 16 ? size / 16 : 1;
		at = below(rng, 4) * 5 % 16 * area;
	}
	r->sector = at + below(rng, area);
	switch (below(rng, 4)) {
	case 0:
		r->nr = 1 + below(rng, unit < 8 ? 8 : unit);
		break;
	case 1:
		r->nr = 1 + below(rng, 3);
		break;
	default:
		units = 1 + below(rng, below(rng, 4) ? 3 : 12);
		r->sector -= r->sector % unit;
		r->nr = units * unit;
		/* The one or the other end, or both, not with a unit */
		if (!below(rng, 3))
			r->sector += below(rng, unit);
		break;
	}
	if (r->kind == DISCARD && !below(rng, 8))
		r->nr *= 16;
	if (r->nr > MAX_SECTORS && (r->kind == WRITE || r->kind == FUA))
		r->nr = MAX_SECTORS;
	if (r->nr > size - r->sector)
		r->nr = size - r->sector;
}

static bool overlaps(const struct request *r)
{
	uint64_t i;

	for (i = r->sector; i < r->sector + r->nr; i++)
		if (in_flight[i])
			return true;
	return false;
}

/*
 * dm-log-writes logs a FUA write before writes that were done earlier and have
 * not been flushed.  For the same sector the log would be wrong then.
 */
static bool fua_misleads(const struct request *r)
{
	uint64_t i;

	for (i = r->sector; i < r->sector + r->nr; i++)
		if (touched[i] && touched[i] >= flushed)
			return true;
	return false;
}

/* The next request; NULL at the end. */
static struct request *begin(uint64_t *rng)
{
	unsigned int total = 0, tries = 0, k, w;
	struct request *r, next;
	uint64_t i;

	for (k = 0; k < KINDS; k++)
		total += weight[k];
	w = below(rng, total);
	for (k = 0; w >= weight[k]; k++)
		w -= weight[k];

	pthread_mutex_lock(&lock);
	for (;;) {
		next = (struct request) { .kind = k };
		if (nr_begun == nr_requests) {
			pthread_mutex_unlock(&lock);
			return NULL;
		}
		if (k == FLUSH)
			break;
		if (along)
			go_on(rng, &next);
		else
			choose(rng, &next);
		if (k == FUA && fua_misleads(&next)) {
			if (tries++ < 8)
				continue;
			next.kind = WRITE;
		}
		if (!overlaps(&next))
			break;
	}
	r = requests + nr_begun++;
	next.submitted = now++;
	*r = next;
	for (i = r->sector; i < r->sector + r->nr; i++)
		in_flight[i] = true;
	pthread_mutex_unlock(&lock);
	return r;
}

static void end(struct request *r, int error)
{
	unsigned int number = first_number + (r - requests);
	uint64_t i;

	pthread_mutex_lock(&lock);
	if (!error)
		r->acked = now++;
	for (i = r->sector; i < r->sector + r->nr; i++) {
		in_flight[i] = false;
		if (r->kind != FUA)
			touched[i] = now;
	}
	if (r->kind == FLUSH && r->submitted > flushed)
		flushed = r->submitted;
	pthread_mutex_unlock(&lock);

	if (error && !(space_runs_out && (error == ENOSPC || error == EIO)))
		die("request %u (%c %llu+%llu): %s", number, letter[r->kind],
		    (unsigned long long)r->sector, (unsigned long long)r->nr,
		    strerror(error));
	if (error || (r->kind != FLUSH && r->kind != FUA))
		return;
	mark(letter[r->kind], number);
	pthread_mutex_lock(&lock);
	r->marked = now++;
	pthread_mutex_unlock(&lock);
}

/*
 * After a synchronous write there would be a flush as well, which does more than
 * FUA has to.  An asynchronous one has none.
 */
static int fua_write(aio_context_t ctx, int fd, void *buf, const struct request *r)
{
	struct iocb cb = {
		.aio_fildes = fd,
		.aio_lio_opcode = IOCB_CMD_PWRITE,
		.aio_rw_flags = RWF_DSYNC,
		.aio_buf = (uintptr_t)buf,
		.aio_nbytes = r->nr * SECTOR,
		.aio_offset = r->sector * SECTOR,
	}, *cbs = &cb;
	struct io_event event;

	if (syscall(SYS_io_submit, ctx, 1L, &cbs) != 1)
		return errno;
	while (syscall(SYS_io_getevents, ctx, 1L, 1L, &event, NULL) != 1)
		if (errno != EINTR)
			return errno;
	if (event.res < 0)
		return -event.res;
	return event.res == (int64_t)(r->nr * SECTOR) ? 0 : EIO;
}

static int do_request(aio_context_t ctx, int fd, uint8_t *buf, const struct request *r)
{
	uint64_t range[2] = { r->sector * SECTOR, r->nr * SECTOR };
	unsigned int number = first_number + (r - requests);
	uint64_t i;
	ssize_t n;

	switch (r->kind) {
	case WRITE:
	case FUA:
		for (i = 0; i < r->nr; i++)
			stamp(buf + i * SECTOR, STAMP_REQUEST, seed,
			      r->sector + i, number);
		if (r->kind == FUA)
			return fua_write(ctx, fd, buf, r);
		n = pwrite(fd, buf, range[1], range[0]);
		return n < 0 ? errno : n == (ssize_t)range[1] ? 0 : EIO;
	case ZERO:
		return ioctl(fd, BLKZEROOUT, range) ? errno : 0;
	case DISCARD:
		return ioctl(fd, BLKDISCARD, range) ? errno : 0;
	case FLUSH:
		return fsync(fd) ? errno : 0;
	default:
		abort();
	}
}

static void *load(void *arg)
{
	uint64_t rng = (seed + (uintptr_t)arg) * 0x9e3779b97f4a7c15ULL + 1;
	int fd = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
	aio_context_t ctx = 0;
	struct request *r;
	void *buf;

	if (fd < 0)
		die("%s: %s", device, strerror(errno));
	if (posix_memalign(&buf, 4096, MAX_SECTORS * SECTOR) ||
	    syscall(SYS_io_setup, 1L, &ctx))
		die("no memory");
	while ((r = begin(&rng)))
		end(r, do_request(ctx, fd, buf, r));
	syscall(SYS_io_destroy, ctx);
	free(buf);
	close(fd);
	return NULL;
}

static void fill(const char *path, enum stamp_kind kind, uint64_t first, uint64_t nr)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	static char buf[256 * SECTOR];
	uint64_t at, i;
	ssize_t len;

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	for (at = 0; at < nr; at += i) {
		for (i = 0; i < 256 && at + i < nr; i++)
			stamp(buf + i * SECTOR, kind, 0, at + i, 0);
		len = i * SECTOR;
		if (pwrite(fd, buf, len, (first + at) * SECTOR) != len)
			die("%s: %s", path, strerror(errno));
	}
	if (fsync(fd) || close(fd))
		die("%s: %s", path, strerror(errno));
}

static void usage(void)
{
	fprintf(stderr, "usage: " NAME " [OPTION]... DEVICE JOURNAL\n"
		"       " NAME " --fill KIND DEVICE FIRST SECTORS\n"
		"  -l NAME     put marks into the log of this dm-log-writes device\n"
		"  -s SEED  -n REQUESTS  -t THREADS  -u UNIT (sectors)\n"
		"  -f NUMBER   of the first request\n"
		"  -c TIME     of the clock to begin with\n"
		"  -w W,U,Z,D,F  weights: write, FUA, zeroes, discard, flush\n"
		"  -e          space may run out\n"
		"  -a          each request goes on from where the one before has ended\n"
		"Prints the number and the time to go on with.\n");
	exit(1);
}

int main(int argc, char **argv)
{
	pthread_t *threads;
	unsigned int i;
	FILE *journal;
	int c, fd;

	if (argc == 6 && !strcmp(argv[1], "--fill")) {
		fill(argv[3], argv[2][0], strtoull(argv[4], NULL, 0),
		     strtoull(argv[5], NULL, 0));
		return 0;
	}
	while ((c = getopt(argc, argv, "l:s:n:t:u:f:c:w:ea")) >= 0) {
		switch (c) {
		case 'l':
			log_name = optarg;
			break;
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 'n':
			nr_requests = atoi(optarg);
			break;
		case 't':
			nr_threads = atoi(optarg);
			break;
		case 'u':
			unit = atoi(optarg);
			break;
		case 'f':
			first_number = atoi(optarg);
			break;
		case 'c':
			now = strtoull(optarg, NULL, 0);
			break;
		case 'w':
			if (sscanf(optarg, "%u,%u,%u,%u,%u", weight, weight + 1,
				   weight + 2, weight + 3, weight + 4) != KINDS)
				usage();
			break;
		case 'e':
			space_runs_out = true;
			break;
		case 'a':
			along = true;
			break;
		default:
			usage();
		}
	}
	if (argc - optind != 2)
		usage();
	device = argv[optind];
	fd = open(device, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		die("%s: %s", device, strerror(errno));
	close(fd);
	size /= SECTOR;

	requests = calloc(nr_requests, sizeof(*requests));
	in_flight = calloc(size, sizeof(*in_flight));
	touched = calloc(size, sizeof(*touched));
	threads = calloc(nr_threads, sizeof(*threads));
	if (!requests || !in_flight || !touched || !threads)
		die("no memory");
	/* Others have been here, and what they wrote last may not have been flushed. */
	if (first_number)
		for (uint64_t n = 0; n < size; n++)
			touched[n] = now;
	for (i = 0; i < nr_threads; i++)
		if (pthread_create(threads + i, NULL, load, (void *)(uintptr_t)i))
			die("no thread");
	for (i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);

	journal = fopen(argv[optind + 1], "a");
	if (!journal)
		die("%s: %s", argv[optind + 1], strerror(errno));
	fprintf(journal, "s 0 %llu 0 0 0 0\n", (unsigned long long)size);
	for (i = 0; i < nr_begun; i++)
		fprintf(journal, "%c %llu %llu %u %llu %llu %llu\n",
			letter[requests[i].kind],
			(unsigned long long)requests[i].sector,
			(unsigned long long)requests[i].nr, first_number + i,
			(unsigned long long)requests[i].submitted,
			(unsigned long long)requests[i].acked,
			(unsigned long long)requests[i].marked);
	if (fclose(journal))
		die("%s: %s", argv[optind + 1], strerror(errno));
	printf("%u %llu\n", first_number + nr_begun, (unsigned long long)now);
	return 0;
}
