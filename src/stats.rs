//! Counters, histograms and block times. Everything is counted with relaxed atomics where it happens.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::capi::types::{kuf_block_time, kuf_histogram, kuf_stats, KUF_HISTOGRAM_BUCKETS};
use crate::overlap::Overlap;
use crate::sync::{lock, Mutex};

/// A log2 histogram of nanoseconds.
pub struct Histogram {
    sum: AtomicU64,
    max: AtomicU64,
    buckets: [AtomicU64; KUF_HISTOGRAM_BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = std::array::from_fn(|_| AtomicU64::new(0));
        Self { sum: AtomicU64::new(0), max: AtomicU64::new(0), buckets }
    }
}

impl Histogram {
    /// Counts one value.
    pub fn record(&self, value: Duration) {
        let ns = nanoseconds(value);
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(ns, Ordering::Relaxed);
        if self.max.load(Ordering::Relaxed) < ns {
            self.max.fetch_max(ns, Ordering::Relaxed);
        }
    }

    fn to_c(&self) -> kuf_histogram {
        let mut bucket = [0; KUF_HISTOGRAM_BUCKETS];
        for (to, from) in bucket.iter_mut().zip(&self.buckets) {
            *to = from.load(Ordering::Relaxed);
        }
        let (sum_ns, max_ns) = (self.sum.load(Ordering::Relaxed), self.max.load(Ordering::Relaxed));
        // Summed from what was read, so that count and buckets agree whatever is recorded meanwhile.
        kuf_histogram { count: bucket.iter().sum(), sum_ns, max_ns, bucket }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn bucket(ns: u64) -> usize {
    (ns.max(1).ilog2() as usize).min(KUF_HISTOGRAM_BUCKETS - 1)
}

/// One event counter.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        if n != 0 {
            self.0.fetch_add(n, Ordering::Relaxed);
        }
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! stats {
    ($($counter:ident),* ; $($histogram:ident),*) => {
        /// The counters of one handle; each is documented in `struct kuf_stats`.
        #[derive(Default)]
        pub struct Stats {
            $(pub $counter: Counter,)*
            $(pub $histogram: Histogram,)*
            threads: Mutex<BTreeMap<u32, Blocked>>,
            pub overlap: Overlap,
        }

        impl Stats {
            /// All of them, for the C ABI.
            pub fn to_c(&self) -> kuf_stats {
                kuf_stats {
                    size: 0,
                    reserved: 0,
                    $($counter: self.$counter.get(),)*
                    $($histogram: self.$histogram.to_c(),)*
                    blocked_all_ns: nanoseconds(self.overlap.total()),
                }
            }
        }
    };
}

stats! {
    faults, faults_minor, faults_write, faults_joined, faults_late, faults_unknown, vcpu_faults,
    fills, fills_failed, fills_deferred,
    bytes_copied, bytes_zeroed, bytes_in_place, bytes_populated, bytes_poisoned, bytes_discarded, bytes_removed,
    events_remove, events_unmap, events_remap, events_fork,
    install_again, install_exists, install_no_memory, queue_full, faults_lost, faults_unsignalled, bytes_ahead;
    queueing, filling, installing, blocked
}

#[derive(Default, Clone, Copy)]
struct Blocked {
    faults: u64,
    total: Duration,
    max: Duration,
}

impl Stats {
    /// A fault that was read at `read_at` for `thread` (0: unknown) has ended now.
    pub fn ended(&self, thread: u32, read_at: Instant, now: Instant) {
        let waited = now.saturating_duration_since(read_at);
        self.blocked.record(waited);
        if thread != 0 {
            self.overlap.end(thread, now);
            let mut threads = lock(&self.threads);
            let blocked = threads.entry(thread).or_default();
            blocked.faults += 1;
            blocked.total += waited;
            blocked.max = blocked.max.max(waited);
        }
    }

    /// Faults and vCPU exits so far: changes while there is demand.
    pub fn demanded(&self) -> u64 {
        self.faults.get() + self.vcpu_faults.get()
    }

    /// Block times, longest sum first. Fills `out` as far as it goes and returns how many there are.
    pub fn block_times(&self, out: &mut [std::mem::MaybeUninit<kuf_block_time>]) -> usize {
        let mut all: Vec<_> = lock(&self.threads).iter().map(|(thread, blocked)| (*thread, *blocked)).collect();
        all.sort_by_key(|(thread, blocked)| (std::cmp::Reverse(blocked.total), *thread));
        for (to, (thread, b)) in out.iter_mut().zip(&all) {
            let (total_ns, max_ns) = (nanoseconds(b.total), nanoseconds(b.max));
            to.write(kuf_block_time { thread: *thread, reserved: 0, faults: b.faults, total_ns, max_ns });
        }
        all.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(1), 0);
        assert_eq!(bucket(2), 1);
        assert_eq!(bucket(1023), 9);
        assert_eq!(bucket(1024), 10);
        assert_eq!(bucket(u64::MAX), KUF_HISTOGRAM_BUCKETS - 1);
    }

    #[test]
    fn a_histogram_adds_up() {
        let h = Histogram::default();
        for ns in [5, 900, 70_000] {
            h.record(Duration::from_nanos(ns));
        }
        let c = h.to_c();
        assert_eq!((c.count, c.sum_ns, c.max_ns), (3, 70_905, 70_000));
        assert_eq!(c.bucket.iter().sum::<u64>(), 3);
    }
}
