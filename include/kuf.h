/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf.h - guest page faults served for virtual machine monitors
 *
 * A VMM that restores a snapshot lazily, receives a post-copy migration or keeps guest memory elsewhere has to catch the
 * guest's first touch of each page, get the page, put it in place and let the guest go on. This library does that:
 *
 *     struct kuf_options options = { .size = sizeof(options), .fill = my_fill, .opaque = my_image };
 *     struct kuf *kuf;
 *     if (kuf_open(&options, &kuf) < 0)
 *         errx(1, "%s", kuf_error());
 *
 *     struct kuf_memory ram = { .size = sizeof(ram), .gpa = 0, .len = len, .hva = (uintptr_t)mapping };
 *     kuf_add_memory(kuf, &ram);
 *     ... run the guest: my_fill is called for each page it touches first ...
 *     kuf_close(&kuf, KUF_CLOSE_POPULATE);
 *
 * Words: a memory slot is a guest physical range (gpa) with the host mapping (hva) behind it. Its granule is the page
 * size of that mapping, the unit of everything here. A page is absent, being filled, present, or removed (the guest gave
 * it back: it reads as zero). To resolve a page is to make it present and wake whoever waits for it. A demand fault has
 * somebody waiting; populate fills with nobody waiting. A poisoned page raises SIGBUS when touched.
 *
 * Rules that always hold:
 *   - The guest never sees bytes that are not its own: a page that could not be filled stays closed or is poisoned.
 *   - Calls return 0 or a count, else -errno, and kuf_error() says in words what to do. errno itself is not used.
 *   - A call that fails for its arguments has changed nothing.
 *   - Each struct that the caller passes starts with its size. The rest is zero for defaults: { .size = sizeof(x) }.
 *   - The library starts threads named kuf-*, which block all signals and end with kuf_close. It never exits, aborts,
 *     prints, or installs signal handlers, and stays loaded after dlclose.
 *   - gpa, hva and lengths are in bytes. Times are in nanoseconds unless the name says otherwise.
 *
 * Link with `pkg-config --cflags --libs kuf`, or dlopen libkuf.so.0. This file is generated from the library's source.
 */

#ifndef KUF_H
#define KUF_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>


/* Major version of this header. The soname changes with it. */
#define KUF_VERSION_MAJOR 0

/* Minor version of this header: calls, flags or fields were added. */
#define KUF_VERSION_MINOR 1

/* Patch version of this header: nothing a caller can name has changed. */
#define KUF_VERSION_PATCH 0

/* In place of a gpa: every memory slot of the handle. */
#define KUF_ALL 18446744073709551615ull

/* Let the library choose: the best mechanism whose behaviour it can establish on this kernel. */
#define KUF_MECHANISM_AUTO 0

/*
 * userfaultfd(2). Every Linux with CONFIG_USERFAULTFD; catches vCPUs, KVM itself, vhost and the VMM's own threads
 * alike.
 */
#define KUF_MECHANISM_USERFAULTFD 1

/*
 * KVM userfault bitmap (KVM_MEM_USERFAULT), with userfaultfd underneath. A vCPU that touches an absent page leaves
 * KVM_RUN and fills it on its own thread (kuf_vcpu_fault); everybody else is caught as with userfaultfd. Needs
 * KUF_OPEN_VM_FD and a kernel with v3 of that interface (June 2025), which no released kernel has; never chosen by
 * KUF_MECHANISM_AUTO.
 */
#define KUF_MECHANISM_KVM_BITMAP 2

/*
 * KVM asynchronous userfault (KVM_READ_USERFAULT). As above for vCPUs; KVM's own accesses wait inside KVM, and service
 * threads take them from its queue. Nothing is registered with userfaultfd: bytes are written straight into the slot's
 * mapping, and nothing but KVM is kept off pages that are not present: the VMM's own threads call kuf_ensure before
 * they touch guest memory.
 *
 * Needs KUF_OPEN_VM_FD and a kernel with the interface of the RFC of July 2024, which no released kernel has; never
 * chosen by KUF_MECHANISM_AUTO. In return the host keeps to this: memory is added before a vCPU loads its MSRs (KVM
 * holds on to what it has looked up; touched memory is refused with -EBUSY); memslots are changed only after
 * kuf_quiesce with all vCPUs stopped; KVM_SET_MEMORY_ATTRIBUTES is left to the library for these ranges; memory that
 * the guest gives back is reported with kuf_discard(..., KUF_DISCARD_REMOVED), and is not unmapped or moved before
 * kuf_remove_memory; the memory is in one memslot range only (a second gpa for it is not marked); what an ioctl other
 * than KVM_RUN reads of guest memory is present before (kuf_ensure), for it fails with EFAULT or waits; the handle is
 * used in the process that made the VM (KVM answers any other with EIO, which ends the service).
 */
#define KUF_MECHANISM_KVM_ASYNC 3

/* Number of mechanism names, KUF_MECHANISM_AUTO included: the length of the arrays in struct kuf_probe. */
#define KUF_MECHANISM_COUNT 4

/* kuf_options.vm_fd holds a KVM VM file descriptor. */
#define KUF_OPEN_VM_FD (1 << 0)

/*
 * Accept a userfaultfd that catches user-mode accesses only (UFFD_USER_MODE_ONLY). It needs no privilege and cannot
 * serve a KVM guest: KVM's accesses are kernel accesses and would fail with EFAULT. For tests and emulators.
 */
#define KUF_OPEN_USER_MODE_ONLY (1 << 1)

/*
 * Serve children too: when the process forks, the child's unfilled guest memory is filled from the same source
 * (UFFD_FEATURE_EVENT_FORK; needs CAP_SYS_PTRACE). Without it a child that touches an unfilled page of memory that
 * was not set MADV_DONTFORK reads zeroes: the kernel drops the registration at fork.
 *
 * The first kuf_open with it registers fork handlers (pthread_atfork), which stay for the life of the process. From
 * the library's `prepare` to its `parent` handler no page of these handles is opened: a handler of the host's that was
 * registered before must not wait for a thread that may be waiting for one.
 */
#define KUF_OPEN_FOLLOW_FORK (1 << 2)

/*
 * Caller-driven with no service thread: kuf_read reads the kernel itself, which saves one thread wake-up a fault.
 * Only without a fill callback. The library's own userfaultfd then reports no REMOVE, REMAP, UNMAP or FORK events
 * (a host thread that gives memory back would wait for the very loop it may be running in): report memory that the
 * guest gives back with kuf_discard(..., KUF_DISCARD_REMOVED), and do not mremap or munmap it before
 * kuf_remove_memory. kuf_populate and KUF_OPEN_FOLLOW_FORK are not available.
 */
#define KUF_OPEN_DIRECT (1 << 3)

/*
 * Open no userfaultfd: every slot brings one (KUF_MEMORY_UFFD). For a handler that serves other processes and has no
 * privilege of its own.
 */
#define KUF_OPEN_ADOPT_ONLY (1 << 4)

/*
 * KUF_MECHANISM_KVM_ASYNC: the kernel answers KVM_READ_USERFAULT on an empty queue with ENOENT, which the host vouches
 * for (as posted, the RFC oopses there). The library then also looks into the queue twice a second without having been
 * signalled, so that a signal that KVM dropped, or that somebody else has read, delays a fault and does not lose it
 * (KUF_EVENT_UNSIGNALLED). With KUF_OPEN_DIRECT it is kuf_read that looks.
 */
#define KUF_OPEN_KVM_DRAIN (1 << 5)

/*
 * Look through what fill callbacks, sources and kuf_resolve bring, page by page, before it is put in place, and open
 * pages of zeroes as such. In private memory of ordinary pages they then take no memory until they are written, and
 * cost a small part of a copy. They count in kuf_stats.bytes_zeroed.
 *
 * In shared memory a zero page would take memory like any other. Those that nobody waits for are therefore left out:
 * they stay a hole in the file, count as removed (kuf_progress) and are made when they are touched, as pages are that
 * the guest has given back; kuf_ensure makes them (and pages that the guest has given back take memory again there).
 * Huge pages are zero when all of the page is; private ones are not looked at. With KUF_MECHANISM_KVM_ASYNC the memory
 * that zeroes were written to is given back before the guest sees it.
 */
#define KUF_OPEN_DETECT_ZERO (1 << 6)

/*
 * Serviced without a fill callback: every slot brings its own source (kuf_memory.source). Not with KUF_OPEN_DIRECT.
 * Of no effect together with a fill callback, which slots without a source then use.
 */
#define KUF_OPEN_SOURCES (1 << 7)

/*
 * kuf_source: a regular file or a block device, kuf_source.fd. What is in the page cache is copied from there without
 * another copy; what is not is read ahead. Holes are zero and are not read. A file that has become shorter, or whose
 * disk fails, makes fills fail: pages are poisoned (KUF_EVENT_POISONED) and no signal is raised.
 *
 * The file stays mapped for as long as the slot is there, so that its cached pages count in the process's RssFile.
 */
#define KUF_SOURCE_FILE 1

/* kuf_source: memory of this process, kuf_source.addr. */
#define KUF_SOURCE_MEMORY 2

/* kuf_source: zeroes. */
#define KUF_SOURCE_ZERO 3

/*
 * kuf_source.flags, with KUF_SOURCE_FILE: read past the page cache (O_DIRECT), so that an image that is used once drives
 * nothing out of it. Not faster where there is room: the page cache reads ahead. offset is a multiple of 4096 then.
 */
#define KUF_SOURCE_DIRECT_IO (1 << 0)

/* Somebody stands still until this run is resolved. */
#define KUF_FILL_DEMAND (1 << 0)

/*
 * kuf_fill.buf is the guest page itself, reached by a way the guest cannot see through yet: a second mapping of a
 * shared file, or, with KUF_MECHANISM_KVM_ASYNC, the slot's own mapping, from which a mark keeps the guest.
 * Nothing is copied afterwards. The buffer's content is undefined at the start. When the callback returns
 * KUF_DEFERRED the buffer stays valid until the run is resolved, so data may be received straight into it and
 * published with KUF_RESOLVE_IN_PLACE; such a run must be resolved (or poisoned) in the end. KUF_CLOSE_POISON takes the
 * buffer away: stop writing to it before.
 */
#define KUF_FILL_IN_PLACE (1 << 1)

/* The fault is a forked child's (KUF_OPEN_FOLLOW_FORK); gpa is that of the parent's slot. */
#define KUF_FILL_FORKED (1 << 2)

/* Fill callback: kuf_fill.buf holds the bytes of the first kuf_fill.filled bytes of the run. */
#define KUF_FILLED 0

/* Fill callback: the first kuf_fill.filled bytes of the run are zero; buf was not written. */
#define KUF_ZERO 1

/*
 * Fill callback: the host will call kuf_resolve for every page of the run later, from any thread, in any pieces. Until
 * then none of it is asked for again, whoever touches it. That holds without KUF_FILL_DEMAND too: to decline what
 * nobody waits for, return -EAGAIN instead; it poisons nothing, and the pages are asked for again when they are touched.
 */
#define KUF_DEFERRED 2

/*
 * kuf_memory.fd and fd_offset name the shared file (memfd, tmpfs, hugetlbfs) that is mapped MAP_SHARED at hva.
 * Pages are then filled in place where the kernel supports minor faults.
 */
#define KUF_MEMORY_FD (1 << 0)

/*
 * kuf_memory.uffd is a userfaultfd the host has opened (UFFDIO_API done). The library duplicates it, sets O_NONBLOCK
 * on it and is from then on its only reader.
 */
#define KUF_MEMORY_UFFD (1 << 1)

/* kuf_memory.hva is an address of another process, the one that opened kuf_memory.uffd. Needs KUF_MEMORY_UFFD. */
#define KUF_MEMORY_REMOTE (1 << 2)

/*
 * Ask the source for every page, whatever the file already holds. Without it, ranges of a KUF_MEMORY_FD file that hold
 * data when the slot is added count as present and keep their bytes. Use it when a handler that died may have left
 * half-filled pages behind, before anything touches or populates the memory (filling in place writes over what the
 * guest has changed), and mark pages known to be whole with KUF_RESOLVE_IN_PLACE.
 */
#define KUF_MEMORY_FILL_ALL (1 << 3)

/*
 * KUF_MECHANISM_KVM_BITMAP: the library sets the memslot kuf_memory.memslot itself (KVM_SET_USER_MEMORY_REGION2, with
 * this slot's gpa, len and hva): made, or changed if the host has made it, with KVM_MEM_USERFAULT when the slot is
 * added and before kuf_discard, without when every page is present and when the slot is removed. Not with
 * KUF_OPEN_DIRECT.
 *
 * From kuf_add_memory until kuf_remove_memory or kuf_close has returned the memslot is the library's: the host neither
 * changes nor deletes it (a host that turns dirty logging on and off sets the memslot itself, with kuf_kvm_bitmap).
 * KVM makes a change wait for everybody who waits for a page of the VM. So kuf_add_memory, kuf_discard,
 * kuf_remove_memory and kuf_close on such a slot do, and may be called neither by a thread that resolves pages nor
 * with a lock held that resolving pages needs.
 */
#define KUF_MEMORY_MEMSLOT (1 << 4)

/*
 * Huge pages are wanted: guest memory that is filled ahead of demand (kuf_populate, kuf_replay, kuf_ensure of a large
 * range, KUF_CLOSE_POPULATE) shall end on transparent huge pages, where the guest's later accesses are faster. A wish:
 * where it cannot be had, pages are filled as without it, and a KUF_LOG_INFO record says so.
 *
 * For private anonymous memory of this process, with a granule of 4 KiB, under userfaultfd. A stretch of 2 MiB (of host
 * addresses, aligned) that is wholly absent is asked for in one fill, also where populate_run or demand_run are less,
 * and moved to the guest as one page if all of it was filled. Single pages are what demand has filled before, what is
 * filled in part or with KUF_ZERO, what kuf_resolve brings, and stretches in which KUF_OPEN_DETECT_ZERO finds zeroes.
 * Whoever touches a page of a stretch that is being filled waits for all of it.
 *
 * Needs UFFDIO_MOVE (Linux 6.8) and huge pages for this process (/sys/kernel/mm/transparent_hugepage/enabled is not
 * "never"). Memory that is locked is left on single pages, unless all of the process is (MCL_FUTURE). The NUMA policy
 * of the mapping is followed, but one that interleaves leaves it on single pages. For KVM to map a huge page, gpa and
 * hva have to agree modulo 2 MiB.
 *
 * madvise(MADV_HUGEPAGE) on the guest memory is not needed, and makes demand slower: the kernel then zeroes 2 MiB before
 * it announces the first write to a stretch that has no page yet. What demand has filled page by page, the host can put
 * on huge pages once it is present: with that advice, which khugepaged follows in its own time, or with
 * madvise(MADV_COLLAPSE) (Linux 6.1), while which no page fault of the process goes on.
 *
 * Kernel: UFFDIO_MOVE; madvise(MADV_HUGEPAGE) on memory of the library's own. See KUF_FEATURE_HUGE.
 */
#define KUF_MEMORY_HUGE (1 << 5)

/* A write caused the fault. */
#define KUF_FAULT_WRITE (1 << 0)

/* The page is in the page cache of a shared file but not mapped (UFFD_PAGEFAULT_FLAG_MINOR). */
#define KUF_FAULT_MINOR (1 << 1)

/* Somebody waits for this page now; not set for pages that only kuf_populate asked for. */
#define KUF_FAULT_DEMAND (1 << 2)

/*
 * The fault is a forked child's (KUF_OPEN_FOLLOW_FORK). Resolve it like any other: kuf_resolve serves parent and
 * child.
 */
#define KUF_FAULT_FORKED (1 << 3)

/* KVM itself waits for the page, in its own access and not a vCPU's exit (KUF_MECHANISM_KVM_ASYNC). */
#define KUF_FAULT_KVM (1 << 4)

/* kuf_resolve: src is NULL and the range is zero. */
#define KUF_RESOLVE_ZERO (1 << 0)

/*
 * kuf_resolve: src is NULL and the bytes are in the shared file already (written through another mapping, pwrite,
 * or kuf_fill.buf / kuf_fault.place). Only for slots that are filled in place; with KUF_MECHANISM_KVM_ASYNC, all are.
 */
#define KUF_RESOLVE_IN_PLACE (1 << 1)

/*
 * kuf_resolve: src is NULL and the bytes are lost. Touching these pages raises SIGBUS; an event is raised. Touched by
 * a guest, KVM sends it to the vCPU thread (BUS_MCEERR_AR, with the hva) and KVM_RUN returns EINTR; with a KVM
 * mechanism the vCPU exits and kuf_vcpu_fault returns -EHWPOISON. Undone by kuf_discard.
 *
 * KVM's own access (an emulated instruction) to such a page may come out as KVM_EXIT_MMIO with an address inside a
 * slot: KVM takes memory that it cannot read for a device. Do not answer it as one: kuf_ensure says -EHWPOISON for it.
 * With KUF_MECHANISM_KVM_ASYNC it waits instead (KUF_EVENT_PARKED).
 */
#define KUF_RESOLVE_POISON (1 << 2)

/*
 * kuf_resolve: src is NULL, and the library looks which pages of the range hold their bytes already: private memory of
 * this process that was filled before kuf_add_memory, or by the host's own UFFDIO_COPY on a userfaultfd that it brought.
 * These become present, and who waits for them is woken; the others stay what they were and are no error. It takes two
 * looks at the page tables for 256 KiB. (KUF_RESOLVE_ZERO, which does not replace a page that is there, takes a system
 * call for each page, and makes a page of zeroes where there is none.)
 *
 * A page is there when touching it raises no fault that the library would hear of: it is mapped (the kernel's page of
 * zeroes too, which memory holds that was only read) or swapped out. Of what is swapped out these pages are not found:
 * write-protected ones (UFFDIO_WRITEPROTECT), shared ones, and any if /proc/self/pagemap cannot be opened. A page that
 * was marked with UFFDIO_POISON before the slot was added may be found: touching it raises SIGBUS as before.
 */
#define KUF_RESOLVE_PRESENT (1 << 3)

/*
 * kuf_discard: the guest gave the range back (balloon, free page reporting): it reads as zero from now on. Without
 * it, the range refills from the source.
 */
#define KUF_DISCARD_REMOVED (1 << 0)

/*
 * kuf_populate: stop every populate request and every replay (kuf_replay) that is still running; gpa and len are
 * ignored.
 */
#define KUF_POPULATE_STOP (1 << 0)

/*
 * kuf_close, kuf_remove_memory: poison what is still unresolved, so that touching it raises SIGBUS. What a shared file
 * holds there is dropped, in all its mappings; the poison itself is on the slot's own mapping. End the vCPUs: one that
 * is inside KVM may leave it with KVM_EXIT_MMIO at an address in RAM (see KUF_RESOLVE_POISON).
 *
 * In the own process, runs of 1 GiB and more are made PROT_NONE instead (KUF_EVENT_CLOSED_OFF; touching them raises
 * SIGSEGV, and KVM_RUN fails with EFAULT): to poison a terabyte takes many seconds and 2 GiB of page tables. Undone by
 * mprotect(2).
 */
#define KUF_CLOSE_POISON (1 << 0)

/*
 * kuf_close, kuf_remove_memory: fill what is still unresolved first. A page that cannot be filled makes the call fail
 * with -EIO and leaves the handle open, unless KUF_CLOSE_POISON is given too.
 */
#define KUF_CLOSE_POPULATE (1 << 1)

/*
 * kuf_close: do not wait for fill callbacks that are still running. Their results are dropped;
 * kuf_options.release is called when the last one has returned, and opaque must stay valid until then.
 *
 * With KUF_MECHANISM_KVM_ASYNC a callback writes to guest memory itself, which has to stay mapped until then too. What
 * is poisoned keeps its marks and userfaults stay enabled on the VM: vCPUs go on exiting at these pages, and who waits
 * inside KVM for one stays there until it is killed. For a VM that is about to go.
 */
#define KUF_CLOSE_NOWAIT (1 << 2)

/*
 * kuf_close: leave unresolved pages closed and registered, because the host hands its own descriptor of the
 * userfaultfd to another handler; who waits is announced there anew. Only when every slot was added with
 * KUF_MEMORY_UFFD, and not with KUF_CLOSE_POISON or KUF_CLOSE_POPULATE.
 */
#define KUF_CLOSE_HANDOVER (1 << 3)

/*
 * kuf_progress.flags: every page of the range is present or removed. The slot can be taken off the library with
 * kuf_remove_memory, and no cost stays behind.
 */
#define KUF_PROGRESS_COMPLETE (1 << 0)

/* kuf_progress.flags: the process behind the slot is gone, or its userfaultfd cannot be read (KUF_EVENT_GONE). */
#define KUF_PROGRESS_GONE (1 << 1)

/* Pages gpa..gpa+len could not be filled (error says why) and are poisoned: touching them raises SIGBUS. */
#define KUF_EVENT_POISONED 1

/*
 * Pages gpa..gpa+len could not be filled and the kernel cannot poison them (before Linux 6.6), or there are too many for
 * that (KUF_CLOSE_POISON). In the own process they were made PROT_NONE (touching raises SIGSEGV); in another process
 * whoever touches them stays blocked.
 */
#define KUF_EVENT_CLOSED_OFF 2

/*
 * Every page of the slot gpa..gpa+len is present or removed: the time for kuf_remove_memory without flags. Not raised
 * for a slot with poisoned pages, which kuf_close and kuf_remove_memory do accept.
 */
#define KUF_EVENT_COMPLETE 3

/*
 * A kuf_populate request over gpa..gpa+len (0 and 0 for KUF_ALL) has ended; error is 0, or the -errno of the fill that
 * stopped it, or -ECANCELED (KUF_POPULATE_STOP). Not raised for requests that kuf_close cuts off.
 */
#define KUF_EVENT_POPULATED 4

/*
 * The process behind the slot gpa..gpa+len is gone (error: -ESRCH), or its userfaultfd cannot be read (that -errno).
 * Noticed within a second. Memory that was unmapped counts as removed instead.
 */
#define KUF_EVENT_GONE 5

/*
 * The service of this handle is dead after a failure inside the library. Unresolved pages stay closed; every call that
 * serves memory fails with -EIO; kuf_close poisons them.
 */
#define KUF_EVENT_FATAL 6

/* The process forked and the child's memory is served as well (KUF_OPEN_FOLLOW_FORK); with an error: it is not. */
#define KUF_EVENT_FORKED 7

/*
 * KVM lost a fault and nobody knows of which page (KVM_READ_USERFAULT failed with EFAULT). Every page that is not
 * present may be waited for: the library asks for those of kuf_kvm_owned first and then, with a fill callback, fills
 * everything in the background, poisoning what cannot be filled. A caller-driven host resolves everything.
 */
#define KUF_EVENT_SWEEP 8

/*
 * KVM itself waits for the page gpa..gpa+len, which is poisoned: a vCPU stays inside KVM_RUN for it until its thread
 * is killed, or the page is discarded (kuf_discard) and filled. KUF_MECHANISM_KVM_ASYNC only: there is nothing that
 * could make its access fail. Once for each page.
 */
#define KUF_EVENT_PARKED 9

/*
 * KVM queued a fault and its signal did not come: somebody else reads the library's eventfd, or KVM dropped the
 * signal. Found only with KUF_OPEN_KVM_DRAIN. Raised once.
 */
#define KUF_EVENT_UNSIGNALLED 10

/*
 * A kuf_replay has ended; error is 0, or the -errno of the fill that stopped it, or -ECANCELED (KUF_POPULATE_STOP).
 * gpa and len are 0. Not raised for replays that kuf_close cuts off.
 */
#define KUF_EVENT_REPLAYED 11

/* Log levels, most urgent first. A record is passed on when its level is at most kuf_options.log_level. */
#define KUF_LOG_ERROR 1

/* Something the host may want to act on. */
#define KUF_LOG_WARN 2

/* Once per open, slot or request. */
#define KUF_LOG_INFO 3

/* Once per kernel event other than a page fault. */
#define KUF_LOG_DEBUG 4

/* Largest kuf_options.spin_us. */
#define KUF_SPIN_MAX 10000

/* Largest kuf_options.userfaultfds. */
#define KUF_USERFAULTFDS_MAX 64

/* Version of the file that kuf_record_stop writes (docs/record-format.md), and the newest that kuf_replay reads. */
#define KUF_RECORD_VERSION 1

/*
 * Latency histograms have one bucket per power of two nanoseconds: bucket i counts values in [2^i, 2^(i+1)), bucket 0
 * also those below 1 ns, the last one everything longer.
 */
#define KUF_HISTOGRAM_BUCKETS 40

/* Features to ask kuf_has_feature about: UFFDIO_POISON works on this kernel. */
#define KUF_FEATURE_POISON 1

/* Shared memory can be filled in place on this kernel (minor faults). */
#define KUF_FEATURE_MINOR 2

/* The kernel names the faulting thread: kuf_block_times works. */
#define KUF_FEATURE_THREAD_ID 3

/* userfaultfd serves KVM guests for this process (kernel-mode faults are allowed). */
#define KUF_FEATURE_KERNEL_FAULTS 4

/* userfaultfd works for this process at least for user-mode faults (KUF_OPEN_USER_MODE_ONLY). */
#define KUF_FEATURE_USER_FAULTS 5

/* Memory can be filled on huge pages (KUF_MEMORY_HUGE): the kernel has UFFDIO_MOVE and a huge page to give. */
#define KUF_FEATURE_HUGE 6

/*
 * One VM's fault service. Opaque; made by kuf_open, ended by kuf_close.
 *
 * Every call may be made from any thread at any time unless its text says otherwise. A handle that was closed is
 * recognised for as long as the process lives and answered with -EBADF. The handle belongs to the process that
 * opened it: in a forked child every call answers -ECHILD.
 */
struct kuf;

/* What this host can do. Filled by kuf_probe. */
struct kuf_probe {
    /* sizeof(struct kuf_probe), set by the caller. Fields the library does not know are zeroed. */
    uint32_t size;
    /* The KUF_MECHANISM_* that KUF_MECHANISM_AUTO would choose; KUF_MECHANISM_AUTO (0) when none works. */
    uint32_t recommended;
    /* Bit (1 << KUF_MECHANISM_*) for each mechanism that kuf_open would accept now. */
    uint32_t mechanisms;
    /* The granule of ordinary memory: the host's page size in bytes. */
    uint32_t page_size;
    /* UFFD_FEATURE_* bits the kernel offers; 0 when userfaultfd cannot be opened. */
    uint64_t uffd_features;
    /* For each mechanism: 0 when it works, else the -errno that kuf_open would return. */
    int32_t error[KUF_MECHANISM_COUNT];
    /*
     * For each mechanism: in words, how it works here (which way userfaultfd was opened) or why it does not and what
     * to do about it. NUL-terminated.
     */
    char why[KUF_MECHANISM_COUNT][512];
};

/* A run of pages to be filled, as handed to the fill callback. Valid until the callback returns. */
struct kuf_fill {
    /* sizeof(struct kuf_fill) as the library knows it: fields beyond it are not there. */
    uint32_t size;
    /* KUF_FILL_*. */
    uint32_t flags;
    /* First guest physical address of the run; a multiple of granule. */
    uint64_t gpa;
    /* Bytes wanted; a multiple of granule. Never holds a page that is present. */
    uint64_t len;
    /* Where to write len bytes. Page-aligned. Content undefined at the start. */
    void *buf;
    /*
     * len at the start. A callback that got only part may lower it, to a multiple of granule above 0, and return
     * KUF_FILLED or KUF_ZERO: the rest is asked for again when it is wanted. Ignored for KUF_DEFERRED.
     */
    uint64_t filled;
    /* Page size of the slot in bytes. */
    uint64_t granule;
    /* kuf_memory.opaque of the slot. */
    void *memory_opaque;
    /* gpa minus the slot's gpa: the offset in an image of this slot. */
    uint64_t memory_offset;
    /*
     * NULL at the start. A callback that has the bytes in memory (a mapped image) may set it to the first of `filled`
     * readable bytes, of any alignment, and return KUF_FILLED without having written to buf: they are copied from there
     * straight to the guest. They stay where they are, unchanged, until kuf_remove_memory of the slot or kuf_close has
     * returned (with KUF_CLOSE_NOWAIT, until kuf_options.release is called). What turns out unreadable (a mapped file that
     * was truncated) is a fill that failed with -EFAULT, guest memory that is not present itself one with -EDEADLK.
     */
    const void *src;
    /*
     * With KUF_FILL_DEMAND: thread id of the first toucher, where the kernel names it (KUF_FEATURE_THREAD_ID). 0: not
     * known, or nobody waits, or it is the calling thread itself (kuf_ensure, kuf_vcpu_fault).
     */
    uint32_t thread;
    /* Zero. */
    uint32_t reserved;
};

/*
 * Fills pages. Returns KUF_FILLED, KUF_ZERO, KUF_DEFERRED, or -errno: the source has failed for good. A run is then
 * asked for again page by page where somebody waits; a single page that fails is poisoned and KUF_EVENT_POISONED is
 * raised. Any other value is a failure with -EPROTO.
 *
 * Called on a service thread ("kuf-serve-N", "kuf-populate"), or on the host thread that is inside kuf_ensure,
 * kuf_vcpu_fault, or kuf_close or kuf_remove_memory with KUF_CLOSE_POPULATE; by several threads at once for different
 * runs. No lock is held. It may block and take its time: other pages are served while a fill thread is free. It may
 * call kuf_resolve (also for its own run, then return KUF_DEFERRED), kuf_discard, kuf_pending, kuf_populate,
 * kuf_record_start, kuf_record_stop, kuf_replay, kuf_kvm_owned, kuf_kvm_bitmap, kuf_progress, kuf_stats,
 * kuf_watch_threads and kuf_block_times. Calls that could wait for it return -EDEADLK, on any handle: kuf_close,
 * kuf_add_memory, kuf_remove_memory, kuf_poll, kuf_read, kuf_ensure, kuf_vcpu_fault, kuf_quiesce; and, on a slot with
 * KUF_MEMORY_MEMSLOT, kuf_discard. It must not touch unresolved guest memory (it would wait for itself). A Rust panic
 * is caught and counts as -ENOTRECOVERABLE; a C++ exception or longjmp must not leave it.
 */
typedef int (*kuf_fill_fn)(void *opaque, struct kuf_fill *fill);

/* Something the host should know, as handed to the event callback. Valid until the callback returns. */
struct kuf_event {
    /* sizeof(struct kuf_event) as the library knows it. */
    uint32_t size;
    /* KUF_EVENT_*. */
    uint32_t kind;
    /* Range concerned, in guest physical bytes; 0 and 0 when the event concerns the handle. */
    uint64_t gpa;
    /* Length of the range in bytes. */
    uint64_t len;
    /* 0, or the -errno behind the event. */
    int32_t error;
    /* Zero. */
    uint32_t reserved;
    /* The same in words. Never NULL. */
    const char *text;
};

/*
 * Told about what happened. Called on whichever thread found out, with no lock held, after the state has changed.
 * May call what a fill callback may call, and kuf_remove_memory. Should return soon: the thread serves faults.
 */
typedef void (*kuf_event_fn)(void *opaque, const struct kuf_event *event);

/*
 * Given log records: level is KUF_LOG_*, text one line without newline, valid during the call. Called on any thread.
 * Must not call the library. The library prints nothing itself.
 */
typedef void (*kuf_log_fn)(void *opaque, uint32_t level, const char *text);

/*
 * Called exactly once, when the library will never again use opaque or call any callback: before a kuf_close that
 * waits returns, or on the last thread that leaves the library after KUF_CLOSE_NOWAIT. Not called when kuf_open fails.
 * Must not call the library.
 */
typedef void (*kuf_release_fn)(void *opaque);

/* How to open a service. Zero means the default in every field. */
struct kuf_options {
    /* sizeof(struct kuf_options), set by the caller. */
    uint32_t size;
    /* KUF_MECHANISM_*. */
    uint32_t mechanism;
    /* KUF_OPEN_*. */
    uint64_t flags;
    /*
     * The VM's file descriptor with KUF_OPEN_VM_FD, else 0. Needed by the KVM mechanisms, which duplicate it; checked
     * but not used by userfaultfd. The host keeps its own.
     */
    int32_t vm_fd;
    /*
     * Threads that may be inside a fill callback at once, besides the one that always watches for faults:
     * 1 to 256, 0 for 2. One more brings pages ahead of touchers, unless demand_run is one page of the host's or less;
     * with kuf_populate or KUF_MECHANISM_KVM_BITMAP, yet one more. Ignored without a fill callback and KUF_OPEN_SOURCES.
     */
    uint32_t fill_threads;
    /*
     * What one fault may bring at most, in bytes, its own page included: 0 for 2 MiB, at most 64 MiB. Rounded to whole
     * granules, at least one. One granule: each fault brings its page and nothing else.
     *
     * A fault brings more than its page where the pages that follow are likely to be touched next. While faults go
     * on where the pages brought for an earlier one end, in any thread, each brings twice as much as the one before,
     * up to demand_run. With demand_run at 64 KiB or more, and pages of at most 16 KiB, a fault in a place where a quarter
     * of the pages are there (of 32 that start at a multiple of 32 in the slot) brings what is missing of the 64 KiB
     * around it.
     *
     * Of these, one run of at most 64 KiB, with the page in it, is asked for with KUF_FILL_DEMAND. What is left is
     * brought ahead of the toucher, which goes on meanwhile: in runs of at most populate_run without KUF_FILL_DEMAND,
     * one at a time, while no other fault waits; what is missing in such a place, before the next fault, if fills take
     * microseconds. What is brought ahead and fails poisons nothing: it is asked for again when it is touched.
     *
     * kuf_ensure asks for the range it is given in runs of at most demand_run and populate_run (or 64 KiB if that is more).
     */
    uint64_t demand_run;
    /*
     * Longest run, in bytes, that is asked for when nobody waits, by kuf_populate or ahead of touchers: 0 for 256 KiB,
     * at most 64 MiB. Rounded as above. See also KUF_MEMORY_HUGE.
     */
    uint64_t populate_run;
    /* Bytes of deferred kuf_populate runs that may be outstanding at once: 0 for 16 MiB. */
    uint64_t populate_inflight;
    /*
     * Faults the library holds unserved before it stops reading more from the kernel: 0 for 4096, at least 1.
     * What is not read waits in the kernel's queue.
     */
    uint32_t queue_max;
    /* Highest KUF_LOG_* that is passed to log. */
    uint32_t log_level;
    /* Fills pages; NULL: caller-driven (kuf_poll, kuf_read, kuf_resolve), or KUF_OPEN_SOURCES. */
    kuf_fill_fn fill;
    /* Told about events; may be NULL. */
    kuf_event_fn event;
    /* Given log records; may be NULL. */
    kuf_log_fn log;
    /* Told when the callbacks are done for good; may be NULL. */
    kuf_release_fn release;
    /* First argument of the four callbacks. */
    void *opaque;
    /*
     * Microseconds, at most KUF_SPIN_MAX, that the thread that watches for faults may go on looking for the next one
     * before it sleeps, and only while faults come that fast: 0 for not at all. It saves the time to wake up, which
     * can be most of what a fault costs, and takes up to one CPU while faults come. Without effect where every
     * thread of the process is kept on one and the same CPU at kuf_open, or the cgroup grants the time of one.
     */
    uint32_t spin_us;
    /*
     * How many userfaultfds share the memory of this handle, at most KUF_USERFAULTFDS_MAX. 0: one for each 8 CPUs
     * that the calling thread may use, from 1 to 8; with KUF_OPEN_DIRECT and KUF_OPEN_FOLLOW_FORK, one. A userfaultfd
     * has one lock and one list of waiters, on which all vCPUs that touch absent pages meet. With several, memory is
     * divided at multiples of 16 MiB or more of its address, a slot in at most 65 pieces, which they have in turn.
     *
     * Each piece is a mapping of its own (/proc/self/maps) for as long as the slot is there, and may stay one. It
     * counts against vm.max_map_count, and mremap(2) of more than one of them fails with EFAULT: a host that moves the
     * memory of slots sets this to 1. Not with KUF_OPEN_ADOPT_ONLY and KUF_MECHANISM_KVM_ASYNC, which open none; more
     * than 1 not with KUF_OPEN_FOLLOW_FORK.
     */
    uint32_t userfaultfds;
    /*
     * The CPUs that service threads (kuf-serve-N, kuf-fork, kuf-populate) may use: a cpu_set_t or a longer set, as for
     * sched_setaffinity(2), of cpus_size bytes, read during the call. NULL: those of the thread that calls kuf_open.
     * Not with KUF_OPEN_DIRECT.
     */
    const void *cpus;
    /* Bytes at cpus, at most 8192; 0 when cpus is NULL. */
    uint64_t cpus_size;
    /* The same for kuf-populate alone, which nobody waits for. NULL: as cpus. */
    const void *populate_cpus;
    /* Bytes at populate_cpus. */
    uint64_t populate_cpus_size;
};

/* Where the pages of a slot come from without a callback: kuf_memory.source. The slot's first byte is at `offset`. */
struct kuf_source {
    /* sizeof(struct kuf_source), set by the caller. */
    uint32_t size;
    /* KUF_SOURCE_*: _FILE, _MEMORY or _ZERO. */
    uint32_t kind;
    /* KUF_SOURCE_DIRECT_IO or 0. */
    uint64_t flags;
    /* KUF_SOURCE_FILE: open for reading; duplicated. Else 0. */
    int32_t fd;
    /* Zero. */
    uint32_t reserved;
    /* Where the slot's bytes begin in the file or memory, in bytes, of any alignment. 0 with KUF_SOURCE_ZERO. */
    uint64_t offset;
    /*
     * KUF_SOURCE_MEMORY: the first byte. It stays readable and unchanged until kuf_remove_memory of the slot or kuf_close
     * has returned (with KUF_CLOSE_NOWAIT, until kuf_options.release is called), and is not guest memory that is filled
     * itself. Else NULL.
     */
    const void *addr;
    /* KUF_SOURCE_MEMORY: bytes from addr on; offset + the slot's len at least. Else 0. */
    uint64_t len;
};

/* A memory slot: a guest physical range and the host mapping behind it. */
struct kuf_memory {
    /* sizeof(struct kuf_memory), set by the caller. */
    uint32_t size;
    /* KUF_MEMORY_*. */
    uint32_t flags;
    /* First guest physical address; a multiple of the granule. */
    uint64_t gpa;
    /* Length in bytes; a multiple of the granule, not 0. */
    uint64_t len;
    /*
     * Host virtual address that backs gpa, in this process or, with KUF_MEMORY_REMOTE, in the other one; a multiple of
     * the granule. The whole range must be mapped.
     */
    uint64_t hva;
    /*
     * Page size of the mapping in bytes: 0 to have it found out (not with KUF_MEMORY_REMOTE without KUF_MEMORY_FD,
     * where 0 means the host's page size).
     */
    uint64_t granule;
    /* The shared file with KUF_MEMORY_FD (duplicated), else 0. */
    int32_t fd;
    /* The userfaultfd with KUF_MEMORY_UFFD (duplicated), else 0. One userfaultfd may back many slots. */
    int32_t uffd;
    /* Offset in fd that is mapped at hva; a multiple of the granule. */
    uint64_t fd_offset;
    /*
     * KUF_MECHANISM_KVM_ASYNC: the memory attributes (KVM_MEMORY_ATTRIBUTE_PRIVATE, 1 << 3) that the range has besides
     * the mark, which the library keeps: KVM_SET_MEMORY_ATTRIBUTES replaces all of them. They hold for the whole slot
     * and for as long as it is there. Else 0.
     */
    uint64_t kvm_attributes;
    /* Handed back in kuf_fill and kuf_fault. */
    void *opaque;
    /* Number of the KVM memslot (and address space << 16) with KUF_MEMORY_MEMSLOT, else 0. */
    uint32_t memslot;
    /* KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0: flags of that memslot besides KVM_MEM_USERFAULT. */
    uint32_t memslot_flags;
    /*
     * Where the slot's pages come from, instead of the fill callback, which is not called for this slot; NULL: the fill
     * callback, or kuf_read. Copied. Needs a handle with a fill callback or KUF_OPEN_SOURCES.
     */
    const struct kuf_source *source;
};

/* A page fault, as given by kuf_read and kuf_pending. Always 64 bytes. */
struct kuf_fault {
    /* Guest physical address; a multiple of the slot's granule. */
    uint64_t gpa;
    /* Bytes to resolve: one granule from kuf_read, a run of pages in the same state from kuf_pending. */
    uint64_t len;
    /* KUF_FAULT_*. */
    uint32_t flags;
    /* Thread id of the first toucher, where the kernel names it (KUF_FEATURE_THREAD_ID); else 0. */
    uint32_t thread;
    /* Nanoseconds since the fault was read from the kernel, or since the page was asked for. */
    uint64_t age_ns;
    /* kuf_memory.opaque of the slot. */
    void *memory_opaque;
    /* gpa minus the slot's gpa. */
    uint64_t memory_offset;
    /*
     * Where the page's bytes may be written before kuf_resolve(..., KUF_RESOLVE_IN_PLACE); NULL when the slot is not
     * filled in place. Valid until the page is resolved. NULL from kuf_pending.
     */
    void *place;
    /* Zero. */
    uint64_t reserved;
};

/* A request to fill ahead of demand. */
struct kuf_populate {
    /* sizeof(struct kuf_populate), set by the caller. */
    uint32_t size;
    /* KUF_POPULATE_*. */
    uint32_t flags;
    /* First guest physical address, or KUF_ALL for every slot there is when the request starts. */
    uint64_t gpa;
    /* Bytes; must be 0 with KUF_ALL. May span slots and holes between them. */
    uint64_t len;
    /* Bytes per second at most; 0: no limit. */
    uint64_t rate;
};

/*
 * How far a range is. Filled by kuf_progress. All in bytes; present + removed + absent + filling + deferred + poisoned
 * = total.
 */
struct kuf_progress {
    /* sizeof(struct kuf_progress), set by the caller. Fields the library does not know are zeroed. */
    uint32_t size;
    /* KUF_PROGRESS_*. */
    uint32_t flags;
    /* The slot's gpa; 0 with KUF_ALL. */
    uint64_t gpa;
    /* Bytes of the slot, or of all slots. */
    uint64_t total;
    /* Holds its bytes. */
    uint64_t present;
    /* Given back by the guest or unmapped: reads as zero, needs no source. */
    uint64_t removed;
    /* Not asked for yet. */
    uint64_t absent;
    /* Being filled now. */
    uint64_t filling;
    /* Asked for, to be resolved by the host (deferred, or read with kuf_read). */
    uint64_t deferred;
    /* Could not be filled. */
    uint64_t poisoned;
};

/* log2 latency histogram, in nanoseconds. */
struct kuf_histogram {
    /* Values recorded. */
    uint64_t count;
    /* Sum of the values. */
    uint64_t sum_ns;
    /* Largest value. */
    uint64_t max_ns;
    /* Values per bucket: see KUF_HISTOGRAM_BUCKETS. */
    uint64_t bucket[KUF_HISTOGRAM_BUCKETS];
};

/* Counters since kuf_open. Filled by kuf_stats; each is read on its own, so sums may be off by what is in flight. */
struct kuf_stats {
    /* sizeof(struct kuf_stats), set by the caller. Fields the library does not know are zeroed. */
    uint32_t size;
    /* Zero. */
    uint32_t reserved;
    /* Page faults read from the kernel. */
    uint64_t faults;
    /* Of these, for pages of a shared file that were in its page cache already. */
    uint64_t faults_minor;
    /* Of these, write accesses. */
    uint64_t faults_write;
    /* Of these, for a page that another fault was already waiting for. */
    uint64_t faults_joined;
    /* Of these, for a page that had become present in the meantime. */
    uint64_t faults_late;
    /* Of these, for an address in no slot (it was unmapped, moved or removed meanwhile); left to the kernel. */
    uint64_t faults_unknown;
    /* Exits given to kuf_vcpu_fault. */
    uint64_t vcpu_faults;
    /* Fill callbacks made, and built-in sources asked. */
    uint64_t fills;
    /* Of these, those that failed. */
    uint64_t fills_failed;
    /* Of these, those that returned KUF_DEFERRED. */
    uint64_t fills_deferred;
    /* Bytes made present with data copied from a buffer. */
    uint64_t bytes_copied;
    /* Bytes made present as zeroes. */
    uint64_t bytes_zeroed;
    /* Bytes made present in place, with no copy. */
    uint64_t bytes_in_place;
    /* Of all bytes made present, those that kuf_populate asked for. */
    uint64_t bytes_populated;
    /* Bytes poisoned or closed off. */
    uint64_t bytes_poisoned;
    /* Bytes dropped by kuf_discard. */
    uint64_t bytes_discarded;
    /* Bytes reported removed or unmapped by the kernel or by kuf_discard(..., KUF_DISCARD_REMOVED). */
    uint64_t bytes_removed;
    /* REMOVE events read. */
    uint64_t events_remove;
    /* UNMAP events read. */
    uint64_t events_unmap;
    /* REMAP events read. */
    uint64_t events_remap;
    /* FORK events read. */
    uint64_t events_fork;
    /* Installs put off because an event was unread (EAGAIN). */
    uint64_t install_again;
    /* Pages found present at install (EEXIST); their waiters were woken by hand. */
    uint64_t install_exists;
    /* Installs retried for want of memory (ENOMEM, ENOSPC). */
    uint64_t install_no_memory;
    /* Times reading stopped because queue_max faults were held. */
    uint64_t queue_full;
    /* KVM_READ_USERFAULT calls that failed with EFAULT: each may have lost a fault, and led to a sweep. */
    uint64_t faults_lost;
    /* Faults found in KVM's queue whose signal did not come (KUF_OPEN_KVM_DRAIN). */
    uint64_t faults_unsignalled;
    /* From reading a fault until its fill began. Caller-driven: until kuf_read returned it. */
    struct kuf_histogram queueing;
    /* Inside the fill callback or the built-in source, or from the request to kuf_resolve for deferred and caller-driven faults. */
    struct kuf_histogram filling;
    /* Making a run present. */
    struct kuf_histogram installing;
    /* From reading a fault until its page was present: what the library added to the toucher's wait. */
    struct kuf_histogram blocked;
    /* Of all bytes made present, those that were brought ahead of a toucher, with nobody waiting (kuf_options.demand_run). */
    uint64_t bytes_ahead;
    /* Time, from the reading of a fault each, during which all threads of kuf_watch_threads waited at once, up to now. */
    uint64_t blocked_all_ns;
};

/* How long one thread was kept waiting by page faults. */
struct kuf_block_time {
    /* Thread id as in gettid(2), in the pid namespace of the process that opened the userfaultfd. */
    uint32_t thread;
    /* Zero. */
    uint32_t reserved;
    /* Faults of this thread that ended. */
    uint64_t faults;
    /* Sum of their waiting times, from reading the fault until the page was present. */
    uint64_t total_ns;
    /* Longest of them. */
    uint64_t max_ns;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 * The version of the library that is loaded: KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH.
 * Any thread, any time.
 */
uint32_t kuf_version(void);

/*
 * The calling thread's last failure in words: what was wrong and what to do about it. Never NULL; "" when no call of
 * this thread has failed. Calls that succeed leave it alone; the next one that fails overwrites it. The pointer is the
 * same, and valid, for the life of the thread.
 */
const char *kuf_error(void);

/*
 * Whether a feature (KUF_FEATURE_*) works in this process on this kernel.
 *
 * Returns 1 or 0; -EINVAL for a feature this version does not know. Opens a userfaultfd for a moment at the first
 * call. Any thread.
 */
int kuf_has_feature(uint32_t feature);

/*
 * Finds out which mechanisms work here and, for each that does not, why. Changes nothing.
 *
 * vm_fd: a KVM VM file descriptor, or -1 to learn only what does not need one.
 * out: out->size set by the caller.
 *
 * Returns 0, also when nothing works (out->mechanisms is 0 then). Any thread.
 * -EINVAL: out is NULL or its size is below that of the first version; vm_fd is neither -1 nor a KVM VM.
 * -EBADF: vm_fd is not an open descriptor.
 * Kernel: userfaultfd(2), ioctl_userfaultfd(2). The KVM interfaces' capability numbers were given to other features,
 * so they are tried: the bitmap on a VM made for it, the asynchronous one by KVM_ENABLE_CAP(236, DISABLE) on vm_fd,
 * which changes nothing where userfaults are not enabled (and is not tried where they are).
 */
int kuf_probe(int vm_fd, struct kuf_probe *out);

/*
 * Opens a fault service: duplicates the VM descriptor if one is given, opens the mechanism and starts the service
 * threads. Memory is added afterwards with kuf_add_memory.
 *
 * With options->fill or KUF_OPEN_SOURCES the handle is *serviced*: service threads read faults, call it or ask the slot's
 * source, and place the pages. Without, it is *caller-driven*: the host reads faults with kuf_read and answers with
 * kuf_resolve. kuf_resolve works on both.
 *
 * Returns 0 and sets *out; on failure *out is NULL. Any thread.
 * -EINVAL: options or out is NULL, size is below that of the first version, an unknown flag or mechanism, a field out
 *   of its range, a field set whose flag is not, KUF_OPEN_DIRECT with a fill callback or KUF_OPEN_SOURCES; cpus or
 *   populate_cpus names no CPU that the process may use.
 * -E2BIG: options has non-zero bytes that this version does not know.
 * -EBADF: vm_fd is not an open descriptor.
 * -ENOTSUP: the mechanism asked for by name does not work here. -EEXIST: KVM's asynchronous userfaults are enabled on
 *   this VM already. -EIO: the VM is another process's.
 * -EPERM: userfaultfd is refused; the text names the ways to grant it: /dev/userfaultfd, CAP_SYS_PTRACE,
 *   vm.unprivileged_userfaultfd. Also KUF_OPEN_FOLLOW_FORK without CAP_SYS_PTRACE.
 * -ENOSYS: the kernel has no userfaultfd.
 * -EMFILE, -ENFILE, -ENOMEM, -EAGAIN: no descriptor, memory or thread to be had.
 */
int kuf_open(const struct kuf_options *options,
             struct kuf **out);

/*
 * Ends a service and sets *kuf to NULL. No page that was not filled is ever released onto zeroes: with unresolved
 * pages the call is refused, or does what flags say.
 *
 * flags: KUF_CLOSE_*.
 *
 * Once it has begun every other call on the handle fails with -EBADF, and those that wait in kuf_poll, kuf_ensure or
 * kuf_vcpu_fault return -ECANCELED. It then waits for fill callbacks that are running, unless KUF_CLOSE_NOWAIT is
 * given; pages are poisoned before that wait. A handle whose service died (KUF_EVENT_FATAL) is always closed, and
 * poisons.
 *
 * Returns 0. Any thread.
 * -EINVAL: kuf or *kuf is NULL, an unknown flag, KUF_CLOSE_HANDOVER with other flags or with a slot whose userfaultfd
 *   is the library's own. -EBADF: closed already, or being closed.
 * -EBUSY: unresolved pages, and no flag says what to do; the handle goes on as before.
 * -EIO: KUF_CLOSE_POPULATE could not fill everything; the handle goes on as before.
 * -ENOTSUP: KUF_CLOSE_POPULATE, and the handle has no fill callback and no KUF_OPEN_SOURCES.
 * -EDEADLK: called from a callback. -ECHILD: called in a forked child.
 */
int kuf_close(struct kuf **kuf, uint32_t flags);

/*
 * Puts a memory slot under the service: from its return on, no absent page of it can be touched without being served.
 * Pages that exist already keep their bytes and are not asked for, so do not populate the mapping (MAP_POPULATE). May
 * be called while other slots are in use. Reads /proc/self/maps.
 *
 * memory: memory->size set by the caller; the descriptors in it stay the host's.
 *
 * Returns 0. Any thread but not from a callback (-EDEADLK).
 * -EINVAL: kuf or memory is NULL, size below that of the first version, an unknown flag; gpa, len, hva or fd_offset is
 *   0 where it may not be, is not a multiple of the granule or overflows; the granule is not the mapping's page size;
 *   fd or uffd given without its flag; KUF_MEMORY_REMOTE without KUF_MEMORY_UFFD; a kind of mapping userfaultfd cannot
 *   serve (one of an ordinary file, a private one of any file); a source that is shorter than the slot, of an unknown
 *   kind, or with fields set that its kind does not have; a source on a caller-driven handle, none on one that has
 *   nothing else (KUF_OPEN_SOURCES).
 * -E2BIG: memory or source has non-zero bytes that this version does not know.
 * -EEXIST: gpa..gpa+len overlaps a slot, or hva..hva+len one with the same userfaultfd.
 * -EFAULT: part of hva..hva+len is not mapped.
 * -EBADF: fd or uffd is not an open descriptor; source->fd is none, or not open for reading. -EBADFD: fd is not a shared
 *   memory file, is not the one mapped at hva, or uffd is not a userfaultfd; source->fd is neither a regular file nor a
 *   block device.
 * -EBUSY: another userfaultfd has the range; with KUF_MECHANISM_KVM_ASYNC and without KUF_MEMORY_FD, something touched
 *   it before. -ESRCH: the remote process is gone.
 * -ENOTSUP: the kernel cannot serve this kind of memory; a hugetlbfs file that holds data, without
 *   KUF_MEMORY_FILL_ALL; KUF_SOURCE_DIRECT_IO on a file system that has none. -ENOMEM, -EMFILE: out of memory, mappings or descriptors.
 * -ECANCELED: kuf_close has begun; what nobody has filled of the range may be poisoned. -EIO: the service is dead.
 * Kernel: UFFDIO_REGISTER (MISSING; MISSING|MINOR for a shared file), KVM_SET_MEMORY_ATTRIBUTES,
 * KVM_SET_USER_MEMORY_REGION2. With userfaultfd madvise, munmap and mremap of the range are
 * followed (docs/adopting.md says what they mean); MREMAP_DONTUNMAP is not supported.
 */
int kuf_add_memory(struct kuf *kuf,
                   const struct kuf_memory *memory);

/*
 * Takes the slot that starts at gpa off the service; its memory stays mapped and is the host's alone: unregistered,
 * huge pages possible again, no cost left. With KUF_MECHANISM_KVM_ASYNC poisoned pages lose their marks (and become
 * PROT_NONE where userfaultfd cannot poison them); with KUF_MECHANISM_KVM_BITMAP the bitmap is unmapped, so take
 * KVM_MEM_USERFAULT off the memslot before.
 *
 * flags: 0, KUF_CLOSE_POISON, KUF_CLOSE_POPULATE or both.
 *
 * A fill of this slot that is running is waited for, up to 100 ms, but not in an event callback: one ahead of vCPUs that
 * have stopped since, or one whose pages were resolved or given back meanwhile. After a call that returns 0 no fill
 * callback has memory_opaque in hand. Touchers should have ended: their fills may follow one another.
 *
 * Of two calls for one slot at once, one finds that it has gone.
 *
 * Returns 0. Any thread, also from an event callback unless the slot has KUF_MEMORY_MEMSLOT, but not from a fill
 * callback (-EDEADLK).
 * -EINVAL: kuf is NULL, an unknown flag. -ENOENT: no slot starts at gpa.
 * -EBUSY: unresolved pages and no flag; a fill of this slot has been running for longer than that (retry when it has
 *   ended).
 * -EIO: KUF_CLOSE_POPULATE could not fill everything; the slot goes on as before. -ENOTSUP: KUF_CLOSE_POPULATE,
 *   and the handle has no fill callback and no KUF_OPEN_SOURCES.
 * Kernel: UFFDIO_UNREGISTER, KVM_SET_MEMORY_ATTRIBUTES.
 */
int kuf_remove_memory(struct kuf *kuf, uint64_t gpa, uint32_t flags);

/*
 * A descriptor that polls readable (POLLIN) when kuf_read has something to return: for the host's own poll, epoll or
 * GSource, level-triggered. Do not read, write or close it; it lives as long as the handle.
 *
 * Returns the descriptor (0 or above). Any thread.
 * -EINVAL: kuf is NULL. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
 */
int kuf_fd(struct kuf *kuf);

/*
 * Waits until kuf_read has something to return.
 *
 * timeout_ms: milliseconds at most; 0 looks without waiting; -1 waits for ever.
 *
 * Returns 1: faults to read; 0: timed out. Any thread but not from a callback (-EDEADLK).
 * -EINVAL: kuf is NULL, timeout_ms below -1. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
 * -ECANCELED: kuf_close has begun. -EIO: the service is dead.
 * A signal does not end the wait.
 */
int kuf_poll(struct kuf *kuf, int timeout_ms);

/*
 * Takes up to n faults, oldest first, without waiting. From then on the host owes each of them a kuf_resolve;
 * kuf_pending lists those still owed. A page is given once however many threads wait for it, and never when it is
 * present.
 *
 * faults: room for n entries. n: 1 or more.
 *
 * Returns the number taken. Any thread; several may read at once and get different faults.
 * -EAGAIN: none now. -EINVAL: kuf or faults is NULL, n is 0. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
 * -EDEADLK: called from a callback. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
 */
ssize_t kuf_read(struct kuf *kuf,
                 struct kuf_fault *faults,
                 size_t n);

/*
 * Makes gpa..gpa+len present and wakes whoever waits for it: with data from src, or as flags say. Asked for or not,
 * from any thread, in any order, in any pieces, twice: pages that are present keep their bytes, and pages that the
 * guest has given back stay given back.
 *
 * gpa, len: multiples of the granule, len not 0, within one slot.
 * src: len readable bytes, any alignment, not unresolved guest memory; NULL with KUF_RESOLVE_ZERO, _IN_PLACE, _POISON
 * or _PRESENT. Not kept. It may be on a disk still (a mapped image): the calling thread waits for that, and nobody else.
 * flags: 0 or one KUF_RESOLVE_*.
 *
 * Never waits for host code: a page whose fill callback is running at this moment in place takes the bytes when the
 * callback returns KUF_DEFERRED or fails. Until then they are kept, and the page is not present: such bytes do not
 * count in what is returned, which may be 0 as for a page that is there already (kuf_progress tells the two apart).
 *
 * Returns the bytes that this call made present (or poisoned); bytes that were present, given back, or are being made
 * present by another thread do not count, nor do those that KUF_RESOLVE_PRESENT has not found. Any thread, also from
 * callbacks.
 * -EINVAL: kuf is NULL, src is NULL or not as flags say, an unknown flag or two of them, misaligned, len is 0,
 *   overflow; KUF_RESOLVE_IN_PLACE on a slot that is not filled in place, KUF_RESOLVE_PRESENT on one that is.
 *   -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ENOTSUP: KUF_RESOLVE_PRESENT on memory of another
 *   process.
 * -EFAULT: src is not readable over len bytes; what could be read up to there may be present (the call can be
 *   repeated).
 * -EDEADLK: src is itself guest memory that is not present. -ENOMEM: the kernel has no memory for the pages. -ESRCH:
 *   the process behind the slot is gone. -EIO: the service is dead.
 * Kernel: UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON, UFFDIO_WAKE; /proc/self/pagemap, mincore,
 * MADV_POPULATE_READ.
 */
ssize_t kuf_resolve(struct kuf *kuf, uint64_t gpa, const void *src, size_t len, uint32_t flags);

/*
 * For the KVM_RUN loop: serves the fault behind a KVM_EXIT_MEMORY_FAULT (KVM_RUN returned -1 with errno EFAULT) on the
 * calling vCPU thread, with no hand-off. The page is filled here, or waited for when another thread is filling it.
 * With userfaultfd such exits do not occur, and the call is a legal kuf_ensure over the granules that gpa..gpa+len
 * touches.
 *
 * gpa, len: kvm_run->memory_fault.gpa and .size, of any alignment. exit_flags: kvm_run->memory_fault.flags.
 *
 * For a page that is present it returns 0 at once: handle exits that have another cause first. On a caller-driven
 * handle the page is queued for kuf_read and waited for, so not from the thread that reads.
 *
 * Returns 0: run the vCPU again. Any thread but not from a callback (-EDEADLK); calls the fill callback.
 * -EINVAL: kuf is NULL, len is 0, overflow. -ENOENT: gpa is in no slot, or exit_flags lack
 *   KVM_MEMORY_EXIT_FLAG_USERFAULT (1 << 4) with a KVM mechanism: not a fault of the library's; handle it as without
 *   it.
 * -ERANGE: the range leaves its slot. -EHWPOISON: the page could not be filled: inject a machine check or stop the
 *   guest.
 * -ECANCELED: kuf_close has begun. -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
 * Kernel: KVM_EXIT_MEMORY_FAULT (KVM API, 5).
 */
int kuf_vcpu_fault(struct kuf *kuf, uint64_t gpa, uint64_t len, uint64_t exit_flags);

/*
 * Returns when gpa..gpa+len is present, filling it at demand priority: for host threads that touch guest memory where
 * the mechanism does not catch them, or that must not be stopped by a fault later (device models, vhost set-up, gdb
 * stubs).
 *
 * gpa, len: of any alignment, within one slot; len not 0. timeout_ms: milliseconds at most, -1 for ever, 0 does not
 * wait for others but still fills what nobody has begun.
 *
 * With a KVM mechanism, and in shared memory with KUF_OPEN_DETECT_ZERO, pages that the guest gave back become zero pages:
 * they take memory again.
 *
 * Returns 0: present or given back by the guest. Any thread but not from a callback (-EDEADLK); calls the fill
 * callback on the calling thread, so hold no lock that it takes. On a caller-driven handle the pages are queued for
 * kuf_read and waited for: not from the thread that reads.
 * -EINVAL: kuf is NULL, len is 0, overflow, timeout_ms below -1. -ENOENT: gpa is in no slot. -ERANGE: the range leaves
 *   its slot.
 * -ETIMEDOUT: not in time. -EHWPOISON: part of the range could not be filled. -ECANCELED: kuf_close has begun.
 * -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
 */
int kuf_ensure(struct kuf *kuf, uint64_t gpa, uint64_t len, int timeout_ms);

/*
 * Fills a range in the background, behind all demand, in address order, at no more than a given rate. Requests queue
 * up. KUF_EVENT_POPULATED ends each one; a fill that fails ends it early and poisons nothing, for nobody has touched
 * those pages. While more is demanded than fill_threads can serve it waits, but not for ever: it keeps about a
 * sixteenth of its pace.
 *
 * request: request->size set by the caller.
 *
 * Returns 0: queued (or stopped, with KUF_POPULATE_STOP). Any thread, also from callbacks.
 * -EINVAL: kuf or request is NULL, size below that of the first version, an unknown flag, gpa or len not a multiple of
 *   the host's page size, len is 0 (or not 0 with KUF_ALL), overflow. -E2BIG: request has non-zero bytes that this
 *   version does not know.
 * -ENOENT: no slot in the range. -ENOTSUP: the handle has no fill callback and no KUF_OPEN_SOURCES. -EIO: the service is dead.
 */
int kuf_populate(struct kuf *kuf,
                 const struct kuf_populate *request);

/*
 * Starts recording which pages are demanded, in which order, for kuf_replay at the next start from the same memory:
 * the working set. Demanded is what a fault, kuf_vcpu_fault or kuf_ensure asks for, with the pages that are filled
 * along with it; what was brought ahead of sequential access counts when access has come to its end. On a caller-driven
 * handle it is what kuf_read is given. Each page is recorded once. What is present when it
 * is first touched leaves no trace, so start before the guest runs, and let nothing fill ahead of it meanwhile
 * (kuf_populate, kuf_replay, kuf_resolve of pages nobody asked for): only what somebody comes to wait for is recorded
 * of that. Forked children's own copies are not recorded.
 *
 * flags: 0.
 *
 * Recording takes 16 bytes of memory for each run of neighbouring pages (up to twice that while the table grows) and
 * 512 bytes for each 16 MiB of guest memory that has demanded pages. Beyond 67108864 runs, or without memory for it,
 * pages are left out; a KUF_LOG_WARN record at kuf_record_stop says so.
 *
 * Returns 0. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, an unknown flag. -EALREADY: the handle is recording, or has a recording that could not be
 *   written. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
 */
int kuf_record_start(struct kuf *kuf, uint32_t flags);

/*
 * Ends the recording and writes it: guest physical addresses and lengths, nothing of this host. The format is that of
 * docs/record-format.md (KUF_RECORD_VERSION), about three bytes for each run of pages. kuf_close drops a recording
 * that was not written.
 *
 * fd: a file, pipe or stream socket to write it to, from where it stands; it is neither synced nor closed. -1: drop
 * the recording.
 *
 * Waits for fd as long as it takes, also when it is non-blocking, and kuf_close waits for it. SIGPIPE is as with
 * write(2).
 *
 * Returns 0. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, the handle is not recording. -EBADF: fd is below -1, not open or not open for writing; the
 *   recording goes on.
 * -ENOSPC, -EFBIG, -EDQUOT, -EIO, -EPIPE: as write(2); -ENOMEM: no memory to put the file together. The recording is
 *   over and kept: call again, with an fd that works (which gets all of it) or with -1.
 * -ECANCELED: kuf_close has begun. -EIO: also when the service is dead.
 */
int kuf_record_stop(struct kuf *kuf, int fd);

/*
 * Fills the pages of a recording in the background, in about the order in which they were demanded, behind all demand
 * and ahead of every kuf_populate, also of one that is running. Memory may be laid out otherwise than it was then, in
 * other slots and with another granule (whole granules are filled); what lies in no slot, is present or was given back
 * is skipped. The slots are those there are when the replay begins. KUF_EVENT_REPLAYED ends it; a fill that fails ends
 * it early, and poisons nothing but a page that somebody waits for. Replays queue up; KUF_POPULATE_STOP ends them.
 *
 * A guest that runs meanwhile catches up with it. While fills are quick, a fault at one of the pages that come next (of
 * up to 128 runs of the recording) is then left to the replay, which asks for the page with KUF_FILL_DEMAND, so that
 * the guest has many pages before it when it goes on. That takes some hundred microseconds at most as a rule; a fault
 * that was left for about a millisecond is served like any other. kuf_vcpu_fault and kuf_ensure are not left to it.
 *
 * fd: where kuf_record_stop has written, read from where it stands up to the end of the recording and not further;
 * waited for as long as it takes. It may be closed afterwards. flags: 0.
 *
 * The file need not be trusted: it says which pages are filled first and nothing else, and takes no more memory than
 * it is long.
 *
 * Returns 0: queued. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, an unknown flag, fd holds no recording. -EBADF: fd is not open for reading. -EBADMSG: the
 *   recording is damaged or ends early. -EPROTONOSUPPORT: it is of a newer version. -EFBIG: it has more than 67108864
 *   runs. -ENOENT: no part of it is in a memory slot (one that is empty is replayed at once).
 * -ENOTSUP: the handle has no fill callback and no KUF_OPEN_SOURCES. -ENOMEM: no memory for it. -EIO and others: as
 *   read(2). -ECANCELED: kuf_close has begun. -EIO: also when the service is dead.
 */
int kuf_replay(struct kuf *kuf, int fd, uint32_t flags);

/*
 * Drops the pages of gpa..gpa+len and arms them again: the next touch refills them from the source or, with
 * KUF_DISCARD_REMOVED, with zeroes. Poisoned pages become ordinary ones again (not in another process, where their
 * mark stays). A fill of such a page that is running is not used: it is asked for again. The host sees to it that the
 * guest does not use the range meanwhile; what it writes during the call may be lost. A shared file loses the bytes
 * for all its mappings.
 *
 * gpa, len: multiples of the granule, len not 0, within one slot. flags: 0 or KUF_DISCARD_REMOVED.
 *
 * Returns 0. Any thread, also from fill and event callbacks unless the slot has KUF_MEMORY_MEMSLOT (-EDEADLK).
 * -EINVAL: kuf is NULL, an unknown flag, misaligned, len is 0, overflow. -ENOENT: gpa is in no slot. -ERANGE: the
 *   range leaves its slot. -ENOTSUP: memory of another process without KUF_MEMORY_FD: only that process can drop it.
 * -ECANCELED: kuf_close has begun. -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
 * Kernel: madvise(MADV_DONTNEED); fallocate(FALLOC_FL_PUNCH_HOLE) for shared files, which is all that is done to
 * memory of another process.
 */
int kuf_discard(struct kuf *kuf, uint64_t gpa, uint64_t len, uint32_t flags);

/*
 * KUF_MECHANISM_KVM_BITMAP: the address of the bitmap of the slot that starts at gpa, for
 * kvm_userspace_memory_region2.userfault_bitmap (offset 48) of the memslot that the host sets with KVM_MEM_USERFAULT
 * (1 << 3). One bit for each 4 KiB, set where a vCPU is to exit; only the library writes it.
 *
 * After KUF_EVENT_COMPLETE the host may take the flag off the memslot, which makes huge mappings possible again, and
 * puts it on again before kuf_discard if it wants exits; without the flag everybody is caught by the userfaultfd
 * underneath. It changes memslots on a thread of its own, not in a callback: KVM waits for those who wait for pages.
 *
 * address: set on success.
 *
 * Returns 0. Any thread, also from callbacks. The bitmap is unmapped by kuf_remove_memory and kuf_close: take the flag
 * off before.
 * -EINVAL: kuf or address is NULL. -ENOENT: no slot starts at gpa. -ENOTSUP: another mechanism. -ECANCELED: kuf_close
 *   has begun. -EIO: the service is dead.
 * Kernel: KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT.
 */
int kuf_kvm_bitmap(struct kuf *kuf, uint64_t gpa, uint64_t *address);

/*
 * Names pages that KVM itself reads or writes: kvmclock, steal time, PV EOI, interrupt controller tables. They are the
 * first to be filled when a fault was lost (KUF_EVENT_SWEEP). Fill them before vCPUs run (kuf_ensure) where that is
 * possible: who waits for one stays inside KVM.
 *
 * gpa, len: of any alignment, within one slot; len not 0. Remembered until the slot is removed.
 *
 * Returns 0. Any thread, also from fill and event callbacks. Of use with KUF_MECHANISM_KVM_ASYNC; without effect with
 * others.
 * -EINVAL: kuf is NULL, len is 0, overflow. -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot.
 * -ECANCELED: kuf_close has begun. -EIO: the service is dead.
 */
int kuf_kvm_owned(struct kuf *kuf, uint64_t gpa, uint64_t len);

/*
 * Returns when nobody is known to wait for a page, for work that waits inside the kernel for those who wait: changes
 * of memslots, ioeventfds and coalesced MMIO ranges on a kernel with KVM asynchronous userfaults, where a waiter may
 * keep them, and they the waiter. Stop the vCPUs first, and make no other call that has KVM touch guest memory until
 * the change is made.
 *
 * timeout_ms: milliseconds at most, -1 for ever, 0 does not wait.
 *
 * Fills that somebody inside the kernel waits for are waited for: hold no lock that the fill callback takes.
 *
 * Returns 0. Any thread but not from a callback (-EDEADLK), and on a caller-driven handle not the thread that reads.
 * -EINVAL: kuf is NULL, timeout_ms below -1. -ETIMEDOUT: pages are still waited for. -EHWPOISON: KVM waits for a page
 *   that is poisoned (KUF_EVENT_PARKED); said once for each such page. -ECANCELED: kuf_close has begun. -EIO: the
 *   service is dead.
 */
int kuf_quiesce(struct kuf *kuf, int timeout_ms);

/*
 * Lists what the host has been asked for and has not resolved: runs deferred or still inside their fill callback, and
 * faults taken with kuf_read (or waiting to be). To be asked for again from a source that has come back after its
 * connection was lost.
 *
 * faults: room for n entries, in order of gpa; may be NULL when n is 0.
 *
 * Returns the number of runs pending, which may be more than n. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, faults is NULL and n is not 0. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
 */
ssize_t kuf_pending(struct kuf *kuf, struct kuf_fault *faults, size_t n);

/*
 * How far the slot that holds gpa is, or all slots with KUF_ALL.
 *
 * out: out->size set by the caller.
 *
 * Returns 0. Any thread, also from callbacks.
 * -EINVAL: kuf or out is NULL, size below that of the first version. -ENOENT: gpa is in no slot.
 */
int kuf_progress(struct kuf *kuf, uint64_t gpa, struct kuf_progress *out);

/*
 * Counters and latency histograms since kuf_open.
 *
 * out: out->size set by the caller.
 *
 * Returns 0. Any thread, also from callbacks.
 * -EINVAL: kuf or out is NULL, size below that of the first version.
 */
int kuf_stats(struct kuf *kuf, struct kuf_stats *out);

/*
 * Names the threads for which kuf_stats.blocked_all_ns is kept: the vCPUs, whose common wait is time that the guest does
 * not run at all. Replaces those of the last call and keeps the time counted so far. A thread that waits already counts
 * from its next fault on.
 *
 * threads: n thread ids as in gettid(2), in the pid namespace of the process that opened the userfaultfd; may be NULL
 * when n is 0, which ends it. Copied; one that is named twice counts once.
 *
 * Where the kernel does not name threads (KUF_FEATURE_THREAD_ID) the time stays 0, and so for those who wait in
 * kuf_ensure and kuf_vcpu_fault.
 *
 * Returns 0. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, threads is NULL and n is not 0, n is above 65536, a thread id is 0.
 */
int kuf_watch_threads(struct kuf *kuf, const uint32_t *threads, size_t n);

/*
 * How long each thread was kept waiting, longest sum first; empty where the kernel does not name threads
 * (KUF_FEATURE_THREAD_ID).
 *
 * times: room for n entries; may be NULL when n is 0.
 *
 * Returns the number of threads known, which may be more than n. Any thread, also from callbacks.
 * -EINVAL: kuf is NULL, times is NULL and n is not 0.
 */
ssize_t kuf_block_times(struct kuf *kuf, struct kuf_block_time *times, size_t n);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KUF_H */
