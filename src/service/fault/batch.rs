//! How background fills yield to demand faults without starving.
//!
//! A thread that reads faults needs the gate for a moment, and an install holds it. So a long run is installed in stretches,
//! which are short while faults come in; after each stretch the installing thread lets a thread that wants the gate go
//! first. Demand faults wait for the gate and not for the CPU: another scheduling policy for the populate thread changes
//! nothing, and a guest would wait for a thread of low priority that holds the gate.

use crate::mechanism::Content;
use crate::memory::Slot;
use crate::service::fault::bytes::Bytes;
use crate::service::Service;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::time::Duration;

/// Longest stretch installed under one hold of the gate, in bytes. A thread that reads the kernel's events waits for one
/// such stretch at most.
const STRETCH: u64 = 256 << 10;

/// The same in pages of the slot while faults come in: pages to be copied, at more than a microsecond each, and others.
const SHORT_COPY: u64 = 1;
const SHORT_OTHER: u64 = 16;

/// How long after a fault more faults are expected.
const LATELY: Duration = Duration::from_millis(20);

/// When demand was last seen.
#[derive(Default)]
pub struct RecentDemand {
    /// The count of faults at that time.
    faults: AtomicU64,
    /// Nanoseconds after the handle was opened; 0: never.
    at: AtomicU64,
}

impl RecentDemand {
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

/// How many of `pages` are installed under one hold of the gate. `now`: the age of the handle.
pub fn batch_pages(service: &Service, slot: &Slot, pages: u64, bytes: &Bytes<'_>, now: Duration) -> u64 {
    // Marks are taken off a run in one go, whatever its length.
    if pages == 1 || slot.facts().gates_kvm_only {
        pages
    } else if bytes.background && service.background.recent_demand.seen(service.stats.demanded(), now) {
        if matches!(bytes.content, Content::Copy(_)) {
            SHORT_COPY
        } else {
            SHORT_OTHER
        }
    } else {
        (STRETCH / slot.granule).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_is_remembered_for_a_while() {
        let (recent, at) = (RecentDemand::default(), Duration::from_millis);
        assert!(!recent.seen(0, at(1)), "there was none");
        assert!(recent.seen(3, at(2)));
        assert!(recent.seen(3, at(21)));
        assert!(!recent.seen(3, at(22)));
        assert!(recent.seen(4, at(23)));
    }
}
