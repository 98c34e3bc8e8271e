//! Faults and moved mappings in no slot.

use crate::mechanism::Stray;
use crate::memory::ranges::take_within;
use crate::service::queues::{overtaken, KernelQueue};
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::sync::time::Instant;
use std::ops::Range;

/// A fault in no slot, at `hva`. False: its slot may still be added, and the fault waits for that.
pub fn stray(service: &Service, queue: &KernelQueue, hva: u64, read_at: Instant) -> bool {
    if queue.mechanism.facts().adopted && !queue.leftovers.has(hva) {
        return false;
    }
    service.stats.here().faults_unknown(1);
    let page = hva - hva % rustix::param::page_size() as u64;
    // The toucher is woken first: the fault may be old, and the present mapping may be another handle's. While an event is
    // on its way it may yet turn out that the range was unmapped.
    if queue.mechanism.is_quiet(queue.number) && queue.leftovers.again(page, read_at) {
        queue.mechanism.disown(Stray::Page { queue: queue.number, hva: page });
        // No UNMAP event follows.
        queue.leftovers.forget_left(&(page..page + rustix::param::page_size() as u64));
        queue.forget_given_back(&(page..page + 1), true);
    } else {
        queue.mechanism.wake_range(page..page + 1);
    }
    true
}

/// A REMAP event was read, and is about to be applied. The gate is held exclusively.
pub fn moved_away(service: &Service, queue: &KernelQueue, from: &Range<u64>, to: u64) {
    // A slot that was aside leaves no memory behind: other memory has taken its place.
    let its = overtaken::known_as(service, queue, from);
    let leaves: Vec<_> = its.into_iter().filter(|(part, at)| part.start == *at).map(|(part, _)| part).collect();
    let map = service.memory.map();
    let has_slot = leaves.iter().any(|part| map.within_hva(queue.mechanism.id(), part.clone()).next().is_some());
    drop(map);
    let moved = |ranges: &[Range<u64>]| -> Vec<_> {
        let at = |hva| to + (hva - from.start);
        take_within(&mut ranges.to_vec(), from).into_iter().map(|part| at(part.start)..at(part.end)).collect()
    };
    let ended = moved(&lock(&queue.ended));
    let left_before = moved(&lock(&queue.leftovers.left));
    let new_place = to..to + (from.end - from.start);
    overtaken::moved(service, queue, from, &new_place);
    // The memory that was left at the new place is gone. The ranges stay disjoint, however often memory moves to and
    // fro.
    queue.leftovers.forget(from);
    let its = service.queues.list();
    let its = its.iter().filter(|other| other.mechanism.id() == queue.mechanism.id());
    its.for_each(|other| other.leftovers.forget(&new_place));
    let _ = take_within(&mut lock(&queue.ended), &new_place);
    if has_slot || !ended.is_empty() || !left_before.is_empty() {
        lock(&queue.leftovers.left).extend(leaves.into_iter().chain(left_before));
    }
    lock(&queue.leftovers.moved_on).extend(ended.iter().cloned());
    // The memory may move again.
    lock(&queue.ended).extend(ended);
}

/// No event is on its way any more of memory that was taken off or has moved. The gate is held exclusively.
pub fn no_event_is_late(service: &Service, queue: &KernelQueue) {
    lock(&queue.ended).clear();
    overtaken::owes_nothing(queue);
    unregister_moved(service, queue);
}

/// Unregisters memory that has moved while its slot was taken off.
pub fn unregister_moved(service: &Service, queue: &KernelQueue) {
    let moved = std::mem::take(&mut *lock(&queue.leftovers.moved_on));
    for range in in_no_slot(service, queue, moved) {
        drop(take_within(&mut lock(&queue.given_back), &range));
        queue.mechanism.disown(Stray::Range(range));
    }
}

/// The parts of `ranges` that are in no slot, or in one that was taken off.
pub fn in_no_slot(service: &Service, queue: &KernelQueue, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut rest = ranges.clone();
    let map = service.memory.map();
    for range in ranges {
        let its = map.within_hva(queue.mechanism.id(), range);
        for (slot, _) in its.filter(|(slot, _)| !slot.detached.load(Ordering::Acquire)) {
            slot.each_extent(|extent| drop(take_within(&mut rest, &(extent.hva..extent.hva + extent.len))));
        }
    }
    rest
}
