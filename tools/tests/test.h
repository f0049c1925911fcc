/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What cmocka wants included before itself. */
#ifndef QCOW2SETUP_TEST_H
#define QCOW2SETUP_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

/* fail() is a function of util.h, and cmocka's fail_msg() uses its macro. */
#undef fail
#undef fail_msg
#define fail_msg(...) do {						\
		print_error(__VA_ARGS__);				\
		print_error("\n");					\
		_fail(__FILE__, __LINE__);				\
	} while (0)

#endif
