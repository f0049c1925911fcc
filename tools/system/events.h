/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Waiting for events of device-mapper, those of all devices at once. */
#ifndef QCOW2SETUP_EVENTS_H
#define QCOW2SETUP_EVENTS_H

#include <stdbool.h>

/*
 * Returns a descriptor, or -1 after a message.  Signals that ask to stop are held
 * back from then on, but for events_wait(); children need events_let_signals().
 */
int events_open(void);
/*
 * What happens from now on ends the next events_wait().  Returns an exit code; has
 * said what is wrong if it is not 0.
 */
int events_arm(int fd);
/*
 * Until there is an event, a signal, or so many milliseconds are over.  Returns an exit
 * code; has said what is wrong if it is not 0.
 */
int events_wait(int fd, int ms);
/* Has a signal asked to stop?  Those that are held back get through now. */
bool events_stop(void);
void events_let_signals(void);

#endif
