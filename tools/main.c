// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup: make qcow2 images with an external data file block devices, by
 * means of the device-mapper target "qcow2".
 */
#include <limits.h>
#include <signal.h>
#include <stdio.h>

#include "commands/commands.h"
#include "lib/json.h"
#include "lib/util.h"
#include "options.h"
#include "system/dm.h"

const struct action actions[] = {
	{
		"info", cmd_info, 1, 1, "IMAGE",
		"show what an image is, and whether it can be opened",
		"qcow2setup info vm.qcow2",
		"check"
	}, {
		"create", cmd_create, 1, 1, "IMAGE --data-file DEV|FILE",
		"make an image for a data file or device",
		"qcow2setup create vm.qcow2 --data-file /dev/vg/vm",
		"create"
	}, {
		"open", cmd_open, 2, 2, "IMAGE NAME --data-file DEV|FILE",
		"make an image the device /dev/mapper/NAME",
		"qcow2setup open vm.qcow2 vm --data-file /dev/vg/vm",
		"open"
	}, {
		"close", cmd_close, 1, 1, "NAME",
		"remove a device",
		"qcow2setup close vm",
		"open"
	}, {
		"list", cmd_list, 0, 0, "",
		"list the devices that are open, and who uses them",
		"qcow2setup list --quick",
		"status"
	}, {
		"import", cmd_import, 2, 2, "SOURCE TARGET",
		"make a raw disk of any image that qemu-img reads",
		"qcow2setup import debian.qcow2 golden.raw --verify",
		"create"
	}, {
		"clone", cmd_clone, 2, 2, "BASE NAME",
		"make a device that begins as BASE is, at once",
		"qcow2setup clone golden.raw vm1 --dir /var/lib/vms",
		"create"
	}, {
		"reset", cmd_reset, 1, 1, "NAME",
		"throw away what was written to a clone",
		"qcow2setup reset vm1",
		"create"
	}, {
		"attach", cmd_attach, 1, 1, "NAME",
		"open a device as /etc/qcow2tab has it",
		"qcow2setup attach vm",
		"open"
	}, {
		"detach", cmd_detach, 1, 1, "NAME",
		"close a device if it is open",
		"qcow2setup detach vm",
		"open"
	}, {
		"status", cmd_status, 0, 1, "[NAME]",
		"show a device and how it does, or list them",
		"qcow2setup status vm",
		"status"
	}, {
		"monitor", cmd_monitor, 0, 0, "",
		"make room for metadata before it runs out",
		"qcow2setup monitor --extend-command 'lvextend -L +${QCOW2_MORE}b \"$QCOW2_DEVICE\"'",
		"status"
	}, {
		"table", cmd_table, 1, 1, "IMAGE --data-file DEV",
		"print the table line for dmsetup",
		"dmsetup create vm --table \"$(qcow2setup table /dev/vg/meta --data-file /dev/vg/vm)\"",
		"open"
	}, {
		"map", cmd_map, 1, 1, "IMAGE|NAME",
		"list what is data, zero and unallocated",
		"qcow2setup map vm --json",
		"bitmap"
	}, {
		"check", cmd_check, 1, 1, "IMAGE",
		"check an image's metadata, and repair it",
		"qcow2setup check vm.qcow2 --repair leaks",
		"check"
	}, {
		"measure", cmd_measure, 0, 0, "--size SIZE",
		"tell how much metadata an image can need",
		"qcow2setup measure --size 1T",
		"create"
	}, {
		"resize", cmd_resize, 1, 1, "IMAGE|NAME --size SIZE|+SIZE|auto",
		"give an image another size",
		"qcow2setup resize vm --size 20G",
		"resize"
	}, {
		"bitmap", cmd_bitmap, 2, INT_MAX,
		"list|add|remove|clear|enable|disable|merge IMAGE|NAME [BITMAP...]",
		"show and change what is recorded of writes",
		"qcow2setup bitmap add vm.qcow2 monday",
		"bitmap"
	}, {
		"checkpoint", cmd_checkpoint, 1, 1,
		"IMAGE|NAME --stop OLD --start NEW",
		"end a bitmap and begin another, in one step",
		"qcow2setup checkpoint vm --stop monday --start tuesday",
		"bitmap"
	}, {
		"backup", cmd_backup, 1, INT_MAX, "begin|status|extents|copy|restore|serve|end NAME...",
		"show disks as they were at one instant, while they are used",
		"qcow2setup backup begin vm --cow /var/tmp",
		"backup"
	},
	{
		/* for shells */
		"completion", cmd_completion, 0, INT_MAX, "-- WORD...", NULL, NULL, NULL
	},
	{ 0 }
};

int main(int argc, char **argv)
{
	const struct action *action = NULL;
	struct options opt = { 0 };
	char **args = NULL;
	int ret;

	/* A limit on the size of files is an error like others: EFBIG. */
	signal(SIGXFSZ, SIG_IGN);
	ret = options_parse(argc, argv, &opt, &action, &args);
	if (ret < 0) {
		/* info speaks of what open would say. */
		takes_readonly = action_takes(action, "readonly") ||
				 action->handler == cmd_info;
		takes_trust = action_takes(action, "trust-image-paths");
		ret = action->handler(&opt, args);
	}
	if (ret > 0 && opt.json && !json_refused)
		json_failure(stdout, ret);
	dm_exit();
	/* A full disk or closed pipe must not look like success. */
	if (fflush(stdout) && !ret)
		ret = fail(EX_WRONG, "cannot write the output");
	return ret;
}
