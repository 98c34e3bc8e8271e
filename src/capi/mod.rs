//! The door: every `extern "C"` function. Each one checks its arguments, turns a panic into an error and an error into
//! -errno with a text, and calls one method of [`Service`]. No logic lives here.

mod convert;
mod door;
mod guard;
pub mod types;

use std::ffi::{c_char, c_int, c_void};

use libc::ssize_t;

use crate::error::{self, Error};
use crate::probe;
use crate::service::config::Config;
use crate::service::Service;
use convert::{read_struct, room, write_struct};
use door::Door;
use guard::{guard, guard_count};
use types::*;

/// The version of the library that is loaded: KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH.
/// Any thread, any time.
#[no_mangle]
pub extern "C" fn kuf_version() -> u32 {
    KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH
}

/// The calling thread's last failure in words: what was wrong and what to do about it. Never NULL; "" when no call of
/// this thread has failed. Calls that succeed leave it alone; the next one that fails overwrites it. The pointer is the
/// same, and valid, for the life of the thread.
#[no_mangle]
pub extern "C" fn kuf_error() -> *const c_char {
    error::last_text()
}

/// Whether a feature (KUF_FEATURE_*) works in this process on this kernel.
///
/// Returns 1 or 0; -EINVAL for a feature this version does not know. Opens a userfaultfd for a moment at the first
/// call. Any thread.
#[no_mangle]
pub extern "C" fn kuf_has_feature(feature: u32) -> c_int {
    guard(|| probe::has_feature(feature).map(c_int::from))
}

/// Finds out which mechanisms work here and, for each that does not, why. Changes nothing.
///
/// vm_fd: a KVM VM file descriptor, or -1 to learn only what does not need one.
/// out: out->size set by the caller.
///
/// Returns 0, also when nothing works (out->mechanisms is 0 then). Any thread.
/// -EINVAL: out is NULL or its size is below that of the first version; vm_fd is neither -1 nor a KVM VM.
/// -EBADF: vm_fd is not an open descriptor.
/// Kernel: userfaultfd(2), ioctl_userfaultfd(2). The KVM interfaces' capability numbers were given to other features,
/// so they are tried: the bitmap on a VM made for it, the asynchronous one by KVM_ENABLE_CAP(236, DISABLE) on vm_fd,
/// which changes nothing where userfaults are not enabled (and is not tried where they are).
///
/// # Safety
/// `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_probe(vm_fd: c_int, out: *mut kuf_probe) -> c_int {
    guard(|| {
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(probe::report(vm_fd)?.to_c(size))) }
    })
}

/// Opens a fault service: duplicates the VM descriptor if one is given, opens the mechanism and starts the service
/// threads. Memory is added afterwards with kuf_add_memory.
///
/// With options->fill or KUF_OPEN_SOURCES the handle is *serviced*: service threads read faults, call it or ask the slot's
/// source, and place the pages. Without, it is *caller-driven*: the host reads faults with kuf_read and answers with
/// kuf_resolve. kuf_resolve works on both.
///
/// Returns 0 and sets *out; on failure *out is NULL. Any thread.
/// -EINVAL: options or out is NULL, size is below that of the first version, an unknown flag or mechanism, a field out
///   of its range, a field set whose flag is not, KUF_OPEN_DIRECT with a fill callback or KUF_OPEN_SOURCES; cpus or
///   populate_cpus names no CPU that the process may use.
/// -E2BIG: options has non-zero bytes that this version does not know.
/// -EBADF: vm_fd is not an open descriptor.
/// -ENOTSUP: the mechanism asked for by name does not work here. -EEXIST: KVM's asynchronous userfaults are enabled on
///   this VM already. -EIO: the VM is another process's.
/// -EPERM: userfaultfd is refused; the text names the ways to grant it: /dev/userfaultfd, CAP_SYS_PTRACE,
///   vm.unprivileged_userfaultfd. Also KUF_OPEN_FOLLOW_FORK without CAP_SYS_PTRACE.
/// -ENOSYS: the kernel has no userfaultfd.
/// -EMFILE, -ENFILE, -ENOMEM, -EAGAIN: no descriptor, memory or thread to be had.
///
/// # Safety
/// `options` is NULL or points to `options->size` readable bytes, and the sets of CPUs there to as many as it says; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn kuf_open(options: *const kuf_options, out: *mut *mut kuf) -> c_int {
    guard(|| {
        if out.is_null() {
            return Err(Error::null("out"));
        }
        // SAFETY: checked for NULL; the caller promises that it is writable.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: the caller promises options->size readable bytes.
        let options = unsafe { read_struct(options, "options") }?;
        // SAFETY: the caller promises that the sets are as long as it says.
        let (cpus, populate_cpus) = unsafe {
            (
                convert::cpus(options.cpus, options.cpus_size, "options->cpus")?,
                convert::cpus(options.populate_cpus, options.populate_cpus_size, "options->populate_cpus")?,
            )
        };
        let service = Service::open(Config { cpus, populate_cpus, ..convert::options(&options)? })?;
        // SAFETY: as above.
        unsafe { *out = Door::open(service) };
        Ok(0)
    })
}

/// Ends a service and sets *kuf to NULL. No page that was not filled is ever released onto zeroes: with unresolved
/// pages the call is refused, or does what flags say.
///
/// flags: KUF_CLOSE_*.
///
/// Once it has begun every other call on the handle fails with -EBADF, and those that wait in kuf_poll, kuf_ensure or
/// kuf_vcpu_fault return -ECANCELED. It then waits for fill callbacks that are running, unless KUF_CLOSE_NOWAIT is
/// given; pages are poisoned before that wait. A handle whose service died (KUF_EVENT_FATAL) is always closed, and
/// poisons.
///
/// Returns 0. Any thread.
/// -EINVAL: kuf or *kuf is NULL, an unknown flag, KUF_CLOSE_HANDOVER with other flags or with a slot whose userfaultfd
///   is the library's own. -EBADF: closed already, or being closed.
/// -EBUSY: unresolved pages, and no flag says what to do; the handle goes on as before.
/// -EIO: KUF_CLOSE_POPULATE could not fill everything; the handle goes on as before.
/// -ENOTSUP: KUF_CLOSE_POPULATE, and the handle has no fill callback and no KUF_OPEN_SOURCES.
/// -EDEADLK: called from a callback. -ECHILD: called in a forked child.
///
/// # Safety
/// `kuf` is NULL or points to a pointer that kuf_open has set.
#[no_mangle]
pub unsafe extern "C" fn kuf_close(kuf: *mut *mut kuf, flags: u32) -> c_int {
    guard(|| {
        if kuf.is_null() {
            return Err(Error::null("kuf"));
        }
        // SAFETY: checked for NULL; the caller promises that it is readable and writable.
        let handle = unsafe { *kuf };
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::close(handle, flags) }?;
        // SAFETY: as above.
        unsafe { *kuf = std::ptr::null_mut() };
        Ok(0)
    })
}

/// Puts a memory slot under the service: from its return on, no absent page of it can be touched without being served.
/// Pages that exist already keep their bytes and are not asked for, so do not populate the mapping (MAP_POPULATE). May
/// be called while other slots are in use. Reads /proc/self/maps.
///
/// memory: memory->size set by the caller; the descriptors in it stay the host's.
///
/// Returns 0. Any thread but not from a callback (-EDEADLK).
/// -EINVAL: kuf or memory is NULL, size below that of the first version, an unknown flag; gpa, len, hva or fd_offset is
///   0 where it may not be, is not a multiple of the granule or overflows; the granule is not the mapping's page size;
///   fd or uffd given without its flag; KUF_MEMORY_REMOTE without KUF_MEMORY_UFFD; a kind of mapping userfaultfd cannot
///   serve (one of an ordinary file, a private one of any file); a source that is shorter than the slot, of an unknown
///   kind, or with fields set that its kind does not have; a source on a caller-driven handle, none on one that has
///   nothing else (KUF_OPEN_SOURCES).
/// -E2BIG: memory or source has non-zero bytes that this version does not know.
/// -EEXIST: gpa..gpa+len overlaps a slot, or hva..hva+len one with the same userfaultfd.
/// -EFAULT: part of hva..hva+len is not mapped.
/// -EBADF: fd or uffd is not an open descriptor; source->fd is none, or not open for reading. -EBADFD: fd is not a shared
///   memory file, is not the one mapped at hva, or uffd is not a userfaultfd; source->fd is neither a regular file nor a
///   block device.
/// -EBUSY: another userfaultfd has the range; with KUF_MECHANISM_KVM_ASYNC and without KUF_MEMORY_FD, something touched
///   it before. -ESRCH: the remote process is gone.
/// -ENOTSUP: the kernel cannot serve this kind of memory; a hugetlbfs file that holds data, without
///   KUF_MEMORY_FILL_ALL; KUF_SOURCE_DIRECT_IO on a file system that has none. -ENOMEM, -EMFILE: out of memory, mappings or descriptors.
/// -ECANCELED: kuf_close has begun; what nobody has filled of the range may be poisoned. -EIO: the service is dead.
/// Kernel: UFFDIO_REGISTER (MISSING; MISSING|MINOR for a shared file), KVM_SET_MEMORY_ATTRIBUTES,
/// KVM_SET_USER_MEMORY_REGION2. With userfaultfd madvise, munmap and mremap of the range are
/// followed (docs/adopting.md says what they mean); MREMAP_DONTUNMAP is not supported.
///
/// # Safety
/// `kuf` came from kuf_open; `memory` is NULL or points to `memory->size` readable bytes, and so does `memory->source`.
#[no_mangle]
pub unsafe extern "C" fn kuf_add_memory(kuf: *mut kuf, memory: *const kuf_memory) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises memory->size readable bytes.
        let memory = unsafe { read_struct(memory, "memory") }?;
        let source = match memory.source.is_null() {
            true => None,
            // SAFETY: the caller promises source->size readable bytes.
            false => Some(unsafe { read_struct(memory.source, "source") }?),
        };
        door.service().add_memory(convert::memory(&memory, source.as_ref())?)?;
        Ok(0)
    })
}

/// Takes the slot that starts at gpa off the service; its memory stays mapped and is the host's alone: unregistered,
/// huge pages possible again, no cost left. With KUF_MECHANISM_KVM_ASYNC poisoned pages lose their marks (and become
/// PROT_NONE where userfaultfd cannot poison them); with KUF_MECHANISM_KVM_BITMAP the bitmap is unmapped, so take
/// KVM_MEM_USERFAULT off the memslot before.
///
/// flags: 0, KUF_CLOSE_POISON, KUF_CLOSE_POPULATE or both.
///
/// A fill of this slot that is running is waited for, up to 100 ms, but not in an event callback: one ahead of vCPUs that
/// have stopped since, or one whose pages were resolved or given back meanwhile. After a call that returns 0 no fill
/// callback has memory_opaque in hand. Touchers should have ended: their fills may follow one another.
///
/// Of two calls for one slot at once, one finds that it has gone.
///
/// Returns 0. Any thread, also from an event callback unless the slot has KUF_MEMORY_MEMSLOT, but not from a fill
/// callback (-EDEADLK).
/// -EINVAL: kuf is NULL, an unknown flag. -ENOENT: no slot starts at gpa.
/// -EBUSY: unresolved pages and no flag; a fill of this slot has been running for longer than that (retry when it has
///   ended).
/// -EIO: KUF_CLOSE_POPULATE could not fill everything; the slot goes on as before. -ENOTSUP: KUF_CLOSE_POPULATE,
///   and the handle has no fill callback and no KUF_OPEN_SOURCES.
/// Kernel: UFFDIO_UNREGISTER, KVM_SET_MEMORY_ATTRIBUTES.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_remove_memory(kuf: *mut kuf, gpa: u64, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        door.service().remove_memory(gpa, flags)?;
        Ok(0)
    })
}

/// A descriptor that polls readable (POLLIN) when kuf_read has something to return: for the host's own poll, epoll or
/// GSource, level-triggered. Do not read, write or close it; it lives as long as the handle.
///
/// Returns the descriptor (0 or above). Any thread.
/// -EINVAL: kuf is NULL. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_fd(kuf: *mut kuf) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().caller_fd()
    })
}

/// Waits until kuf_read has something to return.
///
/// timeout_ms: milliseconds at most; 0 looks without waiting; -1 waits for ever.
///
/// Returns 1: faults to read; 0: timed out. Any thread but not from a callback (-EDEADLK).
/// -EINVAL: kuf is NULL, timeout_ms below -1. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
/// -ECANCELED: kuf_close has begun. -EIO: the service is dead.
/// A signal does not end the wait.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_poll(kuf: *mut kuf, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().caller_poll(timeout_ms).map(c_int::from)
    })
}

/// Takes up to n faults, oldest first, without waiting. From then on the host owes each of them a kuf_resolve;
/// kuf_pending lists those still owed. A page is given once however many threads wait for it, and never when it is
/// present.
///
/// faults: room for n entries. n: 1 or more.
///
/// Returns the number taken. Any thread; several may read at once and get different faults.
/// -EAGAIN: none now. -EINVAL: kuf or faults is NULL, n is 0. -ENOTSUP: the handle has a fill callback or KUF_OPEN_SOURCES.
/// -EDEADLK: called from a callback. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open; `faults` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_read(kuf: *mut kuf, faults: *mut kuf_fault, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        if n == 0 {
            return Err(Error::new(libc::EINVAL, "n is 0: there is no room for a fault"));
        }
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(faults, "faults", n) }?;
        door.service().caller_read(out)
    })
}

/// Makes gpa..gpa+len present and wakes whoever waits for it: with data from src, or as flags say. Asked for or not,
/// from any thread, in any order, in any pieces, twice: pages that are present keep their bytes, and pages that the
/// guest has given back stay given back.
///
/// gpa, len: multiples of the granule, len not 0, within one slot.
/// src: len readable bytes, any alignment, not unresolved guest memory; NULL with KUF_RESOLVE_ZERO, _IN_PLACE, _POISON
/// or _PRESENT. Not kept. It may be on a disk still (a mapped image): the calling thread waits for that, and nobody else.
/// flags: 0 or one KUF_RESOLVE_*.
///
/// Never waits for host code: a page whose fill callback is running at this moment in place takes the bytes when the
/// callback returns KUF_DEFERRED or fails. Until then they are kept, and the page is not present: such bytes do not
/// count in what is returned, which may be 0 as for a page that is there already (kuf_progress tells the two apart).
///
/// Returns the bytes that this call made present (or poisoned); bytes that were present, given back, or are being made
/// present by another thread do not count, nor do those that KUF_RESOLVE_PRESENT has not found. Any thread, also from
/// callbacks.
/// -EINVAL: kuf is NULL, src is NULL or not as flags say, an unknown flag or two of them, misaligned, len is 0,
///   overflow; KUF_RESOLVE_IN_PLACE on a slot that is not filled in place, KUF_RESOLVE_PRESENT on one that is.
///   -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ENOTSUP: KUF_RESOLVE_PRESENT on memory of another
///   process.
/// -EFAULT: src is not readable over len bytes; what could be read up to there may be present (the call can be
///   repeated).
/// -EDEADLK: src is itself guest memory that is not present. -ENOMEM: the kernel has no memory for the pages. -ESRCH:
///   the process behind the slot is gone. -EIO: the service is dead.
/// Kernel: UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON, UFFDIO_WAKE; /proc/self/pagemap, mincore,
/// MADV_POPULATE_READ.
///
/// # Safety
/// `kuf` came from kuf_open; `src` is NULL or an address whose `len` bytes nobody writes meanwhile (they may be
/// unreadable).
#[no_mangle]
pub unsafe extern "C" fn kuf_resolve(kuf: *mut kuf, gpa: u64, src: *const c_void, len: usize, flags: u32) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        let how = convert::resolution(src, flags)?;
        door.service().resolve(gpa, len as u64, how).map(|bytes| bytes as usize)
    })
}

/// For the KVM_RUN loop: serves the fault behind a KVM_EXIT_MEMORY_FAULT (KVM_RUN returned -1 with errno EFAULT) on the
/// calling vCPU thread, with no hand-off. The page is filled here, or waited for when another thread is filling it.
/// With userfaultfd such exits do not occur, and the call is a legal kuf_ensure over the granules that gpa..gpa+len
/// touches.
///
/// gpa, len: kvm_run->memory_fault.gpa and .size, of any alignment. exit_flags: kvm_run->memory_fault.flags.
///
/// For a page that is present it returns 0 at once: handle exits that have another cause first. On a caller-driven
/// handle the page is queued for kuf_read and waited for, so not from the thread that reads.
///
/// Returns 0: run the vCPU again. Any thread but not from a callback (-EDEADLK); calls the fill callback.
/// -EINVAL: kuf is NULL, len is 0, overflow. -ENOENT: gpa is in no slot, or exit_flags lack
///   KVM_MEMORY_EXIT_FLAG_USERFAULT (1 << 4) with a KVM mechanism: not a fault of the library's; handle it as without
///   it.
/// -ERANGE: the range leaves its slot. -EHWPOISON: the page could not be filled: inject a machine check or stop the
///   guest.
/// -ECANCELED: kuf_close has begun. -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
/// Kernel: KVM_EXIT_MEMORY_FAULT (KVM API, 5).
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_vcpu_fault(kuf: *mut kuf, gpa: u64, len: u64, exit_flags: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        door.service().vcpu_fault(gpa, len, exit_flags)?;
        Ok(0)
    })
}

/// Returns when gpa..gpa+len is present, filling it at demand priority: for host threads that touch guest memory where
/// the mechanism does not catch them, or that must not be stopped by a fault later (device models, vhost set-up, gdb
/// stubs).
///
/// gpa, len: of any alignment, within one slot; len not 0. timeout_ms: milliseconds at most, -1 for ever, 0 does not
/// wait for others but still fills what nobody has begun.
///
/// With a KVM mechanism, and in shared memory with KUF_OPEN_DETECT_ZERO, pages that the guest gave back become zero pages:
/// they take memory again.
///
/// Returns 0: present or given back by the guest. Any thread but not from a callback (-EDEADLK); calls the fill
/// callback on the calling thread, so hold no lock that it takes. On a caller-driven handle the pages are queued for
/// kuf_read and waited for: not from the thread that reads.
/// -EINVAL: kuf is NULL, len is 0, overflow, timeout_ms below -1. -ENOENT: gpa is in no slot. -ERANGE: the range leaves
///   its slot.
/// -ETIMEDOUT: not in time. -EHWPOISON: part of the range could not be filled. -ECANCELED: kuf_close has begun.
/// -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_ensure(kuf: *mut kuf, gpa: u64, len: u64, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        door.service().ensure(gpa, len, timeout_ms)?;
        Ok(0)
    })
}

/// Fills a range in the background, behind all demand, in address order, at no more than a given rate. Requests queue
/// up. KUF_EVENT_POPULATED ends each one; a fill that fails ends it early and poisons nothing, for nobody has touched
/// those pages. While more is demanded than fill_threads can serve it waits, but not for ever: it keeps about a
/// sixteenth of its pace.
///
/// request: request->size set by the caller.
///
/// Returns 0: queued (or stopped, with KUF_POPULATE_STOP). Any thread, also from callbacks.
/// -EINVAL: kuf or request is NULL, size below that of the first version, an unknown flag, gpa or len not a multiple of
///   the host's page size, len is 0 (or not 0 with KUF_ALL), overflow. -E2BIG: request has non-zero bytes that this
///   version does not know.
/// -ENOENT: no slot in the range. -ENOTSUP: the handle has no fill callback and no KUF_OPEN_SOURCES. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open; `request` is NULL or points to `request->size` readable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_populate(kuf: *mut kuf, request: *const kuf_populate) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises request->size readable bytes.
        let request = unsafe { read_struct(request, "request") }?;
        door.service().populate(convert::populate(&request)?)?;
        Ok(0)
    })
}

/// Starts recording which pages are demanded, in which order, for kuf_replay at the next start from the same memory:
/// the working set. Demanded is what a fault, kuf_vcpu_fault or kuf_ensure asks for, with the pages that are filled
/// along with it; what was brought ahead of sequential access counts when access has come to its end. On a caller-driven
/// handle it is what kuf_read is given. Each page is recorded once. What is present when it
/// is first touched leaves no trace, so start before the guest runs, and let nothing fill ahead of it meanwhile
/// (kuf_populate, kuf_replay, kuf_resolve of pages nobody asked for): only what somebody comes to wait for is recorded
/// of that. Forked children's own copies are not recorded.
///
/// flags: 0.
///
/// Recording takes 16 bytes of memory for each run of neighbouring pages (up to twice that while the table grows) and
/// 512 bytes for each 16 MiB of guest memory that has demanded pages. Beyond 67108864 runs, or without memory for it,
/// pages are left out; a KUF_LOG_WARN record at kuf_record_stop says so.
///
/// Returns 0. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, an unknown flag. -EALREADY: the handle is recording, or has a recording that could not be
///   written. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_record_start(kuf: *mut kuf, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().record_start(flags)?;
        Ok(0)
    })
}

/// Ends the recording and writes it: guest physical addresses and lengths, nothing of this host. The format is that of
/// docs/record-format.md (KUF_RECORD_VERSION), about three bytes for each run of pages. kuf_close drops a recording
/// that was not written.
///
/// fd: a file, pipe or stream socket to write it to, from where it stands; it is neither synced nor closed. -1: drop
/// the recording.
///
/// Waits for fd as long as it takes, also when it is non-blocking, and kuf_close waits for it. SIGPIPE is as with
/// write(2).
///
/// Returns 0. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, the handle is not recording. -EBADF: fd is below -1, not open or not open for writing; the
///   recording goes on.
/// -ENOSPC, -EFBIG, -EDQUOT, -EIO, -EPIPE: as write(2); -ENOMEM: no memory to put the file together. The recording is
///   over and kept: call again, with an fd that works (which gets all of it) or with -1.
/// -ECANCELED: kuf_close has begun. -EIO: also when the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_record_stop(kuf: *mut kuf, fd: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().record_stop(fd)?;
        Ok(0)
    })
}

/// Fills the pages of a recording in the background, in about the order in which they were demanded, behind all demand
/// and ahead of every kuf_populate, also of one that is running. Memory may be laid out otherwise than it was then, in
/// other slots and with another granule (whole granules are filled); what lies in no slot, is present or was given back
/// is skipped. The slots are those there are when the replay begins. KUF_EVENT_REPLAYED ends it; a fill that fails ends
/// it early, and poisons nothing but a page that somebody waits for. Replays queue up; KUF_POPULATE_STOP ends them.
///
/// A guest that runs meanwhile catches up with it. While fills are quick, a fault at one of the pages that come next (of
/// up to 128 runs of the recording) is then left to the replay, which asks for the page with KUF_FILL_DEMAND, so that
/// the guest has many pages before it when it goes on. That takes some hundred microseconds at most as a rule; a fault
/// that was left for about a millisecond is served like any other. kuf_vcpu_fault and kuf_ensure are not left to it.
///
/// fd: where kuf_record_stop has written, read from where it stands up to the end of the recording and not further;
/// waited for as long as it takes. It may be closed afterwards. flags: 0.
///
/// The file need not be trusted: it says which pages are filled first and nothing else, and takes no more memory than
/// it is long.
///
/// Returns 0: queued. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, an unknown flag, fd holds no recording. -EBADF: fd is not open for reading. -EBADMSG: the
///   recording is damaged or ends early. -EPROTONOSUPPORT: it is of a newer version. -EFBIG: it has more than 67108864
///   runs. -ENOENT: no part of it is in a memory slot (one that is empty is replayed at once).
/// -ENOTSUP: the handle has no fill callback and no KUF_OPEN_SOURCES. -ENOMEM: no memory for it. -EIO and others: as
///   read(2). -ECANCELED: kuf_close has begun. -EIO: also when the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_replay(kuf: *mut kuf, fd: c_int, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().replay(fd, flags)?;
        Ok(0)
    })
}

/// Drops the pages of gpa..gpa+len and arms them again: the next touch refills them from the source or, with
/// KUF_DISCARD_REMOVED, with zeroes. Poisoned pages become ordinary ones again (not in another process, where their
/// mark stays). A fill of such a page that is running is not used: it is asked for again. The host sees to it that the
/// guest does not use the range meanwhile; what it writes during the call may be lost. A shared file loses the bytes
/// for all its mappings.
///
/// gpa, len: multiples of the granule, len not 0, within one slot. flags: 0 or KUF_DISCARD_REMOVED.
///
/// Returns 0. Any thread, also from fill and event callbacks unless the slot has KUF_MEMORY_MEMSLOT (-EDEADLK).
/// -EINVAL: kuf is NULL, an unknown flag, misaligned, len is 0, overflow. -ENOENT: gpa is in no slot. -ERANGE: the
///   range leaves its slot. -ENOTSUP: memory of another process without KUF_MEMORY_FD: only that process can drop it.
/// -ECANCELED: kuf_close has begun. -ESRCH: the process behind the slot is gone. -EIO: the service is dead.
/// Kernel: madvise(MADV_DONTNEED); fallocate(FALLOC_FL_PUNCH_HOLE) for shared files, which is all that is done to
/// memory of another process.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_discard(kuf: *mut kuf, gpa: u64, len: u64, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        door.service().discard(gpa, len, convert::discard(flags)?)?;
        Ok(0)
    })
}

/// KUF_MECHANISM_KVM_BITMAP: the address of the bitmap of the slot that starts at gpa, for
/// kvm_userspace_memory_region2.userfault_bitmap (offset 48) of the memslot that the host sets with KVM_MEM_USERFAULT
/// (1 << 3). One bit for each 4 KiB, set where a vCPU is to exit; only the library writes it.
///
/// After KUF_EVENT_COMPLETE the host may take the flag off the memslot, which makes huge mappings possible again, and
/// puts it on again before kuf_discard if it wants exits; without the flag everybody is caught by the userfaultfd
/// underneath. It changes memslots on a thread of its own, not in a callback: KVM waits for those who wait for pages.
///
/// address: set on success.
///
/// Returns 0. Any thread, also from callbacks. The bitmap is unmapped by kuf_remove_memory and kuf_close: take the flag
/// off before.
/// -EINVAL: kuf or address is NULL. -ENOENT: no slot starts at gpa. -ENOTSUP: another mechanism. -ECANCELED: kuf_close
///   has begun. -EIO: the service is dead.
/// Kernel: KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT.
///
/// # Safety
/// `kuf` came from kuf_open; `address` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn kuf_kvm_bitmap(kuf: *mut kuf, gpa: u64, address: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        if address.is_null() {
            return Err(Error::null("address"));
        }
        let at = door.service().kvm_bitmap(gpa)?;
        // SAFETY: checked for NULL; the caller promises that it is writable.
        unsafe { *address = at };
        Ok(0)
    })
}

/// Names pages that KVM itself reads or writes: kvmclock, steal time, PV EOI, interrupt controller tables. They are the
/// first to be filled when a fault was lost (KUF_EVENT_SWEEP). Fill them before vCPUs run (kuf_ensure) where that is
/// possible: who waits for one stays inside KVM.
///
/// gpa, len: of any alignment, within one slot; len not 0. Remembered until the slot is removed.
///
/// Returns 0. Any thread, also from fill and event callbacks. Of use with KUF_MECHANISM_KVM_ASYNC; without effect with
/// others.
/// -EINVAL: kuf is NULL, len is 0, overflow. -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot.
/// -ECANCELED: kuf_close has begun. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_kvm_owned(kuf: *mut kuf, gpa: u64, len: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        door.service().kvm_owned(gpa, len)?;
        Ok(0)
    })
}

/// Returns when nobody is known to wait for a page, for work that waits inside the kernel for those who wait: changes
/// of memslots, ioeventfds and coalesced MMIO ranges on a kernel with KVM asynchronous userfaults, where a waiter may
/// keep them, and they the waiter. Stop the vCPUs first, and make no other call that has KVM touch guest memory until
/// the change is made.
///
/// timeout_ms: milliseconds at most, -1 for ever, 0 does not wait.
///
/// Fills that somebody inside the kernel waits for are waited for: hold no lock that the fill callback takes.
///
/// Returns 0. Any thread but not from a callback (-EDEADLK), and on a caller-driven handle not the thread that reads.
/// -EINVAL: kuf is NULL, timeout_ms below -1. -ETIMEDOUT: pages are still waited for. -EHWPOISON: KVM waits for a page
///   that is poisoned (KUF_EVENT_PARKED); said once for each such page. -ECANCELED: kuf_close has begun. -EIO: the
///   service is dead.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_quiesce(kuf: *mut kuf, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Door::enter(kuf) }?.service().quiesce(timeout_ms)?;
        Ok(0)
    })
}

/// Lists what the host has been asked for and has not resolved: runs deferred or still inside their fill callback, and
/// faults taken with kuf_read (or waiting to be). To be asked for again from a source that has come back after its
/// connection was lost.
///
/// faults: room for n entries, in order of gpa; may be NULL when n is 0.
///
/// Returns the number of runs pending, which may be more than n. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, faults is NULL and n is not 0. -ECANCELED: kuf_close has begun. -EIO: the service is dead.
///
/// # Safety
/// `kuf` came from kuf_open; `faults` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_pending(kuf: *mut kuf, faults: *mut kuf_fault, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(faults, "faults", n) }?;
        door.service().pending(out)
    })
}

/// How far the slot that holds gpa is, or all slots with KUF_ALL.
///
/// out: out->size set by the caller.
///
/// Returns 0. Any thread, also from callbacks.
/// -EINVAL: kuf or out is NULL, size below that of the first version. -ENOENT: gpa is in no slot.
///
/// # Safety
/// `kuf` came from kuf_open; `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_progress(kuf: *mut kuf, gpa: u64, out: *mut kuf_progress) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(kuf_progress { size, ..door.service().progress(gpa)? })) }
    })
}

/// Counters and latency histograms since kuf_open.
///
/// out: out->size set by the caller.
///
/// Returns 0. Any thread, also from callbacks.
/// -EINVAL: kuf or out is NULL, size below that of the first version.
///
/// # Safety
/// `kuf` came from kuf_open; `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_stats(kuf: *mut kuf, out: *mut kuf_stats) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(kuf_stats { size, ..door.service().stats() })) }
    })
}

/// Names the threads for which kuf_stats.blocked_all_ns is kept: the vCPUs, whose common wait is time that the guest does
/// not run at all. Replaces those of the last call and keeps the time counted so far. A thread that waits already counts
/// from its next fault on.
///
/// threads: n thread ids as in gettid(2), in the pid namespace of the process that opened the userfaultfd; may be NULL
/// when n is 0, which ends it. Copied; one that is named twice counts once.
///
/// Where the kernel does not name threads (KUF_FEATURE_THREAD_ID) the time stays 0, and so for those who wait in
/// kuf_ensure and kuf_vcpu_fault.
///
/// Returns 0. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, threads is NULL and n is not 0, n is above 65536, a thread id is 0.
///
/// # Safety
/// `kuf` came from kuf_open; `threads` is NULL or points to `n` ids.
#[no_mangle]
pub unsafe extern "C" fn kuf_watch_threads(kuf: *mut kuf, threads: *const u32, n: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises n ids.
        door.service().watch_threads(unsafe { convert::threads(threads, n) }?);
        Ok(0)
    })
}

/// How long each thread was kept waiting, longest sum first; empty where the kernel does not name threads
/// (KUF_FEATURE_THREAD_ID).
///
/// times: room for n entries; may be NULL when n is 0.
///
/// Returns the number of threads known, which may be more than n. Any thread, also from callbacks.
/// -EINVAL: kuf is NULL, times is NULL and n is not 0.
///
/// # Safety
/// `kuf` came from kuf_open; `times` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_block_times(kuf: *mut kuf, times: *mut kuf_block_time, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let door = unsafe { Door::enter(kuf) }?;
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(times, "times", n) }?;
        Ok(door.service().block_times(out))
    })
}
