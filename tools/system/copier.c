// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/copier.h"

/* Zeros in the data of a piece are left out of a fresh file in steps of this. */
#define HOLE	(64U << 10)

static int write_zeros(const struct copier *c, uint8_t *buf,
		       const struct copier_piece *p)
{
	uint64_t range[2] = { p->start, p->length };

	if (c->fresh)
		return 0;
	/* What takes no space, if that can be; a device reads as zeros there, too. */
	if (!fallocate(c->to, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		       p->start, p->length) ||
	    (c->device && !ioctl(c->to, BLKZEROOUT, range)))
		return 0;
	memset(buf, 0, p->length);
	return write_at(c->to, buf, p->length, p->start);
}

static int write_data(const struct copier *c, const uint8_t *buf,
		      const struct copier_piece *p)
{
	uint32_t at, n;
	int ret = 0;

	if (!c->fresh)
		return write_at(c->to, buf, p->length, p->start);
	for (at = 0; !ret && at < p->length; at += n) {
		n = p->length - at < HOLE ? p->length - at : HOLE;
		if (!all_zero(buf + at, n))
			ret = write_at(c->to, buf + at, n, p->start + at);
	}
	return ret;
}

/* One piece; 0 or an errno, and whether that is of reading what is copied, or a difference. */
static int copy_piece(const struct copier *c, const struct copier_piece *p,
		      uint8_t *buf, bool *reading, bool *differs)
{
	uint8_t *other = buf + COPIER_BYTES;
	int ret = 0;

	*reading = true;
	if (p->zero)
		memset(buf, 0, p->length);
	else
		ret = read_at(p->from, buf, p->length, p->start);
	if (ret)
		return -ret;
	*reading = false;
	if (!c->compare)
		return -(p->zero ? write_zeros(c, buf, p) : write_data(c, buf, p));
	ret = read_at(c->to, other, p->length, p->start);
	*differs = !ret && memcmp(buf, other, p->length);
	return *differs ? EILSEQ : -ret;
}

static void *work(void *arg)
{
	struct copier *c = arg;
	struct copier_piece p;
	bool reading = false, differs = false;
	unsigned int me;
	uint8_t *buf;
	int err = 0;

	pthread_mutex_lock(&c->lock);
	for (me = 0; !pthread_equal(c->thread[me], pthread_self()); me++)
		;
	pthread_mutex_unlock(&c->lock);
	if (posix_memalign((void **)&buf, COPIER_ALIGN, 2 * COPIER_BYTES)) {
		buf = NULL;
		err = ENOMEM;
	}
	pthread_mutex_lock(&c->lock);
	for (;;) {
		if (err && !c->error) {
			c->error = err;
			c->reading = reading;
			c->differs = differs;
			c->where = c->at[me].start;
		}
		if (err)
			break;
		c->done += c->at[me].length;
		c->at[me].length = 0;
		while (!c->waiting && !c->over && !c->error) {
			c->idle++;
			pthread_cond_wait(&c->given, &c->lock);
			c->idle--;
		}
		if (!c->waiting || c->error)
			break;
		p = c->at[me] = c->next[c->first];
		c->first = (c->first + 1) % COPIER_NEXT;
		/* Who adds is woken for many at once, while there is still enough to do. */
		if (c->waiting-- == COPIER_NEXT / 2)
			pthread_cond_signal(&c->taken);
		pthread_mutex_unlock(&c->lock);
		err = copy_piece(c, &p, buf, &reading, &differs);
		pthread_mutex_lock(&c->lock);
	}
	/* It may have been the last one, or the first one that fails. */
	pthread_cond_broadcast(&c->given);
	pthread_cond_signal(&c->taken);
	pthread_mutex_unlock(&c->lock);
	free(buf);
	return NULL;
}

int copier_start(struct copier *c)
{
	pthread_condattr_t attr;
	int err = 0;

	pthread_mutex_init(&c->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&c->taken, &attr);
	pthread_condattr_destroy(&attr);
	pthread_cond_init(&c->given, NULL);
	/* They look for themselves among those that are there. */
	pthread_mutex_lock(&c->lock);
	while (!err && c->threads < COPIER_THREADS) {
		err = pthread_create(&c->thread[c->threads], NULL, work, c);
		if (!err)
			c->threads++;
	}
	pthread_mutex_unlock(&c->lock);
	return c->threads ? 0 : -err;
}

int copier_add(struct copier *c, const struct copier_piece *p, unsigned int ms)
{
	struct timespec until;
	int ret = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += ms % 1000 * 1000000L;
	until.tv_sec += ms / 1000 + until.tv_nsec / 1000000000L;
	until.tv_nsec %= 1000000000L;
	pthread_mutex_lock(&c->lock);
	while (!c->error && c->waiting == COPIER_NEXT && ret != ETIMEDOUT)
		ret = pthread_cond_timedwait(&c->taken, &c->lock, &until);
	ret = c->error ? -1 : c->waiting < COPIER_NEXT;
	if (ret > 0) {
		c->next[(c->first + c->waiting++) % COPIER_NEXT] = *p;
		if (c->idle)
			pthread_cond_signal(&c->given);
	}
	pthread_mutex_unlock(&c->lock);
	return ret;
}

uint64_t copier_done(struct copier *c)
{
	uint64_t done;

	pthread_mutex_lock(&c->lock);
	done = c->done;
	pthread_mutex_unlock(&c->lock);
	return done;
}

uint64_t copier_reached(struct copier *c, uint64_t next)
{
	unsigned int i;

	pthread_mutex_lock(&c->lock);
	if (c->waiting && c->next[c->first].start < next)
		next = c->next[c->first].start;
	for (i = 0; i < c->threads; i++)
		if (c->at[i].length && c->at[i].start < next)
			next = c->at[i].start;
	pthread_mutex_unlock(&c->lock);
	return next;
}

void copier_finish(struct copier *c, bool stop)
{
	unsigned int i;

	pthread_mutex_lock(&c->lock);
	if (stop)
		c->waiting = 0;
	c->over = true;
	pthread_cond_broadcast(&c->given);
	pthread_mutex_unlock(&c->lock);
	for (i = 0; i < c->threads; i++)
		pthread_join(c->thread[i], NULL);
	pthread_cond_destroy(&c->given);
	pthread_cond_destroy(&c->taken);
	pthread_mutex_destroy(&c->lock);
}
