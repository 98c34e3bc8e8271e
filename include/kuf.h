/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf.h - serves guest page faults for virtual machine monitors
 *
 * A VMM that restores a snapshot lazily, receives a post-copy migration or keeps guest memory elsewhere must catch the
 * guest's first access to each page, get the page, install it and let the guest continue. This library does that:
 *
 *     static int my_fill(void *image, struct kuf_fill *run)
 *     {
 *         ssize_t n = pread(*(int *)image, run->buf, run->len, (off_t)run->memory_offset);
 *         return n == (ssize_t)run->len ? KUF_FILL_DONE : -EIO;
 *     }
 *     ...
 *     struct kuf_options options = { .size = sizeof(options), .fill = my_fill, .opaque = &image };
 *     struct kuf *kuf;
 *     if (kuf_open(&options, &kuf) < 0)
 *         errx(1, "%s", kuf_error());
 *     struct kuf_memory ram = { .size = sizeof(ram), .gpa = 0, .len = len, .hva = (uintptr_t)mapping };
 *     if (kuf_add_memory(kuf, &ram) < 0)
 *         errx(1, "%s", kuf_error());
 *     ... run the guest: my_fill is called for each page that the guest touches first ...
 *     if (kuf_close(&kuf, KUF_END_POPULATE) < 0)
 *         warnx("%s", kuf_error()), kuf_close(&kuf, KUF_END_POISON);
 *
 * Words:
 *   - A memory slot is a range of guest physical addresses (gpa) and the mapping (hva) behind it. Its page size is
 *     that of the mapping, and the unit of everything here.
 *   - A page is absent, being filled, present, removed (the guest gave it back, it reads as zero) or poisoned
 *     (touching it raises SIGBUS). To fill is to get its bytes; to install is to hand them to the kernel; to resolve
 *     is to make the page present and wake the threads that are blocked on it.
 *   - A demand fault has a blocked thread. Populate fills pages in the background.
 *   - The caller is the program that uses the library; the host is the machine.
 *
 * Rules that always hold:
 *   - The guest never sees bytes that are not its own. A page that cannot be filled stays inaccessible or is poisoned.
 *   - Calls return 0 or a count, else -errno, and kuf_error() says what to do; errno has no meaning. struct kuf
 *     lists the errors of every call. A call that fails for its arguments has changed nothing.
 *   - A struct that the caller passes starts with its size; zero in every other field is the default. 0 and -1 both
 *     stand for no descriptor, so descriptor 0 cannot be given.
 *   - gpa, hva and lengths are in bytes; times are in nanoseconds unless the name says otherwise.
 *   - Any thread may make any call at any time, unless its text says otherwise.
 *   - The library starts threads named kuf-*, which block all signals and end with kuf_close. It never exits, aborts,
 *     prints (without KUF_OPEN_DEBUG_ENV) or installs signal handlers, and it stays loaded after dlclose.
 *
 * Link with `pkg-config --cflags --libs kuf`, or dlopen libkuf.so.0. Each call has a page in section 3 of the manual,
 * with notes that are left out here. Everything below exists since 0.1. Code for several versions of this header
 * tests for a call with #ifdef KUF_HAVE_KUF_OPEN (each call has such a macro), for a flag with #ifdef of the flag, for
 * a field with KUF_VERSION_MINOR. This file is generated from the library's source.
 */

#ifndef KUF_H
#define KUF_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Version of this header. The soname follows the major version. */
#define KUF_VERSION_MAJOR 0
/* Incremented when calls, flags or fields are added. */
#define KUF_VERSION_MINOR 1
/* Incremented for changes that do not affect this header. */
#define KUF_VERSION_PATCH 0

/* In place of a gpa: every memory slot of the handle. A length beside it is ignored. */
#define KUF_ALL 18446744073709551615ull

#define KUF_MECHANISM_AUTO 0 /* Let the library choose. It chooses userfaultfd. */
/* userfaultfd(2): catches accesses by vCPUs, KVM, vhost and threads alike. The other mechanisms are in kuf-kvm.h. */
#define KUF_MECHANISM_USERFAULTFD 1
/* Length of the arrays in struct kuf_probe_info: mechanisms are numbered from 1 to KUF_MECHANISM_COUNT - 1. */
#define KUF_MECHANISM_COUNT 4

/* Mode: the caller takes faults with kuf_read and answers with kuf_resolve. A library thread reads the kernel. */
#define KUF_OPEN_CALLER_DRIVEN (1u << 0)
/* Accept a userfaultfd that catches user-mode accesses only, where the process may open no other. It needs no
 * privilege and cannot serve a KVM guest, whose accesses are the kernel's and fail with EFAULT. For emulators and
 * tests. Kernel: UFFD_USER_MODE_ONLY. */
#define KUF_OPEN_USER_MODE_ONLY (1u << 1)
/* Serve forked children too, from the same source. Needs CAP_SYS_PTRACE. Without it, absent pages read as zero in a
 * child unless the memory is MADV_DONTFORK. Kernel: UFFD_FEATURE_EVENT_FORK. */
#define KUF_OPEN_FOLLOW_FORK (1u << 2)
/* Mode: as KUF_OPEN_CALLER_DRIVEN, without a thread of the library: kuf_read reads the kernel, which saves one
 * thread wake-up a fault. Memory that the guest gives back must be reported with kuf_discard(...,
 * KUF_DISCARD_ZERO), and must not be moved or unmapped before kuf_remove_memory. Not with kuf_populate, kuf_replay
 * and KUF_OPEN_FOLLOW_FORK. */
#define KUF_OPEN_DIRECT (1u << 3)
/* Open no userfaultfd: every slot has its own (kuf_memory.uffd). For an unprivileged handler of other processes. */
#define KUF_OPEN_ADOPT_ONLY (1u << 4)
/* Check the bytes of callbacks, sources and kuf_resolve for pages of zeroes and install those as zero pages. In
 * private memory they take no memory until they are written. In shared memory, zero pages that no thread is blocked
 * on are left as holes: they count as removed and are allocated on first access. */
#define KUF_OPEN_DETECT_ZERO (1u << 5)
#define KUF_OPEN_SOURCES (1u << 6) /* Mode: there is no fill callback; every slot has a kuf_memory.source. */
/* If the environment has KUF_DEBUG=1, also write log records of every level to standard error. Ignored in
 * set-user-ID programs. */
#define KUF_OPEN_DEBUG_ENV (1u << 7)

/* kuf_source.kind: a regular file or block device. Holes are zero (or the base's) and are not read. If the file
 * becomes shorter or its disk fails, the pages concerned are poisoned; no signal is raised. Any change of the file
 * changes what absent pages will hold. */
#define KUF_SOURCE_FILE 1
/* kuf_source.kind: readable memory of this process, not served itself, that does not change while the slot exists. */
#define KUF_SOURCE_MEMORY 2
#define KUF_SOURCE_ZERO 3 /* kuf_source.kind: zeroes. */
/* kuf_source.flags, for a file: read past the page cache (O_DIRECT), so that a one-off image does not evict other
 * cached data. kuf_source.offset must be a multiple of 4096. Not faster when memory is plentiful. */
#define KUF_SOURCE_DIRECT_IO (1u << 0)

#define KUF_RUN_DEMAND (1u << 0) /* A thread is blocked until this run is resolved. */
/* kuf_fill.buf is the guest's page itself, through a mapping that is not visible to the guest: nothing is copied
 * afterwards. After KUF_FILL_DEFERRED it stays valid until the run is resolved (KUF_RESOLVE_IN_PLACE), which it
 * must eventually be. KUF_END_POISON takes it away: stop writing to it first. */
#define KUF_RUN_IN_PLACE (1u << 1)
/* The fault is a forked child's (KUF_OPEN_FOLLOW_FORK). gpa is that of the parent's slot. */
#define KUF_RUN_FORKED (1u << 2)

#define KUF_FILL_DONE 0 /* Fill callback: the first kuf_fill.filled bytes of the run are in buf, or at src. */
#define KUF_FILL_ZERO 1 /* Fill callback: the first kuf_fill.filled bytes of the run are zero; buf was not written. */
/* Fill callback: the caller will call kuf_resolve for every page of the run later, from any thread and in any
 * pieces. Until then the run is not asked for again. */
#define KUF_FILL_DEFERRED 2
/* Fill callback, for a run without KUF_RUN_DEMAND (with it: -EPROTO): not now. The run stays absent, and populate and
 * replay go on with the next. If a thread touched it meanwhile, it is asked for again at once, with KUF_RUN_DEMAND. */
#define KUF_FILL_LATER 3

#define KUF_MEMORY_REMOTE (1u << 0) /* hva is an address of the process that opened kuf_memory.uffd. */
/* Ask the source for every page, whatever the file holds: for use after a handler that died and may have left
 * half-filled pages. Add the slot before anything touches the memory. Mark pages that are known to be whole with
 * KUF_RESOLVE_IN_PLACE. Needs kuf_memory.fd and KUF_FEATURE_MINOR. */
#define KUF_MEMORY_FILL_ALL (1u << 1)
/* Prefer transparent huge pages for private memory that is filled ahead of demand. Best effort; needs
 * KUF_FEATURE_HUGE. For KVM to map a huge page, gpa and hva must agree modulo 2 MiB. Do not set MADV_HUGEPAGE on the
 * guest memory: demand becomes slower. Kernel: UFFDIO_MOVE (Linux 6.8). */
#define KUF_MEMORY_HUGE (1u << 2)
/* The memory may hold pages already, and these are the guest's own: they count as present and keep their bytes.
 * Without this flag, memory that holds pages is refused (-EBUSY). Not with KUF_MEMORY_FILL_ALL. */
#define KUF_MEMORY_POPULATED (1u << 3)

#define KUF_FAULT_WRITE (1u << 0) /* A write caused the fault. */
/* The page is in the page cache of a shared file but not mapped. Kernel: UFFD_PAGEFAULT_FLAG_MINOR. */
#define KUF_FAULT_MINOR (1u << 1)
/* A thread is blocked on this page. Not set for pages that only kuf_populate asked for. */
#define KUF_FAULT_DEMAND (1u << 2)
/* A forked child's fault (KUF_OPEN_FOLLOW_FORK). Resolve it like any other: kuf_resolve serves parent and child. */
#define KUF_FAULT_FORKED (1u << 3)

#define KUF_RESOLVE_ZERO (1u << 0) /* kuf_resolve: src is NULL and the range is zero. */
/* kuf_resolve: src is NULL; the bytes are in the shared file already (kuf_fill.buf, kuf_fault.place, pwrite). Only
 * for slots that are filled in place (KUF_SETTING_IN_PLACE). */
#define KUF_RESOLVE_IN_PLACE (1u << 1)
/* kuf_resolve: src is NULL and the bytes are lost. Touching the pages raises SIGBUS; an event is raised.
 * kuf_discard undoes it. */
#define KUF_RESOLVE_POISON (1u << 2)
/* kuf_resolve: src is NULL; look up which pages of the range exist already and make those present. For private
 * memory of this process that the caller has filled itself (UFFDIO_COPY). The others keep their state. */
#define KUF_RESOLVE_PRESENT (1u << 3)

/* kuf_discard: the range is filled from the source again (or given to kuf_read again). */
#define KUF_DISCARD_REFILL (1u << 0)
/* kuf_discard: the guest gave the range back (balloon, free page reporting, virtio-mem): it reads as zero. */
#define KUF_DISCARD_ZERO (1u << 1)

/* kuf_populate: stop all populate requests and replays of the handle. gpa and len are ignored. */
#define KUF_POPULATE_STOP (1u << 0)

/* kuf_close, kuf_remove_memory: poison the pages that are unresolved. Stop the vCPUs first. Bytes of a shared file
 * there are dropped in all its mappings; the poison is on the slot's own mapping. */
#define KUF_END_POISON (1u << 0)
/* kuf_close, kuf_remove_memory: fill the pages that are unresolved first. If that fails (-EIO, -ETIMEDOUT) the
 * handle or slot goes on as before, unless KUF_END_POISON is given too. kuf_options.end_timeout_ms limits it. */
#define KUF_END_POPULATE (1u << 1)
/* kuf_close: do not wait for running fill callbacks. Their results are dropped. kuf_options.release is called when
 * the last one has returned; opaque must stay valid until then. */
#define KUF_END_NOWAIT (1u << 2)
/* kuf_close: leave unresolved pages unfilled and registered, for another handler of the same userfaultfd: pending
 * faults are delivered to it again. Only if every slot has a kuf_memory.uffd; not with KUF_END_POISON or
 * KUF_END_POPULATE. */
#define KUF_END_HANDOVER (1u << 3)

/* Every page is present or removed: the slot can be removed with kuf_remove_memory; no overhead remains. */
#define KUF_PROGRESS_COMPLETE (1u << 0)
#define KUF_PROGRESS_GONE (1u << 1) /* The process behind the slot is gone (KUF_EVENT_GONE). */

/* Pages gpa..gpa+len are poisoned; error says why. One event a call for KUF_END_POISON, with error -ECANCELED: gpa
 * and len are the slot's, or 0 and 0 from kuf_close. */
#define KUF_EVENT_POISONED 1
/* As KUF_EVENT_POISONED, where the kernel cannot poison (before Linux 6.6) or the run is too long. In this process
 * the pages are PROT_NONE (touching raises SIGSEGV); in another process a thread that touches them stays blocked. */
#define KUF_EVENT_INACCESSIBLE 2
/* Every page of the slot gpa..gpa+len is present or removed: remove it. Not raised while pages are poisoned. */
#define KUF_EVENT_COMPLETE 3
/* A kuf_populate request over gpa..gpa+len (0 and 0 for KUF_ALL) has ended, not by kuf_close. error: 0, -errno of the
 * fill that stopped it, -EAGAIN (KUF_FILL_LATER left pages absent) or -ECANCELED (KUF_POPULATE_STOP). */
#define KUF_EVENT_POPULATED 4
/* The process behind the slot gpa..gpa+len is gone (error: -ESRCH). Noticed within a second. */
#define KUF_EVENT_GONE 5
/* The handle's service has failed. Unresolved pages stay inaccessible, calls fail with -EIO, kuf_close poisons. */
#define KUF_EVENT_FATAL 6
/* The process forked and the child is served (KUF_OPEN_FOLLOW_FORK); with an error it is not. -EMFILE: there was no
 * descriptor for it, and the child has no guest memory. */
#define KUF_EVENT_FORKED 7
/* A kuf_replay has ended; error as in KUF_EVENT_POPULATED. gpa and len are 0. Not raised when kuf_close ends it. */
#define KUF_EVENT_REPLAYED 8
/* A userfaultfd cannot be read; error says why (-EMFILE: a fork has a descriptor to deliver that finds no room).
 * The library retries every millisecond and loses nothing; until then no page under this userfaultfd is installed. */
#define KUF_EVENT_UNREADABLE 9

#define KUF_SETTING_IN_PLACE (1u << 0) /* kuf_settings_info.flags: pages of the slot are filled in place. */
#define KUF_SETTING_HUGE (1u << 1) /* Huge pages are used where possible (KUF_MEMORY_HUGE). */
#define KUF_SETTING_ADOPTED (1u << 2) /* The slot uses a userfaultfd of the caller's. */
#define KUF_SETTING_REMOTE (1u << 3) /* The slot is memory of another process. */

#define KUF_LOG_ERROR 1 /* kuf_options.log_level: a record is passed on when its level is at most this. Errors only. */
#define KUF_LOG_WARN 2 /* Things that the caller may want to act on. */
#define KUF_LOG_INFO 3 /* Informational: one record for each open, slot or request. */
#define KUF_LOG_DEBUG 4 /* One record for each kernel event other than a page fault. */

#define KUF_SPIN_MAX 10000 /* Largest kuf_options.spin_us. */

#define KUF_USERFAULTFDS_MAX 64 /* Largest kuf_options.userfaultfds. */

/* Version of the file that kuf_record_stop writes (docs/record-format.md), and the newest that kuf_replay reads. */
#define KUF_RECORD_VERSION 1

/* Buckets of a latency histogram: bucket i counts values in [2^i, 2^(i+1)) ns, bucket 0 also 0, the last one all
 * longer ones. */
#define KUF_HISTOGRAM_BUCKETS 40

#define KUF_FEATURE_POISON (1u << 0) /* kuf_probe_info.features: pages can be poisoned (UFFDIO_POISON, Linux 6.6). */
#define KUF_FEATURE_MINOR (1u << 1) /* Shared memory can be filled in place (minor faults, Linux 5.14). */
#define KUF_FEATURE_THREAD_ID (1u << 2) /* The kernel names the faulting thread: kuf_block_times works. */
/* userfaultfd serves KVM guests for this process (kernel-mode faults are allowed). */
#define KUF_FEATURE_KERNEL_FAULTS (1u << 3)
/* userfaultfd works for this process at least for user-mode faults (KUF_OPEN_USER_MODE_ONLY). */
#define KUF_FEATURE_USER_FAULTS (1u << 4)
#define KUF_FEATURE_HUGE (1u << 5) /* KUF_MEMORY_HUGE works: the kernel has UFFDIO_MOVE and gives huge pages. */

/*
 * One VM's fault service, made by kuf_open and ended by kuf_close. It belongs to the process that opened it. A
 * handle that was closed is recognised for the life of the process.
 *
 * Errors of every call, which the calls below do not list again:
 * -EINVAL: a handle or struct is NULL, a struct's size is below that of its first version, a flag is unknown, or an
 *   argument is outside the range that its text gives.
 * -E2BIG: a struct has bytes other than zero that this version does not know.
 * -EBADF: the handle is closed, or kuf_close has begun. -ECANCELED: kuf_close began during the call.
 * -ECHILD: the handle was opened in the parent, before a fork. -EDEADLK: called from a callback that the call could
 *   wait for.
 * -EIO: the service of the handle has failed (KUF_EVENT_FATAL). -ENOMEM: the library has no memory for the call.
 * -ENOTRECOVERABLE: an error inside the library was caught; kuf_error() names it.
 */
struct kuf;

/* What works on this host. Filled by kuf_probe. */
struct kuf_probe_info {
    uint32_t size; /* sizeof(struct kuf_probe_info), set by the caller. Fields unknown to the library are zeroed. */
    uint32_t recommended; /* The KUF_MECHANISM_* that KUF_MECHANISM_AUTO chooses; 0 when none works. */
    uint32_t mechanisms; /* Bit (1 << KUF_MECHANISM_*) for each mechanism that kuf_open would accept now. */
    uint32_t page_size; /* Page size of ordinary memory, in bytes. */
    uint32_t features; /* KUF_FEATURE_*. */
    uint32_t reserved; /* Zero. */
    uint64_t uffd_features; /* UFFD_FEATURE_* bits that the kernel offers; 0 when userfaultfd cannot be opened. */
    /* For each mechanism: 0 when it works, else the -errno that kuf_open would return. */
    int32_t error[KUF_MECHANISM_COUNT];
    /* For each mechanism, in words: how it works here, or why it does not and what to do about it. */
    char why[KUF_MECHANISM_COUNT][512];
};

/* A run of pages to fill, as the fill callback gets it. Valid until the callback returns. */
struct kuf_fill {
    uint32_t size; /* Size of the struct that the library passed; do not access fields beyond it. */
    uint32_t flags; /* KUF_RUN_*. */
    uint64_t gpa; /* First guest physical address of the run; a multiple of page_size. */
    uint64_t len; /* Bytes wanted; a multiple of page_size. The run holds no page that is present. */
    void *buf; /* Where to write len bytes; page-aligned. Undefined at the start. */
    /* len at the start. The callback may lower it to a smaller multiple of page_size above 0, and return
     * KUF_FILL_DONE or KUF_FILL_ZERO for that much; the rest is asked for again. */
    uint64_t filled;
    uint64_t page_size; /* Page size of the slot in bytes. */
    void *memory_opaque; /* kuf_memory.opaque of the slot. */
    uint64_t memory_offset; /* gpa minus the slot's gpa: the offset in an image of this slot. */
    /* NULL at the start. Instead of writing to buf, the callback may set it to `filled` readable bytes, of any
     * alignment, that stay unchanged until the slot or the handle has ended, and return KUF_FILL_DONE. They are
     * copied from there to the guest. */
    const void *src;
    /* ID of the first faulting thread if the kernel reports it (KUF_FEATURE_THREAD_ID), in the pid namespace of the
     * process that opened the userfaultfd; else 0. */
    uint32_t thread;
    uint32_t reserved; /* Zero. */
    struct kuf *kuf; /* The handle, as from kuf_open: for kuf_resolve and other calls. */
};

/* Fill callback. Returns a KUF_FILL_*, or -errno if the source has failed: the run is then asked for again page by
 * page where a thread is blocked, and a page that fails alone is poisoned. Any other value, or a wrong `filled`,
 * fails the fill (-EPROTO).
 *
 * Called without locks, on service threads or inside kuf_ensure, kuf_vcpu_fault and the calls with
 * KUF_END_POPULATE, by several threads at once for different runs. It may block: other pages are served while a
 * fill thread is free. It must not touch unresolved guest memory. Calls that could wait for it return -EDEADLK:
 * kuf_close, kuf_add_memory, kuf_remove_memory, kuf_poll, kuf_read, kuf_ensure, kuf_vcpu_fault. A C++ exception or
 * longjmp must not leave it. */
typedef int (*kuf_fill_fn)(void *opaque, struct kuf_fill *fill);

/* What the event callback gets. Valid until the callback returns. */
struct kuf_event {
    uint32_t size; /* Size of the struct that the library passed; do not access fields beyond it. */
    uint32_t kind; /* KUF_EVENT_*. */
    uint64_t gpa; /* Range concerned; 0 and 0 when the event concerns the handle. */
    uint64_t len; /* Length of the range in bytes. */
    int32_t error; /* 0, or the -errno behind the event. */
    uint32_t reserved; /* Zero. */
    const char *text; /* The same in words. Never NULL. */
    void *memory_opaque; /* kuf_memory.opaque of the slot; NULL when the event concerns the handle. */
    struct kuf *kuf; /* The handle, as from kuf_open. Calls with it fail with -EBADF while kuf_open has not returned. */
};

/* Event callback. Runs without locks on the thread that detected the event, after the state has changed, and should
 * return soon: that thread serves faults. It may call what a fill callback may call, and kuf_remove_memory. */
typedef void (*kuf_event_fn)(void *opaque, const struct kuf_event *event);

/* Log callback: level is a KUF_LOG_*, text is one line without newline, valid during the call. Runs on any thread.
 * Must not call the library. */
typedef void (*kuf_log_fn)(void *opaque, uint32_t level, const char *text);

/* Called once no callback of the handle will run any more and opaque is no longer used: before kuf_close returns,
 * or later on the last thread with KUF_END_NOWAIT. Not called if kuf_open fails. Must not call the library. */
typedef void (*kuf_release_fn)(void *opaque);

/*
 * How to open a service. Zero is the default in every field.
 *
 *     field           unit          default   limits            ignored or refused
 *     fill_threads    threads       2         1 to 256          ignored without fill and KUF_OPEN_SOURCES
 *     log_level       KUF_LOG_*     WARN      KUF_LOG_DEBUG     ignored without log
 *     demand_run      bytes         2 MiB     at most 64 MiB    rounded to pages, at least one
 *     populate_run    bytes         256 KiB   at most 64 MiB    rounded to pages, at least one
 *     spin_us         microseconds  0         KUF_SPIN_MAX      no effect with one CPU
 *     userfaultfds    number        1         64                1 with KUF_OPEN_FOLLOW_FORK
 *     end_timeout_ms  milliseconds  30000     0xffffffff: none  KUF_END_POPULATE only
 */
struct kuf_options {
    uint32_t size; /* sizeof(struct kuf_options), set by the caller. */
    uint32_t mechanism; /* KUF_MECHANISM_*. */
    /* KUF_OPEN_*. Exactly one mode: a fill callback, KUF_OPEN_SOURCES, KUF_OPEN_CALLER_DRIVEN or KUF_OPEN_DIRECT. */
    uint32_t flags;
    /* The VM's file descriptor, for the mechanisms of kuf-kvm.h; duplicated. Checked but not used by userfaultfd. */
    int32_t vm_fd;
    /* Number of concurrent fill callbacks. The library adds one thread that watches for faults, one that reads
     * ahead (unless demand_run is one page) and, for kuf_populate, one more. */
    uint32_t fill_threads;
    uint32_t log_level; /* Highest KUF_LOG_* that is passed to log. */
    /* Most bytes that one fault may fill, the faulting page included. One page: each fault fills its page only. */
    uint64_t demand_run;
    /* Longest run, in bytes, that is asked for when no thread is blocked. See also KUF_MEMORY_HUGE. */
    uint64_t populate_run;
    kuf_fill_fn fill; /* Fill callback, or NULL for another mode. */
    kuf_event_fn event; /* Event callback; may be NULL. */
    kuf_log_fn log; /* Log callback; may be NULL. */
    kuf_release_fn release; /* Release callback; may be NULL. */
    void *opaque; /* First argument of the four callbacks. */
    /* How long the thread that watches for faults busy-polls for the next one before it sleeps, while faults come
     * that fast. Saves the wake-up, which can be most of what a fault costs; takes up to one CPU while faults come. */
    uint32_t spin_us;
    /* How many userfaultfds share the memory of this handle, in chunks of at least 16 MiB, each a mapping of its own:
     * mremap(2) of more than one fails with EFAULT. Not with KUF_OPEN_ADOPT_ONLY. */
    uint32_t userfaultfds;
    uint32_t end_timeout_ms; /* Limits KUF_END_POPULATE: -ETIMEDOUT, or poison with KUF_END_POISON too. */
    uint32_t reserved; /* Zero. */
    /* CPUs that the service threads may use: a cpu_set_t or longer, read during the call. NULL: those of the
     * calling thread. Not with KUF_OPEN_DIRECT. */
    const void *cpus;
    uint64_t cpus_size; /* Bytes at cpus, at most 8192; 0 when cpus is NULL. */
};

/* Where the pages of a slot come from without a callback: kuf_memory.source. */
struct kuf_source {
    uint32_t size; /* sizeof(struct kuf_source), set by the caller. */
    uint32_t kind; /* KUF_SOURCE_FILE, KUF_SOURCE_MEMORY or KUF_SOURCE_ZERO. */
    uint32_t flags; /* KUF_SOURCE_DIRECT_IO or 0. */
    int32_t fd; /* KUF_SOURCE_FILE: open for reading; duplicated. */
    uint64_t offset; /* Where the slot's bytes (from slot_offset on) begin in the file or memory; of any alignment. */
    /* KUF_SOURCE_MEMORY: the first byte, readable and unchanged until the slot or handle has ended. Else NULL. */
    const void *addr;
    uint64_t len; /* KUF_SOURCE_MEMORY: bytes from addr on, at least all that the slot may need of them. Else 0. */
    uint64_t slot_offset; /* The source may have the bytes of the slot from here on; a multiple of 4096. */
    uint64_t slot_len; /* How many of them, a multiple of 4096; 0: up to the slot's end. */
    /* One bit for each page from slot_offset on, lowest bit first: whether this source has it. Holes of a file are zero
     * then. NULL: it has all pages; a file with a base those that are not holes. Copied. */
    const void *bitmap;
    uint64_t bitmap_size; /* Bytes at bitmap, at least one bit for each page; 0 when bitmap is NULL. */
    uint64_t bitmap_page_size; /* Bytes for one bit: a power of two, at least 4096; 0 when bitmap is NULL. */
    /* The layer below, with the pages that this source does not have; NULL: they are zero. Copied. */
    const struct kuf_source *base;
};

/* A memory slot: a guest physical range and the mapping behind it. */
struct kuf_memory {
    uint32_t size; /* sizeof(struct kuf_memory), set by the caller. */
    uint32_t flags; /* KUF_MEMORY_*. */
    uint64_t gpa; /* First guest physical address; a multiple of the page size. */
    uint64_t len; /* Bytes; a multiple of the page size, not 0. */
    /* Address that backs gpa, in this process or the remote one; a multiple of the page size. All of the range must
     * be mapped. */
    uint64_t hva;
    /* Page size of the mapping in bytes. 0: detect; for KUF_MEMORY_REMOTE without fd, 0 means the base page size. */
    uint64_t page_size;
    /* The shared file (memfd, tmpfs, hugetlbfs) that is mapped MAP_SHARED at hva; duplicated. Pages are then filled
     * in place where the kernel has minor faults. Do not use MADV_COLLAPSE there before the slot is complete. */
    int32_t fd;
    /* A userfaultfd that the caller has opened (UFFDIO_API done); duplicated. The library sets O_NONBLOCK on it and
     * must be its only reader. One userfaultfd may serve many slots. */
    int32_t uffd;
    uint64_t fd_offset; /* Offset in fd that is mapped at hva; a multiple of the page size. */
    void *opaque; /* Passed in kuf_fill, kuf_fault and kuf_event. */
    /* Source of the slot's pages, instead of the fill callback. Copied. Needs a fill callback (for other slots) or
     * KUF_OPEN_SOURCES. */
    const struct kuf_source *source;
    const void *kvm; /* A struct kuf_kvm_memory (kuf-kvm.h), or NULL. Copied. */
};

/* A page fault, from kuf_read and kuf_pending. 64 bytes on 64-bit machines. */
struct kuf_fault {
    uint64_t gpa; /* Guest physical address; a multiple of the slot's page size. */
    uint64_t len; /* Bytes to resolve: one page from kuf_read, a run of pages in the same state from kuf_pending. */
    uint32_t flags; /* KUF_FAULT_*. */
    uint32_t thread; /* ID of the first faulting thread, as in kuf_fill. */
    uint64_t age_ns; /* Nanoseconds since the fault was read from the kernel, or since the page was asked for. */
    void *memory_opaque; /* kuf_memory.opaque of the slot. */
    uint64_t memory_offset; /* gpa minus the slot's gpa. */
    /* Where to write the bytes before kuf_resolve(..., KUF_RESOLVE_IN_PLACE); valid until the page is resolved.
     * NULL if the slot is not filled in place, and from kuf_pending. */
    void *place;
    uint64_t reserved; /* Zero. */
};

/* What to fill ahead of demand. */
struct kuf_populate_request {
    uint32_t size; /* sizeof(struct kuf_populate_request), set by the caller. */
    uint32_t flags; /* KUF_POPULATE_STOP or 0. */
    uint64_t gpa; /* First guest physical address, or KUF_ALL for every slot that exists when the request starts. */
    uint64_t len; /* Bytes. May span slots and the gaps between them. */
    uint64_t rate; /* Most bytes per second; 0: no limit. */
};

/* State of a slot or of all slots, in bytes: present + removed + absent + filling + deferred + poisoned = total. */
struct kuf_progress_info {
    uint32_t size; /* sizeof(struct kuf_progress_info), set by the caller. Fields unknown to the library are zeroed. */
    uint32_t flags; /* KUF_PROGRESS_*. */
    uint64_t gpa; /* The slot's gpa; 0 with KUF_ALL. */
    uint64_t total; /* All of the slot, or of all slots. */
    uint64_t present; /* Holds its bytes. */
    uint64_t removed; /* Given back by the guest or unmapped: reads as zero. */
    uint64_t absent; /* Not asked for. */
    uint64_t filling; /* Being filled now. */
    uint64_t deferred; /* To be resolved by the caller: deferred, or taken with kuf_read. */
    uint64_t poisoned; /* Could not be filled. */
};

/* Settings in effect, with defaults filled in. Filled by kuf_settings. */
struct kuf_settings_info {
    uint32_t size; /* sizeof(struct kuf_settings_info), set by the caller. Fields unknown to the library are zeroed. */
    uint32_t mechanism; /* KUF_MECHANISM_* of the handle. */
    uint32_t open_flags; /* KUF_OPEN_*. No mode flag stands for the mode with a fill callback. */
    uint32_t flags; /* KUF_SETTING_*; 0 with KUF_ALL. */
    uint32_t fill_threads; /* Number of concurrent fill callbacks; 0 when caller-driven. */
    /* How many userfaultfds share the slot's memory, or the library has opened for the handle. */
    uint32_t userfaultfds;
    uint32_t spin_us; /* Microseconds; 0 also where busy-polling has no effect. */
    uint32_t log_level; /* Highest KUF_LOG_* that is passed to log; 0 without log. */
    uint64_t demand_run; /* In bytes, rounded to pages of the slot; 0 when caller-driven. */
    uint64_t populate_run; /* As demand_run. */
    uint64_t page_size; /* Page size of the slot, or of ordinary memory with KUF_ALL, in bytes. */
};

/* Latency histogram in nanoseconds, one bucket per power of two. */
struct kuf_histogram {
    uint64_t count; /* Number of values. */
    uint64_t sum_ns; /* Their sum. */
    uint64_t max_ns; /* The largest. */
    uint64_t bucket[KUF_HISTOGRAM_BUCKETS]; /* See KUF_HISTOGRAM_BUCKETS. */
};

/* Counters since kuf_open. Each is read on its own, so sums may be off by what is in progress. */
struct kuf_stats_info {
    uint32_t size; /* sizeof(struct kuf_stats_info), set by the caller. Fields unknown to the library are zeroed. */
    uint32_t reserved; /* Zero. */
    uint64_t faults; /* Page faults read from the kernel. */
    uint64_t faults_minor; /* Of these: the page was in the page cache of a shared file already. */
    uint64_t faults_write; /* Of these: write accesses. */
    uint64_t faults_joined; /* Of these: another fault was pending for the page. */
    uint64_t faults_late; /* Of these: the page had become present. */
    /* Of these: the address was in no slot (unmapped, moved or removed meanwhile); left to the kernel. */
    uint64_t faults_unknown;
    uint64_t vcpu_faults; /* Calls of kuf_vcpu_fault. */
    uint64_t fills; /* Fill callbacks made and sources asked. */
    uint64_t fills_failed; /* Of these: failed. */
    uint64_t fills_deferred; /* Of these: returned KUF_FILL_DEFERRED. */
    uint64_t bytes_copied; /* Bytes made present from a buffer. */
    uint64_t bytes_zeroed; /* Bytes made present as zeroes. */
    uint64_t bytes_in_place; /* Bytes made present in place, without a copy. */
    uint64_t bytes_populated; /* Of all bytes made present: asked for by kuf_populate. */
    uint64_t bytes_poisoned; /* Bytes poisoned or made inaccessible. */
    uint64_t bytes_discarded; /* Bytes dropped by kuf_discard. */
    uint64_t bytes_removed; /* Bytes reported as removed or unmapped by the kernel, or by KUF_DISCARD_ZERO. */
    uint64_t events_remove; /* REMOVE events of userfaultfd. */
    uint64_t events_unmap; /* UNMAP events. */
    uint64_t events_remap; /* REMAP events. */
    uint64_t events_fork; /* FORK events. */
    uint64_t install_again; /* Installs put off because an event was unread (EAGAIN). */
    uint64_t install_exists; /* Pages found present at install (EEXIST). */
    uint64_t install_no_memory; /* Installs retried for want of memory (ENOMEM, ENOSPC). */
    uint64_t faults_lost; /* Faults that KVM lost (kuf-kvm.h, KUF_KVM_EVENT_SWEEP). */
    uint64_t faults_unsignalled; /* Faults that KVM queued without a signal (kuf-kvm.h, KUF_KVM_EVENT_UNSIGNALLED). */
    /* From reading a fault until its fill began; caller-driven: until kuf_read returned it. */
    struct kuf_histogram queueing;
    /* Inside the fill callback or source; deferred and caller-driven: until kuf_resolve. */
    struct kuf_histogram filling;
    struct kuf_histogram installing; /* Making a run present. */
    struct kuf_histogram blocked; /* From reading a fault until its page was present. */
    /* Of all bytes made present: filled ahead of a thread that was not blocked on them (kuf_options.demand_run). */
    uint64_t bytes_ahead;
    uint64_t blocked_all_ns; /* Total time during which all threads of kuf_watch_threads were blocked at once. */
};

/* How long one thread was blocked on page faults. */
struct kuf_block_time {
    uint32_t thread; /* Thread ID, in the pid namespace of the process that opened the userfaultfd. */
    uint32_t reserved; /* Zero. */
    uint64_t faults; /* Faults that ended. A fault that signals interrupt and that is raised again is one. */
    uint64_t total_ns; /* Sum of the times from reading the fault until the page was present. */
    uint64_t max_ns; /* The longest of them. */
};

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/* Returns the version of the loaded library: KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH. */
uint32_t kuf_version(void);

/*
 * Returns the calling thread's last failure in words: the cause, and what to do about it.
 *
 * Never NULL; "" before the first failure. Successful calls do not change it. The pointer is valid for the life of
 * the thread. The errno of a failure is stable between versions; the words are not.
 */
const char *kuf_error(void);

/*
 * Finds out which mechanisms and features work here and, for each mechanism that does not, why. Changes nothing.
 *
 * vm_fd: a KVM VM, for the mechanisms of kuf-kvm.h; -1 or 0: none. out: out->size set by the caller.
 *
 * Returns 0, also when nothing works (out->mechanisms is 0 then).
 * -EINVAL: vm_fd is no KVM VM. -EBADF: vm_fd is not an open descriptor.
 * Kernel: userfaultfd(2), ioctl_userfaultfd(2).
 */
int kuf_probe(int vm_fd, struct kuf_probe_info *out);

/*
 * Opens a fault service and starts its threads. Memory is added afterwards.
 *
 * Returns 0 and sets *out; on failure *out is NULL.
 * -EINVAL: no mode or several; fields that contradict each other; cpus names no CPU that the process may use.
 * -EBADF: vm_fd is not an open descriptor. -ENOTSUP: the mechanism asked for does not work here.
 * -EPERM: userfaultfd is refused: kuf_error() names the ways to grant it. Also KUF_OPEN_FOLLOW_FORK without
 *   CAP_SYS_PTRACE.
 * -ENOSYS: the kernel has no userfaultfd. -EEXIST, -EIO: of the mechanisms of kuf-kvm.h.
 * -EMFILE, -ENFILE, -EAGAIN: no descriptor or thread to be had.
 * Kernel: userfaultfd(2), /dev/userfaultfd.
 */
int kuf_open(const struct kuf_options *options,
             struct kuf **out);

/*
 * Ends a service and sets *kuf to NULL. Unresolved pages are never released onto zeroes: the call is refused, or
 * does what flags say. On an error path kuf_close(&kuf, KUF_END_POISON) always ends the handle, a NULL one too.
 *
 * flags: KUF_END_*.
 *
 * Poisons or fills first, then waits for running callbacks, unless KUF_END_NOWAIT is given. Calls that are blocked
 * in kuf_poll, kuf_ensure or kuf_vcpu_fault return -ECANCELED. A handle whose service has failed is always closed,
 * and poisons.
 *
 * Returns 0. Not from a callback.
 * -EINVAL: KUF_END_HANDOVER with KUF_END_POISON or KUF_END_POPULATE, or with a slot that uses the library's
 *   userfaultfd. -ECHILD: a forked child.
 * -EBUSY: unresolved pages and no flag for them, or pages discarded during KUF_END_POPULATE; the handle goes on.
 * -EIO: KUF_END_POPULATE could not fill everything (a fill failed, or KUF_FILL_LATER). -ETIMEDOUT: nor in time
 *   (kuf_options.end_timeout_ms). The handle goes on.
 * -ENOTSUP: KUF_END_POPULATE on a caller-driven handle.
 */
int kuf_close(struct kuf **kuf, uint32_t flags);

/*
 * Adds a memory slot. From its return on, no absent page of it can be touched without being served.
 *
 * Memory that holds pages already is refused (-EBUSY) without KUF_MEMORY_POPULATED. Descriptors stay the caller's.
 *
 * Returns 0. Not from a callback.
 * -EINVAL: gpa, len, hva or fd_offset is 0 where it may not be, no multiple of the page size, or overflows;
 *   page_size is not the mapping's; the mapping is of a kind that userfaultfd cannot serve (an ordinary file, a
 *   private file mapping); a source is shorter than the slot, or missing or not allowed in this mode; fields that
 *   contradict each other.
 * -EEXIST: gpa..gpa+len overlaps a slot, or hva..hva+len one with the same userfaultfd.
 * -EFAULT: part of hva..hva+len is not mapped. -EBADF: a descriptor is not open, or not for reading.
 * -EBADFD: fd is not the shared file mapped at hva, uffd is no userfaultfd, source->fd is neither file nor block
 *   device.
 * -EBUSY: the memory holds pages (the text says how many and what to do); another userfaultfd has the range; it is
 *   locked and KUF_MEMORY_FILL_ALL cannot drop it (before Linux 5.18).
 * -ENOTSUP: the kernel cannot serve this memory, or cannot tell what it holds; no direct I/O on that file system.
 * -EAGAIN: for two seconds there was always an munmap, mremap, madvise or fork in progress whose event may concern
 *   the range.
 * -ESRCH: the remote process is gone. -EMFILE: no descriptor to be had. -ECANCELED: pages of the range may be
 *   poisoned.
 * Kernel: UFFDIO_REGISTER (MISSING; MISSING|MINOR for a shared file).
 */
int kuf_add_memory(struct kuf *kuf, const struct kuf_memory *memory);

/*
 * Removes the slot that starts at gpa from the service. Its memory stays mapped and is the caller's alone; no
 * overhead remains.
 *
 * flags: 0, KUF_END_POISON, KUF_END_POPULATE or both.
 *
 * Waits up to 100 ms for running fills (not in an event callback). Stop the vCPUs first, or new faults may keep it
 * busy. After 0 no callback holds memory_opaque and no event of the slot comes.
 *
 * Returns 0. Also from an event callback, but not from a fill callback.
 * -ENOENT: no slot starts at gpa (of two threads that remove the same slot, one gets this).
 * -EBUSY: unresolved pages and no flag for them; or a callback of this slot is still running: try again.
 * -EIO: KUF_END_POPULATE could not fill everything, as in kuf_close, and the slot goes on; or a page could be
 *   neither filled nor poisoned and stays inaccessible (KUF_EVENT_INACCESSIBLE). -ETIMEDOUT: not filled in time
 *   (kuf_options.end_timeout_ms); the slot goes on.
 * -ENOTSUP: KUF_END_POPULATE on a caller-driven handle.
 * Kernel: UFFDIO_UNREGISTER.
 */
int kuf_remove_memory(struct kuf *kuf, uint64_t gpa, uint32_t flags);

/*
 * Returns a descriptor that polls readable when kuf_read has something to return, for poll, epoll or a GSource;
 * level-triggered.
 *
 * Do not read, write or close it; it lives as long as the handle. With KUF_OPEN_DIRECT it may poll readable without
 * a fault.
 *
 * -ENOTSUP: the handle is not caller-driven.
 */
int kuf_fd(struct kuf *kuf);

/*
 * Blocks until kuf_read has something to return. Unlike poll(2) on kuf_fd it returns when kuf_close begins.
 *
 * timeout_ms: milliseconds at most; 0 looks only; -1 has no limit. Signals do not end the wait.
 *
 * Returns 1: there are faults, or 0: timed out. Not from a callback.
 * -ENOTSUP: the handle is not caller-driven.
 */
int kuf_poll(struct kuf *kuf, int timeout_ms);

/*
 * Takes up to n faults, oldest first, without blocking. The caller must answer each with kuf_resolve.
 *
 * faults: room for n entries. n: 1 or more.
 *
 * A page is given once, however many threads are blocked on it, and never when it is present. kuf_pending lists
 * what is owed.
 *
 * Returns the number taken. Several threads may read at once; they get different faults. Not from a callback.
 * -EAGAIN: none now. -ENOTSUP: the handle is not caller-driven.
 */
ssize_t kuf_read(struct kuf *kuf, struct kuf_fault *faults, size_t n);

/*
 * Makes gpa..gpa+len present, with bytes from src or as flags say, and wakes the threads that are blocked on it.
 *
 * gpa, len: multiples of the page size, len not 0, within one slot.
 * src: len readable bytes of any alignment, not unresolved guest memory; NULL with KUF_RESOLVE_ZERO, _IN_PLACE,
 * _POISON and _PRESENT. Not kept.
 * flags: 0 or one KUF_RESOLVE_*.
 *
 * Works on every handle, for pages that were asked for or not, in any order and pieces, from any thread, also from
 * callbacks. Pages that are present keep their bytes; pages that the guest gave back stay so. Never waits for
 * caller code: bytes for a page whose callback is running are kept until it returns without having filled it.
 *
 * Returns the bytes that this call made present or poisoned. Bytes that were present, given back, kept for later,
 * or are being made present by another thread do not count.
 * -EINVAL: src or flags as above; KUF_RESOLVE_IN_PLACE on a slot that is not filled in place, _PRESENT on one that
 *   is.
 * -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ENOTSUP: KUF_RESOLVE_PRESENT on memory of
 *   another process.
 * -EFAULT: src is not readable; bytes up to there may be present, and the call can be repeated.
 * -EDEADLK: src is guest memory that is absent. -ENOMEM: also when the kernel has no memory for the pages.
 * -ENOSPC: the file system of a shared file is full. -ESRCH: the process behind the slot is gone.
 * Kernel: UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON, UFFDIO_WAKE.
 */
ssize_t kuf_resolve(struct kuf *kuf, uint64_t gpa, const void *src, uint64_t len, uint32_t flags);

/*
 * Serves a KVM_EXIT_MEMORY_FAULT (KVM_RUN returned -1 with EFAULT) on the calling vCPU thread: fills the page here,
 * or waits for the thread that fills it. For the mechanisms of kuf-kvm.h; with userfaultfd such exits do not occur,
 * and the call is kuf_ensure.
 *
 * gpa, len, exit_flags: gpa, size and flags of kvm_run->memory_fault.
 *
 * For a page that is present it returns 0 at once: handle exits that have another cause first.
 *
 * Returns 0: run the vCPU again. Not from a callback; calls the fill callback. Caller-driven: not on the thread
 * that reads.
 * -ENOENT: gpa is in no slot, or the exit is no userfault: handle it as without the library. -ERANGE: the range
 *   leaves its slot.
 * -EHWPOISON: the page could not be filled: inject a machine check or stop the guest. -ESRCH: the process is gone.
 * Kernel: KVM_EXIT_MEMORY_FAULT with KVM_MEMORY_EXIT_FLAG_USERFAULT.
 */
int kuf_vcpu_fault(struct kuf *kuf, uint64_t gpa, uint64_t len, uint64_t exit_flags);

/*
 * Returns when gpa..gpa+len is present, filling it at demand priority. For threads that touch guest memory where
 * the mechanism does not catch them, or that must not block on a fault later (device models, vhost set-up, gdb
 * stubs).
 *
 * gpa, len: of any alignment, within one slot; len not 0. timeout_ms: milliseconds at most, -1: no limit; 0 still
 * fills the pages that no thread has begun.
 *
 * Returns 0: present or given back by the guest. Not from a callback; calls the fill callback on this thread, so
 * hold no lock that it takes. Caller-driven: queued for kuf_read, so not on the thread that reads.
 * -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ETIMEDOUT: not in time.
 * -EHWPOISON: part of the range could not be filled. -ESRCH: the process behind the slot is gone.
 */
int kuf_ensure(struct kuf *kuf, uint64_t gpa, uint64_t len, int timeout_ms);

/*
 * Fills a range in the background, behind all demand, in address order. KUF_EVENT_POPULATED ends each request;
 * requests queue up.
 *
 * request: request->size set by the caller.
 *
 * A fill that fails ends the request and poisons nothing, for no thread has touched the page. Under steady demand
 * populate keeps about a sixteenth of its pace.
 *
 * Returns 0: queued, or stopped. Also from callbacks.
 * -EINVAL: gpa or len is no multiple of the base page size, len is 0, overflow. -ENOENT: no slot in the range.
 * -ENOTSUP: the handle is caller-driven.
 */
int kuf_populate(struct kuf *kuf, const struct kuf_populate_request *request);

/*
 * Starts recording which pages are demanded, in which order: the working set, for kuf_replay at the next start.
 *
 * flags: 0.
 *
 * Start before the guest runs, and let nothing fill ahead of it meanwhile (kuf_populate, kuf_replay, kuf_resolve of
 * pages that were not asked for): a page that is present at its first touch leaves no trace.
 *
 * Returns 0. Also from callbacks.
 * -EALREADY: the handle is recording, or has a recording that could not be written.
 */
int kuf_record_start(struct kuf *kuf, uint32_t flags);

/*
 * Ends the recording and writes it to fd: guest physical addresses and lengths (docs/record-format.md), about 3
 * bytes a run.
 *
 * fd: a file, pipe or stream socket, from where it stands; neither synced nor closed. -1: drop the recording.
 *
 * Returns 0. Also from callbacks.
 * -EINVAL: the handle is not recording. -EBADF: fd is not open for writing; the recording goes on.
 * -ENOSPC, -EFBIG, -EDQUOT, -EIO, -EPIPE: as write(2). The recording is over and kept: call again with another fd
 *   or -1.
 */
int kuf_record_stop(struct kuf *kuf, int fd);

/*
 * Fills the pages of a recording in the background, in about the order of demand, behind demand and ahead of every
 * populate.
 *
 * fd: where kuf_record_stop has written, read from where it stands up to the end of the recording. flags: 0.
 *
 * Memory may be laid out differently. Pages that are in no slot, present or given back are skipped. The file need
 * not be trusted: it says which pages are filled first and takes no more memory than it is long. KUF_EVENT_REPLAYED
 * ends it; a fill that fails ends it early. KUF_POPULATE_STOP ends all replays.
 *
 * Returns 0: queued. Also from callbacks.
 * -EINVAL: fd holds no recording. -EBADF: fd is not open for reading. -EBADMSG: the recording is damaged or ends
 *   early.
 * -EPROTONOSUPPORT: it is of a newer version. -EFBIG: it has more than 67108864 runs. -ENOENT: no part of it is in
 *   a slot.
 * -ENOTSUP: the handle is caller-driven. -EISDIR and others: as read(2).
 */
int kuf_replay(struct kuf *kuf, int fd, uint32_t flags);

/*
 * Drops the pages of gpa..gpa+len whatever they hold. The next touch refills them from the source or reads zeroes.
 *
 * gpa, len: multiples of the page size, len not 0, within one slot. flags: KUF_DISCARD_REFILL or KUF_DISCARD_ZERO.
 *
 * A fill in progress is not used; a kuf_resolve of such a page waits until it is dropped. Poisoned pages become
 * ordinary ones again (not in another process). A shared file loses the bytes in all its mappings. The guest must
 * not use the range meanwhile.
 *
 * Returns 0. Also from callbacks.
 * -ENOENT: gpa is in no slot, or the slot was removed meanwhile. -ERANGE: the range leaves its slot.
 * -ENOTSUP: memory of another process without kuf_memory.fd. -ESRCH: the process behind the slot is gone.
 * -EBUSY: the memory is locked and cannot be dropped (before Linux 5.18; shared memory without kuf_memory.fd).
 * Others, such as -ENOMEM and -EPERM: of the kernel; part of the range may have been dropped, call again.
 * Kernel: MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_REMOVE, FALLOC_FL_PUNCH_HOLE.
 */
int kuf_discard(struct kuf *kuf, uint64_t gpa, uint64_t len, uint32_t flags);

/*
 * Lists the pages that the caller owes: deferred runs, runs inside their callback, faults taken with kuf_read or
 * waiting to be. For asking a source again after its connection was lost.
 *
 * faults: room for n entries, filled in order of gpa; may be NULL when n is 0.
 *
 * Returns the number of runs pending, which may be more than n. Also from callbacks.
 */
ssize_t kuf_pending(struct kuf *kuf, struct kuf_fault *faults, size_t n);

/*
 * Reports the fill progress of the slot that contains gpa, or of all slots with KUF_ALL.
 *
 * Returns 0. Also from callbacks.
 * -ENOENT: gpa is in no slot.
 */
int kuf_progress(struct kuf *kuf, uint64_t gpa, struct kuf_progress_info *out);

/*
 * Reports the settings in effect of the handle, and of the slot that contains gpa unless it is KUF_ALL.
 *
 * Returns 0. Also from callbacks.
 * -ENOENT: gpa is in no slot.
 */
int kuf_settings(struct kuf *kuf, uint64_t gpa, struct kuf_settings_info *out);

/*
 * Reports counters and latency histograms since kuf_open.
 *
 * Returns 0. Also from callbacks.
 */
int kuf_stats(struct kuf *kuf, struct kuf_stats_info *out);

/*
 * Names the threads for which kuf_stats_info.blocked_all_ns is kept: the vCPUs. Replaces those of the last call.
 *
 * threads: n thread IDs as from gettid(2), copied; may be NULL when n is 0. n: at most 65536.
 *
 * The time counted so far is kept. It needs KUF_FEATURE_THREAD_ID, and does not include waits in kuf_ensure and
 * kuf_vcpu_fault.
 *
 * Returns 0. Also from callbacks.
 */
int kuf_watch_threads(struct kuf *kuf, const uint32_t *threads, size_t n);

/*
 * Reports how long each thread was blocked, longest sum first. Empty without KUF_FEATURE_THREAD_ID.
 *
 * times: room for n entries; may be NULL when n is 0.
 *
 * Returns the number of threads known, which may be more than n. Also from callbacks.
 */
ssize_t kuf_block_times(struct kuf *kuf, struct kuf_block_time *times, size_t n);

/* For #ifdef: this header has the call. */
#define KUF_HAVE_KUF_VERSION 1
#define KUF_HAVE_KUF_ERROR 1
#define KUF_HAVE_KUF_PROBE 1
#define KUF_HAVE_KUF_OPEN 1
#define KUF_HAVE_KUF_CLOSE 1
#define KUF_HAVE_KUF_ADD_MEMORY 1
#define KUF_HAVE_KUF_REMOVE_MEMORY 1
#define KUF_HAVE_KUF_FD 1
#define KUF_HAVE_KUF_POLL 1
#define KUF_HAVE_KUF_READ 1
#define KUF_HAVE_KUF_RESOLVE 1
#define KUF_HAVE_KUF_VCPU_FAULT 1
#define KUF_HAVE_KUF_ENSURE 1
#define KUF_HAVE_KUF_POPULATE 1
#define KUF_HAVE_KUF_RECORD_START 1
#define KUF_HAVE_KUF_RECORD_STOP 1
#define KUF_HAVE_KUF_REPLAY 1
#define KUF_HAVE_KUF_DISCARD 1
#define KUF_HAVE_KUF_PENDING 1
#define KUF_HAVE_KUF_PROGRESS 1
#define KUF_HAVE_KUF_SETTINGS 1
#define KUF_HAVE_KUF_STATS 1
#define KUF_HAVE_KUF_WATCH_THREADS 1
#define KUF_HAVE_KUF_BLOCK_TIMES 1

#ifdef __cplusplus
}  /* extern "C" */
#endif  /* __cplusplus */

#endif  /* KUF_H */
