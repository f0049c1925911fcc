// SPDX-License-Identifier: GPL-2.0-only
/*
 * Modes of a table.
 */
#include <linux/device-mapper.h>

#include "compat.h"
#include "header.h"
#include "mode.h"
#include "trace.h"

#define DM_MSG_PREFIX "qcow2"

const char *qcow2_mode_name(enum qcow2_mode mode)
{
	switch (mode) {
	case QCOW2_RW:
		return "rw";
	case QCOW2_NOSPC:
		return "nospc";
	case QCOW2_RO:
		return "ro";
	case QCOW2_FAIL:
		break;
	}
	return "fail";
}

static void qcow2_marker(struct work_struct *work)
{
	struct qcow2_health *h = container_of(work, struct qcow2_health, marker);
	int r = qcow2_header_set_corrupt(h->io);

	if (r)
		DMERR("%s: cannot mark the image corrupt: %d", h->io->name, r);
}

void qcow2_health_init(struct qcow2_health *h, struct dm_target *ti,
		       struct qcow2_mdio *io, bool read_only)
{
	spin_lock_init(&h->lock);
	h->mode = read_only ? QCOW2_RO : QCOW2_RW;
	h->read_only = read_only;
	h->ti = ti;
	h->io = io;
	INIT_WORK(&h->marker, qcow2_marker);
}

void qcow2_mode_event(struct qcow2_health *h)
{
	dm_table_event(h->ti->table);
}

static void qcow2_mode_worsen(struct qcow2_health *h, enum qcow2_mode mode)
{
	bool worse;

	spin_lock_irq(&h->lock);
	worse = mode > h->mode;
	if (worse)
		WRITE_ONCE(h->mode, mode);
	spin_unlock_irq(&h->lock);

	if (worse) {
		trace_qcow2_mode(h->io->name, qcow2_mode_name(mode));
		DMERR("%s: switching to mode %s", h->io->name,
		      qcow2_mode_name(mode));
		qcow2_mode_event(h);
	}
}

void qcow2_mode_fail(struct qcow2_health *h)
{
	qcow2_mode_worsen(h, QCOW2_FAIL);
}

void qcow2_mode_corrupt(struct qcow2_health *h)
{
	bool first;

	spin_lock_irq(&h->lock);
	first = !h->corrupt && qcow2_mode_writes(h->mode);
	WRITE_ONCE(h->corrupt, true);
	spin_unlock_irq(&h->lock);

	qcow2_mode_worsen(h, QCOW2_RO);
	if (first && !h->read_only)
		queue_work(h->wq, &h->marker);
}

void qcow2_mode_space(struct qcow2_health *h, bool nospc)
{
	enum qcow2_mode from = nospc ? QCOW2_RW : QCOW2_NOSPC;
	enum qcow2_mode to = nospc ? QCOW2_NOSPC : QCOW2_RW;
	bool change;

	if (READ_ONCE(h->mode) != from)
		return;
	spin_lock_irq(&h->lock);
	change = h->mode == from;
	if (change)
		WRITE_ONCE(h->mode, to);
	spin_unlock_irq(&h->lock);

	if (change) {
		trace_qcow2_mode(h->io->name, qcow2_mode_name(to));
		DMWARN("%s: switching to mode %s", h->io->name,
		       qcow2_mode_name(to));
		qcow2_mode_event(h);
	}
}
