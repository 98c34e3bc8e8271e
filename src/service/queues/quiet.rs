//! Waits until no event of the kernel is on its way: to add a slot, to remove one, to give up a userfaultfd, and to
//! make sure that a mapping had not moved when its pages were dropped.

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::mechanism::Mechanism;
use crate::memory::Slot;
use crate::service::fault::retry::Backoff;
use crate::service::queues::between::{between_events, About, Moment};
use crate::service::queues::{read, stray};
use crate::service::Service;
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc};
use std::ops::Range;

/// How long an added slot waits for events that may be of the mapping that was at its addresses before.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long a removed slot waits.
const PATIENCE_AT_END: Duration = Duration::from_millis(100);

/// Takes the gate to add a slot at `hva`, when every event of the mapping that was there before has been applied.
pub fn gate_to_add<'a>(
    service: &'a Service,
    mechanism: &'a Arc<dyn Mechanism>,
    hva: &Range<u64>,
) -> Result<Moment<'a>> {
    let Some(gate) = gate_when_quiet(service, mechanism, PATIENCE) else {
        let text = "events of an munmap, mremap, madvise or fork, perhaps of an earlier mapping there, are still on \
                    their way: try again";
        return Err(Error::new(Errno::AGAIN, text));
    };
    for queue in service.queues.list().iter().filter(|queue| queue.mechanism.id() == mechanism.id()) {
        stray::no_event_is_late(service, queue);
        queue.leftovers.forget(hva);
    }
    Ok(gate)
}

/// Takes the gate to remove a slot, when every event of it has been applied. Without that, pages that move to another
/// address would stay registered there, in no slot, and their touchers would stay blocked under an adopted userfaultfd.
/// While threads give memory back without pause that moment may not come; the wait then ends without it.
pub fn gate_to_remove<'a>(service: &'a Service, mechanism: &'a Arc<dyn Mechanism>) -> Moment<'a> {
    gate_when_quiet(service, mechanism, PATIENCE_AT_END).unwrap_or_else(|| Moment::begin(service, mechanism))
}

/// A slot was removed and unregistered. With the gate held.
pub fn end_events(service: &Service, slot: &Slot) {
    let mechanism = &slot.mechanism;
    let Some(queue) = service.queues.first(mechanism.id()).filter(|_| mechanism.facts().adopted) else { return };
    let quiet = mechanism.is_all_quiet();
    slot.each_extent(|extent| queue.forget_given_back(&(extent.hva..extent.hva + extent.len), quiet));
}

/// Waits a while until no event of removed slots is on its way: a later removal is of memory that is still to be added.
pub fn wait_for_late_events(service: &Service, mechanism: &Arc<dyn Mechanism>) {
    let Some(queue) = service.queues.first(mechanism.id()).filter(|queue| queue.has_ended()) else { return };
    if let Some(_gate) = gate_when_quiet(service, mechanism, PATIENCE_AT_END) {
        stray::no_event_is_late(service, &queue);
    }
}

/// Takes the gate when no event is on its way and all messages that were read have been applied. None: there was no such
/// moment within `patience`.
fn gate_when_quiet<'a>(
    service: &'a Service,
    mechanism: &'a Arc<dyn Mechanism>,
    patience: Duration,
) -> Option<Moment<'a>> {
    let (since, mut waiting) = (Instant::now(), Backoff::default());
    loop {
        let (quiet, gate) = if waiting.is_long() {
            between_events(service, mechanism, &About::Nothing, || {
                let quiet = mechanism.is_all_quiet();
                (quiet, !quiet)
            })
        } else {
            let gate = Moment::begin(service, mechanism);
            (mechanism.is_all_quiet(), gate)
        };
        if quiet {
            return Some(gate);
        }
        drop(gate);
        if since.elapsed() >= patience {
            return None;
        }
        wait_for_events(service, mechanism, &mut waiting);
    }
}

/// Reads the queues of a userfaultfd that is given up, of whose slots none is registered any more, until no event is on
/// its way: the process that opened it may keep it, and a thread whose event is not read stays blocked in madvise, munmap
/// or mremap.
pub fn read_out(service: &Service, mechanism: &Arc<dyn Mechanism>) {
    let since = Instant::now();
    read::drain_mechanism(service, mechanism);
    while !mechanism.is_all_quiet() && since.elapsed() < PATIENCE {
        thread::sleep(Duration::from_micros(50));
        read::drain_mechanism(service, mechanism);
    }
}

/// Whether the slot's mapping has changed since `before`. No event of such a change is on its way when this returns, and
/// those that were read have been applied, that of an madvise(2) before it too. Err is an errno.
pub fn changed_since(service: &Service, slot: &Arc<Slot>, before: u64) -> std::result::Result<bool, Errno> {
    let (mechanism, mut waiting) = (&slot.mechanism, Backoff::default());
    loop {
        let look = || match slot.changes() {
            now if now != before => Some(true),
            _ => (mechanism.facts().remote || mechanism.is_all_quiet()).then_some(false),
        };
        let changed = if waiting.is_long() {
            between_events(service, mechanism, &About::Mappings, || {
                let changed = look();
                (changed, changed.is_none())
            })
            .0
        } else {
            let _gate = mechanism.gate().read();
            look()
        };
        if let Some(changed) = changed {
            return Ok(changed);
        }
        if service.ends(slot) {
            // The thread that ends the slot waits for this one.
            return Err(Errno::CANCELED);
        }
        wait_for_events(service, mechanism, &mut waiting);
    }
}

/// Waits, then reads the events of `mechanism`. The caller of this function retries at once. A thread that gives memory back
/// without pause sends its next event within microseconds, and an event that arrives during a sleep would block each retry.
pub fn wait_for_events(service: &Service, mechanism: &Arc<dyn Mechanism>, waiting: &mut Backoff) {
    waiting.pause();
    read::drain_mechanism(service, mechanism);
    // The kernel refuses until the thread whose event was read has gone on.
    thread::yield_now();
}
