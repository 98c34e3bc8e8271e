//! The end of slots: it poisons every page that was not filled, or makes it inaccessible.

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::Event;
use crate::error::words;
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Id};

use crate::service::fault::pin::EventPin;
use crate::service::fault::retry::{Backoff, RetryLimits};
use crate::service::fault::settle::{self, Lost};
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

/// What one end of a slot or a handle has taken from the guest, in bytes, and which of its events were raised.
#[derive(Default)]
pub struct Toll {
    poisoned: u64,
    inaccessible: u64,
    /// Of these: neither poisoned nor made inaccessible.
    left_closed: bool,
    told: [bool; 2],
}

impl Toll {
    fn add(&mut self, slot: &Slot, lost: Lost) {
        self.poisoned += lost.poisoned * slot.granule;
        self.inaccessible += lost.closed * slot.granule;
        self.left_closed |= lost.closed > 0 && !lost.all;
    }

    /// Raises an event of each kind that has something to tell and was not raised yet, of `slot` or of the handle.
    pub fn tell(&mut self, service: &Service, slot: Option<&Slot>, pin: Option<&EventPin<'_>>) {
        let closed = match self.left_closed {
            false => "made inaccessible",
            true => "made inaccessible or left closed, so that a thread that touches it stays blocked",
        };
        let kinds =
            [(KUF_EVENT_POISONED, self.poisoned, "poisoned"), (KUF_EVENT_INACCESSIBLE, self.inaccessible, closed)];
        for (told, (kind, bytes, how)) in self.told.iter_mut().zip(kinds) {
            if bytes == 0 || std::mem::replace(told, true) {
                continue;
            }
            let (gpa, len) = slot.map_or((0, 0), |slot| (slot.gpa, slot.len));
            let text = match slot {
                Some(_) => {
                    words!("{bytes} bytes of the memory slot at gpa {gpa:#x} were not filled before its end: {how}")
                }
                None => words!("{bytes} bytes of guest memory were not filled before the end of the service: {how}"),
            };
            let (error, opaque) = (Some(Errno::CANCELED), slot.map(|slot| slot.opaque));
            service.config.callbacks.event_of(pin, &Event { kind, gpa, len, error, text: &text, opaque });
        }
    }
}

/// A slot that was shut: its unsettled pages are poisoned.
pub struct Shut<'a> {
    /// Held until the events of it are raised, if any of its pages was poisoned by this thread.
    pub pin: Option<EventPin<'a>>,
}

/// As [`poison_all`], for one slot, with its events.
pub fn poison_rest(service: &Service, slot: &Arc<Slot>) {
    let mut toll = Toll::default();
    poison_all(service, [slot].into_iter(), &mut toll);
    toll.tell(service, Some(slot), None);
}

/// Takes every unsettled page from its owner and poisons it. Late answers find no page to fill.
pub fn poison_all<'a>(service: &Service, slots: impl Iterator<Item = &'a Arc<Slot>> + Clone, toll: &mut Toll) {
    let shut = |slot: &Arc<Slot>| shut_unless(service, slot, |_, _| false);
    // Shut all slots first: from then on, pages that are given back in one are not in the way of another's end.
    slots.clone().for_each(|slot| _ = shut(slot));
    let patience = RetryLimits::default();
    for slot in slots.clone() {
        if let Some(id) = shut(slot) {
            poison_shut(service, slot, id, &patience, toll);
        }
    }
    slots.for_each(|slot| wait_until_poisoned(service, slot));
}

/// As [`poison_rest`] without its events, but returns None, with nothing changed, if `refuse` accepts the slot's claims.
pub fn poison_unless<'a>(
    service: &Service,
    slot: &'a Arc<Slot>,
    refuse: impl Fn(&Claims<Waiter>, &Range<u64>) -> bool,
    toll: &mut Toll,
) -> Option<Shut<'a>> {
    let id = shut_unless(service, slot, refuse)?;
    let pin = poison_shut(service, slot, id, &RetryLimits::default(), toll);
    wait_until_poisoned(service, slot);
    Some(Shut { pin })
}

/// Returns when no thread is about to raise an event of a slot that was shut: a concurrent call that ends it may have taken
/// pages over and poisoned them. The wait is limited, for the event's callback may want a lock that the caller holds.
pub fn wait_until_told(slot: &Slot) {
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

/// Poisons the pages that [`shut_unless`] has taken. Returns a pin if there were any: a thread that removes the slot
/// meanwhile waits for the events.
fn poison_shut<'a>(
    service: &Service,
    slot: &'a Arc<Slot>,
    id: Id,
    patience: &RetryLimits,
    toll: &mut Toll,
) -> Option<EventPin<'a>> {
    let mut pin = None;
    if slot.gone().is_none() {
        let (mut from, mut last) = (0, None);
        let mut next = || slot.claims().next_unsettled(&slot.pages, &mut from, id);
        // A run that comes twice could not be split for want of memory: leave it unpoisoned and armed.
        while let Some(run) = next().filter(|run| last.replace(run.clone()).as_ref() != Some(run)) {
            let Some(here) = EventPin::of_claimed(slot, &run, id) else { continue };
            let lost = match close_off_at_end(service, slot, id, &run) {
                true => Lost { poisoned: 0, closed: run.end - run.start, all: true },
                false => settle::lose(service, slot, id, &run, Some(patience)),
            };
            toll.add(slot, lost);
            pin = pin.or(Some(here));
        }
    }
    pin
}

/// Makes a long run that the claim `id` owns inaccessible, which takes little time and no page tables. False: the
/// caller is to poison it.
fn close_off_at_end(service: &Service, slot: &Arc<Slot>, id: Id, run: &Range<u64>) -> bool {
    if slot.gpa_of(run).1 < CLOSE_OFF || slot.facts().gates_kvm_only || slot.facts().remote {
        return false;
    }
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
