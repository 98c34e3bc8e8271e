//! How what nobody waits for stays behind demand, while it gets on all the same.
//!
//! Whoever reads faults needs the gate for a moment, and an install holds it. So work of many pages is opened in
//! stretches, which are short while faults come in, and lets who wants the gate go first after each of them. That, and
//! not the CPU, is what demand waits for: other scheduling policies of the thread that populates change nothing, and a
//! thread of low priority that has the gate is one that a guest may have to wait for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::zero::Bytes;
use super::Service;
use crate::mechanism::Content;
use crate::memory::Slot;

/// Longest stretch opened under one hold of the gate, in bytes: reading the kernel's events waits that long at most.
const STRETCH: u64 = 256 << 10;

/// The same in granules while faults come in: pages to be copied, at more than a microsecond each, and others.
const SHORT_COPY: u64 = 1;
const SHORT_OTHER: u64 = 16;

/// For how long after a fault others are expected.
const LATELY: Duration = Duration::from_millis(20);

/// When demand was last seen.
#[derive(Default)]
pub struct Lately {
    /// Faults there had been.
    faults: AtomicU64,
    /// Nanoseconds after the handle was opened; 0: never.
    at: AtomicU64,
}

impl Lately {
    /// There have been `faults` at `now`. Returns whether some came a short time ago.
    fn seen(&self, faults: u64, now: Duration) -> bool {
        let now = now.as_nanos() as u64;
        if self.faults.swap(faults, Ordering::Relaxed) != faults {
            self.at.store(now, Ordering::Relaxed);
            return true;
        }
        let at = self.at.load(Ordering::Relaxed);
        at != 0 && now.saturating_sub(at) < LATELY.as_nanos() as u64
    }
}

impl Service {
    /// How many of `pages` are opened under one hold of the gate, from `now` after the handle was opened.
    pub(super) fn stretch(&self, slot: &Slot, pages: u64, bytes: &Bytes<'_>, now: Duration) -> u64 {
        // Marks are taken off a run in one go, whatever its length.
        if pages == 1 || slot.mechanism.marks() {
            pages
        } else if bytes.behind && self.lately.seen(self.stats.demanded(), now) {
            if matches!(bytes.content, Content::Data(_)) {
                SHORT_COPY
            } else {
                SHORT_OTHER
            }
        } else {
            (STRETCH / slot.granule).max(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_is_remembered_for_a_while() {
        let (lately, at) = (Lately::default(), Duration::from_millis);
        assert!(!lately.seen(0, at(1)), "there was none");
        assert!(lately.seen(3, at(2)));
        assert!(lately.seen(3, at(21)));
        assert!(!lately.seen(3, at(22)));
        assert!(lately.seen(4, at(23)));
    }
}
