//! A fault that is left to a replay ends, whatever becomes of its page.

use rustix::io::Errno;

use crate::abi::*;
use crate::service::background::populate;
use crate::service::background::replay_window::{self, Part, ReplayWindows, Window, WindowPace};
use crate::service::fault::fill;
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::{rig, Rig};
use crate::service::tests::rig::{ends, page_of, pattern, read_in_thread, wait_until, PAGE, PAGES};
use crate::sync::atomic::Ordering;
use crate::sync::thread::JoinHandle;
use crate::sync::time::Duration;

/// In the window, and the one that is touched.
const LEFT: u64 = 5;

impl Rig {
    fn windows(&self) -> &ReplayWindows {
        &self.service.background.windows
    }

    fn window_of(&self, parts: Vec<Part>, pace: &WindowPace) -> Window<'_> {
        replay_window::window(&self.service, parts, pace)
    }

    /// A window of pages 4 to 7, which the test fills or leaves.
    fn window(&self) -> Window<'_> {
        let slot = self.slot();
        let part = |n: u64| Part { slot: slot.clone(), pages: n..n + 1, rank: n as usize };
        self.window_of((4..8).map(part).collect(), &WindowPace { page: 1 })
    }

    /// The same, where no fault is late.
    fn patient_window(&self) -> Window<'_> {
        self.windows().patient.store(true, Ordering::SeqCst);
        self.window()
    }

    /// The same, with a fault left to it.
    fn window_with_fault(&self) -> (Window<'_>, JoinHandle<u8>) {
        let window = self.patient_window();
        let toucher = self.touch(LEFT);
        self.wait_for_left();
        (window, toucher)
    }

    fn wait_for_left(&self) {
        wait_until("the fault is left to the window", || self.windows().left() == 1);
    }

    /// Claims the page as a replay does, and fills it.
    fn fill_left(&self) {
        let run = populate::claim_ahead(&self.service, &self.slot(), LEFT..LEFT + 1, 1).unwrap().unwrap();
        assert_eq!(self.windows().left(), 0, "the fault waits for the claim now");
        assert_eq!(run.wanted, Some(LEFT), "and the source is told that a thread waits for the page");
        let _ = fill::fill(&self.service, &run);
    }
}

fn goes_on<T>(waiting: JoinHandle<T>) -> T {
    ends("the toucher goes on", waiting)
}

#[test]
fn a_fault_does_not_wait_for_a_window_that_stands_still() {
    let Some(rig) = rig() else { return };
    let window = rig.window();
    assert_eq!(goes_on(rig.touch(LEFT)), pattern(LEFT));
    // Later faults are not left to it either.
    assert_eq!(goes_on(rig.touch(LEFT + 1)), pattern(LEFT + 1));
    assert_eq!(goes_on(rig.touch(LEFT - 3)), pattern(LEFT - 3));
    drop(window);
    rig.end(KUF_END_POISON);
}

#[test]
fn a_fault_outside_the_window_is_served_at_once() {
    let Some(rig) = rig() else { return };
    let (window, toucher) = rig.window_with_fault();
    assert_eq!(goes_on(rig.touch(8)), pattern(8));
    assert!(!toucher.is_finished());
    drop(window);
    assert_eq!(goes_on(toucher), pattern(LEFT));
    assert_eq!(goes_on(rig.touch(LEFT + 1)), pattern(LEFT + 1));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_window_is_filled_last_page_first_and_its_fill_wakes_the_toucher() {
    let Some(rig) = rig() else { return };
    let (mut window, toucher) = rig.window_with_fault();
    let order: Vec<_> = std::iter::from_fn(|| window.next()).map(|part| part.pages.start).collect();
    assert_eq!(order, [7, 6, 5, 4]);
    let before = rig.service.stats().faults_joined;
    rig.fill_left();
    assert_eq!(goes_on(toucher), pattern(LEFT));
    assert_eq!(rig.service.stats().faults_joined, before + 1);
    drop(window);
    rig.end(KUF_END_POISON);
}

#[test]
fn two_windows_may_be_open_and_each_has_its_own_faults() {
    let Some(rig) = rig() else { return };
    let (first, toucher) = rig.window_with_fault();
    let slot = rig.slot();
    let next = rig.window_of(vec![Part { slot, pages: 9..11, rank: 1 }], &WindowPace { page: 1 });
    let other = rig.touch(10);
    wait_until("both are left", || rig.windows().left() == 2);
    drop(first);
    assert_eq!(goes_on(toucher), pattern(LEFT));
    assert!(rig.windows().left() == 1 && !other.is_finished());
    drop(next);
    assert_eq!(goes_on(other), pattern(10));
    rig.end(KUF_END_POISON);
}

#[test]
fn no_fault_is_left_to_a_window_that_is_expected_to_take_long() {
    let Some(rig) = rig() else { return };
    rig.windows().patient.store(true, Ordering::SeqCst);
    let slot = rig.slot();
    let part = |n| Part { slot: slot.clone(), pages: n..n + 1, rank: 9 - n as usize };
    for page in [0, 1_000_000] {
        let mut window = rig.window_of((4..6).map(part).collect(), &WindowPace { page });
        let touched = 4 + u64::from(page > 0);
        assert_eq!(goes_on(rig.touch(touched)), pattern(touched));
        let order: Vec<_> = std::iter::from_fn(|| window.next()).map(|part| part.pages.start).collect();
        assert_eq!(order, [4, 5], "in the order of addresses");
    }
    rig.end(KUF_END_POISON);
}

#[test]
fn a_fill_that_fails_ends_a_left_fault_with_poison() {
    let Some(rig) = rig() else { return };
    rig.caller.fail(0..PAGES);
    let window = rig.patient_window();
    let reader = read_in_thread(rig.hva + LEFT * PAGE);
    rig.wait_for_left();
    rig.fill_left();
    assert!(!goes_on(reader), "poisoned");
    assert_eq!(rig.caller.wait_for(KUF_EVENT_POISONED).error, -libc::EIO);
    drop(window);
    rig.end(KUF_END_POISON);
}

#[test]
fn quiesce_waits_for_a_left_fault() {
    let Some(rig) = rig() else { return };
    rig.service.quiesce(0).unwrap();
    let (window, toucher) = rig.window_with_fault();
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), Errno::TIMEDOUT);
    rig.fill_left();
    assert_eq!(goes_on(toucher), pattern(LEFT));
    rig.service.quiesce(-1).unwrap();
    let other = rig.touch(LEFT + 1);
    rig.wait_for_left();
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), Errno::TIMEDOUT);
    drop(window);
    assert_eq!(goes_on(other), pattern(LEFT + 1));
    rig.service.quiesce(-1).unwrap();
    rig.end(KUF_END_POISON);
}

#[test]
fn a_left_fault_is_served_after_a_panic() {
    let Some(rig) = rig() else { return };
    let (window, toucher) = rig.window_with_fault();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _window = window;
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(result.is_err());
    assert_eq!(goes_on(toucher), pattern(LEFT));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_page_that_another_call_brings_ends_a_left_fault() {
    let Some(rig) = rig() else { return };
    let (window, toucher) = rig.window_with_fault();
    assert_eq!(rig.service.resolve(LEFT * PAGE, &page_of(9)).unwrap(), PAGE);
    assert_eq!(goes_on(toucher), 9);
    let other = rig.touch(LEFT + 1);
    // The first is still on the list.
    wait_until("the second is left too", || rig.windows().left() == 2);
    rig.service.ensure((LEFT + 1) * PAGE, PAGE).unwrap();
    assert_eq!(goes_on(other), pattern(LEFT + 1));
    // Both faults are served once more, and find their pages present.
    drop(window);
    assert_eq!(goes_on(rig.touch(0)), pattern(0));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_left_fault_of_a_discarded_page_reads_the_source_or_zero() {
    for (removed, byte) in [(false, pattern(LEFT)), (true, 0)] {
        let Some(rig) = rig() else { return };
        let (window, toucher) = rig.window_with_fault();
        rig.service.discard(LEFT * PAGE, PAGE, removed).unwrap();
        drop(window);
        assert_eq!(goes_on(toucher), byte);
        rig.end(KUF_END_POISON);
    }
}

#[test]
fn the_end_of_a_slot_poisons_the_page_of_a_left_fault() {
    let Some(rig) = rig() else { return };
    let window = rig.patient_window();
    let reader = read_in_thread(rig.hva + LEFT * PAGE);
    rig.wait_for_left();
    rig.service.remove(0, KUF_END_POISON).unwrap();
    assert!(!goes_on(reader), "poisoned");
    // The slot of its fault was removed.
    drop(window);
    rig.end(KUF_END_POISON);
}

#[test]
fn the_end_of_the_service_poisons_the_page_of_a_left_fault() {
    let Some(rig) = rig() else { return };
    let window = rig.patient_window();
    let reader = read_in_thread(rig.hva + LEFT * PAGE);
    rig.wait_for_left();
    rig.end(KUF_END_POISON);
    assert!(!goes_on(reader), "poisoned");
    drop(window);
}

#[test]
fn one_slow_window_changes_nothing_and_two_close_the_next() {
    let Some(rig) = rig() else { return };
    let slot = rig.slot();
    let mut pace = WindowPace::default();
    let window = || rig.window_of(vec![Part { slot: slot.clone(), pages: 0..10, rank: 1 }], &WindowPace::default());
    let open = |pace: &WindowPace| {
        let mut window = rig.window_of(vec![Part { slot: slot.clone(), pages: 0..10, rank: 1 }], pace);
        window.next();
        rig.windows().is_open()
    };
    assert!(!open(&pace), "no pace is known yet");
    pace.took(&window(), Duration::from_micros(150));
    assert!(open(&pace));
    pace.took(&window(), Duration::from_secs(1));
    assert!(open(&pace));
    pace.took(&window(), Duration::from_secs(1));
    assert!(!open(&pace));
    pace.took(&window(), Duration::from_micros(150));
    assert!(open(&pace));
    rig.end(KUF_END_POISON);
}
