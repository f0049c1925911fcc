/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Names of devices: what can be one, and how systemd and udev write them.  Pure code.
 */
#ifndef QCOW2SETUP_NAMES_H
#define QCOW2SETUP_NAMES_H

#include <stdbool.h>
#include <stddef.h>

/* Characters; so that prefix, a hash and a suffix fit the kernel's limits. */
#define DEVICE_NAME_MAX	100

/* Can @name, of no more than DEVICE_NAME_MAX characters, be a device's? */
bool device_name_valid(const char *name);

/*
 * @path as systemd has it in the name of a unit: "/dev/vg/a-b" is "dev-vg-a\x2db".
 * Any other text, as that of an instance, is written like a path that has no "/" in
 * front.  Returns false if @size bytes are too few.
 */
bool unit_escape(char *out, size_t size, const char *path);

/*
 * What @spec means as a path: "UUID=...", "LABEL=...", "PARTUUID=..." and
 * "PARTLABEL=..." are names below /dev/disk, all else is itself.  Returns false if
 * @size bytes are too few.
 */
bool spec_path(char *out, size_t size, const char *spec);

/* Is @path that of a block device, by its place?  Nothing is looked at. */
bool path_is_device(const char *path);

#endif
