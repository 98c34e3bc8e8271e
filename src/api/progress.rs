//! Progress and statistics of a handle.

use std::ops::Deref;

use crate::abi::*;
use crate::sync::time::Duration;

/// The state of a slot, or of all slots, in bytes. The six states add up to `total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// All bytes.
    pub total: u64,
    /// Holds its bytes.
    pub present: u64,
    /// Given back by the guest, or unmapped: reads as zero.
    pub removed: u64,
    /// Not asked for yet.
    pub absent: u64,
    /// Being filled now.
    pub filling: u64,
    /// To be resolved by the caller: deferred, or taken with [`Kuf::read`](crate::Kuf::read).
    pub deferred: u64,
    /// Could not be filled.
    pub poisoned: u64,
    /// The process behind a slot is gone.
    pub is_gone: bool,
}

/// The counters and latency histograms of a handle: the fields of `kuf_stats_info`. Times are in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Stats(kuf_stats_info);

/// How long one thread was blocked on page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockTime {
    /// The thread ID as from gettid(2).
    pub thread: u32,
    /// Faults of this thread that have ended.
    pub faults: u64,
    /// The sum of the times from reading the fault until the page was present.
    pub total: Duration,
    /// The longest of them.
    pub max: Duration,
}

impl Progress {
    /// Whether every page is present or removed.
    pub fn is_complete(&self) -> bool {
        self.present + self.removed == self.total
    }
}

impl From<kuf_progress_info> for Progress {
    fn from(p: kuf_progress_info) -> Self {
        let kuf_progress_info { total, present, removed, absent, filling, deferred, poisoned, .. } = p;
        let is_gone = p.flags & KUF_PROGRESS_GONE != 0;
        Self { total, present, removed, absent, filling, deferred, poisoned, is_gone }
    }
}

impl From<kuf_stats_info> for Stats {
    fn from(stats: kuf_stats_info) -> Self {
        Self(kuf_stats_info { size: size_of::<kuf_stats_info>() as u32, ..stats })
    }
}

impl Deref for Stats {
    type Target = kuf_stats_info;

    fn deref(&self) -> &kuf_stats_info {
        &self.0
    }
}

impl From<kuf_block_time> for BlockTime {
    fn from(t: kuf_block_time) -> Self {
        let (total, max) = (Duration::from_nanos(t.total_ns), Duration::from_nanos(t.max_ns));
        Self { thread: t.thread, faults: t.faults, total, max }
    }
}
