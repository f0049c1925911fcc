/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A fuzzer is one function that is given bytes.  libFuzzer calls it ("make
 * fuzz"), or replay.c ("make unit"), which needs no clang.  The inputs to begin
 * with are made by seeds.py.
 */
#ifndef QCOW2SETUP_FUZZ_H
#define QCOW2SETUP_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must be so, whatever the input is. */
#define MUST(condition) do {						\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: not so: %s\n",		\
				__FILE__, __LINE__, #condition);	\
			abort();					\
		}							\
	} while (0)

#endif
