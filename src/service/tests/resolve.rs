//! `kuf_resolve` of pages that another call has in hand.

use rustix::io::Errno;

use crate::abi::*;
use crate::mechanism::Stop;
use crate::pages::State;
use crate::service::fault::settle;
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{ends, page_of, pattern, read_in_thread, shared_memory, wait_until, PAGE};
use crate::sync::atomic::Ordering;
use crate::sync::thread;
use crate::sync::time::Duration;

/// A call that waits for nothing has returned after that.
const MOMENT: Duration = Duration::from_millis(50);

#[test]
fn bytes_that_come_while_another_call_fails_in_the_kernel_are_not_lost() {
    let Some(rig) = rig() else { return };
    let (resolved, result) = std::sync::mpsc::channel();
    let service = rig.service.clone();
    *rig.kernel.installing.lock().unwrap() = Some(Box::new(move || {
        let (entered, enters) = std::sync::mpsc::channel();
        thread::spawn(move || {
            entered.send(()).unwrap();
            resolved.send(service.resolve(0, &page_of(9))).unwrap();
        });
        enters.recv().unwrap();
        thread::sleep(MOMENT);
        Stop::BadSource
    }));
    assert_eq!(rig.service.resolve(0, &page_of(9)).unwrap_err().errno(), Errno::FAULT);
    assert_eq!(result.recv().unwrap().unwrap(), PAGE, "the bytes that kuf_resolve counts are there");
    assert_eq!(rig.touch(0).join().unwrap(), 9);
    rig.end(KUF_END_POISON);
}

#[test]
fn bytes_that_come_while_another_call_is_about_to_fail_are_not_lost() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    // Another kuf_resolve has the page in hand, which the caller owes, and has not come to the kernel yet.
    let other = slot.claims_for(&(0..1), false).unwrap().take(&slot.pages, 0..1, false, None);
    let service = rig.service.clone();
    let resolving = thread::spawn(move || service.resolve(0, &page_of(9)));
    thread::sleep(MOMENT);
    settle::abandon(&rig.service, &slot, other.id, 0..1);
    assert_eq!(resolving.join().unwrap().unwrap(), PAGE, "the bytes that kuf_resolve counts are there");
    assert_eq!(rig.touch(0).join().unwrap(), 9);
    rig.end(KUF_END_POISON);
}

#[test]
fn a_page_is_brought_once_by_one_call() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    // Pages at both ends are in the hands of another call, which fails; the one between them is discarded meanwhile.
    let take = |page: u64| {
        let range = page..page + 1;
        slot.claims_for(&range, false).unwrap().take(&slot.pages, range, false, None).id
    };
    let others = [take(0), take(2)];
    let service = rig.service.clone();
    let resolving = thread::spawn(move || service.resolve(0, &[9_u8; 3 * PAGE as usize]));
    while slot.pages.get(1) != State::Present {
        thread::yield_now();
    }
    rig.service.discard(PAGE, PAGE, false).unwrap();
    settle::abandon(&rig.service, &slot, others[0], 0..1);
    settle::abandon(&rig.service, &slot, others[1], 2..3);
    assert_eq!(resolving.join().unwrap().unwrap(), 3 * PAGE);
    assert_eq!([0, 1, 2].map(|page| rig.touch(page).join().unwrap()), [9, pattern(1), 9]);
    rig.end(KUF_END_POISON);
}

#[test]
fn bytes_that_come_while_another_call_poisons_the_page_are_not_lost() {
    let gpa = 1 << 20;
    for (no_poison, came) in [(false, 0..2), (false, 2..4), (true, 0..2), (true, 1..3), (true, 2..4)] {
        let Some(rig) = rig() else { return };
        rig.kernel.wrong.no_poison.store(no_poison, Ordering::SeqCst);
        let (_file, memory) = shared_memory(gpa);
        let hva = memory.hva;
        rig.service.add(memory).unwrap();
        let slot = rig.service.memory.map().at_gpa(gpa).unwrap().clone();
        // A call that gives up four pages has them in hand, and has not come to the kernel yet.
        let other = slot.claims_for(&(0..4), false).unwrap().take(&slot.pages, 0..4, true, None);
        assert_eq!(rig.service.resolve(gpa + came.start * PAGE, &[9; 2 * PAGE as usize]).unwrap(), 0, "they are kept");
        let toucher = read_in_thread(hva + came.start * PAGE);
        let lost = settle::poison(&rig.service, &slot, other.id, 0..4, &Errno::IO.into(), "was given up");
        assert_eq!(lost, 2, "no_poison: {no_poison}, {came:?}");
        assert!(ends("the page that was resolved is read", toucher));
        for page in 0..4 {
            let state = if came.contains(&page) { State::Present } else { State::Filling };
            // The toucher's fault at a page that has become present has it mapped again, and it counts as filling meanwhile.
            wait_until(&format!("page {page} is {state:?}, no_poison: {no_poison}, {came:?}"), || {
                slot.pages.get(page) == state
            });
            assert_eq!(slot.claims().is_poisoned(page), !came.contains(&page));
        }
        rig.end(KUF_END_POISON);
    }
}
