//! `kuf_open` and `kuf_close` that fail inside, and services that die.

use rustix::io::Errno;

use crate::abi::*;
use crate::api::door::Door;
use crate::api::Options;
use crate::capi::handle::Handle;
use crate::service::config::NewMemory;
use crate::service::tests::calls::{Calls, Close};
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{is_readable, mapping, memory, pattern, read_in_thread, LEN, PAGE, PAGES};
use crate::sync::atomic::Ordering;
use crate::sync::Arc;

#[test]
fn a_close_that_failed_inside_is_completed_by_the_next_one() {
    let Some(rig) = rig() else { return };
    let door = Door::new().unwrap();
    door.open(rig.service.clone());
    rig.kernel.wrong.panic.store(true, Ordering::SeqCst);
    let close = |flags| crate::panics::quietly(|| door.close(flags));
    assert!(close(KUF_END_POISON).unwrap_err().contains("as the test wants it"));
    assert_eq!(door.enter().err().unwrap().errno(), Errno::BADF);
    close(KUF_END_POISON).unwrap().unwrap();
    rig.assert_closed(0..PAGES);
    assert_eq!(close(KUF_END_POISON).unwrap().unwrap_err().errno(), Errno::BADF);
    assert_eq!(Arc::strong_count(&rig.service), 1, "threads have ended, and the handle has let go of it");
}

#[test]
fn a_handle_that_could_not_be_opened_leaves_nothing() {
    for _ in 0..3 {
        let refused = Handle::open(|_| Ok(Options::caller_driven().fill_threads(0)));
        assert_eq!(refused.unwrap_err().errno(), Errno::INVAL);
    }
}

#[test]
fn a_panic_in_a_service_thread_is_fatal_and_leaves_pages_closed() {
    let Some(rig) = rig() else { return };
    assert_eq!(rig.touch(0).join().unwrap(), pattern(0));
    rig.kernel.wrong.panic.store(true, Ordering::SeqCst);
    // By a system call: poison ends its wait without a signal, so the thread is gone when the test ends.
    let waiting = read_in_thread(rig.hva + PAGE);
    let fatal = rig.caller.wait_for(KUF_EVENT_FATAL);
    assert_eq!(fatal.error, -libc::EIO);
    assert!(fatal.text.contains("as the test wants it"), "{}", fatal.text);
    assert_eq!(rig.service.ensure(0, PAGE).unwrap_err().errno(), Errno::IO);
    assert!(!waiting.is_finished(), "the page of the fill that died was opened");
    // No flag says what to do with unresolved pages; a dead service poisons them all the same.
    rig.end(0);
    assert!(!waiting.join().unwrap());
    rig.assert_closed(1..PAGES);
    assert!(rig.readable(0));
}

#[test]
fn a_close_is_refused_or_finds_nothing_to_poison() {
    let Some(rig) = rig() else { return };
    let service = &rig.service;
    service.ensure(0, LEN).unwrap();
    service.prepare_close(0).unwrap();
    // As another thread may, between the two looks of kuf_close.
    service.discard(0, PAGE, false).unwrap();
    assert_eq!(service.begin_end(0).unwrap_err().errno(), Errno::BUSY);
    service.ensure(0, LEN).unwrap();
    service.begin_end(0).unwrap();
    // From here on no page becomes absent any more.
    assert_eq!(service.discard(0, PAGE, false).unwrap_err().errno(), Errno::CANCELED);
    service.rest_of_end(0);
    rig.assert_readable(0..PAGES);
}

#[test]
fn a_slot_that_is_added_while_the_service_ends_is_not_left_open() {
    let Some(rig) = rig() else { return };
    let service = rig.service.clone();
    *rig.kernel.adding.lock().unwrap() = Some(Box::new(move || {
        service.begin_end(KUF_END_POISON).unwrap();
        service.rest_of_end(KUF_END_POISON | KUF_END_NOWAIT);
    }));
    let hva = mapping();
    let late = NewMemory { gpa: 1 << 30, ..memory(hva) };
    assert_eq!(rig.service.add(late).unwrap_err().errno(), Errno::CANCELED);
    assert!(rig.kernel.adding.lock().unwrap().is_none(), "the service ends in the middle of kuf_add_memory");
    for page in 0..PAGES {
        assert!(!is_readable(hva + page * PAGE), "page {page}, which was never filled, can be read");
    }
}
