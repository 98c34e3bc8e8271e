//! The end of slots: it poisons every page that was not filled, or makes it inaccessible.

use rustix::io::Errno;

use crate::abi::*;
use crate::error::words;
use crate::mechanism::Content;
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Id};

use crate::service::fault::pin::EventPin;
use crate::service::fault::retry::{Backoff, RetryLimits};
use crate::service::fault::settle;
use crate::service::queues::quiet;
use crate::service::threads::serve;
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc};
use std::ops::Range;

/// Runs of at least this many bytes are made inaccessible at the end instead of poisoned: poisoning goes page by page
/// through the kernel and makes page tables, 17 ms and 2 MiB for each GiB. The limit keeps the number of mappings
/// small.
const CLOSE_OFF: u64 = 1 << 30;

/// How long a thread that ends a slot waits for another one that ends it too: longer than the wait for any shortage of
/// memory. A slot with pages that are not poisoned then stays registered.
const POISONED: Duration = Duration::from_secs(10);

/// How long kuf_remove_memory waits for events of its slot that another thread raises.
const TOLD: Duration = Duration::from_secs(2);

const UNFILLED: &str = "was not filled before the end of its service";

/// As [`poison_all`], for one slot.
pub fn poison_rest(service: &Service, slot: &Arc<Slot>) {
    poison_all(service, [slot].into_iter());
}

/// Takes every unsettled page from its owner and poisons it. Late answers find no page to fill.
pub fn poison_all<'a>(service: &Service, slots: impl Iterator<Item = &'a Arc<Slot>> + Clone) {
    let shut = |slot: &Arc<Slot>| shut_unless(service, slot, |_, _| false);
    // Shut all slots first: from then on, pages that are given back in one are not in the way of another's end.
    slots.clone().for_each(|slot| _ = shut(slot));
    let patience = RetryLimits::default();
    slots.clone().for_each(|slot| shut(slot).into_iter().for_each(|id| poison_shut(service, slot, id, &patience)));
    slots.for_each(|slot| wait_until_poisoned(service, slot));
}

/// As [`poison_rest`], but returns false, with nothing changed, if `refuse` accepts the slot's claims.
pub fn poison_unless(
    service: &Service,
    slot: &Arc<Slot>,
    refuse: impl Fn(&Claims<Waiter>, &Range<u64>) -> bool,
) -> bool {
    let id = shut_unless(service, slot, refuse);
    id.is_some_and(|id| {
        poison_shut(service, slot, id, &RetryLimits::default());
        wait_until_poisoned(service, slot);
        wait_until_told(slot);
        true
    })
}

/// Returns when no thread is about to raise an event of a slot that was shut: a concurrent kuf_close may have taken
/// pages over and poisoned them. The wait is limited, for the event's callback may want a lock that the caller holds.
fn wait_until_told(slot: &Slot) {
    let until = Instant::now() + TOLD;
    while slot.is_pinned() && Instant::now() < until {
        thread::sleep(Duration::from_micros(50));
    }
}

/// Returns when every page of a slot that was shut is poisoned. Another thread that ends the slot too may have taken
/// pages over since, and unregistering the slot before that thread has poisoned them would show zeroes.
fn wait_until_poisoned(service: &Service, slot: &Arc<Slot>) {
    let until = Instant::now() + POISONED;
    while slot.gone().is_none() && slot.claims().to_be_poisoned() {
        if Instant::now() >= until {
            slot.stays.store(true, Ordering::SeqCst);
            return;
        }
        if service.check_open().is_err() {
            serve::serve_at_the_end(service);
        }
        thread::yield_now();
    }
}

/// Takes every unsettled page from its owner. None: `refuse` accepts the claims.
fn shut_unless(
    service: &Service,
    slot: &Arc<Slot>,
    refuse: impl Fn(&Claims<Waiter>, &Range<u64>) -> bool,
) -> Option<Id> {
    let (patience, mut waiting) = (RetryLimits::for_queue(), Backoff::default());
    // Dropping the waiters here ends their waits.
    let (id, _waiters) = loop {
        let mut claims = slot.claims();
        if refuse(&claims, &(0..slot.pages.total())) {
            return None;
        }
        // A page inside the kernel is present or dropped in a moment, so wait for it. In a failed service, or where its
        // REMOVE event cannot be read, it may stay there for ever.
        let all = 0..slot.pages.total();
        let dead = || service.life.is_dead() || service.queues.is_unread(&slot.mechanism);
        if !claims.in_kernel(&all) || dead() && patience.is_out(Instant::now()) {
            cut_off_if_written(slot, &claims);
            let shut = claims.shut(&slot.pages);
            slot.ending.store(true, Ordering::Release);
            slot.wake_sleepers(&claims);
            break shut;
        }
        drop(claims);
        // The page may wait for its REMOVE event to be read.
        quiet::wait_for_events(service, &slot.mechanism, &mut waiting);
        if service.check_open().is_err() {
            // The service threads may have ended.
            serve::serve_at_the_end(service);
        }
    };
    Some(id)
}

/// Poisons the pages that [`shut_unless`] has taken.
fn poison_shut(service: &Service, slot: &Arc<Slot>, id: Id, patience: &RetryLimits) {
    if slot.gone().is_none() {
        let (mut from, mut last) = (0, None);
        let mut next = || slot.claims().next_unsettled(&slot.pages, &mut from, id);
        // A run that comes twice could not be split for want of memory: leave it unpoisoned and armed.
        while let Some(run) = next().filter(|run| last.replace(run.clone()).as_ref() != Some(run)) {
            if !close_off_at_end(service, slot, id, &run) {
                let why = (Errno::CANCELED, UNFILLED);
                settle::poison_with(service, slot, id, run, Content::Poison { at_end: true }, why, Some(patience));
            }
        }
    }
}

/// Makes a long run that the claim `id` owns inaccessible, which takes little time and no page tables. False: the
/// caller is to poison it.
fn close_off_at_end(service: &Service, slot: &Arc<Slot>, id: Id, run: &Range<u64>) -> bool {
    let (gpa, len) = slot.gpa_of(run);
    if len < CLOSE_OFF || slot.facts().gates_kvm_only || slot.facts().remote {
        return false;
    }
    let Some(telling) = EventPin::of_claimed(slot, run, id) else { return false };
    {
        let _gate = slot.mechanism.gate().read();
        if slot.gone().is_some() {
            return false;
        }
        let mine = slot.claims().begin_install(run.clone(), id);
        // The caller may have resolved or discarded pages of the run since.
        let whole = mine.runs.first() == Some(run);
        if whole && slot.in_place() {
            // Drop the bytes that a failed fill has left there.
            slot.scrub(run);
        }
        if !whole || !slot.binding.make_inaccessible(run) {
            slot.claims().suspend(run.clone(), id);
            return false;
        }
        settle::closed_off(service, slot, id, run);
    }
    let text = words!("guest memory {gpa:#x}..{:#x} {UNFILLED}: made inaccessible", gpa + len);
    service.config.callbacks.event_of(Some(&telling), KUF_EVENT_INACCESSIBLE, gpa, len, Some(Errno::CANCELED), &text);
    true
}

/// Cuts the slot's second mapping off its file if a thread may be writing through it. Bytes written after the slot was
/// shut are not used, and by then the guest may have given the page back, or the file may be another owner's. The
/// claims are locked, so that no event is applied before.
pub fn cut_off_if_written(slot: &Slot, claims: &Claims<Waiter>) {
    if slot.parent.is_none() && claims.writing(&(0..slot.pages.total())) {
        slot.shared.iter().for_each(|shared| shared.cut_off());
    }
}
