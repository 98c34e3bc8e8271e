//! The service threads of one handle, and their work.
//!
//! There is one more thread than may be inside the caller's code, so one can always watch the kernel's queues. The leader
//! changes (`leader`): the thread that reads a fault fills it itself when a filler's place is free, so that a fault
//! costs one thread wake-up and not two.

pub mod fork;
pub mod leader;
pub mod serve;
pub mod start;
pub mod wait;
pub mod work_queue;

use crate::error::Result;
use crate::os::worker::Worker;
use crate::service::config::Config;
use crate::service::Work;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::time::Duration;
use crate::sync::Mutex;
use leader::LeaderFollowers;
use start::Beginning;
use wait::Waking;

/// The threads of one handle.
pub struct Threads {
    /// The choice of the leader.
    pub leader: LeaderFollowers,
    /// How the leader waits.
    pub waking: Waking,
    work: work_queue::WorkQueue,
    /// Service threads that may be inside the caller's code, of `config.fill_threads`: one more thread than that always
    /// watches.
    fillers: AtomicUsize,
    /// The thread that watches the kernel is asleep there.
    lead_asleep: AtomicBool,
    /// Demand that is queued or being served.
    demanded: AtomicUsize,
    /// The leader may spin: it does not take the CPU of the thread that raises the next fault.
    may_spin: AtomicBool,
    /// Another process, or a queue whose signals may be lost, needs a check now and then.
    has_to_look: AtomicBool,
    /// When processes were last checked.
    looked: Due,
    /// When all queues were last read without a signal.
    listened: Due,
    beginning: Beginning,
    started: Mutex<Vec<Worker>>,
}

impl Threads {
    /// Makes the state; no thread has started yet.
    pub fn new(config: &Config) -> Result<Self> {
        Ok(Self {
            leader: LeaderFollowers::default(),
            waking: Waking::new(!config.direct)?,
            work: work_queue::WorkQueue::default(),
            fillers: AtomicUsize::new(if config.serviced { config.fill_threads } else { 1 }),
            lead_asleep: AtomicBool::new(false),
            demanded: AtomicUsize::new(0),
            may_spin: AtomicBool::new(false),
            has_to_look: AtomicBool::new(false),
            looked: Due::default(),
            listened: Due::default(),
            beginning: Beginning::default(),
            started: Mutex::new(Vec::new()),
        })
    }

    /// Whether the leader may spin.
    pub fn may_spin(&self) -> bool {
        self.may_spin.load(Ordering::Relaxed)
    }

    /// Demand counts from when it is taken from the kernel until it is served.
    pub fn count(&self, work: &Work) {
        if work.is_demand() {
            self.begin_demand();
        }
    }

    /// Counts one more demand that is queued or being served.
    pub fn begin_demand(&self) {
        self.demanded.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends the count of a demand that was served, or is counted elsewhere.
    pub fn end_demand(&self) {
        self.demanded.fetch_sub(1, Ordering::SeqCst);
    }

    /// How much demand is queued or being served.
    pub fn demanded(&self) -> usize {
        self.demanded.load(Ordering::SeqCst)
    }

    /// Queues work that was counted, for this thread or another.
    pub fn queue(&self, work: Work) {
        if self.work.push(work).is_some_and(|work| work.is_demand()) {
            self.end_demand();
        }
    }

    /// How much work is queued.
    pub fn queued(&self) -> usize {
        self.work.len()
    }

    /// The work that has been queued for longest.
    pub fn next_work(&self) -> Option<Work> {
        self.work.pop()
    }

    /// Wakes a thread for work that was queued.
    pub fn call(&self) {
        if !self.leader.wake_follower() {
            self.wake_lead();
        }
    }

    /// Wakes the thread that watches the kernel, if it sleeps.
    pub fn wake_lead(&self) {
        if self.lead_asleep.load(Ordering::SeqCst) {
            self.waking.wake();
        }
    }

    /// Wakes every thread, to see that the service ends.
    pub fn wake_all(&self) {
        self.leader.wake_all();
        self.waking.wake();
    }

    /// Asks the leader to check processes and unwatched queues now and then from now on.
    pub fn look_now_and_then(&self) {
        self.has_to_look.store(true, Ordering::Relaxed);
    }

    fn has_to_look(&self) -> bool {
        self.has_to_look.load(Ordering::Relaxed)
    }

    fn can_work(&self) -> bool {
        self.queued() > 0 && self.fillers.load(Ordering::SeqCst) > 0
    }

    /// Sets the number of filler's places, and returns the one before, for a test.
    #[cfg(test)]
    pub fn set_places(&self, places: usize) -> usize {
        self.fillers.swap(places, Ordering::SeqCst)
    }

    /// A filler's place, if one is free.
    fn take_place(&self) -> Option<FillerPlace<'_>> {
        let taken = self.fillers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |free| free.checked_sub(1));
        taken.is_ok().then_some(FillerPlace(self))
    }
}

/// A filler's place. Dropping it, even by a panic, frees it.
struct FillerPlace<'a>(&'a Threads);

impl Drop for FillerPlace<'_> {
    fn drop(&mut self) {
        self.0.fillers.fetch_add(1, Ordering::SeqCst);
    }
}

/// The schedule of a periodic check that one thread does.
#[derive(Default)]
struct Due {
    /// When the check was last done, in milliseconds of the handle's age.
    last: AtomicU64,
}

impl Due {
    /// Whether the calling thread is to do the check at `age`: it was last done at least `interval` ago.
    fn is_due(&self, age: Duration, interval: Duration) -> bool {
        let (now, last) = (age.as_millis() as u64, self.last.load(Ordering::Relaxed));
        let due = now.saturating_sub(last) >= interval.as_millis() as u64;
        due && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
