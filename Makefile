# SPDX-License-Identifier: GPL-2.0-or-later
#
# dm-qcow2: builds driver/dm-qcow2.ko and tools/qcow2setup. See "make help".

SHELL := /bin/bash
.DEFAULT_GOAL := all

# The kernel to build for: the running one if its headers are here, else the
# newest one whose headers are.
ifndef KDIR
KDIR := $(firstword $(patsubst %/Makefile,%,\
	$(wildcard /lib/modules/$(shell uname -r)/build/Makefile) \
	$(shell ls -d /lib/modules/*/build/Makefile 2>/dev/null | sort -rV)))
endif
VERSION := $(shell sed -n 's/^.define DM_QCOW2_VERSION "\(.*\)"/\1/p' driver/version.h)
KREL = $(shell sed -n 's/.*UTS_RELEASE "\(.*\)"/\1/p' "$(KDIR)/include/generated/utsrelease.h" 2>/dev/null)

# The VM's kernel, a series; the newest installed release of it counts. All of
# them are tested by make check-kernels.
KERNEL ?= 6.1
KERNELS = 6.1 6.12 7.3
export KERNEL

# Any module build; KREL and KMAKE are changed for kernels that are not installed.
KMAKE = $(MAKE) --no-print-directory -C $(KDIR) M=$(CURDIR)

PREFIX ?= /usr/local
DESTDIR ?=
INSTALL_MOD_DIR ?= updates
# As kbuild has it: 1 for --strip-debug, other values are strip's options, empty: no strip
INSTALL_MOD_STRIP ?= 1
STRIP ?= strip
MODULES = $(DESTDIR)/lib/modules/$(KREL)

# What kbuild leaves. Newer kernels put the version in .module-common.o.
BUILT = driver/*.o driver/.*.cmd driver/*.ko driver/*.mod driver/*.mod.c \
	driver/modules.order driver/Module.symvers modules.order Module.symvers .*.cmd .module-common.o

# Builds of one tree at the same time would write the same files.
LOCK = mkdir -p .build && flock .build/lock

all: module tool

help:
	@echo 'Builds (KDIR= names the headers of another kernel):'
	@echo '  make             driver/dm-qcow2.ko and tools/qcow2setup'
	@echo '  make module      the module only'
	@echo '  make tool        the tool only'
	@echo '  make install     install both (DESTDIR=, PREFIX=$(PREFIX))'
	@echo '  make uninstall   take them away'
	@echo '  make dkms-install   have DKMS build the module, for each kernel (make dkms-uninstall)'
	@echo '  make dist        tarball of the sources and its SBOM in DIST=$(DIST); the same bytes each time'
	@echo '  make deb, rpm    packages for Debian, or for others (no root needed), in DIST=$(DIST)'
	@echo '  make clean       remove what was built'
	@echo 'On Debian, as root, with what they need installed by themselves:'
	@echo '  make demo        boot a VM from a qcow2 image through the device, step by step'
	@echo '  make check       all tests, in a VM; TESTS="read write faults:suspend" runs some of'
	@echo '                   them, and of faults only what has "suspend" in its name;'
	@echo '                   KERNEL= takes another kernel ($(KERNELS)) than $(KERNEL)'
	@echo '                   CHECK_LOAD=8 keeps the machine busy beside it'
	@echo '  make check-kernels   all tests with each of these kernels, one after the other'
	@echo '  make check-hosts     from a fresh Debian 12 and 13 to a guest with backups'
	@echo '  make check-debug tests in kernels that look for races, leaks, wrong locking ...'
	@echo '  make vm-shell    a root shell in the test VM'
	@echo '  make soak        $(SOAK_ROUNDS) backups by bitmaps (SOAK_ROUNDS=, 0: none), then power cuts with ever new'
	@echo '                   seeds; SOAK_MINUTES= of them, SOAK_SEED='
	@echo '  make seeds       what has random requests with SEEDS=$(SEEDS) seeds from FIRST_SEED= on; TESTS='
	@echo 'Parts of make check:'
	@echo '  make deps        install what make check needs'
	@echo '  make bench       instructions per request, beside other targets; ROWS=, BASE=revision'
	@echo '                   CLOCK=vm or uml: what only a clock can measure; CPUS= of the VM'
	@echo '  make quick       the fast loop: the tool, and its tests that need nothing but a processor'
	@echo '  make docs        the pages of Documentation as HTML, in .build/docs'
	@echo '  make lint        checkpatch, sparse, W=1, shellcheck, cppcheck, codespell, warnings as errors'
	@echo '  make lint-quick  of these, what needs no kernel and no compiler, in seconds'
	@echo '  make unit        unit tests of the tool, also under valgrind'
	@echo '  make coverage    which lines of tool and driver the tests run, in .build/coverage;'
	@echo '                   COVERAGE=tool needs no kernel; SUITES=, COVERAGE_TESTS= are what is run'
	@echo '  make fuzz        search for inputs that do harm, FUZZ_SECONDS= for each fuzzer'
	@echo '  make check-planted  would the tests find a bug?'
	@echo '  make vm-build    module for the kernel of the VM (KERNEL=$(KERNEL)), and tool'
	@echo 'Now: KDIR=$(or $(KDIR),(no kernel headers found))'

version:
	@echo $(VERSION)

# Each missing piece is told in one line, before a compiler tells it in fifty.
preflight-cc:
	@command -v $(firstword $(CC)) > /dev/null || { \
		echo "dm-qcow2: no C compiler ($(CC)); run: apt-get install gcc" >&2; exit 1; }

preflight-module: preflight-cc
	@if [ -z "$(KDIR)" ]; then \
		echo "dm-qcow2: no kernel headers are installed; run: apt-get install linux-headers-amd64, or name them with KDIR=" >&2; exit 1; \
	elif [ ! -e "$(KDIR)/Makefile" ] || [ -z "$(KREL)" ]; then \
		echo "dm-qcow2: $(KDIR) holds no kernel headers that are ready for use; install the linux-headers package, or name another folder with KDIR=" >&2; exit 1; \
	fi

preflight-tool:
	@$(MAKE) --no-print-directory -C tools preflight

preflight-unit:
	@$(MAKE) --no-print-directory -C tools preflight-unit

# depmod prefers updates/ to updates/dkms/, so the module of DKMS, which is signed and
# kept up to date, would never be loaded again.
preflight-install: preflight-module
	@for f in $(MODULES)/updates/dkms/dm-qcow2.ko*; do \
		[ ! -e "$$f" ] || { \
			echo "dm-qcow2: DKMS has installed $$f, which a module in $(INSTALL_MOD_DIR)/ would hide; install the tool alone (make -C tools install), or first run: dkms remove dm-qcow2/$(VERSION) -k $(KREL)" >&2; exit 1; }; \
	done

# kbuild's own dependencies do not always see that the headers are another
# kernel's, so a change of kernel starts from scratch.
module: preflight-module
	@[ "$(KREL)" = "$$(uname -r)" ] || \
		echo "dm-qcow2: the module is for kernel $(KREL), not for the running one, $$(uname -r); for that install its headers, or name them with KDIR="
	@$(LOCK) $(MAKE) --no-print-directory __module KDIR=$(KDIR)

__module:
	@if [ "$$(cat .build/krel 2>/dev/null)" != "$(KREL)" ]; then \
		rm -f $(BUILT); \
		echo "$(KREL)" > .build/krel; \
	fi
	@$(KMAKE) modules

tool: preflight-tool
	@$(LOCK) $(MAKE) --no-print-directory -C tools

# the artefacts by their names
driver/dm-qcow2.ko: module
tools/qcow2setup: tool

install: preflight-install all
	install -D -m 644 driver/dm-qcow2.ko $(MODULES)/$(INSTALL_MOD_DIR)/dm-qcow2.ko
	$(if $(INSTALL_MOD_STRIP),$(STRIP) $(INSTALL_MOD_STRIP:1=--strip-debug) $(MODULES)/$(INSTALL_MOD_DIR)/dm-qcow2.ko)
	$(if $(DESTDIR),,depmod $(KREL))
	$(MAKE) -C tools install DESTDIR=$(DESTDIR) PREFIX=$(PREFIX)

# What the module is built of, and nothing else: neither history nor what was built here.
DKMS_NAME = dm-qcow2/$(VERSION)
DKMS_SOURCE = $(DESTDIR)/usr/src/dm-qcow2-$(VERSION)
dkms-source:
	install -d $(DKMS_SOURCE)/driver
	install -m 644 Kbuild dkms.conf LICENSE $(DKMS_SOURCE)/
	install -m 755 dkms-pre-install $(DKMS_SOURCE)/
	install -m 644 $(filter-out %.mod.c,$(wildcard driver/*.[ch])) driver/Kbuild $(DKMS_SOURCE)/driver/

preflight-dkms: preflight-module
	@command -v dkms > /dev/null || { \
		echo "dm-qcow2: no dkms; run: apt-get install dkms" >&2; exit 1; }
	@[ ! -e /var/lib/dpkg/info/dm-qcow2-dkms.list ] || { \
		echo "dm-qcow2: the package dm-qcow2-dkms brings the module; for this one first run: apt-get remove dm-qcow2-dkms" >&2; exit 1; }

# An older copy of the same version goes first: DKMS would build that one.
dkms-install: preflight-dkms
	@$(MAKE) --no-print-directory dkms-uninstall
	@$(MAKE) --no-print-directory dkms-source DESTDIR=
	dkms install $(DKMS_NAME) -k $(KREL)

dkms-uninstall:
	[ -z "$$(dkms status $(DKMS_NAME))" ] || dkms remove $(DKMS_NAME) --all
	rm -rf /usr/src/dm-qcow2-$(VERSION)

uninstall:
	rm -f $(MODULES)/$(INSTALL_MOD_DIR)/dm-qcow2.ko
	$(if $(DESTDIR),,depmod $(KREL))
	$(MAKE) -C tools uninstall DESTDIR=$(DESTDIR) PREFIX=$(PREFIX)

# The sources as they are released, and packages made of nothing but these, in DIST.
DIST ?= dist
dist:
	@release/dist $(DIST)

deb: dist
	@release/deb $(DIST)

rpm: dist
	@release/rpm $(DIST)

# Does not need kernel headers, so that it works wherever it is wanted.
clean:
	@# A VM that is running keeps its folder.
	@for d in .build/vm/run.* .build/demo.*; do \
		[ ! -d "$$d" ] || ( flock -n 9 && rm -rf "$$d" ) 9< "$$d" || true; done
	rm -rf .build/lint.* .build/cppcheck .build/coverage .build/planted .build/docs .build/doctrees
	@rmdir .build/vm 2>/dev/null || true
	@[ ! -d .build ] || find .build -maxdepth 1 -type f -delete
	@rmdir .build 2>/dev/null || true
	rm -f $(BUILT)
	$(MAKE) -C tools clean
	$(MAKE) -C selftests/dm-qcow2 clean
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

deps:
	@selftests/vm/deps check
	@selftests/vm/get-qemu

# The VM's kernel decides what is built for it.
vm-build: tool
	@rel=$$(selftests/vm/run --kernel-release) && \
	$(LOCK) $(MAKE) --no-print-directory __module KREL="$$rel" KMAKE="selftests/vm/kmake ."
	@$(LOCK) $(MAKE) --no-print-directory -C tools tests/inject-lib
	@$(LOCK) $(MAKE) --no-print-directory -C selftests/dm-qcow2

vm-shell:
	@selftests/vm/deps check
	@$(MAKE) --no-print-directory vm-build
	@selftests/vm/run --shell

lint:
	@selftests/vm/deps lint
	@selftests/lint

lint-quick:
	@selftests/lint --quick

# In .build, which "make clean" takes away
docs:
	@command -v sphinx-build > /dev/null || { \
		echo "dm-qcow2: no sphinx; run: apt-get install python3-sphinx" >&2; exit 1; }
	@sphinx-build -q -W --keep-going -b html -d .build/doctrees Documentation .build/docs
	@echo "dm-qcow2: the pages are in .build/docs/index.html"

quick: preflight-unit
	@$(LOCK) $(MAKE) --no-print-directory -j$$(nproc) -C tools quick

unit:
	@$(MAKE) --no-print-directory -C tools preflight-unit \
		PREFLIGHT_MORE='command -v valgrind > /dev/null || missing valgrind "valgrind libc6-dbg";'
	@$(MAKE) --no-print-directory -C tools unit valgrind

fuzz: preflight-tool
	@command -v clang > /dev/null || { \
		echo "dm-qcow2: no clang; run: apt-get install clang libclang-rt-14-dev" >&2; exit 1; }
	@$(MAKE) --no-print-directory -C tools/fuzz fuzz

check:
	@selftests/check $(TESTS)

# Each one is tested even if another fails, and with nothing left out.
check-kernels: export THOROUGH ?= 1
check-kernels:
	@failed=; for k in $(KERNELS); do \
		echo; echo "==== kernel $$k ===="; \
		$(MAKE) --no-print-directory check KERNEL=$$k || failed="$$failed $$k"; \
	done; \
	[ -z "$$failed" ] || { echo "check-kernels: failed with kernel:$$failed" >&2; exit 1; }

# From a fresh Debian to a guest with backups, for each of HOSTS
HOSTS ?= bookworm trixie
check-hosts:
	@selftests/vm/deps check
	@for s in $(HOSTS); do selftests/newhost $$s || exit; done

# A module with bugs that tests have to find, for the VM's kernel
planted-build:
	@$(LOCK) $(MAKE) --no-print-directory -C selftests/planted module

test-programs: preflight-unit
	@$(LOCK) $(MAKE) --no-print-directory -C tools test-programs

check-planted:
	@selftests/vm/deps check
	@$(MAKE) --no-print-directory vm-build planted-build
	@selftests/vm/run --tests selftests/planted

# Rounds are those of all kinds of images together, of which there are seven.
SOAK_ROUNDS ?= 10000
soak:
	@selftests/vm/deps check
	@$(MAKE) --no-print-directory vm-build
	@[ $(SOAK_ROUNDS) = 0 ] || selftests/vm/run --load --timeout 172800 --cmd '$(if $(SOAK_SEED),SEED=$(SOAK_SEED)) \
		ROUNDS=$$((($(SOAK_ROUNDS) + 6) / 7)) selftests/dm-qcow2/test_bitmaps.py "a backup by bitmaps"'
	@selftests/powercut --soak

# One VM runs them all; each run is a short one, except where it says how many.
SEEDS ?= 200
FIRST_SEED ?= 1
RANDOM_TESTS := "extl2:bits after" "extl2:same entries" differential matrix "entries:random" "entries:some" \
	"cache:spread" "cache:dropped under" "cache:smallest" "corrupt:random" fuzz race "bitmaps:all kinds" \
	"bitmaps:a backup"
seeds: export VM_EXPORT += REQUESTS ROUNDS FACTOR FUZZ_IMAGES
seeds: export REQUESTS ?= 40
seeds: export ROUNDS ?= 1
seeds: export FUZZ_IMAGES ?= 4
seeds:
	@selftests/vm/deps check
	@$(MAKE) --no-print-directory vm-build
	@selftests/vm/run --load --timeout 86400 --cmd 'selftests/vm/guest-seeds $(FIRST_SEED) $(SEEDS) $(or $(TESTS),$(RANDOM_TESTS))'

# ROWS= which, BASE= a revision to compare with, CLOCK=vm (or uml, at native speed, with one CPU) by the
# clock, CPUS= of the VM then
bench:
	@selftests/vm/deps bench $(if $(filter uml,$(CLOCK)),debug)
	@$(MAKE) --no-print-directory vm-build
	@selftests/bench/bench $(if $(BASE),--base $(BASE)) $(if $(CLOCK),--clock) $(if $(filter uml,$(CLOCK)),--uml) \
		$(if $(CPUS),--cpus $(CPUS)) $(ROWS)

# The kernels are built once, which takes a quarter of an hour.
check-debug: export MORE_TESTS ?= backing backing_devices extl2 corrupt fail fail_places fail_discard reload
check-debug:
	@selftests/debug/check $(DEBUG)

# SUITES= of tools/tests for the tool, COVERAGE_TESTS= of selftests/dm-qcow2 for the driver. The
# kernel for the latter is built once.
COVERAGE ?= tool driver
coverage:
	@selftests/vm/deps coverage $(if $(filter driver,$(COVERAGE)),check debug)
	@selftests/coverage $(COVERAGE)

demo:
	@selftests/vm/deps demo
	@$(MAKE) --no-print-directory vm-build
	@selftests/vm/demo

.PHONY: all help version dist deb rpm module __module tool install uninstall clean deps docs vm-build vm-shell lint lint-quick quick unit fuzz \
	check check-debug check-hosts check-kernels check-planted planted-build test-programs soak seeds bench coverage demo \
	preflight-cc preflight-module preflight-tool preflight-unit preflight-install \
	preflight-dkms dkms-source dkms-install dkms-uninstall
