//! The ends of a claim other than its install: given up, poisoned, made inaccessible, or with early bytes.

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::Event;
use crate::error::{words, Failure};
use crate::mechanism::Content;
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Early, Id, Waiters};
use crate::pages::State;
use crate::service::fault::bytes::Bytes;
use crate::service::fault::install::{Failed, Outcome};
use crate::service::fault::pin::EventPin;
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{complete, install, retry};
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::time::Instant;
use crate::sync::Arc;
use std::ops::Range;
use std::ptr::NonNull;

/// Gives up the pages that the claim `id` owns of `pages`: they return to their state before, or get the bytes that came
/// early. Faults that waited are served anew.
pub fn abandon(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
    let waiters = abandon_quietly(service, slot, id, pages);
    service.push_again(slot, waiters);
}

/// As [`abandon`], but returns the waiters.
pub fn abandon_quietly(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) -> Waiters<Waiter> {
    abandon_as(service, slot, id, pages, None)
}

/// As [`abandon_quietly`]: the pages become `to`, or return to their former state when `to` is None.
pub fn abandon_as(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    pages: Range<u64>,
    to: Option<State>,
) -> Waiters<Waiter> {
    loop {
        install_early(service, slot, id, &pages);
        // Hold the gate, so that no removal comes between: a page that the guest gave back must not return to its
        // former state.
        let gate = slot.mechanism.gate().read();
        let mut whole = install::settle_cancelled(service, slot, id, pages.clone());
        let given_back = {
            let mut claims = slot.claims();
            if service.life.hands_over() {
                claims.leave_held_off(pages.clone(), id);
            }
            let given_back = claims.give_back(&slot.pages, pages.clone(), id, to);
            slot.wake_sleepers(&claims);
            given_back
        };
        drop(gate);
        whole |= given_back.as_ref().is_some_and(|settled| settled.whole);
        if whole {
            complete::tell_whole(service, slot);
        }
        if let Some(settled) = given_back {
            return settled.waiters;
        }
    }
}

/// Gives up pages that the callback left absent with KUF_FILL_LATER. The memory that a shared file has got for them is
/// returned; with KUF_MEMORY_FILL_ALL the file may hold bytes that are still to be named.
pub fn leave_absent(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
    if slot.in_place() && !slot.fills_all {
        let _gate = slot.mechanism.gate().read();
        if slot.gone().is_none() {
            // Pages with early bytes stay as they are, and none get any while this thread has them.
            let begun = slot.claims().begin_poison(pages.clone(), id);
            begun.runs.iter().for_each(|run| slot.scrub(run));
            slot.claims().suspend(pages.clone(), id);
        }
    }
    abandon(service, slot, id, pages);
}

/// Settles the pages of the claim `id` that were discarded or given back while it was filled: with the bytes that came
/// since, or as dropped.
pub fn settle_cancelled(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>) {
    while slot.claims().has_early_or_cancelled(pages, id) {
        install_early(service, slot, id, pages);
        let gate = slot.mechanism.gate().read();
        let whole = install::settle_cancelled(service, slot, id, pages.clone());
        drop(gate);
        if whole {
            complete::tell_whole(service, slot);
        }
    }
}

/// Installs what the claim `id` still owns of `pages` with `bytes`. Pages that were discarded meanwhile get the bytes
/// that came since, if any did. Returns how many pages were installed with `bytes`.
pub fn install(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    pages: Range<u64>,
    bytes: Bytes<'_>,
) -> (u64, Result<(), Failed>) {
    let outcome = install::install(service, slot, id, pages.clone(), bytes);
    after_install(service, slot, id, &pages, outcome)
}

/// The second half of `install`, for a caller that has installed the pages itself.
pub fn after_install(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    pages: &Range<u64>,
    outcome: Outcome,
) -> (u64, Result<(), Failed>) {
    if outcome.cancelled {
        settle_cancelled(service, slot, id, pages);
    }
    (outcome.installed, outcome.result)
}

pub fn could_not(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>, errno: Errno) {
    if slot.gone().is_some() {
        abandon_quietly(service, slot, id, pages);
    } else if errno == Errno::FAULT && slot.shared.is_some() {
        // The bytes were dropped from the file before they were installed: MADV_REMOVE drops them some time after its event.
        // The waiters are served anew.
        abandon(service, slot, id, pages);
    } else if errno == Errno::CANCELED {
        leave_to_the_end(service, slot, id, pages);
    } else {
        poison(service, slot, id, pages, &errno.into(), "could not be made present");
    }
}

/// Installs bytes that kuf_resolve supplied for `pages` while the callback was running.
pub fn install_early(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>) {
    let patience = RetryLimits::default();
    let next = || slot.claims().early(pages, id);
    while let Some((pages, bytes)) = next() {
        if let Early::Poison = bytes {
            poison(service, slot, id, pages, &Errno::IO.into(), "poisoned by kuf_resolve");
            continue;
        }
        let mut left = pages.clone();
        let held = |left: &Range<u64>| slot.claims().held(left, id);
        while let Some(part) = held(&left) {
            let result = install_early_run(service, slot, id, &part, (&bytes, pages.start), &patience);
            let Err(Failed { page, errno }) = result else {
                left.start = part.end;
                continue;
            };
            left.start = page;
            // The page was dropped from the file in between, and is written again. Bytes that were only in place are lost.
            let again = errno == Errno::FAULT && slot.shared.is_some() && !matches!(bytes, Early::InPlace);
            if !again || !patience.for_memory(Instant::now()) {
                could_not(service, slot, id, left, errno);
                break;
            }
        }
    }
}

/// Installs `pages` with early bytes, which begin at page `base`.
fn install_early_run(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    pages: &Range<u64>,
    (bytes, base): (&Early, u64),
    patience: &RetryLimits,
) -> Result<(), Failed> {
    let from = ((pages.start - base) * slot.granule) as usize;
    let len = ((pages.end - pages.start) * slot.granule) as usize;
    // Bytes that are in place already may have been dropped since: the page must not be made anew for them.
    let written = matches!(bytes, Early::Data(_) | Early::Zero);
    let at = if written { place_in(service, slot, pages, patience) } else { Ok(None) };
    let at = at.map_err(|errno| Failed { page: pages.start, errno })?;
    let bytes = match (bytes, at) {
        (Early::Data(bytes), Some(at)) => {
            // SAFETY: `place` made these bytes writable, and the claim makes them this thread's; `bytes` has as many.
            unsafe { at.copy_from_nonoverlapping(NonNull::from(&bytes[from..from + len]).cast(), len) };
            Bytes::plain(Content::Map, pages.start)
        }
        (Early::Data(bytes), None) => Bytes::plain(Content::Copy(bytes[from..].as_ptr()), pages.start),
        (Early::Zero, Some(at)) => {
            // SAFETY: as above.
            unsafe { at.write_bytes(0, len) };
            Bytes::zero_in_place(pages.start)
        }
        (Early::Zero, None) => Bytes::plain(Content::Zero, pages.start),
        (Early::InPlace | Early::Poison, _) => Bytes::plain(Content::Map, pages.start),
    };
    install::install(service, slot, id, pages.clone(), bytes).result
}

/// Where to write `pages` in place, if that is how the slot is filled. A shortage of memory is waited out.
pub fn place_in(
    service: &Service,
    slot: &Slot,
    pages: &Range<u64>,
    patience: &RetryLimits,
) -> Result<Option<NonNull<u8>>, Errno> {
    retry::patiently(service, patience, || slot.binding.in_place_buffer(pages))
}

/// Poisons the pages that the claim `id` owns of `pages`, and raises the event. Returns how many were lost.
pub fn poison(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>, failure: &Failure, why: &str) -> u64 {
    let Some(telling) = EventPin::of_claimed(slot, &pages, id) else { return 0 };
    let (gpa, len) = slot.gpa_of(&pages);
    let lost = lose(service, slot, id, &pages, None);
    // Bytes may have come for a part at the last moment: that part was neither poisoned nor made inaccessible.
    abandon(service, slot, id, pages);
    let (kind, how) = match lost {
        Lost { poisoned: 0, closed: 0, .. } => return 0,
        Lost { closed: 0, .. } => (KUF_EVENT_POISONED, "poisoned"),
        Lost { all: true, .. } => (KUF_EVENT_INACCESSIBLE, "made inaccessible"),
        Lost { .. } => (KUF_EVENT_INACCESSIBLE, "left absent: a thread that touches it stays blocked"),
    };
    let text = words!("guest memory {gpa:#x}..{:#x} {why} ({failure}): {how}", gpa + len);
    let event = Event { kind, gpa, len, error: Some(failure.errno()), text: &text, opaque: Some(slot.opaque) };
    service.config.callbacks.event_of(Some(&telling), &event);
    lost.poisoned + lost.closed
}

/// Pages that a claim has lost.
#[derive(Clone, Copy, Default)]
pub struct Lost {
    pub poisoned: u64,
    /// Made inaccessible, or left closed where that is not possible.
    pub closed: u64,
    /// All that could not be poisoned were made inaccessible.
    pub all: bool,
}

/// Poisons the pages that the claim `id` owns of `pages`, or makes them inaccessible. `patience`: for the end of the slot, for
/// which no bytes come any more.
pub fn lose(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>, patience: Option<&RetryLimits>) -> Lost {
    if slot.in_place() {
        // Bytes that a failed fill has left there are not valid.
        let _ = slot.each_held(id, pages, |run| {
            slot.scrub(&run);
            Ok::<_, i32>(())
        });
    }
    let content = Content::Poison { at_end: patience.is_some() };
    let bytes = Bytes { patience, ..Bytes::plain(content, pages.start) };
    let Outcome { installed: poisoned, result, .. } = install::install(service, slot, id, pages.clone(), bytes);
    match result {
        Ok(()) => Lost { poisoned, closed: 0, all: true },
        Err(failed) if failed.errno == Errno::CANCELED && patience.is_none() && service.ends(slot) => {
            leave_to_the_end(service, slot, id, pages.clone());
            Lost { poisoned, closed: 0, all: true }
        }
        Err(failed) => {
            let (closed, all) = close_claimed(service, slot, id, &(failed.page..pages.end));
            Lost { poisoned, closed, all }
        }
    }
}

/// Makes inaccessible the pages that the claim `id` owns of `pages` and that could not be poisoned. Parts with early bytes
/// stay the claim's. Returns how many pages were lost, and whether all of them were made inaccessible.
fn close_claimed(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>) -> (u64, bool) {
    let (mut closed, mut all, mut from) = (0, true, pages.start);
    while from < pages.end {
        let _gate = slot.mechanism.gate().read();
        let begun = slot.claims().begin_poison(from..pages.end, id);
        for run in &begun.runs {
            all &= close_off_with_gate(slot, run);
            closed_off(service, slot, id, run);
            closed += run.end - run.start;
        }
        from = begun.until;
    }
    (closed, all)
}

/// Books `pages` of the claim `id` as lost without poison: they are inaccessible, or their touchers stay blocked.
pub fn closed_off(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>) {
    let waiters = slot.settle(|claims| claims.poison(pages.clone(), id));
    install::ended(service, slot, waiters, service.stats.here());
    service.stats.here().bytes_poisoned((pages.end - pages.start) * slot.granule);
}

/// Makes touching `pages` fail where they could not be poisoned. False: there is no way.
pub fn close_off(slot: &Slot, pages: &Range<u64>) -> bool {
    let _gate = slot.mechanism.gate().read();
    close_off_with_gate(slot, pages)
}

/// With the gate held, so that the slot stays: its addresses are other memory once it has gone.
fn close_off_with_gate(slot: &Slot, pages: &Range<u64>) -> bool {
    if slot.gone().is_some() {
        return false;
    }
    let closed = slot.binding.make_inaccessible(pages);
    slot.stays.fetch_or(!closed, Ordering::SeqCst);
    closed
}

/// The slot or the handle ends, and the kernel refuses the bytes of the claim `id` for `pages`: the end poisons them, or
/// leaves them to the next handler. Their waiters touch them again then.
pub fn leave_to_the_end(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
    abandon_quietly(service, slot, id, pages.clone());
    slot.binding.wake(&pages);
}
