/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The actions. */
#ifndef QCOW2SETUP_COMMANDS_H
#define QCOW2SETUP_COMMANDS_H

#include "options.h"

/* All return an exit code, and have said why if it is not 0. */
int cmd_info(const struct options *opt, char **args);
int cmd_create(const struct options *opt, char **args);
int cmd_open(const struct options *opt, char **args);
int cmd_attach(const struct options *opt, char **args);
int cmd_detach(const struct options *opt, char **args);
int cmd_close(const struct options *opt, char **args);
int cmd_list(const struct options *opt, char **args);
int cmd_import(const struct options *opt, char **args);
int cmd_clone(const struct options *opt, char **args);
int cmd_reset(const struct options *opt, char **args);
int cmd_status(const struct options *opt, char **args);
int cmd_monitor(const struct options *opt, char **args);
int cmd_table(const struct options *opt, char **args);
int cmd_map(const struct options *opt, char **args);
int cmd_check(const struct options *opt, char **args);
int cmd_measure(const struct options *opt, char **args);
int cmd_resize(const struct options *opt, char **args);
int cmd_backup(const struct options *opt, char **args);
/* Of cmd_backup: NAME TARGET, COPY TARGET */
int backup_copy(const struct options *opt, char **names, unsigned int n);
int backup_restore(const struct options *opt, char **names, unsigned int n);
int cmd_bitmap(const struct options *opt, char **args);
int cmd_completion(const struct options *opt, char **args);
int cmd_checkpoint(const struct options *opt, char **args);

#endif
