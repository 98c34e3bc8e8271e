//! Events of the kernel: memory that was given back, unmapped or moved, and forks.

use std::ops::Range;

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::{needed, patiently, NoMemory};
use crate::error::{words, Words};
use crate::mechanism::{Address, Message};
use crate::memory::ranges::take_within;
use crate::memory::Slot;
use crate::pages::claims::Settled;
use crate::service::fault::complete;
use crate::service::fault::notice::Notice;
use crate::service::queues::{children, overtaken, stray, KernelQueue};
use crate::service::{Fault, Service, Work};
use crate::stats::trace;
use crate::sync::atomic::Ordering;
use crate::sync::time::Instant;
use crate::sync::{lock, Arc};

/// Applies events in their order, then looks up where the faults are. Leaves `messages` empty.
pub fn apply(service: &Service, queue: &Arc<KernelQueue>, messages: &mut Vec<Message>, work: &mut Vec<Work>) {
    let id = queue.mechanism.id();
    let read_at = Instant::now();
    let mut remapped = false;
    messages.retain_mut(|message| {
        if matches!(message, Message::Fault { .. }) {
            return true;
        }
        remapped |= apply_event(service, queue, std::mem::replace(message, Message::Lost), work);
        false
    });
    if remapped {
        unpark(service, id, true);
    }
    count_faults(service, messages);
    let map = service.memory.map();
    for message in messages.drain(..) {
        let Message::Fault { at, flags, thread } = message else { continue };
        match (map.at(id, at), at) {
            (Some((slot, page)), _) => {
                work.push(Work::Fault(fault(service, slot, page, flags, thread, read_at)));
            }
            // The caller registered this address and may be about to add its slot: the fault waits, so that it does not
            // spin.
            (None, Address::Hva(hva)) if !stray::stray(service, queue, hva, read_at) => {
                lock(&queue.parked).entry((hva, thread)).or_insert((flags, read_at));
            }
            (None, Address::Hva(_)) => {}
            (None, Address::Gpa(_)) => service.stats.here().faults_unknown(1),
        }
    }
}

/// Called before any waiter wakes, so that a thread that goes on finds its fault counted.
fn count_faults(service: &Service, faults: &[Message]) {
    let stats = service.stats.here();
    let having = |flag| {
        let has = |fault: &&Message| matches!(fault, Message::Fault { flags, .. } if flags & flag != 0);
        faults.iter().filter(has).count() as u64
    };
    stats.faults(faults.len() as u64);
    stats.faults_minor(having(KUF_FAULT_MINOR));
    stats.faults_write(having(KUF_FAULT_WRITE));
}

fn fault(service: &Service, slot: &Arc<Slot>, page: u64, flags: u32, thread: u32, read_at: Instant) -> Fault {
    trace::fault_read(service, slot.gpa_of(&(page..page + 1)).0, flags, thread);
    let wait = service.stats.all_blocked.wait(thread, (Arc::as_ptr(slot).addr(), page), read_at);
    Fault { slot: slot.clone(), page, flags, wait }
}

/// Applies one event. Returns whether it changed which addresses are guest memory.
fn apply_event(service: &Service, queue: &Arc<KernelQueue>, message: Message, work: &mut Vec<Work>) -> bool {
    let id = queue.mechanism.id();
    let remaps = matches!(message, Message::Unmapped(_) | Message::Moved { .. });
    match message {
        Message::Fault { .. } => {}
        Message::Removed(range) => {
            service.stats.here().events_remove(1);
            remove_range(service, id, &range, work);
            note_given_back(service, queue, range);
        }
        Message::Unmapped(range) => {
            service.stats.here().events_unmap(1);
            for part in overtaken::unmapped(service, queue, &range) {
                unmap_range(service, queue, &part, work);
                // A removal in the old mapping does not apply to the next mapping at these addresses.
                let _ = take_within(&mut lock(&queue.given_back), &part);
            }
            queue.mechanism.wake_range(range);
        }
        Message::Moved { from, to } => {
            service.stats.here().events_remap(1);
            stray::moved_away(service, queue, &from, to);
            note(service, KUF_LOG_DEBUG, || words!("hva {from:#x?} moved to {to:#x}"), work);
            let (its, place) = (overtaken::known_as(service, queue, &from), to..to + (from.end - from.start));
            if let Some(aside) = overtaken::aside_from(service, queue, &place) {
                move_slots(service, id, &place, Some(aside));
            }
            for (part, at) in its {
                move_slots(service, id, &part, Some(to + (at - from.start)));
            }
            let moved = take_within(&mut lock(&queue.given_back), &from);
            for range in moved {
                let at = |hva| to + (hva - from.start);
                note_given_back(service, queue, at(range.start)..at(range.end));
            }
            // The kernel does not wake the threads that wait at the page's old address.
            queue.mechanism.wake_range(from);
        }
        Message::Forked(fd) => {
            service.stats.here().events_fork(1);
            children::follow_fork(service, queue, fd, work);
        }
        Message::Lost => {
            service.stats.here().faults_lost(1);
            begin_sweep(service, work);
        }
        Message::Unsignalled => {
            service.stats.here().faults_unsignalled(1);
            warn_of_signals(service, work);
        }
    }
    remaps
}

/// An adopted userfaultfd may report a removal before its slot is added: the range is kept until then.
fn note_given_back(service: &Service, queue: &KernelQueue, range: Range<u64>) {
    if !queue.mechanism.facts().adopted {
        return;
    }
    let mut rest = stray::in_no_slot(service, queue, vec![range]);
    lock(&queue.ended).iter().for_each(|ended| drop(take_within(&mut rest, ended)));
    let mut given_back = lock(&queue.given_back);
    for range in rest {
        let _ = take_within(&mut given_back, &range);
        let at = given_back.partition_point(|other| other.end < range.start);
        let end =
            given_back[at..].iter().position(|other| other.start > range.end).map_or(given_back.len(), |n| at + n);
        let touching = &given_back[at..end];
        let start = touching.first().map_or(range.start, |first| first.start.min(range.start));
        let last = touching.last().map_or(range.end, |last| last.end.max(range.end));
        given_back.splice(at..end, std::iter::once(start..last));
    }
}

/// Applies earlier removals to a slot that was just added. The caller holds the gate exclusively.
pub fn apply_given_back(service: &Service, slot: &Arc<Slot>, work: &mut Vec<Work>) {
    let Some(queue) = service.queues.first(slot.mechanism.id()) else { return };
    slot.each_extent(|extent| {
        let ranges = take_within(&mut lock(&queue.given_back), &(extent.hva..extent.hva + extent.len));
        for range in ranges {
            let offset = |hva| extent.offset + (hva - extent.hva);
            give_back(service, slot, slot.pages_inside(&(offset(range.start)..offset(range.end))), work);
        }
    });
}

/// Looks again at faults that were in no slot: one was added (`mechanism`'s), or a mapping changed.
pub fn unpark(service: &Service, mechanism: u32, wake_rest: bool) {
    let Some(queue) = service.queues.first(mechanism) else { return };
    let map = service.memory.map();
    let mut found = Vec::new();
    lock(&queue.parked).retain(|(hva, thread), (flags, read_at)| match map.at_hva(mechanism, *hva) {
        Some((slot, page)) => {
            found.push(fault(service, slot, page, *flags, *thread, *read_at));
            false
        }
        None if wake_rest => {
            service.stats.here().faults_unknown(1);
            queue.mechanism.wake_range(*hva..*hva + 1);
            false
        }
        None => true,
    });
    found.into_iter().for_each(|fault| service.push(Work::Fault(fault)));
}

/// A log record to be passed on when the gate is free again.
fn note(service: &Service, level: u32, text: impl FnOnce() -> Words, work: &mut Vec<Work>) {
    if service.config.callbacks.wants(level) {
        work.push(Work::Log(level, text()));
    }
}

/// The slots' mappings have changed. The change cannot be refused: see [`crate::service::fault::shortage::end_if_lost`].
fn move_slots(service: &Service, mechanism: u32, hva: &Range<u64>, to: Option<u64>) {
    if patiently(|| needed(|| service.memory.moved(mechanism, hva, to)).map_err(|_| NoMemory)).is_err() {
        // The addresses may be another mapping's: they are left alone, and absent pages stay absent.
        for (slot, _) in service.memory.map().within_hva(mechanism, hva.clone()) {
            slot.stays.store(true, Ordering::SeqCst);
            slot.gone.store(Errno::CANCELED.raw_os_error(), Ordering::Release);
        }
    }
}

fn remove_range(service: &Service, mechanism: u32, hva: &Range<u64>, work: &mut Vec<Work>) {
    note(service, KUF_LOG_DEBUG, || words!("hva {hva:#x?} removed"), work);
    for (slot, offsets) in service.memory.map().within_hva(mechanism, hva.clone()) {
        give_back(service, slot, slot.pages_inside(&offsets), work);
    }
}

fn unmap_range(service: &Service, queue: &KernelQueue, hva: &Range<u64>, work: &mut Vec<Work>) {
    let mechanism = queue.mechanism.id();
    for (part, _) in overtaken::known_as(service, queue, hva) {
        note(service, KUF_LOG_DEBUG, || words!("hva {part:#x?} unmapped"), work);
        let map = service.memory.map();
        let its: Vec<_> = map.within_hva(mechanism, part.clone()).map(|(slot, bytes)| (slot.clone(), bytes)).collect();
        drop(map);
        // First, for pages of a slot that ends are unregistered, and other memory may be at their addresses.
        move_slots(service, mechanism, &part, None);
        its.iter().for_each(|(slot, bytes)| give_back(service, slot, slot.pages_inside(bytes), work));
    }
}

/// No event is on its way any more that could be about memory whose place was taken by other memory: see
/// [`overtaken::still_aside`].
pub fn unmap_aside(service: &Service, queue: &KernelQueue, work: &mut Vec<Work>) {
    for range in overtaken::still_aside(service, queue) {
        unmap_range(service, queue, &range, work);
    }
}

/// Marks pages as given back by the guest. The caller holds the gate exclusively.
pub fn give_back(service: &Service, slot: &Arc<Slot>, pages: Range<u64>, work: &mut Vec<Work>) {
    use crate::pages::State;
    slot.scrub_absent(&pages);
    let Settled { waiters, whole } = slot.settle(|claims| {
        // A removal cannot be refused. If there is no memory to record it, the service ends: see `end_if_lost`.
        let _ = patiently(|| needed(|| claims.reserve_ends(&slot.pages, &pages)));
        let before = slot.pages.count(State::Removed);
        let settled = claims.remove(&slot.pages, pages.clone(), slot.keeps_poison());
        service.stats.here().bytes_removed((slot.pages.count(State::Removed) - before) * slot.granule);
        settled
    });
    work.extend(waiters.into_iter().map(|waiter| Work::Fault(Fault::again(slot, waiter))));
    if slot.ending.load(Ordering::Acquire) {
        // The pages stay removed. A guest that gives memory back over and over cannot keep the end from poisoning the rest.
        let mut from = pages.start;
        while let Some(run) = slot.pages.first_run(from..pages.end, State::Removed, u64::MAX) {
            from = run.end;
            slot.binding.release(&run);
        }
    }
    if whole {
        work.extend(complete::completion(service, slot).map(Work::Notice));
    }
}

/// A fault was lost.
pub fn begin_sweep(service: &Service, work: &mut Vec<Work>) {
    if service.queues.begin_sweep() {
        work.push(Work::Sweep);
    }
}

/// The kernel's queue held faults that the library was not told of.
fn warn_of_signals(service: &Service, work: &mut Vec<Work>) {
    if service.queues.was_warned() {
        return;
    }
    let text = "KVM queued a fault and its signal did not come: another reader took it from the library's eventfd, or \
                KVM dropped it; the library looks for faults twice a second";
    let (kind, text) = (KUF_KVM_EVENT_UNSIGNALLED, text.into());
    work.push(Work::Notice(Notice { slot: None, kind, gpa: 0, len: 0, error: None, text }));
}
