//! The handle.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::has_room;
use crate::api::checks::{milliseconds, populate_range};
use crate::api::door::{Call, Door};
use crate::api::fault::append;
use crate::api::memory::Memory;
use crate::api::options::Options;
use crate::api::{BlockTime, Discard, End, Fault, Progress, Settings, Slot, Stats};
use crate::error::{Error, Result};
use crate::os::descriptor::{borrow, duplicate};
use crate::os::worker::{Name, Worker};
use crate::panics::quietly;
use crate::service::background::{populate, recorder, replay};
use crate::service::calls::{add_memory, discard, ensure, poll, resolve, settings};
use crate::service::config::{NewPopulate, Resolution};
use crate::service::threads::start::with_signals_blocked;
use crate::service::Service;
use crate::sync::time::Duration;
use crate::sync::Arc;

/// One VM's fault service.
///
/// Any thread may make any call at any time unless its text says otherwise. `gpa` is a guest physical address and `len`
/// a number of bytes. For calls that resolve, discard or poison pages, both are multiples of the slot's page size, and
/// the range is within one slot. Calls that wait for other threads fail with EDEADLK in a callback.
///
/// Every call can fail with these errors, which the calls below do not list again. EBADF: the handle has ended.
/// ECANCELED: it ended during the call. ECHILD: this is a forked child. EIO: the service has failed
/// ([`EventKind::Fatal`]). ENOMEM: the library has no memory for the call.
///
/// Drop ends the handle with [`End::Poison`], so that no thread ever sees bytes that are not the guest's own. If a
/// callback drops the handle, a thread of its own ends it after that callback has returned.
///
/// [`EventKind::Fatal`]: crate::EventKind::Fatal
pub struct Kuf {
    door: Arc<Door>,
}

impl Kuf {
    /// Opens a handle: opens the userfaultfd and starts the service threads.
    ///
    /// EINVAL: an option is out of its range, or contradicts another. EPERM: this process may not open a userfaultfd;
    /// the text says how to allow it. ENOSYS: the kernel has no userfaultfd. EMFILE, ENFILE, ENOMEM, EAGAIN: there is
    /// no descriptor, memory or thread left.
    pub fn open(options: Options) -> Result<Self> {
        has_room()?;
        let kuf = Self::unopened()?;
        kuf.start(options)?;
        Ok(kuf)
    }

    /// A handle without a service.
    pub(crate) fn unopened() -> Result<Self> {
        Ok(Self { door: Arc::new(Door::new()?) })
    }

    pub(crate) fn start(&self, options: Options) -> Result<()> {
        self.door.open(Service::open(options.config()?)?);
        Ok(())
    }

    pub(crate) fn enter(&self) -> Result<Call<'_>> {
        self.door.enter()
    }

    /// Adds a memory slot. From its return on, a touch of an absent page waits until the page is filled.
    ///
    /// EINVAL: an address, length or page size is wrong, or userfaultfd cannot serve this kind of memory. EEXIST: it
    /// overlaps a slot. EFAULT: a part of it is not mapped. EBADFD: the file is not the one mapped there, or the
    /// userfaultfd is none. EBUSY: it holds pages, and [`Memory::populated`] was not called; or another userfaultfd has
    /// it. ENOTSUP: the kernel cannot serve this memory. EAGAIN: events of an earlier mapping there are on their way:
    /// try again. ESRCH: the remote process is gone. EDEADLK: called from a callback.
    ///
    /// This function is safe because [`Memory::new`] is not: there the caller promises that the memory is the guest's.
    pub fn add_memory(&self, memory: Memory<'_>) -> Result<Slot> {
        let (gpa, len) = (memory.new.gpa, memory.new.len);
        add_memory::add_memory(self.enter()?.service(), memory.check()?)?;
        Ok(Slot::new(self.door.clone(), gpa, len))
    }

    /// Makes `gpa..gpa+bytes.len()` present with `bytes`, and wakes the threads that are blocked on it.
    ///
    /// It works on every handle, for pages that were asked for or not, in any order and pieces, also in callbacks.
    /// Present pages keep their bytes, and pages that the guest has given back stay so. It never waits for a callback:
    /// while one runs for a page, the library keeps the bytes for it. Returns the number of bytes that this call made
    /// present.
    ///
    /// EINVAL: the range is not of whole pages. ENOENT: `gpa` is in no slot. ERANGE: the range leaves its slot.
    /// EDEADLK: `bytes` is absent guest memory. ENOMEM: also when the kernel has no memory for the pages. ENOSPC: the
    /// file system of a shared file is full. ESRCH: the process behind the slot is gone.
    pub fn resolve(&self, gpa: u64, bytes: &[u8]) -> Result<u64> {
        self.resolve_as(gpa, bytes.len() as u64, Resolution::Data(bytes.as_ptr()))
    }

    /// As [`Kuf::resolve`], with zeroes in place of bytes.
    pub fn resolve_zero(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Zero)
    }

    /// As [`Kuf::resolve`], for pages whose bytes are in the shared file already, written through
    /// [`Run::buf`](crate::Run::buf) or [`Fault::place`]. EINVAL: the slot is not filled in place.
    pub fn resolve_in_place(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::InPlace)
    }

    /// As [`Kuf::resolve`], for the pages of the range that exist already, such as those of the caller's own
    /// UFFDIO_COPY; the others keep their state. EINVAL: the slot is filled in place. ENOTSUP: it is memory of another
    /// process.
    pub fn resolve_present(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Present)
    }

    /// Poisons the pages of a range that are not present: a touch raises SIGBUS. Returns how many bytes it has poisoned.
    /// Errors as for [`Kuf::resolve`].
    pub fn poison(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Poison)
    }

    fn resolve_as(&self, gpa: u64, len: u64, how: Resolution) -> Result<u64> {
        resolve::resolve(self.enter()?.service(), gpa, len, how)
    }

    /// Fills a range of any alignment at demand priority, and returns when it is present. It calls the fill callback on
    /// this thread, so hold no lock that the callback takes. `timeout`: None waits without limit; zero still fills the
    /// pages that no thread has begun. Not in a callback (EDEADLK). On a caller-driven handle, not on the thread that
    /// reads faults.
    ///
    /// ENOENT: `gpa` is in no slot. ERANGE: the range leaves its slot. ETIMEDOUT: not in time. EHWPOISON: a part of the
    /// range could not be filled. ESRCH: the process behind the slot is gone.
    pub fn ensure(&self, gpa: u64, len: u64, timeout: Option<Duration>) -> Result<()> {
        ensure::ensure(self.enter()?.service(), gpa, len, milliseconds(timeout))
    }

    /// For the KVM_RUN loop with a mechanism of `kuf-kvm.h`: serves a KVM_EXIT_MEMORY_FAULT on this vCPU's thread.
    /// `gpa`, `len`, `flags`: gpa, size and flags of `kvm_run.memory_fault`. After Ok run the vCPU again. Errors as for
    /// [`Kuf::ensure`]; ENOENT also when the exit is no userfault: handle it as without the library.
    pub fn vcpu_fault(&self, gpa: u64, len: u64, flags: u64) -> Result<()> {
        ensure::vcpu_fault(self.enter()?.service(), gpa, len, flags)
    }

    /// Fills a range in the background, behind all demand, in address order, at no more than `rate` bytes per second
    /// (0: no limit). `gpa` and `len` are multiples of the host's base page size; the range may span slots and the gaps
    /// between them. Requests queue up. An event of the kind [`EventKind::Populated`](crate::EventKind::Populated) ends
    /// each; a fill that fails ends its request and poisons nothing.
    ///
    /// EINVAL: the range is not of whole pages, or empty. ENOENT: no slot is in the range. ENOTSUP: the handle is
    /// caller-driven.
    pub fn populate(&self, gpa: u64, len: u64, rate: u64) -> Result<()> {
        self.populate_as(NewPopulate { stop: false, sweep: false, range: Some(populate_range(gpa, len)?), rate })
    }

    /// As [`Kuf::populate`], for every slot that exists when the request starts.
    pub fn populate_all(&self, rate: u64) -> Result<()> {
        self.populate_as(NewPopulate { stop: false, sweep: false, range: None, rate })
    }

    /// Stops every populate request and every replay.
    pub fn populate_stop(&self) -> Result<()> {
        self.populate_as(NewPopulate { stop: true, sweep: false, range: None, rate: 0 })
    }

    fn populate_as(&self, request: NewPopulate) -> Result<()> {
        populate::populate(self.enter()?.service(), request)
    }

    /// Drops the pages of a range, whatever they hold; `how` says what the next touch reads. The guest must not use the
    /// range meanwhile. Poisoned pages become ordinary ones (not in another process).
    ///
    /// ENOENT: `gpa` is in no slot. ERANGE: the range leaves its slot. ENOTSUP: memory of another process without its
    /// file. EBUSY: the memory is locked. ESRCH: the process behind the slot is gone. Others are of the kernel: a part
    /// of the range may have been dropped; call again.
    pub fn discard(&self, gpa: u64, len: u64, how: Discard) -> Result<()> {
        discard::discard(self.enter()?.service(), gpa, len, how == Discard::Zero)
    }

    /// A descriptor that polls readable when [`Kuf::read`] may have faults to return, for the caller's own poll or
    /// epoll: a duplicate of the handle's. ENOTSUP: the handle is not caller-driven.
    pub fn fd(&self) -> Result<OwnedFd> {
        let call = self.enter()?;
        duplicate(borrow(poll::caller_fd(call.service())?, "fd")?, "the descriptor of the handle")
    }

    /// Waits until [`Kuf::read`] has faults to return, for at most `timeout` (None: without limit). Returns whether
    /// there are any. Not in a callback (EDEADLK). ENOTSUP: the handle is not caller-driven.
    pub fn poll(&self, timeout: Option<Duration>) -> Result<bool> {
        poll::caller_poll(self.enter()?.service(), milliseconds(timeout))
    }

    /// Takes up to `most` faults, at most 4096, oldest first, without waiting; an empty list if there are none. The
    /// caller must answer each with [`Kuf::resolve`] or [`Kuf::poison`]; [`Kuf::pending`] lists those not answered yet.
    /// Not in a callback (EDEADLK). ENOTSUP: the handle is not caller-driven.
    pub fn read(&self, most: usize) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        self.read_into(&mut faults, most)?;
        Ok(faults)
    }

    /// As [`Kuf::read`], but appends the faults to `faults` and returns how many there were.
    pub fn read_into(&self, faults: &mut Vec<Fault>, most: usize) -> Result<usize> {
        let call = self.enter()?;
        // No slot has more faults than pages, so room is made for what a loop reads at once.
        let most = most.min(MOST_FAULTS);
        faults.try_reserve(most).map_err(|_| Error::from(crate::alloc::NoMemory))?;
        match append(faults, most, |room| poll::caller_read(call.service(), room)) {
            Err(error) if error.errno() == Errno::AGAIN => Ok(0),
            result => result,
        }
    }

    /// Lists the runs of pages that the caller has been asked for and has not resolved, in order of address: to ask a
    /// source again after its connection was lost.
    pub fn pending(&self) -> Result<Vec<Fault>> {
        let call = self.enter()?;
        let mut faults = Vec::new();
        loop {
            let there = poll::pending(call.service(), &mut [])?;
            // A few more, for some may come meanwhile.
            let most = there + there / 8 + 8;
            faults.try_reserve(most).map_err(|_| Error::from(crate::alloc::NoMemory))?;
            let mut all = 0;
            append(&mut faults, most, |room| poll::pending(call.service(), room).inspect(|n| all = *n))?;
            if all <= most {
                return Ok(faults);
            }
            faults.clear();
        }
    }

    /// How many bytes of all slots together are in which state. [`Slot::progress`] is for one slot.
    pub fn progress(&self) -> Result<Progress> {
        self.enter()?.service().progress(KUF_ALL).map(Progress::from)
    }

    /// The settings in effect for the handle. [`Slot::settings`] is for one slot.
    pub fn settings(&self) -> Result<Settings> {
        settings::settings(self.enter()?.service(), KUF_ALL).map(Settings::from)
    }

    /// Counters and latency histograms since the handle was opened.
    pub fn stats(&self) -> Result<Stats> {
        Ok(self.enter()?.service().stats().into())
    }

    /// Sets the threads, by thread ID as from gettid(2), for which `blocked_all_ns` of [`Stats`] counts: the vCPUs.
    /// Replaces those of the last call. Needs [`Feature::ThreadId`](crate::Feature::ThreadId).
    pub fn watch_threads(&self, threads: &[u32]) -> Result<()> {
        let call = self.enter()?;
        call.service().watch_threads(threads);
        Ok(())
    }

    /// How long each thread was blocked on page faults, longest sum first. Empty without
    /// [`Feature::ThreadId`](crate::Feature::ThreadId).
    pub fn block_times(&self) -> Result<Vec<BlockTime>> {
        let call = self.enter()?;
        let mut times = Vec::new();
        loop {
            let room = times.capacity();
            let known = call.service().block_times(&mut times.spare_capacity_mut()[..room]);
            if known <= room {
                // SAFETY: that many were written.
                unsafe { times.set_len(known) };
                return Ok(times.into_iter().map(BlockTime::from).collect());
            }
            times = Vec::with_capacity(known + 8);
        }
    }

    /// Starts to record the demanded pages in their order, for [`Kuf::replay`] at the next start of the guest. Call it
    /// before the guest runs, and fill nothing ahead of demand meanwhile. EALREADY: the handle is recording, or has a
    /// recording that could not be written.
    pub fn record_start(&self) -> Result<()> {
        recorder::record_start(self.enter()?.service(), 0)
    }

    /// Ends the recording and writes it to `file` (a file, pipe or stream socket) at its current position. Blocks as
    /// long as that takes. After an error of the write the recording is kept: call again, or [`Kuf::record_drop`].
    /// EINVAL: the handle is not recording. EBADF: `file` is not open for writing; the recording goes on.
    pub fn record_stop(&self, file: impl AsFd) -> Result<()> {
        recorder::record_stop(self.enter()?.service(), file.as_fd().as_raw_fd())
    }

    /// Ends the recording and drops it. EINVAL: the handle is not recording.
    pub fn record_drop(&self) -> Result<()> {
        recorder::record_stop(self.enter()?.service(), -1)
    }

    /// Fills the pages of a recording in the background, in about the order of demand, behind all demand and ahead of
    /// [`Kuf::populate`]. It reads `file` from its current position to the end of the recording; the file need not be
    /// trusted. An event of the kind [`EventKind::Replayed`](crate::EventKind::Replayed) ends the replay.
    ///
    /// EINVAL: the file is no recording. EBADMSG: it is damaged. EPROTONOSUPPORT: it needs a newer library. ENOENT: no
    /// part of it is in a slot. ENOTSUP: the handle is caller-driven. Others as read(2).
    pub fn replay(&self, file: impl AsFd) -> Result<()> {
        replay::replay(self.enter()?.service(), file.as_fd().as_raw_fd(), 0)
    }

    /// Ends the handle. Calls that wait fail with ECANCELED, later calls with EBADF. It waits for running callbacks.
    ///
    /// EBUSY: there are unresolved pages, and `end` is [`End::Complete`]; the handle goes on. EIO: not every page could
    /// be filled, and `end` is [`End::Populate`]; ETIMEDOUT: not in time ([`Options::end_timeout`]); the handle goes
    /// on. ENOTSUP: [`End::Populate`] on a caller-driven handle. EINVAL: [`End::HandOver`], and a slot has no
    /// userfaultfd of the caller's. EDEADLK: called from a callback. A handle whose service has failed always ends, and
    /// poisons.
    pub fn close(&self, end: End) -> Result<()> {
        self.end(end.flags())
    }

    /// As [`Kuf::close`], but does not wait for running callbacks: they may still run when it returns, and their
    /// results are dropped.
    pub fn close_without_waiting(&self, end: End) -> Result<()> {
        self.end(end.flags() | KUF_END_NOWAIT)
    }

    /// Ends the handle as KUF_END_* say.
    pub(crate) fn end(&self, flags: u32) -> Result<()> {
        self.door.close(flags)
    }
}

/// Faults read at once.
const MOST_FAULTS: usize = 4096;

impl Drop for Kuf {
    fn drop(&mut self) {
        // A bug in the library must not end the process while it unwinds.
        let Ok(Err(error)) = quietly(|| self.close(End::Poison)) else { return };
        let door = self.door.clone();
        match error.errno() {
            // The service is the parent's: its threads do not exist here, and its memory may be in any state.
            Errno::CHILD => std::mem::forget(door),
            // In a callback, which the end has to wait for.
            Errno::DEADLK => {
                let end = move || drop(quietly(|| door.close(End::Poison.flags())));
                drop(with_signals_blocked(|| Worker::start(Name::new(format_args!("kuf-end")), end)));
            }
            _ => {}
        }
    }
}

impl std::fmt::Debug for Kuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.progress() {
            Ok(progress) => f.debug_struct("Kuf").field("progress", &progress).finish(),
            Err(error) => write!(f, "Kuf({error})"),
        }
    }
}
