# SPDX-License-Identifier: GPL-2.0-or-later
#
# Stand-in for the kernel's tools/testing/selftests/lib.mk: the variables and
# targets that a folder of shell tests needs, under the names used there, so
# that the folder builds and installs here and in a kernel tree alike.
#
#   TEST_PROGS		executables that are tests
#   TEST_PROGS_EXTENDED	executables that tests call
#   TEST_FILES		other files that tests need
#   TEST_GEN_*		the same, but built by the folder's own rules
#
#   make install INSTALL_PATH=DIR	copies them to DIR
#   make run_tests			runs the tests here (needs root and the module)

selfdir := $(realpath $(dir $(lastword $(MAKEFILE_LIST))))

INSTALL_PATH ?= $(selfdir)/install/$(notdir $(CURDIR))

ALL_PROGS := $(TEST_PROGS) $(TEST_PROGS_EXTENDED)
ALL_GEN := $(TEST_GEN_PROGS) $(TEST_GEN_PROGS_EXTENDED) $(TEST_GEN_FILES)

all: $(ALL_GEN)

# A test that hangs must not hang the caller: the timeout of the folder's
# settings file is in force here as well.
run_tests: all
	@status=0; \
	limit=$$(sed -n 's/^timeout=//p' settings 2>/dev/null); \
	for t in $(TEST_PROGS) $(TEST_GEN_PROGS); do \
		echo "# selftests: $(notdir $(CURDIR)): $$t"; \
		timeout --foreground "$${limit:-45}" "./$$t"; \
		rc=$$?; \
		case $$rc in \
		0) echo "ok - $$t" ;; \
		4) echo "ok - $$t # SKIP" ;; \
		124) echo "not ok - $$t # TIMEOUT"; status=1 ;; \
		*) echo "not ok - $$t # exit=$$rc"; status=1 ;; \
		esac; \
	done; exit $$status

install: all
	mkdir -p $(INSTALL_PATH) $(INSTALL_PATH)/../kselftest
	$(if $(ALL_PROGS)$(ALL_GEN),install -m 755 $(ALL_PROGS) $(ALL_GEN) $(INSTALL_PATH)/)
	$(if $(TEST_FILES),install -m 644 $(TEST_FILES) $(INSTALL_PATH)/)
	$(if $(wildcard config settings),install -m 644 $(wildcard config settings) $(INSTALL_PATH)/)
	install -m 644 $(selfdir)/kselftest/ktap_helpers.sh $(INSTALL_PATH)/../kselftest/

clean:
	$(if $(ALL_GEN)$(EXTRA_CLEAN),rm -rf $(ALL_GEN) $(EXTRA_CLEAN))

.PHONY: all run_tests install clean
