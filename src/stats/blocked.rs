//! How long each thread was blocked, as the owner of a shard counts it.

use super::nanoseconds;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::time::Duration;

/// The blocked time of one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    pub faults: u64,
    pub total_ns: u64,
    pub max_ns: u64,
}

impl Blocked {
    /// The blocked time of one fault.
    pub fn once(waited: Duration) -> Self {
        let ns = nanoseconds(waited);
        Self { faults: 1, total_ns: ns, max_ns: ns }
    }

    /// Adds the counts of another table.
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

/// Entries: a power of two. The threads of a VM mostly have consecutive ids, and then each has a place of its own.
const ENTRIES: usize = 64;

/// How many entries a search for a thread's entry looks at.
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
        // This order is what readers rely on: the sum contains every maximum they read, and both contain every fault
        // they read.
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

    /// The counts, by thread.
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
    fn threads_with_the_same_place_are_counted_apart() {
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
