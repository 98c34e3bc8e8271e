// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attempts to break the interface for Rust programs from safe code: this file may not contain `unsafe`. Guest memory is
//! that of the vm-memory crate.

#![cfg(not(any(loom, shuttle)))]
#![forbid(unsafe_code)]

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{mpsc, Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use kuf::{Discard, End, Errno, EventKind, Filled, Kuf, LogLevel, Memory, Options, Run};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 4096;
const LEN: u64 = 64 * PAGE;
/// How long a test waits for what has to come.
const PATIENCE: Duration = Duration::from_secs(20);

fn guest() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LEN as usize)]).unwrap()
}

fn memory(guest: &GuestMemoryMmap<()>) -> Memory<'static> {
    Memory::region(guest.find_region(GuestAddress(0)).unwrap())
}

/// Touches a page as a guest does, and returns its first byte.
fn touch(guest: &GuestMemoryMmap<()>, page: u64) -> u8 {
    guest.read_obj(GuestAddress(page * PAGE)).unwrap()
}

fn sevens(run: &mut Run<'_>) -> Filled {
    run.buf().fill(7);
    Filled::Done
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn no_byte_behind_a_static_slice_reaches_the_guest() {
    /// The callback knows the first page only.
    static IMAGE: [[u8; PAGE as usize]; 2] = [[7; PAGE as usize], [99; PAGE as usize]];
    let options = Options::serviced(|run: &mut Run<'_>| {
        match run.memory_offset() / PAGE {
            // Less than a page is there.
            32.. => run.use_static(&IMAGE[0][1..]),
            _ => run.use_static(&IMAGE[0]),
        }
        let wanted = run.len();
        run.set_filled(wanted);
        Filled::Done
    });
    let (kuf, guest) = (Kuf::open(options.user_mode_only()).unwrap(), guest());
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    kuf.ensure(0, 32 * PAGE, Some(PATIENCE)).unwrap();
    assert_eq!((0..32).map(|page| touch(&guest, page)).collect::<Vec<_>>(), [7; 32]);
    assert_eq!(kuf.ensure(32 * PAGE, PAGE, Some(PATIENCE)).unwrap_err().errno(), Errno::HWPOISON);
    assert_eq!(slot.progress().unwrap().present, 32 * PAGE);
}

/// The payload of a panic: it panics again when it is dropped, this many times.
struct Again(u8);

impl Drop for Again {
    fn drop(&mut self) {
        if self.0 > 0 && !thread::panicking() {
            resume_unwind(Box::new(Again(self.0 - 1)));
        }
    }
}

#[test]
fn a_panic_that_panics_again_stays_inside() {
    let (logged, told) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (log, tell) = (logged.clone(), told.clone());
    let options = Options::serviced(|run: &mut Run<'_>| match run.memory_offset() {
        0 => resume_unwind(Box::new(Again(2))),
        _ => sevens(run),
    });
    let options = options.demand_run(PAGE).on_event(move |event| {
        tell.fetch_add(u64::from(event.kind() == EventKind::Populated), SeqCst);
        resume_unwind(Box::new(Again(2)))
    });
    let options = options.on_log(LogLevel::Debug, move |_, _| {
        log.fetch_add(1, SeqCst);
        resume_unwind(Box::new(Again(2)))
    });
    let (kuf, guest) = (Kuf::open(options.user_mode_only()).unwrap(), guest());
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    // On this thread, on the one that populates, and on a service thread.
    assert_eq!(kuf.ensure(0, 1, Some(PATIENCE)).unwrap_err().errno(), Errno::HWPOISON);
    kuf.discard(0, PAGE, Discard::Refill).unwrap();
    kuf.populate_all(0).unwrap();
    wait_until("populate has ended", || told.load(SeqCst) == 1);
    assert_eq!(touch(&guest, 6), 7);
    // A thread goes on a moment before its page is booked.
    wait_until("the page is booked", || slot.progress().unwrap().present > 0);
    assert!(logged.load(SeqCst) > 0);
    kuf.close(End::Poison).unwrap();
}

/// Makes calls when it is dropped, and may panic then.
struct Calls {
    kuf: Arc<OnceLock<Arc<Kuf>>>,
    errors: mpsc::Sender<Vec<Errno>>,
    panics: bool,
}

impl Drop for Calls {
    fn drop(&mut self) {
        if let Some(kuf) = self.kuf.get() {
            let calls = [
                kuf.close(End::Poison),
                kuf.discard(0, PAGE, Discard::Zero),
                kuf.ensure(0, PAGE, None),
                kuf.resolve_zero(0, PAGE).map(drop),
                kuf.add_memory(memory(&guest())).map(drop),
            ];
            let _ = self.errors.send(calls.into_iter().filter_map(Result::err).map(|error| error.errno()).collect());
        }
        if self.panics {
            resume_unwind(Box::new(Again(2)));
        }
    }
}

#[test]
fn what_a_slot_keeps_may_call_and_panic_when_it_goes() {
    for (panics, removed) in [(false, true), (true, true), (false, false), (true, false)] {
        let ((errors, seen), here) = (mpsc::channel(), Arc::new(OnceLock::new()));
        let kuf = Arc::new(Kuf::open(Options::serviced(sevens).user_mode_only()).unwrap());
        assert!(here.set(kuf.clone()).is_ok());
        let guest = guest();
        let slot = kuf.add_memory(memory(&guest).keep(Arc::new(Calls { kuf: here, errors, panics }))).unwrap();
        slot.ensure(None).unwrap();
        if removed {
            slot.remove(End::Complete).unwrap();
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), [Errno::DEADLK; 5]);
            assert_eq!(kuf.progress().unwrap().total, 0);
        }
        kuf.close(End::Poison).unwrap();
        if !removed {
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap().len(), 5);
        }
    }
}

#[test]
fn what_a_callback_owns_may_call_and_panic_when_it_goes() {
    for panics in [false, true] {
        let ((errors, seen), here) = (mpsc::channel(), Arc::new(OnceLock::new()));
        let calls = Calls { kuf: here.clone(), errors, panics };
        let options = Options::serviced(move |run: &mut Run<'_>| {
            let _ = &calls;
            sevens(run)
        });
        let kuf = Arc::new(Kuf::open(options.user_mode_only()).unwrap());
        assert!(here.set(kuf.clone()).is_ok());
        kuf.add_memory(memory(&guest())).unwrap().ensure(None).unwrap();
        kuf.close(End::Complete).unwrap();
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap().len(), 5);
    }
}

#[test]
fn a_callback_outlives_its_handle_and_its_memory() {
    let ((begun, has_begun), (go, may_go)) = (mpsc::channel(), mpsc::channel::<()>());
    let (begun, may_go, alive) = (Mutex::new(begun), Mutex::new(may_go), Arc::new(()));
    let also = alive.clone();
    let options = Options::serviced(move |run: &mut Run<'_>| {
        let (_, buf) = (&also, run.buf());
        buf.fill(1);
        begun.lock().unwrap().send(()).unwrap();
        let _ = may_go.lock().unwrap().recv();
        assert!(buf.iter().all(|byte| *byte == 1));
        buf.fill(2);
        Filled::Done
    });
    let (kuf, guest) = (Kuf::open(options.user_mode_only()).unwrap(), guest());
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    slot.populate().unwrap();
    has_begun.recv_timeout(PATIENCE).unwrap();
    kuf.close_without_waiting(End::Poison).unwrap();
    drop((kuf, guest));
    assert_eq!(slot.progress().unwrap_err().errno(), Errno::BADF);
    drop(go);
    wait_until("the callback has gone", || Arc::strong_count(&alive) == 1);
}

#[test]
fn a_handle_that_is_forgotten_serves_on() {
    let (kuf, guest) = (Kuf::open(Options::serviced(sevens).user_mode_only()).unwrap(), guest());
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    std::mem::forget((kuf, slot.clone()));
    assert_eq!(touch(&guest, 9), 7);
    // Its memory stays mapped.
    drop(guest);
    slot.ensure(None).unwrap();
    slot.remove(End::Complete).unwrap();
    assert_eq!(slot.remove(End::Complete).unwrap_err().errno(), Errno::NOENT);
}

#[test]
fn numbers_beyond_all_memory_are_refused() {
    let (kuf, guest) = (Kuf::open(Options::caller_driven().user_mode_only()).unwrap(), guest());
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    assert!(kuf.read(0).unwrap().is_empty() && kuf.read(usize::MAX).unwrap().is_empty());
    let refused = [
        kuf.resolve(0, &[]).map(drop),
        kuf.resolve(u64::MAX, &[0; PAGE as usize]).map(drop),
        kuf.resolve_zero(u64::MAX - PAGE + 1, u64::MAX - PAGE + 1).map(drop),
        kuf.resolve_in_place(0, PAGE).map(drop),
        kuf.poison(0, u64::MAX).map(drop),
        kuf.populate(u64::MAX, u64::MAX, u64::MAX),
        kuf.ensure(u64::MAX, u64::MAX, Some(Duration::MAX)),
        kuf.discard(0, 0, Discard::Zero),
        slot.discard(u64::MAX, u64::MAX, Discard::Zero),
        kuf.vcpu_fault(u64::MAX, u64::MAX, u64::MAX),
    ];
    let errors = refused.map(|result| result.unwrap_err().errno());
    assert!(errors.iter().all(|errno| [Errno::INVAL, Errno::NOTSUP, Errno::RANGE].contains(errno)), "{errors:?}");
    assert_eq!(slot.progress().unwrap().absent, LEN);
}

#[test]
fn a_callback_may_resolve_and_discard_what_it_fills() {
    let here = Arc::new(OnceLock::<Arc<Kuf>>::new());
    let (inner, log) = (here.clone(), here.clone());
    let options = Options::serviced(move |run: &mut Run<'_>| {
        let (kuf, gpa, len) = (inner.get().unwrap(), run.gpa(), run.len());
        let buf = run.buf();
        buf.fill(3);
        let _ = kuf.discard(gpa, PAGE, Discard::Refill);
        let _ = kuf.resolve_zero(gpa, PAGE);
        buf.fill(4);
        let _ = kuf.discard(gpa, len, Discard::Zero);
        buf.fill(5);
        Filled::Done
    });
    let options = options.on_log(LogLevel::Debug, move |_, _| {
        let refused = log.get().map(|kuf| kuf.resolve_zero(0, PAGE).unwrap_err().errno());
        assert!([None, Some(Errno::DEADLK)].contains(&refused), "{refused:?}");
    });
    let kuf = Arc::new(Kuf::open(options.user_mode_only()).unwrap());
    assert!(here.set(kuf.clone()).is_ok());
    let guest = guest();
    let slot = kuf.add_memory(memory(&guest)).unwrap();
    // Memory that was given back last reads as zero.
    assert_eq!((0..64).map(|page| touch(&guest, page)).collect::<Vec<_>>(), [0; 64]);
    assert_eq!(slot.progress().unwrap().poisoned, 0);
    kuf.close(End::Poison).unwrap();
}
