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
/// Every call may be made from any thread at any time unless its text says otherwise. `gpa` is a guest physical address and
/// `len` a number of bytes: where a call resolves, discards or poisons pages, both are multiples of the page size of one slot,
/// in which the range lies. Calls that wait for other threads fail with EDEADLK in a callback.
///
/// Drop ends the handle with [`End::Poison`], so that no thread ever sees bytes that are not the guest's own. A handle that is
/// dropped in a callback is ended by a thread of its own, when that callback has returned.
pub struct Kuf {
    door: Arc<Door>,
}

impl Kuf {
    /// Opens a handle: opens the userfaultfd and starts the service threads.
    ///
    /// EINVAL: an option is out of its range, or does not go with another. EPERM: this process may not open a userfaultfd;
    /// the text says what to do. ENOSYS: the kernel has none. EMFILE, ENFILE, ENOMEM, EAGAIN: there is no descriptor, memory
    /// or thread.
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

    /// Puts a memory slot under the service: when it has returned, no absent page of it can be touched without being served.
    ///
    /// EINVAL: an address, length or page size does not fit, or the memory is of a kind that cannot be served. EEXIST: it
    /// overlaps a slot. EFAULT: part of it is not mapped. EBUSY: it holds pages, and [`Memory::populated`] is not given; or
    /// another userfaultfd has it. EDEADLK: called from a callback.
    ///
    /// It is [`Memory::new`] that is unsafe, for it says which memory is the guest's.
    pub fn add_memory(&self, memory: Memory<'_>) -> Result<Slot> {
        let (gpa, len) = (memory.new.gpa, memory.new.len);
        add_memory::add_memory(self.enter()?.service(), memory.check()?)?;
        Ok(Slot::new(self.door.clone(), gpa, len))
    }

    /// Fills `gpa..gpa+bytes.len()` with `bytes` and wakes the threads that wait for it. Asked for or not, in any order, in any
    /// pieces, twice: pages that are present keep their bytes, and pages that the guest has given back stay so. Never waits for
    /// a callback. Returns the bytes that this call made present.
    ///
    /// EINVAL: the range is not of whole pages. ENOENT: `gpa` is in no slot. ERANGE: the range leaves its slot. EDEADLK:
    /// `bytes` are guest memory that is not present. ENOMEM: there is no memory for the pages.
    pub fn resolve(&self, gpa: u64, bytes: &[u8]) -> Result<u64> {
        self.resolve_as(gpa, bytes.len() as u64, Resolution::Data(bytes.as_ptr()))
    }

    /// As [`Kuf::resolve`], with zeroes.
    pub fn resolve_zero(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Zero)
    }

    /// As [`Kuf::resolve`], for pages whose bytes were written to the place of a [`Run`](crate::Run) or [`Fault`].
    pub fn resolve_in_place(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::InPlace)
    }

    /// As [`Kuf::resolve`], for those pages of the range that are mapped already; the others stay as they are.
    pub fn resolve_present(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Present)
    }

    /// Poisons the absent pages of a range, so that a touch raises SIGBUS. Returns their bytes.
    pub fn poison(&self, gpa: u64, len: u64) -> Result<u64> {
        self.resolve_as(gpa, len, Resolution::Poison)
    }

    fn resolve_as(&self, gpa: u64, len: u64, how: Resolution) -> Result<u64> {
        resolve::resolve(self.enter()?.service(), gpa, len, how)
    }

    /// Returns when a range is present, of any alignment, filling it at demand priority. It calls the fill callback on this
    /// thread. `timeout`: None waits for ever; zero still fills the pages that no thread has begun.
    ///
    /// ETIMEDOUT: not in time. EHWPOISON: part of the range could not be filled. ECANCELED: the handle ends.
    pub fn ensure(&self, gpa: u64, len: u64, timeout: Option<Duration>) -> Result<()> {
        ensure::ensure(self.enter()?.service(), gpa, len, milliseconds(timeout))
    }

    /// For the KVM_RUN loop: serves the fault behind a KVM_EXIT_MEMORY_FAULT on this vCPU's thread. `gpa`, `len`, `flags`: the
    /// three fields of `kvm_run.memory_fault`.
    pub fn vcpu_fault(&self, gpa: u64, len: u64, flags: u64) -> Result<()> {
        ensure::vcpu_fault(self.enter()?.service(), gpa, len, flags)
    }

    /// Fills a range in the background, behind all demand, at no more than `rate` bytes per second (0: no limit). `gpa` and
    /// `len` are multiples of the host's page size; the range may span slots. Requests queue up, and an event of the kind
    /// [`EventKind::Populated`](crate::EventKind::Populated) ends each.
    pub fn populate(&self, gpa: u64, len: u64, rate: u64) -> Result<()> {
        self.populate_as(NewPopulate { stop: false, sweep: false, range: Some(populate_range(gpa, len)?), rate })
    }

    /// As [`Kuf::populate`], for all slots.
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

    /// Drops the content of a range and arms its pages again. The guest does not use the range meanwhile.
    pub fn discard(&self, gpa: u64, len: u64, how: Discard) -> Result<()> {
        discard::discard(self.enter()?.service(), gpa, len, how == Discard::Zero)
    }

    /// A duplicate of the descriptor that polls readable when [`Kuf::read`] may have something to return: for the caller's own
    /// poll or epoll. Only for a caller-driven handle (else ENOTSUP).
    pub fn fd(&self) -> Result<OwnedFd> {
        let call = self.enter()?;
        duplicate(borrow(poll::caller_fd(call.service())?, "fd")?, "the descriptor of the handle")
    }

    /// Waits until [`Kuf::read`] has something to return, for at most `timeout` (None: for ever). Returns whether it has.
    pub fn poll(&self, timeout: Option<Duration>) -> Result<bool> {
        poll::caller_poll(self.enter()?.service(), milliseconds(timeout))
    }

    /// Takes up to `most` faults, oldest first, without waiting. From then on the caller owes each of them a
    /// [`Kuf::resolve`] (or [`Kuf::poison`]); [`Kuf::pending`] lists those still owed.
    pub fn read(&self, most: usize) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        self.read_into(&mut faults, most)?;
        Ok(faults)
    }

    /// As [`Kuf::read`], at the end of `faults`. Returns how many.
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

    /// Lists the pages that the caller has been asked for and has not resolved, in order of address.
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

    /// How far all slots are together. [`Slot::progress`] is for one.
    pub fn progress(&self) -> Result<Progress> {
        self.enter()?.service().progress(KUF_ALL).map(Progress::from)
    }

    /// The settings of the handle in effect. [`Slot::settings`] is for one slot.
    pub fn settings(&self) -> Result<Settings> {
        settings::settings(self.enter()?.service(), KUF_ALL).map(Settings::from)
    }

    /// Counters and latency histograms since the handle was opened.
    pub fn stats(&self) -> Result<Stats> {
        Ok(self.enter()?.service().stats().into())
    }

    /// Names the threads for which `blocked_all_ns` of [`Stats`] is kept: the vCPUs. Replaces those of the last call.
    pub fn watch_threads(&self, threads: &[u32]) -> Result<()> {
        let call = self.enter()?;
        call.service().watch_threads(threads);
        Ok(())
    }

    /// How long each thread was kept waiting, longest sum first. Empty where the kernel does not name threads.
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

    /// Starts recording which pages are demanded, in which order.
    pub fn record_start(&self) -> Result<()> {
        recorder::record_start(self.enter()?.service(), 0)
    }

    /// Ends the recording and writes it to `file`, from where it stands. After an error the recording is kept: call again.
    pub fn record_stop(&self, file: impl AsFd) -> Result<()> {
        recorder::record_stop(self.enter()?.service(), file.as_fd().as_raw_fd())
    }

    /// Ends the recording and drops it.
    pub fn record_drop(&self) -> Result<()> {
        recorder::record_stop(self.enter()?.service(), -1)
    }

    /// Fills the pages of a recording in the background, in about the order in which they were demanded, behind all demand and
    /// ahead of [`Kuf::populate`]. The file is read from where it stands and need not be trusted.
    pub fn replay(&self, file: impl AsFd) -> Result<()> {
        replay::replay(self.enter()?.service(), file.as_fd().as_raw_fd(), 0)
    }

    /// Ends the handle: every call that waits returns ECANCELED, and later calls fail with EBADF. It waits for callbacks that
    /// are running.
    ///
    /// EBUSY: there are unresolved pages, and `end` is [`End::Complete`]. EIO: not everything could be filled, and `end` is
    /// [`End::Populate`]. The handle goes on as before in both cases. EDEADLK: called from a callback. ECHILD: called in a forked
    /// child.
    pub fn close(&self, end: End) -> Result<()> {
        self.end(end.flags())
    }

    /// As [`Kuf::close`], but callbacks may still run when it returns; their results are dropped.
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
