/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Signals that ask to stop.  Work that must be undone asks interrupted()
 * between its steps and ends as if a step had failed.
 */
#ifndef QCOW2SETUP_INTERRUPT_H
#define QCOW2SETUP_INTERRUPT_H

#include <stdbool.h>

void interrupt_catch(void);
bool interrupted(void);
/*
 * After everything is undone: die of the signal that was caught, as who waits
 * for us expects.  Without one, or if it came too late (@ret is 0), return @ret.
 */
int interrupt_result(int ret);

#endif
