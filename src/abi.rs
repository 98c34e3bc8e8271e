//! The types of the C ABI. Their documentation is the header's: it is written for a reader who knows nothing but
//! `kuf.h`.
//!
//! Growth rule: a struct that the caller fills starts with `size`; fields are only ever added at the end.

#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_void};

pub use crate::abi_kvm::*;

/// Version of this header. The soname follows the major version.
pub const KUF_VERSION_MAJOR: u32 = 0;
/// Incremented when calls, flags or fields are added.
pub const KUF_VERSION_MINOR: u32 = 1;
/// Incremented for changes that do not affect this header.
pub const KUF_VERSION_PATCH: u32 = 0;

/// In place of a gpa: every memory slot of the handle. A length beside it is ignored.
pub const KUF_ALL: u64 = 0xffff_ffff_ffff_ffff;

/// Let the library choose. It chooses userfaultfd.
pub const KUF_MECHANISM_AUTO: u32 = 0;
/// userfaultfd(2): catches accesses by vCPUs, KVM, vhost and threads alike. The other mechanisms are in kuf-kvm.h.
pub const KUF_MECHANISM_USERFAULTFD: u32 = 1;
/// Length of the arrays in struct kuf_probe_info: mechanisms are numbered from 1 to KUF_MECHANISM_COUNT - 1.
pub const KUF_MECHANISM_COUNT: usize = 4;

/// Mode: the caller takes faults with kuf_read and answers with kuf_resolve. A library thread reads the kernel.
pub const KUF_OPEN_CALLER_DRIVEN: u32 = 1 << 0;
/// Accept a userfaultfd that catches user-mode accesses only, where the process may open no other. It needs no
/// privilege and cannot serve a KVM guest, whose accesses are the kernel's and fail with EFAULT. For emulators and
/// tests. Kernel: UFFD_USER_MODE_ONLY.
pub const KUF_OPEN_USER_MODE_ONLY: u32 = 1 << 1;
/// Serve forked children too, from the same source. Needs CAP_SYS_PTRACE. Without it, absent pages read as zero in a
/// child unless the memory is MADV_DONTFORK. Kernel: UFFD_FEATURE_EVENT_FORK.
///
/// # Notes
/// The first kuf_open with this flag registers fork handlers (pthread_atfork), which stay for the life of the
/// process. From the library's `prepare` handler to its `parent` handler no page of these handles is resolved. A
/// `prepare` handler that was registered earlier must not wait for a thread that may be blocked on such a page.
pub const KUF_OPEN_FOLLOW_FORK: u32 = 1 << 2;
/// Mode: as KUF_OPEN_CALLER_DRIVEN, without a thread of the library: kuf_read reads the kernel, which saves one
/// thread wake-up a fault. Memory that the guest gives back must be reported with kuf_discard(...,
/// KUF_DISCARD_ZERO), and must not be moved or unmapped before kuf_remove_memory. Not with kuf_populate, kuf_replay
/// and KUF_OPEN_FOLLOW_FORK.
///
/// # Notes
/// The library's own userfaultfd reports no REMOVE, REMAP, UNMAP or FORK events in this mode: a thread that gives
/// memory back would be blocked until the loop that it may itself run reads the event. kuf_fd may poll readable
/// without a fault.
pub const KUF_OPEN_DIRECT: u32 = 1 << 3;
/// Open no userfaultfd: every slot has its own (kuf_memory.uffd). For an unprivileged handler of other processes.
pub const KUF_OPEN_ADOPT_ONLY: u32 = 1 << 4;

/// Check the bytes of callbacks, sources and kuf_resolve for pages of zeroes and install those as zero pages. In
/// private memory they take no memory until they are written. In shared memory, zero pages that no thread is blocked
/// on are left as holes: they count as removed and are allocated on first access.
///
/// # Notes
/// Such pages count in kuf_stats_info.bytes_zeroed. kuf_ensure allocates them in shared memory, and the pages that
/// the guest has given back. A huge page is zero when all of it is; private huge pages are not checked.
pub const KUF_OPEN_DETECT_ZERO: u32 = 1 << 5;
/// Mode: there is no fill callback; every slot has a kuf_memory.source.
pub const KUF_OPEN_SOURCES: u32 = 1 << 6;

/// If the environment has KUF_DEBUG=1, also write log records of every level to standard error. Ignored in
/// set-user-ID programs.
pub const KUF_OPEN_DEBUG_ENV: u32 = 1 << 7;

/// kuf_source.kind: a regular file or block device. Holes are zero (or the base's) and are not read. If the file
/// becomes shorter or its disk fails, the pages concerned are poisoned; no signal is raised. Any change of the file
/// changes what absent pages will hold.
///
/// # Notes
/// Bytes in the page cache are copied from there to the guest in one step; others are read ahead. Holes are looked
/// up when the slot is added, up to 65536 of them. A page of which the file has only a part left is lost as a whole.
/// The file stays mapped while the slot exists, so its cached pages count in the RssFile of the process.
///
/// Guest memory may be written over the file while it is served (write(2) from the slot itself, as a snapshot does),
/// but not with KUF_SOURCE_DIRECT_IO: there write(2) and the read that it waits for may need the same lock of the
/// file.
pub const KUF_SOURCE_FILE: u32 = 1;
/// kuf_source.kind: readable memory of this process, not served itself, that does not change while the slot exists.
pub const KUF_SOURCE_MEMORY: u32 = 2;
/// kuf_source.kind: zeroes.
pub const KUF_SOURCE_ZERO: u32 = 3;

/// kuf_source.flags, for a file: read past the page cache (O_DIRECT), so that a one-off image does not evict other
/// cached data. kuf_source.offset must be a multiple of 4096. Not faster when memory is plentiful.
pub const KUF_SOURCE_DIRECT_IO: u32 = 1 << 0;

/// A thread is blocked until this run is resolved.
pub const KUF_RUN_DEMAND: u32 = 1 << 0;
/// kuf_fill.buf is the guest's page itself, through a mapping that is not visible to the guest: nothing is copied
/// afterwards. After KUF_FILL_DEFERRED it stays valid until the run is resolved (KUF_RESOLVE_IN_PLACE), which it
/// must eventually be. KUF_END_POISON takes it away: stop writing to it first.
pub const KUF_RUN_IN_PLACE: u32 = 1 << 1;
/// The fault is a forked child's (KUF_OPEN_FOLLOW_FORK). gpa is that of the parent's slot.
pub const KUF_RUN_FORKED: u32 = 1 << 2;

/// Fill callback: the first kuf_fill.filled bytes of the run are in buf, or at src.
pub const KUF_FILL_DONE: c_int = 0;
/// Fill callback: the first kuf_fill.filled bytes of the run are zero; buf was not written.
pub const KUF_FILL_ZERO: c_int = 1;
/// Fill callback: the caller will call kuf_resolve for every page of the run later, from any thread and in any
/// pieces. Until then the run is not asked for again.
pub const KUF_FILL_DEFERRED: c_int = 2;
/// Fill callback, for a run without KUF_RUN_DEMAND (with it: -EPROTO): not now. The run stays absent, and populate and
/// replay go on with the next. If a thread touched it meanwhile, it is asked for again at once, with KUF_RUN_DEMAND.
///
/// # Notes
/// The same request does not ask for the run again. With KUF_END_POPULATE the call fails with -EIO. Where pages are
/// filled in place, the memory of the run is returned, unless the slot has KUF_MEMORY_FILL_ALL. -EAGAIN from a fill
/// callback has no meaning of its own: it is a source that has failed.
pub const KUF_FILL_LATER: c_int = 3;

/// hva is an address of the process that opened kuf_memory.uffd.
pub const KUF_MEMORY_REMOTE: u32 = 1 << 0;
/// Ask the source for every page, whatever the file holds: for use after a handler that died and may have left
/// half-filled pages. Add the slot before anything touches the memory. Mark pages that are known to be whole with
/// KUF_RESOLVE_IN_PLACE. Needs kuf_memory.fd and KUF_FEATURE_MINOR.
///
/// # Notes
/// The file keeps its bytes, and a call that fails has dropped nothing. Filling in place writes over what the guest
/// has changed, which is why nothing may touch or populate the memory before.
pub const KUF_MEMORY_FILL_ALL: u32 = 1 << 1;

/// Prefer transparent huge pages for private memory that is filled ahead of demand. Best effort; needs
/// KUF_FEATURE_HUGE. For KVM to map a huge page, gpa and hva must agree modulo 2 MiB. Do not set MADV_HUGEPAGE on the
/// guest memory: demand becomes slower. Kernel: UFFDIO_MOVE (Linux 6.8).
///
/// # Notes
/// Ahead of demand: kuf_populate, kuf_replay, kuf_ensure of a large range, KUF_END_POPULATE.
/// For private anonymous memory of this process with pages of 4 KiB, under userfaultfd. A stretch of 2 MiB (aligned
/// in hva) that is wholly absent is asked for in one fill, even if populate_run or demand_run are less, and moved to
/// the guest as one page if all of it was filled. These stay on pages of 4 KiB: stretches with pages that demand has
/// filled, that were filled in part, with KUF_FILL_ZERO or by kuf_resolve, and those in which KUF_OPEN_DETECT_ZERO
/// finds zeroes. A thread that touches a page of a stretch that is being filled is blocked for all of it.
///
/// Locked memory stays on 4 KiB pages, unless all of the process is locked (MCL_FUTURE). The NUMA policy of the
/// mapping is followed; with one that interleaves, memory stays on 4 KiB pages. Where huge pages cannot be had, a
/// KUF_LOG_INFO record says so.
///
/// With MADV_HUGEPAGE on the guest memory the kernel zeroes 2 MiB before it announces the first write to a stretch
/// without pages. Pages that demand has filled can be made huge when they are present: by MADV_HUGEPAGE then
/// (khugepaged follows in its own time), or by MADV_COLLAPSE (Linux 6.1), during which page faults in this process
/// stall.
pub const KUF_MEMORY_HUGE: u32 = 1 << 2;
/// The memory may hold pages already, and these are the guest's own: they count as present and keep their bytes.
/// Without this flag, memory that holds pages is refused (-EBUSY). Not with KUF_MEMORY_FILL_ALL.
///
/// # Notes
/// Existing pages are never announced by the kernel, so without the flag the guest would read whatever is there:
/// usually zeroes that MAP_POPULATE, mlock, mlockall, preallocation or a touch on huge pages has made.
///
/// The library looks existing pages up when the slot is added: in private memory every page that is mapped (the zero
/// page included) or swapped out, in shared memory every page that the file holds. A poisoned page that an earlier
/// slot has left exists
/// too: a touch raises SIGBUS until madvise(MADV_DONTNEED) or kuf_discard drops the mark. With the flag, a page that
/// something else installs later (the caller's own UFFDIO_COPY) counts as present when the library finds it;
/// KUF_RESOLVE_PRESENT looks.
///
/// With KUF_MEMORY_REMOTE and without kuf_memory.fd existing pages cannot be looked up: give the flag when the other
/// process, or a handler before this one, may have installed pages. A hugetlbfs file cannot say which pages it
/// holds: -ENOTSUP unless it is empty.
pub const KUF_MEMORY_POPULATED: u32 = 1 << 3;

/// A write caused the fault.
pub const KUF_FAULT_WRITE: u32 = 1 << 0;
/// The page is in the page cache of a shared file but not mapped. Kernel: UFFD_PAGEFAULT_FLAG_MINOR.
pub const KUF_FAULT_MINOR: u32 = 1 << 1;
/// A thread is blocked on this page. Not set for pages that only kuf_populate asked for.
pub const KUF_FAULT_DEMAND: u32 = 1 << 2;
/// A forked child's fault (KUF_OPEN_FOLLOW_FORK). Resolve it like any other: kuf_resolve serves parent and child.
pub const KUF_FAULT_FORKED: u32 = 1 << 3;

/// kuf_resolve: src is NULL and the range is zero.
pub const KUF_RESOLVE_ZERO: u32 = 1 << 0;
/// kuf_resolve: src is NULL; the bytes are in the shared file already (kuf_fill.buf, kuf_fault.place, pwrite). Only
/// for slots that are filled in place (KUF_SETTING_IN_PLACE).
pub const KUF_RESOLVE_IN_PLACE: u32 = 1 << 1;
/// kuf_resolve: src is NULL and the bytes are lost. Touching the pages raises SIGBUS; an event is raised.
/// kuf_discard undoes it.
///
/// # Notes
/// When a guest touches such a page, KVM sends SIGBUS to the vCPU thread (BUS_MCEERR_AR, with the hva) and KVM_RUN
/// returns EINTR; with a mechanism of kuf-kvm.h the vCPU exits and kuf_vcpu_fault returns -EHWPOISON. kuf_discard
/// does not undo it in a forked child that has touched the page.
///
/// KVM's own access to a poisoned page (an emulated instruction) may come out as KVM_EXIT_MMIO with an address
/// inside a slot: KVM takes memory that it cannot read for a device. Do not answer it as one: kuf_ensure returns
/// -EHWPOISON for it.
pub const KUF_RESOLVE_POISON: u32 = 1 << 2;
/// kuf_resolve: src is NULL; look up which pages of the range exist already and make those present. For private
/// memory of this process that the caller has filled itself (UFFDIO_COPY). The others keep their state.
///
/// # Notes
/// Costs two page-table scans per 256 KiB. (KUF_RESOLVE_ZERO does not replace a page that exists, but takes a system
/// call a page and makes a zero page where there is none.) A page exists when touching it raises no fault: it is
/// mapped (the kernel's zero page too) or swapped out. Of the swapped-out pages these are not found: write-protected
/// ones (UFFDIO_WRITEPROTECT), shared ones, and any if /proc/self/pagemap cannot be opened. A page that was poisoned
/// before the slot was added may be found; touching it raises SIGBUS as before.
pub const KUF_RESOLVE_PRESENT: u32 = 1 << 3;

/// kuf_discard: the range is filled from the source again (or given to kuf_read again).
pub const KUF_DISCARD_REFILL: u32 = 1 << 0;
/// kuf_discard: the guest gave the range back (balloon, free page reporting, virtio-mem): it reads as zero.
pub const KUF_DISCARD_ZERO: u32 = 1 << 1;

/// kuf_populate: stop all populate requests and replays of the handle. gpa and len are ignored.
pub const KUF_POPULATE_STOP: u32 = 1 << 0;
/// kuf_close, kuf_remove_memory: poison the pages that are unresolved. Stop the vCPUs first. Bytes of a shared file
/// there are dropped in all its mappings; the poison is on the slot's own mapping.
///
/// # Notes
/// In the calling process, runs of 1 GiB and more become PROT_NONE instead (KUF_EVENT_INACCESSIBLE): touching them
/// raises SIGSEGV, and KVM_RUN fails with EFAULT. To poison a terabyte would take many seconds and 2 GiB of page
/// tables. mprotect(2) undoes it. A vCPU that is inside KVM may leave it with KVM_EXIT_MMIO at an address in RAM
/// (see KUF_RESOLVE_POISON).
pub const KUF_END_POISON: u32 = 1 << 0;
/// kuf_close, kuf_remove_memory: fill the pages that are unresolved first. If that fails (-EIO, -ETIMEDOUT) the
/// handle or slot goes on as before, unless KUF_END_POISON is given too. kuf_options.end_timeout_ms limits it.
pub const KUF_END_POPULATE: u32 = 1 << 1;
/// kuf_close: do not wait for running fill callbacks. Their results are dropped. kuf_options.release is called when
/// the last one has returned; opaque must stay valid until then.
pub const KUF_END_NOWAIT: u32 = 1 << 2;
/// kuf_close: leave unresolved pages unfilled and registered, for another handler of the same userfaultfd: pending
/// faults are delivered to it again. Only if every slot has a kuf_memory.uffd; not with KUF_END_POISON or
/// KUF_END_POPULATE.
pub const KUF_END_HANDOVER: u32 = 1 << 3;

/// Every page is present or removed: the slot can be removed with kuf_remove_memory; no overhead remains.
pub const KUF_PROGRESS_COMPLETE: u32 = 1 << 0;
/// The process behind the slot is gone (KUF_EVENT_GONE).
pub const KUF_PROGRESS_GONE: u32 = 1 << 1;

/// Pages gpa..gpa+len are poisoned; error says why. One event a call for KUF_END_POISON, with error -ECANCELED: gpa
/// and len are the slot's, or 0 and 0 from kuf_close.
pub const KUF_EVENT_POISONED: u32 = 1;
/// As KUF_EVENT_POISONED, where the kernel cannot poison (before Linux 6.6) or the run is too long. In this process
/// the pages are PROT_NONE (touching raises SIGSEGV); in another process a thread that touches them stays blocked.
pub const KUF_EVENT_INACCESSIBLE: u32 = 2;
/// Every page of the slot gpa..gpa+len is present or removed: remove it. Not raised while pages are poisoned.
pub const KUF_EVENT_COMPLETE: u32 = 3;
/// A kuf_populate request over gpa..gpa+len (0 and 0 for KUF_ALL) has ended, not by kuf_close. error: 0, -errno of the
/// fill that stopped it, -EAGAIN (KUF_FILL_LATER left pages absent) or -ECANCELED (KUF_POPULATE_STOP).
pub const KUF_EVENT_POPULATED: u32 = 4;
/// The process behind the slot gpa..gpa+len is gone (error: -ESRCH). Noticed within a second.
pub const KUF_EVENT_GONE: u32 = 5;
/// The handle's service has failed. Unresolved pages stay inaccessible, calls fail with -EIO, kuf_close poisons.
pub const KUF_EVENT_FATAL: u32 = 6;
/// The process forked and the child is served (KUF_OPEN_FOLLOW_FORK); with an error it is not. -EMFILE: there was no
/// descriptor for it, and the child has no guest memory.
pub const KUF_EVENT_FORKED: u32 = 7;

/// A kuf_replay has ended; error as in KUF_EVENT_POPULATED. gpa and len are 0. Not raised when kuf_close ends it.
pub const KUF_EVENT_REPLAYED: u32 = 8;
/// A userfaultfd cannot be read; error says why (-EMFILE: a fork has a descriptor to deliver that finds no room).
/// The library retries every millisecond and loses nothing; until then no page under this userfaultfd is installed.
///
/// # Notes
/// Close descriptors that can be spared. gpa and len are those of a slot that uses the userfaultfd, or 0 and 0. Raised
/// once for reads that fail in a row.
pub const KUF_EVENT_UNREADABLE: u32 = 9;

/// kuf_settings_info.flags: pages of the slot are filled in place.
pub const KUF_SETTING_IN_PLACE: u32 = 1 << 0;
/// Huge pages are used where possible (KUF_MEMORY_HUGE).
pub const KUF_SETTING_HUGE: u32 = 1 << 1;
/// The slot uses a userfaultfd of the caller's.
pub const KUF_SETTING_ADOPTED: u32 = 1 << 2;
/// The slot is memory of another process.
pub const KUF_SETTING_REMOTE: u32 = 1 << 3;

/// kuf_options.log_level: a record is passed on when its level is at most this. Errors only.
pub const KUF_LOG_ERROR: u32 = 1;
/// Things that the caller may want to act on.
pub const KUF_LOG_WARN: u32 = 2;
/// Informational: one record for each open, slot or request.
pub const KUF_LOG_INFO: u32 = 3;
/// One record for each kernel event other than a page fault.
pub const KUF_LOG_DEBUG: u32 = 4;

/// Largest kuf_options.spin_us.
pub const KUF_SPIN_MAX: u32 = 10000;

/// Largest kuf_options.userfaultfds.
pub const KUF_USERFAULTFDS_MAX: u32 = 64;

/// Version of the file that kuf_record_stop writes (docs/record-format.md), and the newest that kuf_replay reads.
pub const KUF_RECORD_VERSION: u32 = 1;

/// Buckets of a latency histogram: bucket i counts values in [2^i, 2^(i+1)) ns, bucket 0 also 0, the last one all
/// longer ones.
pub const KUF_HISTOGRAM_BUCKETS: usize = 40;

/// kuf_probe_info.features: pages can be poisoned (UFFDIO_POISON, Linux 6.6).
pub const KUF_FEATURE_POISON: u32 = 1 << 0;
/// Shared memory can be filled in place (minor faults, Linux 5.14).
pub const KUF_FEATURE_MINOR: u32 = 1 << 1;
/// The kernel names the faulting thread: kuf_block_times works.
pub const KUF_FEATURE_THREAD_ID: u32 = 1 << 2;
/// userfaultfd serves KVM guests for this process (kernel-mode faults are allowed).
pub const KUF_FEATURE_KERNEL_FAULTS: u32 = 1 << 3;
/// userfaultfd works for this process at least for user-mode faults (KUF_OPEN_USER_MODE_ONLY).
pub const KUF_FEATURE_USER_FAULTS: u32 = 1 << 4;
/// KUF_MEMORY_HUGE works: the kernel has UFFDIO_MOVE and gives huge pages.
pub const KUF_FEATURE_HUGE: u32 = 1 << 5;

/// One VM's fault service, made by kuf_open and ended by kuf_close. It belongs to the process that opened it. A
/// handle that was closed is recognised for the life of the process.
///
/// Errors of every call, which the calls below do not list again:
/// -EINVAL: a handle or struct is NULL, a struct's size is below that of its first version, a flag is unknown, or an
///   argument is outside the range that its text gives.
/// -E2BIG: a struct has bytes other than zero that this version does not know.
/// -EBADF: the handle is closed, or kuf_close has begun. -ECANCELED: kuf_close began during the call.
/// -ECHILD: the handle was opened in the parent, before a fork. -EDEADLK: called from a callback that the call could
///   wait for.
/// -EIO: the service of the handle has failed (KUF_EVENT_FATAL). -ENOMEM: the library has no memory for the call.
/// -ENOTRECOVERABLE: an error inside the library was caught; kuf_error() names it.
pub struct kuf_handle {
    _opaque: [u8; 0],
}

/// What works on this host. Filled by kuf_probe.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_probe_info {
    /// sizeof(struct kuf_probe_info), set by the caller. Fields unknown to the library are zeroed.
    pub size: u32,
    /// The KUF_MECHANISM_* that KUF_MECHANISM_AUTO chooses; 0 when none works.
    pub recommended: u32,
    /// Bit (1 << KUF_MECHANISM_*) for each mechanism that kuf_open would accept now.
    pub mechanisms: u32,
    /// Page size of ordinary memory, in bytes.
    pub page_size: u32,
    /// KUF_FEATURE_*.
    pub features: u32,
    /// Zero.
    pub reserved: u32,
    /// UFFD_FEATURE_* bits that the kernel offers; 0 when userfaultfd cannot be opened.
    pub uffd_features: u64,
    /// For each mechanism: 0 when it works, else the -errno that kuf_open would return.
    pub error: [i32; KUF_MECHANISM_COUNT],
    /// For each mechanism, in words: how it works here, or why it does not and what to do about it.
    pub why: [[c_char; 512]; KUF_MECHANISM_COUNT],
}

/// A run of pages to fill, as the fill callback gets it. Valid until the callback returns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_fill {
    /// Size of the struct that the library passed; do not access fields beyond it.
    pub size: u32,
    /// KUF_RUN_*.
    pub flags: u32,
    /// First guest physical address of the run; a multiple of page_size.
    pub gpa: u64,
    /// Bytes wanted; a multiple of page_size. The run holds no page that is present.
    pub len: u64,
    /// Where to write len bytes; page-aligned. Undefined at the start.
    pub buf: *mut c_void,
    /// len at the start. The callback may lower it to a smaller multiple of page_size above 0, and return
    /// KUF_FILL_DONE or KUF_FILL_ZERO for that much; the rest is asked for again.
    pub filled: u64,
    /// Page size of the slot in bytes.
    pub page_size: u64,
    /// kuf_memory.opaque of the slot.
    pub memory_opaque: *mut c_void,
    /// gpa minus the slot's gpa: the offset in an image of this slot.
    pub memory_offset: u64,
    /// NULL at the start. Instead of writing to buf, the callback may set it to `filled` readable bytes, of any
    /// alignment, that stay unchanged until the slot or the handle has ended, and return KUF_FILL_DONE. They are
    /// copied from there to the guest.
    ///
    /// # Notes
    /// With KUF_END_NOWAIT they stay until kuf_options.release is called. Bytes that turn out to be unreadable (a
    /// mapped file that was truncated) make the fill fail with -EFAULT; guest memory that is itself absent makes it
    /// fail with -EDEADLK.
    pub src: *const c_void,
    /// ID of the first faulting thread if the kernel reports it (KUF_FEATURE_THREAD_ID), in the pid namespace of the
    /// process that opened the userfaultfd; else 0.
    pub thread: u32,
    /// Zero.
    pub reserved: u32,
    /// The handle, as from kuf_open: for kuf_resolve and other calls.
    pub kuf: *mut kuf_handle,
}

/// A page fault, from kuf_read and kuf_pending. 64 bytes on 64-bit machines.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_fault {
    /// Guest physical address; a multiple of the slot's page size.
    pub gpa: u64,
    /// Bytes to resolve: one page from kuf_read, a run of pages in the same state from kuf_pending.
    pub len: u64,
    /// KUF_FAULT_*.
    pub flags: u32,
    /// ID of the first faulting thread, as in kuf_fill.
    pub thread: u32,
    /// Nanoseconds since the fault was read from the kernel, or since the page was asked for.
    pub age_ns: u64,
    /// kuf_memory.opaque of the slot.
    pub memory_opaque: *mut c_void,
    /// gpa minus the slot's gpa.
    pub memory_offset: u64,
    /// Where to write the bytes before kuf_resolve(..., KUF_RESOLVE_IN_PLACE); valid until the page is resolved.
    /// NULL if the slot is not filled in place, and from kuf_pending.
    pub place: *mut c_void,
    /// Zero.
    pub reserved: u64,
}

/// What the event callback gets. Valid until the callback returns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_event {
    /// Size of the struct that the library passed; do not access fields beyond it.
    pub size: u32,
    /// KUF_EVENT_*.
    pub kind: u32,
    /// Range concerned; 0 and 0 when the event concerns the handle.
    pub gpa: u64,
    /// Length of the range in bytes.
    pub len: u64,
    /// 0, or the -errno behind the event.
    pub error: i32,
    /// Zero.
    pub reserved: u32,
    /// The same in words. Never NULL.
    pub text: *const c_char,
    /// kuf_memory.opaque of the slot; NULL when the event concerns the handle.
    pub memory_opaque: *mut c_void,
    /// The handle, as from kuf_open. Calls with it fail with -EBADF while kuf_open has not returned.
    ///
    /// # Notes
    /// Before kuf_open has returned only a failure raises an event (KUF_EVENT_FATAL, KUF_EVENT_UNREADABLE): there is no
    /// memory yet. If kuf_open then fails, the pointer must not be used any more. After kuf_close it stays valid for
    /// calls, which fail with -EBADF.
    pub kuf: *mut kuf_handle,
}

/// Fill callback. Returns a KUF_FILL_*, or -errno if the source has failed: the run is then asked for again page by
/// page where a thread is blocked, and a page that fails alone is poisoned. Any other value, or a wrong `filled`,
/// fails the fill (-EPROTO).
///
/// Called without locks, on service threads or inside kuf_ensure, kuf_vcpu_fault and the calls with
/// KUF_END_POPULATE, by several threads at once for different runs. It may block: other pages are served while a
/// fill thread is free. It must not touch unresolved guest memory. Calls that could wait for it return -EDEADLK:
/// kuf_close, kuf_add_memory, kuf_remove_memory, kuf_poll, kuf_read, kuf_ensure, kuf_vcpu_fault. A C++ exception or
/// longjmp must not leave it.
///
/// # Notes
/// The threads are kuf-serve-N and kuf-populate. It may call kuf_resolve also for its own run, and then returns
/// KUF_FILL_DEFERRED.
/// -EDEADLK is returned on any handle, for a callback of one handle could wait for another's.
pub type kuf_fill_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, fill: *mut kuf_fill) -> c_int>;

/// Event callback. Runs without locks on the thread that detected the event, after the state has changed, and should
/// return soon: that thread serves faults. It may call what a fill callback may call, and kuf_remove_memory.
pub type kuf_event_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, event: *const kuf_event)>;

/// Log callback: level is a KUF_LOG_*, text is one line without newline, valid during the call. Runs on any thread.
/// Must not call the library.
pub type kuf_log_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, level: u32, text: *const c_char)>;

/// Called once no callback of the handle will run any more and opaque is no longer used: before kuf_close returns,
/// or later on the last thread with KUF_END_NOWAIT. Not called if kuf_open fails. Must not call the library.
pub type kuf_release_fn = Option<unsafe extern "C-unwind" fn(opaque: *mut c_void)>;

/// How to open a service. Zero is the default in every field.
///
/// ```text
/// field           unit          default   limits            ignored or refused
/// fill_threads    threads       2         1 to 256          ignored without fill and KUF_OPEN_SOURCES
/// log_level       KUF_LOG_*     WARN      KUF_LOG_DEBUG     ignored without log
/// demand_run      bytes         2 MiB     at most 64 MiB    rounded to pages, at least one
/// populate_run    bytes         256 KiB   at most 64 MiB    rounded to pages, at least one
/// spin_us         microseconds  0         KUF_SPIN_MAX      no effect with one CPU
/// userfaultfds    number        1         64                1 with KUF_OPEN_FOLLOW_FORK
/// end_timeout_ms  milliseconds  30000     0xffffffff: none  KUF_END_POPULATE only
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_options {
    /// sizeof(struct kuf_options), set by the caller.
    pub size: u32,
    /// KUF_MECHANISM_*.
    pub mechanism: u32,
    /// KUF_OPEN_*. Exactly one mode: a fill callback, KUF_OPEN_SOURCES, KUF_OPEN_CALLER_DRIVEN or KUF_OPEN_DIRECT.
    pub flags: u32,
    /// The VM's file descriptor, for the mechanisms of kuf-kvm.h; duplicated. Checked but not used by userfaultfd.
    pub vm_fd: i32,
    /// Number of concurrent fill callbacks. The library adds one thread that watches for faults, one that reads
    /// ahead (unless demand_run is one page) and, for kuf_populate, one more.
    pub fill_threads: u32,
    /// Highest KUF_LOG_* that is passed to log.
    pub log_level: u32,
    /// Most bytes that one fault may fill, the faulting page included. One page: each fault fills its page only.
    ///
    /// # Notes
    /// A fault fills more than its page where the following pages are likely to be touched next. While faults go on
    /// where the pages of an earlier one end, in any thread, each fills twice as much as the one before, up to
    /// demand_run. With demand_run at 64 KiB or more and pages of at most 16 KiB, a fault in a place where a quarter
    /// of the pages are present (of 32 that start at a multiple of 32 in the slot) fills the missing pages of the 64
    /// KiB around it.
    ///
    /// Of these, one run of at most 64 KiB that includes the page is asked for with KUF_RUN_DEMAND. The rest is
    /// filled while the thread goes on: in runs of at most populate_run without KUF_RUN_DEMAND, one at a time, while
    /// no other fault is pending; before the next fault if fills take microseconds. A page whose fill ahead of
    /// demand fails is not poisoned: it is asked for again when touched.
    ///
    /// kuf_ensure asks for its range in runs of at most the smaller of demand_run and the larger of populate_run and
    /// 64 KiB.
    pub demand_run: u64,
    /// Longest run, in bytes, that is asked for when no thread is blocked. See also KUF_MEMORY_HUGE.
    pub populate_run: u64,
    /// Fill callback, or NULL for another mode.
    pub fill: kuf_fill_fn,
    /// Event callback; may be NULL.
    pub event: kuf_event_fn,
    /// Log callback; may be NULL.
    pub log: kuf_log_fn,
    /// Release callback; may be NULL.
    pub release: kuf_release_fn,
    /// First argument of the four callbacks.
    pub opaque: *mut c_void,
    /// How long the thread that watches for faults busy-polls for the next one before it sleeps, while faults come
    /// that fast. Saves the wake-up, which can be most of what a fault costs; takes up to one CPU while faults come.
    pub spin_us: u32,
    /// How many userfaultfds share the memory of this handle, in chunks of at least 16 MiB, each a mapping of its own:
    /// mremap(2) of more than one fails with EFAULT. Not with KUF_OPEN_ADOPT_ONLY.
    ///
    /// # Notes
    /// A userfaultfd has one lock and one list of waiters, on which all vCPUs that touch absent pages meet. The
    /// chunks are mappings of their own for as long as the slot exists, and may stay so; they count against
    /// vm.max_map_count. Not with KUF_MECHANISM_KVM_ASYNC.
    pub userfaultfds: u32,
    /// Limits KUF_END_POPULATE: -ETIMEDOUT, or poison with KUF_END_POISON too.
    ///
    /// # Notes
    /// Runs that are deferred or in another thread's callback are waited for as long. A fill callback that the call
    /// itself is in cannot be interrupted: the time is looked at when it returns. kuf_close then waits for running
    /// callbacks as always, unless KUF_END_NOWAIT is given.
    pub end_timeout_ms: u32,
    /// Zero.
    pub reserved: u32,
    /// CPUs that the service threads may use: a cpu_set_t or longer, read during the call. NULL: those of the
    /// calling thread. Not with KUF_OPEN_DIRECT.
    pub cpus: *const c_void,
    /// Bytes at cpus, at most 8192; 0 when cpus is NULL.
    pub cpus_size: u64,
}

/// Where the pages of a slot come from without a callback: kuf_memory.source.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_source {
    /// sizeof(struct kuf_source), set by the caller.
    pub size: u32,
    /// KUF_SOURCE_FILE, KUF_SOURCE_MEMORY or KUF_SOURCE_ZERO.
    pub kind: u32,
    /// KUF_SOURCE_DIRECT_IO or 0.
    pub flags: u32,
    /// KUF_SOURCE_FILE: open for reading; duplicated.
    pub fd: i32,
    /// Where the slot's bytes (from slot_offset on) begin in the file or memory; of any alignment.
    pub offset: u64,
    /// KUF_SOURCE_MEMORY: the first byte, readable and unchanged until the slot or handle has ended. Else NULL.
    pub addr: *const c_void,
    /// KUF_SOURCE_MEMORY: bytes from addr on, at least all that the slot may need of them. Else 0.
    pub len: u64,
    /// The source may have the bytes of the slot from here on; a multiple of 4096.
    pub slot_offset: u64,
    /// How many of them, a multiple of 4096; 0: up to the slot's end.
    pub slot_len: u64,
    /// One bit for each page from slot_offset on, lowest bit first: whether this source has it. Holes of a file are zero
    /// then. NULL: it has all pages; a file with a base those that are not holes. Copied.
    ///
    /// # Notes
    /// With a bitmap the file may end where its last page does. Of a file with a base and no bitmap, pages of 4096 bytes
    /// that are a hole (as lseek(2) with SEEK_DATA says when the slot is added) are the base's. A copy of the file that
    /// leaves pages of zeroes out (cp --sparse=always) has other holes than the file: use a bitmap. Each run of pages takes
    /// 16 bytes of memory while the slot exists.
    pub bitmap: *const c_void,
    /// Bytes at bitmap, at least one bit for each page; 0 when bitmap is NULL.
    pub bitmap_size: u64,
    /// Bytes for one bit: a power of two, at least 4096; 0 when bitmap is NULL.
    pub bitmap_page_size: u64,
    /// The layer below, with the pages that this source does not have; NULL: they are zero. Copied.
    ///
    /// # Notes
    /// At most 1024 layers. They are flattened when the slot is added: a page costs one search, however many there are.
    pub base: *const kuf_source,
}

/// A memory slot: a guest physical range and the mapping behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_memory {
    /// sizeof(struct kuf_memory), set by the caller.
    pub size: u32,
    /// KUF_MEMORY_*.
    pub flags: u32,
    /// First guest physical address; a multiple of the page size.
    pub gpa: u64,
    /// Bytes; a multiple of the page size, not 0.
    pub len: u64,
    /// Address that backs gpa, in this process or the remote one; a multiple of the page size. All of the range must
    /// be mapped.
    pub hva: u64,
    /// Page size of the mapping in bytes. 0: detect; for KUF_MEMORY_REMOTE without fd, 0 means the base page size.
    pub page_size: u64,
    /// The shared file (memfd, tmpfs, hugetlbfs) that is mapped MAP_SHARED at hva; duplicated. Pages are then filled
    /// in place where the kernel has minor faults. Do not use MADV_COLLAPSE there before the slot is complete.
    ///
    /// # Notes
    /// MADV_COLLAPSE maps what is not filled: while the last pages of a stretch are being filled, and where
    /// KUF_MEMORY_FILL_ALL has found pages in the file.
    pub fd: i32,
    /// A userfaultfd that the caller has opened (UFFDIO_API done); duplicated. The library sets O_NONBLOCK on it and
    /// must be its only reader. One userfaultfd may serve many slots.
    pub uffd: i32,
    /// Offset in fd that is mapped at hva; a multiple of the page size.
    pub fd_offset: u64,
    /// Passed in kuf_fill, kuf_fault and kuf_event.
    pub opaque: *mut c_void,
    /// Source of the slot's pages, instead of the fill callback. Copied. Needs a fill callback (for other slots) or
    /// KUF_OPEN_SOURCES.
    pub source: *const kuf_source,
    /// A struct kuf_kvm_memory (kuf-kvm.h), or NULL. Copied.
    pub kvm: *const c_void,
}

/// What to fill ahead of demand.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_populate_request {
    /// sizeof(struct kuf_populate_request), set by the caller.
    pub size: u32,
    /// KUF_POPULATE_STOP or 0.
    pub flags: u32,
    /// First guest physical address, or KUF_ALL for every slot that exists when the request starts.
    pub gpa: u64,
    /// Bytes. May span slots and the gaps between them.
    pub len: u64,
    /// Most bytes per second; 0: no limit.
    pub rate: u64,
}

/// State of a slot or of all slots, in bytes: present + removed + absent + filling + deferred + poisoned = total.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_progress_info {
    /// sizeof(struct kuf_progress_info), set by the caller. Fields unknown to the library are zeroed.
    pub size: u32,
    /// KUF_PROGRESS_*.
    pub flags: u32,
    /// The slot's gpa; 0 with KUF_ALL.
    pub gpa: u64,
    /// All of the slot, or of all slots.
    pub total: u64,
    /// Holds its bytes.
    pub present: u64,
    /// Given back by the guest or unmapped: reads as zero.
    pub removed: u64,
    /// Not asked for.
    pub absent: u64,
    /// Being filled now.
    pub filling: u64,
    /// To be resolved by the caller: deferred, or taken with kuf_read.
    pub deferred: u64,
    /// Could not be filled.
    pub poisoned: u64,
}

/// Settings in effect, with defaults filled in. Filled by kuf_settings.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_settings_info {
    /// sizeof(struct kuf_settings_info), set by the caller. Fields unknown to the library are zeroed.
    pub size: u32,
    /// KUF_MECHANISM_* of the handle.
    pub mechanism: u32,
    /// KUF_OPEN_*. No mode flag stands for the mode with a fill callback.
    pub open_flags: u32,
    /// KUF_SETTING_*; 0 with KUF_ALL.
    pub flags: u32,
    /// Number of concurrent fill callbacks; 0 when caller-driven.
    pub fill_threads: u32,
    /// How many userfaultfds share the slot's memory, or the library has opened for the handle.
    pub userfaultfds: u32,
    /// Microseconds; 0 also where busy-polling has no effect.
    pub spin_us: u32,
    /// Highest KUF_LOG_* that is passed to log; 0 without log.
    pub log_level: u32,
    /// In bytes, rounded to pages of the slot; 0 when caller-driven.
    pub demand_run: u64,
    /// As demand_run.
    pub populate_run: u64,
    /// Page size of the slot, or of ordinary memory with KUF_ALL, in bytes.
    pub page_size: u64,
}

/// Latency histogram in nanoseconds, one bucket per power of two.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_histogram {
    /// Number of values.
    pub count: u64,
    /// Their sum.
    pub sum_ns: u64,
    /// The largest.
    pub max_ns: u64,
    /// See KUF_HISTOGRAM_BUCKETS.
    pub bucket: [u64; KUF_HISTOGRAM_BUCKETS],
}

/// Counters since kuf_open. Each is read on its own, so sums may be off by what is in progress.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_stats_info {
    /// sizeof(struct kuf_stats_info), set by the caller. Fields unknown to the library are zeroed.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Page faults read from the kernel.
    pub faults: u64,
    /// Of these: the page was in the page cache of a shared file already.
    pub faults_minor: u64,
    /// Of these: write accesses.
    pub faults_write: u64,
    /// Of these: another fault was pending for the page.
    pub faults_joined: u64,
    /// Of these: the page had become present.
    pub faults_late: u64,
    /// Of these: the address was in no slot (unmapped, moved or removed meanwhile); left to the kernel.
    pub faults_unknown: u64,
    /// Calls of kuf_vcpu_fault.
    pub vcpu_faults: u64,
    /// Fill callbacks made and sources asked.
    pub fills: u64,
    /// Of these: failed.
    pub fills_failed: u64,
    /// Of these: returned KUF_FILL_DEFERRED.
    pub fills_deferred: u64,
    /// Bytes made present from a buffer.
    pub bytes_copied: u64,
    /// Bytes made present as zeroes.
    pub bytes_zeroed: u64,
    /// Bytes made present in place, without a copy.
    pub bytes_in_place: u64,
    /// Of all bytes made present: asked for by kuf_populate.
    pub bytes_populated: u64,
    /// Bytes poisoned or made inaccessible.
    pub bytes_poisoned: u64,
    /// Bytes dropped by kuf_discard.
    pub bytes_discarded: u64,
    /// Bytes reported as removed or unmapped by the kernel, or by KUF_DISCARD_ZERO.
    pub bytes_removed: u64,
    /// REMOVE events of userfaultfd.
    pub events_remove: u64,
    /// UNMAP events.
    pub events_unmap: u64,
    /// REMAP events.
    pub events_remap: u64,
    /// FORK events.
    pub events_fork: u64,
    /// Installs put off because an event was unread (EAGAIN).
    pub install_again: u64,
    /// Pages found present at install (EEXIST).
    pub install_exists: u64,
    /// Installs retried for want of memory (ENOMEM, ENOSPC).
    pub install_no_memory: u64,
    /// Faults that KVM lost (kuf-kvm.h, KUF_KVM_EVENT_SWEEP).
    pub faults_lost: u64,
    /// Faults that KVM queued without a signal (kuf-kvm.h, KUF_KVM_EVENT_UNSIGNALLED).
    pub faults_unsignalled: u64,
    /// From reading a fault until its fill began; caller-driven: until kuf_read returned it.
    pub queueing: kuf_histogram,
    /// Inside the fill callback or source; deferred and caller-driven: until kuf_resolve.
    pub filling: kuf_histogram,
    /// Making a run present.
    pub installing: kuf_histogram,
    /// From reading a fault until its page was present.
    pub blocked: kuf_histogram,
    /// Of all bytes made present: filled ahead of a thread that was not blocked on them (kuf_options.demand_run).
    pub bytes_ahead: u64,
    /// Total time during which all threads of kuf_watch_threads were blocked at once.
    pub blocked_all_ns: u64,
}

/// How long one thread was blocked on page faults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_block_time {
    /// Thread ID, in the pid namespace of the process that opened the userfaultfd.
    pub thread: u32,
    /// Zero.
    pub reserved: u32,
    /// Faults that ended. A fault that signals interrupt and that is raised again is one.
    pub faults: u64,
    /// Sum of the times from reading the fault until the page was present.
    pub total_ns: u64,
    /// The longest of them.
    pub max_ns: u64,
}

macro_rules! defaults {
    ($zeroes:literal: $($name:ident $({ $size:ident })?),* $(,)?) => {
        $(
            impl Default for $name {
                #[doc = $zeroes]
                fn default() -> Self {
                    // SAFETY: integers, pointers and optional functions: all zeroes are a value.
                    let zero: Self = unsafe { std::mem::zeroed() };
                    Self { $($size: size_of::<Self>() as u32,)? ..zero }
                }
            }
        )*
    };
}

defaults!(
    "All zeroes but `size`.":
    kuf_options { size },
    kuf_source { size },
    kuf_memory { size },
    kuf_kvm_memory { size },
    kuf_populate_request { size },
    kuf_probe_info { size },
    kuf_progress_info { size },
    kuf_settings_info { size },
    kuf_stats_info { size },
);

defaults!("All zeroes.": kuf_fault, kuf_histogram, kuf_block_time);
