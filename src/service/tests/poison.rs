//! Pages that cannot be filled, on kernels with poison and without.

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::Filled;
use crate::service::fault::poison;
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{address, map_anew, memory, page_of, pattern, read_in_thread, LEN, PAGE, PAGES};
use crate::sync::atomic::Ordering;

#[test]
fn without_poison_a_failed_page_is_made_inaccessible() {
    let Some(rig) = rig() else { return };
    rig.kernel.wrong.no_poison.store(true, Ordering::SeqCst);
    rig.caller.fail(0..PAGES);
    assert_eq!(rig.service.ensure(0, PAGE).unwrap_err().errno(), Errno::HWPOISON);
    let closed = rig.caller.wait_for(KUF_EVENT_INACCESSIBLE);
    assert_eq!(closed.error, -libc::EIO);
    assert!(closed.text.contains("inaccessible"), "{}", closed.text);
    assert!(!rig.readable(0));
    rig.caller.fail_none();
    assert_eq!(rig.touch(1).join().unwrap(), pattern(1));
    rig.end(KUF_END_POISON);
    rig.assert_closed(2..PAGES);
    assert!(rig.readable(1));
}

/// Whether the mapping that holds the address is registered for missing pages (VmFlags um).
fn is_registered(hva: u64) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut here = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        if let Some((start, end)) = range {
            let hex = |word| u64::from_str_radix(word, 16).unwrap();
            here = (hex(start)..hex(end)).contains(&hva);
        } else if here && line.starts_with("VmFlags:") {
            return line.split(' ').any(|flag| flag == "um");
        }
    }
    false
}

#[test]
fn pages_that_cannot_be_closed_stay_registered_for_ever() {
    let Some(rig) = rig() else { return };
    rig.kernel.wrong.no_poison.store(true, Ordering::SeqCst);
    rig.kernel.wrong.not_inaccessible.store(true, Ordering::SeqCst);
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    assert_eq!(rig.service.remove(0, KUF_END_POISON).unwrap_err().errno(), Errno::IO);
    rig.end(KUF_END_POISON);
    let hva = rig.hva;
    drop(rig);
    assert!(is_registered(hva), "pages that were never filled read as zeroes");
}

#[test]
fn a_late_fault_of_a_removed_slot_changes_nothing_at_its_addresses() {
    for no_poison in [false, true] {
        let Some(rig) = rig() else { return };
        rig.kernel.wrong.no_poison.store(no_poison, Ordering::SeqCst);
        rig.caller.fail(0..PAGES);
        for page in [0, 1] {
            assert_eq!(rig.service.ensure(page * PAGE, PAGE).unwrap_err().errno(), Errno::HWPOISON);
        }
        let slot = rig.slot();
        rig.service.remove(0, KUF_END_POISON).unwrap();
        map_anew(rig.hva);
        // A service thread got as far as this before the slot was removed.
        let late = |page| poison::touch_poison(&rig.service, &slot, page);
        late(0);
        assert!(rig.readable(0), "memory that is the caller's own again was closed");
        // SAFETY: drops what the rig's mapping holds, which no other thread uses.
        unsafe { rustix::mm::madvise(address(rig.hva), LEN as usize, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
        rig.caller.fail_none();
        rig.service.add(memory(rig.hva)).unwrap();
        late(1);
        assert_eq!(rig.touch(1).join().unwrap(), pattern(1), "a page of the slot that is there now was closed");
        rig.end(KUF_END_POISON);
        map_anew(rig.hva);
        late(0);
        assert!(rig.readable(0));
    }
}

#[test]
fn a_callback_that_cannot_resolve_its_own_page_ends_with_poison() {
    let Some(rig) = rig() else { return };
    let service = rig.service.clone();
    rig.caller.do_instead(move |run| service.resolve(run.gpa(), &page_of(8)).is_ok().then_some(Filled::Deferred));
    rig.refuse_for_memory(u64::MAX);
    let poisoned = read_in_thread(rig.hva);
    assert_eq!(rig.caller.wait_for(KUF_EVENT_POISONED).error, -libc::ENOMEM);
    assert!(!poisoned.join().unwrap());
    assert_eq!(*rig.caller.fills.lock().unwrap(), [0], "the page was taken from its callback and asked for anew");
    rig.refuse_for_memory(0);
    assert_eq!(rig.touch(1).join().unwrap(), 8);
    rig.end(KUF_END_POISON);
    rig.caller.fill_again();
}
