//! The time for which all threads of a set are blocked at once. If the threads are a VM's vCPUs, a VMM calls this
//! downtime.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, Arc, Mutex};

/// The watched threads of one handle. While no thread is watched, a fault costs one load here.
#[derive(Default)]
pub struct AllBlocked {
    watching: AtomicBool,
    watched: Mutex<Watched>,
}

/// The identity of a thread's wait: its page and its start. A fault that follows a signal belongs to the same wait.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Began {
    at: Place,
    since: Instant,
}

/// A page, for comparison only: the address of its slot and its number there.
pub type Place = (usize, u64);

/// A wait, and the number of its faults whose end was not reported yet.
struct Stay {
    began: Began,
    faults: u32,
}

impl Stay {
    /// Ends one of its faults. Returns whether it was the last.
    fn ends(&mut self) -> bool {
        self.faults -= 1;
        self.faults == 0
    }
}

#[derive(Default)]
struct Thread {
    id: u32,
    /// The wait it is in now.
    stay: Option<Stay>,
    /// The thread already waits for another page although the end of this wait was not reported: the wait, its latest
    /// possible end, and the time to count when the report comes.
    before: Option<(Stay, Instant, Duration)>,
}

#[derive(Default)]
struct Watched {
    /// By thread id.
    threads: Vec<Thread>,
    waiting: usize,
    total: Duration,
}

/// One thread's wait for a page, from the reading of its fault until this value is dropped.
pub struct Wait {
    /// The thread's id, or 0.
    pub thread: u32,
    /// When its fault was read.
    pub read_at: Instant,
    /// The watched set that counts it, if there is one.
    watched: Option<(Arc<AllBlocked>, Began)>,
}

impl Wait {
    /// The wait of an unknown thread.
    pub fn unknown(read_at: Instant) -> Self {
        Self { thread: 0, read_at, watched: None }
    }

    /// Ends the wait at `now`.
    pub fn end(mut self, now: Instant) {
        if let Some((overlap, began)) = self.watched.take() {
            overlap.end(self.thread, began, now);
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some((overlap, began)) = self.watched.take() {
            overlap.end(self.thread, began, Instant::now());
        }
    }
}

impl Watched {
    /// The time since which all watched threads wait.
    fn all_since(&self) -> Option<Instant> {
        let all = self.waiting == self.threads.len();
        self.threads.iter().filter_map(|thread| Some(thread.stay.as_ref()?.began.since)).max().filter(|_| all)
    }

    fn of(&mut self, id: u32) -> Option<&mut Thread> {
        let at = self.threads.binary_search_by_key(&id, |thread| thread.id).ok()?;
        Some(&mut self.threads[at])
    }
}

impl AllBlocked {
    /// Watches these threads instead of others. The time counted so far stays.
    pub fn watch(&self, threads: &[u32]) {
        let mut watched = lock(&self.watched);
        let now = Instant::now();
        if let Some(since) = watched.all_since() {
            watched.total += now.saturating_duration_since(since);
        }
        watched.threads = threads.iter().map(|id| Thread { id: *id, ..Thread::default() }).collect();
        watched.threads.sort_unstable_by_key(|thread| thread.id);
        watched.threads.dedup_by_key(|thread| thread.id);
        watched.waiting = 0;
        self.watching.store(!threads.is_empty(), Ordering::Relaxed);
    }

    /// Starts a wait: at `now`, `thread` (0: unknown) is known to wait for the page `at`.
    pub fn wait(self: &Arc<Self>, thread: u32, at: Place, now: Instant) -> Wait {
        let began = if self.watching.load(Ordering::Relaxed) { self.begin(thread, at, now) } else { None };
        Wait { thread, read_at: now, watched: began.map(|began| (self.clone(), began)) }
    }

    /// None: the thread is not watched.
    fn begin(&self, thread: u32, at: Place, now: Instant) -> Option<Began> {
        let mut watched = lock(&self.watched);
        let all_since = watched.all_since();
        let thread = watched.of(thread)?;
        if let Some(stay) = thread.stay.as_mut().filter(|stay| stay.began.at == at) {
            stay.faults += 1;
            return Some(stay.began);
        }
        let began = Began { at, since: now };
        match thread.stay.replace(Stay { began, faults: 1 }) {
            None => watched.waiting += 1,
            // A thread waits for one page at a time, so it has gone on; the thread that woke it may report that later.
            Some(stay) => {
                thread.before = all_since.map(|since| (stay, now, now.saturating_duration_since(since)));
            }
        }
        Some(began)
    }

    /// Ends a fault of `thread` that belongs to the wait `began`.
    fn end(&self, thread: u32, began: Began, now: Instant) {
        let mut watched = lock(&self.watched);
        let all_since = watched.all_since();
        let Some(thread) = watched.of(thread) else { return };
        if thread.stay.as_ref().is_none_or(|stay| stay.began != began) {
            let ended = thread.before.take_if(|(stay, ..)| stay.began == began && stay.ends());
            if let Some((_, until, time)) = ended {
                watched.total += time.saturating_sub(until.saturating_duration_since(now));
            }
        } else if thread.stay.take_if(Stay::ends).is_some() {
            watched.waiting -= 1;
            if let Some(since) = all_since {
                watched.total += now.saturating_duration_since(since);
            }
        }
    }

    /// The time counted so far, with that of a wait in progress.
    pub fn total(&self) -> Duration {
        let watched = lock(&self.watched);
        let running = watched.all_since().map(|since| Instant::now().saturating_duration_since(since));
        watched.total + running.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl AllBlocked {
        /// Starts a wait for a page of its own.
        fn begins(&self, thread: u32, since: Instant) -> Option<Began> {
            self.begin(thread, (0, place(since)), since)
        }

        fn ends(&self, thread: u32, since: Instant, now: Instant) {
            self.end(thread, Began { at: (0, place(since)), since }, now);
        }
    }

    fn place(since: Instant) -> u64 {
        use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
        BuildHasherDefault::<DefaultHasher>::default().hash_one(since)
    }

    #[test]
    fn only_time_that_all_threads_share_is_counted() {
        let overlap = AllBlocked::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // No thread is watched yet.
        overlap.begins(1, at(0));
        overlap.ends(1, at(0), at(1));
        overlap.watch(&[2, 1, 2]);
        overlap.begins(1, at(10));
        overlap.begins(2, at(15));
        overlap.begins(9, at(15));
        overlap.ends(9, at(15), at(16));
        overlap.ends(1, at(10), at(18));
        assert_eq!(overlap.total(), Duration::from_millis(3));
        // The other thread still waits when the first waits again.
        overlap.begins(1, at(20));
        overlap.ends(2, at(15), at(24));
        overlap.ends(2, at(15), at(25));
        overlap.ends(1, at(20), at(30));
        assert_eq!(overlap.total(), Duration::from_millis(7));
    }

    #[test]
    fn an_unreported_end_counts_no_time() {
        let overlap = AllBlocked::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        overlap.watch(&[1]);
        overlap.begins(1, at(0));
        overlap.begins(1, at(50));
        overlap.ends(1, at(50), at(51));
        assert_eq!(overlap.total(), Duration::from_millis(1));
        overlap.watch(&[]);
        assert_eq!(overlap.total(), Duration::from_millis(1));
    }

    #[test]
    fn a_late_report_counts_its_own_wait() {
        let overlap = AllBlocked::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        overlap.watch(&[1]);
        overlap.begins(1, at(0));
        // The thread waits again before its end is reported.
        overlap.begins(1, at(8));
        overlap.ends(1, at(0), at(7));
        assert_eq!(lock(&overlap.watched).total, Duration::from_millis(7));
        overlap.begins(1, at(20));
        overlap.ends(1, at(8), at(21));
        overlap.ends(1, at(20), at(30));
        assert_eq!(overlap.total(), Duration::from_millis(7 + 12 + 10));
        // A second report counts nothing.
        overlap.ends(1, at(8), at(31));
        assert_eq!(overlap.total(), Duration::from_millis(29));
    }

    #[test]
    fn a_wait_in_progress_counts() {
        let overlap = AllBlocked::default();
        overlap.watch(&[1]);
        overlap.begins(1, Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine is up for a second"));
        assert!(overlap.total() >= Duration::from_secs(1));
    }

    #[test]
    fn dropping_a_wait_ends_it() {
        let overlap = Arc::new(AllBlocked::default());
        let start = Instant::now();
        let unwatched = overlap.wait(1, (0, 0), start);
        overlap.watch(&[1]);
        drop(unwatched);
        assert_eq!(lock(&overlap.watched).waiting, 0);
        let wait = overlap.wait(1, (0, 0), start);
        let other = overlap.wait(2, (0, 0), start);
        assert_eq!(lock(&overlap.watched).waiting, 1);
        drop(other);
        assert_eq!(lock(&overlap.watched).waiting, 1);
        drop(wait);
        assert_eq!(lock(&overlap.watched).waiting, 0);
        let counted = overlap.total();
        overlap.wait(1, (0, 0), start + Duration::from_secs(1)).end(start + Duration::from_secs(3));
        assert_eq!(overlap.total(), counted + Duration::from_secs(2));
    }

    #[test]
    fn a_thread_that_faults_again_after_a_signal_waits_on() {
        let overlap = Arc::new(AllBlocked::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        overlap.watch(&[1]);
        let first = overlap.wait(1, (0, 7), at(0));
        let again = overlap.wait(1, (0, 7), at(5));
        drop(overlap.wait(1, (0, 7), at(6)));
        again.end(at(10));
        assert_eq!(lock(&overlap.watched).total, Duration::ZERO);
        first.end(at(20));
        assert_eq!(overlap.total(), Duration::from_millis(20));
        // The same, but the thread faults elsewhere before the end is reported.
        let (first, again) = (overlap.wait(1, (0, 7), at(30)), overlap.wait(1, (0, 7), at(31)));
        let elsewhere = overlap.wait(1, (0, 8), at(39));
        first.end(at(36));
        again.end(at(36));
        assert_eq!(lock(&overlap.watched).total, Duration::from_millis(20 + 6));
        elsewhere.end(at(40));
        assert_eq!(overlap.total(), Duration::from_millis(20 + 6 + 1));
    }
}
