# SPDX-License-Identifier: MIT OR Apache-2.0
#
# GNU make. `make help` lists the targets; a target's own `##` text is what it prints.

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libkuf.so.$(firstword $(subst ., ,$(VERSION)))
SO      := libkuf.so.$(VERSION)

PREFIX     ?= /usr/local
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR     ?= $(PREFIX)/share/man
DESTDIR    ?=

CARGO   ?= cargo
OBJCOPY ?= objcopy
INSTALL ?= install
CFLAGS  ?= -O2 -g
WARN    := -std=c11 -Wall -Wextra -Wpedantic

BUILD     := build
CARGO_OUT := $(or $(CARGO_TARGET_DIR),target)/release
SOURCES   := Cargo.toml Cargo.lock build.rs $(shell find src -name '*.rs')
STAGE     := $(CURDIR)/$(BUILD)/stage
# How a program finds the staged library: to build with, and to run with.
STAGE_PC  := PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config
STAGE_RUN := LD_LIBRARY_PATH=$(STAGE)/lib

EXAMPLES := $(patsubst examples/c/%.c,$(BUILD)/examples/%,$(wildcard examples/c/*.c))
C_TESTS  := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/*.c))
C_ASAN   := $(C_TESTS:$(BUILD)/tests/%=$(BUILD)/tests-asan/%)
BENCHES  := $(patsubst benches/%.c,$(BUILD)/bench/%,$(wildcard benches/*.c))
K_TESTS  := $(patsubst tests/kernel/library/%.c,$(BUILD)/kernel-tests/%,$(wildcard tests/kernel/library/*.c))
K_LIST   := $(BUILD)/kernel-tests/all.list

.DELETE_ON_ERROR:
.SECONDEXPANSION:
.SUFFIXES:
.PHONY: build header install install-files uninstall stage examples demo c-tests c-tests-asan check check-kernel check-qemu clean help

build: $(BUILD)/$(SO) $(BUILD)/libkuf.a ## build libkuf.so and libkuf.a into build/ (the default)

# cargo makes the static library; debug information goes from the copy that is installed.
$(BUILD)/libkuf.a: $(SOURCES)
	@tests/check/need.sh cc=gcc objcopy=binutils
	$(CARGO) build --release --lib
	@mkdir -p $(BUILD)
	$(OBJCOPY) --strip-debug $(CARGO_OUT)/libkuf.a $@

# The second link gives what cargo's cdylib cannot have: symbol versions. nodelete: Rust's thread-local destructors may
# run after dlclose, so the code has to stay mapped.
$(BUILD)/$(SO): $(BUILD)/libkuf.a src/capi/libkuf.map Makefile
	$(CC) -shared -o $@.debug -Wl,-soname,$(SONAME) \
	    -Wl,--version-script=src/capi/libkuf.map -Wl,--no-undefined-version -Wl,--no-undefined \
	    -Wl,-z,nodelete -Wl,-z,relro -Wl,-z,now -Wl,-z,text -Wl,-z,noexecstack -Wl,--build-id -Wl,--gc-sections \
	    -Wl,--whole-archive $(CARGO_OUT)/libkuf.a -Wl,--no-whole-archive \
	    -Wl,--as-needed -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc $(LDFLAGS)
	$(OBJCOPY) --strip-unneeded --add-gnu-debuglink=$@.debug $@.debug $@

header: ## write include/kuf.h anew from the Rust source, and man/kuf.3 from it
	KUF_BLESS=1 $(CARGO) test --test header
	KUF_BLESS=1 $(CARGO) test --test manpage

install: install-files ## install under PREFIX (LIBDIR, INCLUDEDIR, MANDIR, DESTDIR as usual)
	@echo "installed in $(DESTDIR)$(LIBDIR); run ldconfig if the system's linker looks there"

install-files: build
	$(INSTALL) -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR) $(DESTDIR)$(MANDIR)/man3
	$(INSTALL) -m 755 $(BUILD)/$(SO) $(DESTDIR)$(LIBDIR)/$(SO)
	ln -sf $(SO) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libkuf.so
	$(INSTALL) -m 644 $(BUILD)/libkuf.a $(DESTDIR)$(LIBDIR)/libkuf.a
	$(INSTALL) -m 644 include/kuf.h $(DESTDIR)$(INCLUDEDIR)/kuf.h
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' \
	    -e 's|@LIBDIR@|$(patsubst $(PREFIX)/%,$${prefix}/%,$(LIBDIR))|' \
	    -e 's|@INCLUDEDIR@|$(patsubst $(PREFIX)/%,$${prefix}/%,$(INCLUDEDIR))|' \
	    pkgconfig/kuf.pc.in >$(DESTDIR)$(LIBDIR)/pkgconfig/kuf.pc
	chmod 644 $(DESTDIR)$(LIBDIR)/pkgconfig/kuf.pc
	$(INSTALL) -m 644 man/kuf.3 $(DESTDIR)$(MANDIR)/man3/kuf.3

uninstall: ## remove what install has put there (same variables)
	rm -f $(addprefix $(DESTDIR)$(LIBDIR)/,$(SO) $(SONAME) libkuf.so libkuf.a pkgconfig/kuf.pc) \
	    $(DESTDIR)$(INCLUDEDIR)/kuf.h $(DESTDIR)$(MANDIR)/man3/kuf.3

stage: $(BUILD)/stage.stamp ## install into build/stage, for examples and tests

$(BUILD)/stage.stamp: $(BUILD)/$(SO) include/kuf.h pkgconfig/kuf.pc.in man/kuf.3
	@tests/check/need.sh pkg-config=pkg-config
	@rm -rf $(STAGE)
	@$(MAKE) --no-print-directory -s install-files PREFIX=$(STAGE) LIBDIR=$(STAGE)/lib \
	    INCLUDEDIR=$(STAGE)/include MANDIR=$(STAGE)/share/man DESTDIR=
	@ln -s ../../$(SO).debug $(STAGE)/lib/
	@touch $@

examples: $(EXAMPLES) ## build examples/c with nothing but pkg-config

# NAME_guest.S beside NAME.c is the guest's code, given to the same command.
$(BUILD)/examples/%: examples/c/%.c $$(wildcard examples/c/$$*_guest.S) $(wildcard examples/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -std=gnu11 -Wall -Wextra $(WERROR) -pthread -o $@ $(filter %.c %.S,$^) $(if $(filter dlopen_%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

demo: $(BUILD)/examples/lazy_restore ## restore a virtual machine lazily and show what it took
	@$(STAGE_RUN) $<

c-tests: $(C_TESTS)
c-tests-asan: $(C_ASAN)

# dlclose.c gets no -lkuf: it is about a library that was loaded by hand.
$(BUILD)/tests/%: tests/c/%.c $(wildcard tests/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $(if $(filter dl%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

$(BUILD)/tests-asan/%: tests/c/%.c $(wildcard tests/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) -O1 -g -fsanitize=address -fno-omit-frame-pointer $(WARN) -Werror -pthread -o $@ $< $(if $(filter dl%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

# The test plays Firecracker, and finds the handler beside itself, built as it is.
$(BUILD)/tests/firecracker_peer: $(BUILD)/tests/firecracker_handler
$(BUILD)/tests-asan/firecracker_peer: $(BUILD)/tests-asan/firecracker_handler

$(BUILD)/tests/firecracker_handler: examples/c/firecracker_handler.c $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/tests-asan/firecracker_handler: examples/c/firecracker_handler.c $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) -O1 -g -fsanitize=address -fno-omit-frame-pointer $(WARN) -Werror -pthread -o $@ $< \
	    $$($(STAGE_PC) --cflags --libs kuf)

# GNU C: the machine that these share with the kernel's selftests is written in it.
$(BUILD)/kernel-tests/%: tests/kernel/library/%.c $(wildcard tests/kernel/library/*.h tests/kernel/selftests/*.h) \
    $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wstrict-prototypes \
	    -Wmissing-prototypes -Wvla -Werror \
	    -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/bench/%: benches/%.c $(wildcard benches/*.h) tests/c/open_uffd.h $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

.PHONY: bench bench-programs
bench-programs: $(BENCHES)

bench: $(BENCHES) ## measure against what VMMs do today (QUICK=1 for two minutes, BENCH=name,... for some rows)
	@tests/check/need.sh python3=python3
	@benches/run.py

check: ## run every test; the last line is the sum
	@MAKE="$(MAKE)" tests/check/run.sh

# Programs in the lists are named from where they are built: NAME here, ../examples/NAME there.
check-kernel: $(K_TESTS) $(EXAMPLES) ## test the patched KVM kernel, and the library on it, in an emulated machine
	@mkdir -p $(dir $(K_LIST))
	@awk 1 /dev/null $(wildcard tests/kernel/library/*.list) >$(K_LIST)
	@tests/kernel/run.sh -L $(STAGE)/lib -l $(K_LIST)

check-qemu: $(BUILD)/stage.stamp ## migrate guests with a QEMU that uses the library (builds it once: minutes)
	@tests/qemu/run.sh $(STAGE)

clean: ## remove build/ and cargo's target directory
	rm -rf $(BUILD)
	$(CARGO) clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
