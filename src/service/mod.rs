//! The fault service of one handle.
//!
//! A fault's way, left to right: `inlet` (read from the kernel) → `demand` (whose page is it?) → `fill` (ask the host)
//! → `install` (open the page). What the host brings unasked enters at `resolve`; what nobody waits for, at `populate` (and
//! `replay`). What was demanded is written down in `record`.

mod ahead;
mod asking;
mod behind;
mod caller;
mod close;
pub mod config;
pub mod cpus;
mod demand;
mod discard;
mod fill;
mod fork;
mod host;
pub mod huge;
mod inlet;
mod install;
mod kvm;
mod populate;
mod present;
mod record;
mod replay;
mod resolve;
mod slots;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_kvm;
#[cfg(test)]
mod tests_window;
mod threads;
mod window;
mod zero;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{unbounded, Receiver, Sender};

use crate::capi::types::*;
use crate::crew::Crew;
use crate::error::{Error, Result};
use crate::mechanism::kvm_async::KvmAsync;
use crate::mechanism::kvm_bitmap::KvmBitmap;
use crate::mechanism::userfaultfd::Userfaultfd;
use crate::mechanism::Mechanism;
use crate::memory::buffer::Pool;
use crate::memory::{staging, Memory, Slot, Waiter};
use crate::pages::State;
use crate::probe;
use crate::stats::Stats;
use crate::sync::{lock, Mutex};
use caller::Ready;
use config::{Config, Which};
use inlet::Inlet;

pub use host::refuse_inside_callbacks;
pub use slots::duplicate_vm;

/// A page fault on its way.
pub struct Fault {
    slot: Arc<Slot>,
    page: u64,
    /// KUF_FAULT_*.
    flags: u32,
    /// The toucher's thread id, or 0.
    thread: u32,
    read_at: Instant,
}

/// Something for a service thread to do.
enum Work {
    Fault(Fault),
    /// Faults were lost: whatever is closed may be waited for.
    Sweep,
    /// A log record, from where no host code may run.
    Log(u32, String),
    /// An event found while reading the kernel: raised by a thread that is free to enter host code.
    Notice {
        kind: u32,
        gpa: u64,
        len: u64,
        error: i32,
        text: String,
    },
}

impl Work {
    /// Whether somebody waits for it, as opposed to something that the host is to be told.
    fn is_demand(&self) -> bool {
        matches!(self, Self::Fault(_) | Self::Sweep)
    }
}

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const DEAD: u8 = 2;

/// One handle's service.
pub struct Service {
    config: Config,
    memory: Memory,
    /// The library's own mechanism; None when every slot brings one.
    own: Option<Arc<dyn Mechanism>>,
    /// Every queue there is to read.
    inlets: RwLock<Arc<Vec<Arc<Inlet>>>>,
    /// Held while it is looked up which mechanism has a userfaultfd of the host's, until its slot is on the map, and while
    /// that is given up: one queue has one mechanism. Locked before any gate; no host code runs under it.
    adopting: Mutex<()>,
    work: (Sender<Work>, Receiver<Work>),
    /// Service threads that may be inside host code, of `config.fill_threads`: one more thread than that always
    /// watches.
    fillers: AtomicUsize,
    crew: Crew,
    /// The thread that watches the kernel is asleep there.
    lead_asleep: AtomicBool,
    /// Some queue holds messages that there was no room for.
    starving: AtomicBool,
    /// Demand that is queued or being served.
    demanded: AtomicUsize,
    /// A [`Work::Sweep`] is queued and has not begun.
    sweep_queued: AtomicBool,
    /// The host was told of a queue whose signals go elsewhere.
    warned: AtomicBool,
    waking: threads::Waking,
    /// Looking for the next fault takes no CPU that somebody needs to cause it.
    may_spin: AtomicBool,
    ready: Ready,
    populate: populate::Queue,
    lately: behind::Lately,
    windows: window::Windows,
    recorder: record::Recorder,
    ahead: ahead::Ahead,
    buffers: Pool,
    staging: staging::Pool,
    life: AtomicU8,
    opened: Instant,
    /// Something is to be looked after now and then: another process, a queue whose signals may be lost.
    has_to_look: AtomicBool,
    /// When processes were last looked after, in milliseconds since then.
    looked: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
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
        // With kuf-populate.
        let threads = config.service_threads() + 1;
        let service = Arc::new(Self {
            memory: Memory::default(),
            own,
            inlets: RwLock::default(),
            adopting: Mutex::default(),
            work: unbounded(),
            fillers: AtomicUsize::new(if config.serviced() { config.fill_threads } else { 1 }),
            crew: Crew::default(),
            lead_asleep: AtomicBool::new(false),
            starving: AtomicBool::new(false),
            demanded: AtomicUsize::new(0),
            sweep_queued: AtomicBool::new(false),
            warned: AtomicBool::new(false),
            waking: threads::Waking::new(!config.direct)?,
            may_spin: AtomicBool::new(false),
            ready: Ready::new()?,
            populate: populate::Queue::default(),
            lately: behind::Lately::default(),
            windows: window::Windows::default(),
            recorder: record::Recorder::default(),
            ahead: ahead::Ahead::default(),
            buffers: Pool::default(),
            staging: staging::Pool::default(),
            life: AtomicU8::new(OPEN),
            opened: Instant::now(),
            has_to_look: AtomicBool::new(false),
            looked: AtomicU64::new(0),
            threads: Mutex::new(Vec::new()),
            forks: config.follow_fork.then(fork::Watch::new).transpose()?,
            stats: Stats::new(threads),
            config,
        });
        if let Some(own) = &service.own {
            service.add_inlet(own.clone(), None)?;
        }
        // Forks last: once they are announced nothing here may fail.
        if let Err(error) = service.start_threads().and_then(|()| service.start_forks()) {
            service.stop_threads(false);
            return Err(error);
        }
        service.config.host.opened.store(true, Ordering::Release);
        Ok(service)
    }

    /// Whether pages come from a callback or from sources, as opposed to kuf_read.
    fn serviced(&self) -> bool {
        self.config.serviced()
    }

    /// Refuses work on a service that is ending or has failed.
    fn check_open(&self) -> Result<()> {
        match self.life.load(Ordering::Acquire) {
            OPEN => Ok(()),
            CLOSING => Err(Error::new(libc::ECANCELED, "kuf_close has begun on this handle")),
            _ => Err(Error::new(libc::EIO, "the service of this handle is dead after an internal failure: close it")),
        }
    }

    /// A failure inside the library: nothing is opened any more.
    pub fn fail(&self, what: &str) {
        if self.life.compare_exchange(OPEN, DEAD, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        self.wake_everybody();
        let text =
            format!("the fault service is dead: {what}; unresolved pages stay closed until kuf_close poisons them");
        self.config.host.event(KUF_EVENT_FATAL, 0, 0, libc::EIO, &text);
    }

    /// Wakes every thread that sleeps in the library, to look at `life`.
    fn wake_everybody(&self) {
        for slot in self.memory.map().all() {
            let claims = slot.claims();
            slot.wake_sleepers(&claims);
        }
        self.ready.end();
        self.populate.wake();
        self.crew.call_all();
        self.waking.wake();
    }

    /// Gives service threads something to do.
    fn push(&self, work: Work) {
        self.count(&work);
        self.push_counted(work);
    }

    /// As [`Service::push`], of work that was counted when it was read.
    fn push_counted(&self, work: Work) {
        self.send(work);
        if self.config.direct {
            self.ready.signal();
        } else if !self.crew.call() {
            self.wake_lead();
        }
    }

    /// Wakes the thread that watches the kernel, if it sleeps.
    fn wake_lead(&self) {
        if self.lead_asleep.load(Ordering::SeqCst) {
            self.waking.wake();
        }
    }

    /// Demand counts from when it is taken from the kernel until it is served.
    fn count(&self, work: &Work) {
        if work.is_demand() {
            self.demanded.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Queues work for this thread, or whoever comes.
    fn send(&self, work: Work) {
        // The channel is unbounded, and closed only with the service.
        let _ = self.work.0.send(work);
    }

    /// Serves faults anew whose page turned out not to be on its way after all.
    fn push_again(&self, slot: &Arc<Slot>, waiters: impl IntoIterator<Item = Waiter>) {
        for waiter in waiters {
            let slot = waiter.fork.clone().unwrap_or_else(|| slot.clone());
            let (page, flags, thread, read_at) = (waiter.page, waiter.flags, waiter.thread, waiter.read_at);
            self.push(Work::Fault(Fault { slot, page, flags, thread, read_at }));
        }
    }

    /// `kuf_progress`.
    pub fn progress(&self, gpa: u64) -> Result<kuf_progress> {
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
    pub fn stats(&self) -> kuf_stats {
        self.stats.to_c()
    }

    /// `kuf_watch_threads`.
    pub fn watch_threads(&self, threads: &[u32]) {
        self.stats.overlap.watch(threads);
    }

    /// `kuf_block_times`.
    pub fn block_times(&self, out: &mut [std::mem::MaybeUninit<kuf_block_time>]) -> usize {
        self.stats.block_times(out)
    }

    fn inlets(&self) -> Arc<Vec<Arc<Inlet>>> {
        self.inlets.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn open_mechanism(config: &Config) -> Result<Option<Arc<dyn Mechanism>>> {
    let userfaultfd = || {
        let (uffd, way) =
            Userfaultfd::open(config.user_mode_only, !config.direct, config.follow_fork, config.userfaultfds)?;
        config.host.log(KUF_LOG_INFO, || format!("userfaultfd {}; {} of them", way.text(), config.userfaultfds));
        Ok::<_, Error>(uffd)
    };
    Ok(match &config.mechanism {
        Which::Userfaultfd if config.adopt_only => None,
        Which::Userfaultfd => Some(Arc::new(userfaultfd()?)),
        Which::KvmBitmap(vm) => {
            probe::own_vm(vm)?;
            probe::kvm_bitmap()?;
            Some(Arc::new(KvmBitmap::new(userfaultfd()?, slots::duplicate(vm.as_fd(), "vm_fd")?)))
        }
        Which::KvmAsync { vm, drain } => {
            probe::kvm_async(Some(vm))?;
            Some(Arc::new(KvmAsync::open(slots::duplicate(vm.as_fd(), "vm_fd")?, *drain)?))
        }
    })
}

/// When a call with this timeout has to return; None: it may wait for ever.
fn deadline(timeout_ms: i32) -> Result<Option<Instant>> {
    if timeout_ms < -1 {
        return Err(Error::new(libc::EINVAL, format!("timeout_ms is {timeout_ms}: -1 waits for ever")));
    }
    Ok(u64::try_from(timeout_ms).ok().map(|ms| Instant::now() + Duration::from_millis(ms)))
}

fn no_slot(gpa: u64) -> Error {
    Error::new(libc::ENOENT, format!("gpa {gpa:#x} is in no memory slot of this handle"))
}

fn progress_of<'a>(slots: impl Iterator<Item = &'a Arc<Slot>>) -> kuf_progress {
    let mut sum = kuf_progress {
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
        // Locked while reading, so that the parts add up to the total.
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
fn eventfd() -> Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| Error::system("eventfd", e.raw_os_error()))
}

fn lock_threads(threads: &Mutex<Vec<JoinHandle<()>>>) -> Vec<JoinHandle<()>> {
    std::mem::take(&mut *lock(threads))
}
