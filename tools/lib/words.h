/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Numbers as people read them.  Pure code; all return one of a few static buffers. */
#ifndef QCOW2SETUP_WORDS_H
#define QCOW2SETUP_WORDS_H

#include <stdint.h>

/*
 * How much @part is of @whole: "12.5%".  "0%" is nothing and "100%" is all of it; what is
 * between never looks like one of these.  "-" if @whole is 0.
 */
const char *human_share(uint64_t part, uint64_t whole);
/* @count in @ms milliseconds, as so many in a second: "12.5/s".  "-" if @ms is 0. */
const char *human_rate(uint64_t count, uint64_t ms);

#endif
