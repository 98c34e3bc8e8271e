//! How long all of a set of threads stood still at once: what a VMM calls downtime of the guest, when the threads are its
//! vCPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::sync::{lock, Mutex};

/// The watched threads of one handle. Costs a load for each fault while nothing is watched.
#[derive(Default)]
pub struct Overlap {
    watching: AtomicBool,
    watched: Mutex<Watched>,
}

#[derive(Default)]
struct Thread {
    id: u32,
    /// Since when it has been waiting.
    since: Option<Instant>,
    /// It waits again, and of the wait that began then nobody has said yet that it is over: until when it was at most, and
    /// what is to be counted of it if it is.
    before: Option<(Instant, Instant, Duration)>,
}

#[derive(Default)]
struct Watched {
    /// By thread id.
    threads: Vec<Thread>,
    waiting: usize,
    total: Duration,
}

impl Watched {
    /// Since when all of them have been waiting.
    fn all_since(&self) -> Option<Instant> {
        let all = self.waiting == self.threads.len();
        self.threads.iter().filter_map(|thread| thread.since).max().filter(|_| all)
    }

    fn of(&mut self, id: u32) -> Option<&mut Thread> {
        let at = self.threads.binary_search_by_key(&id, |thread| thread.id).ok()?;
        Some(&mut self.threads[at])
    }
}

impl Overlap {
    /// Watches these threads instead of others. What was counted stays.
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

    /// `thread` was found waiting at `at`.
    pub fn begin(&self, thread: u32, at: Instant) {
        if !self.watching.load(Ordering::Relaxed) {
            return;
        }
        let mut watched = lock(&self.watched);
        let all_since = watched.all_since();
        let Some(thread) = watched.of(thread) else { return };
        match thread.since.replace(at) {
            None => watched.waiting += 1,
            // A thread waits for one page at a time: it has gone on, and whoever woke it may have yet to say so.
            Some(before) => {
                thread.before = all_since.map(|since| (before, at, at.saturating_duration_since(since)));
            }
        }
    }

    /// `thread`, found waiting at `began`, goes on.
    pub fn end(&self, thread: u32, began: Instant, now: Instant) {
        if !self.watching.load(Ordering::Relaxed) {
            return;
        }
        let mut watched = lock(&self.watched);
        let all_since = watched.all_since();
        let Some(thread) = watched.of(thread) else { return };
        if thread.since != Some(began) {
            if let Some((_, until, time)) = thread.before.take_if(|(before, ..)| *before == began) {
                watched.total += time.saturating_sub(until.saturating_duration_since(now));
            }
            return;
        }
        thread.since = None;
        watched.waiting -= 1;
        if let Some(since) = all_since {
            watched.total += now.saturating_duration_since(since);
        }
    }

    /// Time so far, what is running included.
    pub fn total(&self) -> Duration {
        let watched = lock(&self.watched);
        let running = watched.all_since().map(|since| Instant::now().saturating_duration_since(since));
        watched.total + running.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_all_share_is_counted() {
        let overlap = Overlap::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Nobody is watched.
        overlap.begin(1, at(0));
        overlap.end(1, at(0), at(1));
        overlap.watch(&[2, 1, 2]);
        overlap.begin(1, at(10));
        overlap.begin(2, at(15));
        overlap.begin(9, at(15));
        overlap.end(9, at(15), at(16));
        overlap.end(1, at(10), at(18));
        assert_eq!(overlap.total(), Duration::from_millis(3));
        // The other one still waits, and is joined again.
        overlap.begin(1, at(20));
        overlap.end(2, at(15), at(24));
        overlap.end(2, at(15), at(25));
        overlap.end(1, at(20), at(30));
        assert_eq!(overlap.total(), Duration::from_millis(7));
    }

    #[test]
    fn an_end_that_was_not_seen_counts_no_time() {
        let overlap = Overlap::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        overlap.watch(&[1]);
        overlap.begin(1, at(0));
        overlap.begin(1, at(50));
        overlap.end(1, at(50), at(51));
        assert_eq!(overlap.total(), Duration::from_millis(1));
        overlap.watch(&[]);
        assert_eq!(overlap.total(), Duration::from_millis(1));
    }

    #[test]
    fn an_end_that_is_said_late_counts_its_own_wait() {
        let overlap = Overlap::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        overlap.watch(&[1]);
        overlap.begin(1, at(0));
        // It waits again before who woke it has said so, at last for longer than it was.
        overlap.begin(1, at(8));
        overlap.end(1, at(0), at(7));
        assert_eq!(lock(&overlap.watched).total, Duration::from_millis(7));
        overlap.begin(1, at(20));
        overlap.end(1, at(8), at(21));
        overlap.end(1, at(20), at(30));
        assert_eq!(overlap.total(), Duration::from_millis(7 + 12 + 10));
        // Once is enough.
        overlap.end(1, at(8), at(31));
        assert_eq!(overlap.total(), Duration::from_millis(29));
    }

    #[test]
    fn what_is_running_counts() {
        let overlap = Overlap::default();
        overlap.watch(&[1]);
        overlap.begin(1, Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine is up for a second"));
        assert!(overlap.total() >= Duration::from_secs(1));
    }
}
