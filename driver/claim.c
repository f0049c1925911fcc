// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who uses a metadata device.
 */
#include <linux/errno.h>
#include <linux/mutex.h>

#include "claim.h"

static DEFINE_MUTEX(qcow2_claims_lock);
static LIST_HEAD(qcow2_claims);

int qcow2_claim_take(struct qcow2_claim *claim, dev_t dev, bool writer)
{
	struct qcow2_claim *other;
	int r = 0;

	mutex_lock(&qcow2_claims_lock);
	list_for_each_entry(other, &qcow2_claims, node)
		if (other != claim && other->dev == dev && !other->parked &&
		    (writer || other->writer))
			r = -EBUSY;
	if (!r && !list_empty(&claim->node) && claim->stale)
		r = -ESTALE;
	if (!r) {
		list_for_each_entry(other, &qcow2_claims, node)
			if (other != claim && other->dev == dev && writer)
				other->stale = true;
		claim->dev = dev;
		claim->writer = writer;
		claim->waiting = false;
		claim->parked = false;
		claim->stale = false;
		if (list_empty(&claim->node))
			list_add(&claim->node, &qcow2_claims);
	}
	mutex_unlock(&qcow2_claims_lock);
	return r;
}

void qcow2_claim_wait(struct qcow2_claim *claim)
{
	mutex_lock(&qcow2_claims_lock);
	claim->waiting = true;
	mutex_unlock(&qcow2_claims_lock);
}

void qcow2_claim_park(struct qcow2_claim *claim)
{
	mutex_lock(&qcow2_claims_lock);
	claim->parked = true;
	mutex_unlock(&qcow2_claims_lock);
}

void qcow2_claim_drop(struct qcow2_claim *claim)
{
	mutex_lock(&qcow2_claims_lock);
	list_del_init(&claim->node);
	mutex_unlock(&qcow2_claims_lock);
}

bool qcow2_claim_waits(dev_t dev)
{
	struct qcow2_claim *claim;
	bool waits = false;

	mutex_lock(&qcow2_claims_lock);
	list_for_each_entry(claim, &qcow2_claims, node)
		if (claim->dev == dev && claim->waiting)
			waits = true;
	mutex_unlock(&qcow2_claims_lock);
	return waits;
}
