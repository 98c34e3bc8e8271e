//! fork(2): lets it complete, and serves the child.
//!
//! With KUF_OPEN_FOLLOW_FORK the kernel lets a fork go on when its FORK event has been read. glibc's fork holds every
//! lock of malloc until then, and the library's threads allocate: before they read, with the gate held, with a slot's
//! claims locked. Such a thread would wait for malloc, the reader for that thread, and malloc for the reader. So fork
//! handlers announce a fork ([`atfork`]); `prepare` runs before malloc is locked:
//!
//! 1. prepare: the service's thread `kuf-fork` makes room for messages, makes sure that a descriptor is in reserve for
//!    the child's userfaultfd, and takes the gate. No thread is in an install then, and no other thread reads. Without a
//!    descriptor the event could not be read, and fork would not return: then the child gets no guest memory, which
//!    makes no event.
//! 2. malloc is locked, the child made. `kuf-fork` reads, and takes no other step that could wait: see
//!    [`read_through_fork`].
//! 3. parent: `kuf-fork` applies the messages it has read, as always under the gate, and releases the gate. fork(2)
//!    returns meanwhile.
//!
//! A child made in another way (clone(2) by hand) is not announced and holds no lock of malloc: its event is read like
//! any other. posix_spawn(3) and vfork(2) copy no memory and make no event.

use std::cell::Cell;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::mm::Advice;

use rustix::io::Errno;

use crate::abi::{KUF_EVENT_FATAL, KUF_EVENT_FORKED, KUF_EVENT_UNREADABLE};
use crate::alloc::{refusable, try_push};
use crate::error::{words, Error, Reason, Result};
use crate::mapping::Extent;
use crate::mechanism::Message;
use crate::memory::Map;
use crate::os::worker::{Name, Worker};
use crate::panics::quietly;
use crate::service::calls::end_slot;
use crate::service::fault::notice::Notice;
use crate::service::queues::{events, read, spare_descriptor, KernelQueue};
use crate::service::threads::start;
use crate::service::{eventfd, Service, Work};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, thread, wait, Arc, Condvar, Mutex, MutexGuard};

/// The number of messages that can be held until malloc is free again, if there is memory for so many. Each thread that
/// touches guest memory adds one and waits; messages without room stay in the kernel until then.
const ROOM: usize = 16384;

/// With room for fewer the child gets no guest memory.
const LEAST_ROOM: usize = 64;

/// How long a fork waits for a descriptor for its child, which another thread may close.
const PATIENCE: Duration = Duration::from_secs(2);

/// How soon a failed read is retried.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// How often the end of the fork is checked: a filter may refuse the forking thread the write that reports it.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

#[derive(Clone, Copy, PartialEq, Eq)]
enum ForkStep {
    Idle,
    /// A thread is about to fork.
    Announced,
    /// `kuf-fork` reads, so the thread may fork.
    Reading,
    /// `kuf-fork` has ended.
    Ended,
}

/// The handshake of a forking thread and the service's `kuf-fork`. Neither allocates with `step` locked.
pub struct Watch {
    step: Mutex<ForkStep>,
    changed: Condvar,
    /// The fork is over.
    over: AtomicBool,
    /// Readable when the fork is over, so that `kuf-fork` need not poll.
    ends: OwnedFd,
    thread: Mutex<Option<Worker>>,
}

impl Watch {
    pub fn new() -> Result<Self> {
        let (step, changed) = (Mutex::new(ForkStep::Idle), Condvar::new());
        Ok(Self { step, changed, over: AtomicBool::new(false), ends: eventfd()?, thread: Mutex::new(None) })
    }

    fn set(&self, step: ForkStep) {
        *lock(&self.step) = step;
        self.changed.notify_all();
    }

    /// Waits until the step is another than `step`.
    fn while_in<'a>(&self, step: ForkStep, mut at: MutexGuard<'a, ForkStep>) -> MutexGuard<'a, ForkStep> {
        while *at == step {
            at = wait(&self.changed, at);
        }
        at
    }

    /// Runs before a fork. Returns when `kuf-fork` reads.
    fn prepare(&self) {
        // `kuf-fork` may still be applying the last fork.
        let mut at = self.while_in(ForkStep::Reading, lock(&self.step));
        if *at == ForkStep::Idle {
            *at = ForkStep::Announced;
            self.changed.notify_all();
            drop(self.while_in(ForkStep::Announced, at));
        }
    }

    /// Runs in the parent after a fork.
    fn parent(&self) {
        self.over.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.ends, &1_u64.to_ne_bytes());
    }

    /// Sleeps until the fork is over, `queue` has a message, or `time` has passed.
    fn sleep(&self, queue: Option<BorrowedFd<'_>>, time: &Timespec) {
        let end = PollFd::new(&self.ends, PollFlags::IN);
        let slept = match &queue {
            Some(queue) => poll(&mut [end, PollFd::new(queue, PollFlags::IN)], Some(time)),
            None => poll(&mut [end], Some(time)),
        };
        if slept.is_err() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the thread, if no fork is announced any more.
    fn end(&self) {
        let mut at = self.while_in(ForkStep::Reading, lock(&self.step));
        *at = ForkStep::Ended;
        drop(at);
        self.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            thread.join();
        }
    }
}

/// Starts to follow forks.
pub fn start_forks(service: &Arc<Service>) -> Result<()> {
    let Some(watch) = &service.forks else { return Ok(()) };
    let Some(queue) = service.own.as_ref().and_then(|own| service.queues.first(own.id())) else { return Ok(()) };
    atfork::install()?;
    let held = service.clone();
    let body = move || {
        let service = &held;
        let Some(watch) = &service.forks else { return };
        let result = quietly(|| {
            start::begins(service);
            fork_loop(service, watch, &queue);
        });
        watch.set(ForkStep::Ended);
        if let Err(what) = result {
            let _ = quietly(|| service.fail(&words!("the thread for forks panicked: {what}")));
        }
    };
    let thread = start::start(service, Name::new(format_args!("kuf-fork")), body)?;
    let placed = start::keep_on_cpus(service, &thread);
    *lock(&watch.thread) = Some(thread);
    if placed.is_err() {
        watch.end();
        return placed;
    }
    start::wait_for_threads(service);
    atfork::add(service)
}

/// Stops following forks. The memory makes no events by then, else a fork would wait for its reader.
pub fn end_forks(service: &Arc<Service>) {
    if let Some(watch) = &service.forks {
        atfork::remove(service);
        watch.end();
    }
}

fn fork_loop(service: &Service, watch: &Watch, queue: &Arc<KernelQueue>) {
    loop {
        let at = *watch.while_in(ForkStep::Idle, lock(&watch.step));
        if at == ForkStep::Ended {
            return;
        }
        read_through_fork(service, watch, queue);
        watch.set(ForkStep::Idle);
    }
}

fn read_through_fork(service: &Service, watch: &Watch, queue: &Arc<KernelQueue>) {
    let mechanism = &queue.mechanism;
    let mut messages = room_for_messages();
    let mut work = Vec::new();
    let descriptor = wait_for_descriptor(service);
    let _ = rustix::io::read(&watch.ends, &mut [0_u8; 8]);
    let read = {
        let _gate = mechanism.gate().write();
        let map = service.memory.map();
        let why_not = match messages.capacity() {
            0 => Some(Errno::NOMEM),
            _ if !descriptor => Some(Errno::MFILE),
            // If the queue cannot be read now, it cannot be read then either, and fork would not return.
            room => read::read_queue(service, queue, room, &mut messages).err(),
        };
        if let Some(errno) = why_not {
            keep_from_child(&map, mechanism.id(), errno, &mut work);
        }
        watch.set(ForkStep::Reading);
        // From here until the fork is over, this thread must not allocate, nor take a lock that an allocating thread
        // holds.
        let mut failing = Failing::default();
        while !watch.over.load(Ordering::Acquire) {
            let room = messages.capacity() - messages.len();
            match read::read_queue(service, queue, room, &mut messages) {
                Ok(()) if messages.len() < messages.capacity() => {
                    failing = Failing::default();
                    watch.sleep(mechanism.fd(queue.number), &LOOK);
                }
                Ok(()) => watch.sleep(None, &LOOK),
                Err(errno) => {
                    if why_not.is_none() && failing.lasts() {
                        fork_is_stuck(service, errno);
                    }
                    watch.sleep(None, &RETRY);
                }
            }
        }
        watch.over.store(false, Ordering::Relaxed);
        let _ = rustix::io::read(&watch.ends, &mut [0_u8; 8]);
        // malloc is free again.
        if why_not.is_some() {
            advise_on_fork(&map, mechanism.id(), Advice::LinuxDoFork);
        }
        let read = read::read_queue(service, queue, usize::MAX, &mut messages);
        events::apply(service, queue, &mut messages, &mut work);
        read
    };
    if service.life.is_dead() {
        service.wake_all();
    }
    read::hand_on(service, queue, work, read, Service::push);
    settle_late(service);
}

/// Reports, without allocating, that the event of a fork in progress cannot be read and fork(2) does not return.
fn fork_is_stuck(service: &Service, errno: Errno) {
    let callbacks = &service.config.callbacks;
    if spare_descriptor::is_shortage(errno) {
        let text = "reading the userfaultfd while the process forks: the library tries again, and fork(2) waits";
        callbacks.event(KUF_EVENT_UNREADABLE, 0, 0, Some(errno), text);
    } else if service.life.fail() {
        let text = "the fault service is dead: the userfaultfd cannot be read, and fork(2) does not return";
        callbacks.event(KUF_EVENT_FATAL, 0, 0, Some(Errno::IO), text);
    }
}

/// Waits for a descriptor for the child of an announced fork. False: there is none.
fn wait_for_descriptor(service: &Service) -> bool {
    let since = Instant::now();
    while !service.queues.spare.refill() {
        if since.elapsed() >= PATIENCE {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Makes the next fork leave out the memory of every slot, because of `errno`. The caller holds the gate, so that the
/// memory cannot move.
fn keep_from_child(map: &Map, mechanism: u32, errno: Errno, work: &mut Vec<Work>) {
    advise_on_fork(map, mechanism, Advice::LinuxDontFork);
    let reason = Reason(errno);
    let text = words!("the process forked; its child cannot be served ({reason}) and has no guest memory");
    work.push(Work::Notice(Notice { slot: None, kind: KUF_EVENT_FORKED, gpa: 0, len: 0, error: Some(errno), text }));
}

/// Poisons the rest of a child's slots if kuf_close has settled all others before the child existed.
fn settle_late(service: &Service) {
    if !service.life.is_closing() {
        return;
    }
    let own = service.own.as_ref().map(|own| own.id());
    for slot in service.memory.map().all() {
        if slot.parent.as_ref().is_some_and(|parent| Some(parent.mechanism.id()) == own) {
            end_slot::poison_rest(service, slot);
        }
    }
}

/// Allocates room for the messages of a fork; none if there is no memory.
fn room_for_messages() -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    let mut room = ROOM;
    while room >= LEAST_ROOM && refusable(|| messages.try_reserve_exact(room)).is_err() {
        room /= 2;
    }
    messages
}

/// The time since which a read has been failing.
#[derive(Default)]
struct Failing {
    since: Option<Instant>,
    told: bool,
}

impl Failing {
    /// Notes a failure. True once, when failures have lasted for longer than [`PATIENCE`].
    fn lasts(&mut self) -> bool {
        let lasts = self.since.get_or_insert_with(Instant::now).elapsed() >= PATIENCE;
        lasts && !std::mem::replace(&mut self.told, lasts)
    }
}

fn advise_on_fork(map: &Map, mechanism: u32, advice: Advice) {
    let its = map.slots().iter().filter(|slot| slot.mechanism.id() == mechanism);
    its.for_each(|slot| slot.each_extent(|extent| fork_advice(&extent, advice)));
}

fn fork_advice(extent: &Extent, advice: Advice) {
    // SAFETY: guest memory of a slot; the advice changes no byte, and only a fork that is in progress sees it.
    let _ = unsafe { rustix::mm::madvise(extent.hva as *mut c_void, extent.len as usize, advice) };
}

/// The process's fork handlers, and the services they announce forks to.
mod atfork {
    use super::{lock, try_push, Arc, Cell, Error, ManuallyDrop, Mutex, MutexGuard, Result, Service};

    /// Services that follow forks, with the process that opened them: a child made without the handlers has the list,
    /// but none of the threads.
    type Services = Vec<(u32, Arc<Service>)>;

    /// Locked from `prepare` to `parent`: one fork at a time, and a service that ends waits for it.
    static SERVICES: Mutex<Services> = Mutex::new(Vec::new());

    crate::sync::thread_local! {
        /// The lock, held between the handlers. It has no destructor, so that it exists even in a thread that is
        /// ending.
        static HELD: Cell<Option<ManuallyDrop<MutexGuard<'static, Services>>>> = const { Cell::new(None) };
    }

    /// Registers the handlers, once per process: the shared library stays loaded.
    pub fn install() -> Result<()> {
        static INSTALLED: Mutex<bool> = Mutex::new(false);
        let mut installed = lock(&INSTALLED);
        if !*installed {
            // SAFETY: the functions live as long as the process and do not unwind.
            let errno = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
            if errno != 0 {
                return Err(Error::system("pthread_atfork", rustix::io::Errno::from_raw_os_error(errno)));
            }
            *installed = true;
        }
        Ok(())
    }

    pub fn add(service: &Arc<Service>) -> Result<()> {
        Ok(try_push(&mut lock(&SERVICES), (std::process::id(), service.clone()))?)
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

    /// Empties the list, which is for the child's own services. The parent's services may not be touched, not even to
    /// drop them: their threads do not exist here and cannot release their locks.
    unsafe extern "C" fn child() {
        if let Some(mut services) = HELD.take().map(ManuallyDrop::into_inner) {
            std::mem::forget(std::mem::take(&mut *services));
        }
    }
}
