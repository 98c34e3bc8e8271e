//! A shortage of memory in this process itself.
//!
//! A fault that the library has no memory to record is served later: the kernel keeps its toucher asleep until then. An
//! event that cannot be refused (memory that was given back) waits for memory. Both waits have a limit; after it the service
//! ends, installs no more pages, and tells the caller.

use crate::alloc::lost;
use crate::service::{Fault, Service, Work};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::thread;
use crate::sync::time::Duration;

/// How long faults wait for memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// Since when there has been no memory to serve a fault.
pub struct Shortage {
    /// Milliseconds after the handle was opened, plus one; 0: there is memory.
    since: AtomicU64,
    /// The value of [`lost`] when the handle was opened.
    lost: usize,
}

impl Default for Shortage {
    fn default() -> Self {
        Self { since: AtomicU64::new(0), lost: lost() }
    }
}

impl Shortage {
    /// There is no memory, `now` after the handle was opened. Returns whether that has been so for too long.
    pub fn lasts(&self, now: Duration) -> bool {
        let now = now.as_millis() as u64 + 1;
        match self.since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => false,
            Err(since) => now.saturating_sub(since) > PATIENCE.as_millis() as u64,
        }
    }

    /// There is memory.
    pub fn is_over(&self) {
        if self.since.load(Ordering::Relaxed) != 0 {
            self.since.store(0, Ordering::Relaxed);
        }
    }
}

/// Ends the service if an event was lost for want of memory.
pub fn end_if_lost(service: &Service) {
    if lost() != service.shortage.lost {
        service.fail("there was no memory to record the pages that the guest gave back");
    }
}

/// Serves a fault when there is memory for it: an entry in a table. The service ends if that takes too long.
pub fn serve_later(service: &Service, fault: Fault) {
    service.stats.here().install_no_memory(1);
    if service.shortage.lasts(service.life.age()) {
        return service.fail("there is no memory to record the pages that are being filled");
    }
    thread::sleep(Duration::from_millis(1));
    service.push(Work::Fault(fault));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_that_passes_is_none() {
        let (shortage, at) = (Shortage::default(), Duration::from_millis);
        assert!(!shortage.lasts(at(10)) && !shortage.lasts(at(2010)) && shortage.lasts(at(2011)));
        shortage.is_over();
        assert!(!shortage.lasts(at(3000)) && !shortage.lasts(at(4000)));
    }
}
