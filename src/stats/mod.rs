//! Counters, histograms and block times. Each is counted where it happens, and summed when somebody asks.
//!
//! A thread of the library counts in a shard of its own (`shard.rs`), which nobody else writes to: adding is a load and a
//! store in memory that its CPU has, where a locked instruction on what all threads write would take several times as
//! long. Every other thread (vCPUs in `kuf_vcpu_fault`, callers of `kuf_resolve`) counts in one that they share.

mod blocked;
mod shard;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::capi::types::{kuf_block_time, kuf_stats};
use crate::overlap::Overlap;
use crate::sync::{lock, Mutex};
use blocked::Blocked;
use shard::nothing;
pub use shard::Shard;

thread_local! {
    /// Whose shard this thread has, by address, for comparison only, and which one it is. A thread of one handle that
    /// calls another from a callback is a stranger there.
    static MINE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// The statistics of one handle. Where it is must not change once threads count.
pub struct Stats {
    own: Box<[Shard]>,
    taken: AtomicUsize,
    shared: Shard,
    /// Block times that are in no shard: counted by others, or of more threads than a shard has room for.
    blocked: Mutex<BTreeMap<u32, Blocked>>,
    pub overlap: Overlap,
}

impl Stats {
    /// For a handle with so many threads.
    pub fn new(threads: usize) -> Self {
        Self {
            own: (0..threads).map(|_| Shard::of_one_thread()).collect(),
            taken: AtomicUsize::new(0),
            shared: Shard::of_many_threads(),
            blocked: Mutex::default(),
            overlap: Overlap::default(),
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Gives the calling thread, which ends before this does, a shard of its own.
    pub fn enlist(&self) {
        let n = self.taken.fetch_add(1, Ordering::Relaxed);
        if n < self.own.len() {
            MINE.set((self.address(), n));
        }
    }

    /// Where the calling thread counts.
    pub fn here(&self) -> &Shard {
        let (whose, n) = MINE.get();
        if whose == self.address() {
            &self.own[n]
        } else {
            &self.shared
        }
    }

    fn shards(&self) -> impl Iterator<Item = &Shard> {
        std::iter::once(&self.shared).chain(&self.own)
    }

    /// A fault that was read at `read_at` for `thread` (0: unknown) has ended now. `here`: [`Stats::here`].
    pub fn ended(&self, here: &Shard, thread: u32, read_at: Instant, now: Instant) {
        let waited = now.saturating_duration_since(read_at);
        here.blocked(waited);
        if thread != 0 {
            self.overlap.end(thread, read_at, now);
            if !here.blocked_thread(thread, waited) {
                lock(&self.blocked).entry(thread).or_default().add(&Blocked::once(waited));
            }
        }
    }

    /// Faults and vCPU exits so far: changes while there is demand.
    pub fn demanded(&self) -> u64 {
        self.shards().map(Shard::demanded).sum()
    }

    /// All of them, for the C ABI.
    pub fn to_c(&self) -> kuf_stats {
        let mut sum = kuf_stats { blocked_all_ns: nanoseconds(self.overlap.total()), ..nothing() };
        self.shards().for_each(|shard| shard.add_to(&mut sum));
        sum
    }

    /// Block times, longest sum first. Fills `out` as far as it goes and returns how many there are.
    pub fn block_times(&self, out: &mut [std::mem::MaybeUninit<kuf_block_time>]) -> usize {
        let mut all = lock(&self.blocked).clone();
        for (thread, blocked) in self.own.iter().flat_map(Shard::blocked_threads) {
            all.entry(thread).or_default().add(&blocked);
        }
        let mut all: Vec<_> = all.into_iter().collect();
        all.sort_by_key(|(thread, blocked)| (std::cmp::Reverse(blocked.total_ns), *thread));
        for (to, (thread, Blocked { faults, total_ns, max_ns })) in out.iter_mut().zip(&all) {
            let (thread, faults, total_ns, max_ns) = (*thread, *faults, *total_ns, *max_ns);
            to.write(kuf_block_time { thread, reserved: 0, faults, total_ns, max_ns });
        }
        all.len()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kuf_block_times says, as (thread, faults, total, max).
    fn times(stats: &Stats) -> Vec<(u32, u64, u64, u64)> {
        let mut out = [const { std::mem::MaybeUninit::uninit() }; 200];
        let n = stats.block_times(&mut out);
        // SAFETY: so many were written.
        let written = out[..n].iter().map(|time| unsafe { time.assume_init_ref() });
        written.map(|time| (time.thread, time.faults, time.total_ns, time.max_ns)).collect()
    }

    #[test]
    fn nothing_is_lost_and_nothing_goes_backwards_whoever_counts() {
        const EACH: u64 = 20_000;
        let stats = Stats::new(2);
        std::thread::scope(|scope| {
            // Two with a shard, one that there is none for, and one that is no thread of the library's.
            let workers = [true, true, true, false].map(|enlists| {
                let stats = &stats;
                scope.spawn(move || {
                    if enlists {
                        stats.enlist();
                    }
                    let (here, start) = (stats.here(), Instant::now());
                    for n in 1..=EACH {
                        here.faults(1);
                        here.bytes_copied(4096);
                        here.filling(Duration::from_nanos(n));
                        stats.ended(here, 1 + (n % 3) as u32, start, start + Duration::from_nanos(n));
                    }
                })
            });
            let mut before = 0;
            while !workers.iter().all(|worker| worker.is_finished()) {
                let now = stats.to_c();
                assert!(now.faults >= before);
                before = now.faults;
                assert!(times(&stats).iter().all(|(_, faults, total, max)| *faults == 0 || total >= max));
            }
        });
        let c = stats.to_c();
        assert_eq!((c.faults, c.bytes_copied, c.fills), (4 * EACH, 4 * EACH * 4096, 0));
        let sum = 4 * EACH * (EACH + 1) / 2;
        for histogram in [c.filling, c.blocked] {
            assert_eq!((histogram.count, histogram.sum_ns, histogram.max_ns), (4 * EACH, sum, EACH));
        }
        assert_eq!(stats.demanded(), 4 * EACH);
        let times = times(&stats);
        assert_eq!(times.len(), 3);
        assert_eq!(times.iter().map(|t| t.1).sum::<u64>(), 4 * EACH);
        assert_eq!(times.iter().map(|t| t.2).sum::<u64>(), sum);
        assert_eq!(times.iter().map(|t| t.3).max(), Some(EACH));
    }

    #[test]
    fn a_thread_of_another_handle_is_a_stranger() {
        let (mine, other) = (Stats::new(1), Stats::new(1));
        mine.enlist();
        assert!(std::ptr::eq(mine.here(), &mine.own[0]));
        assert!(std::ptr::eq(other.here(), &other.shared));
        other.here().fills(1);
        mine.here().fills(2);
        assert_eq!((mine.to_c().fills, other.to_c().fills), (2, 1));
        // There is one shard, and it has its thread.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                mine.enlist();
                assert!(std::ptr::eq(mine.here(), &mine.shared));
            });
        });
    }

    #[test]
    fn block_times_of_more_threads_than_a_shard_has_room_for() {
        let stats = Stats::new(1);
        stats.enlist();
        let (here, start) = (stats.here(), Instant::now());
        for round in 1..=2 {
            for thread in 1..=150 {
                stats.ended(here, thread, start, start + Duration::from_nanos(u64::from(thread) * round));
            }
        }
        let expected: Vec<_> = (1..=150).rev().map(|n| (n, 2, u64::from(n) * 3, u64::from(n) * 2)).collect();
        assert_eq!(times(&stats), expected);
        assert!(!lock(&stats.blocked).is_empty());
        // Nobody is known to have waited.
        stats.ended(here, 0, start, start);
        assert_eq!(times(&stats).len(), 150);
        assert_eq!(stats.to_c().blocked.count, 301);
    }
}
