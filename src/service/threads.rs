//! The service threads.
//!
//! There is one more thread than may be inside host code, so one can always watch the kernel's queues. Which one it is
//! changes (`crew`): the thread that reads a fault fills it itself when a filler's place is free, so that a fault costs
//! one thread wake-up and not two.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;

use super::ahead::Task;
use super::config::Which;
use super::cpus::Cpus;
use super::{eventfd, lock_threads, window, Service, Work, OPEN};
use crate::capi::types::KUF_LOG_INFO;
use crate::crew::Lead;
use crate::error::{Error, Result};
use crate::panics::quietly;
use crate::sync::lock;

/// Epoll data of the work eventfd. That of a queue is its mechanism's id, from 1, and in the upper half its number.
const WORK: u64 = 0;

/// How long the lead looks away from the kernel at most, and from whoever waits for an event of theirs to be read.
const NAP: Duration = Duration::from_micros(50);

/// How often the processes behind remote slots are looked at, whose end nothing reports, and queues whose signal may be
/// lost.
const LOOK_MS: i64 = 500;

/// What epoll has said.
struct Events {
    room: [epoll::Event; 8],
    len: usize,
}

impl Default for Events {
    fn default() -> Self {
        let none = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        Self { room: [none; 8], len: 0 }
    }
}

impl std::ops::Deref for Events {
    type Target = [epoll::Event];

    fn deref(&self) -> &Self::Target {
        &self.room[..self.len]
    }
}

/// Whose CPUs a thread gets.
#[derive(Clone, Copy)]
pub(super) enum Placing {
    Service,
    Populate,
}

/// Looking for the next fault for a while instead of going to sleep: waking up costs more than the fault.
struct Spin {
    /// At most this long; zero: not at all.
    most: Duration,
    /// Whether faults come fast enough at present.
    worth: bool,
}

impl Spin {
    fn new(most: Duration) -> Self {
        Self { most, worth: false }
    }

    fn is_on(&self) -> bool {
        !self.most.is_zero()
    }

    fn until(&self) -> Option<Instant> {
        self.worth.then(|| Instant::now() + self.most)
    }

    fn in_vain(&mut self) {
        self.worth = false;
    }

    /// The thread slept since `asleep`, instead: would it have had to look for long?
    fn slept(&mut self, asleep: Instant) {
        // What it takes to wake up is part of what is measured here.
        const WAKE: Duration = Duration::from_micros(100);
        self.worth = asleep.elapsed() < self.most + WAKE;
    }
}

/// How threads sleep and are woken.
pub struct Waking {
    epoll: OwnedFd,
    /// Wakes the thread that has the lead.
    work: OwnedFd,
    /// Kernel queues are watched edge by edge by the service threads, or by level when the host watches.
    edge: bool,
}

impl Waking {
    pub fn new(edge: bool) -> Result<Self> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::system("epoll_create", e.raw_os_error()))?;
        let waking = Self { epoll, work: eventfd()?, edge };
        if edge {
            waking.add(waking.work.as_fd(), WORK, false)?;
        }
        Ok(waking)
    }

    fn add(&self, fd: BorrowedFd<'_>, data: u64, edge: bool) -> Result<()> {
        let mode = if edge { epoll::EventFlags::ET } else { epoll::EventFlags::empty() };
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(data), epoll::EventFlags::IN | mode)
            .map_err(|e| Error::system("epoll_ctl", e.raw_os_error()))
    }

    /// Watches one of a mechanism's queues.
    pub fn watch(&self, fd: BorrowedFd<'_>, mechanism: u32, queue: usize) -> Result<()> {
        self.add(fd, u64::from(mechanism) | (queue as u64) << 32, self.edge)
    }

    /// Stops that.
    pub fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// The epoll instance, for the host's own loop.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Watches `fd` by level, for the host's own loop.
    pub fn watch_level(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.add(fd, WORK, false)
    }

    /// Wakes the thread that waits here.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.work, &1_u64.to_ne_bytes());
    }

    fn wait(&self, timeout_ms: i64) -> Events {
        let mut events = Events::default();
        let timeout = (timeout_ms >= 0)
            .then(|| rustix::event::Timespec { tv_sec: timeout_ms / 1000, tv_nsec: timeout_ms % 1000 * 1_000_000 });
        match epoll::wait(&self.epoll, &mut events.room, timeout.as_ref()) {
            Ok(n) => events.len = n,
            Err(Errno::INTR) => {}
            // Not to be expected; looking again a little later is all that can be done.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        events
    }

    /// It is awake.
    fn clear(&self) {
        let _ = rustix::io::read(&self.work, &mut [0_u8; 8]);
    }
}

impl Service {
    /// Starts the service threads, and the one that populates.
    pub(super) fn start_threads(self: &Arc<Self>) -> Result<()> {
        if self.config.direct {
            return self.waking.watch_level(self.ready.fd());
        }
        for n in 0..self.config.service_threads() {
            self.spawn(format!("kuf-serve-{n}"), Placing::Service, |service| service.serve_loop())?;
        }
        self.decide_on_spinning();
        // It also does what is neither demand nor may keep a thread from it.
        if self.serviced() || matches!(self.config.mechanism, Which::KvmBitmap(_)) {
            self.spawn("kuf-populate".to_owned(), Placing::Populate, |service| service.populate_loop())?;
        }
        Ok(())
    }

    /// Asked here and not where it is needed: std reads files of /proc for it.
    fn decide_on_spinning(&self) {
        if self.config.spin.is_zero() {
            return;
        }
        // Of any thread: who touches memory may be kept elsewhere than this thread and those it has started.
        let several = Cpus::of_this_process().count() > 1;
        // Where this thread may use several, it is the cgroup's quota that says one.
        let quota = Cpus::of_this_thread().is_some_and(|here| here.count() > 1)
            && std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        if several && !quota {
            self.may_spin.store(true, Ordering::Relaxed);
        } else {
            self.config.host.log(KUF_LOG_INFO, || "spin_us has no effect: there is one CPU for everybody".to_owned());
        }
    }

    /// Keeps a new thread where the host wants it.
    pub(super) fn keep_on_cpus(&self, placing: Placing, thread: &JoinHandle<()>) -> Result<()> {
        let service = (&self.config.cpus, "options->cpus");
        let (cpus, what) = match placing {
            Placing::Populate if self.config.populate_cpus.is_some() => {
                (&self.config.populate_cpus, "options->populate_cpus")
            }
            _ => service,
        };
        cpus.as_ref().map_or(Ok(()), |cpus| cpus.keep(thread, what))
    }

    fn spawn(
        self: &Arc<Self>,
        name: String,
        placing: Placing,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<()> {
        let service = self.clone();
        let guarded = move || {
            service.stats.enlist();
            if let Err(what) = quietly(|| body(&service)) {
                let _ = quietly(|| service.fail(&format!("a service thread panicked: {what}")));
            }
        };
        let thread = with_signals_blocked(|| std::thread::Builder::new().name(name).spawn(guarded))
            .map_err(|e| Error::system("starting a service thread", e.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        let placed = self.keep_on_cpus(placing, &thread);
        lock(&self.threads).push(thread);
        placed
    }

    /// Tells the threads to end, and waits for it unless `nowait`.
    pub(super) fn stop_threads(&self, nowait: bool) {
        let _ = self.life.compare_exchange(OPEN, super::CLOSING, Ordering::AcqRel, Ordering::Acquire);
        self.wake_everybody();
        for thread in lock_threads(&self.threads) {
            if nowait {
                continue;
            }
            while !thread.is_finished() {
                // It may be in a callback that waits for a host thread that waits for its event to be read.
                self.serve_at_the_end();
                std::thread::sleep(Duration::from_micros(200));
            }
            let _ = thread.join();
        }
    }

    pub(super) fn running(&self) -> bool {
        self.life.load(Ordering::Acquire) == OPEN
    }

    fn serve_loop(self: &Arc<Self>) {
        while self.running() {
            if self.wants_help() {
                self.work_off(None);
            }
            match self.crew.take_lead() {
                Some(lead) => self.watch(lead),
                None => self.crew.rest(|| self.running() && !self.wants_help()),
            }
        }
    }

    /// Whether there is something to do for a thread that has not got the lead. Not if the one that has is awake and soon
    /// through with it: two would meet at every lock. It looks once more before it sleeps.
    fn wants_help(&self) -> bool {
        let asleep = self.lead_asleep.load(Ordering::SeqCst);
        let leave_it =
            || !asleep && self.crew.is_led() && self.crew.quick() && !self.crew.worth_help(self.work.1.len());
        self.can_work() && !leave_it() || self.can_go_ahead(asleep)
    }

    /// Waits for the kernel, and serves what it brings, for as long as this thread has the lead.
    fn watch(&self, lead: Lead) {
        let mut spin = Spin::new(self.config.spin);
        while self.running() && self.crew.leads(lead) {
            let events = self.next_events(&mut spin);
            if !self.running() {
                break;
            }
            self.look_now_and_then();
            self.serve_late();
            for event in events.iter() {
                match event.data.u64() {
                    WORK => self.waking.clear(),
                    data => self.pump(data as u32, (data >> 32) as usize),
                }
            }
            self.work_off(Some(lead));
            self.nap();
        }
        self.crew.let_go(lead);
    }

    /// When everybody is inside a slow fill and more of them are queued, reading the kernel for each single fault costs
    /// a CPU that somebody else could use, and starts nothing sooner.
    fn nap(&self) {
        if self.fillers.load(Ordering::SeqCst) > 0 {
            return;
        }
        let busy = self.crew.busy_for(self.work.1.len(), self.config.fill_threads);
        if busy >= NAP {
            std::thread::sleep(NAP);
        }
    }

    fn next_events(&self, spin: &mut Spin) -> Events {
        if self.can_go_ahead(true) {
            return self.waking.wait(0);
        }
        if let Some(until) = spin.until().filter(|_| self.may_spin.load(Ordering::Relaxed)) {
            loop {
                let events = self.waking.wait(0);
                if !events.is_empty() || self.can_work() || !self.running() {
                    return events;
                }
                if Instant::now() >= until {
                    break;
                }
                // Whoever is to touch the next page may want this very core.
                std::thread::yield_now();
            }
            spin.in_vain();
        }
        self.lead_asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Something may have been pushed by somebody who saw nobody asleep.
        let idle = self.running() && !self.can_work() && !self.can_go_ahead(true);
        let patience = if idle { self.patience() } else { 0 };
        let asleep = spin.is_on().then(Instant::now);
        let events = self.waking.wait(patience);
        self.lead_asleep.store(false, Ordering::SeqCst);
        if let Some(asleep) = asleep {
            spin.slept(asleep);
        }
        events
    }

    /// Works while there is work and a filler's place. `lead`: this thread's, to be kept over quick work and let go of
    /// before slow work.
    fn work_off(&self, lead: Option<Lead>) {
        'queue: while self.running() && self.can_work() {
            if self.fillers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |free| free.checked_sub(1)).is_err() {
                return;
            }
            let (place, mut next) = (Place(self), None);
            while let Ok(work) = self.work.1.try_recv() {
                self.pump_starved();
                next = self.work_as(lead.filter(|lead| self.crew.leads(*lead)), work);
                if !self.running() {
                    return;
                }
                if next.is_some() {
                    break;
                }
                if lead.is_some_and(|lead| !self.crew.leads(lead)) && !self.wants_help() {
                    // Whoever has the lead now has what is left of demand.
                    break 'queue;
                }
            }
            self.pump_starved();
            // A fill that blocks there is to keep no fault waiting.
            drop(place);
            if let Some(task) = next {
                self.fill_up(lead, task);
            }
        }
        self.go_ahead(lead);
    }

    /// Returns what is to be brought before anything else.
    fn work_as(&self, lead: Option<Lead>, work: Work) -> Option<Task> {
        let queued = self.work.1.len();
        let quick = match &work {
            Work::Fault(fault) if !self.serviced() || self.crew.quick() => Some(fault.read_at),
            _ => None,
        };
        match (lead, quick) {
            (Some(lead), Some(since)) => {
                if self.crew.worth_help(queued) || !self.crew.is_watched() {
                    self.crew.call();
                }
                let inside = self.crew.enter(lead, since);
                let next = self.begin(work);
                self.crew.leave(inside);
                next
            }
            (lead, _) => {
                if let Some(lead) = lead {
                    self.crew.let_go(lead);
                }
                // Somebody has to watch, or stand by for who does, and others can take the rest.
                let more = queued > 0 && (quick.is_none() || self.crew.worth_help(queued));
                if more || !self.crew.is_watched() {
                    self.crew.call();
                }
                self.begin(work)
            }
        }
    }

    fn can_work(&self) -> bool {
        !self.work.1.is_empty() && self.fillers.load(Ordering::SeqCst) > 0
    }

    pub(super) fn work_on(&self, work: Work) {
        self.put_off(self.begin(work));
    }

    /// Does a piece of work. Returns what is to be brought before the next.
    fn begin(&self, work: Work) -> Option<Task> {
        let demand = work.is_demand();
        let mut next = None;
        match work {
            Work::Fault(fault) => next = self.serve(fault),
            Work::Sweep => self.sweep(),
            Work::Log(level, text) => self.config.host.log(level, || text),
            Work::Notice { kind, gpa, len, error, text } => self.config.host.event(kind, gpa, len, error, &text),
        }
        if demand {
            self.demanded.fetch_sub(1, Ordering::SeqCst);
        }
        next
    }

    /// Whatever else there is to do: steady faults of one process must not hide the end of another.
    fn look_now_and_then(&self) {
        if !self.has_to_look.load(Ordering::Relaxed) {
            return;
        }
        let now = self.opened.elapsed().as_millis() as u64;
        let last = self.looked.load(Ordering::Relaxed);
        let due = now.saturating_sub(last) >= LOOK_MS as u64;
        if due && self.looked.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.look_after_processes();
            for inlet in self.inlets().iter().filter(|inlet| inlet.mechanism.ticks()) {
                self.pump(inlet.mechanism.id(), inlet.queue);
            }
        }
    }

    fn patience(&self) -> i64 {
        if self.windows.left() > 0 {
            window::LOOK_MS
        } else if self.has_to_look.load(Ordering::Relaxed) {
            LOOK_MS
        } else {
            -1
        }
    }
}

/// A filler's place, free again when dropped, also by a panic.
struct Place<'a>(&'a Service);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fillers.fetch_add(1, Ordering::SeqCst);
    }
}

/// A new thread inherits the mask: the library's threads take no signal of the host's.
pub(super) fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are filled by the calls; the mask is this thread's own and is put back below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = body();
    // SAFETY: `before` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}
