//! The types of the C ABI. Their documentation is the header's: it is written for somebody who reads `kuf.h` first
//! and nothing else.
//!
//! Growth rule: a struct that the caller fills starts with `size`; fields are only ever added at the end.

#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_void};

/// Major version of this header. The soname changes with it.
pub const KUF_VERSION_MAJOR: u32 = 0;
/// Minor version of this header: calls, flags or fields were added.
pub const KUF_VERSION_MINOR: u32 = 1;
/// Patch version of this header: nothing a caller can name has changed.
pub const KUF_VERSION_PATCH: u32 = 0;

/// In place of a gpa: every memory slot of the handle.
pub const KUF_ALL: u64 = 0xffff_ffff_ffff_ffff;

/// Let the library choose: the best mechanism whose behaviour it can establish on this kernel.
pub const KUF_MECHANISM_AUTO: u32 = 0;
/// userfaultfd(2). Every Linux with CONFIG_USERFAULTFD; catches vCPUs, KVM itself, vhost and the VMM's own threads
/// alike.
pub const KUF_MECHANISM_USERFAULTFD: u32 = 1;
/// KVM userfault bitmap (KVM_MEM_USERFAULT), with userfaultfd underneath. A vCPU that touches an absent page leaves
/// KVM_RUN and fills it on its own thread (kuf_vcpu_fault); everybody else is caught as with userfaultfd. Needs
/// KUF_OPEN_VM_FD and a kernel with v3 of that interface (June 2025), which no released kernel has; never chosen by
/// KUF_MECHANISM_AUTO.
pub const KUF_MECHANISM_KVM_BITMAP: u32 = 2;
/// KVM asynchronous userfault (KVM_READ_USERFAULT). As above for vCPUs; KVM's own accesses wait inside KVM, and service
/// threads take them from its queue. Nothing is registered with userfaultfd: bytes are written straight into the slot's
/// mapping, and nothing but KVM is kept off pages that are not present: the VMM's own threads call kuf_ensure before
/// they touch guest memory.
///
/// Needs KUF_OPEN_VM_FD and a kernel with the interface of the RFC of July 2024, which no released kernel has; never
/// chosen by KUF_MECHANISM_AUTO. In return the host keeps to this: memory is added before a vCPU loads its MSRs (KVM
/// holds on to what it has looked up; touched memory is refused with -EBUSY); memslots are changed only after
/// kuf_quiesce with all vCPUs stopped; KVM_SET_MEMORY_ATTRIBUTES is left to the library for these ranges; memory that
/// the guest gives back is reported with kuf_discard(..., KUF_DISCARD_REMOVED), and is not unmapped or moved before
/// kuf_remove_memory; the memory is in one memslot range only (a second gpa for it is not marked); what an ioctl other
/// than KVM_RUN reads of guest memory is present before (kuf_ensure), for it fails with EFAULT or waits; the handle is
/// used in the process that made the VM (KVM answers any other with EIO, which ends the service).
pub const KUF_MECHANISM_KVM_ASYNC: u32 = 3;
/// Number of mechanism names, KUF_MECHANISM_AUTO included: the length of the arrays in struct kuf_probe.
pub const KUF_MECHANISM_COUNT: usize = 4;

/// kuf_options.vm_fd holds a KVM VM file descriptor.
pub const KUF_OPEN_VM_FD: u64 = 1 << 0;
/// Accept a userfaultfd that catches user-mode accesses only (UFFD_USER_MODE_ONLY). It needs no privilege and cannot
/// serve a KVM guest: KVM's accesses are kernel accesses and would fail with EFAULT. For tests and emulators.
pub const KUF_OPEN_USER_MODE_ONLY: u64 = 1 << 1;
/// Serve children too: when the process forks, the child's unfilled guest memory is filled from the same source
/// (UFFD_FEATURE_EVENT_FORK; needs CAP_SYS_PTRACE). Without it a child that touches an unfilled page of memory that
/// was not set MADV_DONTFORK reads zeroes: the kernel drops the registration at fork.
///
/// The first kuf_open with it registers fork handlers (pthread_atfork), which stay for the life of the process. From
/// the library's `prepare` to its `parent` handler no page of these handles is opened: a handler of the host's that was
/// registered before must not wait for a thread that may be waiting for one.
pub const KUF_OPEN_FOLLOW_FORK: u64 = 1 << 2;
/// Caller-driven with no service thread: kuf_read reads the kernel itself, which saves one thread wake-up a fault.
/// Only without a fill callback. The library's own userfaultfd then reports no REMOVE, REMAP, UNMAP or FORK events
/// (a host thread that gives memory back would wait for the very loop it may be running in): report memory that the
/// guest gives back with kuf_discard(..., KUF_DISCARD_REMOVED), and do not mremap or munmap it before
/// kuf_remove_memory. kuf_populate and KUF_OPEN_FOLLOW_FORK are not available.
pub const KUF_OPEN_DIRECT: u64 = 1 << 3;
/// Open no userfaultfd: every slot brings one (KUF_MEMORY_UFFD). For a handler that serves other processes and has no
/// privilege of its own.
pub const KUF_OPEN_ADOPT_ONLY: u64 = 1 << 4;

/// KUF_MECHANISM_KVM_ASYNC: the kernel answers KVM_READ_USERFAULT on an empty queue with ENOENT, which the host vouches
/// for (as posted, the RFC oopses there). The library then also looks into the queue twice a second without having been
/// signalled, so that a signal that KVM dropped, or that somebody else has read, delays a fault and does not lose it
/// (KUF_EVENT_UNSIGNALLED). With KUF_OPEN_DIRECT it is kuf_read that looks.
pub const KUF_OPEN_KVM_DRAIN: u64 = 1 << 5;
/// Look through what fill callbacks, sources and kuf_resolve bring, page by page, before it is put in place, and open
/// pages of zeroes as such. In private memory of ordinary pages they then take no memory until they are written, and
/// cost a small part of a copy. They count in kuf_stats.bytes_zeroed.
///
/// In shared memory a zero page would take memory like any other. Those that nobody waits for are therefore left out:
/// they stay a hole in the file, count as removed (kuf_progress) and are made when they are touched, as pages are that
/// the guest has given back; kuf_ensure makes them (and pages that the guest has given back take memory again there).
/// Huge pages are zero when all of the page is; private ones are not looked at. With KUF_MECHANISM_KVM_ASYNC the memory
/// that zeroes were written to is given back before the guest sees it.
pub const KUF_OPEN_DETECT_ZERO: u64 = 1 << 6;
/// Serviced without a fill callback: every slot brings its own source (kuf_memory.source). Not with KUF_OPEN_DIRECT.
/// Of no effect together with a fill callback, which slots without a source then use.
pub const KUF_OPEN_SOURCES: u64 = 1 << 7;

/// kuf_source: a regular file or a block device, kuf_source.fd. What is in the page cache is copied from there without
/// another copy; what is not is read ahead. Holes are zero and are not read. A file that has become shorter, or whose
/// disk fails, makes fills fail: pages are poisoned (KUF_EVENT_POISONED) and no signal is raised.
///
/// The file stays mapped for as long as the slot is there, so that its cached pages count in the process's RssFile.
pub const KUF_SOURCE_FILE: u32 = 1;
/// kuf_source: memory of this process, kuf_source.addr.
pub const KUF_SOURCE_MEMORY: u32 = 2;
/// kuf_source: zeroes.
pub const KUF_SOURCE_ZERO: u32 = 3;

/// kuf_source.flags, with KUF_SOURCE_FILE: read past the page cache (O_DIRECT), so that an image that is used once drives
/// nothing out of it. Not faster where there is room: the page cache reads ahead. offset is a multiple of 4096 then.
pub const KUF_SOURCE_DIRECT_IO: u64 = 1 << 0;

/// Somebody stands still until this run is resolved.
pub const KUF_FILL_DEMAND: u32 = 1 << 0;
/// kuf_fill.buf is the guest page itself, reached by a way the guest cannot see through yet: a second mapping of a
/// shared file, or, with KUF_MECHANISM_KVM_ASYNC, the slot's own mapping, from which a mark keeps the guest.
/// Nothing is copied afterwards. The buffer's content is undefined at the start. When the callback returns
/// KUF_DEFERRED the buffer stays valid until the run is resolved, so data may be received straight into it and
/// published with KUF_RESOLVE_IN_PLACE; such a run must be resolved (or poisoned) in the end. KUF_CLOSE_POISON takes the
/// buffer away: stop writing to it before.
pub const KUF_FILL_IN_PLACE: u32 = 1 << 1;
/// The fault is a forked child's (KUF_OPEN_FOLLOW_FORK); gpa is that of the parent's slot.
pub const KUF_FILL_FORKED: u32 = 1 << 2;

/// Fill callback: kuf_fill.buf holds the bytes of the first kuf_fill.filled bytes of the run.
pub const KUF_FILLED: c_int = 0;
/// Fill callback: the first kuf_fill.filled bytes of the run are zero; buf was not written.
pub const KUF_ZERO: c_int = 1;
/// Fill callback: the host will call kuf_resolve for every page of the run later, from any thread, in any pieces. Until
/// then none of it is asked for again, whoever touches it. That holds without KUF_FILL_DEMAND too: to decline what
/// nobody waits for, return -EAGAIN instead; it poisons nothing, and the pages are asked for again when they are touched.
pub const KUF_DEFERRED: c_int = 2;

/// kuf_memory.fd and fd_offset name the shared file (memfd, tmpfs, hugetlbfs) that is mapped MAP_SHARED at hva.
/// Pages are then filled in place where the kernel supports minor faults.
pub const KUF_MEMORY_FD: u32 = 1 << 0;
/// kuf_memory.uffd is a userfaultfd the host has opened (UFFDIO_API done). The library duplicates it, sets O_NONBLOCK
/// on it and is from then on its only reader.
pub const KUF_MEMORY_UFFD: u32 = 1 << 1;
/// kuf_memory.hva is an address of another process, the one that opened kuf_memory.uffd. Needs KUF_MEMORY_UFFD.
pub const KUF_MEMORY_REMOTE: u32 = 1 << 2;
/// Ask the source for every page, whatever the file already holds. Without it, ranges of a KUF_MEMORY_FD file that hold
/// data when the slot is added count as present and keep their bytes. Use it when a handler that died may have left
/// half-filled pages behind, before anything touches or populates the memory (filling in place writes over what the
/// guest has changed), and mark pages known to be whole with KUF_RESOLVE_IN_PLACE.
pub const KUF_MEMORY_FILL_ALL: u32 = 1 << 3;

/// KUF_MECHANISM_KVM_BITMAP: the library sets the memslot kuf_memory.memslot itself (KVM_SET_USER_MEMORY_REGION2, with
/// this slot's gpa, len and hva): made, or changed if the host has made it, with KVM_MEM_USERFAULT when the slot is
/// added and before kuf_discard, without when every page is present and when the slot is removed. Not with
/// KUF_OPEN_DIRECT.
///
/// From kuf_add_memory until kuf_remove_memory or kuf_close has returned the memslot is the library's: the host neither
/// changes nor deletes it (a host that turns dirty logging on and off sets the memslot itself, with kuf_kvm_bitmap).
/// KVM makes a change wait for everybody who waits for a page of the VM. So kuf_add_memory, kuf_discard,
/// kuf_remove_memory and kuf_close on such a slot do, and may be called neither by a thread that resolves pages nor
/// with a lock held that resolving pages needs.
pub const KUF_MEMORY_MEMSLOT: u32 = 1 << 4;
/// Huge pages are wanted: guest memory that is filled ahead of demand (kuf_populate, kuf_replay, kuf_ensure of a large
/// range, KUF_CLOSE_POPULATE) shall end on transparent huge pages, where the guest's later accesses are faster. A wish:
/// where it cannot be had, pages are filled as without it, and a KUF_LOG_INFO record says so.
///
/// For private anonymous memory of this process, with a granule of 4 KiB, under userfaultfd. A stretch of 2 MiB (of host
/// addresses, aligned) that is wholly absent is asked for in one fill, also where populate_run or demand_run are less,
/// and moved to the guest as one page if all of it was filled. Single pages are what demand has filled before, what is
/// filled in part or with KUF_ZERO, what kuf_resolve brings, and stretches in which KUF_OPEN_DETECT_ZERO finds zeroes.
/// Whoever touches a page of a stretch that is being filled waits for all of it.
///
/// Needs UFFDIO_MOVE (Linux 6.8) and huge pages for this process (/sys/kernel/mm/transparent_hugepage/enabled is not
/// "never"). Memory that is locked is left on single pages, unless all of the process is (MCL_FUTURE). The NUMA policy
/// of the mapping is followed, but one that interleaves leaves it on single pages. For KVM to map a huge page, gpa and
/// hva have to agree modulo 2 MiB.
///
/// madvise(MADV_HUGEPAGE) on the guest memory is not needed, and makes demand slower: the kernel then zeroes 2 MiB before
/// it announces the first write to a stretch that has no page yet. What demand has filled page by page, the host can put
/// on huge pages once it is present: with that advice, which khugepaged follows in its own time, or with
/// madvise(MADV_COLLAPSE) (Linux 6.1), while which no page fault of the process goes on.
///
/// Kernel: UFFDIO_MOVE; madvise(MADV_HUGEPAGE) on memory of the library's own. See KUF_FEATURE_HUGE.
pub const KUF_MEMORY_HUGE: u32 = 1 << 5;

/// A write caused the fault.
pub const KUF_FAULT_WRITE: u32 = 1 << 0;
/// The page is in the page cache of a shared file but not mapped (UFFD_PAGEFAULT_FLAG_MINOR).
pub const KUF_FAULT_MINOR: u32 = 1 << 1;
/// Somebody waits for this page now; not set for pages that only kuf_populate asked for.
pub const KUF_FAULT_DEMAND: u32 = 1 << 2;
/// The fault is a forked child's (KUF_OPEN_FOLLOW_FORK). Resolve it like any other: kuf_resolve serves parent and
/// child.
pub const KUF_FAULT_FORKED: u32 = 1 << 3;
/// KVM itself waits for the page, in its own access and not a vCPU's exit (KUF_MECHANISM_KVM_ASYNC).
pub const KUF_FAULT_KVM: u32 = 1 << 4;

/// kuf_resolve: src is NULL and the range is zero.
pub const KUF_RESOLVE_ZERO: u32 = 1 << 0;
/// kuf_resolve: src is NULL and the bytes are in the shared file already (written through another mapping, pwrite,
/// or kuf_fill.buf / kuf_fault.place). Only for slots that are filled in place; with KUF_MECHANISM_KVM_ASYNC, all are.
pub const KUF_RESOLVE_IN_PLACE: u32 = 1 << 1;
/// kuf_resolve: src is NULL and the bytes are lost. Touching these pages raises SIGBUS; an event is raised. Touched by
/// a guest, KVM sends it to the vCPU thread (BUS_MCEERR_AR, with the hva) and KVM_RUN returns EINTR; with a KVM
/// mechanism the vCPU exits and kuf_vcpu_fault returns -EHWPOISON. Undone by kuf_discard.
///
/// KVM's own access (an emulated instruction) to such a page may come out as KVM_EXIT_MMIO with an address inside a
/// slot: KVM takes memory that it cannot read for a device. Do not answer it as one: kuf_ensure says -EHWPOISON for it.
/// With KUF_MECHANISM_KVM_ASYNC it waits instead (KUF_EVENT_PARKED).
pub const KUF_RESOLVE_POISON: u32 = 1 << 2;
/// kuf_resolve: src is NULL, and the library looks which pages of the range hold their bytes already: private memory of
/// this process that was filled before kuf_add_memory, or by the host's own UFFDIO_COPY on a userfaultfd that it brought.
/// These become present, and who waits for them is woken; the others stay what they were and are no error. It takes two
/// looks at the page tables for 256 KiB. (KUF_RESOLVE_ZERO, which does not replace a page that is there, takes a system
/// call for each page, and makes a page of zeroes where there is none.)
///
/// A page is there when touching it raises no fault that the library would hear of: it is mapped (the kernel's page of
/// zeroes too, which memory holds that was only read) or swapped out. Of what is swapped out these pages are not found:
/// write-protected ones (UFFDIO_WRITEPROTECT), shared ones, and any if /proc/self/pagemap cannot be opened. A page that
/// was marked with UFFDIO_POISON before the slot was added may be found: touching it raises SIGBUS as before.
pub const KUF_RESOLVE_PRESENT: u32 = 1 << 3;

/// kuf_discard: the guest gave the range back (balloon, free page reporting): it reads as zero from now on. Without
/// it, the range refills from the source.
pub const KUF_DISCARD_REMOVED: u32 = 1 << 0;

/// kuf_populate: stop every populate request and every replay (kuf_replay) that is still running; gpa and len are
/// ignored.
pub const KUF_POPULATE_STOP: u32 = 1 << 0;
/// kuf_close, kuf_remove_memory: poison what is still unresolved, so that touching it raises SIGBUS. What a shared file
/// holds there is dropped, in all its mappings; the poison itself is on the slot's own mapping. End the vCPUs: one that
/// is inside KVM may leave it with KVM_EXIT_MMIO at an address in RAM (see KUF_RESOLVE_POISON).
///
/// In the own process, runs of 1 GiB and more are made PROT_NONE instead (KUF_EVENT_CLOSED_OFF; touching them raises
/// SIGSEGV, and KVM_RUN fails with EFAULT): to poison a terabyte takes many seconds and 2 GiB of page tables. Undone by
/// mprotect(2).
pub const KUF_CLOSE_POISON: u32 = 1 << 0;
/// kuf_close, kuf_remove_memory: fill what is still unresolved first. A page that cannot be filled makes the call fail
/// with -EIO and leaves the handle open, unless KUF_CLOSE_POISON is given too.
pub const KUF_CLOSE_POPULATE: u32 = 1 << 1;
/// kuf_close: do not wait for fill callbacks that are still running. Their results are dropped;
/// kuf_options.release is called when the last one has returned, and opaque must stay valid until then.
///
/// With KUF_MECHANISM_KVM_ASYNC a callback writes to guest memory itself, which has to stay mapped until then too. What
/// is poisoned keeps its marks and userfaults stay enabled on the VM: vCPUs go on exiting at these pages, and who waits
/// inside KVM for one stays there until it is killed. For a VM that is about to go.
pub const KUF_CLOSE_NOWAIT: u32 = 1 << 2;
/// kuf_close: leave unresolved pages closed and registered, because the host hands its own descriptor of the
/// userfaultfd to another handler; who waits is announced there anew. Only when every slot was added with
/// KUF_MEMORY_UFFD, and not with KUF_CLOSE_POISON or KUF_CLOSE_POPULATE.
pub const KUF_CLOSE_HANDOVER: u32 = 1 << 3;

/// kuf_progress.flags: every page of the range is present or removed. The slot can be taken off the library with
/// kuf_remove_memory, and no cost stays behind.
pub const KUF_PROGRESS_COMPLETE: u32 = 1 << 0;
/// kuf_progress.flags: the process behind the slot is gone, or its userfaultfd cannot be read (KUF_EVENT_GONE).
pub const KUF_PROGRESS_GONE: u32 = 1 << 1;

/// Pages gpa..gpa+len could not be filled (error says why) and are poisoned: touching them raises SIGBUS.
pub const KUF_EVENT_POISONED: u32 = 1;
/// Pages gpa..gpa+len could not be filled and the kernel cannot poison them (before Linux 6.6), or there are too many for
/// that (KUF_CLOSE_POISON). In the own process they were made PROT_NONE (touching raises SIGSEGV); in another process
/// whoever touches them stays blocked.
pub const KUF_EVENT_CLOSED_OFF: u32 = 2;
/// Every page of the slot gpa..gpa+len is present or removed: the time for kuf_remove_memory without flags. Not raised
/// for a slot with poisoned pages, which kuf_close and kuf_remove_memory do accept.
pub const KUF_EVENT_COMPLETE: u32 = 3;
/// A kuf_populate request over gpa..gpa+len (0 and 0 for KUF_ALL) has ended; error is 0, or the -errno of the fill that
/// stopped it, or -ECANCELED (KUF_POPULATE_STOP). Not raised for requests that kuf_close cuts off.
pub const KUF_EVENT_POPULATED: u32 = 4;
/// The process behind the slot gpa..gpa+len is gone (error: -ESRCH), or its userfaultfd cannot be read (that -errno).
/// Noticed within a second. Memory that was unmapped counts as removed instead.
pub const KUF_EVENT_GONE: u32 = 5;
/// The service of this handle is dead after a failure inside the library. Unresolved pages stay closed; every call that
/// serves memory fails with -EIO; kuf_close poisons them.
pub const KUF_EVENT_FATAL: u32 = 6;
/// The process forked and the child's memory is served as well (KUF_OPEN_FOLLOW_FORK); with an error: it is not.
pub const KUF_EVENT_FORKED: u32 = 7;

/// KVM lost a fault and nobody knows of which page (KVM_READ_USERFAULT failed with EFAULT). Every page that is not
/// present may be waited for: the library asks for those of kuf_kvm_owned first and then, with a fill callback, fills
/// everything in the background, poisoning what cannot be filled. A caller-driven host resolves everything.
pub const KUF_EVENT_SWEEP: u32 = 8;
/// KVM itself waits for the page gpa..gpa+len, which is poisoned: a vCPU stays inside KVM_RUN for it until its thread
/// is killed, or the page is discarded (kuf_discard) and filled. KUF_MECHANISM_KVM_ASYNC only: there is nothing that
/// could make its access fail. Once for each page.
pub const KUF_EVENT_PARKED: u32 = 9;
/// KVM queued a fault and its signal did not come: somebody else reads the library's eventfd, or KVM dropped the
/// signal. Found only with KUF_OPEN_KVM_DRAIN. Raised once.
pub const KUF_EVENT_UNSIGNALLED: u32 = 10;
/// A kuf_replay has ended; error is 0, or the -errno of the fill that stopped it, or -ECANCELED (KUF_POPULATE_STOP).
/// gpa and len are 0. Not raised for replays that kuf_close cuts off.
pub const KUF_EVENT_REPLAYED: u32 = 11;

/// Log levels, most urgent first. A record is passed on when its level is at most kuf_options.log_level.
pub const KUF_LOG_ERROR: u32 = 1;
/// Something the host may want to act on.
pub const KUF_LOG_WARN: u32 = 2;
/// Once per open, slot or request.
pub const KUF_LOG_INFO: u32 = 3;
/// Once per kernel event other than a page fault.
pub const KUF_LOG_DEBUG: u32 = 4;

/// Largest kuf_options.spin_us.
pub const KUF_SPIN_MAX: u32 = 10000;

/// Largest kuf_options.userfaultfds.
pub const KUF_USERFAULTFDS_MAX: u32 = 64;

/// Version of the file that kuf_record_stop writes (docs/record-format.md), and the newest that kuf_replay reads.
pub const KUF_RECORD_VERSION: u32 = 1;

/// Latency histograms have one bucket per power of two nanoseconds: bucket i counts values in [2^i, 2^(i+1)), bucket 0
/// also those below 1 ns, the last one everything longer.
pub const KUF_HISTOGRAM_BUCKETS: usize = 40;

/// Features to ask kuf_has_feature about: UFFDIO_POISON works on this kernel.
pub const KUF_FEATURE_POISON: u32 = 1;
/// Shared memory can be filled in place on this kernel (minor faults).
pub const KUF_FEATURE_MINOR: u32 = 2;
/// The kernel names the faulting thread: kuf_block_times works.
pub const KUF_FEATURE_THREAD_ID: u32 = 3;
/// userfaultfd serves KVM guests for this process (kernel-mode faults are allowed).
pub const KUF_FEATURE_KERNEL_FAULTS: u32 = 4;
/// userfaultfd works for this process at least for user-mode faults (KUF_OPEN_USER_MODE_ONLY).
pub const KUF_FEATURE_USER_FAULTS: u32 = 5;
/// Memory can be filled on huge pages (KUF_MEMORY_HUGE): the kernel has UFFDIO_MOVE and a huge page to give.
pub const KUF_FEATURE_HUGE: u32 = 6;

/// One VM's fault service. Opaque; made by kuf_open, ended by kuf_close.
///
/// Every call may be made from any thread at any time unless its text says otherwise. A handle that was closed is
/// recognised for as long as the process lives and answered with -EBADF. The handle belongs to the process that
/// opened it: in a forked child every call answers -ECHILD.
pub struct kuf {
    _opaque: [u8; 0],
}

/// What this host can do. Filled by kuf_probe.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_probe {
    /// sizeof(struct kuf_probe), set by the caller. Fields the library does not know are zeroed.
    pub size: u32,
    /// The KUF_MECHANISM_* that KUF_MECHANISM_AUTO would choose; KUF_MECHANISM_AUTO (0) when none works.
    pub recommended: u32,
    /// Bit (1 << KUF_MECHANISM_*) for each mechanism that kuf_open would accept now.
    pub mechanisms: u32,
    /// The granule of ordinary memory: the host's page size in bytes.
    pub page_size: u32,
    /// UFFD_FEATURE_* bits the kernel offers; 0 when userfaultfd cannot be opened.
    pub uffd_features: u64,
    /// For each mechanism: 0 when it works, else the -errno that kuf_open would return.
    pub error: [i32; KUF_MECHANISM_COUNT],
    /// For each mechanism: in words, how it works here (which way userfaultfd was opened) or why it does not and what
    /// to do about it. NUL-terminated.
    pub why: [[c_char; 512]; KUF_MECHANISM_COUNT],
}

/// A run of pages to be filled, as handed to the fill callback. Valid until the callback returns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_fill {
    /// sizeof(struct kuf_fill) as the library knows it: fields beyond it are not there.
    pub size: u32,
    /// KUF_FILL_*.
    pub flags: u32,
    /// First guest physical address of the run; a multiple of granule.
    pub gpa: u64,
    /// Bytes wanted; a multiple of granule. Never holds a page that is present.
    pub len: u64,
    /// Where to write len bytes. Page-aligned. Content undefined at the start.
    pub buf: *mut c_void,
    /// len at the start. A callback that got only part may lower it, to a multiple of granule above 0, and return
    /// KUF_FILLED or KUF_ZERO: the rest is asked for again when it is wanted. Ignored for KUF_DEFERRED.
    pub filled: u64,
    /// Page size of the slot in bytes.
    pub granule: u64,
    /// kuf_memory.opaque of the slot.
    pub memory_opaque: *mut c_void,
    /// gpa minus the slot's gpa: the offset in an image of this slot.
    pub memory_offset: u64,
    /// NULL at the start. A callback that has the bytes in memory (a mapped image) may set it to the first of `filled`
    /// readable bytes, of any alignment, and return KUF_FILLED without having written to buf: they are copied from there
    /// straight to the guest. They stay where they are, unchanged, until kuf_remove_memory of the slot or kuf_close has
    /// returned (with KUF_CLOSE_NOWAIT, until kuf_options.release is called). What turns out unreadable (a mapped file that
    /// was truncated) is a fill that failed with -EFAULT, guest memory that is not present itself one with -EDEADLK.
    pub src: *const c_void,
    /// With KUF_FILL_DEMAND: thread id of the first toucher, where the kernel names it (KUF_FEATURE_THREAD_ID). 0: not
    /// known, or nobody waits, or it is the calling thread itself (kuf_ensure, kuf_vcpu_fault).
    pub thread: u32,
    /// Zero.
    pub reserved: u32,
}

/// A page fault, as given by kuf_read and kuf_pending. Always 64 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_fault {
    /// Guest physical address; a multiple of the slot's granule.
    pub gpa: u64,
    /// Bytes to resolve: one granule from kuf_read, a run of pages in the same state from kuf_pending.
    pub len: u64,
    /// KUF_FAULT_*.
    pub flags: u32,
    /// Thread id of the first toucher, where the kernel names it (KUF_FEATURE_THREAD_ID); else 0.
    pub thread: u32,
    /// Nanoseconds since the fault was read from the kernel, or since the page was asked for.
    pub age_ns: u64,
    /// kuf_memory.opaque of the slot.
    pub memory_opaque: *mut c_void,
    /// gpa minus the slot's gpa.
    pub memory_offset: u64,
    /// Where the page's bytes may be written before kuf_resolve(..., KUF_RESOLVE_IN_PLACE); NULL when the slot is not
    /// filled in place. Valid until the page is resolved. NULL from kuf_pending.
    pub place: *mut c_void,
    /// Zero.
    pub reserved: u64,
}

/// Something the host should know, as handed to the event callback. Valid until the callback returns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_event {
    /// sizeof(struct kuf_event) as the library knows it.
    pub size: u32,
    /// KUF_EVENT_*.
    pub kind: u32,
    /// Range concerned, in guest physical bytes; 0 and 0 when the event concerns the handle.
    pub gpa: u64,
    /// Length of the range in bytes.
    pub len: u64,
    /// 0, or the -errno behind the event.
    pub error: i32,
    /// Zero.
    pub reserved: u32,
    /// The same in words. Never NULL.
    pub text: *const c_char,
}

/// Fills pages. Returns KUF_FILLED, KUF_ZERO, KUF_DEFERRED, or -errno: the source has failed for good. A run is then
/// asked for again page by page where somebody waits; a single page that fails is poisoned and KUF_EVENT_POISONED is
/// raised. Any other value is a failure with -EPROTO.
///
/// Called on a service thread ("kuf-serve-N", "kuf-populate"), or on the host thread that is inside kuf_ensure,
/// kuf_vcpu_fault, or kuf_close or kuf_remove_memory with KUF_CLOSE_POPULATE; by several threads at once for different
/// runs. No lock is held. It may block and take its time: other pages are served while a fill thread is free. It may
/// call kuf_resolve (also for its own run, then return KUF_DEFERRED), kuf_discard, kuf_pending, kuf_populate,
/// kuf_record_start, kuf_record_stop, kuf_replay, kuf_kvm_owned, kuf_kvm_bitmap, kuf_progress, kuf_stats,
/// kuf_watch_threads and kuf_block_times. Calls that could wait for it return -EDEADLK, on any handle: kuf_close,
/// kuf_add_memory, kuf_remove_memory, kuf_poll, kuf_read, kuf_ensure, kuf_vcpu_fault, kuf_quiesce; and, on a slot with
/// KUF_MEMORY_MEMSLOT, kuf_discard. It must not touch unresolved guest memory (it would wait for itself). A Rust panic
/// is caught and counts as -ENOTRECOVERABLE; a C++ exception or longjmp must not leave it.
pub type kuf_fill_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, fill: *mut kuf_fill) -> c_int>;

/// Told about what happened. Called on whichever thread found out, with no lock held, after the state has changed.
/// May call what a fill callback may call, and kuf_remove_memory. Should return soon: the thread serves faults.
pub type kuf_event_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, event: *const kuf_event)>;

/// Given log records: level is KUF_LOG_*, text one line without newline, valid during the call. Called on any thread.
/// Must not call the library. The library prints nothing itself.
pub type kuf_log_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, level: u32, text: *const c_char)>;

/// Called exactly once, when the library will never again use opaque or call any callback: before a kuf_close that
/// waits returns, or on the last thread that leaves the library after KUF_CLOSE_NOWAIT. Not called when kuf_open fails.
/// Must not call the library.
pub type kuf_release_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void)>;

/// How to open a service. Zero means the default in every field.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_options {
    /// sizeof(struct kuf_options), set by the caller.
    pub size: u32,
    /// KUF_MECHANISM_*.
    pub mechanism: u32,
    /// KUF_OPEN_*.
    pub flags: u64,
    /// The VM's file descriptor with KUF_OPEN_VM_FD, else 0. Needed by the KVM mechanisms, which duplicate it; checked
    /// but not used by userfaultfd. The host keeps its own.
    pub vm_fd: i32,
    /// Threads that may be inside a fill callback at once, besides the one that always watches for faults:
    /// 1 to 256, 0 for 2. One more brings pages ahead of touchers, unless demand_run is one page of the host's or less;
    /// with kuf_populate or KUF_MECHANISM_KVM_BITMAP, yet one more. Ignored without a fill callback and KUF_OPEN_SOURCES.
    pub fill_threads: u32,
    /// What one fault may bring at most, in bytes, its own page included: 0 for 2 MiB, at most 64 MiB. Rounded to whole
    /// granules, at least one. One granule: each fault brings its page and nothing else.
    ///
    /// A fault brings more than its page where the pages that follow are likely to be touched next. While faults go
    /// on where the pages brought for an earlier one end, in any thread, each brings twice as much as the one before,
    /// up to demand_run. With demand_run at 64 KiB or more, and pages of at most 16 KiB, a fault in a place where a quarter
    /// of the pages are there (of 32 that start at a multiple of 32 in the slot) brings what is missing of the 64 KiB
    /// around it.
    ///
    /// Of these, one run of at most 64 KiB, with the page in it, is asked for with KUF_FILL_DEMAND. What is left is
    /// brought ahead of the toucher, which goes on meanwhile: in runs of at most populate_run without KUF_FILL_DEMAND,
    /// one at a time, while no other fault waits; what is missing in such a place, before the next fault, if fills take
    /// microseconds. What is brought ahead and fails poisons nothing: it is asked for again when it is touched.
    ///
    /// kuf_ensure asks for the range it is given in runs of at most demand_run and populate_run (or 64 KiB if that is more).
    pub demand_run: u64,
    /// Longest run, in bytes, that is asked for when nobody waits, by kuf_populate or ahead of touchers: 0 for 256 KiB,
    /// at most 64 MiB. Rounded as above. See also KUF_MEMORY_HUGE.
    pub populate_run: u64,
    /// Bytes of deferred kuf_populate runs that may be outstanding at once: 0 for 16 MiB.
    pub populate_inflight: u64,
    /// Faults the library holds unserved before it stops reading more from the kernel: 0 for 4096, at least 1.
    /// What is not read waits in the kernel's queue.
    pub queue_max: u32,
    /// Highest KUF_LOG_* that is passed to log.
    pub log_level: u32,
    /// Fills pages; NULL: caller-driven (kuf_poll, kuf_read, kuf_resolve), or KUF_OPEN_SOURCES.
    pub fill: kuf_fill_fn,
    /// Told about events; may be NULL.
    pub event: kuf_event_fn,
    /// Given log records; may be NULL.
    pub log: kuf_log_fn,
    /// Told when the callbacks are done for good; may be NULL.
    pub release: kuf_release_fn,
    /// First argument of the four callbacks.
    pub opaque: *mut c_void,
    /// Microseconds, at most KUF_SPIN_MAX, that the thread that watches for faults may go on looking for the next one
    /// before it sleeps, and only while faults come that fast: 0 for not at all. It saves the time to wake up, which
    /// can be most of what a fault costs, and takes up to one CPU while faults come. Without effect where every
    /// thread of the process is kept on one and the same CPU at kuf_open, or the cgroup grants the time of one.
    pub spin_us: u32,
    /// How many userfaultfds share the memory of this handle, at most KUF_USERFAULTFDS_MAX. 0: one for each 8 CPUs
    /// that the calling thread may use, from 1 to 8; with KUF_OPEN_DIRECT and KUF_OPEN_FOLLOW_FORK, one. A userfaultfd
    /// has one lock and one list of waiters, on which all vCPUs that touch absent pages meet. With several, memory is
    /// divided at multiples of 16 MiB or more of its address, a slot in at most 65 pieces, which they have in turn.
    ///
    /// Each piece is a mapping of its own (/proc/self/maps) for as long as the slot is there, and may stay one. It
    /// counts against vm.max_map_count, and mremap(2) of more than one of them fails with EFAULT: a host that moves the
    /// memory of slots sets this to 1. Not with KUF_OPEN_ADOPT_ONLY and KUF_MECHANISM_KVM_ASYNC, which open none; more
    /// than 1 not with KUF_OPEN_FOLLOW_FORK.
    pub userfaultfds: u32,
    /// The CPUs that service threads (kuf-serve-N, kuf-fork, kuf-populate) may use: a cpu_set_t or a longer set, as for
    /// sched_setaffinity(2), of cpus_size bytes, read during the call. NULL: those of the thread that calls kuf_open.
    /// Not with KUF_OPEN_DIRECT.
    pub cpus: *const c_void,
    /// Bytes at cpus, at most 8192; 0 when cpus is NULL.
    pub cpus_size: u64,
    /// The same for kuf-populate alone, which nobody waits for. NULL: as cpus.
    pub populate_cpus: *const c_void,
    /// Bytes at populate_cpus.
    pub populate_cpus_size: u64,
}

/// Where the pages of a slot come from without a callback: kuf_memory.source. The slot's first byte is at `offset`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_source {
    /// sizeof(struct kuf_source), set by the caller.
    pub size: u32,
    /// KUF_SOURCE_*: _FILE, _MEMORY or _ZERO.
    pub kind: u32,
    /// KUF_SOURCE_DIRECT_IO or 0.
    pub flags: u64,
    /// KUF_SOURCE_FILE: open for reading; duplicated. Else 0.
    pub fd: i32,
    /// Zero.
    pub reserved: u32,
    /// Where the slot's bytes begin in the file or memory, in bytes, of any alignment. 0 with KUF_SOURCE_ZERO.
    pub offset: u64,
    /// KUF_SOURCE_MEMORY: the first byte. It stays readable and unchanged until kuf_remove_memory of the slot or kuf_close
    /// has returned (with KUF_CLOSE_NOWAIT, until kuf_options.release is called), and is not guest memory that is filled
    /// itself. Else NULL.
    pub addr: *const c_void,
    /// KUF_SOURCE_MEMORY: bytes from addr on; offset + the slot's len at least. Else 0.
    pub len: u64,
}

/// A memory slot: a guest physical range and the host mapping behind it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_memory {
    /// sizeof(struct kuf_memory), set by the caller.
    pub size: u32,
    /// KUF_MEMORY_*.
    pub flags: u32,
    /// First guest physical address; a multiple of the granule.
    pub gpa: u64,
    /// Length in bytes; a multiple of the granule, not 0.
    pub len: u64,
    /// Host virtual address that backs gpa, in this process or, with KUF_MEMORY_REMOTE, in the other one; a multiple of
    /// the granule. The whole range must be mapped.
    pub hva: u64,
    /// Page size of the mapping in bytes: 0 to have it found out (not with KUF_MEMORY_REMOTE without KUF_MEMORY_FD,
    /// where 0 means the host's page size).
    pub granule: u64,
    /// The shared file with KUF_MEMORY_FD (duplicated), else 0.
    pub fd: i32,
    /// The userfaultfd with KUF_MEMORY_UFFD (duplicated), else 0. One userfaultfd may back many slots.
    pub uffd: i32,
    /// Offset in fd that is mapped at hva; a multiple of the granule.
    pub fd_offset: u64,
    /// KUF_MECHANISM_KVM_ASYNC: the memory attributes (KVM_MEMORY_ATTRIBUTE_PRIVATE, 1 << 3) that the range has besides
    /// the mark, which the library keeps: KVM_SET_MEMORY_ATTRIBUTES replaces all of them. They hold for the whole slot
    /// and for as long as it is there. Else 0.
    pub kvm_attributes: u64,
    /// Handed back in kuf_fill and kuf_fault.
    pub opaque: *mut c_void,
    /// Number of the KVM memslot (and address space << 16) with KUF_MEMORY_MEMSLOT, else 0.
    pub memslot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0: flags of that memslot besides KVM_MEM_USERFAULT.
    pub memslot_flags: u32,
    /// Where the slot's pages come from, instead of the fill callback, which is not called for this slot; NULL: the fill
    /// callback, or kuf_read. Copied. Needs a handle with a fill callback or KUF_OPEN_SOURCES.
    pub source: *const kuf_source,
}

/// A request to fill ahead of demand.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_populate {
    /// sizeof(struct kuf_populate), set by the caller.
    pub size: u32,
    /// KUF_POPULATE_*.
    pub flags: u32,
    /// First guest physical address, or KUF_ALL for every slot there is when the request starts.
    pub gpa: u64,
    /// Bytes; must be 0 with KUF_ALL. May span slots and holes between them.
    pub len: u64,
    /// Bytes per second at most; 0: no limit.
    pub rate: u64,
}

/// How far a range is. Filled by kuf_progress. All in bytes; present + removed + absent + filling + deferred + poisoned
/// = total.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_progress {
    /// sizeof(struct kuf_progress), set by the caller. Fields the library does not know are zeroed.
    pub size: u32,
    /// KUF_PROGRESS_*.
    pub flags: u32,
    /// The slot's gpa; 0 with KUF_ALL.
    pub gpa: u64,
    /// Bytes of the slot, or of all slots.
    pub total: u64,
    /// Holds its bytes.
    pub present: u64,
    /// Given back by the guest or unmapped: reads as zero, needs no source.
    pub removed: u64,
    /// Not asked for yet.
    pub absent: u64,
    /// Being filled now.
    pub filling: u64,
    /// Asked for, to be resolved by the host (deferred, or read with kuf_read).
    pub deferred: u64,
    /// Could not be filled.
    pub poisoned: u64,
}

/// log2 latency histogram, in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_histogram {
    /// Values recorded.
    pub count: u64,
    /// Sum of the values.
    pub sum_ns: u64,
    /// Largest value.
    pub max_ns: u64,
    /// Values per bucket: see KUF_HISTOGRAM_BUCKETS.
    pub bucket: [u64; KUF_HISTOGRAM_BUCKETS],
}

/// Counters since kuf_open. Filled by kuf_stats; each is read on its own, so sums may be off by what is in flight.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_stats {
    /// sizeof(struct kuf_stats), set by the caller. Fields the library does not know are zeroed.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Page faults read from the kernel.
    pub faults: u64,
    /// Of these, for pages of a shared file that were in its page cache already.
    pub faults_minor: u64,
    /// Of these, write accesses.
    pub faults_write: u64,
    /// Of these, for a page that another fault was already waiting for.
    pub faults_joined: u64,
    /// Of these, for a page that had become present in the meantime.
    pub faults_late: u64,
    /// Of these, for an address in no slot (it was unmapped, moved or removed meanwhile); left to the kernel.
    pub faults_unknown: u64,
    /// Exits given to kuf_vcpu_fault.
    pub vcpu_faults: u64,
    /// Fill callbacks made, and built-in sources asked.
    pub fills: u64,
    /// Of these, those that failed.
    pub fills_failed: u64,
    /// Of these, those that returned KUF_DEFERRED.
    pub fills_deferred: u64,
    /// Bytes made present with data copied from a buffer.
    pub bytes_copied: u64,
    /// Bytes made present as zeroes.
    pub bytes_zeroed: u64,
    /// Bytes made present in place, with no copy.
    pub bytes_in_place: u64,
    /// Of all bytes made present, those that kuf_populate asked for.
    pub bytes_populated: u64,
    /// Bytes poisoned or closed off.
    pub bytes_poisoned: u64,
    /// Bytes dropped by kuf_discard.
    pub bytes_discarded: u64,
    /// Bytes reported removed or unmapped by the kernel or by kuf_discard(..., KUF_DISCARD_REMOVED).
    pub bytes_removed: u64,
    /// REMOVE events read.
    pub events_remove: u64,
    /// UNMAP events read.
    pub events_unmap: u64,
    /// REMAP events read.
    pub events_remap: u64,
    /// FORK events read.
    pub events_fork: u64,
    /// Installs put off because an event was unread (EAGAIN).
    pub install_again: u64,
    /// Pages found present at install (EEXIST); their waiters were woken by hand.
    pub install_exists: u64,
    /// Installs retried for want of memory (ENOMEM, ENOSPC).
    pub install_no_memory: u64,
    /// Times reading stopped because queue_max faults were held.
    pub queue_full: u64,
    /// KVM_READ_USERFAULT calls that failed with EFAULT: each may have lost a fault, and led to a sweep.
    pub faults_lost: u64,
    /// Faults found in KVM's queue whose signal did not come (KUF_OPEN_KVM_DRAIN).
    pub faults_unsignalled: u64,
    /// From reading a fault until its fill began. Caller-driven: until kuf_read returned it.
    pub queueing: kuf_histogram,
    /// Inside the fill callback or the built-in source, or from the request to kuf_resolve for deferred and caller-driven faults.
    pub filling: kuf_histogram,
    /// Making a run present.
    pub installing: kuf_histogram,
    /// From reading a fault until its page was present: what the library added to the toucher's wait.
    pub blocked: kuf_histogram,
    /// Of all bytes made present, those that were brought ahead of a toucher, with nobody waiting (kuf_options.demand_run).
    pub bytes_ahead: u64,
    /// Time, from the reading of a fault each, during which all threads of kuf_watch_threads waited at once, up to now.
    pub blocked_all_ns: u64,
}

/// How long one thread was kept waiting by page faults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kuf_block_time {
    /// Thread id as in gettid(2), in the pid namespace of the process that opened the userfaultfd.
    pub thread: u32,
    /// Zero.
    pub reserved: u32,
    /// Faults of this thread that ended.
    pub faults: u64,
    /// Sum of their waiting times, from reading the fault until the page was present.
    pub total_ns: u64,
    /// Longest of them.
    pub max_ns: u64,
}
