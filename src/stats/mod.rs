//! Counters, histograms and block times. Events are counted where they happen, and summed when a caller asks.
//!
//! A thread of the library counts in a shard of its own (`shard.rs`), to which no other thread writes. So a count is a
//! load and a store in memory that its CPU has cached; a locked instruction on shared memory would take several times
//! as long. All other threads (vCPUs in `kuf_vcpu_fault`, callers of `kuf_resolve`) share one shard.

pub mod all_blocked;
mod blocked;
mod shard;
pub mod trace;

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::abi::{kuf_block_time, kuf_stats_info};
use crate::alloc::{try_collect, NoMemory};
use crate::stats::all_blocked::{AllBlocked, Wait};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, thread_local, Arc, Mutex};
use blocked::Blocked;
use shard::nothing;
pub use shard::Shard;

thread_local! {
    /// The address of the `Stats` of which this thread has a shard, for comparison only, and the shard's index. A
    /// thread of one handle that calls another handle from a callback has no shard there.
    static MINE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// The statistics of one handle. It must not move once threads count.
pub struct Stats {
    own: Box<[Shard]>,
    taken: AtomicUsize,
    shared: Shard,
    /// Block times that are in no shard: counted by threads without one, or of more threads than a shard has room for.
    blocked: Mutex<BTreeMap<u32, Blocked>>,
    pub all_blocked: Arc<AllBlocked>,
}

impl Stats {
    /// The statistics of a handle with this many threads.
    pub fn new(threads: usize) -> Result<Self, NoMemory> {
        Ok(Self {
            own: try_collect((0..threads).map(|_| Shard::of_one_thread()))?.into_boxed_slice(),
            taken: AtomicUsize::new(0),
            shared: Shard::of_many_threads(),
            blocked: Mutex::default(),
            all_blocked: Arc::default(),
        })
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Gives the calling thread a shard of its own. The thread ends before these statistics do.
    pub fn enlist(&self) {
        let n = self.taken.fetch_add(1, Ordering::Relaxed);
        if n < self.own.len() {
            MINE.set((self.address(), n));
        }
    }

    /// The shard in which the calling thread counts.
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

    /// Counts a wait for a page that ended at `now`. `here`: [`Stats::here`].
    pub fn ended(&self, here: &Shard, wait: Wait, now: Instant) {
        let waited = now.saturating_duration_since(wait.read_at);
        here.blocked(waited);
        if wait.thread != 0 && !here.blocked_thread(wait.thread, waited) {
            lock(&self.blocked).entry(wait.thread).or_default().add(&Blocked::once(waited));
        }
        wait.end(now);
    }

    /// Faults and vCPU exits so far; the number changes while there is demand.
    pub fn demanded(&self) -> u64 {
        self.shards().map(Shard::demanded).sum()
    }

    /// The sum of all shards, for the C ABI.
    pub fn to_c(&self) -> kuf_stats_info {
        let mut sum = kuf_stats_info { blocked_all_ns: nanoseconds(self.all_blocked.total()), ..nothing() };
        self.shards().for_each(|shard| shard.add_to(&mut sum));
        sum
    }

    /// Block times, longest sum first. Fills `out` as far as it has room and returns how many there are.
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
    use crate::sync::thread;

    /// The answer of kuf_block_times, as (thread, faults, total, max).
    fn times(stats: &Stats) -> Vec<(u32, u64, u64, u64)> {
        let mut out = [const { std::mem::MaybeUninit::uninit() }; 200];
        let n = stats.block_times(&mut out);
        // SAFETY: `block_times` has written this many.
        let written = out[..n].iter().map(|time| unsafe { time.assume_init_ref() });
        written.map(|time| (time.thread, time.faults, time.total_ns, time.max_ns)).collect()
    }

    #[test]
    fn counts_of_any_thread_are_complete_and_never_go_backwards() {
        const EACH: u64 = 20_000;
        let stats = Stats::new(2).expect("memory");
        thread::scope(|scope| {
            // Two threads get a shard, one finds none left, and one is not the library's.
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
                        stats.ended(
                            here,
                            stats.all_blocked.wait(1 + (n % 3) as u32, (0, n), start),
                            start + Duration::from_nanos(n),
                        );
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
    fn a_thread_of_another_handle_uses_the_shared_shard() {
        let (mine, other) = (Stats::new(1).expect("memory"), Stats::new(1).expect("memory"));
        mine.enlist();
        assert!(std::ptr::eq(mine.here(), &mine.own[0]));
        assert!(std::ptr::eq(other.here(), &other.shared));
        other.here().fills(1);
        mine.here().fills(2);
        assert_eq!((mine.to_c().fills, other.to_c().fills), (2, 1));
        // The one shard has its thread already.
        thread::scope(|scope| {
            scope.spawn(|| {
                mine.enlist();
                assert!(std::ptr::eq(mine.here(), &mine.shared));
            });
        });
    }

    #[test]
    fn more_threads_than_a_shard_has_room_for_have_block_times() {
        let stats = Stats::new(1).expect("memory");
        stats.enlist();
        let (here, start) = (stats.here(), Instant::now());
        for round in 1..=2 {
            for thread in 1..=150 {
                let end = start + Duration::from_nanos(u64::from(thread) * round);
                stats.ended(here, stats.all_blocked.wait(thread, (0, 0), start), end);
            }
        }
        let expected: Vec<_> = (1..=150).rev().map(|n| (n, 2, u64::from(n) * 3, u64::from(n) * 2)).collect();
        assert_eq!(times(&stats), expected);
        assert!(!lock(&stats.blocked).is_empty());
        // The thread of this wait is unknown.
        stats.ended(here, Wait::unknown(start), start);
        assert_eq!(times(&stats).len(), 150);
        assert_eq!(stats.to_c().blocked.count, 301);
    }
}
