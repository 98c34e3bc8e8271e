//! How long each thread stood still, as the owner of a shard counts it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::nanoseconds;

/// What is known of one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    pub faults: u64,
    pub total_ns: u64,
    pub max_ns: u64,
}

impl Blocked {
    /// One fault that took so long.
    pub fn once(waited: Duration) -> Self {
        let ns = nanoseconds(waited);
        Self { faults: 1, total_ns: ns, max_ns: ns }
    }

    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.faults += other.faults;
        self.total_ns += other.total_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }
}

#[derive(Default)]
struct Entry {
    /// 0: free.
    thread: AtomicU32,
    faults: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
}

/// Entries: a power of two. The threads of a VM have ids in a row, as a rule, and then each has a place of its own.
const ENTRIES: usize = 64;

/// How far from its place a thread's entry is looked for.
const PROBES: usize = 8;

/// A table that one thread writes to, and all may read. An entry stays with its thread.
pub struct Table([Entry; ENTRIES]);

impl Default for Table {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Entry::default()))
    }
}

impl Table {
    /// Counts a fault of `thread` (not 0). Only by the thread whose table it is. False: there is no room.
    pub fn count(&self, thread: u32, waited: Duration) -> bool {
        let Some(entry) = self.entry(thread) else { return false };
        let ns = nanoseconds(waited);
        // In this order: who reads a maximum has it in the sum, and who reads a number of faults has them in both.
        entry.total_ns.store(entry.total_ns.load(Ordering::Relaxed).wrapping_add(ns), Ordering::Relaxed);
        if entry.max_ns.load(Ordering::Relaxed) < ns {
            entry.max_ns.store(ns, Ordering::Release);
        }
        entry.faults.store(entry.faults.load(Ordering::Relaxed) + 1, Ordering::Release);
        true
    }

    fn entry(&self, thread: u32) -> Option<&Entry> {
        for n in 0..PROBES {
            let entry = &self.0[(thread as usize + n) % ENTRIES];
            match entry.thread.load(Ordering::Relaxed) {
                0 => entry.thread.store(thread, Ordering::Relaxed),
                other if other != thread => continue,
                _ => {}
            }
            return Some(entry);
        }
        None
    }

    /// What was counted, by thread.
    pub fn read(&self) -> impl Iterator<Item = (u32, Blocked)> + '_ {
        self.0.iter().filter_map(|entry| {
            let faults = entry.faults.load(Ordering::Acquire);
            let max_ns = entry.max_ns.load(Ordering::Acquire);
            let total_ns = entry.total_ns.load(Ordering::Relaxed);
            (faults > 0).then(|| (entry.thread.load(Ordering::Relaxed), Blocked { faults, total_ns, max_ns }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_would_have_the_same_place() {
        let table = Table::default();
        let same = |n: u32| 7 + n * ENTRIES as u32;
        for n in 0..=PROBES as u32 {
            let counted = (1..=3).all(|ns| table.count(same(n), Duration::from_nanos(ns)));
            assert_eq!(counted, n < PROBES as u32, "{n}");
        }
        let read: Vec<_> = table.read().collect();
        let each = Blocked { faults: 3, total_ns: 6, max_ns: 3 };
        assert_eq!(read, (0..PROBES as u32).map(|n| (same(n), each)).collect::<Vec<_>>());
    }
}
