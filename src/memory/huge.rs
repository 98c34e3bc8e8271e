//! Decides whether a huge page is tried for a slot's next 2 MiB.

use super::staging;
use crate::sync::atomic::{AtomicU32, Ordering};

/// The most stretches that are skipped after one that did not get its huge page.
const MOST_SKIPPED: u32 = 64;

/// The record of a slot's attempts to get huge pages.
pub struct Huge {
    pub wanted: bool,
    /// Stretches in a row that did not get one.
    failures: AtomicU32,
    /// Stretches that are not to be tried.
    skip: AtomicU32,
}

impl Huge {
    /// `wanted`: the caller wants them, and they are possible in this memory.
    pub fn new(wanted: bool) -> Self {
        Self { wanted, failures: AtomicU32::new(0), skip: AtomicU32::new(0) }
    }

    /// Whether to try the next stretch.
    pub fn try_next(&self) -> bool {
        // Two threads that skip the same stretch skip one less.
        match self.skip.load(Ordering::Relaxed) {
            0 => true,
            left => {
                self.skip.store(left - 1, Ordering::Relaxed);
                false
            }
        }
    }

    /// Returns how many have failed in a row.
    pub fn tried(&self, worked: bool) -> u32 {
        if worked {
            self.failures.store(0, Ordering::Relaxed);
            return 0;
        }
        let failures = self.failures.load(Ordering::Relaxed).saturating_add(1);
        self.failures.store(failures, Ordering::Relaxed);
        self.skip.store((1 << failures.min(16)).min(MOST_SKIPPED), Ordering::Relaxed);
        failures
    }
}

/// Whether huge pages are possible at all in a slot of these pages.
pub fn possible(granule: u64, private: bool) -> bool {
    private && staging::possible() && granule == rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_slot_is_tried_less_and_less() {
        let huge = Huge::new(true);
        let skipped = || (0..).take_while(|_| !huge.try_next()).count();
        assert_eq!(skipped(), 0);
        for (n, skips) in [2, 4, 8, 16, 32, 64, 64, 64].into_iter().enumerate() {
            assert_eq!(huge.tried(false), n as u32 + 1);
            assert_eq!(skipped(), skips);
        }
        assert_eq!(huge.tried(true), 0);
        assert_eq!(huge.tried(false), 1);
        assert_eq!(skipped(), 2);
    }
}
