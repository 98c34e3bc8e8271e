//! Huge pages for anonymous memory (`KUF_MEMORY_HUGE`): which runs are filled 2 MiB at a time, and when that is not worth
//! trying.
//!
//! A stretch is 2 MiB of host addresses, aligned, all in one slot. A stretch that is wholly absent is claimed as one run by
//! populate, and by `kuf_ensure` of all of it. It is filled in a huge page of the library's (`memory/staging.rs`), and
//! UFFDIO_MOVE moves that page to the guest. When the move fails, the bytes are copied page by page: nothing else depends on
//! it.

use std::ops::Range;

use crate::abi::KUF_LOG_INFO;
use crate::error::words;
use crate::mapping::HUGE;
use crate::memory::staging::Staging;
use crate::memory::Slot;
use crate::pages::State;
use crate::service::Service;

/// Whether `pages` are one whole stretch of a slot that wants huge pages.
fn is_stretch(slot: &Slot, pages: &Range<u64>) -> bool {
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

/// A huge page to fill for `pages`, if they are a whole stretch and the kernel has one.
pub fn stage(service: &Service, slot: &Slot, pages: &Range<u64>) -> Option<Staging> {
    if !is_stretch(slot, pages) || !slot.huge.try_next() {
        return None;
    }
    let (hva, _) = slot.hva_of(pages.start)?;
    let staging = service.buffers.take_staging(hva);
    if staging.is_none() {
        tried_huge(service, slot, false, "the kernel has none to give");
    }
    staging
}

/// Whether a stretch was moved.
pub fn tried_huge(service: &Service, slot: &Slot, worked: bool, why: &str) {
    if slot.huge.tried(worked) == 1 {
        service.config.callbacks.log(KUF_LOG_INFO, || {
            words!("memory slot at gpa {:#x}: a stretch is filled on small pages, not on a huge one: {why}", slot.gpa)
        });
    }
}
