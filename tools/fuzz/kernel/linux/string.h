/* SPDX-License-Identifier: GPL-2.0-or-later */
/* See device-mapper.h. */
#include <string.h>
#include <strings.h>
