//! The end while other threads give memory back all the time, so that the kernel refuses every install of bytes.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::abi::*;
use crate::service::background::populate::populate_now;
use crate::service::calls::resolve::resolve;
use crate::service::config::{NewMemory, Resolution};
use crate::service::tests::calls::{Calls, Close};
use crate::service::tests::faulty::{rig, Rig};
use crate::service::tests::rig::{
    ends, is_readable, page_of, pattern, read_in_thread, shared_memory, wait_until, LEN, PAGE, PAGES,
};
use crate::sync::atomic::Ordering;
use crate::sync::thread;

#[test]
fn a_fill_before_the_end_gives_up() {
    let Some(rig) = rig() else { return };
    rig.storm(true);
    for end in
        [|rig: &Rig| rig.service.prepare_close(KUF_END_POPULATE), |rig: &Rig| rig.service.remove(0, KUF_END_POPULATE)]
    {
        let error = end(&rig).unwrap_err();
        assert_eq!(error.errno(), Errno::IO);
        assert!(error.text().contains("give memory back"), "{}", error.text());
    }
    // The service goes on as before.
    rig.storm(false);
    rig.service.ensure(0, LEN).unwrap();
    rig.end(0);
    rig.assert_readable(0..PAGES);
}

#[test]
fn a_fill_before_the_end_does_not_wait_for_faults_that_cannot_be_served() {
    let Some(rig) = rig() else { return };
    rig.service.ensure(PAGE, LEN - PAGE).unwrap();
    rig.storm(true);
    let toucher = rig.touch(0);
    rig.wait_for_refusal();
    assert_eq!(rig.service.prepare_close(KUF_END_POPULATE).unwrap_err().errno(), Errno::IO);
    rig.storm(false);
    assert_eq!(toucher.join().unwrap(), pattern(0));
    rig.end(KUF_END_POPULATE);
}

#[test]
fn pages_that_cannot_be_filled_before_the_end_are_poisoned() {
    let Some(rig) = rig() else { return };
    rig.service.ensure(0, PAGE).unwrap();
    rig.storm(true);
    let waiting = read_in_thread(rig.hva + PAGE);
    rig.wait_for_refusal();
    rig.end(KUF_END_POPULATE | KUF_END_POISON);
    assert!(!waiting.join().unwrap());
    assert!(rig.readable(0));
    rig.assert_closed(1..PAGES);
}

#[test]
fn a_slot_is_removed_while_what_was_filled_in_place_cannot_be_opened() {
    let Some(rig) = rig() else { return };
    let (_file, slot) = shared_memory(1 << 20);
    let hva = slot.hva;
    if rig.service.add(slot).is_err() || !rig.service.memory.map().slots().iter().any(|slot| slot.in_place()) {
        eprintln!("SKIP: nothing can be filled in place");
        return;
    }
    rig.storm(true);
    let waiting = read_in_thread(hva);
    rig.wait_for_refusal();
    rig.service.remove(1 << 20, KUF_END_POISON).unwrap();
    assert!(!waiting.join().unwrap() && (0..PAGES).all(|page| !is_readable(hva + page * PAGE)));
    rig.end(KUF_END_POISON);
}

#[test]
fn an_end_does_not_wait_for_a_page_that_was_given_back() {
    let Some(rig) = rig() else { return };
    rig.service.ensure(0, LEN).unwrap();
    rig.service.discard(0, PAGE, true).unwrap();
    rig.storm(true);
    let toucher = rig.touch(0);
    rig.wait_for_refusal();
    let service = rig.service.clone();
    let ending = thread::spawn(move || service.begin_end(0));
    ends("kuf_close goes on although a page that is zero is waited for", ending).unwrap();
    rig.service.rest_of_end(0);
    assert_eq!(toucher.join().unwrap(), 0);
}

#[test]
fn pages_that_were_dropped_when_the_handle_is_closed_are_not_present() {
    // Where a page cannot be poisoned it was made inaccessible, which is undone when it is dropped.
    for no_poison in [false, true] {
        let Some(rig) = rig() else { return };
        rig.kernel.wrong.no_poison.store(no_poison, Ordering::SeqCst);
        let (_file, slot) = shared_memory(1 << 20);
        let hva = slot.hva;
        rig.service.add(slot).unwrap();
        if no_poison {
            resolve(&rig.service, 1 << 20, PAGE, Resolution::Poison).unwrap();
        } else {
            rig.service.ensure(1 << 20, PAGE).unwrap();
        }
        // Whether they were dropped where they are cannot be said before the end.
        rig.be_restless(u64::MAX);
        let service = rig.service.clone();
        let discarding = thread::spawn(move || service.discard(1 << 20, PAGE, false));
        wait_until("a page is dropped", || rig.kernel.wrong.restless.load(Ordering::SeqCst) < u64::MAX);
        rig.end(KUF_END_POISON);
        assert_eq!(discarding.join().unwrap().unwrap_err().errno(), Errno::CANCELED);
        assert!((0..PAGES).all(|page| !is_readable(hva + page * PAGE)));
    }
}

/// Ends the service for the next handler.
fn hand_over(rig: &Rig) {
    rig.service.begin_end(KUF_END_HANDOVER).unwrap();
    rig.service.rest_of_end(KUF_END_HANDOVER);
}

#[test]
fn pages_that_cannot_be_filled_before_they_are_handed_over_stay_accessible() {
    let Some(rig) = rig() else { return };
    rig.kernel.wrong.no_poison.store(true, Ordering::SeqCst);
    rig.storm(true);
    let waiting = read_in_thread(rig.hva);
    rig.wait_for_refusal();
    hand_over(&rig);
    // The next handler catches no touches.
    rig.kernel.disown_all(rig.hva..rig.hva + LEN);
    assert!(waiting.join().unwrap(), "the page was made inaccessible");
    rig.assert_readable(0..PAGES);
}

#[test]
fn pages_that_failed_to_be_filled_are_not_in_the_file_that_is_handed_over() {
    let Some(rig) = rig() else { return };
    let (file, slot) = shared_memory(1 << 20);
    rig.service.add(slot).unwrap();
    rig.service.ensure(1 << 20, PAGE).unwrap();
    rig.caller.fail(0..u64::MAX);
    assert!(populate_now(&rig.service, Some((1 << 20, LEN)), None).is_err());
    hand_over(&rig);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks as u64 * 512, PAGE);
}

/// The first byte of `page` in the file, or None where the file has a hole.
fn byte_in_file(file: &OwnedFd, page: u64) -> Option<u8> {
    let mut byte = [0];
    let data = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(page * PAGE)).ok()?;
    (data == page * PAGE && rustix::io::pread(file, &mut byte, data).unwrap() == 1).then_some(byte[0])
}

#[test]
fn what_was_filled_in_place_and_could_not_be_opened_is_handed_over_with_its_bytes() {
    let Some(rig) = rig() else { return };
    let (gpa, (file, slot)) = (1 << 20, shared_memory(1 << 20));
    let hva = slot.hva;
    rig.service.add(slot).unwrap();
    if !rig.service.memory.map().slots().iter().any(|slot| slot.in_place()) {
        eprintln!("SKIP: nothing can be filled in place");
        return;
    }
    rig.storm(true);
    let service = rig.service.clone();
    let resolving = thread::spawn(move || service.resolve(gpa + PAGE, &page_of(99)));
    rig.wait_for_refusal();
    let waiting = read_in_thread(hva);
    wait_until("a page was filled", || byte_in_file(&file, 0) == Some(pattern(gpa / PAGE)));
    rig.service.begin_end(KUF_END_HANDOVER).unwrap();
    // kuf_close waits for calls.
    assert_eq!(resolving.join().unwrap().unwrap_err().errno(), Errno::CANCELED);
    rig.service.rest_of_end(KUF_END_HANDOVER);
    let expected = [Some(pattern(gpa / PAGE)), Some(99), None];
    assert_eq!([0, 1, 2].map(|page| byte_in_file(&file, page)), expected);
    // The next handler catches no touches.
    rig.kernel.disown_all(hva..hva + LEN);
    assert!(waiting.join().unwrap());
}

#[test]
fn what_the_file_held_is_handed_over_where_all_is_to_be_filled() {
    let Some(rig) = rig() else { return };
    let (file, slot) = shared_memory(1 << 20);
    rustix::io::pwrite(&file, &page_of(99), 0).unwrap();
    if rig.service.add(NewMemory { fill_all: true, ..slot }).is_err() {
        eprintln!("SKIP: nothing can be filled in place");
        return;
    }
    hand_over(&rig);
    assert_eq!(byte_in_file(&file, 0), Some(99));
}
