//! Leader/followers among the service threads: one watches the kernel, one stands by and watches the leader, the others
//! rest.
//!
//! One thread has the *lead*: it alone waits for the kernel. While fills are quick it serves the faults it has read and
//! keeps the lead, so that a fault wakes only the service thread and the faulting one. Before a fill that is expected
//! to be slow it gives the lead up and wakes a resting thread. A fill that was expected to be quick may still block. So
//! one of the resting threads *stands by*: it checks the leader every one to four milliseconds while the leader goes
//! into the caller's code, and takes the lead from a thread that has been there for too long. It sleeps for longer only while
//! the leader is outside the caller's code, and checks that each time it wakes, for any reason.
//!
//! The leader and its stay inside the caller's code are one word, so no thread can change one without the other: a thread that
//! has lost the lead can change nothing any more.
//!
//! Two threads may believe for a moment that they lead. That does no harm, for a thread reads the kernel's queue with
//! the mechanism's gate held.

use crate::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, AtomicU8, AtomicUsize, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, wait, wait_timeout, Condvar, Mutex, MutexGuard};

/// How often the thread that stands by checks the leader after it found trouble. Each check takes a few microseconds of
/// a CPU, perhaps of a guest's, so the checks become rarer while all is well.
const TICK: Duration = Duration::from_millis(1);

/// The number of checks at each interval before the interval doubles.
const LOOKS: u64 = 16;

/// How often the interval doubles: up to four milliseconds.
const DOUBLINGS: u64 = 2;

/// How long the thread that stands by sleeps when the leader is outside the caller's code. It then reads the kernel's queues,
/// in case a signal was lost; rarely, for an idle handle is to cost next to nothing.
pub const LONG: Duration = Duration::from_secs(2);

/// How long the leader may be inside the caller's code before it loses the lead.
const TOO_LONG: Duration = Duration::from_micros(500);

/// A fill below this is quick: about the cost of waking another thread.
const QUICK: Duration = Duration::from_micros(20);

/// Queued quick fills that take longer than this together are worth a second thread.
const BACKLOG: Duration = Duration::from_millis(1);

/// The number of a lead that no thread has.
const NO_LEAD: u32 = 0;

/// The leader is not inside the caller's code.
const OUTSIDE: u32 = 0;

/// Whether a leader has gone into the caller's code since the last check of the thread that stands by.
mod stir {
    /// No leader has gone into the caller's code.
    pub const QUIET: u8 = 0;
    /// A leader has gone into the caller's code.
    pub const STIRRED: u8 = 1;
    /// The thread that stands by sleeps for long: the next leader to go into the caller's code wakes it.
    pub const AT_EASE: u8 = 2;
}

/// A thread's hold of the lead, for comparison only: it may have been taken away since.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lead(u32);

/// A stay of the leader inside the caller's code.
pub struct Stay(Post);

/// The leader, and the time since which it has been inside the caller's code.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Post {
    lead: u32,
    /// Microseconds, as of [`LeaderFollowers::at`], or [`OUTSIDE`].
    since: u32,
}

impl Post {
    const VACANT: Self = Self { lead: NO_LEAD, since: OUTSIDE };

    fn of(word: u64) -> Self {
        Self { lead: (word >> 32) as u32, since: word as u32 }
    }

    fn word(self) -> u64 {
        u64::from(self.lead) << 32 | u64::from(self.since)
    }

    fn outside(lead: u32) -> Self {
        Self { lead, since: OUTSIDE }
    }

    fn is_inside(self) -> bool {
        self.since != OUTSIDE
    }
}

#[derive(Default)]
struct Resting {
    /// Threads that wait for work.
    plain: usize,
    /// A thread stands by.
    standing_by: bool,
}

/// The leader and the followers of one handle.
pub struct LeaderFollowers {
    started: Instant,
    /// A [`Post`].
    post: AtomicU64,
    /// The number of the next lead.
    next: AtomicU32,
    /// One of [`stir`]. Changed after `post` by the thread that goes into the caller's code, and before `post` is looked at by the
    /// thread that stands by: one of the two sees the other.
    stir: AtomicU8,
    resting: Mutex<Resting>,
    /// Whether a thread stands by, to be read without the lock.
    standing_by: AtomicBool,
    /// How many threads rest, to be read without the lock.
    asleep: AtomicUsize,
    work: Condvar,
    trouble: Condvar,
    /// The recent duration of a fill, in nanoseconds.
    pace: AtomicU64,
    /// Checks since there was trouble.
    calm: AtomicU64,
}

impl Default for LeaderFollowers {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            post: AtomicU64::new(Post::VACANT.word()),
            next: AtomicU32::new(NO_LEAD + 1),
            stir: AtomicU8::new(stir::QUIET),
            resting: Mutex::default(),
            standing_by: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            work: Condvar::new(),
            trouble: Condvar::new(),
            // Fills count as slow until their duration is known.
            pace: AtomicU64::new(2 * QUICK.as_nanos() as u64),
            calm: AtomicU64::new(0),
        }
    }
}

impl LeaderFollowers {
    /// Microseconds since this value was made, never [`OUTSIDE`]. They wrap around after an hour, which does no harm: a
    /// stay is checked every few milliseconds, and any of these checks may find it too long.
    fn at(&self, now: Instant) -> u32 {
        (now.saturating_duration_since(self.started).as_micros() as u32).max(OUTSIDE + 1)
    }

    fn post(&self) -> Post {
        Post::of(self.post.load(Ordering::SeqCst))
    }

    /// Changes the post, unless it has been changed since it was `from`.
    fn change(&self, from: Post, to: Post) -> bool {
        self.post.compare_exchange(from.word(), to.word(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Whether a thread has the lead.
    pub fn is_led(&self) -> bool {
        self.post().lead != NO_LEAD
    }

    /// Whether a thread has the lead, and another stands by.
    pub fn is_watched(&self) -> bool {
        self.is_led() && self.standing_by.load(Ordering::SeqCst)
    }

    /// Takes the lead if no thread has it, or if the one that has it has been inside the caller's code for too long.
    pub fn try_lead(&self) -> Option<Lead> {
        self.try_lead_at(Instant::now)
    }

    /// As [`LeaderFollowers::try_lead`]; `now` is asked only if a thread is inside the caller's code.
    pub fn try_lead_at(&self, now: impl FnOnce() -> Instant) -> Option<Lead> {
        let post = self.post();
        if post.lead != NO_LEAD {
            if !post.is_inside() || self.at(now()).wrapping_sub(post.since) < TOO_LONG.as_micros() as u32 {
                return None;
            }
            self.calm.store(0, Ordering::Relaxed);
        }
        let mine = self.next_lead();
        self.change(post, Post::outside(mine)).then_some(Lead(mine))
    }

    /// A number that no thread remembers: they begin again after four billion.
    fn next_lead(&self) -> u32 {
        match self.next.fetch_add(1, Ordering::Relaxed) {
            NO_LEAD => self.next.fetch_add(1, Ordering::Relaxed),
            lead => lead,
        }
    }

    /// Whether the thread still has the lead.
    pub fn leads(&self, lead: Lead) -> bool {
        self.post().lead == lead.0
    }

    /// Gives the lead up, for another thread to take.
    pub fn give_up(&self, lead: Lead) {
        self.change(Post::outside(lead.0), Post::VACANT);
    }

    /// Notes that the leader goes into the caller's code for a fault that was read at `since`. A thread without the lead
    /// changes nothing.
    pub fn enter(&self, lead: Lead, since: Instant) -> Stay {
        let inside = Post { lead: lead.0, since: self.at(since) };
        if self.change(Post::outside(lead.0), inside)
            && self.stir.swap(stir::STIRRED, Ordering::SeqCst) == stir::AT_EASE
        {
            // Hold the lock, so that the other thread sleeps, or has not begun its check.
            let _resting = lock(&self.resting);
            self.trouble.notify_one();
        }
        Stay(inside)
    }

    /// Notes that the thread has left the caller's code. It may have lost the lead.
    pub fn leave(&self, Stay(inside): Stay) {
        self.change(inside, Post::outside(inside.lead));
    }

    /// Notes the duration of a fill.
    pub fn fill_took(&self, time: Duration) {
        // Clamp outliers: a single preempted fill must not mark the source as slow.
        let ns = time.min(4 * QUICK).as_nanos() as u64;
        let before = self.pace.load(Ordering::Relaxed);
        self.pace.store(before - before / 8 + ns / 8, Ordering::Relaxed);
        if time >= TOO_LONG {
            self.calm.store(0, Ordering::Relaxed);
        }
    }

    /// Whether recent fills were quick.
    pub fn fills_are_quick(&self) -> bool {
        self.pace.load(Ordering::Relaxed) < QUICK.as_nanos() as u64
    }

    /// Whether `n` queued fills are worth another thread, which takes a CPU, perhaps a vCPU's, and contends with this
    /// one for every lock.
    pub fn worth_help(&self, n: usize) -> bool {
        (n as u64).saturating_mul(self.pace.load(Ordering::Relaxed).max(1000)) > BACKLOG.as_nanos() as u64
    }

    /// How long `queued` fills keep `workers` threads busy, so that no thread need look for more.
    pub fn busy_for(&self, queued: usize, workers: usize) -> Duration {
        let each = Duration::from_nanos(self.pace.load(Ordering::Relaxed));
        if queued < workers || self.fills_are_quick() {
            return Duration::ZERO;
        }
        // Take half of the estimate, for some fills are quicker than others.
        (each * u32::try_from(queued / workers.max(1)).unwrap_or(u32::MAX)) / 2
    }

    /// Wakes a resting thread, if possible one that does not stand by. False: no thread rests.
    pub fn wake_follower(&self) -> bool {
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

    /// Wakes a thread before a fill that may block, unless one has the lead and another stands by.
    pub fn ensure_watched(&self) {
        if !self.is_watched() {
            self.wake_follower();
        }
    }

    /// Wakes all resting threads.
    pub fn wake_all(&self) {
        let _resting = lock(&self.resting);
        self.work.notify_all();
        self.trouble.notify_all();
    }

    /// Rests until woken, or, standing by, until the next check is due. Calls `idle` at a point after which every
    /// thread with new work wakes this one. Returns whether it rested with a time limit; in a model, where no time
    /// passes, it does not wait then.
    pub fn park(&self, idle: impl FnOnce() -> bool) -> bool {
        let mut resting = lock(&self.resting);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let mut timed = false;
        if self.is_led() && idle() {
            if resting.standing_by {
                resting.plain += 1;
                resting = wait(&self.work, resting);
                resting.plain -= 1;
            } else {
                (resting, timed) = self.stand_by(resting);
            }
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        drop(resting);
        timed
    }

    /// Stands by, and returns as [`LeaderFollowers::park`]. A spurious wake-up ends it too: its caller checks the lead
    /// again.
    fn stand_by<'a>(&self, mut resting: MutexGuard<'a, Resting>) -> (MutexGuard<'a, Resting>, bool) {
        resting.standing_by = true;
        self.standing_by.store(true, Ordering::SeqCst);
        let timed = self.has_to_look();
        resting = match timed {
            true if cfg!(loom) => resting,
            // No time passes in the models.
            false if cfg!(loom) => wait(&self.trouble, resting),
            true => wait_timeout(&self.trouble, resting, self.tick()).0,
            false => wait_timeout(&self.trouble, resting, LONG).0,
        };
        resting.standing_by = false;
        self.standing_by.store(false, Ordering::SeqCst);
        (resting, timed)
    }

    /// Whether the thread that stands by is to check again soon: the leader is inside the caller's code, or was there since the
    /// last check. If not, the next one to go there wakes this thread.
    fn has_to_look(&self) -> bool {
        let stirred = self.stir.swap(stir::AT_EASE, Ordering::SeqCst) == stir::STIRRED;
        let has_to = stirred || self.post().is_inside();
        if has_to {
            // Reset this: a leader that goes inside from now on need not wake this thread.
            let _ = self.stir.compare_exchange(stir::AT_EASE, stir::QUIET, Ordering::SeqCst, Ordering::SeqCst);
        }
        has_to
    }

    fn tick(&self) -> Duration {
        let calm = self.calm.fetch_add(1, Ordering::Relaxed);
        TICK * (1 << (calm / LOOKS).min(DOUBLINGS))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::thread;

    #[test]
    fn a_thread_leads_until_it_gives_the_lead_up() {
        let leader = LeaderFollowers::default();
        let first = leader.try_lead().unwrap();
        assert!(leader.try_lead().is_none() && leader.leads(first));
        leader.give_up(first);
        let second = leader.try_lead().unwrap();
        assert!(leader.leads(second) && !leader.leads(first));
    }

    #[test]
    fn a_leader_that_stays_inside_host_code_loses_the_lead() {
        let leader = LeaderFollowers::default();
        let first = leader.try_lead().unwrap();
        let inside = leader.enter(first, Instant::now());
        assert!(leader.try_lead().is_none());
        thread::sleep(2 * TOO_LONG);
        let second = leader.try_lead().unwrap();
        let inside_second = leader.enter(second, Instant::now());
        leader.leave(inside);
        leader.give_up(first);
        assert!(leader.leads(second) && leader.try_lead().is_none());
        thread::sleep(2 * TOO_LONG);
        assert!(leader.try_lead().is_some(), "who left late has not taken away that the second is inside");
        leader.leave(inside_second);
    }

    #[test]
    fn the_pace_follows_the_duration_of_fills() {
        let leader = LeaderFollowers::default();
        assert!(!leader.fills_are_quick());
        (0..32).for_each(|_| leader.fill_took(Duration::from_micros(2)));
        assert!(leader.fills_are_quick() && !leader.worth_help(64) && leader.worth_help(1000));
        (0..4).for_each(|_| leader.fill_took(Duration::from_millis(5)));
        assert!(!leader.fills_are_quick());
    }
}
