//! A fault that is left to a replay ends, whatever becomes of its page.

use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::config::Resolution;
use super::tests::{rig, Rig, PAGE};
use super::window::{Pace, Part, Window};
use crate::capi::types::*;

/// In the window, and the one that is touched.
const LEFT: usize = 5;

impl Rig {
    /// A window that nobody fills, of pages 4 to 7.
    fn window(&self) -> Window<'_> {
        let slot = self.service.memory.map().slots().first().unwrap().clone();
        let part = |n: usize| Part { slot: slot.clone(), pages: n as u64..n as u64 + 1, rank: n };
        self.service.window((4..8).map(part).collect(), &Pace { page: 1 })
    }

    /// The same, with a fault left to it for as long as it takes.
    fn window_with_fault(&self) -> (Window<'_>, JoinHandle<u8>) {
        self.service.windows.patient.store(true, Ordering::SeqCst);
        let window = self.window();
        let toucher = self.touch(LEFT);
        self.wait_for_left();
        (window, toucher)
    }

    fn wait_for_left(&self) {
        until("it is left to the window", || self.service.windows.left() == 1);
    }

    /// Claims the page as a replay does, and fills it.
    fn fill_left(&self) {
        let slot = self.service.memory.map().slots().first().unwrap().clone();
        let run = self.service.claim_ahead(&slot, LEFT as u64..LEFT as u64 + 1, 1).unwrap();
        assert_eq!(self.service.windows.left(), 0, "it waits for the claim now");
        assert_eq!(run.wanted, Some(LEFT as u64), "and the source is told that somebody does");
        let _ = self.service.fill(&run);
    }

    /// Waits for a page in a system call, which poison ends without a signal. Returns whether it came.
    fn read_quietly(&self, page: usize) -> JoinHandle<bool> {
        let hva = self.hva;
        std::thread::spawn(move || {
            let mut byte = [0_u8];
            let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
            let remote = libc::iovec { iov_base: (hva + page * PAGE) as *mut libc::c_void, iov_len: 1 };
            let me = std::process::id() as libc::pid_t;
            // SAFETY: reads into `byte` only, and says so when it cannot.
            unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) == 1 }
        })
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "it does not come to it that {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ends<T>(toucher: JoinHandle<T>) -> T {
    until("the toucher goes on", || toucher.is_finished());
    toucher.join().unwrap()
}

#[test]
fn a_window_that_does_not_get_on_is_not_waited_for() {
    let Some(rig) = rig(false) else { return };
    let window = rig.window();
    assert_eq!(ends(rig.touch(LEFT)), 7);
    // Nor is anything left to it any more.
    assert_eq!(ends(rig.touch(LEFT + 1)), 7);
    assert_eq!(ends(rig.touch(LEFT - 3)), 7);
    drop(window);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_page_of_no_window_is_served_at_once() {
    let Some(rig) = rig(false) else { return };
    let (window, toucher) = rig.window_with_fault();
    assert_eq!(ends(rig.touch(8)), 7);
    assert!(!toucher.is_finished());
    drop(window);
    assert_eq!(ends(toucher), 7);
    assert_eq!(ends(rig.touch(LEFT + 1)), 7);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_window_is_filled_last_page_first_and_wakes_who_waits() {
    let Some(rig) = rig(false) else { return };
    let (mut window, toucher) = rig.window_with_fault();
    let order: Vec<_> = std::iter::from_fn(|| window.next()).map(|part| part.pages.start).collect();
    assert_eq!(order, [7, 6, 5, 4]);
    let before = rig.service.stats().faults_joined;
    rig.fill_left();
    assert_eq!(ends(toucher), 7);
    assert_eq!(rig.service.stats().faults_joined, before + 1);
    drop(window);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn two_windows_may_be_open_and_each_has_its_own() {
    let Some(rig) = rig(false) else { return };
    let (first, toucher) = rig.window_with_fault();
    let slot = rig.service.memory.map().slots().first().unwrap().clone();
    let next = rig.service.window(vec![Part { slot, pages: 9..11, rank: 1 }], &Pace { page: 1 });
    let other = rig.touch(10);
    until("both are left", || rig.service.windows.left() == 2);
    drop(first);
    assert_eq!(ends(toucher), 7);
    assert!(rig.service.windows.left() == 1 && !other.is_finished());
    drop(next);
    assert_eq!(ends(other), 7);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_window_that_is_expected_to_take_long_has_nothing_left_to_it() {
    let Some(rig) = rig(false) else { return };
    rig.service.windows.patient.store(true, Ordering::SeqCst);
    let slot = rig.service.memory.map().slots().first().unwrap().clone();
    let part = |n| Part { slot: slot.clone(), pages: n..n + 1, rank: 9 - n as usize };
    for page in [0, 1_000_000] {
        let mut window = rig.service.window((4..6).map(part).collect(), &Pace { page });
        assert_eq!(ends(rig.touch(4 + usize::from(page > 0))), 7);
        let order: Vec<_> = std::iter::from_fn(|| window.next()).map(|part| part.pages.start).collect();
        assert_eq!(order, [4, 5], "in the order of addresses");
    }
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_fill_that_fails_is_the_end_for_who_was_left() {
    let Some(rig) = rig(false) else { return };
    rig.service.windows.patient.store(true, Ordering::SeqCst);
    rig.seen.fail.store(true, Ordering::SeqCst);
    let window = rig.window();
    let reader = rig.read_quietly(LEFT);
    rig.wait_for_left();
    rig.fill_left();
    assert!(!ends(reader), "poisoned");
    assert_eq!(rig.seen.wait_for(KUF_EVENT_POISONED).0, -libc::EIO);
    drop(window);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn who_was_left_is_known_to_wait() {
    let Some(rig) = rig(false) else { return };
    rig.service.quiesce(0).unwrap();
    let (window, toucher) = rig.window_with_fault();
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), libc::ETIMEDOUT);
    rig.fill_left();
    assert_eq!(ends(toucher), 7);
    rig.service.quiesce(-1).unwrap();
    let other = rig.touch(LEFT + 1);
    rig.wait_for_left();
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), libc::ETIMEDOUT);
    drop(window);
    assert_eq!(ends(other), 7);
    rig.service.quiesce(-1).unwrap();
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_panic_leaves_nobody_behind() {
    let Some(rig) = rig(false) else { return };
    let (window, toucher) = rig.window_with_fault();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _window = window;
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(result.is_err());
    assert_eq!(ends(toucher), 7);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_page_that_others_bring_is_there_for_who_was_left() {
    let Some(rig) = rig(false) else { return };
    let (window, toucher) = rig.window_with_fault();
    let (gpa, bytes) = ((LEFT * PAGE) as u64, vec![9_u8; PAGE]);
    assert_eq!(rig.service.resolve(gpa, PAGE as u64, Resolution::Data(bytes.as_ptr())).unwrap(), PAGE as u64);
    assert_eq!(ends(toucher), 9);
    let other = rig.touch(LEFT + 1);
    // The first is still on the list.
    until("it is left too", || rig.service.windows.left() == 2);
    rig.service.ensure(gpa + PAGE as u64, PAGE as u64, -1).unwrap();
    assert_eq!(ends(other), 7);
    // Both are served once more, and find their pages there.
    drop(window);
    assert_eq!(ends(rig.touch(0)), 7);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_page_that_is_discarded_is_filled_or_zero_as_ever() {
    for (removed, byte) in [(false, 7), (true, 0)] {
        let Some(rig) = rig(false) else { return };
        let (window, toucher) = rig.window_with_fault();
        rig.service.discard((LEFT * PAGE) as u64, PAGE as u64, removed).unwrap();
        drop(window);
        assert_eq!(ends(toucher), byte);
        rig.end(KUF_CLOSE_POISON);
    }
}

#[test]
fn the_end_of_a_slot_is_the_end_for_who_was_left() {
    let Some(rig) = rig(false) else { return };
    rig.service.windows.patient.store(true, Ordering::SeqCst);
    let window = rig.window();
    let reader = rig.read_quietly(LEFT);
    rig.wait_for_left();
    rig.service.remove_memory(0, KUF_CLOSE_POISON).unwrap();
    assert!(!ends(reader), "poisoned");
    // Its fault is of a slot that has gone.
    drop(window);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn the_end_of_the_service_is_the_end_for_who_was_left() {
    let Some(rig) = rig(false) else { return };
    rig.service.windows.patient.store(true, Ordering::SeqCst);
    let window = rig.window();
    let reader = rig.read_quietly(LEFT);
    rig.wait_for_left();
    rig.end(KUF_CLOSE_POISON);
    assert!(!ends(reader), "poisoned");
    drop(window);
}

#[test]
fn one_slow_window_says_little_and_two_say_it() {
    let Some(rig) = rig(false) else { return };
    let slot = rig.service.memory.map().slots().first().unwrap().clone();
    let mut pace = Pace::default();
    let window = || rig.service.window(vec![Part { slot: slot.clone(), pages: 0..10, rank: 1 }], &Pace::default());
    let open = |pace: &Pace| {
        let mut window = rig.service.window(vec![Part { slot: slot.clone(), pages: 0..10, rank: 1 }], pace);
        window.next();
        rig.service.windows.is_open()
    };
    assert!(!open(&pace), "nothing is known");
    pace.took(&window(), Duration::from_micros(150));
    assert!(open(&pace));
    pace.took(&window(), Duration::from_secs(1));
    assert!(open(&pace));
    pace.took(&window(), Duration::from_secs(1));
    assert!(!open(&pace));
    pace.took(&window(), Duration::from_micros(150));
    assert!(open(&pace));
    rig.end(KUF_CLOSE_POISON);
}
