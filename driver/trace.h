/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Trace points.  Each names the device, as "major:minor".  They cost a jump that is
 * patched out when off; none is on the way of a hit.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM dm_qcow2

#if !defined(DM_QCOW2_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define DM_QCOW2_TRACE_H

#include <linux/tracepoint.h>

#define QCOW2_TRACE_NAME	16

/* A slice has been brought into core; @offset 0: there is no L2 table */
TRACE_EVENT(qcow2_load,
	    TP_PROTO(const char *name, unsigned long slice, u64 offset, int error),
	    TP_ARGS(name, slice, offset, error),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(unsigned long, slice)
			     __field(u64, offset)
			     __field(int, error)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->slice = slice;
			   __entry->offset = offset;
			   __entry->error = error;),
	    TP_printk("%s slice %lu table %#llx error %d", __entry->name,
		      __entry->slice, __entry->offset, __entry->error));

/* A request makes units data that were not; @filled: sectors besides its own */
TRACE_EVENT(qcow2_first_write,
	    TP_PROTO(const char *name, sector_t sector, unsigned int nr,
		     unsigned int filled, bool copied),
	    TP_ARGS(name, sector, nr, filled, copied),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(sector_t, sector)
			     __field(unsigned int, nr)
			     __field(unsigned int, filled)
			     __field(bool, copied)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->sector = sector;
			   __entry->nr = nr;
			   __entry->filled = filled;
			   __entry->copied = copied;),
	    TP_printk("%s %llu + %u, %u %s", __entry->name,
		      (unsigned long long)__entry->sector, __entry->nr,
		      __entry->filled, __entry->copied ? "copied" : "zeroed"));

/* A metadata cluster has been looked for, for the table of L1 entry @l1 */
TRACE_EVENT(qcow2_reserve,
	    TP_PROTO(const char *name, unsigned long l1, u64 cluster, int error),
	    TP_ARGS(name, l1, cluster, error),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(unsigned long, l1)
			     __field(u64, cluster)
			     __field(int, error)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->l1 = l1;
			   __entry->cluster = cluster;
			   __entry->error = error;),
	    TP_printk("%s L1 entry %lu cluster %llu error %d", __entry->name,
		      __entry->l1, __entry->cluster, __entry->error));

TRACE_EVENT(qcow2_commit_begin,
	    TP_PROTO(const char *name, unsigned long slices),
	    TP_ARGS(name, slices),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(unsigned long, slices)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->slices = slices;),
	    TP_printk("%s %lu dirty slices", __entry->name, __entry->slices));

/* @blocks and @tables: that it has tried to write; @unwritten: that have failed */
TRACE_EVENT(qcow2_commit_end,
	    TP_PROTO(const char *name, unsigned long blocks, unsigned long tables,
		     unsigned long unwritten, int error),
	    TP_ARGS(name, blocks, tables, unwritten, error),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(unsigned long, blocks)
			     __field(unsigned long, tables)
			     __field(unsigned long, unwritten)
			     __field(int, error)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->blocks = blocks;
			   __entry->tables = tables;
			   __entry->unwritten = unwritten;
			   __entry->error = error;),
	    TP_printk("%s %lu blocks %lu new tables %lu unwritten error %d",
		      __entry->name, __entry->blocks, __entry->tables,
		      __entry->unwritten, __entry->error));

/* A discard is passed down */
TRACE_EVENT(qcow2_trim,
	    TP_PROTO(const char *name, sector_t sector, sector_t nr),
	    TP_ARGS(name, sector, nr),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __field(sector_t, sector)
			     __field(sector_t, nr)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   __entry->sector = sector;
			   __entry->nr = nr;),
	    TP_printk("%s %llu + %llu", __entry->name,
		      (unsigned long long)__entry->sector,
		      (unsigned long long)__entry->nr));

TRACE_EVENT(qcow2_mode,
	    TP_PROTO(const char *name, const char *mode),
	    TP_ARGS(name, mode),
	    TP_STRUCT__entry(__array(char, name, QCOW2_TRACE_NAME)
			     __array(char, mode, 8)),
	    TP_fast_assign(strscpy(__entry->name, name, QCOW2_TRACE_NAME);
			   strscpy(__entry->mode, mode, 8);),
	    TP_printk("%s %s", __entry->name, __entry->mode));

#endif /* DM_QCOW2_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
