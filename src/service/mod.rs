//! The fault service of one handle.
//!
//! The path of a fault: `queues` (read it from the kernel) → `demand` (find its page) → `fill` (ask the caller) →
//! `install` (make the page present). Pages that the caller resolves without being asked enter at `resolve`; background
//! fills at `populate` and `replay`. `recorder` notes the demanded pages.

pub mod background;
mod buffers;
mod callbacks;
pub mod calls;
pub mod config;
mod fault;
pub mod inside;
mod life;
mod queues;
#[cfg(test)]
mod tests;
pub mod threads;

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use crate::abi::*;
use crate::error::{words, Error, Result, Words};
use crate::mechanism::kvm_async::KvmAsync;
use crate::mechanism::kvm_bitmap::KvmBitmap;
use crate::mechanism::userfaultfd::Userfaultfd;
use crate::mechanism::Mechanism;
use crate::memory::{Memory, Slot, Waiter};
use crate::os::descriptor::duplicate;
use crate::pages::readahead::NEAR;
use crate::pages::State;
use crate::probe;
use crate::service::queues::watch;
use crate::stats::all_blocked::Wait;
use crate::stats::Stats;
use crate::sync::atomic::Ordering;
use crate::sync::time::{Duration, Instant};
use crate::sync::Arc;
use background::Background;
use buffers::Buffers;
use config::{Config, Which};
use fault::ask::{self, Ready};
use fault::notice::Notice;
use fault::shortage::Shortage;
use life::Life;
use queues::Queues;
use threads::{fork, start, Threads};

pub use inside::refuse_inside_callbacks;

/// A page fault on its way.
pub struct Fault {
    slot: Arc<Slot>,
    page: u64,
    /// KUF_FAULT_*.
    flags: u32,
    wait: Wait,
}

impl Fault {
    /// Makes a fault of `waiter` again, which has waited for a page of `slot` or of a view of it.
    fn again(slot: &Arc<Slot>, waiter: Waiter) -> Self {
        let Waiter { page, wait, flags, fork } = waiter;
        Self { slot: fork.unwrap_or_else(|| slot.clone()), page, flags, wait }
    }
}

/// A piece of work for a service thread.
pub enum Work {
    Fault(Fault),
    /// Faults were lost: a thread may wait for any page that is not present.
    Sweep,
    /// A log record, found where no callback may run.
    Log(u32, Words),
    /// An event found while reading the kernel: raised by a thread that is free to enter the caller's code.
    Notice(Notice),
}

impl Work {
    /// Whether a thread waits for it; the rest are reports to the caller.
    fn is_demand(&self) -> bool {
        matches!(self, Self::Fault(_) | Self::Sweep)
    }
}

/// One handle's service.
pub struct Service {
    config: Config,
    life: Life,
    memory: Memory,
    /// The library's own mechanism. None: every slot has an adopted one.
    own: Option<Arc<dyn Mechanism>>,
    queues: Queues,
    threads: Threads,
    background: Background,
    buffers: Buffers,
    shortage: Shortage,
    /// Faults for a caller that reads them itself.
    ready: Ready,
    /// None: forks are not followed.
    forks: Option<fork::Watch>,
    stats: Stats,
}

impl Service {
    /// Opens the mechanism and starts the threads.
    pub fn open(config: Config) -> Result<Arc<Self>> {
        let own = open_mechanism(&config)?;
        Self::open_with(config, own)
    }

    /// Starts a service over `own`.
    fn open_with(config: Config, own: Option<Arc<dyn Mechanism>>) -> Result<Arc<Self>> {
        // One more than the service threads: kuf-populate.
        let threads = config.service_threads() + 1;
        // The reserve has to have room for a service.
        #[cfg(all(feature = "reserve", not(shuttle)))]
        const {
            assert!(size_of::<Self>() <= crate::alloc::reserve::LARGEST)
        };
        let service = Arc::new(Self {
            life: Life::new(),
            memory: Memory::default(),
            own,
            queues: Queues::default(),
            threads: Threads::new(&config)?,
            background: Background::default(),
            buffers: Buffers::default(),
            shortage: Shortage::default(),
            ready: Ready::new()?,
            forks: config.follow_fork.then(fork::Watch::new).transpose()?,
            stats: Stats::new(threads)?,
            config,
        });
        service.reserve_buffers(NEAR)?;
        if let Some(own) = &service.own {
            watch::add_mechanism(&service, own.clone(), None)?;
        }
        // Forks come last: once they are announced, no step here may fail.
        if let Err(error) = start::start_threads(&service).and_then(|()| fork::start_forks(&service)) {
            start::stop_threads(&service, false);
            fork::end_forks(&service);
            return Err(error);
        }
        Ok(service)
    }

    /// Makes a buffer of `len` bytes for each service thread.
    fn reserve_buffers(&self, len: u64) -> Result<()> {
        match self.serviced() {
            true => self.buffers.reserve(self.config.service_threads(), len),
            false => Ok(()),
        }
    }

    /// Whether pages come from a callback or from sources, as opposed to kuf_read.
    fn serviced(&self) -> bool {
        self.config.serviced
    }

    /// Refuses work on a service that is ending or has failed.
    fn check_open(&self) -> Result<()> {
        self.life.check()
    }

    /// Whether `slot` or the handle is ending, so that no page of `slot` is filled any more.
    fn ends(&self, slot: &Slot) -> bool {
        slot.ending.load(Ordering::Acquire) || self.check_open().is_err()
    }

    /// The error of a call on `slot` that stopped with `errno`: ECANCELED stands for the end of the handle and for that
    /// of the slot.
    fn ended_or(&self, slot: &Slot, errno: Errno, other: impl Fn(Errno) -> Error) -> Error {
        match errno {
            Errno::CANCELED => self.check_open().err().unwrap_or_else(|| slot.removed()),
            errno => other(errno),
        }
    }

    /// Fails the service after a kuf_close has panicked (a bug): pages that it has not settled may stay so.
    pub fn fail_at_the_end(&self) {
        self.life.fail_at_the_end();
    }

    /// Fails the service after a failure inside the library: it installs no page any more.
    pub fn fail(&self, what: &str) {
        if !self.life.fail() {
            return;
        }
        self.wake_all();
        let text = words!(
            "the fault service is dead: {what}; unresolved pages stay inaccessible until kuf_close poisons them"
        );
        self.config.callbacks.event(KUF_EVENT_FATAL, 0, 0, Some(Errno::IO), &text);
    }

    /// Wakes every thread that sleeps in the library, so that it checks `life`.
    fn wake_all(&self) {
        for slot in self.memory.map().all() {
            let claims = slot.claims();
            slot.wake_sleepers(&claims);
        }
        self.ready.end();
        self.background.populate.wake();
        self.threads.wake_all();
    }

    /// Gives work to the service threads.
    fn push(&self, work: Work) {
        self.threads.count(&work);
        self.push_counted(work);
    }

    /// As [`Service::push`], for work that was counted when it was read.
    fn push_counted(&self, work: Work) {
        self.threads.queue(work);
        if self.config.direct {
            ask::signal_caller(self);
        } else {
            self.threads.call();
        }
    }

    /// Queues work that was counted, for this thread or another.
    fn send(&self, work: Work) {
        self.threads.queue(work);
    }

    /// Serves faults anew whose page is not being filled after all.
    fn push_again(&self, slot: &Arc<Slot>, waiters: impl IntoIterator<Item = Waiter>) {
        for waiter in waiters {
            self.push(Work::Fault(Fault::again(slot, waiter)));
        }
    }

    /// `kuf_progress`.
    pub fn progress(&self, gpa: u64) -> Result<kuf_progress_info> {
        let map = self.memory.map();
        if gpa == KUF_ALL {
            let mut all = progress_of(map.slots().iter());
            all.gpa = 0;
            return Ok(all);
        }
        let slot = map.at_gpa(gpa).ok_or_else(|| no_slot(gpa))?;
        Ok(progress_of(std::iter::once(slot)))
    }

    /// `kuf_stats`.
    pub fn stats(&self) -> kuf_stats_info {
        self.stats.to_c()
    }

    /// `kuf_watch_threads`.
    pub fn watch_threads(&self, threads: &[u32]) {
        self.stats.all_blocked.watch(threads);
    }

    /// `kuf_block_times`.
    pub fn block_times(&self, out: &mut [std::mem::MaybeUninit<kuf_block_time>]) -> usize {
        self.stats.block_times(out)
    }
}

fn open_mechanism(config: &Config) -> Result<Option<Arc<dyn Mechanism>>> {
    let userfaultfd = || {
        let (uffd, way) =
            Userfaultfd::open(config.user_mode_only, !config.direct, config.follow_fork, config.userfaultfds)?;
        config.callbacks.log(KUF_LOG_INFO, || words!("userfaultfd {}; {} of them", way.text(), config.userfaultfds));
        Ok::<_, Error>(uffd)
    };
    Ok(match &config.mechanism {
        Which::Userfaultfd if config.adopt_only => None,
        Which::Userfaultfd => Some(Arc::new(userfaultfd()?)),
        Which::KvmBitmap(vm) => {
            probe::own_vm(vm)?;
            probe::kvm_bitmap()?;
            Some(Arc::new(KvmBitmap::new(userfaultfd()?, duplicate(vm.as_fd(), "vm_fd")?)))
        }
        Which::KvmAsync { vm, drain } => {
            probe::kvm_async(Some(vm))?;
            Some(Arc::new(KvmAsync::open(duplicate(vm.as_fd(), "vm_fd")?, *drain)?))
        }
    })
}

/// The time at which a call with this timeout has to return. None: it may wait for ever.
fn deadline(timeout_ms: i32) -> Result<Option<Instant>> {
    if timeout_ms < -1 {
        return Err(Error::new(Errno::INVAL, words!("timeout_ms is {timeout_ms}: -1 waits for ever")));
    }
    Ok(u64::try_from(timeout_ms).ok().map(|ms| Instant::now() + Duration::from_millis(ms)))
}

fn no_slot(gpa: u64) -> Error {
    Error::new(Errno::NOENT, words!("gpa {gpa:#x} is in no memory slot of this handle"))
}

fn progress_of<'a>(slots: impl Iterator<Item = &'a Arc<Slot>>) -> kuf_progress_info {
    let mut sum = kuf_progress_info {
        size: 0,
        flags: KUF_PROGRESS_COMPLETE,
        gpa: 0,
        total: 0,
        present: 0,
        removed: 0,
        absent: 0,
        filling: 0,
        deferred: 0,
        poisoned: 0,
    };
    for slot in slots {
        // Hold the lock while reading, so that the parts add up to the total.
        let claims = slot.claims();
        let tally = claims.tally();
        sum.gpa = slot.gpa;
        sum.total += slot.len;
        sum.present += slot.pages.count(State::Present) * slot.granule;
        sum.removed += slot.pages.count(State::Removed) * slot.granule;
        sum.absent += slot.pages.count(State::Absent) * slot.granule;
        sum.filling += tally.filling * slot.granule;
        sum.deferred += tally.deferred * slot.granule;
        sum.poisoned += tally.poisoned * slot.granule;
        if slot.gone().is_some() {
            sum.flags |= KUF_PROGRESS_GONE;
        }
    }
    if sum.present + sum.removed != sum.total {
        sum.flags &= !KUF_PROGRESS_COMPLETE;
    }
    sum
}

/// A new eventfd for the library's own threads.
pub(crate) fn eventfd() -> Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| Error::system("eventfd", e))
}
