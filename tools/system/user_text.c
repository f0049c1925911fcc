// SPDX-License-Identifier: GPL-2.0-or-later
/* What is said of those who have an image or a device.  Pure code. */
#include <stdio.h>

#include "lib/json.h"
#include "lib/util.h"
#include "system/users.h"

const char *user_phrase(const struct user *u)
{
	const char *does = u->reads ? "reads it" : "can write to it";
	static char text[1400];

	switch (u->kind) {
	case USER_QCOW2:
		snprintf(text, sizeof(text),
			 "device %s %s; close that (qcow2setup close %s)",
			 esc(u->name), does, shell_quote(u->name));
		break;
	case USER_DEVICE:
		snprintf(text, sizeof(text),
			 "device %s %s, which qcow2setup has not made; take that down (if it is one of dmsetup's: dmsetup remove %s)",
			 esc(u->name), does, shell_quote(u->name));
		break;
	case USER_LOOP:
		snprintf(text, sizeof(text),
			 "loop device %s %s; detach that (losetup --detach %s)",
			 esc(u->name), does, shell_quote(u->name));
		break;
	case USER_PROCESS:
		snprintf(text, sizeof(text),
			 "process %d (%s) %s; stop that", u->pid,
			 esc(u->name), does);
		break;
	case USER_MOUNT:
		snprintf(text, sizeof(text),
			 "it is %s %s; unmount that (umount %s)",
			 esc(u->name), esc(u->on), shell_quote(u->on));
		break;
	case USER_SWAP:
		snprintf(text, sizeof(text),
			 "it is used as swap; stop that (swapoff %s)",
			 shell_quote(u->on));
		break;
	}
	return text;
}

const char *user_text(const struct user *u)
{
	static char text[1400];

	switch (u->kind) {
	case USER_QCOW2:
	case USER_DEVICE:
		snprintf(text, sizeof(text), "device %s", esc(u->name));
		break;
	case USER_LOOP:
		snprintf(text, sizeof(text), "loop device %s", esc(u->name));
		break;
	case USER_PROCESS:
		snprintf(text, sizeof(text), "process %d (%s)", u->pid,
			 esc(u->name));
		break;
	case USER_MOUNT:
		snprintf(text, sizeof(text), "mounted on %s", esc(u->on));
		break;
	case USER_SWAP:
		snprintf(text, sizeof(text), "swap");
		break;
	}
	return text;
}

void users_json(struct json *j, const struct users *users)
{
	static const char * const kinds[] = {
		[USER_QCOW2] = "qcow2", [USER_DEVICE] = "device",
		[USER_LOOP] = "loop", [USER_PROCESS] = "process",
		[USER_MOUNT] = "mount", [USER_SWAP] = "swap",
	};
	const struct user *u;

	json_array(j, "users");
	for (u = users->u; u < users->u + users->n; u++) {
		json_object(j, NULL);
		json_string(j, "kind", kinds[u->kind]);
		json_string(j, "name", u->name);
		if (u->pid)
			json_number(j, "pid", u->pid);
		if (*u->on)
			json_string(j, "on", u->on);
		json_bool(j, "reads-only", u->reads);
		json_object_end(j);
	}
	json_array_end(j);
}
