//! The counters and histograms that one thread keeps, or that all those share which have none of their own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::blocked::{Blocked, Table};
use super::nanoseconds;
use crate::capi::types::{kuf_histogram, kuf_stats, KUF_HISTOGRAM_BUCKETS};

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
            // Of what was read here, so that count and buckets agree whatever is recorded meanwhile.
            sum.count += n;
        }
        sum.sum_ns += self.sum.load(Ordering::Relaxed);
        sum.max_ns = sum.max_ns.max(self.max.load(Ordering::Relaxed));
    }
}

fn bucket(ns: u64) -> usize {
    (ns.max(1).ilog2() as usize).min(KUF_HISTOGRAM_BUCKETS - 1)
}

/// One thread's part of the statistics, or that of all the others. Its first cache line is nobody else's last: CPUs
/// fetch pairs of lines.
#[repr(align(128))]
pub struct Shard {
    /// Only one thread ever counts here.
    alone: bool,
    counters: Counters,
    histograms: Histograms,
    threads: Table,
}

macro_rules! stats {
    ($($counter:ident),* ; $($histogram:ident),*) => {
        /// Each is documented in `struct kuf_stats`.
        #[derive(Default)]
        struct Counters {
            $($counter: AtomicU64,)*
        }

        #[derive(Default)]
        struct Histograms {
            $($histogram: Histogram,)*
        }

        /// Nothing counted yet.
        pub fn nothing() -> kuf_stats {
            let none = kuf_histogram { count: 0, sum_ns: 0, max_ns: 0, bucket: [0; KUF_HISTOGRAM_BUCKETS] };
            kuf_stats { size: 0, reserved: 0, $($counter: 0,)* $($histogram: none,)* blocked_all_ns: 0 }
        }

        impl Shard {
            $(
                /// Counts so many more.
                pub fn $counter(&self, n: u64) {
                    self.add(&self.counters.$counter, n);
                }
            )*
            $(
                /// Counts one that took so long.
                pub fn $histogram(&self, value: Duration) {
                    self.record(&self.histograms.$histogram, value);
                }
            )*

            /// Adds everything that was counted here.
            pub fn add_to(&self, sum: &mut kuf_stats) {
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
    install_again, install_exists, install_no_memory, queue_full, faults_lost, faults_unsignalled, bytes_ahead;
    queueing, filling, installing, blocked
}

impl Shard {
    /// For one thread alone to count in.
    pub fn of_one_thread() -> Self {
        Self { alone: true, ..Self::of_many_threads() }
    }

    /// For any thread to count in.
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
            // Nobody else writes, so nothing comes between the two.
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
        // Last: who finds it counted finds it in the sum and the maximum.
        self.add(&to.buckets[bucket(ns)], 1);
    }

    /// Faults and vCPU exits.
    pub fn demanded(&self) -> u64 {
        self.counters.faults.load(Ordering::Relaxed) + self.counters.vcpu_faults.load(Ordering::Relaxed)
    }

    /// Counts a fault of `thread` (not 0) that took so long. False: that is not kept here.
    pub fn blocked_thread(&self, thread: u32, waited: Duration) -> bool {
        self.alone && self.threads.count(thread, waited)
    }

    /// What was counted so, by thread.
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
