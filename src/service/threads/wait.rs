//! How the leader waits for the next fault, and how it is woken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::service::background::{prefetch, replay_window};
use crate::service::threads::leader;
use crate::service::{eventfd, Service};
use crate::sync::atomic::{fence, Ordering};
use crate::sync::thread;
use crate::sync::time::{Duration, Instant};

/// The epoll data of the work eventfd. The data of a queue is its mechanism's id, from 1, with the queue's number in
/// the upper half.
pub const WORK: u64 = 0;

/// The answer of epoll_wait.
pub struct Events {
    room: [epoll::Event; 8],
    len: usize,
    /// The call has failed: any queue may have messages.
    pub failed: bool,
}

impl Default for Events {
    fn default() -> Self {
        let none = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        Self { room: [none; 8], len: 0, failed: false }
    }
}

impl std::ops::Deref for Events {
    type Target = [epoll::Event];

    fn deref(&self) -> &Self::Target {
        &self.room[..self.len]
    }
}

/// Spinning: the leader polls for the next fault for a while before it sleeps, for waking up costs more than the fault.
pub struct Spin {
    /// Spin for at most this long; zero: never.
    most: Duration,
    /// Whether faults come fast enough now.
    worth: bool,
}

impl Spin {
    pub fn new(most: Duration) -> Self {
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

    /// Notes that the thread slept since `asleep`: decides whether spinning would have found the fault in time.
    fn slept(&mut self, asleep: Instant) {
        // The measured time includes the time of waking up.
        const WAKE: Duration = Duration::from_micros(100);
        self.worth = asleep.elapsed() < self.most + WAKE;
    }
}

/// The epoll instance at which the leader sleeps.
pub struct Waking {
    epoll: OwnedFd,
    /// Wakes the leader.
    work: OwnedFd,
    /// The service threads watch kernel queues by edge; the caller watches them by level.
    edge: bool,
}

impl Waking {
    pub fn new(edge: bool) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::system("epoll_create", e))?;
        let waking = Self { epoll, work: eventfd()?, edge };
        if edge {
            waking.add(waking.work.as_fd(), WORK, false)?;
        }
        Ok(waking)
    }

    fn add(&self, fd: BorrowedFd<'_>, data: u64, edge: bool) -> Result<()> {
        let mode = if edge { epoll::EventFlags::ET } else { epoll::EventFlags::empty() };
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(data), epoll::EventFlags::IN | mode)
            .map_err(|e| Error::system("epoll_ctl", e))
    }

    /// Watches one of a mechanism's queues.
    pub fn watch(&self, fd: BorrowedFd<'_>, mechanism: u32, queue: usize) -> Result<()> {
        self.add(fd, u64::from(mechanism) | (queue as u64) << 32, self.edge)
    }

    /// Stops watching a queue.
    pub fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// The epoll instance, for the caller's own loop.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Watches `fd` by level, for the caller's own loop.
    pub fn watch_level(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.add(fd, WORK, false)
    }

    /// Wakes the leader.
    pub fn wake(&self) {
        if rustix::io::write(&self.work, &1_u64.to_ne_bytes()).is_err() {
            // A filter refuses the write. An eventfd is always writable, so arming epoll for that wakes the leader as
            // well.
            let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
            let _ = epoll::modify(&self.epoll, &self.work, epoll::EventData::new_u64(WORK), flags);
        }
    }

    fn wait(&self, timeout_ms: i64) -> Events {
        let mut events = Events::default();
        let timeout = (timeout_ms >= 0)
            .then(|| rustix::event::Timespec { tv_sec: timeout_ms / 1000, tv_nsec: timeout_ms % 1000 * 1_000_000 });
        match epoll::wait(&self.epoll, &mut events.room, timeout.as_ref()) {
            Ok(n) => events.len = n,
            Err(Errno::INTR) => {}
            // A filter may refuse the call, though that is unlikely: the queues can be read without it.
            Err(_) => {
                thread::sleep(Duration::from_millis(1));
                events.failed = true;
            }
        }
        events
    }

    /// Clears the wake-up.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.work, &mut [0_u8; 8]);
    }
}

pub fn next_events(service: &Service, spin: &mut Spin) -> Events {
    if prefetch::can_prefetch(service, true) {
        return service.threads.waking.wait(0);
    }
    if let Some(until) = spin.until().filter(|_| service.threads.may_spin()) {
        loop {
            let events = service.threads.waking.wait(0);
            if !events.is_empty() || service.threads.can_work() || !service.life.is_open() {
                return events;
            }
            if Instant::now() >= until {
                break;
            }
            // The thread that touches the next page may need this core.
            thread::yield_now();
        }
        spin.in_vain();
    }
    service.threads.lead_asleep.store(true, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    // A thread may have queued work before it could see this one asleep, so check again.
    let idle = service.life.is_open() && !service.threads.can_work() && !prefetch::can_prefetch(service, true);
    let patience = if idle { patience(service) } else { 0 };
    let asleep = spin.is_on().then(Instant::now);
    let events = service.threads.waking.wait(patience);
    service.threads.lead_asleep.store(false, Ordering::SeqCst);
    if let Some(asleep) = asleep {
        spin.slept(asleep);
    }
    events
}

pub fn patience(service: &Service) -> i64 {
    if service.background.is_observed() && service.background.windows.left() > 0 {
        replay_window::LOOK_MS
    } else if service.queues.has_unread() {
        UNREAD_MS
    } else if service.threads.has_to_look() {
        LOOK_MS
    } else if service.threads.leader.is_watched() {
        -1
    } else {
        leader::LONG.as_millis() as i64
    }
}

/// How often the leader checks the processes behind remote slots, whose end the kernel does not report, and queues
/// whose signal may be lost.
pub const LOOK_MS: i64 = 500;

/// How soon a queue that could not be read is read again.
const UNREAD_MS: i64 = 1;
