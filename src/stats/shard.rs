//! The counters and histograms of one thread, or of all threads that have no shard of their own.

use super::blocked::{Blocked, Table};
use super::nanoseconds;
use crate::abi::{kuf_histogram, kuf_stats_info, KUF_HISTOGRAM_BUCKETS};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::time::Duration;

/// A log2 histogram of nanoseconds.
struct Histogram {
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
    fn add_to(&self, sum: &mut kuf_histogram) {
        for (to, from) in sum.bucket.iter_mut().zip(&self.buckets) {
            let n = from.load(Ordering::Acquire);
            *to += n;
            // Sum the buckets as read here, so that count and buckets agree even if more is recorded meanwhile.
            sum.count += n;
        }
        sum.sum_ns += self.sum.load(Ordering::Relaxed);
        sum.max_ns = sum.max_ns.max(self.max.load(Ordering::Relaxed));
    }
}

fn bucket(ns: u64) -> usize {
    (ns.max(1).ilog2() as usize).min(KUF_HISTOGRAM_BUCKETS - 1)
}

/// One thread's part of the statistics, or that of all the others. It is aligned to two cache lines, which CPUs fetch
/// in pairs, so that no two shards share a pair.
#[repr(align(128))]
pub struct Shard {
    /// Only one thread counts here.
    alone: bool,
    counters: Counters,
    histograms: Histograms,
    threads: Table,
}

macro_rules! stats {
    ($($counter:ident),* ; $($histogram:ident),*) => {
        /// Each is documented in `struct kuf_stats_info`.
        #[derive(Default)]
        struct Counters {
            $($counter: AtomicU64,)*
        }

        #[derive(Default)]
        struct Histograms {
            $($histogram: Histogram,)*
        }

        /// Nothing counted yet.
        pub fn nothing() -> kuf_stats_info {
            let none = kuf_histogram { count: 0, sum_ns: 0, max_ns: 0, bucket: [0; KUF_HISTOGRAM_BUCKETS] };
            kuf_stats_info { size: 0, reserved: 0, $($counter: 0,)* $($histogram: none,)* blocked_all_ns: 0 }
        }

        impl Shard {
            $(
                /// Adds to the counter.
                pub fn $counter(&self, n: u64) {
                    self.add(&self.counters.$counter, n);
                }
            )*
            $(
                /// Records one duration.
                pub fn $histogram(&self, value: Duration) {
                    self.record(&self.histograms.$histogram, value);
                }
            )*

            /// Adds all counts of this shard to `sum`.
            pub fn add_to(&self, sum: &mut kuf_stats_info) {
                $(sum.$counter += self.counters.$counter.load(Ordering::Relaxed);)*
                $(self.histograms.$histogram.add_to(&mut sum.$histogram);)*
            }
        }
    };
}

stats! {
    faults, faults_minor, faults_write, faults_joined, faults_late, faults_unknown, vcpu_faults,
    fills, fills_failed, fills_deferred,
    bytes_copied, bytes_zeroed, bytes_in_place, bytes_populated, bytes_poisoned, bytes_discarded, bytes_removed,
    events_remove, events_unmap, events_remap, events_fork,
    install_again, install_exists, install_no_memory, faults_lost, faults_unsignalled, bytes_ahead;
    queueing, filling, installing, blocked
}

impl Shard {
    /// A shard for one thread alone.
    pub fn of_one_thread() -> Self {
        Self { alone: true, ..Self::of_many_threads() }
    }

    /// A shard for any thread.
    pub fn of_many_threads() -> Self {
        Self {
            alone: false,
            counters: Counters::default(),
            histograms: Histograms::default(),
            threads: Table::default(),
        }
    }

    fn add(&self, to: &AtomicU64, n: u64) {
        if n == 0 {
            return;
        }
        if self.alone {
            // No other thread writes, so no write comes between the load and the store.
            to.store(to.load(Ordering::Relaxed).wrapping_add(n), Ordering::Release);
        } else {
            to.fetch_add(n, Ordering::Release);
        }
    }

    fn record(&self, to: &Histogram, value: Duration) {
        let ns = nanoseconds(value);
        self.add(&to.sum, ns);
        match to.max.load(Ordering::Relaxed) {
            max if max >= ns => {}
            _ if self.alone => to.max.store(ns, Ordering::Relaxed),
            _ => {
                to.max.fetch_max(ns, Ordering::Relaxed);
            }
        }
        // The bucket comes last, so that sum and maximum contain every value that a reader finds counted.
        self.add(&to.buckets[bucket(ns)], 1);
    }

    /// Faults and vCPU exits.
    pub fn demanded(&self) -> u64 {
        self.counters.faults.load(Ordering::Relaxed) + self.counters.vcpu_faults.load(Ordering::Relaxed)
    }

    /// Counts a fault of `thread` (not 0) that was blocked for `waited`. False: this shard does not keep it.
    pub fn blocked_thread(&self, thread: u32, waited: Duration) -> bool {
        self.alone && self.threads.count(thread, waited)
    }

    /// The blocked times in this shard, by thread.
    pub fn blocked_threads(&self) -> impl Iterator<Item = (u32, Blocked)> + '_ {
        self.threads.read()
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
    fn histograms_add_up() {
        let (one, many) = (Shard::of_one_thread(), Shard::of_many_threads());
        for ns in [5, 900, 70_000] {
            one.filling(Duration::from_nanos(ns));
            many.filling(Duration::from_nanos(10 * ns));
        }
        let mut sum = nothing();
        one.add_to(&mut sum);
        assert_eq!((sum.filling.count, sum.filling.sum_ns, sum.filling.max_ns), (3, 70_905, 70_000));
        many.add_to(&mut sum);
        assert_eq!((sum.filling.count, sum.filling.sum_ns, sum.filling.max_ns), (6, 11 * 70_905, 700_000));
        assert_eq!(sum.filling.bucket.iter().sum::<u64>(), 6);
        assert_eq!(sum.installing.count, 0);
    }
}
