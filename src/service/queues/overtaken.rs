//! Events that are read when other memory is already at their addresses.
//!
//! The kernel sends an event after the mapping has changed, and the next one when that event was read: mremap(2) makes
//! a REMAP and then an UNMAP of the old addresses, munmap(2) an UNMAP for each userfaultfd. Another thread's mremap may
//! move the memory of another slot to these addresses at any moment, and its REMAP may be read first. kuf_add_memory
//! waits for a moment without events; mremap does not. So each queue keeps a list of the UNMAPs that are still to come
//! of memory that is known to have left: these change nothing any more. And if memory moves to the place of a slot,
//! that slot's memory must have left: until its own event is read, the map has the slot *aside*, at addresses where no
//! memory can be.
//!
//! Which of two slots an event is about is known where they are under different userfaultfds, for each reports its own
//! memory. Under one it is known only as long as they leave the place in the order in which they came: an mremap of the
//! second that is read before that of the first is taken for the first one's.

use std::ops::Range;

use crate::memory::ranges::{take_once, take_within};
use crate::memory::Slot;
use crate::service::queues::KernelQueue;
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::{lock, Arc, Mutex};

/// No process has memory at this address or above. A slot that is aside from an address is at a multiple of this above
/// that address.
const ASIDE: u64 = 1 << 57;

/// How many slots can be aside from one address: each came there before any event of the one before it was read.
const LEVELS: Range<u64> = 1..64;

/// The most coming UNMAP events that a queue remembers: a thread has one on its way, and a userfaultfd may report moves
/// but no UNMAP.
const MOST: usize = 256;

/// Memory has left `hva`, and this queue will report an UNMAP of it.
fn owes(queue: &KernelQueue, hva: Range<u64>) {
    let mut owed = lock(&queue.leftovers.owed);
    if owed.len() >= MOST {
        owed.remove(0);
    }
    owed.push(hva);
    queue.leftovers.owes.store(true, Ordering::Relaxed);
}

/// No UNMAP of memory that has left is to come any more. The gate is held exclusively.
pub fn owes_nothing(queue: &KernelQueue) {
    let mut owed = lock(&queue.leftovers.owed);
    owed.clear();
    queue.leftovers.owes.store(false, Ordering::Relaxed);
}

/// An UNMAP event of `range` was read. Returns the parts that apply to slots. The gate is held exclusively.
pub fn unmapped(service: &Service, queue: &KernelQueue, range: &Range<u64>) -> Vec<Range<u64>> {
    let (news, still_owed) = {
        let mut owed = lock(&queue.leftovers.owed);
        let news = take_once(&mut owed, range);
        queue.leftovers.owes.store(!owed.is_empty(), Ordering::Relaxed);
        (news, owed.clone())
    };
    // If another UNMAP is still to come here, this one is of memory that has left before.
    let mut gone = vec![range.clone()];
    still_owed.iter().for_each(|part| drop(take_within(&mut gone, part)));
    gone.iter().for_each(|part| queue.leftovers.forget_left(part));
    news.iter().for_each(|part| queue.leftovers.forget(part));
    news.iter().for_each(|part| owed_by_others(service, queue, part));
    news
}

/// munmap(2) makes an event for each queue that has a part of the range, and no such queue is quiet before its event was
/// read. All of the range is unmapped now.
fn owed_by_others(service: &Service, queue: &KernelQueue, range: &Range<u64>) {
    let id = queue.mechanism.id();
    let is_other = |other: &KernelQueue| other.mechanism.id() == id && other.number != queue.number;
    for other in service.queues.list().iter().filter(|other| is_other(other) && !other.is_quiet()) {
        owes(other, range.clone());
    }
}

/// Memory has moved away from `from` to `to`. The gate is held exclusively.
pub fn moved(service: &Service, queue: &KernelQueue, from: &Range<u64>, to: &Range<u64>) {
    let within = |list: &Mutex<Vec<Range<u64>>>, range| take_within(&mut lock(list).clone(), range);
    let owes_once = |queue: &KernelQueue, range: Range<u64>| {
        let mut rest = vec![range];
        lock(&queue.leftovers.owed).iter().for_each(|part| drop(take_within(&mut rest, part)));
        rest.into_iter().for_each(|part| owes(queue, part));
    };
    for other in service.queues.list().iter().filter(|other| other.mechanism.id() == queue.mechanism.id()) {
        // The memory there before was unmapped or moved, or the kernel would not have moved memory there. If this
        // mremap unmapped it, the UNMAP of that was read before.
        let there = [within(&other.leftovers.left, to), within(&other.ended, to)];
        there.into_iter().flatten().for_each(|part| owes_once(other, part));
    }
    // If the memory that was left behind moves, it was not unmapped then: it is now.
    let mut first = vec![from.clone()];
    for part in within(&queue.leftovers.left, from) {
        let _ = take_within(&mut first, &part);
        owes_once(queue, part);
    }
    first.into_iter().for_each(|part| owes(queue, part));
}

/// The memory that an event of `hva` which `queue` has reported is about, in parts: where the map has it, and the address
/// in `hva` where the part begins. A slot that is aside from there has left before the one that is there now, unless none
/// of it is under this queue: then its own event is still to come.
pub fn known_as(service: &Service, queue: &KernelQueue, hva: &Range<u64>) -> Vec<(Range<u64>, u64)> {
    let mut rest = vec![hva.clone()];
    let mut found = Vec::new();
    let mut is_its_own = false;
    let map = service.memory.map();
    let id = queue.mechanism.id();
    let aside = map.within_hva(id, ASIDE..u64::MAX).zip(map.mapped_in(id, ASIDE..u64::MAX));
    for ((slot, bytes), aside) in aside {
        let level = aside.start / ASIDE * ASIDE;
        let parts = take_within(&mut rest, &(aside.start - level..aside.end - level));
        found.extend(parts.into_iter().map(|part| {
            let offset = bytes.start + (part.start + level - aside.start);
            is_its_own |= is_under(slot, queue, offset..offset + (part.end - part.start));
            (part.start + level..part.end + level, part.start)
        }));
    }
    if !is_its_own {
        return vec![(hva.clone(), hva.start)];
    }
    found.extend(rest.into_iter().map(|part| (part.clone(), part.start)));
    found
}

/// Whether `queue` reports any of these bytes of the slot.
fn is_under(slot: &Slot, queue: &KernelQueue, bytes: Range<u64>) -> bool {
    let mut from = bytes.start;
    while from < bytes.end {
        let (number, same) = slot.binding.queue_at(from);
        if number == queue.number {
            return true;
        }
        from = from.saturating_add(same);
    }
    false
}

/// Where the map is to have the slots that were at `place`, to which other memory has moved.
pub fn aside_from(service: &Service, queue: &KernelQueue, place: &Range<u64>) -> Option<u64> {
    let map = service.memory.map();
    let is_free = |by: u64| map.mapped_in(queue.mechanism.id(), place.start + by..place.end + by).next().is_none();
    if is_free(0) {
        return None;
    }
    queue.leftovers.aside.store(true, Ordering::Relaxed);
    let level = LEVELS.map(|level| level * ASIDE).find(|by| is_free(*by)).unwrap_or(ASIDE);
    Some(place.start + level)
}

/// The slots that are still aside when no event is on its way: their end was not reported. The gate is held
/// exclusively, and all messages that were read of the mechanism's queues have been applied.
pub fn still_aside(service: &Service, queue: &KernelQueue) -> Vec<Range<u64>> {
    let (id, aside) = (queue.mechanism.id(), &queue.leftovers.aside);
    let its = |other: &&Arc<KernelQueue>| other.mechanism.id() == id;
    if !aside.load(Ordering::Relaxed) || !service.queues.list().iter().filter(its).all(|other| other.is_quiet()) {
        return Vec::new();
    }
    aside.store(false, Ordering::Relaxed);
    service.memory.map().mapped_in(id, ASIDE..u64::MAX).collect()
}
