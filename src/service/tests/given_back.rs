//! Pages that the guest gave back, touched again while their slot ends.

use rustix::io::Errno;

use crate::abi::*;
use crate::memory::Slot;
use crate::pages::State;
use crate::service::fault::demand;
use crate::service::queues::events;
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::{rig, Rig};
use crate::service::tests::rig::{shared_memory, wait_until, PAGE};
use crate::sync::atomic::Ordering;
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc};

impl Rig {
    /// The guest gives the slot's first page back.
    fn give_back_first(&self, slot: &Arc<Slot>) {
        let _gate = slot.mechanism.gate().write();
        events::give_back(&self.service, slot, 0..1, &mut Vec::new());
    }
}

#[test]
fn the_file_of_a_removed_slot_is_left_alone() {
    let Some(rig) = rig() else { return };
    let gpa = 1 << 32;
    let (file, slot) = shared_memory(gpa);
    if rig.service.add(slot).is_err() {
        eprintln!("SKIP: no minor faults for this process");
        return rig.end(KUF_END_POISON);
    }
    let slot = rig.service.memory.map().starting_at(gpa).unwrap().clone();
    rig.give_back_first(&slot);
    assert_eq!(slot.pages.get(0), State::Removed);
    // Its touch finds no room for a page of zeroes, for so long that the slot is removed meanwhile.
    rig.kernel.wrong.no_buffer.store(true, Ordering::SeqCst);
    let zeroing = {
        let (service, slot) = (rig.service.clone(), slot);
        thread::spawn(move || demand::open_removed(&service, &slot, &(0..1)))
    };
    wait_until("a place for the page is asked for", || rig.kernel.buffers_asked.load(Ordering::SeqCst) > 0);
    rig.service.remove(gpa, KUF_END_POISON).unwrap();
    assert_eq!(rustix::io::pwrite(&file, b"another slot's", 0), Ok(14));
    rig.kernel.wrong.no_buffer.store(false, Ordering::SeqCst);
    zeroing.join().unwrap().unwrap();
    let mut bytes = [0; 14];
    assert_eq!(rustix::io::pread(&file, &mut bytes, 0), Ok(14));
    assert_eq!(&bytes, b"another slot's");
    rig.end(KUF_END_POISON);
}

#[test]
fn a_page_that_is_given_back_at_the_end_is_zero_and_not_poisoned() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    slot.ending.store(true, Ordering::SeqCst);
    rig.give_back_first(&slot);
    // A fault that was read before the kernel was told to catch no more there.
    let since = Instant::now();
    demand::open_removed(&rig.service, &slot, &(0..2)).unwrap();
    assert!(since.elapsed() < Duration::from_secs(1), "the kernel has let go of the page, and installs nothing there");
    assert_eq!(slot.pages.get(0), State::Removed);
    assert_eq!(slot.claims().tally().poisoned, 0);
    assert_eq!(rig.touch(0).join().unwrap(), 0);
    rig.end(KUF_END_POISON);
}

#[test]
fn a_poisoned_page_that_was_given_back_is_no_error_of_a_call_that_comes_after_it() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    rig.caller.fail(0..1);
    assert_eq!(rig.service.ensure(0, PAGE).unwrap_err().errno(), Errno::HWPOISON);
    // The event has been read, so that the thread in madvise goes on, and is not applied yet.
    let reading = slot.mechanism.gate().write();
    let ensuring = {
        let service = rig.service.clone();
        thread::spawn(move || service.ensure(0, PAGE))
    };
    thread::sleep(Duration::from_millis(20));
    events::give_back(&rig.service, &slot, 0..1, &mut Vec::new());
    drop(reading);
    ensuring.join().unwrap().unwrap();
    rig.end(KUF_END_POISON);
}
