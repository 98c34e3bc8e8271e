//! Events that are read when other memory has come to their addresses, in every order.

use std::ops::Range;

use crate::abi::*;
use crate::mechanism::Message;
use crate::memory::Slot;
use crate::pages::State;
use crate::service::config::NewMemory;
use crate::service::queues::{events, read};
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::{rig, Rig};
use crate::service::tests::rig::{mapping, memory, LEN, PAGES};
use crate::sync::Arc;

/// Two slots, and addresses that are no slot's.
struct Two {
    rig: Rig,
    first: Arc<Slot>,
    second: Arc<Slot>,
    place: Range<u64>,
    other: Range<u64>,
    free: [Range<u64>; 2],
}

fn two() -> Option<Two> {
    let rig = rig()?;
    let (gpa, hva) = (1 << 32, mapping());
    rig.service.add(NewMemory { gpa, ..memory(hva) }).unwrap();
    let (first, second) = (rig.slot(), rig.service.memory.map().starting_at(gpa).unwrap().clone());
    let free = [mapping(), mapping()].map(|at| at..at + LEN);
    Some(Two { first, second, place: rig.hva..rig.hva + LEN, other: hva..hva + LEN, free, rig })
}

fn moved(from: &Range<u64>, to: &Range<u64>) -> Message {
    Message::Moved { from: from.clone(), to: to.start }
}

fn unmapped(range: &Range<u64>) -> Message {
    Message::Unmapped(range.clone())
}

impl Two {
    /// Applies events, and looks what that has made of the slots before any more are read.
    fn apply(&self, events: impl IntoIterator<Item = Message>, look: impl FnOnce()) {
        let _gate = self.first.mechanism.gate().write();
        self.apply_more(events);
        look();
    }

    /// With the gate held.
    fn apply_more(&self, events: impl IntoIterator<Item = Message>) {
        let queue = self.rig.service.queues.list()[0].clone();
        events::apply(&self.rig.service, &queue, &mut events.into_iter().collect(), &mut Vec::new());
    }

    /// Fails unless the slot, and no other, has these addresses.
    fn assert_at(&self, slot: &Arc<Slot>, place: &Range<u64>) {
        let map = self.rig.service.memory.map();
        let its: Vec<_> = map.within_hva(slot.mechanism.id(), place.clone()).collect();
        let [(found, bytes)] = &its[..] else { panic!("{} slots have {place:#x?}", its.len()) };
        assert!(Arc::ptr_eq(found, slot), "the slot at {place:#x?} is at gpa {:#x}", found.gpa);
        assert_eq!(*bytes, 0..LEN);
        assert_eq!(slot.hva_of(0), Some((place.start, PAGES)));
    }

    /// Puts the slots that were not unmapped back to where they are in truth.
    fn end(self, first: Option<&Range<u64>>, second: Option<&Range<u64>>) {
        let back = [(first, &self.free[1], &self.place), (second, &self.free[0], &self.other)];
        let steps = back.iter().filter_map(|(now, between, _)| Some(moved((*now)?, between)));
        let steps: Vec<_> =
            steps.chain(back.iter().filter_map(|(now, from, to)| now.map(|_| moved(from, to)))).collect();
        self.apply(steps, || {});
        self.rig.end(KUF_END_POISON);
    }
}

fn removed(slot: &Slot) -> u64 {
    slot.pages.count(State::Removed)
}

#[test]
fn a_slot_that_moves_to_where_another_was_is_not_unmapped_with_it() {
    let Some(two) = two() else { return };
    let Two { place, other, first, second, .. } = &two;
    let free = two.free[0].clone();
    two.apply([moved(place, &free), moved(other, place), unmapped(place), unmapped(other)], || {
        two.assert_at(first, &free);
        two.assert_at(second, place);
        assert_eq!((removed(first), removed(second)), (0, 0));
    });
    let place = place.clone();
    two.end(Some(&free), Some(&place));
}

#[test]
fn each_unmap_that_is_to_come_is_left_out_once() {
    let Some(two) = two() else { return };
    let Two { place, other, first, second, free, .. } = &two;
    let half = place.start..place.start + LEN / 2;
    // Both have been there and have moved on, and the second is there again.
    let there = [moved(place, &free[0]), moved(other, place), moved(place, &free[1]), moved(&free[1], place)];
    two.apply(there.into_iter().chain([unmapped(place), unmapped(&half)]), || {
        two.assert_at(second, place);
        assert_eq!(removed(second), 0);
    });
    two.apply([moved(place, other), moved(other, place), unmapped(place), unmapped(place), unmapped(place)], || {
        assert_eq!((removed(first), removed(second)), (0, PAGES));
    });
    let free = free[0].clone();
    two.end(Some(&free), None);
}

#[test]
fn a_slot_whose_place_is_taken_is_where_its_own_event_says() {
    let Some(two) = two() else { return };
    let Two { place, other, first, second, .. } = &two;
    let free = two.free[0].clone();
    two.apply([moved(other, place), unmapped(other), moved(place, &free), unmapped(place)], || {
        two.assert_at(first, &free);
        two.assert_at(second, place);
        assert_eq!((removed(first), removed(second)), (0, 0));
    });
    let place = place.clone();
    two.end(Some(&free), Some(&place));
}

#[test]
fn a_slot_whose_place_is_taken_is_unmapped_by_the_next_event() {
    let Some(two) = two() else { return };
    let Two { place, other, first, second, .. } = &two;
    let half = place.start + LEN / 2..place.end;
    two.apply([moved(other, place), unmapped(&half)], || {
        two.assert_at(second, place);
        assert_eq!((removed(first), removed(second)), (PAGES / 2, 0));
        two.apply_more([unmapped(place)]);
        assert_eq!((removed(first), removed(second)), (PAGES, PAGES / 2));
    });
    two.rig.end(KUF_END_POISON);
}

#[test]
fn a_slot_whose_place_is_taken_without_an_event_is_unmapped() {
    let Some(two) = two() else { return };
    let Two { place, other, first, second, .. } = &two;
    two.apply([moved(other, place)], || two.assert_at(second, place));
    let queue = two.rig.service.queues.list()[0].clone();
    read::drain_mechanism(&two.rig.service, &queue.mechanism);
    assert_eq!((removed(first), removed(second)), (PAGES, 0));
    assert_eq!(first.hva_of(0), None);
    let place = place.clone();
    two.end(None, Some(&place));
}
