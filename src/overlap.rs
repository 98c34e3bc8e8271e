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
struct Watched {
    /// By thread id: since when it has been waiting.
    threads: Vec<(u32, Option<Instant>)>,
    waiting: usize,
    total: Duration,
}

impl Watched {
    /// Since when all of them have been waiting.
    fn all_since(&self) -> Option<Instant> {
        let all = self.waiting == self.threads.len();
        self.threads.iter().filter_map(|(_, since)| *since).max().filter(|_| all)
    }

    fn of(&mut self, thread: u32) -> Option<&mut Option<Instant>> {
        let at = self.threads.binary_search_by_key(&thread, |(id, _)| *id).ok()?;
        Some(&mut self.threads[at].1)
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
        watched.threads = threads.iter().map(|id| (*id, None)).collect();
        watched.threads.sort_unstable_by_key(|(id, _)| *id);
        watched.threads.dedup_by_key(|(id, _)| *id);
        watched.waiting = 0;
        self.watching.store(!threads.is_empty(), Ordering::Relaxed);
    }

    /// `thread` was found waiting at `at`.
    pub fn begin(&self, thread: u32, at: Instant) {
        if !self.watching.load(Ordering::Relaxed) {
            return;
        }
        let mut watched = lock(&self.watched);
        let Some(since) = watched.of(thread) else { return };
        // A thread waits for one page at a time: it went on unnoticed if it was waiting.
        if since.replace(at).is_none() {
            watched.waiting += 1;
        }
    }

    /// `thread` goes on.
    pub fn end(&self, thread: u32, now: Instant) {
        if !self.watching.load(Ordering::Relaxed) {
            return;
        }
        let mut watched = lock(&self.watched);
        let all_since = watched.all_since();
        if watched.of(thread).and_then(Option::take).is_none() {
            return;
        }
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
        overlap.end(1, at(1));
        overlap.watch(&[2, 1, 2]);
        overlap.begin(1, at(10));
        overlap.begin(2, at(15));
        overlap.begin(9, at(15));
        overlap.end(9, at(16));
        overlap.end(1, at(18));
        assert_eq!(overlap.total(), Duration::from_millis(3));
        // The other one still waits, and is joined again.
        overlap.begin(1, at(20));
        overlap.end(2, at(24));
        overlap.end(2, at(25));
        overlap.end(1, at(30));
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
        overlap.end(1, at(51));
        assert_eq!(overlap.total(), Duration::from_millis(1));
        overlap.watch(&[]);
        assert_eq!(overlap.total(), Duration::from_millis(1));
    }

    #[test]
    fn what_is_running_counts() {
        let overlap = Overlap::default();
        overlap.watch(&[1]);
        overlap.begin(1, Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine is up for a second"));
        assert!(overlap.total() >= Duration::from_secs(1));
    }
}
