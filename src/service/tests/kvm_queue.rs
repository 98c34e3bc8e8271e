//! KVM's queue of userfaults: last in first out, entries lost, stale, twice, without a signal, signals without an entry.

use std::collections::BTreeSet;

use rustix::io::Errno;

use crate::abi::*;
use crate::service::calls::{kvm, poll};
use crate::service::config::Config;
use crate::service::tests::calls::Calls;
use crate::service::tests::fake_kvm::{all_right, draining_rig, gfn, rig, rig_with, Wrong, GPA};
use crate::service::tests::rig::{page_of, pattern, wait_until, PAGE, PAGES};
use crate::sync::atomic::Ordering;
use crate::sync::thread;
use crate::sync::time::Duration;

#[test]
fn a_fault_is_served_although_kvm_hands_out_the_newest_first() {
    let rig = rig();
    rig.kernel.goes_wrong(Wrong { newest_first: true, ..Wrong::default() });
    rig.caller.hold.store(true, Ordering::SeqCst);
    let first = rig.access(0);
    wait_until("the first fault is read", || rig.service.stats().faults == 1);
    let rest: Vec<_> = (1..PAGES).map(|page| rig.access(page)).collect();
    wait_until("every fault is read", || rig.service.stats().faults == PAGES);
    rig.caller.hold.store(false, Ordering::SeqCst);
    all_right(std::iter::once(first).chain(rest));
    rig.fill_and_close();
}

#[test]
fn a_lost_fault_starts_a_sweep_of_kvms_own_pages_first() {
    let rig = rig();
    kvm::kvm_owned(&rig.service, GPA + 40 * PAGE, 2 * PAGE).unwrap();
    rig.kernel.goes_wrong(Wrong { lose: 1, ..Wrong::default() });
    let lost = rig.access(40);
    rig.caller.wait_for(KUF_KVM_EVENT_SWEEP);
    all_right([lost]);
    wait_until("the sweep ends", || rig.kernel.state().marked.is_empty());
    let fills = rig.caller.fills.lock().unwrap().clone();
    assert_eq!(fills[..2], [gfn(40), gfn(41)], "{fills:?}");
    assert_eq!(rig.service.stats().faults_lost, 1);
    assert!(!rig.caller.has(KUF_EVENT_POPULATED), "the caller did not ask for a populate");
    rig.fill_and_close();
}

#[test]
fn a_sweep_goes_on_after_a_page_that_cannot_be_filled_and_leaves_it_closed() {
    let rig = rig();
    rig.caller.fail(gfn(9)..gfn(10));
    rig.kernel.goes_wrong(Wrong { lose: 1, ..Wrong::default() });
    let lost = rig.access(50);
    all_right([lost]);
    rig.caller.wait_for(KUF_EVENT_POISONED);
    wait_until("the sweep opens the rest", || rig.kernel.state().marked.len() == 1);
    assert!(rig.kernel.is_marked(gfn(9)));
    assert_eq!(rig.service.vcpu_fault(GPA + 9 * PAGE, PAGE).unwrap_err().errno(), Errno::HWPOISON);
    rig.close();
    assert_eq!(rig.kernel.byte(gfn(9)), None, "a page that was never filled can be read");
}

#[test]
fn when_kvm_loses_every_fault_sweeps_do_not_pile_up() {
    let rig = rig();
    rig.kernel.goes_wrong(Wrong { lose: u64::MAX, ..Wrong::default() });
    all_right((0..PAGES).map(|page| rig.access(page)).collect::<Vec<_>>());
    assert!(rig.service.stats().faults_lost <= PAGES);
    rig.fill_and_close();
}

#[test]
fn a_lost_fault_of_a_page_that_was_given_back_is_swept_up_too() {
    let rig = rig();
    rig.service.discard(GPA + 8 * PAGE, PAGE, true).unwrap();
    rig.kernel.goes_wrong(Wrong { lose: 1, ..Wrong::default() });
    let (_, waiting) = rig.access(8);
    assert_eq!(waiting.join().unwrap(), Some(0));
}

#[test]
fn stale_and_foreign_entries_are_counted_and_ignored() {
    let rig = rig();
    all_right([rig.access(3)]);
    let before = rig.caller.fills.lock().unwrap().len();
    rig.kernel.queue(gfn(3));
    for gfn in [0, GPA / PAGE - 1, gfn(PAGES), u64::MAX, 1 << 52] {
        rig.kernel.queue(gfn);
    }
    wait_until("all seven faults are read", || rig.service.stats().faults == 7);
    wait_until("one is counted as late", || rig.service.stats().faults_late == 1);
    assert_eq!(rig.service.stats().faults_unknown, 5);
    assert_eq!(rig.caller.fills.lock().unwrap().len(), before);
    rig.fill_and_close();
}

#[test]
fn an_entry_twice_is_one_fill() {
    let rig = rig();
    rig.caller.hold.store(true, Ordering::SeqCst);
    let waiting: Vec<_> = (0..20).map(|_| rig.access(5)).collect();
    rig.kernel.queue(gfn(5));
    wait_until("every fault is read", || rig.service.stats().faults == 21);
    rig.caller.hold.store(false, Ordering::SeqCst);
    all_right(waiting);
    assert_eq!(rig.caller.fills.lock().unwrap().iter().filter(|filled| **filled == gfn(5)).count(), 1);
    rig.fill_and_close();
}

#[test]
fn more_signals_than_entries_are_no_harm() {
    let rig = rig();
    for _ in 0..10 {
        rig.kernel.signal_only();
    }
    all_right((0..8).map(|page| rig.access(page)).collect::<Vec<_>>());
    rig.fill_and_close();
}

#[test]
fn without_a_signal_the_queue_is_not_read() {
    let rig = rig();
    rig.kernel.goes_wrong(Wrong { drop_signals: 1, ..Wrong::default() });
    let unsignalled = rig.access(1);
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(rig.service.stats().faults, 0);
    // One signal is one read: that of the first entry.
    let signalled = rig.access(2);
    all_right([unsignalled]);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.service.stats().faults, 1);
    rig.fill_and_close();
    all_right([signalled]);
}

#[test]
fn a_dropped_signal_is_found_by_looking() {
    let rig = draining_rig();
    rig.kernel.goes_wrong(Wrong { drop_signals: 2, ..Wrong::default() });
    all_right([rig.access(1), rig.access(2)]);
    rig.caller.wait_for(KUF_KVM_EVENT_UNSIGNALLED);
    assert_eq!(rig.service.stats().faults_unsignalled, 2);
    all_right((3..20).map(|page| rig.access(page)).collect::<Vec<_>>());
    assert_eq!(rig.caller.count(KUF_KVM_EVENT_UNSIGNALLED), 1);
    rig.fill_and_close_after_looking();
}

#[test]
fn a_signal_that_is_late_is_not_taken_for_dropped() {
    let rig = draining_rig();
    for page in 0..8 {
        // The library finds the entry by looking, and its signal comes after.
        rig.kernel.state().wrong.drop_signals = 1;
        let access = rig.access(page);
        wait_until("the fault is read", || rig.service.stats().faults == page + 1);
        rig.kernel.signal_only();
        all_right([access]);
    }
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(rig.service.stats().faults_unsignalled, 0);
    assert!(!rig.caller.has(KUF_KVM_EVENT_UNSIGNALLED));
    rig.fill_and_close_after_looking();
}

#[test]
fn a_vm_of_another_process_is_the_end() {
    let rig = rig();
    rig.kernel.goes_wrong(Wrong { fail: Some(Errno::IO), ..Wrong::default() });
    let (_, waiting) = rig.access(1);
    rig.caller.wait_for(KUF_EVENT_FATAL);
    assert_eq!(rig.service.vcpu_fault(GPA, PAGE).unwrap_err().errno(), Errno::IO);
    assert!(!waiting.is_finished(), "a page was opened that was never filled");
    assert_eq!(rig.kernel.state().marked.len() as u64, PAGES);
    rig.close();
    assert_eq!(waiting.join().unwrap(), None);
}

#[test]
fn faults_that_kuf_read_had_no_room_for_are_announced_again() {
    // Caller-driven without threads, with room for one fault.
    let rig = rig_with(|mut config| {
        config.callbacks.fill = None;
        Config { direct: true, serviced: false, ..config }
    });
    let waiting = [rig.access(1), rig.access(1), rig.access(2)];
    let mut asked = BTreeSet::new();
    while asked.len() < 2 {
        let announced = poll::caller_poll(&rig.service, 5000).unwrap();
        assert!(announced, "a fault is in KVM's queue and kuf_fd does not say so: {asked:?}");
        let mut out = [std::mem::MaybeUninit::<kuf_fault>::uninit(); 16];
        let n = poll::caller_read(&rig.service, &mut out).unwrap_or(0);
        // SAFETY: that many were written.
        asked.extend(out[..n].iter().map(|fault| unsafe { fault.assume_init_ref() }.gpa));
    }
    for gpa in asked {
        assert_eq!(rig.service.resolve(gpa, &page_of(pattern(gpa / PAGE))).unwrap(), PAGE);
    }
    all_right(waiting);
    rig.close();
}
