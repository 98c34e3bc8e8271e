//! The handle: every `extern "C"` function. Each one checks its arguments, turns a panic into an error and an error into
//! -errno with a text, and makes one call of `service::calls` or `service::background`. No logic lives here.

mod callbacks;
pub(crate) mod convert;
pub(crate) mod convert_memory;
mod guard;
pub(crate) mod handle;
pub mod kvm;

use std::ffi::{c_char, c_int, c_void};

use libc::ssize_t;

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::has_room;
use crate::api::options::Options;
use crate::error::{self, Error};
use crate::probe;
use crate::service::background::{populate, recorder, replay};
use crate::service::calls::settings::settings;
use crate::service::calls::{add_memory, discard, ensure, poll, remove_memory, resolve};
use convert::{descriptor, read_struct, room, write_struct};
use guard::{guard, guard_count};
use handle::Handle;

/// Returns the version of the loaded library: KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH.
#[no_mangle]
pub extern "C" fn kuf_version() -> u32 {
    KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH
}

/// Returns the calling thread's last failure in words: the cause, and what to do about it.
///
/// Never NULL; "" before the first failure. Successful calls do not change it. The pointer is valid for the life of
/// the thread. The errno of a failure is stable between versions; the words are not.
#[no_mangle]
pub extern "C" fn kuf_error() -> *const c_char {
    error::last_text()
}

/// Finds out which mechanisms and features work here and, for each mechanism that does not, why. Changes nothing.
///
/// vm_fd: a KVM VM, for the mechanisms of kuf-kvm.h; -1 or 0: none. out: out->size set by the caller.
///
/// Returns 0, also when nothing works (out->mechanisms is 0 then).
/// -EINVAL: vm_fd is no KVM VM. -EBADF: vm_fd is not an open descriptor.
/// Kernel: userfaultfd(2), ioctl_userfaultfd(2).
///
/// # Notes
/// Opens a userfaultfd for a moment. The KVM interfaces' capability numbers were given to other features later, so
/// they are tried: the bitmap on a VM made for it, the asynchronous one by KVM_ENABLE_CAP(236, DISABLE) on vm_fd,
/// which changes nothing where userfaults are not enabled (and is not tried where they are).
///
/// # Safety
/// `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_probe(vm_fd: c_int, out: *mut kuf_probe_info) -> c_int {
    guard(|| {
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(probe::report(descriptor("vm_fd", vm_fd)?)?.to_c(size))) }
    })
}

/// Opens a fault service and starts its threads. Memory is added afterwards.
///
/// Returns 0 and sets *out; on failure *out is NULL.
/// -EINVAL: no mode or several; fields that contradict each other; cpus names no CPU that the process may use.
/// -EBADF: vm_fd is not an open descriptor. -ENOTSUP: the mechanism asked for does not work here.
/// -EPERM: userfaultfd is refused: kuf_error() names the ways to grant it. Also KUF_OPEN_FOLLOW_FORK without
///   CAP_SYS_PTRACE.
/// -ENOSYS: the kernel has no userfaultfd. -EEXIST, -EIO: of the mechanisms of kuf-kvm.h.
/// -EMFILE, -ENFILE, -EAGAIN: no descriptor or thread to be had.
/// Kernel: userfaultfd(2), /dev/userfaultfd.
///
/// # Notes
/// The ways to grant userfaultfd are access to /dev/userfaultfd, CAP_SYS_PTRACE, and the sysctl
/// vm.unprivileged_userfaultfd.
/// -EEXIST: KVM's asynchronous userfaults are enabled on this VM already. -EIO: the VM is another process's.
///
/// # Safety
/// `options` is NULL or points to `options->size` readable bytes, and the sets of CPUs there to as many as it says; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn kuf_open(options: *const kuf_options, out: *mut *mut kuf_handle) -> c_int {
    guard(|| {
        if out.is_null() {
            return Err(Error::null("out"));
        }
        // SAFETY: checked for NULL; the caller promises that it is writable.
        unsafe { *out = std::ptr::null_mut() };
        has_room()?;
        // SAFETY: the caller promises options->size readable bytes.
        let options = unsafe { read_struct(options, "options") }?;
        // SAFETY: the caller promises that the set is as long as it says.
        let cpus = unsafe { convert::cpus(options.cpus, options.cpus_size, "options->cpus") }?;
        let mut callbacks = None;
        let handle = Handle::open(|handle| {
            let (options, its) = convert::options(&options, handle)?;
            callbacks = Some(its);
            Ok(Options { cpus, ..options })
        })?;
        // The service drops the last reference, for that calls release.
        callbacks.into_iter().for_each(|callbacks| callbacks.opened());
        // SAFETY: as above.
        unsafe { *out = handle };
        Ok(0)
    })
}

/// Ends a service and sets *kuf to NULL. Unresolved pages are never released onto zeroes: the call is refused, or
/// does what flags say. On an error path kuf_close(&kuf, KUF_END_POISON) always ends the handle, a NULL one too.
///
/// flags: KUF_END_*.
///
/// Poisons or fills first, then waits for running callbacks, unless KUF_END_NOWAIT is given. Calls that are blocked
/// in kuf_poll, kuf_ensure or kuf_vcpu_fault return -ECANCELED. A handle whose service has failed is always closed,
/// and poisons.
///
/// Returns 0. Not from a callback.
/// -EINVAL: KUF_END_HANDOVER with KUF_END_POISON or KUF_END_POPULATE, or with a slot that uses the library's
///   userfaultfd. -ECHILD: a forked child.
/// -EBUSY: unresolved pages and no flag for them, or pages discarded during KUF_END_POPULATE; the handle goes on.
/// -EIO: KUF_END_POPULATE could not fill everything (a fill failed, or KUF_FILL_LATER). -ETIMEDOUT: nor in time
///   (kuf_options.end_timeout_ms). The handle goes on.
/// -ENOTSUP: KUF_END_POPULATE on a caller-driven handle.
///
/// # Safety
/// `kuf` is NULL or points to a pointer that kuf_open has set.
#[no_mangle]
pub unsafe extern "C" fn kuf_close(kuf: *mut *mut kuf_handle, flags: u32) -> c_int {
    guard(|| {
        if kuf.is_null() {
            return Ok(0);
        }
        // SAFETY: checked for NULL; the caller promises that it is readable and writable.
        let handle = unsafe { *kuf };
        if handle.is_null() {
            return Ok(0);
        }
        // SAFETY: the caller promises that it came from kuf_open.
        unsafe { Handle::at(handle) }?.end(flags)?;
        // SAFETY: as above.
        unsafe { *kuf = std::ptr::null_mut() };
        Ok(0)
    })
}

/// Adds a memory slot. From its return on, no absent page of it can be touched without being served.
///
/// Memory that holds pages already is refused (-EBUSY) without KUF_MEMORY_POPULATED. Descriptors stay the caller's.
///
/// Returns 0. Not from a callback.
/// -EINVAL: gpa, len, hva or fd_offset is 0 where it may not be, no multiple of the page size, or overflows;
///   page_size is not the mapping's; the mapping is of a kind that userfaultfd cannot serve (an ordinary file, a
///   private file mapping); a source is shorter than the slot, or missing or not allowed in this mode; fields that
///   contradict each other.
/// -EEXIST: gpa..gpa+len overlaps a slot, or hva..hva+len one with the same userfaultfd.
/// -EFAULT: part of hva..hva+len is not mapped. -EBADF: a descriptor is not open, or not for reading.
/// -EBADFD: fd is not the shared file mapped at hva, uffd is no userfaultfd, source->fd is neither file nor block
///   device.
/// -EBUSY: the memory holds pages (the text says how many and what to do); another userfaultfd has the range; it is
///   locked and KUF_MEMORY_FILL_ALL cannot drop it (before Linux 5.18).
/// -ENOTSUP: the kernel cannot serve this memory, or cannot tell what it holds; no direct I/O on that file system.
/// -EAGAIN: for two seconds there was always an munmap, mremap, madvise or fork in progress whose event may concern
///   the range.
/// -ESRCH: the remote process is gone. -EMFILE: no descriptor to be had. -ECANCELED: pages of the range may be
///   poisoned.
/// Kernel: UFFDIO_REGISTER (MISSING; MISSING|MINOR for a shared file).
///
/// # Notes
/// Reads /proc/self/maps and /proc/self/pagemap. With userfaultfd, madvise, munmap and mremap of the range are
/// followed (docs/adopting.md says what they mean). With the mechanisms of kuf-kvm.h: KVM_SET_MEMORY_ATTRIBUTES,
/// KVM_SET_USER_MEMORY_REGION2.
///
/// # Safety
/// `kuf` came from kuf_open; `memory` is NULL or points to `memory->size` readable bytes, and so do `memory->source` and
/// each `base`, whose `bitmap` has `bitmap_size` readable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_add_memory(kuf: *mut kuf_handle, memory: *const kuf_memory) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises memory->size readable bytes.
        let memory = unsafe { read_struct(memory, "memory") }?;
        // SAFETY: the caller promises source->size readable bytes, the same of each base, and pointers as the header says.
        let source = unsafe { convert_memory::sources(memory.source) }?;
        let kvm = match memory.kvm.is_null() {
            true => None,
            // SAFETY: the caller promises that it points to a struct kuf_kvm_memory of kvm->size readable bytes.
            false => Some(unsafe { read_struct(memory.kvm.cast::<kuf_kvm_memory>(), "kvm") }?),
        };
        let memory = convert_memory::memory(&memory, source, kvm.as_ref())?;
        add_memory::add_memory(handle.service(), memory.check()?)?;
        Ok(0)
    })
}

/// Removes the slot that starts at gpa from the service. Its memory stays mapped and is the caller's alone; no
/// overhead remains.
///
/// flags: 0, KUF_END_POISON, KUF_END_POPULATE or both.
///
/// Waits up to 100 ms for running fills (not in an event callback). Stop the vCPUs first, or new faults may keep it
/// busy. After 0 no callback holds memory_opaque and no event of the slot comes.
///
/// Returns 0. Also from an event callback, but not from a fill callback.
/// -ENOENT: no slot starts at gpa (of two threads that remove the same slot, one gets this).
/// -EBUSY: unresolved pages and no flag for them; or a callback of this slot is still running: try again.
/// -EIO: KUF_END_POPULATE could not fill everything, as in kuf_close, and the slot goes on; or a page could be
///   neither filled nor poisoned and stays inaccessible (KUF_EVENT_INACCESSIBLE). -ETIMEDOUT: not filled in time
///   (kuf_options.end_timeout_ms); the slot goes on.
/// -ENOTSUP: KUF_END_POPULATE on a caller-driven handle.
/// Kernel: UFFDIO_UNREGISTER.
///
/// # Notes
/// KUF_EVENT_COMPLETE is left out if the slot became complete a moment ago. With KUF_KVM_MEMORY_MEMSLOT not from any
/// callback. With KUF_MECHANISM_KVM_ASYNC poisoned pages lose their marks (and become PROT_NONE where userfaultfd
/// cannot poison them); with KUF_MECHANISM_KVM_BITMAP the bitmap is unmapped, so take KVM_MEM_USERFAULT off the
/// memslot first.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_remove_memory(kuf: *mut kuf_handle, gpa: u64, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        remove_memory::remove_memory(handle.service(), gpa, flags)?;
        Ok(0)
    })
}

/// Returns a descriptor that polls readable when kuf_read has something to return, for poll, epoll or a GSource;
/// level-triggered.
///
/// Do not read, write or close it; it lives as long as the handle. With KUF_OPEN_DIRECT it may poll readable without
/// a fault.
///
/// -ENOTSUP: the handle is not caller-driven.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_fd(kuf: *mut kuf_handle) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        poll::caller_fd(unsafe { Handle::enter(kuf) }?.service())
    })
}

/// Blocks until kuf_read has something to return. Unlike poll(2) on kuf_fd it returns when kuf_close begins.
///
/// timeout_ms: milliseconds at most; 0 looks only; -1 has no limit. Signals do not end the wait.
///
/// Returns 1: there are faults, or 0: timed out. Not from a callback.
/// -ENOTSUP: the handle is not caller-driven.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_poll(kuf: *mut kuf_handle, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        poll::caller_poll(unsafe { Handle::enter(kuf) }?.service(), timeout_ms).map(c_int::from)
    })
}

/// Takes up to n faults, oldest first, without blocking. The caller must answer each with kuf_resolve.
///
/// faults: room for n entries. n: 1 or more.
///
/// A page is given once, however many threads are blocked on it, and never when it is present. kuf_pending lists
/// what is owed.
///
/// Returns the number taken. Several threads may read at once; they get different faults. Not from a callback.
/// -EAGAIN: none now. -ENOTSUP: the handle is not caller-driven.
///
/// # Safety
/// `kuf` came from kuf_open; `faults` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_read(kuf: *mut kuf_handle, faults: *mut kuf_fault, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        if n == 0 {
            return Err(Error::new(Errno::INVAL, "n is 0: there is no room for a fault"));
        }
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(faults, "faults", n) }?;
        poll::caller_read(handle.service(), out)
    })
}

/// Makes gpa..gpa+len present, with bytes from src or as flags say, and wakes the threads that are blocked on it.
///
/// gpa, len: multiples of the page size, len not 0, within one slot.
/// src: len readable bytes of any alignment, not unresolved guest memory; NULL with KUF_RESOLVE_ZERO, _IN_PLACE,
/// _POISON and _PRESENT. Not kept.
/// flags: 0 or one KUF_RESOLVE_*.
///
/// Works on every handle, for pages that were asked for or not, in any order and pieces, from any thread, also from
/// callbacks. Pages that are present keep their bytes; pages that the guest gave back stay so. Never waits for
/// caller code: bytes for a page whose callback is running are kept until it returns without having filled it.
///
/// Returns the bytes that this call made present or poisoned. Bytes that were present, given back, kept for later,
/// or are being made present by another thread do not count.
/// -EINVAL: src or flags as above; KUF_RESOLVE_IN_PLACE on a slot that is not filled in place, _PRESENT on one that
///   is.
/// -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ENOTSUP: KUF_RESOLVE_PRESENT on memory of
///   another process.
/// -EFAULT: src is not readable; bytes up to there may be present, and the call can be repeated.
/// -EDEADLK: src is guest memory that is absent. -ENOMEM: also when the kernel has no memory for the pages.
/// -ENOSPC: the file system of a shared file is full. -ESRCH: the process behind the slot is gone.
/// Kernel: UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON, UFFDIO_WAKE.
///
/// # Notes
/// src may be an unread file mapping: the calling thread blocks on the I/O, and so does another kuf_resolve of the
/// same pages, which uses its own bytes if this one fails. A return of 0 may mean that the page is present already
/// or that the bytes are kept; kuf_progress tells the two apart. Also used: /proc/self/pagemap, mincore,
/// MADV_POPULATE_READ.
///
/// # Safety
/// `kuf` came from kuf_open; `src` is NULL or an address whose `len` bytes no thread writes meanwhile (they may be
/// unreadable).
#[no_mangle]
pub unsafe extern "C" fn kuf_resolve(
    kuf: *mut kuf_handle,
    gpa: u64,
    src: *const c_void,
    len: u64,
    flags: u32,
) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        let how = convert::resolution(src, flags)?;
        resolve::resolve(handle.service(), gpa, len, how).map(|bytes| bytes as usize)
    })
}

/// Serves a KVM_EXIT_MEMORY_FAULT (KVM_RUN returned -1 with EFAULT) on the calling vCPU thread: fills the page here,
/// or waits for the thread that fills it. For the mechanisms of kuf-kvm.h; with userfaultfd such exits do not occur,
/// and the call is kuf_ensure.
///
/// gpa, len, exit_flags: gpa, size and flags of kvm_run->memory_fault.
///
/// For a page that is present it returns 0 at once: handle exits that have another cause first.
///
/// Returns 0: run the vCPU again. Not from a callback; calls the fill callback. Caller-driven: not on the thread
/// that reads.
/// -ENOENT: gpa is in no slot, or the exit is no userfault: handle it as without the library. -ERANGE: the range
///   leaves its slot.
/// -EHWPOISON: the page could not be filled: inject a machine check or stop the guest. -ESRCH: the process is gone.
/// Kernel: KVM_EXIT_MEMORY_FAULT with KVM_MEMORY_EXIT_FLAG_USERFAULT.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_vcpu_fault(kuf: *mut kuf_handle, gpa: u64, len: u64, exit_flags: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        ensure::vcpu_fault(handle.service(), gpa, len, exit_flags)?;
        Ok(0)
    })
}

/// Returns when gpa..gpa+len is present, filling it at demand priority. For threads that touch guest memory where
/// the mechanism does not catch them, or that must not block on a fault later (device models, vhost set-up, gdb
/// stubs).
///
/// gpa, len: of any alignment, within one slot; len not 0. timeout_ms: milliseconds at most, -1: no limit; 0 still
/// fills the pages that no thread has begun.
///
/// Returns 0: present or given back by the guest. Not from a callback; calls the fill callback on this thread, so
/// hold no lock that it takes. Caller-driven: queued for kuf_read, so not on the thread that reads.
/// -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot. -ETIMEDOUT: not in time.
/// -EHWPOISON: part of the range could not be filled. -ESRCH: the process behind the slot is gone.
///
/// # Notes
/// With a mechanism of kuf-kvm.h, and in shared memory with KUF_OPEN_DETECT_ZERO, pages that the guest gave back
/// become zero pages and take memory again.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_ensure(kuf: *mut kuf_handle, gpa: u64, len: u64, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        ensure::ensure(handle.service(), gpa, len, timeout_ms)?;
        Ok(0)
    })
}

/// Fills a range in the background, behind all demand, in address order. KUF_EVENT_POPULATED ends each request;
/// requests queue up.
///
/// request: request->size set by the caller.
///
/// A fill that fails ends the request and poisons nothing, for no thread has touched the page. Under steady demand
/// populate keeps about a sixteenth of its pace.
///
/// Returns 0: queued, or stopped. Also from callbacks.
/// -EINVAL: gpa or len is no multiple of the base page size, len is 0, overflow. -ENOENT: no slot in the range.
/// -ENOTSUP: the handle is caller-driven.
///
/// # Safety
/// `kuf` came from kuf_open; `request` is NULL or points to `request->size` readable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_populate(kuf: *mut kuf_handle, request: *const kuf_populate_request) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises request->size readable bytes.
        let request = unsafe { read_struct(request, "request") }?;
        populate::populate(handle.service(), convert::populate(&request)?)?;
        Ok(0)
    })
}

/// Starts recording which pages are demanded, in which order: the working set, for kuf_replay at the next start.
///
/// flags: 0.
///
/// Start before the guest runs, and let nothing fill ahead of it meanwhile (kuf_populate, kuf_replay, kuf_resolve of
/// pages that were not asked for): a page that is present at its first touch leaves no trace.
///
/// Returns 0. Also from callbacks.
/// -EALREADY: the handle is recording, or has a recording that could not be written.
///
/// # Notes
/// Demanded are the pages that a fault, kuf_vcpu_fault or kuf_ensure asks for, with the pages that are filled along
/// with them; pages filled ahead of sequential access count when access has come to their end. On a caller-driven
/// handle they are the pages that kuf_read returns. Each page is recorded once. Forked children's own copies are not
/// recorded.
///
/// Recording takes 16 bytes of memory for each run of neighbouring pages (up to twice that while the table grows)
/// and 512 bytes for each 16 MiB of guest memory with demanded pages. Beyond 67108864 runs, or without memory for
/// it, pages are left out; a KUF_LOG_WARN record at kuf_record_stop says so.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_record_start(kuf: *mut kuf_handle, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        recorder::record_start(unsafe { Handle::enter(kuf) }?.service(), flags)?;
        Ok(0)
    })
}

/// Ends the recording and writes it to fd: guest physical addresses and lengths (docs/record-format.md), about 3
/// bytes a run.
///
/// fd: a file, pipe or stream socket, from where it stands; neither synced nor closed. -1: drop the recording.
///
/// Returns 0. Also from callbacks.
/// -EINVAL: the handle is not recording. -EBADF: fd is not open for writing; the recording goes on.
/// -ENOSPC, -EFBIG, -EDQUOT, -EIO, -EPIPE: as write(2). The recording is over and kept: call again with another fd
///   or -1.
///
/// # Notes
/// Blocks on fd as long as it takes, even if it is non-blocking; kuf_close waits for it. kuf_close drops a recording
/// that was not written.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_record_stop(kuf: *mut kuf_handle, fd: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        recorder::record_stop(unsafe { Handle::enter(kuf) }?.service(), fd)?;
        Ok(0)
    })
}

/// Fills the pages of a recording in the background, in about the order of demand, behind demand and ahead of every
/// populate.
///
/// fd: where kuf_record_stop has written, read from where it stands up to the end of the recording. flags: 0.
///
/// Memory may be laid out differently. Pages that are in no slot, present or given back are skipped. The file need
/// not be trusted: it says which pages are filled first and takes no more memory than it is long. KUF_EVENT_REPLAYED
/// ends it; a fill that fails ends it early. KUF_POPULATE_STOP ends all replays.
///
/// Returns 0: queued. Also from callbacks.
/// -EINVAL: fd holds no recording. -EBADF: fd is not open for reading. -EBADMSG: the recording is damaged or ends
///   early.
/// -EPROTONOSUPPORT: it is of a newer version. -EFBIG: it has more than 67108864 runs. -ENOENT: no part of it is in
///   a slot.
/// -ENOTSUP: the handle is caller-driven. -EISDIR and others: as read(2).
///
/// # Notes
/// Slots and page sizes may differ from those of the recording; whole pages are filled. The slots are those that
/// exist when the replay begins. An empty recording is replayed at once.
///
/// A guest that runs meanwhile catches up with the replay. While fills are quick, a fault at one of the pages that
/// come next (of up to 128 runs of the recording) is left to the replay, which asks for the page with
/// KUF_RUN_DEMAND, so that the guest has many pages before it when it goes on. That takes some hundred microseconds
/// at most as a rule; a fault that was left for about a millisecond is served like any other. kuf_vcpu_fault and
/// kuf_ensure are not left to it.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_replay(kuf: *mut kuf_handle, fd: c_int, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        replay::replay(unsafe { Handle::enter(kuf) }?.service(), fd, flags)?;
        Ok(0)
    })
}

/// Drops the pages of gpa..gpa+len whatever they hold. The next touch refills them from the source or reads zeroes.
///
/// gpa, len: multiples of the page size, len not 0, within one slot. flags: KUF_DISCARD_REFILL or KUF_DISCARD_ZERO.
///
/// A fill in progress is not used; a kuf_resolve of such a page waits until it is dropped. Poisoned pages become
/// ordinary ones again (not in another process). A shared file loses the bytes in all its mappings. The guest must
/// not use the range meanwhile.
///
/// Returns 0. Also from callbacks.
/// -ENOENT: gpa is in no slot, or the slot was removed meanwhile. -ERANGE: the range leaves its slot.
/// -ENOTSUP: memory of another process without kuf_memory.fd. -ESRCH: the process behind the slot is gone.
/// -EBUSY: the memory is locked and cannot be dropped (before Linux 5.18; shared memory without kuf_memory.fd).
/// Others, such as -ENOMEM and -EPERM: of the kernel; part of the range may have been dropped, call again.
/// Kernel: MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_REMOVE, FALLOC_FL_PUNCH_HOLE.
///
/// # Notes
/// With KUF_KVM_MEMORY_MEMSLOT not from a callback.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_discard(kuf: *mut kuf_handle, gpa: u64, len: u64, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        discard::discard(handle.service(), gpa, len, convert::discard(flags)?)?;
        Ok(0)
    })
}

/// Lists the pages that the caller owes: deferred runs, runs inside their callback, faults taken with kuf_read or
/// waiting to be. For asking a source again after its connection was lost.
///
/// faults: room for n entries, filled in order of gpa; may be NULL when n is 0.
///
/// Returns the number of runs pending, which may be more than n. Also from callbacks.
///
/// # Safety
/// `kuf` came from kuf_open; `faults` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_pending(kuf: *mut kuf_handle, faults: *mut kuf_fault, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(faults, "faults", n) }?;
        poll::pending(handle.service(), out)
    })
}

/// Reports the fill progress of the slot that contains gpa, or of all slots with KUF_ALL.
///
/// Returns 0. Also from callbacks.
/// -ENOENT: gpa is in no slot.
///
/// # Safety
/// `kuf` came from kuf_open; `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_progress(kuf: *mut kuf_handle, gpa: u64, out: *mut kuf_progress_info) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(kuf_progress_info { size, ..handle.service().progress(gpa)? })) }
    })
}

/// Reports the settings in effect of the handle, and of the slot that contains gpa unless it is KUF_ALL.
///
/// Returns 0. Also from callbacks.
/// -ENOENT: gpa is in no slot.
///
/// # Safety
/// `kuf` came from kuf_open; `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_settings(kuf: *mut kuf_handle, gpa: u64, out: *mut kuf_settings_info) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(kuf_settings_info { size, ..settings(handle.service(), gpa)? })) }
    })
}

/// Reports counters and latency histograms since kuf_open.
///
/// Returns 0. Also from callbacks.
///
/// # Safety
/// `kuf` came from kuf_open; `out` is NULL or points to `out->size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn kuf_stats(kuf: *mut kuf_handle, out: *mut kuf_stats_info) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises out->size writable bytes.
        unsafe { write_struct(out, "out", |size| Ok(kuf_stats_info { size, ..handle.service().stats() })) }
    })
}

/// Names the threads for which kuf_stats_info.blocked_all_ns is kept: the vCPUs. Replaces those of the last call.
///
/// threads: n thread IDs as from gettid(2), copied; may be NULL when n is 0. n: at most 65536.
///
/// The time counted so far is kept. It needs KUF_FEATURE_THREAD_ID, and does not include waits in kuf_ensure and
/// kuf_vcpu_fault.
///
/// Returns 0. Also from callbacks.
///
/// # Safety
/// `kuf` came from kuf_open; `threads` is NULL or points to `n` ids.
#[no_mangle]
pub unsafe extern "C" fn kuf_watch_threads(kuf: *mut kuf_handle, threads: *const u32, n: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises n ids.
        handle.service().watch_threads(unsafe { convert::threads(threads, n) }?);
        Ok(0)
    })
}

/// Reports how long each thread was blocked, longest sum first. Empty without KUF_FEATURE_THREAD_ID.
///
/// times: room for n entries; may be NULL when n is 0.
///
/// Returns the number of threads known, which may be more than n. Also from callbacks.
///
/// # Safety
/// `kuf` came from kuf_open; `times` is NULL or has room for `n` entries.
#[no_mangle]
pub unsafe extern "C" fn kuf_block_times(kuf: *mut kuf_handle, times: *mut kuf_block_time, n: usize) -> ssize_t {
    guard_count(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        // SAFETY: the caller promises room for n entries.
        let out = unsafe { room(times, "times", n) }?;
        Ok(handle.service().block_times(out))
    })
}
