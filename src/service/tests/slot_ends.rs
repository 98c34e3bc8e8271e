//! Calls on a slot that is refused, or that ends meanwhile.

use rustix::io::Errno;

use crate::abi::*;
use crate::error::Error;
use crate::mechanism::Stop;
use crate::service::background::populate::populate_now;
use crate::service::calls::discard;
use crate::service::config::NewMemory;
use crate::service::fault::{complete, settle};
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{byte_at, mapping, memory, page_of, PAGE};
use crate::sync::atomic::Ordering;
use crate::sync::time::Duration;
use crate::sync::{thread, Arc, Mutex};

const GPA: u64 = 1 << 32;

#[test]
fn no_call_finds_a_slot_that_the_kernel_refuses() {
    let Some(rig) = rig() else { return };
    let hva = mapping();
    let resolving = Arc::new(Mutex::default());
    let (service, started) = (rig.service.clone(), resolving.clone());
    *rig.kernel.arming.lock().unwrap() = Some(Box::new(move || {
        *started.lock().unwrap() = Some(thread::spawn(move || service.resolve(GPA, &page_of(9))));
        // Time for it to look for its slot.
        thread::sleep(Duration::from_millis(20));
        Error::new(Errno::BUSY, "as the test wants it")
    }));
    let refused = rig.service.add(NewMemory { gpa: GPA, ..memory(hva) });
    assert_eq!(refused.unwrap_err().errno(), Errno::BUSY);
    // The same addresses are the next slot's, at another place.
    rig.service.add(NewMemory { gpa: 2 * GPA, ..memory(hva) }).unwrap();
    let resolved = resolving.lock().unwrap().take().unwrap().join().unwrap();
    assert_eq!(resolved.unwrap_err().errno(), Errno::NOENT);
    rig.service.resolve(2 * GPA, &page_of(8)).unwrap();
    assert_eq!(byte_at(hva), Some(8));
    rig.end(KUF_END_POISON);
}

#[test]
fn no_event_of_a_removed_slot_comes_at_the_end_of_the_service() {
    let Some(rig) = rig() else { return };
    let (kept, removed) = (rig.slot(), mapping());
    rig.service.add(NewMemory { gpa: GPA, ..memory(removed) }).unwrap();
    let removed = rig.service.memory.map().starting_at(GPA).cloned().unwrap();
    // Threads that have filled the last pages are about to raise these.
    let [kept, removed] = [kept, removed].map(|slot| complete::completion(&rig.service, &slot).unwrap());
    rig.service.remove(GPA, KUF_END_POISON).unwrap();
    rig.end(KUF_END_POISON);
    removed.raise(&rig.service);
    assert_eq!(rig.caller.count(KUF_EVENT_COMPLETE), 0);
    kept.raise(&rig.service);
    assert_eq!(rig.caller.count(KUF_EVENT_COMPLETE), 1);
}

#[test]
fn a_call_whose_slot_ends_says_that_it_has_gone() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    *rig.kernel.installing.lock().unwrap() = Some(Box::new({
        let slot = slot.clone();
        move || {
            slot.ending.store(true, Ordering::SeqCst);
            Stop::Again
        }
    }));
    assert_eq!(rig.service.resolve(0, &page_of(9)).unwrap_err().errno(), Errno::NOENT);
    // An event is on its way when the pages have been dropped.
    rig.be_restless(1);
    assert_eq!(rig.service.discard(0, PAGE, false).unwrap_err().errno(), Errno::NOENT);
    rig.be_restless(1);
    discard::empty(&rig.service, &slot).unwrap();
    rig.end(KUF_END_POISON);
}

#[test]
fn no_event_of_a_slot_comes_after_another_thread_has_removed_it() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    // A thread that ends the slot too, as kuf_close does, has taken the page and not come to it.
    let taken = slot.claims_for(&(0..1), false).unwrap().take(&slot.pages, 0..1, false, None);
    rig.service.remove(0, KUF_END_POISON).unwrap();
    let before = rig.caller.events.lock().unwrap().len();
    assert_eq!(settle::poison(&rig.service, &slot, taken.id, 0..1, &Errno::CANCELED.into(), "was not filled"), 0);
    let events = rig.caller.events.lock().unwrap();
    assert!(events.len() == before, "{:?}", &events[before..]);
}

#[test]
fn a_slot_that_is_removed_meanwhile_is_not_to_be_filled_before_the_end() {
    let Some(rig) = rig() else { return };
    let second = mapping();
    rig.service.add(NewMemory { gpa: GPA, ..memory(second) }).unwrap();
    *rig.kernel.installing.lock().unwrap() = Some(Box::new({
        let slot = rig.slot();
        move || {
            slot.ending.store(true, Ordering::SeqCst);
            slot.gone.store(libc::ENOENT, Ordering::SeqCst);
            Stop::Again
        }
    }));
    populate_now(&rig.service, None, None).unwrap();
    assert!(byte_at(second).is_some(), "the other slot is filled");
}
