/* SPDX-License-Identifier: GPL-2.0-or-later */
/* See device-mapper.h. */
#ifndef FUZZ_LINUX_KSTRTOX_H
#define FUZZ_LINUX_KSTRTOX_H

/* Decimal: maybe a plus, digits, maybe a newline, nothing else. */
static inline int kstrtou64(const char *s, unsigned int base, u64 *v)
{
	u64 sum = 0;

	if (*s == '+')
		s++;
	if (*s < '0' || *s > '9')
		return -EINVAL;
	for (; *s >= '0' && *s <= '9'; s++)
		if (__builtin_mul_overflow(sum, base, &sum) ||
		    __builtin_add_overflow(sum, *s - '0', &sum))
			return -ERANGE;
	if (*s == '\n')
		s++;
	if (*s)
		return -EINVAL;
	*v = sum;
	return 0;
}

static inline int kstrtou32(const char *s, unsigned int base, u32 *v)
{
	u64 sum;
	int ret = kstrtou64(s, base, &sum);

	if (ret)
		return ret;
	if (sum > UINT32_MAX)
		return -ERANGE;
	*v = sum;
	return 0;
}

#endif
