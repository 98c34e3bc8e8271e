//! `kuf_remove_memory`.

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::try_collect;
use crate::error::{Error, Result};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::Claims;
use crate::pages::State;
use crate::service::calls::end_slot::{Shut, Toll};
use crate::service::calls::{close, end_slot, known_flags, kvm, no_slot_starts, take_out, unresolved};
use crate::service::fault::exits;
use crate::service::inside::{refuse_inside_callbacks, refuse_inside_fill};
use crate::service::queues::quiet;
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc};
use std::ops::Range;

/// How long kuf_remove_memory waits for fills that are running.
const FILLS_END: Duration = Duration::from_millis(100);

/// `kuf_remove_memory`.
pub fn remove_memory(service: &Service, gpa: u64, flags: u32) -> Result<()> {
    refuse_inside_fill("kuf_remove_memory")?;
    known_flags(flags, KUF_END_POISON | KUF_END_POPULATE)?;
    service.check_open()?;
    let map = service.memory.map();
    let slot = &map.starting_at(gpa).cloned().ok_or_else(|| no_slot_starts(gpa))?;
    // Drop this reference, so that a change of the map need not copy it.
    drop(map);
    if flags & KUF_END_POPULATE != 0 {
        // The call waits for fills, and this callback's thread may be in one.
        refuse_inside_callbacks("kuf_remove_memory with KUF_END_POPULATE")?;
        close::populate_before_end(service, Some((slot.gpa, slot.len)), flags)?;
    }
    kvm::refuse_memslot_change(slot, "kuf_remove_memory")?;
    let views = try_collect(service.memory.map().forks_of(slot).cloned())?;
    // Suspend prefetch until the slot has gone: see `FillPin`.
    let _none = service.background.prefetch.suspend_for(slot);
    let mut toll = Toll::default();
    let shut = poison_when_idle(service, slot, flags & KUF_END_POISON != 0, &mut toll)?;
    end_slot::poison_all(service, views.iter(), &mut toll);
    toll.tell(service, Some(slot), shut.pin.as_ref());
    drop(shut);
    end_slot::wait_until_told(slot);
    if slot.stays.load(Ordering::SeqCst) {
        let text =
            "pages of this slot could be neither poisoned nor made inaccessible: it stays, so that no thread reads zeroes";
        return Err(Error::new(Errno::IO, text));
    }
    take_out::take_out(service, slot, &views, |slot| take_out::detach(slot, false))?;
    exits::end(slot);
    quiet::wait_for_late_events(service, &slot.mechanism);
    take_out::give_up_unused(service, &slot.mechanism);
    Ok(())
}

/// Poisons the slot's unsettled pages when no fill of it is running. Without `poison`, it refuses if there are any.
///
/// It waits for fills: the caller's vCPUs may have stopped, but readahead for their last touches may be in progress. The
/// wait is limited, for a callback may want a lock that the caller holds; in a callback there is no wait, for others
/// may wait for this thread.
fn poison_when_idle<'a>(service: &Service, slot: &'a Arc<Slot>, poison: bool, toll: &mut Toll) -> Result<Shut<'a>> {
    let patience = if refuse_inside_callbacks("").is_ok() { FILLS_END } else { Duration::ZERO };
    let since = Instant::now();
    let until = since + patience;
    let all = 0..slot.pages.total();
    // Host code that fills the slot may be writing to its pages. A slot whose memory has gone has no unresolved pages:
    // no thread can touch it.
    let poison = || poison || slot.gone().is_some_and(|errno| errno != Errno::NOENT);
    // The wait for pages that are to be poisoned ends when their bytes are ready: an install may never succeed while
    // other threads give memory back.
    let let_it = |claims: &Claims<Waiter>| {
        poison() && Instant::now() >= until && !slot.is_pinned() && !claims.writing(&(0..slot.pages.total()))
    };
    let refuse = |claims: &Claims<Waiter>, all: &Range<u64>| {
        (claims.busy(all) || slot.is_pinned()) && !let_it(claims)
            || !poison() && (slot.pages.count(State::Absent) > 0 || claims.to_be_poisoned())
    };
    loop {
        if let Some(shut) = end_slot::poison_unless(service, slot, refuse, toll) {
            return Ok(shut);
        }
        let claims = slot.claims();
        let busy = (claims.busy(&all) || slot.is_pinned()) && !let_it(&claims);
        if !poison() && (slot.pages.count(State::Absent) > 0 || !busy && claims.to_be_poisoned()) {
            return Err(unresolved(slot));
        }
        if service.check_open().is_ok() && claims.installing(&all) && since.elapsed() < FILLS_END {
            // The install is done in a moment, so wait for it even in a callback: its waiter may have gone on already.
            drop(claims);
            thread::yield_now();
        } else if busy && Instant::now() >= until {
            return Err(Error::new(
                Errno::BUSY,
                "a fill or an event of this slot is in a callback: try again when that has returned",
            ));
        } else if busy {
            // Not every end of a claim wakes sleepers, so sleep only for a moment.
            let soon = Instant::now() + Duration::from_millis(1);
            drop(slot.sleep(claims, Some(soon.min(until))));
        }
    }
}
