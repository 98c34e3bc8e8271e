//! A touch of a poisoned page whose mark was lost.

use crate::abi::*;
use crate::error::words;
use crate::mechanism::{Content, Stop};
use crate::memory::Slot;
use crate::pages::claims::Id;
use crate::service::fault::retry::{Backoff, RetryLimits};
use crate::service::fault::{install, parked, settle};
use crate::service::queues::between::{between_events, About};
use crate::service::queues::quiet;
use crate::service::Service;
use crate::sync::time::Instant;
use crate::sync::{thread, Arc};

/// The mark of a poisoned page was lost (its mapping changed, or the kernel has no poison): put it there again.
pub fn touch_poison(service: &Service, slot: &Arc<Slot>, page: u64) {
    let (pages, patience, mut waiting) = (page..page + 1, RetryLimits::default(), Backoff::default());
    loop {
        let marked = if waiting.is_long() {
            between_events(service, &slot.mechanism, &About::Pages(slot, &pages), || {
                let marked = mark(service, slot, page);
                let in_the_way = matches!(marked, Some(Some(Stop::Again)));
                (marked, in_the_way)
            })
            .0
        } else {
            let _gate = slot.mechanism.gate().read();
            mark(service, slot, page)
        };
        let Some(stop) = marked else { return };
        match stop {
            Some(Stop::Again) if !service.ends(slot) || patience.for_events(Instant::now(), slot.facts().remote) => {
                quiet::wait_for_events(service, &slot.mechanism, &mut waiting);
            }
            // Another thread may have given the page back since.
            Some(Stop::Untrue) if patience.for_memory(Instant::now()) => thread::yield_now(),
            Some(Stop::Exists) => return slot.binding.wake(&pages),
            // The range is no longer guest memory, so no thread waits; the present mapping may be another's.
            Some(Stop::Unmapped | Stop::Dead) => return,
            None if slot.facts().gates_kvm_only => return parked::parked(service, slot, pages),
            Some(_) if !settle::close_off(slot, &pages) => {
                let text = || words!("a poisoned page of the memory slot at gpa {:#x} stays inaccessible", slot.gpa);
                return service.config.callbacks.log(KUF_LOG_WARN, text);
            }
            _ => return,
        }
    }
}

/// With the gate held: puts the mark of a poisoned page there. None: the page needs no mark any more.
fn mark(service: &Service, slot: &Arc<Slot>, page: u64) -> Option<Option<Stop>> {
    let pages = page..page + 1;
    if slot.gone().is_some() {
        // The fault was read before its slot was removed. Its addresses may be another slot's by now.
        return None;
    }
    let Some(marking) = Marking::begin(slot, page) else {
        // The page was discarded meanwhile: its waiters touch it again.
        slot.binding.wake(&pages);
        return None;
    };
    // A callback may still write there when the service ends.
    let content = Content::Poison { at_end: !service.life.is_open() };
    let marked = slot.binding.install(&pages, content);
    marking.end(service, slot, page);
    Some(marked.stop)
}

/// The poisoned page whose mark is put back.
enum Marking {
    /// The slot's own, with the claim of it.
    Own(Id),
    /// Of memory that a forked child shares, where it is the root slot's page that is poisoned.
    Shared,
}

impl Marking {
    /// None: the page is no longer poisoned.
    fn begin(slot: &Slot, page: u64) -> Option<Self> {
        match slot.parent.as_ref().filter(|_| slot.shared.is_some()) {
            Some(root) => root.claims().is_poisoned(page).then_some(Self::Shared),
            None => slot.claims().begin_mark(page).map(Self::Own),
        }
    }

    fn end(self, service: &Service, slot: &Arc<Slot>, page: u64) {
        if let Self::Own(id) = self {
            let waiters = slot.settle(|claims| claims.poison(page..page + 1, id));
            install::ended(service, slot, waiters, service.stats.here());
        }
    }
}
