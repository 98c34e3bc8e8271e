//! Pages that KVM keeps closed by marks: opened, poisoned, discarded, given back, taken away.

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::Filled;
use crate::service::calls::{poll, resolve};
use crate::service::config::{Config, Resolution};
use crate::service::tests::calls::Calls;
use crate::service::tests::fake_kvm::{all_right, gfn, rig, rig_with, Wrong, GPA};
use crate::service::tests::rig::{address, ends, page_of, pattern, wait_until, LEN, PAGE, PAGES};
use crate::sync::atomic::Ordering;
use crate::sync::thread;

#[test]
fn a_shortage_of_memory_that_passes_is_waited_out() {
    let rig = rig();
    rig.kernel.goes_wrong(Wrong { no_memory: 3, ..Wrong::default() });
    all_right([rig.access(7)]);
    assert_eq!(rig.service.stats().install_no_memory, 3);
    rig.fill_and_close();
}

#[test]
fn a_waiter_inside_kvm_is_not_taken_for_a_vcpu_that_has_left_for_the_same_page() {
    let rig = rig_with(|mut config| {
        config.callbacks.fill = None;
        Config { direct: true, serviced: false, ..config }
    });
    let (gpa, service) = (GPA + 5 * PAGE, rig.service.clone());
    let read = || poll::caller_read(&rig.service, &mut [std::mem::MaybeUninit::uninit(); 4]).unwrap_or(0);
    let vcpu = thread::spawn(move || service.vcpu_fault(gpa, PAGE));
    wait_until("the vCPU asks for the page", || read() == 1);
    let (gfn, waiting) = rig.access(5);
    wait_until("KVM joins it", || read() == 0 && rig.service.stats().faults_joined == 1);
    assert_eq!(resolve::resolve(&rig.service, gpa, PAGE, Resolution::Poison).unwrap(), PAGE);
    assert_eq!(vcpu.join().unwrap().unwrap_err().errno(), Errno::HWPOISON);
    wait_until("the waiter is reported", || read() == 0 && rig.caller.has(KUF_KVM_EVENT_PARKED));
    assert!(!waiting.is_finished());
    rig.service.discard(gpa, PAGE, false).unwrap();
    wait_until("the page is asked for anew", || read() == 1);
    assert_eq!(rig.service.resolve(gpa, &page_of(pattern(gfn))).unwrap(), PAGE);
    all_right([(gfn, waiting)]);
    rig.close();
}

#[test]
fn a_waiter_inside_kvm_for_a_poisoned_page_is_reported_and_served_after_a_discard() {
    let rig = rig();
    rig.caller.fail(gfn(4)..gfn(5));
    let (gfn, waiting) = rig.access(4);
    rig.caller.wait_for(KUF_KVM_EVENT_PARKED);
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), Errno::HWPOISON);
    assert_eq!(rig.service.vcpu_fault(GPA + 4 * PAGE, PAGE).unwrap_err().errno(), Errno::HWPOISON);
    assert!(!waiting.is_finished());
    rig.caller.fail_none();
    rig.service.discard(GPA + 4 * PAGE, PAGE, false).unwrap();
    all_right([(gfn, waiting)]);
    rig.service.quiesce(-1).unwrap();
    rig.fill_and_close();
}

#[test]
fn quiesce_waits_for_a_waiter_inside_kvm() {
    let rig = rig();
    rig.service.quiesce(0).unwrap();
    rig.caller.hold.store(true, Ordering::SeqCst);
    let waiting = rig.access(6);
    assert_eq!(rig.service.quiesce(30).unwrap_err().errno(), Errno::TIMEDOUT);
    rig.caller.hold.store(false, Ordering::SeqCst);
    rig.service.quiesce(-1).unwrap();
    all_right([waiting]);
    rig.fill_and_close();
}

#[test]
fn zero_is_not_written_over_what_the_callback_has_resolved_itself() {
    let rig = rig();
    let service = rig.service.clone();
    rig.caller.do_instead(move |run| {
        service.resolve(run.gpa(), &page_of(pattern(run.gpa() / PAGE))).unwrap();
        Some(Filled::Zero)
    });
    rig.service.ensure(GPA, PAGE).unwrap();
    rig.caller.fill_again();
    rig.fill_and_close();
}

#[test]
fn zeroes_give_their_memory_back_before_the_guest_sees_them() {
    let rig = rig_with(|config| Config { detect_zero: true, ..config });
    rig.caller.fill_zeroes(gfn(2)..gfn(3));
    rig.service.populate();
    wait_until("every page is present", || rig.service.progress(KUF_ALL).unwrap().present == LEN);
    assert_eq!(rig.kernel.state().empty, [gfn(2)]);
    let stats = rig.service.stats();
    assert_eq!((stats.bytes_zeroed, stats.bytes_in_place), (PAGE, PAGE * (PAGES - 1)));
    assert_eq!(rig.kernel.byte(gfn(2)), Some(0));
    assert_eq!(rig.kernel.byte(gfn(3)), Some(pattern(gfn(3))));
    assert!(rig.kernel.state().marked.is_empty());
}

#[test]
fn locked_memory_can_be_discarded() {
    let rig = rig();
    // SAFETY: locks the slot's own mapping, as it is touched.
    let locked = unsafe { libc::mlock2(address(rig.hva), LEN as usize, libc::MLOCK_ONFAULT) };
    if locked != 0 {
        return eprintln!("SKIP: this process may not lock memory");
    }
    all_right([rig.access(3)]);
    rig.service.discard(GPA + 3 * PAGE, PAGE, false).unwrap();
    rig.service.vcpu_fault(GPA + 3 * PAGE, PAGE).unwrap();
    assert!(!rig.kernel.is_marked(gfn(3)));
    // The guest gives a page back while its fill writes to it.
    rig.caller.hold.store(true, Ordering::SeqCst);
    let service = rig.service.clone();
    let filling = thread::spawn(move || service.ensure(GPA + 5 * PAGE, PAGE));
    wait_until("the fill begins", || rig.service.stats().fills == 3);
    rig.service.discard(GPA + 5 * PAGE, PAGE, true).unwrap();
    rig.caller.hold.store(false, Ordering::SeqCst);
    ends("the fill ends", filling).unwrap();
    assert_eq!(rig.kernel.byte(gfn(5)), Some(0), "what a cancelled fill wrote is there");
}

#[test]
fn a_slot_is_not_taken_away_from_under_a_fill() {
    for _ in 0..20 {
        let rig = rig();
        rig.service.populate();
        wait_until("a fill begins", || !rig.caller.fills.lock().unwrap().is_empty());
        while let Err(error) = rig.service.remove(GPA, KUF_END_POISON) {
            assert_eq!(error.errno(), Errno::BUSY, "{error}");
        }
        assert_eq!(rig.caller.inside.load(Ordering::SeqCst), 0, "removed with a callback inside its memory");
    }
}

#[test]
fn a_mark_that_the_library_did_not_set_does_not_keep_a_vcpu_leaving() {
    let rig = rig();
    rig.service.vcpu_fault(GPA, PAGE).unwrap();
    rig.kernel.state().marked.insert(gfn(0));
    rig.service.vcpu_fault(GPA, PAGE).unwrap();
    assert!(!rig.kernel.is_marked(gfn(0)));
    rig.fill_and_close();
}
