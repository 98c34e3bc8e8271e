# SPDX-License-Identifier: MIT OR Apache-2.0
#
# GNU make. `make help` lists the targets with the `##` text of each.

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libkuf.so.$(firstword $(subst ., ,$(VERSION)))
SO      := libkuf.so.$(VERSION)

PREFIX     ?= /usr/local
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR     ?= $(PREFIX)/share/man
DOCDIR     ?= $(PREFIX)/share/doc/libkuf
DESTDIR    ?=

CARGO   ?= cargo
OBJCOPY ?= objcopy
INSTALL ?= install
CFLAGS  ?= -O2 -g
WARN    := -std=c11 -Wall -Wextra -Wpedantic

BUILD     := build
# To build for another machine: Rust's name of it, here or in cargo's configuration. Then set CC and OBJCOPY for it too.
TARGET    ?=
SOURCES   := Cargo.toml Cargo.lock build.rs packaging/cargo.sh $(shell find src -name '*.rs')
STAGE     := $(CURDIR)/$(BUILD)/stage
# Makes programs use the staged library, at build time and at run time.
STAGE_PC  := PKG_CONFIG_PATH='$(STAGE)/lib/pkgconfig' pkg-config
STAGE_RUN := LD_LIBRARY_PATH='$(STAGE)/lib'
# A word of the shell, with any character in it.
quoted     = '$(subst ','\'',$(1))'
INSTALL_AS = $(foreach name,PREFIX LIBDIR INCLUDEDIR MANDIR DOCDIR DESTDIR INSTALL VERSION BUILD,$(name)=$(call quoted,$($(name)))) \
    packaging/install.sh

EXAMPLES := $(patsubst examples/c/%.c,$(BUILD)/examples/%,$(wildcard examples/c/*.c))
C_TESTS  := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/*.c))
C_ASAN   := $(C_TESTS:$(BUILD)/tests/%=$(BUILD)/tests-asan/%)
BENCHES  := $(patsubst benches/%.c,$(BUILD)/bench/%,$(wildcard benches/*.c))
K_TESTS  := $(patsubst tests/kernel/library/%.c,$(BUILD)/kernel-tests/%,$(wildcard tests/kernel/library/*.c))
K_LIST   := $(BUILD)/kernel-tests/all.list

.DELETE_ON_ERROR:
.SECONDEXPANSION:
.SUFFIXES:
.PHONY: build header install install-files uninstall dist deb stage examples demo c-tests c-tests-asan check check-faults check-kernel check-kernels check-qemu check-sanitize clean help simulate

# These may set up what they need (tests/check/need.sh). All other targets say what is missing.
demo check check-faults check-kernel check-kernels check-qemu check-sanitize: export KUF_INSTALL_TOOLS = 1

build: $(BUILD)/$(SO) $(BUILD)/libkuf.a ## build libkuf.so and libkuf.a into build/ (the default)

# cargo builds the static library; the installed copy has no debug information. Its place is cargo's, so that a link leads there.
$(BUILD)/libkuf.a: $(SOURCES)
	@tests/check/need.sh $(firstword $(CARGO))=cargo $(firstword $(CC))=gcc $(firstword $(OBJCOPY))=binutils
	@mkdir -p $(BUILD)
	archive=$$(CARGO='$(CARGO)' packaging/cargo.sh $(VERSION) $(TARGET:%=--target %)) && ln -sf "$$archive" $(BUILD)/libkuf-debug.a
	$(OBJCOPY) --strip-debug $(BUILD)/libkuf-debug.a $@

# Link a second time because cargo's cdylib cannot have symbol versions. nodelete: Rust's thread-local destructors may run
# after dlclose, so that the code must stay mapped.
$(BUILD)/$(SO): $(BUILD)/libkuf.a src/capi/libkuf.map Makefile
	$(CC) -shared -o $@.debug -Wl,-soname,$(SONAME) \
	    -Wl,--version-script=src/capi/libkuf.map -Wl,--no-undefined-version -Wl,--no-undefined \
	    -Wl,-z,nodelete -Wl,-z,relro -Wl,-z,now -Wl,-z,text -Wl,-z,noexecstack -Wl,--build-id -Wl,--gc-sections \
	    -Wl,--whole-archive $(BUILD)/libkuf-debug.a -Wl,--no-whole-archive \
	    -Wl,--as-needed -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc $(LDFLAGS)
	$(OBJCOPY) --strip-unneeded --add-gnu-debuglink=$@.debug $@.debug $@

header: ## generate the headers and manual pages from the Rust source
	KUF_BLESS=1 $(CARGO) test --test header
	KUF_BLESS=1 $(CARGO) test --test manpage

install: install-files ## install under PREFIX (LIBDIR, INCLUDEDIR, MANDIR, DOCDIR, DESTDIR as usual)
	@echo installed in $(call quoted,$(DESTDIR)$(LIBDIR))"; run ldconfig if the system's linker searches it"

install-files: build
	@$(INSTALL_AS) install

uninstall: ## remove the installed files (same variables)
	@$(INSTALL_AS) uninstall

ARCHIVE := libkuf-$(VERSION)

dist: ## make build/libkuf-VERSION.tar.gz of this tree's files, the same bytes for the same files
	@mkdir -p $(BUILD)
	git ls-files -z --cached --others --exclude-standard | LC_ALL=C sort -z >$(BUILD)/dist.list
	tar -cf $(BUILD)/$(ARCHIVE).tar --null --no-recursion -T $(BUILD)/dist.list --transform='flags=rh;s|^|$(ARCHIVE)/|' \
	    --format=gnu --owner=0 --group=0 --numeric-owner --mode=u+rw,go+r,go-w --mtime=@$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)}
	gzip -9nf $(BUILD)/$(ARCHIVE).tar

# In a copy of the tree, with the library that is built: debhelper leaves its files beside debian/.
deb: build ## make Debian packages in build/deb
	@tests/check/need.sh dh=debhelper dpkg-gencontrol=dpkg-dev
	@rm -rf $(BUILD)/deb
	@mkdir -p $(BUILD)/deb/tree
	@for file in *; do \
	    case $$file in build|target) ln -s "$(CURDIR)/$$file" $(BUILD)/deb/tree/;; *) cp -Rp "$$file" $(BUILD)/deb/tree/;; esac; \
	done
	cd $(BUILD)/deb/tree && debian/rules binary

stage: $(BUILD)/stage.stamp ## install into build/stage, for examples and tests

$(BUILD)/stage.stamp: $(BUILD)/$(SO) $(wildcard include/*.h man/*.[137]) pkgconfig/kuf.pc.in packaging/install.sh
	@tests/check/need.sh pkg-config=pkg-config
	@rm -rf $(BUILD)/stage
	@$(MAKE) --no-print-directory -s install-files PREFIX='$(STAGE)' LIBDIR='$(STAGE)/lib' \
	    INCLUDEDIR='$(STAGE)/include' MANDIR='$(STAGE)/share/man' DOCDIR='$(STAGE)/share/doc/libkuf' DESTDIR=
	@ln -s ../../$(SO).debug $(BUILD)/stage/lib/
	@touch $@

examples: $(EXAMPLES) ## build examples/c with pkg-config only

# NAME_guest.S next to NAME.c is the guest's code, compiled by the same command.
$(BUILD)/examples/%: examples/c/%.c $$(wildcard examples/c/$$*_guest.S) $(wildcard examples/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -std=gnu11 -Wall -Wextra $(WERROR) -pthread -o $@ $(filter %.c %.S,$^) $(if $(filter dlopen_%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

demo: $(BUILD)/examples/lazy_restore ## restore a virtual machine lazily and show the cost
	@$(STAGE_RUN) $<

# The tests check the errno of each call.
CHECKED      := -I$(BUILD)/fuzz -include tests/c/checked.h
CHECKED_DEPS := $(BUILD)/fuzz/wrapped.h tests/c/checked.h

c-tests: $(C_TESTS)
c-tests-asan: $(C_ASAN)

# dlclose.c gets no -lkuf, because it loads the library with dlopen.
$(BUILD)/tests/%: tests/c/%.c $(wildcard tests/c/*.h) examples/c/long_mode.h $(BUILD)/stage.stamp $(CHECKED_DEPS)
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread $(if $(filter dl%,$*),,$(CHECKED)) -o $@ $< $(if $(filter dl%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

# Tests with a sanitizer, in build/tests-asan/ and build/tests-tsan/. If rustc has the sanitizer's runtime
# (tests/check/sanitize.sh passes it as ASAN_RUNTIME and TSAN_RUNTIME), the programs are linked with an instrumented static
# library. RUSTC_BOOTSTRAP: -Zsanitizer is not a stable option; no installed file is built with it. LTO is off because it
# removes the instrumentation.
SANITIZED := RUSTC_BOOTSTRAP=1 CARGO_PROFILE_RELEASE_LTO=off $(CARGO) build --release --lib --target $(shell uname -m)-unknown-linux-gnu
SANITIZED_IN := $(or $(CARGO_TARGET_DIR),target)
LINK_SANITIZED := -lpthread -ldl -lm -lrt -lgcc_s -lutil -Wl,--export-dynamic

$(BUILD)/asan/libkuf.a: $(SOURCES)
	RUSTFLAGS="-Zsanitizer=address" $(SANITIZED) --target-dir '$(SANITIZED_IN)/asan'
	@mkdir -p $(@D)
	@cp '$(SANITIZED_IN)'/asan/*/release/libkuf.a $@

# With locks of libpthread, which ThreadSanitizer supports, in place of std's (src/sync/pthread.rs).
$(BUILD)/tsan/libkuf.a: $(SOURCES)
	RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer --cfg kuf_tsan" \
	    $(SANITIZED) --target-dir '$(SANITIZED_IN)/tsan'
	@mkdir -p $(@D)
	@cp '$(SANITIZED_IN)'/tsan/*/release/libkuf.a $@

ASAN_KUF = $(if $(ASAN_RUNTIME),$(BUILD)/asan/libkuf.a -Wl$(comma)--whole-archive $(ASAN_RUNTIME) \
    -Wl$(comma)--no-whole-archive $(LINK_SANITIZED),-fsanitize=address $$($(STAGE_PC) --libs kuf))
ASAN_NEEDS = $(if $(ASAN_RUNTIME),$(BUILD)/asan/libkuf.a)
comma := ,
ASAN_CC = $(CC) -O1 -g -fsanitize=address -fno-omit-frame-pointer $(WARN) -Werror -pthread $$($(STAGE_PC) --cflags kuf)

# Instrument only the program: dlclose loads the library with dlopen, and ahead needs quick fills.
$(BUILD)/tests-asan/dlclose $(BUILD)/tests-asan/ahead: override ASAN_RUNTIME =

# Compile and link separately, because the runtime to link is rustc's, not the C compiler's.
$(BUILD)/tests-asan/%: tests/c/%.c $(wildcard tests/c/*.h) examples/c/long_mode.h $(BUILD)/stage.stamp $(CHECKED_DEPS) $$(ASAN_NEEDS)
	@mkdir -p $(@D)
	@$(ASAN_CC) $(if $(filter dl%,$*),,$(CHECKED)) -c -o $@.o $<
	@$(CC) -o $@ $@.o $(if $(findstring /dl,$@),-fsanitize=address -ldl,$(ASAN_KUF))

$(BUILD)/tests-tsan/%: tests/c/%.c $(wildcard tests/c/*.h) examples/c/long_mode.h $(BUILD)/stage.stamp $(CHECKED_DEPS) tests/check/tsan_start.c $(BUILD)/tsan/libkuf.a
	@mkdir -p $(@D)
	@$(CC) -O1 -g $(WARN) -Werror -pthread $(CHECKED) $$($(STAGE_PC) --cflags kuf) -c -o $@.o $<
	@$(CC) -o $@ $@.o tests/check/tsan_start.c $(BUILD)/tsan/libkuf.a -Wl,--whole-archive $(TSAN_RUNTIME) -Wl,--no-whole-archive $(LINK_SANITIZED)

# -fno-builtin, because the program defines malloc.
$(BUILD)/faults/faults: $(wildcard tests/faults/*.c tests/faults/*.h tests/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) -std=gnu11 -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror \
	    -fno-builtin -rdynamic -pthread -o $@ $(filter %.c,$^) $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/tests/firecracker_message $(BUILD)/tests-asan/firecracker_message: fuzz/firecracker.h \
    examples/c/firecracker_handler.c

# The test acts as Firecracker. It runs the handler from its own directory, built with the same options.
$(BUILD)/tests/firecracker_peer: $(BUILD)/tests/firecracker_handler
$(BUILD)/tests-asan/firecracker_peer: $(BUILD)/tests-asan/firecracker_handler

$(BUILD)/tests/firecracker_handler: examples/c/firecracker_handler.c $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/tests-asan/firecracker_handler: examples/c/firecracker_handler.c $(BUILD)/stage.stamp $$(ASAN_NEEDS)
	@mkdir -p $(@D)
	@$(ASAN_CC) -c -o $@.o $<
	@$(CC) -o $@ $@.o $(ASAN_KUF)

# GNU C, because these tests share code in it with the kernel's selftests.
$(BUILD)/kernel-tests/%: tests/kernel/library/%.c $(wildcard tests/kernel/library/*.h tests/kernel/selftests/*.h) \
    $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wstrict-prototypes \
	    -Wmissing-prototypes -Wvla -Werror \
	    -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/bench/%: benches/%.c $(wildcard benches/*.h) tests/c/open_uffd.h $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $(if $(filter dl%,$*),\
	    $$($(STAGE_PC) --cflags kuf) -ldl,$$($(STAGE_PC) --cflags --libs kuf))

# The errors that the headers document for each call, and a macro around each of these calls (tests/c/checked.h).
$(BUILD)/fuzz/documented.h: tests/fuzz/documented.awk include/kuf.h include/kuf-kvm.h
	@mkdir -p $(@D)
	@awk -f $^ >$@

$(BUILD)/fuzz/wrapped.h: $(BUILD)/fuzz/documented.h
	@awk -F'"' '/kuf_/ && !seen[$$2]++ { printf "#define %s(...) HARNESS_CHECKED(\"%s\", %s(__VA_ARGS__))\n", $$2, $$2, $$2 }' $< >$@

FUZZ_SOURCES := $(filter-out tests/fuzz/soak.c tests/fuzz/model_test.c,$(wildcard tests/fuzz/*.c))
FUZZ_FLAGS    = $(CFLAGS) -std=gnu11 -Wall -Wextra -Werror -pthread -I$(BUILD)/fuzz

$(BUILD)/fuzz/fuzz: $(FUZZ_SOURCES) tests/fuzz/fuzz.h tests/c/open_uffd.h $(BUILD)/fuzz/documented.h $(BUILD)/stage.stamp
	@$(CC) $(FUZZ_FLAGS) -o $@ $(FUZZ_SOURCES) $$($(STAGE_PC) --cflags --libs kuf)

$(BUILD)/fuzz/model_test: tests/fuzz/model_test.c tests/fuzz/model.c tests/fuzz/bytes.c tests/fuzz/fuzz.h $(BUILD)/fuzz/documented.h
	@$(CC) $(FUZZ_FLAGS) -Iinclude -o $@ $(filter %.c,$^)

$(BUILD)/fuzz/soak: tests/fuzz/soak.c $(wildcard tests/c/*.h) $(BUILD)/stage.stamp
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARN) -Werror -pthread -o $@ $< $$($(STAGE_PC) --cflags --libs kuf)

SECONDS ?= 600
.PHONY: fuzz soak
fuzz: $(BUILD)/fuzz/fuzz $(BUILD)/fuzz/model_test ## make random calls for SECONDS=600 and compare each page with a model
	@$(BUILD)/fuzz/model_test
	@$(STAGE_RUN) $< --seconds=$(SECONDS) --huge-pages --minimise

soak: $(BUILD)/fuzz/soak ## serve faults and check their bytes for SECONDS=600; no resource may grow
	@KUF_SOAK_SECONDS=$(SECONDS) $(STAGE_RUN) $<

.PHONY: bench bench-programs
bench-programs: $(BENCHES)

bench: $(BENCHES) ## measure against today's VMMs (QUICK=1 for two minutes, BENCH=name,... for some rows)
	@tests/check/need.sh python3=python3
	@benches/run.py

check: ## run the suites of tests/check; the last line is the sum
	@MAKE="$(MAKE)" tests/check/run.sh

check-faults: ## fail each allocation and system call of the library in turn (ALL=1, SECONDS_EACH=, SCENARIO=)
	@MAKE="$(MAKE)" ALL="$(ALL)" SECONDS_EACH="$(SECONDS_EACH)" SCENARIO="$(SCENARIO)" tests/check/faults.sh

# The lists name programs relative to build/kernel-tests: NAME, ../examples/NAME.
check-kernel: $(K_TESTS) $(EXAMPLES) ## test the patched KVM kernel, and the library on it, in an emulated machine
	@mkdir -p $(dir $(K_LIST))
	@awk 1 /dev/null $(wildcard tests/kernel/library/*.list) >$(K_LIST)
	@tests/kernel/run.sh -L $(STAGE)/lib -l $(K_LIST)

check-sanitize: $(BUILD)/stage.stamp ## run all C tests with AddressSanitizer and ThreadSanitizer (TEST=name,... for some)
	@MAKE="$(MAKE)" tests/check/sanitize.sh $(subst $(comma), ,$(TEST))

check-kernels: ## run the tests on Debian's kernels in emulated machines (K=name,... for some, QUICK=1 for the tests that differ)
	@QUICK=$(QUICK) tests/kernels/run.sh $(subst $(comma), ,$(K))

check-qemu: $(BUILD)/stage.stamp ## migrate guests with a QEMU that uses the library (builds it once: minutes)
	@tests/qemu/run.sh $(STAGE)

simulate: ## run the library over a simulated kernel with new seeds for SECONDS=60
	@SECONDS_OF_SEEDS=$(or $(SECONDS),60) tests/check/simulate.sh

clean: ## remove build/ and cargo's target directory
	rm -rf $(BUILD)
	$(CARGO) clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
