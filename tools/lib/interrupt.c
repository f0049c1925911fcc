// SPDX-License-Identifier: GPL-2.0-or-later
#include <signal.h>
#include <stddef.h>

#include "lib/interrupt.h"
#include "lib/util.h"

static const int caught[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE };
static volatile sig_atomic_t pending;

static void handler(int sig)
{
	pending = sig;
}

void interrupt_catch(void)
{
	struct sigaction sa = { .sa_handler = handler }, old;
	size_t i;

	sigemptyset(&sa.sa_mask);
	for (i = 0; i < ARRAY_SIZE(caught); i++) {
		/* What nohup and shells ignore for us stays ignored. */
		if (!sigaction(caught[i], NULL, &old) &&
		    old.sa_handler != SIG_IGN)
			sigaction(caught[i], &sa, NULL);
	}
}

bool interrupted(void)
{
	return pending;
}

int interrupt_result(int ret)
{
	if (ret && pending) {
		int sig = pending;

		signal(sig, SIG_DFL);
		raise(sig);
	}
	return ret;
}
