//! Who of the service threads watches the kernel, who rests, and who keeps an eye on the one that watches.
//!
//! One thread has the *lead*: it alone waits for the kernel. While fills are quick it serves what it has read itself and
//! keeps the lead, so that a fault wakes nobody but the service thread and the toucher. Before a fill that is expected to
//! take its time it lets go of the lead and wakes a thread that rests. A fill that was expected to be quick may block all
//! the same: one of the resting threads *stands by*, looks every one to four milliseconds while there is anything to look
//! after, and takes the lead from whoever has been inside host code for too long.
//!
//! That two threads think for a moment that they lead does no harm: whoever reads the kernel holds the mechanism's gate.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::sync::atomic::{fence, AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{lock, Condvar, Mutex};

/// How often the thread that stands by looks after there was trouble. Each look costs whoever runs on that CPU, a guest
/// perhaps, a few microseconds; so it looks more and more rarely as long as all is well.
const TICK: Duration = Duration::from_millis(1);

/// Looks at each interval before the next, which is twice as long.
const LOOKS: u64 = 16;

/// How often the interval doubles: four milliseconds at the longest.
const DOUBLINGS: u64 = 2;

/// How long the lead may be inside host code before it is taken away.
const TOO_LONG: Duration = Duration::from_micros(500);

/// A fill below this is quick: about what it costs to wake another thread.
const QUICK: Duration = Duration::from_micros(20);

/// Quick fills that take longer than this together are worth a second thread.
const BACKLOG: Duration = Duration::from_millis(1);

/// Nobody has the lead.
const NOBODY: u64 = 0;

/// A thread's hold of the lead, for comparison only: it may have been taken away since.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lead(u64);

/// What a thread put into `inside_since`, to take away that and nothing else.
pub struct Inside(u64);

#[derive(Default)]
struct Resting {
    /// Threads that wait for work.
    plain: usize,
    /// A thread stands by.
    standing_by: bool,
    /// The count of entries into host code when that one last looked.
    seen: u64,
}

/// The service threads of one handle, to each other.
pub struct Crew {
    started: Instant,
    lead: AtomicU64,
    next: AtomicU64,
    /// Nanoseconds since `started`, plus one, when the thread that has the lead went into host code; 0: it is not there.
    inside_since: AtomicU64,
    /// How often it did.
    entries: AtomicU64,
    resting: Mutex<Resting>,
    /// Whether a thread stands by, for a look without the lock.
    standing_by: AtomicBool,
    /// How many rest, for a look without the lock.
    asleep: AtomicUsize,
    /// The thread that stands by has seen nothing to look after, and does not tick.
    at_ease: AtomicBool,
    work: Condvar,
    trouble: Condvar,
    /// Nanoseconds that a fill takes of late.
    pace: AtomicU64,
    /// Looks since there was trouble.
    calm: AtomicU64,
}

impl Default for Crew {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            lead: AtomicU64::new(NOBODY),
            next: AtomicU64::new(NOBODY + 1),
            inside_since: AtomicU64::new(0),
            entries: AtomicU64::new(0),
            resting: Mutex::default(),
            standing_by: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            at_ease: AtomicBool::new(false),
            work: Condvar::new(),
            trouble: Condvar::new(),
            // Taken for slow until it is known.
            pace: AtomicU64::new(2 * QUICK.as_nanos() as u64),
            calm: AtomicU64::new(0),
        }
    }
}

impl Crew {
    fn at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_nanos() as u64 + 1
    }

    /// Whether some thread has the lead.
    pub fn is_led(&self) -> bool {
        self.lead.load(Ordering::SeqCst) != NOBODY
    }

    /// Whether some thread has the lead, and another stands by.
    pub fn is_watched(&self) -> bool {
        self.lead.load(Ordering::SeqCst) != NOBODY && self.standing_by.load(Ordering::SeqCst)
    }

    /// Takes the lead if nobody has it, or if who has it has been inside host code for too long.
    pub fn take_lead(&self) -> Option<Lead> {
        let has = self.lead.load(Ordering::SeqCst);
        let inside = self.inside_since.load(Ordering::SeqCst);
        if has != NOBODY {
            if inside == 0 || self.at(Instant::now()).saturating_sub(inside) < TOO_LONG.as_nanos() as u64 {
                return None;
            }
            self.calm.store(0, Ordering::Relaxed);
        }
        let mine = self.next.fetch_add(1, Ordering::Relaxed);
        let taken = self.lead.compare_exchange(has, mine, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if taken && has != NOBODY {
            // Only what was looked at: the lead may have been taken from us too by now.
            self.leave(Inside(inside));
        }
        taken.then_some(Lead(mine))
    }

    /// Whether it is still there.
    pub fn leads(&self, lead: Lead) -> bool {
        self.lead.load(Ordering::SeqCst) == lead.0
    }

    /// Lets go of the lead, for another thread to take.
    pub fn let_go(&self, lead: Lead) {
        let _ = self.lead.compare_exchange(lead.0, NOBODY, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The thread that has the lead goes into host code with it, for a fault that was read at `since`.
    pub fn enter(&self, lead: Lead, since: Instant) -> Inside {
        let inside = Inside(if self.leads(lead) { self.at(since) } else { 0 });
        if inside.0 != 0 {
            self.inside_since.store(inside.0, Ordering::SeqCst);
        }
        self.entries.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.at_ease.load(Ordering::SeqCst) {
            let _resting = lock(&self.resting);
            self.trouble.notify_one();
        }
        inside
    }

    /// It is out again, perhaps without the lead. Whoever has that by now may be inside, too: that stays.
    pub fn leave(&self, inside: Inside) {
        let _ = self.inside_since.compare_exchange(inside.0, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// A fill took this long.
    pub fn took(&self, time: Duration) {
        // No more than that: one that was preempted says nothing of the source, two in a row begin to.
        let ns = time.min(4 * QUICK).as_nanos() as u64;
        let before = self.pace.load(Ordering::Relaxed);
        self.pace.store(before - before / 8 + ns / 8, Ordering::Relaxed);
        if time >= TOO_LONG {
            self.calm.store(0, Ordering::Relaxed);
        }
    }

    /// Whether fills are quick of late.
    pub fn quick(&self) -> bool {
        self.pace.load(Ordering::Relaxed) < QUICK.as_nanos() as u64
    }

    /// Whether `n` fills that are queued are worth another thread, which takes a CPU, perhaps from a vCPU, and meets this
    /// one at every lock.
    pub fn worth_help(&self, n: usize) -> bool {
        (n as u64).saturating_mul(self.pace.load(Ordering::Relaxed).max(1000)) > BACKLOG.as_nanos() as u64
    }

    /// How long `workers` threads, all busy, have enough to do with `queued` fills: no need to look for more.
    pub fn busy_for(&self, queued: usize, workers: usize) -> Duration {
        let each = Duration::from_nanos(self.pace.load(Ordering::Relaxed));
        if queued < workers || self.quick() {
            return Duration::ZERO;
        }
        // Half of it: some fills are quicker than others.
        (each * u32::try_from(queued / workers.max(1)).unwrap_or(u32::MAX)) / 2
    }

    /// Wakes a thread that rests, one that does not stand by if there is one. False: none rests.
    pub fn call(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let resting = lock(&self.resting);
        match (resting.plain, resting.standing_by) {
            (0, false) => return false,
            (0, true) => self.trouble.notify_one(),
            _ => self.work.notify_one(),
        }
        true
    }

    /// Before a fill that may block: calls a thread unless one has the lead and another stands by.
    pub fn have_watched(&self) {
        if !self.is_watched() {
            self.call();
        }
    }

    /// Wakes everybody.
    pub fn call_all(&self) {
        let _resting = lock(&self.resting);
        self.work.notify_all();
        self.trouble.notify_all();
    }

    /// Rests until called, or, standing by, until it is time to look. `idle` is asked when whoever has work from now on
    /// will call.
    pub fn rest(&self, idle: impl FnOnce() -> bool) {
        let mut resting = lock(&self.resting);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.lead.load(Ordering::SeqCst) != NOBODY && idle() {
            if resting.standing_by {
                resting.plain += 1;
                resting = self.work.wait(resting).unwrap_or_else(PoisonError::into_inner);
                resting.plain -= 1;
            } else {
                resting.standing_by = true;
                self.standing_by.store(true, Ordering::SeqCst);
                self.at_ease.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                let entries = self.entries.load(Ordering::SeqCst);
                if entries == resting.seen {
                    resting = self.trouble.wait(resting).unwrap_or_else(PoisonError::into_inner);
                    self.at_ease.store(false, Ordering::SeqCst);
                } else {
                    self.at_ease.store(false, Ordering::SeqCst);
                    resting.seen = entries;
                    if cfg!(loom) {
                        // No time passes in the models: as if it had.
                        resting.standing_by = false;
                        self.standing_by.store(false, Ordering::SeqCst);
                        self.asleep.fetch_sub(1, Ordering::SeqCst);
                        return;
                    }
                    let calm = self.calm.fetch_add(1, Ordering::Relaxed);
                    let tick = TICK * (1 << (calm / LOOKS).min(DOUBLINGS));
                    resting = self.trouble.wait_timeout(resting, tick).unwrap_or_else(PoisonError::into_inner).0;
                }
                resting.standing_by = false;
                self.standing_by.store(false, Ordering::SeqCst);
            }
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn one_leads_until_it_lets_go() {
        let crew = Crew::default();
        let first = crew.take_lead().unwrap();
        assert!(crew.take_lead().is_none() && crew.leads(first));
        crew.let_go(first);
        let second = crew.take_lead().unwrap();
        assert!(crew.leads(second) && !crew.leads(first));
    }

    #[test]
    fn who_stays_inside_host_code_loses_the_lead() {
        let crew = Crew::default();
        let first = crew.take_lead().unwrap();
        let inside = crew.enter(first, Instant::now());
        assert!(crew.take_lead().is_none());
        std::thread::sleep(2 * TOO_LONG);
        let second = crew.take_lead().unwrap();
        let inside_second = crew.enter(second, Instant::now());
        crew.leave(inside);
        crew.let_go(first);
        assert!(crew.leads(second) && crew.take_lead().is_none());
        std::thread::sleep(2 * TOO_LONG);
        assert!(crew.take_lead().is_some(), "who left late has not taken away that the second is inside");
        crew.leave(inside_second);
    }

    #[test]
    fn the_pace_follows_what_fills_take() {
        let crew = Crew::default();
        assert!(!crew.quick());
        (0..32).for_each(|_| crew.took(Duration::from_micros(2)));
        assert!(crew.quick() && !crew.worth_help(64) && crew.worth_help(1000));
        (0..4).for_each(|_| crew.took(Duration::from_millis(5)));
        assert!(!crew.quick());
    }
}
