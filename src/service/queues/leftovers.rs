//! Leftovers of munmap(2) and mremap(2): late events, and registered pages in no slot.
//!
//! The kernel sends an event after the mapping has changed, so the addresses may be used again before the event is
//! read. Where several userfaultfds share a slot, one munmap(2) makes an event for each, one after the other; mremap(2)
//! makes an UNMAP of the old addresses after its REMAP. The slot may have left these addresses before the first event:
//! by kuf_remove_memory, or because it never had them. If another slot has the addresses when such an event is read,
//! the event would be applied to that slot. So a slot enters the map only when no event is on its way. The kernel shows
//! this: it refuses installs from before a mapping changes until the event was read. A slot that mremap(2) moves there
//! cannot wait: see [`crate::service::queues::overtaken`].
//!
//! After mremap(2) with MREMAP_DONTUNMAP, or where a mapping was extended, pages in no slot are still registered. To
//! wake their touchers is not enough: they would fault again for ever.
//!
//! mremap(2) may also move the memory of a slot that is just being taken off: the library unregisters the old addresses, and
//! reads the REMAP when the slot is off the map. It unregisters the new addresses when no event is on its way.

use std::ops::Range;

use crate::memory::ranges::take_within;
use crate::sync::atomic::AtomicBool;
use crate::sync::time::Instant;
use crate::sync::{lock, Mutex};

/// How many pages are remembered of each queue at most.
const MOST: usize = 1024;

/// Of one queue.
#[derive(Default)]
pub struct Leftovers {
    /// Ranges that slots have moved away from and that are still mapped, and where those have moved to.
    pub(super) left: Mutex<Vec<Range<u64>>>,
    /// Ranges whose memory has left by an event that was read, once for each UNMAP event of it that is still to come:
    /// these do not unmap memory that is there now. When no event is on its way, no UNMAP is to come.
    pub(super) owed: Mutex<Vec<Range<u64>>>,
    /// Some UNMAP is owed. Changed with `owed` locked.
    pub(super) owes: AtomicBool,
    /// Memory that was overtaken by other memory may be aside.
    pub(super) aside: AtomicBool,
    /// Ranges that memory of slots has moved to, by a REMAP that was read after the slots were taken off.
    pub(super) moved_on: Mutex<Vec<Range<u64>>>,
    /// Pages in no slot whose touchers were woken to look again, and when their faults had been read.
    woken: Mutex<Vec<(u64, Instant)>>,
}

impl Leftovers {
    /// An UNMAP event of `range` was read, or another slot comes there.
    pub fn forget(&self, range: &Range<u64>) {
        self.forget_left(range);
        let _ = take_within(&mut lock(&self.moved_on), range);
    }

    /// An UNMAP event of memory that slots have left at `range` was read.
    pub fn forget_left(&self, range: &Range<u64>) {
        let _ = take_within(&mut lock(&self.left), range);
    }

    /// Whether memory that slots have left is at `hva`.
    pub fn has(&self, hva: u64) -> bool {
        let has = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(&hva));
        has(&lock(&self.left)) || has(&lock(&self.moved_on))
    }

    /// All ranges that slots have moved away from.
    pub fn take(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut lock(&self.left))
    }

    /// Whether a fault in no slot, read at `read_at`, is of a page whose touchers had been woken before.
    pub fn again(&self, page: u64, read_at: Instant) -> bool {
        let mut woken = lock(&self.woken);
        if let Some(at) = woken.iter().position(|(other, _)| *other == page) {
            // A fault that was read together with the first one was blocked before the wake-up: its thread has not touched
            // the page again yet.
            return woken[at].1 != read_at && woken.swap_remove(at).0 == page;
        }
        if woken.len() >= MOST {
            woken.clear();
        }
        woken.push((page, read_at));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::time::Duration;

    #[test]
    fn a_page_is_there_again_when_its_toucher_was_woken_before() {
        let (leftovers, first) = (Leftovers::default(), Instant::now());
        let second = first + Duration::from_micros(1);
        assert!(!leftovers.again(0x1000, first));
        assert!(!leftovers.again(0x1000, first), "another thread was blocked with it");
        assert!(!leftovers.again(0x2000, second));
        assert!(leftovers.again(0x1000, second));
        assert!(!leftovers.again(0x1000, second), "from the start");
    }
}
