//! Claims under one thread; `tests/loom_claims.rs` has the concurrent cases.

use super::*;

struct NoWaiter;

impl Waits for NoWaiter {
    fn page(&self) -> u64 {
        0
    }
}

fn terms(owner: Owner) -> Terms {
    Terms { owner, in_place: true, demand: true, speculative: false, since: None }
}

fn slot() -> (Claims<NoWaiter>, Pages) {
    let (mut claims, pages) = (Claims::new(4096), Pages::new(4).unwrap());
    claims.reserve(&pages, &(0..4), true).unwrap();
    (claims, pages)
}

#[test]
fn shutting_a_slot_again_still_poisons_the_pages_that_were_being_dropped() {
    let (pages, mut claims) = (Pages::new(8).expect("memory"), Claims::<NoWaiter>::new(1));
    pages.transition(0..8, State::Absent, State::Present);
    let dropping = claims.begin_discard(&pages, 2..5, false).expect("memory");
    let (first, _) = claims.shut(&pages);
    let (second, _) = claims.shut(&pages);
    assert!(first != second && dropping.id != second);
    assert_eq!(claims.next_unsettled(&pages, &mut 0, second), Some(2..5));
    assert!(claims.to_be_poisoned());
}

#[test]
fn the_host_does_not_owe_a_page_that_it_has_given_up() {
    let (mut claims, pages) = slot();
    claims.claim(&pages, 0, 1, State::Absent, terms(Owner::Host)).unwrap();
    assert!(claims.may_be_owed(0));
    let taken = claims.take(&pages, 0..1, true, None);
    assert!(claims.may_be_owed(0), "what has it in hand may fail");
    drop(claims.poison(0..1, taken.id));
    assert!(!claims.may_be_owed(0), "kuf_read would look at it for ever");
    // The page is not owed either when putting its mark back fails.
    let id = claims.begin_mark(0).unwrap();
    claims.suspend(0..1, id);
    assert!(!claims.may_be_owed(0));
}

#[test]
fn a_page_discarded_while_it_is_made_zero_is_poisoned_at_the_end() {
    let (mut claims, pages) = slot();
    drop(claims.remove(&pages, 0..1, true));
    claims.claim(&pages, 0, 1, State::Removed, terms(Owner::Fill)).unwrap();
    let begun = claims.begin_discard(&pages, 0..1, false).unwrap();
    assert!(begun.runs.is_empty(), "it is in hand");
    let (id, _) = claims.shut(&pages);
    assert_eq!(pages.get(0), State::Filling);
    assert_eq!(claims.next_unsettled(&pages, &mut 4, id), Some(0..1), "it is to be poisoned");
}

#[test]
fn a_page_that_is_being_made_zero_stays_so_when_it_is_given_back_again() {
    let (mut claims, pages) = slot();
    for in_place in [true, false] {
        drop(claims.remove(&pages, 0..1, true));
        let terms = Terms { in_place, ..terms(Owner::Fill) };
        let (id, _) = claims.claim(&pages, 0, 1, State::Removed, terms).unwrap();
        drop(claims.remove(&pages, 0..1, true));
        let begun = claims.begin_install(0..1, id);
        assert!(begun.runs.first() == Some(&(0..1)) && !begun.cancelled);
        drop(claims.settle(&pages, 0..1, id, Some(State::Present)).waiters);
        assert_eq!(pages.get(0), State::Present);
    }
}

#[test]
fn bytes_that_come_early_come_too_late_for_a_slot_that_is_shut() {
    let (mut claims, pages) = slot();
    claims.claim(&pages, 0, 1, State::Absent, terms(Owner::Fill)).unwrap();
    let taken = claims.take(&pages, 0..1, true, None);
    assert_eq!(taken.early, std::slice::from_ref(&(0..1)));
    let (id, _) = claims.shut(&pages);
    assert!(claims.stash(0..1, Early::Zero).is_err());
    assert_eq!(claims.begin_poison(0..1, id).runs[0], 0..1, "it is poisoned");
}

#[test]
fn bytes_that_are_left_to_the_end_are_whole_until_the_guest_gives_the_page_back() {
    let (mut claims, pages) = slot();
    let (id, run) = claims.claim(&pages, 0, 3, State::Absent, terms(Owner::Fill)).unwrap();
    // The kernel refuses two of three, and the third is still being written.
    claims.hold_off(0..3, id);
    assert!(claims.give_back(&pages, 2..3, id, None).is_some());
    let (other, _) = claims.claim(&pages, 2, 1, State::Absent, terms(Owner::Fill)).unwrap();
    claims.leave_held_off(run.clone(), id);
    claims.leave_held_off(run.clone(), other);
    assert!(claims.give_back(&pages, run.clone(), id, None).is_some());
    assert_eq!(pages.count(State::Filling), 3, "they are given up");
    let _ = claims.remove(&pages, 1..2, false);
    let (end, _) = claims.shut(&pages);
    assert_eq!(claims.half_filled(&run, end), Some(1..2));
    assert_eq!(claims.half_filled(&(2..4), end), Some(2..3));
    let (again, _) = claims.shut(&pages);
    assert_eq!(claims.half_filled(&(0..1), again), None);
}

#[test]
fn what_the_host_owes_again_may_be_half_filled() {
    let (mut claims, pages) = slot();
    claims.claim(&pages, 0, 1, State::Absent, terms(Owner::Host)).unwrap();
    let taken = claims.take(&pages, 0..1, true, None);
    claims.hold_off(0..1, taken.id);
    assert!(claims.give_back(&pages, 0..1, taken.id, None).is_some());
    let (end, _) = claims.shut(&pages);
    assert_eq!(claims.half_filled(&(0..1), end), Some(0..1));
}

#[test]
fn bytes_that_come_after_a_discard_are_used_and_those_from_before_are_not() {
    let (mut claims, pages) = slot();
    let (id, _) = claims.claim(&pages, 0, 2, State::Absent, terms(Owner::Fill)).unwrap();
    let early = claims.take(&pages, 0..2, true, None).early;
    early.into_iter().for_each(|run| claims.stash(run, Early::Zero).unwrap());
    claims.begin_discard(&pages, 0..2, false).unwrap();
    assert!(claims.early(&(0..2), id).is_none(), "they were dropped");
    assert_eq!(claims.take(&pages, 1..2, true, None).early, std::slice::from_ref(&(1..2)));
    claims.stash(1..2, Early::Zero).unwrap();
    // The callback returns bytes of its own, which are old.
    let begun = claims.begin_install(0..2, id);
    assert!(begun.cancelled && begun.runs.is_empty());
    assert_eq!(claims.cancelled(&(0..2), id), Some((0..1, true)));
    drop(claims.settle_cancelled(&pages, 0..2, id).waiters);
    assert_eq!((pages.get(0), pages.get(1)), (State::Absent, State::Filling));
    assert!(claims.has_early_or_cancelled(&(0..2), id));
    assert!(matches!(claims.early(&(0..2), id), Some((run, Early::Zero)) if run == (1..2)));
    assert_eq!(claims.begin_install(0..2, id).runs[0], 1..2, "they are valid");
}

#[test]
fn bytes_that_come_after_the_guest_gave_the_page_back_are_dropped() {
    let (mut claims, pages) = slot();
    let (id, _) = claims.claim(&pages, 0, 1, State::Absent, terms(Owner::Fill)).unwrap();
    drop(claims.remove(&pages, 0..1, true).waiters);
    let early = claims.take(&pages, 0..1, true, None).early;
    early.into_iter().for_each(|run| claims.stash(run, Early::Zero).unwrap());
    // The callback defers the page: the caller has answered already, and owes nothing.
    claims.defer(0..1, id);
    assert_eq!(claims.tally().deferred, 0);
    assert!(claims.early(&(0..1), id).is_none());
    drop(claims.settle_cancelled(&pages, 0..1, id).waiters);
    assert_eq!(pages.get(0), State::Removed);
}
