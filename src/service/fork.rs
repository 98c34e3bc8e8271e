//! fork(2): how it gets through, and how the child is served.
//!
//! With KUF_OPEN_FOLLOW_FORK the kernel lets a fork go on when its FORK event has been read. glibc's fork holds every
//! lock of malloc all that time, and everything here allocates: before it reads, with the gate held, with a slot's
//! claims locked. Whoever does so waits for malloc, who reads waits for them, and malloc for the read. So fork is
//! announced ([`atfork`]); `prepare` runs before malloc is locked:
//!
//! 1. prepare: the service's thread `kuf-fork` makes room for messages and takes the gate. Nobody is in an install
//!    then, and nobody else reads.
//! 2. malloc is locked, the child made. `kuf-fork` reads, and does nothing else that could wait: see
//!    [`Service::read_through_fork`].
//! 3. parent: `kuf-fork` applies what it has read, as always under the gate, and lets go of it. fork(2) returns
//!    meanwhile.
//!
//! A child that is made otherwise (clone(2) by hand) is not announced and holds no lock of malloc: its event is read
//! like any other. posix_spawn(3) and vfork(2) copy no memory and make no event.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::inlet::Inlet;
use super::threads::{with_signals_blocked, Placing};
use super::{eventfd, Service, Work, CLOSING};
use crate::capi::types::KUF_EVENT_FORKED;
use crate::error::{Error, Result};
use crate::mechanism::Left;
use crate::memory::Slot;
use crate::panics::quietly;
use crate::sync::{lock, Condvar, Mutex, MutexGuard};

/// Messages that can be held until malloc is free again. Each thread that touches guest memory adds one and waits.
const ROOM: usize = 16384;

/// How soon a read that failed is tried again: for want of a descriptor for the child, which another thread may close.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Idle,
    /// A thread is about to fork.
    Announced,
    /// It may.
    Reading,
    /// There is no thread any more.
    Ended,
}

/// Between a thread that forks and the service's `kuf-fork`. Neither allocates with `step` locked.
pub struct Watch {
    step: Mutex<Step>,
    changed: Condvar,
    /// Readable when the fork is over.
    over: OwnedFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    pub fn new() -> Result<Self> {
        let (step, changed) = (Mutex::new(Step::Idle), Condvar::new());
        Ok(Self { step, changed, over: eventfd()?, thread: Mutex::new(None) })
    }

    fn set(&self, step: Step) {
        *lock(&self.step) = step;
        self.changed.notify_all();
    }

    /// Waits for another step than `step`.
    fn while_in<'a>(&self, step: Step, mut at: MutexGuard<'a, Step>) -> MutexGuard<'a, Step> {
        while *at == step {
            at = self.changed.wait(at).unwrap_or_else(PoisonError::into_inner);
        }
        at
    }

    /// Before a fork. Returns when `kuf-fork` reads.
    fn prepare(&self) {
        // The last fork may still be being applied.
        let mut at = self.while_in(Step::Reading, lock(&self.step));
        if *at == Step::Idle {
            *at = Step::Announced;
            self.changed.notify_all();
            drop(self.while_in(Step::Announced, at));
        }
    }

    /// After it.
    fn parent(&self) {
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    /// Ends the thread, if no fork is announced any more.
    fn end(&self) {
        let mut at = self.while_in(Step::Reading, lock(&self.step));
        *at = Step::Ended;
        drop(at);
        self.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Service {
    /// Starts to follow forks.
    pub(super) fn start_forks(self: &Arc<Self>) -> Result<()> {
        let Some(watch) = &self.forks else { return Ok(()) };
        let Some(inlet) = self.own.as_ref().and_then(|own| self.inlet(own.id())) else { return Ok(()) };
        atfork::install()?;
        let service = self.clone();
        let body = move || {
            let Some(watch) = &service.forks else { return };
            let result = quietly(|| service.fork_loop(watch, &inlet));
            watch.set(Step::Ended);
            if let Err(what) = result {
                let _ = quietly(|| service.fail(&format!("the thread for forks panicked: {what}")));
            }
        };
        let thread = with_signals_blocked(|| std::thread::Builder::new().name("kuf-fork".to_owned()).spawn(body))
            .map_err(|e| Error::system("starting a service thread", e.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        let placed = self.keep_on_cpus(Placing::Service, &thread);
        *lock(&watch.thread) = Some(thread);
        if placed.is_err() {
            watch.end();
            return placed;
        }
        atfork::add(self);
        Ok(())
    }

    /// Stops it, when the memory makes no events any more: until then a fork would wait for its reader.
    pub(super) fn end_forks(self: &Arc<Self>) {
        if let Some(watch) = &self.forks {
            atfork::remove(self);
            watch.end();
        }
    }

    fn fork_loop(&self, watch: &Watch, inlet: &Arc<Inlet>) {
        loop {
            let at = *watch.while_in(Step::Idle, lock(&watch.step));
            if at == Step::Ended {
                return;
            }
            self.read_through_fork(watch, inlet);
            watch.set(Step::Idle);
        }
    }

    fn read_through_fork(&self, watch: &Watch, inlet: &Arc<Inlet>) {
        let mechanism = &inlet.mechanism;
        let mut messages = Vec::with_capacity(ROOM);
        let mut work = Vec::new();
        let read = {
            let _gate = mechanism.gate().write().unwrap_or_else(PoisonError::into_inner);
            watch.set(Step::Reading);
            // From here until the fork is over: no allocation, and no lock that is held by somebody who allocates.
            let mut over = false;
            while !over {
                let room = messages.capacity() - messages.len();
                let read = mechanism.read(inlet.queue, room, &mut messages);
                let end = PollFd::new(&watch.over, PollFlags::IN);
                over = match (read, mechanism.inlet(inlet.queue)) {
                    (Ok(Left::Nothing), Some(queue)) => {
                        let mut fds = [end, PollFd::new(&queue, PollFlags::IN)];
                        let _ = poll(&mut fds, None);
                        !fds[0].revents().is_empty()
                    }
                    (Ok(_), _) => poll(&mut [end], None).is_ok(),
                    (Err(_), _) => poll(&mut [end], Some(&RETRY)).is_ok_and(|ready| ready > 0),
                };
            }
            let _ = rustix::io::read(&watch.over, &mut [0_u8; 8]);
            // malloc is free again.
            let read = mechanism.read(inlet.queue, usize::MAX, &mut messages);
            self.apply(inlet, &mut messages, &mut work);
            read
        };
        self.hand_on(inlet, work, read.map(drop), Self::push);
        self.settle_late();
    }

    /// kuf_close may have settled everything before this child was there.
    fn settle_late(&self) {
        if self.life.load(Ordering::Acquire) != CLOSING {
            return;
        }
        let own = self.own.as_ref().map(|own| own.id());
        for slot in self.memory.map().all() {
            if slot.parent.as_ref().is_some_and(|parent| Some(parent.mechanism.id()) == own) {
                self.poison_rest(slot);
            }
        }
    }

    /// A child was forked: its copy of the memory gets views of its own. Pages present now are the child's already.
    pub(super) fn follow_fork(&self, parent: &Arc<Inlet>, fd: OwnedFd, work: &mut Vec<Work>) {
        self.forget_dead_children();
        let Some(child) = parent.mechanism.child(fd) else { return };
        let map = self.memory.map();
        let views: Vec<_> = map
            .all()
            .filter(|slot| slot.mechanism.id() == parent.mechanism.id())
            .map(|slot| Arc::new(Slot::forked(slot, child.clone())))
            .collect();
        let added = self.memory.update(|map| {
            views.iter().for_each(|view| map.add_fork(view.clone()));
            Ok(())
        });
        let (kind, error, text) = match added.and_then(|()| self.add(Inlet::new(child, 0, None, true, true))) {
            Ok(()) => (KUF_EVENT_FORKED, 0, "the process forked; the child is served too".to_owned()),
            Err(e) => (KUF_EVENT_FORKED, e.errno(), format!("the process forked and the child cannot be served: {e}")),
        };
        work.push(Work::Notice { kind, gpa: 0, len: 0, error, text });
    }

    pub(super) fn forget_dead_children(&self) {
        for inlet in self.inlets().iter().filter(|inlet| inlet.fork && !inlet.mechanism.alive()) {
            self.drop_inlet(inlet.mechanism.id());
            let _ = self.memory.update(|map| {
                map.remove_forks(inlet.mechanism.id());
                Ok(())
            });
        }
    }
}

/// The process's fork handlers, and the services they announce forks to.
mod atfork {
    use super::{lock, Arc, Cell, Error, ManuallyDrop, Mutex, MutexGuard, Result, Service};

    /// Services that follow forks, with the process that opened them: a child that was made without the handlers has
    /// the list, and none of the threads.
    type Services = Vec<(u32, Arc<Service>)>;

    /// Locked from `prepare` to `parent`: one fork at a time, and a service that ends waits for it.
    static SERVICES: Mutex<Services> = Mutex::new(Vec::new());

    thread_local! {
        /// The lock, between the handlers. Without a destructor, so that it is there also in a thread that is ending.
        static HELD: Cell<Option<ManuallyDrop<MutexGuard<'static, Services>>>> = const { Cell::new(None) };
    }

    /// Registers the handlers, once for the life of the process: the shared library stays loaded.
    pub fn install() -> Result<()> {
        static INSTALLED: Mutex<bool> = Mutex::new(false);
        let mut installed = lock(&INSTALLED);
        if !*installed {
            // SAFETY: functions that live as long as the process and do not unwind.
            let errno = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
            if errno != 0 {
                return Err(Error::system("pthread_atfork", errno));
            }
            *installed = true;
        }
        Ok(())
    }

    pub fn add(service: &Arc<Service>) {
        lock(&SERVICES).push((std::process::id(), service.clone()));
    }

    pub fn remove(service: &Arc<Service>) {
        lock(&SERVICES).retain(|(_, other)| !Arc::ptr_eq(other, service));
    }

    fn of_this_process(services: &Services) -> impl Iterator<Item = &super::Watch> {
        let me = std::process::id();
        services.iter().filter(move |(pid, _)| *pid == me).filter_map(|(_, service)| service.forks.as_ref())
    }

    unsafe extern "C" fn prepare() {
        let services = lock(&SERVICES);
        of_this_process(&services).for_each(super::Watch::prepare);
        HELD.set(Some(ManuallyDrop::new(services)));
    }

    unsafe extern "C" fn parent() {
        if let Some(services) = HELD.take().map(ManuallyDrop::into_inner) {
            of_this_process(&services).for_each(super::Watch::parent);
        }
    }

    /// The parent's services are of no use here, and nothing of theirs may be touched, not even to drop it: their
    /// threads are not there to let go of what they have locked. The list is for the child's own.
    unsafe extern "C" fn child() {
        if let Some(mut services) = HELD.take().map(ManuallyDrop::into_inner) {
            std::mem::forget(std::mem::take(&mut *services));
        }
    }
}
