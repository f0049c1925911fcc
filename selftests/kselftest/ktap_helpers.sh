# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh disable=SC2034
#
# KTAP output for shell tests.
#
# The test folders beside this one can be dropped into a kernel tree, where
# they find the kernel's own kselftest/ktap_helpers.sh at this place. So the
# names here are the names used there; the code is our own. To be sourced by
# any POSIX shell.
#
#	ktap_print_header
#	ktap_set_plan 2
#	ktap_test_result "reads zeros" cmp /dev/zero "$dev" -n 4096
#	ktap_test_pass "second check"
#	ktap_finished			# prints the totals and exits

KSFT_PASS=0
KSFT_FAIL=1
KSFT_XFAIL=2
KSFT_XPASS=3
KSFT_SKIP=4

KSFT_NUM_TESTS=0

KTAP_TESTNO=1
KTAP_CNT_PASS=0
KTAP_CNT_FAIL=0
KTAP_CNT_SKIP=0
KTAP_CNT_XFAIL=0

ktap_print_header()
{
	echo "TAP version 13"
}

# A diagnostic. Every line of a multi-line message gets the comment sign, or
# it could be taken for a result.
ktap_print_msg()
{
	printf '%s\n' "$*" | sed 's/^/# /'
}

ktap_set_plan()
{
	KSFT_NUM_TESTS="$1"
	echo "1..$KSFT_NUM_TESTS"
}

# Instead of ktap_set_plan, when nothing can run here. Does not exit: the
# caller does, with KSFT_SKIP.
ktap_skip_all()
{
	echo "1..0 # SKIP $*"
}

# __ktap_line WORD NAME [DIRECTIVE]: a '#' in a name would start a directive.
__ktap_line()
{
	__ktap_name=$(printf '%s' "$2" | tr '#\n' '_ ')
	echo "$1 $KTAP_TESTNO $__ktap_name${3:+ # $3}"
	KTAP_TESTNO=$((KTAP_TESTNO + 1))
}

ktap_test_pass()
{
	KTAP_CNT_PASS=$((KTAP_CNT_PASS + 1))
	__ktap_line "ok" "$1"
}

ktap_test_fail()
{
	KTAP_CNT_FAIL=$((KTAP_CNT_FAIL + 1))
	__ktap_line "not ok" "$1"
}

# ktap_test_skip NAME [REASON]
ktap_test_skip()
{
	KTAP_CNT_SKIP=$((KTAP_CNT_SKIP + 1))
	__ktap_line "ok" "$1" "SKIP${2:+ $2}"
}

# ktap_test_xfail NAME [REASON]: it failed, and it is known to.
ktap_test_xfail()
{
	KTAP_CNT_XFAIL=$((KTAP_CNT_XFAIL + 1))
	__ktap_line "ok" "$1" "XFAIL${2:+ $2}"
}

# ktap_test_result NAME COMMAND [ARG...]: pass when the command succeeds.
ktap_test_result()
{
	__ktap_desc="$1"
	shift
	if "$@"; then
		ktap_test_pass "$__ktap_desc"
	else
		ktap_test_fail "$__ktap_desc"
	fi
}

# The test cannot go on. Any results that the plan still expects are missing
# then, which the reader of the output counts as failure too.
ktap_exit_fail_msg()
{
	echo "Bail out! $*"
	ktap_print_totals
	exit "$KSFT_FAIL"
}

ktap_print_totals()
{
	echo "# Totals: pass:$KTAP_CNT_PASS fail:$KTAP_CNT_FAIL" \
	     "xfail:$KTAP_CNT_XFAIL xpass:0 skip:$KTAP_CNT_SKIP error:0"
}

# Prints the totals and exits. Exits with success only if every planned
# result is there and none failed, with KSFT_SKIP if there were only skips.
ktap_finished()
{
	ktap_print_totals

	__ktap_good=$((KTAP_CNT_PASS + KTAP_CNT_SKIP + KTAP_CNT_XFAIL))
	if [ "$KTAP_CNT_FAIL" -ne 0 ] || [ "$__ktap_good" -eq 0 ] ||
	   [ "$__ktap_good" -ne "$KSFT_NUM_TESTS" ]; then
		exit "$KSFT_FAIL"
	fi
	if [ "$KTAP_CNT_SKIP" -eq "$KSFT_NUM_TESTS" ]; then
		exit "$KSFT_SKIP"
	fi
	exit "$KSFT_PASS"
}
