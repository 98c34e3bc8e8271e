//! Reading the kernel's queue: signals that are lost, reads that fail, queues with no end.

use std::os::fd::AsRawFd;

use rustix::io::Errno;

use crate::abi::*;
use crate::mechanism::Message;
use crate::service::queues::{events, quiet, read};
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{ends, mapping, memory, pattern, read_in_thread, wait_until, PAGE, PAGES};
use crate::service::{Fault, Work};
use crate::sync::atomic::Ordering;
use crate::sync::time::Instant;

#[test]
fn faults_are_served_where_epoll_fails() {
    let Some(rig) = rig() else { return };
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: another file in the place of the epoll descriptor, which stays open.
    assert!(unsafe { libc::dup2(null.as_raw_fd(), rig.service.threads.waking.fd().as_raw_fd()) } >= 0);
    // The thread that sleeps in epoll is woken by the first; the next ones come after epoll has failed.
    for page in 0..PAGES {
        assert_eq!(ends(&format!("page {page} is served"), rig.touch(page)), pattern(page));
    }
    rig.end(0);
}

#[test]
fn a_fault_whose_signal_was_lost_is_found() {
    let Some(rig) = rig() else { return };
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    rig.kernel.wrong.deaf.store(1, Ordering::SeqCst);
    assert!(ends("the kernel's queue is read", read_in_thread(rig.hva + PAGE)));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_thread_that_faults_again_and_again_is_queued_once() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    let faults = |page: u64, thread| {
        let wait = rig.service.stats.all_blocked.wait(thread, (0, page), Instant::now());
        rig.service.push(Work::Fault(Fault { slot: slot.clone(), page, flags: 0, wait }));
    };
    // As if every place for a callback were taken.
    let places = rig.service.threads.set_places(0);
    (0..1000).for_each(|_| faults(0, 7));
    faults(0, 8);
    faults(1, 7);
    assert_eq!(rig.service.threads.queued(), 3);
    assert_eq!(rig.service.threads.demanded(), 3);
    rig.service.threads.set_places(places);
    faults(1, 8);
    wait_until("what was queued is served", || rig.service.threads.demanded() == 0);
    assert_eq!((rig.readable(0), rig.readable(1)), (true, true));
    assert_eq!(rig.service.stats().blocked.count, 4);
    rig.end(KUF_END_POISON);
}

#[test]
fn a_queue_that_finds_no_room_for_a_child_is_read_again() {
    let Some(rig) = rig() else { return };
    for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
        rig.caller.events.lock().unwrap().clear();
        rig.kernel.wrong.no_read.store(errno, Ordering::SeqCst);
        let page = errno as u64 % PAGES;
        let toucher = rig.touch(page);
        assert_eq!(rig.caller.wait_for(KUF_EVENT_UNREADABLE).error, -errno);
        rig.kernel.wrong.no_read.store(0, Ordering::SeqCst);
        assert_eq!(toucher.join().unwrap(), pattern(page));
    }
    assert!(rig.caller.events.lock().unwrap().iter().all(|event| event.kind == KUF_EVENT_UNREADABLE));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_queue_of_the_library_that_fails_otherwise_is_fatal_and_poisons() {
    let Some(rig) = rig() else { return };
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    rig.kernel.wrong.no_read.store(libc::EIO, Ordering::SeqCst);
    read::drain_all(&rig.service);
    rig.caller.wait_for(KUF_EVENT_FATAL);
    rig.kernel.wrong.no_read.store(0, Ordering::SeqCst);
    rig.end(0);
    rig.assert_closed(1..PAGES);
}

#[test]
fn a_queue_without_end_does_not_delay_faults() {
    let Some(rig) = rig() else { return };
    rig.flood(true);
    let toucher = rig.touch(0);
    wait_until("a fault is served", || toucher.is_finished());
    rig.flood(false);
    assert_eq!(toucher.join().unwrap(), pattern(0));
    // The rest of the queue is read.
    assert_eq!(rig.touch(1).join().unwrap(), pattern(1));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_userfaultfd_is_read_until_no_event_is_on_its_way() {
    let Some(rig) = rig() else { return };
    rig.be_restless(3);
    quiet::read_out(&rig.service, &rig.slot().mechanism);
    rig.assert_asked_until_quiet();
    rig.end(KUF_END_POISON);
}

#[test]
fn a_slot_is_added_when_no_event_is_on_its_way() {
    let Some(rig) = rig() else { return };
    rig.service.remove(0, KUF_END_POISON).unwrap();
    rig.be_restless(3);
    rig.service.add(memory(mapping())).unwrap();
    rig.assert_asked_until_quiet();
    rig.service.remove(0, KUF_END_POISON).unwrap();
    rig.be_restless(u64::MAX);
    assert_eq!(rig.service.add(memory(mapping())).unwrap_err().errno(), Errno::AGAIN);
    assert!(rig.service.memory.map().slots().is_empty(), "the slot is not on the map");
    rig.be_restless(0);
    rig.end(0);
}

#[test]
fn a_discard_returns_when_no_event_is_on_its_way() {
    let Some(rig) = rig() else { return };
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    rig.be_restless(3);
    rig.service.discard(0, PAGE, false).unwrap();
    rig.assert_asked_until_quiet();
    rig.end(KUF_END_POISON);
}

#[test]
fn what_is_kept_of_moves_does_not_grow_with_their_number() {
    let Some(rig) = rig() else { return };
    let queue = rig.service.queues.first(rig.slot().mechanism.id()).unwrap();
    let (here, there, len) = (rig.hva, mapping(), PAGES * PAGE);
    // As of a userfaultfd that reports moves and no munmap.
    for (from, to) in [(here, there), (there, here)].repeat(10) {
        let _gate = queue.mechanism.gate().write();
        let mut messages = vec![Message::Moved { from: from..from + len, to }];
        events::apply(&rig.service, &queue, &mut messages, &mut Vec::new());
    }
    assert_eq!(queue.leftovers.take(), vec![there..there + len]);
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    rig.end(KUF_END_POISON);
}
