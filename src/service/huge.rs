//! Huge pages for anonymous memory (`KUF_MEMORY_HUGE`): which runs are filled 2 MiB at a time, and when that is not worth
//! trying.
//!
//! A stretch is 2 MiB of host addresses, aligned, all in one slot. One that is wholly absent when nobody waits for it
//! (populate), or when somebody asks for all of it (`kuf_ensure`), is claimed as one run, filled in a huge page of the
//! library's (`memory/staging.rs`), and that page is moved to the guest (UFFDIO_MOVE). Whatever is in the way of
//! that, the bytes are copied page by page from where they are: nothing else depends on it.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Service;
use crate::capi::types::KUF_LOG_INFO;
use crate::memory::staging::{self, Staging, HUGE};
use crate::memory::Slot;
use crate::pages::State;

/// After a stretch that did not get its huge page, so many at most are not tried.
const MOST_SKIPPED: u32 = 64;

/// What a slot has come to with huge pages.
pub struct Huge {
    wanted: bool,
    /// Stretches in a row that did not get one.
    failures: AtomicU32,
    /// Stretches that are not to be tried.
    skip: AtomicU32,
}

impl Huge {
    /// `wanted`: of memory that they are possible in.
    pub fn new(wanted: bool) -> Self {
        Self { wanted, failures: AtomicU32::new(0), skip: AtomicU32::new(0) }
    }

    /// Whether to try the next stretch.
    fn try_next(&self) -> bool {
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
    fn tried(&self, worked: bool) -> u32 {
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

/// Whether `pages` are one whole stretch of a slot that wants huge pages.
pub fn is_stretch(slot: &Slot, pages: &Range<u64>) -> bool {
    let whole = HUGE / slot.granule;
    slot.huge.wanted
        && pages.end - pages.start == whole
        && slot.hva_of(pages.start).is_some_and(|(hva, mapped)| hva % HUGE == 0 && mapped >= whole)
}

/// How much to claim of an absent run that starts with the first of `pages` and may not go beyond them, where at most
/// `max` pages are asked for otherwise: a whole stretch, or not into the next one. The caller holds the slot's claims.
pub fn claim_max(slot: &Slot, pages: &Range<u64>, max: u64) -> u64 {
    if !slot.huge.wanted {
        return max;
    }
    let Some((hva, _)) = slot.hva_of(pages.start) else { return max };
    let left = (HUGE - hva % HUGE) / slot.granule;
    let stretch = pages.start..pages.start + left;
    let all_absent = || slot.pages.first_run(stretch.clone(), State::Absent, left) == Some(stretch.clone());
    if stretch.end <= pages.end && is_stretch(slot, &stretch) && all_absent() {
        left
    } else {
        max.min(left)
    }
}

impl Service {
    /// A huge page to fill for `pages`, if they are to be had on one.
    pub(super) fn stage(&self, slot: &Slot, pages: &Range<u64>) -> Option<Staging> {
        if !is_stretch(slot, pages) || !slot.huge.try_next() {
            return None;
        }
        let (hva, _) = slot.hva_of(pages.start)?;
        let staging = self.staging.take(hva);
        if staging.is_none() {
            self.tried_huge(slot, false, "the kernel has none to give");
        }
        staging
    }

    /// Whether a stretch was moved.
    pub(super) fn tried_huge(&self, slot: &Slot, worked: bool, why: &str) {
        if slot.huge.tried(worked) == 1 {
            self.config.host.log(KUF_LOG_INFO, || {
                format!(
                    "memory slot at gpa {:#x}: a stretch is filled on small pages, not on a huge one: {why}",
                    slot.gpa
                )
            });
        }
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
    fn what_fails_is_tried_less_and_less() {
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
