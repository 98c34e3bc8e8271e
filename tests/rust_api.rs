// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the interface for Rust programs: a handle over memory of this process, touched by its own threads.

#![cfg(not(any(loom, shuttle)))]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{mpsc, Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use kuf::{
    probe, Discard, End, Errno, Event, EventKind, Fault, Feature, Fill, Filled, Kuf, LogLevel, Mechanism, Memory,
    Options, Run, Slot, Source,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const LEN: u64 = PAGES * PAGE;
/// Where the slots of these tests are.
const GPA: u64 = 1 << 30;
/// How long a test waits for what has to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Private memory, mapped as long as the process lives.
fn mapping() -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN as usize, prot, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// A mapping of a file, for the life of the process.
fn shared(file: &File) -> *mut u8 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN as usize, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// A slot over a mapping of these tests.
fn memory(host: *mut u8) -> Memory<'static> {
    // SAFETY: from `mapping`, and read by raw pointers and system calls only.
    unsafe { Memory::new(GPA, LEN, host) }
}

/// The first byte of a page, read by a system call. None: the page is absent, poisoned or inaccessible.
fn byte(host: *mut u8, page: u64) -> Option<u8> {
    let mut byte = [0_u8];
    let at = host.wrapping_add((page * PAGE) as usize);
    let (to, from) = (
        libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 },
        libc::iovec { iov_base: at.cast(), iov_len: 1 },
    );
    // SAFETY: reads into `byte` only.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    (n == 1).then_some(byte[0])
}

/// Touches a page as a guest does, and returns its first byte.
fn touch(host: Host, page: u64) -> u8 {
    // SAFETY: within the mapping, which lives as long as the process.
    unsafe { host.0.add((page * PAGE) as usize).read_volatile() }
}

/// The address of guest memory, for threads.
#[derive(Clone, Copy)]
struct Host(*mut u8);

// SAFETY: used by volatile reads only.
unsafe impl Send for Host {}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The byte of a page.
fn pattern(gpa: u64) -> u8 {
    (gpa / PAGE % 251 + 1) as u8
}

fn write_pattern(run: &mut Run<'_>) -> Filled {
    let gpa = run.gpa();
    run.buf().chunks_mut(PAGE as usize).zip(0..).for_each(|(page, n)| page.fill(pattern(gpa + n * PAGE)));
    Filled::Done
}

/// A serviced handle with one slot.
fn serviced(options: Options) -> (Kuf, Slot, Host) {
    let (kuf, host) = (Kuf::open(options.user_mode_only()).expect("a handle"), mapping());
    let slot = kuf.add_memory(memory(host)).expect("a slot");
    (kuf, slot, Host(host))
}

/// Events as an event callback keeps them.
type Kept = Arc<Mutex<Vec<(EventKind, u64, Option<Errno>)>>>;

fn keeping(options: Options) -> (Options, Kept) {
    let kept = Kept::default();
    let keep = kept.clone();
    let options = options.on_event(move |event: &Event<'_>| {
        assert!(!event.text().contains('\0') && !event.text().is_empty());
        keep.lock().unwrap().push((event.kind(), event.gpa(), event.error()));
    });
    (options, kept)
}

fn has(kept: &Kept, kind: EventKind) -> bool {
    kept.lock().unwrap().iter().any(|(there, ..)| *there == kind)
}

#[test]
fn types_may_be_used_by_many_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Kuf>();
    shared::<Slot>();
    shared::<Fault>();
    shared::<kuf::Error>();
    shared::<kuf::Probe>();
    shared::<kuf::Stats>();
    shared::<kuf::Progress>();
    shared::<kuf::Settings>();
    shared::<Event<'static>>();
    fn moved<T: Send + 'static>() {}
    moved::<Options>();
}

#[test]
fn two_threads_are_served_and_the_rest_is_filled_at_the_end() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    let options = Options::serviced(move |run: &mut Run<'_>| {
        assert_eq!((run.gpa() - GPA, run.page_size(), run.tag()), (run.memory_offset(), PAGE, 0));
        count.fetch_add(run.len() / PAGE, SeqCst);
        write_pattern(run)
    });
    let (options, events) = keeping(options.demand_run(PAGE).fill_threads(3));
    let (kuf, slot, host) = serviced(options);
    let threads = [0, 1].map(|first| {
        thread::spawn(move || {
            (first..PAGES / 2).step_by(2).for_each(|page| assert_eq!(touch(host, page), pattern(GPA + page * PAGE)));
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // Threads go on a moment before their pages are booked.
    wait_until("all is booked", || slot.progress().unwrap().present == LEN / 2);
    let progress = slot.progress().unwrap();
    assert_eq!((progress.present, progress.absent, progress.total), (LEN / 2, LEN / 2, LEN));
    assert!(!progress.is_complete() && progress == kuf.progress().unwrap());
    let settings = kuf.settings().unwrap();
    assert_eq!((settings.fill_threads, settings.demand_run, settings.mechanism), (3, PAGE, Mechanism::Userfaultfd));
    wait_until("all is counted", || kuf.stats().unwrap().bytes_copied == LEN / 2);
    assert!(kuf.stats().unwrap().faults >= PAGES / 2);
    assert_eq!(kuf.close(End::Complete).unwrap_err().errno(), Errno::BUSY);
    kuf.close(End::Populate).unwrap();
    assert_eq!(asked.load(SeqCst), PAGES);
    assert!((0..PAGES).all(|page| byte(host.0, page) == Some(pattern(GPA + page * PAGE))));
    assert!(has(&events, EventKind::Complete), "{events:?}");
    assert_eq!(kuf.close(End::Complete).unwrap_err().errno(), Errno::BADF);
    assert_eq!(slot.progress().unwrap_err().errno(), Errno::BADF);
}

#[test]
fn a_fill_answers_in_part_with_zeroes_and_from_elsewhere() {
    static IMAGE: [u8; 2 * PAGE as usize] = [9; 2 * PAGE as usize];
    struct Source;
    impl Fill for Source {
        fn fill(&self, run: &mut Run<'_>) -> Filled {
            match run.memory_offset() / PAGE {
                0..8 => {
                    run.set_filled(PAGE);
                    write_pattern(run)
                }
                8..16 => {
                    run.set_filled(PAGE);
                    Filled::Zero
                }
                16..24 => {
                    run.use_static(&IMAGE);
                    Filled::Done
                }
                24..32 => {
                    // SAFETY: static, and longer than what is said to be there.
                    unsafe { run.use_bytes(IMAGE.as_ptr()) };
                    run.set_filled(PAGE);
                    Filled::Done
                }
                _ => Filled::from(std::io::Error::from_raw_os_error(libc::ESTALE)),
            }
        }
    }
    let (options, events) = keeping(Options::serviced_by(Source));
    let (kuf, _, host) = serviced(options);
    let expected =
        [(0, pattern(GPA)), (7, pattern(GPA + 7 * PAGE)), (8, 0), (15, 0), (16, 9), (23, 9), (24, 9), (31, 9)];
    expected.iter().for_each(|(page, byte)| assert_eq!(touch(host, *page), *byte, "page {page}"));
    let failed = kuf.ensure(GPA + 40 * PAGE, PAGE, Some(PATIENCE));
    assert_eq!(failed.unwrap_err().errno(), Errno::HWPOISON);
    assert_eq!(byte(host.0, 40), None);
    assert!(events.lock().unwrap().contains(&(EventKind::Poisoned, GPA + 40 * PAGE, Some(Errno::STALE))), "{events:?}");
}

#[test]
fn a_caller_reads_faults_and_resolves_them() {
    for options in [Options::caller_driven(), Options::direct()] {
        let (kuf, slot, host) = serviced(options);
        let kuf = Arc::new(kuf);
        assert!(!kuf.poll(Some(Duration::ZERO)).unwrap());
        assert!(kuf.read(8).unwrap().is_empty());
        let done = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (kuf, done) = (kuf.clone(), done.clone());
            move || {
                let mut faults = Vec::new();
                while !done.load(SeqCst) {
                    kuf.poll(Some(Duration::from_millis(10))).unwrap();
                    kuf.read_into(&mut faults, 4).unwrap();
                    for fault in faults.drain(..) {
                        assert!(fault.is_demand() && fault.len() == PAGE && fault.gpa() == GPA + fault.memory_offset());
                        assert!(kuf.pending().unwrap().iter().any(|owed| owed.gpa() == fault.gpa()));
                        match fault.memory_offset() / PAGE {
                            3 => kuf.resolve_zero(fault.gpa(), PAGE),
                            _ => kuf.resolve(fault.gpa(), &[pattern(fault.gpa()); PAGE as usize]),
                        }
                        .unwrap();
                    }
                }
            }
        });
        assert_eq!([0, 1, 3].map(|page| touch(host, page)), [pattern(GPA), pattern(GPA + PAGE), 0]);
        kuf.ensure(GPA + 5 * PAGE, 1, Some(PATIENCE)).unwrap();
        assert_eq!(touch(host, 5), pattern(GPA + 5 * PAGE));
        done.store(true, SeqCst);
        reader.join().unwrap();
        assert_eq!(kuf.poison(GPA + 7 * PAGE, 2 * PAGE).unwrap(), 2 * PAGE);
        assert_eq!(byte(host.0, 7), None);
        // Pages that are present keep their bytes, and do not count.
        assert_eq!(kuf.resolve(GPA, &vec![1; 3 * PAGE as usize]).unwrap(), PAGE);
        assert_eq!([0, 1, 2].map(|page| touch(host, page)), [pattern(GPA), pattern(GPA + PAGE), 1]);
        assert!(kuf.fd().is_ok() && kuf.populate_all(0).unwrap_err().errno() == Errno::NOTSUP);
        assert_eq!(slot.remove(End::Complete).unwrap_err().errno(), Errno::BUSY);
        slot.remove(End::Poison).unwrap();
        assert_eq!(slot.remove(End::Poison).unwrap_err().errno(), Errno::NOENT);
        kuf.close(End::Complete).unwrap();
    }
}

#[test]
fn deferred_runs_are_resolved_by_another_thread() {
    let (ask, asked) = mpsc::channel();
    let ask = Mutex::new(ask);
    let options = Options::serviced(move |run: &mut Run<'_>| match ask.lock().unwrap().send((run.gpa(), run.len())) {
        Ok(()) => Filled::Deferred,
        Err(_) => Filled::Failed(Errno::PIPE),
    });
    let (kuf, _, host) = serviced(options.demand_run(4 * PAGE));
    let kuf = Arc::new(kuf);
    let resolver = thread::spawn({
        let kuf = kuf.clone();
        move || {
            for (gpa, len) in asked {
                for page in (0..len / PAGE).rev().map(|n| gpa + n * PAGE) {
                    kuf.resolve(page, &[pattern(page); PAGE as usize]).unwrap();
                }
                if gpa + len == GPA + LEN {
                    return;
                }
            }
        }
    });
    (0..PAGES).for_each(|page| assert_eq!(touch(host, page), pattern(GPA + page * PAGE)));
    resolver.join().unwrap();
    kuf.close(End::Complete).unwrap();
}

#[test]
fn runs_are_left_for_later_and_an_end_has_a_limit() {
    const TAG: usize = 77;
    let busy = Arc::new(AtomicBool::new(true));
    let is_busy = busy.clone();
    let told = Arc::new(Mutex::new(Vec::new()));
    let keep = told.clone();
    let options = Options::serviced(move |run: &mut Run<'_>| match is_busy.load(SeqCst) {
        true if run.is_demand() => Filled::Deferred,
        true => Filled::Later,
        false => write_pattern(run),
    });
    let options = options.on_event(move |event| keep.lock().unwrap().push((event.kind(), event.tag(), event.error())));
    let options = options.demand_run(PAGE).end_timeout(Some(Duration::from_millis(20)));
    let (kuf, host) = (Kuf::open(options.user_mode_only()).unwrap(), Host(mapping()));
    let slot = kuf.add_memory(memory(host.0).tag(TAG)).unwrap();
    slot.populate().unwrap();
    let later = (EventKind::Populated, None, Some(Errno::AGAIN));
    wait_until("the request is through", || told.lock().unwrap().contains(&later));
    assert_eq!(slot.remove(End::Populate).unwrap_err().errno(), Errno::IO);
    // A page that a thread demands is deferred, and nothing answers.
    let toucher = thread::spawn(move || touch(host, 0));
    wait_until("a page is demanded", || kuf.progress().unwrap().deferred == PAGE);
    busy.store(false, SeqCst);
    assert_eq!(slot.remove(End::Populate).unwrap_err().errno(), Errno::TIMEDOUT);
    kuf.resolve(GPA, &[pattern(GPA); PAGE as usize]).unwrap();
    assert_eq!(toucher.join().unwrap(), pattern(GPA));
    slot.remove(End::Populate).unwrap();
    wait_until("the slot is complete", || told.lock().unwrap().contains(&(EventKind::Complete, Some(TAG), None)));
    kuf.close(End::Complete).unwrap();
}

#[test]
fn a_callback_ends_no_handle_and_may_resolve_its_own_run() {
    let kuf = Arc::new(OnceLock::<Kuf>::new());
    let here = kuf.clone();
    let options = Options::serviced(move |run: &mut Run<'_>| {
        let kuf = here.get().unwrap();
        for refused in [kuf.close(End::Poison), kuf.ensure(GPA, PAGE, None), kuf.poll(None).map(drop)] {
            assert_eq!(refused.unwrap_err().errno(), Errno::DEADLK);
        }
        let bytes = vec![5; run.len() as usize];
        kuf.resolve(run.gpa(), &bytes).unwrap();
        Filled::Deferred
    });
    let (opened, _, host) = serviced(options);
    assert!(kuf.set(opened).is_ok());
    assert_eq!(touch(host, 0), 5);
    kuf.get().unwrap().close(End::Poison).unwrap();
}

#[test]
fn a_panic_in_a_fill_poisons_the_page_and_nothing_else() {
    let options = Options::serviced(|run: &mut Run<'_>| match run.memory_offset() {
        0 => std::panic::resume_unwind(Box::new("as the test wants it")),
        _ => write_pattern(run),
    });
    let (kuf, _, host) = serviced(options.demand_run(PAGE));
    assert_eq!(kuf.ensure(GPA, 1, None).unwrap_err().errno(), Errno::HWPOISON);
    assert_eq!((byte(host.0, 0), touch(host, 1)), (None, pattern(GPA + PAGE)));
}

#[test]
fn drop_poisons_and_drops_the_callbacks() {
    let alive = Arc::new(());
    let (also, still, yet) = (alive.clone(), alive.clone(), alive.clone());
    let options = Options::serviced(move |run: &mut Run<'_>| {
        let _ = &also;
        write_pattern(run)
    });
    let options = options.on_event(move |_| drop(still.clone())).on_log(LogLevel::Debug, move |_, _| drop(yet.clone()));
    let (kuf, slot, host) = serviced(options.demand_run(PAGE));
    assert_eq!(touch(host, 2), pattern(GPA + 2 * PAGE));
    assert_eq!(Arc::strong_count(&alive), 4);
    drop(kuf);
    assert_eq!((byte(host.0, 2), byte(host.0, 3)), (Some(pattern(GPA + 2 * PAGE)), None));
    assert_eq!(Arc::strong_count(&alive), 1);
    assert_eq!(slot.populate().unwrap_err().errno(), Errno::BADF);
}

#[test]
fn a_handle_may_be_dropped_in_a_callback() {
    let (kept, alive) = (Arc::new(Mutex::new(None::<Kuf>)), Arc::new(()));
    let (here, also) = (kept.clone(), alive.clone());
    let options = Options::serviced(move |run: &mut Run<'_>| {
        drop(here.lock().unwrap().take());
        let _ = &also;
        write_pattern(run)
    });
    let (kuf, slot, _) = serviced(options);
    *kept.lock().unwrap() = Some(kuf);
    // It may end before all is filled.
    let _ = slot.ensure(None);
    wait_until("the handle has ended", || Arc::strong_count(&alive) == 1);
    assert_eq!(slot.progress().unwrap_err().errno(), Errno::BADF);
}

#[test]
fn memory_is_kept_until_its_slot_has_gone() {
    let (owner, other) = (Arc::new(()), Arc::new(()));
    let kuf = Kuf::open(Options::serviced(write_pattern).user_mode_only()).unwrap();
    let slot = kuf.add_memory(memory(mapping()).keep(owner.clone()).keep(other.clone())).unwrap();
    assert_eq!((Arc::strong_count(&owner), Arc::strong_count(&other)), (2, 2));
    slot.ensure(None).unwrap();
    slot.remove(End::Complete).unwrap();
    wait_until("the slot has gone", || Arc::strong_count(&owner) + Arc::strong_count(&other) == 2);
    // Memory that is refused is not kept.
    let refused = kuf.add_memory(memory(std::ptr::null_mut()).keep(owner.clone()));
    assert_eq!((refused.unwrap_err().errno(), Arc::strong_count(&owner)), (Errno::INVAL, 1));
}

#[test]
fn populate_and_discard_and_their_events() {
    let (options, events) = keeping(Options::serviced(write_pattern));
    let (kuf, slot, host) = serviced(options);
    slot.populate().unwrap();
    wait_until("all is filled", || has(&events, EventKind::Populated));
    assert!(slot.progress().unwrap().is_complete() && has(&events, EventKind::Complete));
    slot.discard(0, PAGE, Discard::Zero).unwrap();
    slot.discard(PAGE, PAGE, Discard::Refill).unwrap();
    assert_eq!([0, 1].map(|page| touch(host, page)), [0, pattern(GPA + PAGE)]);
    kuf.populate(GPA, LEN, 1 << 30).unwrap();
    kuf.populate_stop().unwrap();
    assert_eq!(kuf.populate(GPA + 1, PAGE, 0).unwrap_err().errno(), Errno::INVAL);
    kuf.close(End::Complete).unwrap();
}

#[test]
fn a_source_lies_over_another() {
    let page = |value| -> Arc<[u8]> { vec![value; LEN as usize].into() };
    let newer = Source::shared(page(7)).bitmap(&[0b10, 0, 0, 0, 0, 0, 0, 0], PAGE).unwrap();
    let older = Source::shared(page(8)).part(2 * PAGE..3 * PAGE);
    let kuf = Kuf::open(Options::sources().user_mode_only()).unwrap();
    let host = mapping();
    // SAFETY: as for `memory`.
    let memory = unsafe { Memory::new(GPA, LEN, host) }.source(newer.over(older).over(Source::zero()));
    kuf.add_memory(memory).unwrap();
    let bytes = (0..4).map(|n| touch(Host(host), n)).collect::<Vec<_>>();
    assert_eq!(bytes, [0, 7, 8, 0]);
    kuf.close(End::Populate).unwrap();
}

#[test]
fn slots_have_sources_of_their_own() {
    static IMAGE: [u8; LEN as usize] = [3; LEN as usize];
    // SAFETY: a new descriptor.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(2 * LEN).unwrap();
    file.write_all_at(&[4; LEN as usize], PAGE).unwrap();
    let shared: Arc<[u8]> = vec![5; LEN as usize].into();
    let kuf = Kuf::open(Options::sources().user_mode_only()).unwrap();
    let (mut gpa, mut hosts) = (GPA, Vec::new());
    let sources = [Source::file(&file, PAGE), Source::bytes(&IMAGE), Source::shared(shared.clone()), Source::zero()];
    for source in sources {
        let host = mapping();
        // SAFETY: as for `memory`.
        kuf.add_memory(unsafe { Memory::new(gpa, LEN, host) }.source(source)).unwrap();
        hosts.push(Host(host));
        gpa += LEN;
    }
    assert_eq!(hosts.iter().map(|host| touch(*host, 9)).collect::<Vec<_>>(), [4, 3, 5, 0]);
    // SAFETY: as for `memory`.
    let memory = |gpa| unsafe { Memory::new(gpa, LEN, mapping()) };
    let none = kuf.add_memory(memory(gpa)).unwrap_err();
    let short = kuf.add_memory(memory(gpa).source(Source::bytes(&IMAGE[1..]))).unwrap_err();
    assert_eq!((none.errno(), short.errno()), (Errno::INVAL, Errno::INVAL));
    assert!(Arc::strong_count(&shared) > 1);
    kuf.close(End::Populate).unwrap();
    assert_eq!(Arc::strong_count(&shared), 1);
}

#[test]
fn shared_memory_is_filled_in_place() {
    // SAFETY: a new descriptor.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(LEN).unwrap();
    let in_place = Arc::new(AtomicU64::new(0));
    let count = in_place.clone();
    let options = Options::serviced(move |run: &mut Run<'_>| {
        count.fetch_add(run.is_in_place().into(), SeqCst);
        assert_eq!(run.buf_ptr().as_ptr(), run.buf().as_mut_ptr());
        write_pattern(run)
    });
    let kuf = Kuf::open(options.user_mode_only()).unwrap();
    let host = shared(&file);
    // SAFETY: as for `memory`; no page of the file is touched but through the slot.
    let slot = kuf.add_memory(unsafe { Memory::new(GPA, LEN, host).file(&file, 0) }).unwrap();
    let settings = slot.settings().unwrap();
    assert_eq!((settings.page_size, settings.adopted, settings.remote), (PAGE, false, false));
    assert_eq!(touch(Host(host), 5), pattern(GPA + 5 * PAGE));
    assert_eq!(in_place.load(SeqCst) > 0, settings.in_place);
    slot.remove(End::Populate).unwrap();
    let mut page = [0; PAGE as usize];
    file.read_exact_at(&mut page, LEN - PAGE).unwrap();
    assert_eq!(page, [pattern(GPA + LEN - PAGE); PAGE as usize]);
}

#[test]
fn a_userfaultfd_of_the_callers_is_handed_over() {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    // SAFETY: a new descriptor, or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    assert!(fd >= 0, "these tests take a userfaultfd");
    // SAFETY: just opened.
    let userfaultfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: the struct of the request.
    assert_eq!(unsafe { libc::ioctl(fd as i32, UFFDIO_API, &mut api) }, 0);
    let host = Host(mapping());
    let open = || {
        let kuf = Kuf::open(Options::serviced(write_pattern).demand_run(PAGE).adopt_only()).unwrap();
        assert_eq!(kuf.add_memory(memory(host.0)).unwrap_err().errno(), Errno::INVAL);
        let memory = memory(host.0).userfaultfd(&userfaultfd).populated();
        let slot = kuf.add_memory(memory).unwrap();
        assert!(slot.settings().unwrap().adopted);
        kuf
    };
    let first = open();
    assert_eq!(touch(host, 1), pattern(GPA + PAGE));
    first.close(End::HandOver).unwrap();
    assert_eq!((byte(host.0, 1), byte(host.0, 2)), (Some(pattern(GPA + PAGE)), None));
    let second = open();
    assert_eq!((touch(host, 1), touch(host, 2)), (pattern(GPA + PAGE), pattern(GPA + 2 * PAGE)));
    second.close(End::Populate).unwrap();
}

#[test]
fn a_working_set_is_recorded_and_replayed() {
    // SAFETY: a new descriptor.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"record".as_ptr(), libc::MFD_CLOEXEC)) };
    let (kuf, _, host) = serviced(Options::serviced(write_pattern).demand_run(PAGE));
    kuf.record_start().unwrap();
    [40, 7].iter().for_each(|page| assert_eq!(touch(host, *page), pattern(GPA + page * PAGE)));
    kuf.record_stop(&file).unwrap();
    drop(kuf);
    let (options, events) = keeping(Options::serviced(write_pattern).demand_run(PAGE));
    let (kuf, slot, _) = serviced(options);
    let mut recording = &file;
    std::io::Seek::rewind(&mut recording).unwrap();
    kuf.replay(&file).unwrap();
    wait_until("the replay ends", || has(&events, EventKind::Replayed));
    assert_eq!(slot.progress().unwrap().present, 2 * PAGE);
}

#[test]
fn errors_have_an_errno_and_a_text() {
    for (options, what) in [
        (Options::serviced(write_pattern).fill_threads(0), "fill_threads"),
        (Options::serviced(write_pattern).fill_threads(257), "257"),
        (Options::sources().demand_run(u64::MAX), "demand_run"),
        (Options::direct().cpus([0]), "cpus"),
        (Options::caller_driven().cpus([]), "cpus"),
        (Options::caller_driven().spin(Duration::from_secs(1)), "spin"),
    ] {
        let error = Kuf::open(options.user_mode_only()).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL);
        assert!(error.to_string().contains(what), "{error}");
    }
    let (kuf, ..) = serviced(Options::caller_driven());
    let error = kuf.resolve(0, &[0; PAGE as usize]).unwrap_err();
    assert_eq!((error.errno(), error.text()), (Errno::NOENT, error.to_string().as_str()));
    let error = std::io::Error::from(error);
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(error.to_string().contains("0x0"), "{error}");
    assert_eq!(kuf.add_memory(memory(mapping())).unwrap_err().errno(), Errno::EXIST);
    assert_eq!(kuf.record_drop().unwrap_err().errno(), Errno::INVAL);
}

#[test]
fn the_host_is_probed() {
    let probe = probe(None).unwrap();
    assert!(probe.has(Feature::UserFaults), "these tests take a userfaultfd");
    assert!(probe.mechanism(Mechanism::Userfaultfd).is_ok());
    assert!(!probe.mechanism(Mechanism::KvmAsync).unwrap_err().text().is_empty());
}

#[test]
fn the_structs_of_kuf_h_have_defaults() {
    let memory = kuf::sys::kuf_memory { gpa: GPA, ..Default::default() };
    assert_eq!((memory.size as usize, memory.len), (size_of::<kuf::sys::kuf_memory>(), 0));
    assert!(format!("{memory:?}").starts_with("kuf_memory { size: "));
    let mut sized = Vec::new();
    macro_rules! check {
        ($($name:ident)*) => {
            $(
                assert_eq!(kuf::sys::$name::default().size as usize, size_of::<kuf::sys::$name>());
                sized.push(stringify!($name));
            )*
        };
    }
    check!(kuf_probe_info kuf_options kuf_source kuf_memory kuf_populate_request kuf_progress_info kuf_settings_info);
    check!(kuf_stats_info kuf_kvm_memory);
    // Each struct whose size the caller sets.
    let source = concat!(include_str!("../src/abi.rs"), include_str!("../src/abi_kvm.rs"));
    let set_by_the_caller = source.lines().filter_map(|line| line.trim().strip_prefix("/// sizeof(struct "));
    let named: Vec<_> =
        set_by_the_caller.filter_map(|line| line.split_once("), set by the caller").map(|(name, _)| name)).collect();
    assert_eq!(named, sized);
    assert_eq!(kuf::sys::kuf_fault::default().len + kuf::sys::kuf_block_time::default().faults, 0);
    assert_eq!(kuf::sys::kuf_version() >> 16, kuf::sys::KUF_VERSION_MAJOR);
}

#[cfg(feature = "vm-memory")]
#[test]
fn regions_of_vm_memory_need_no_unsafe_and_stay_mapped() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    let ranges = [(GuestAddress(0), LEN as usize), (GuestAddress(GPA), LEN as usize)];
    let guest = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let kuf = Kuf::open(Options::serviced(write_pattern).user_mode_only()).unwrap();
    let slots: Vec<_> = guest.iter().map(|region| kuf.add_memory(Memory::region(region)).unwrap()).collect();
    for gpa in [PAGE, GPA + 3 * PAGE] {
        assert_eq!(guest.read_obj::<u8>(GuestAddress(gpa)).unwrap(), pattern(gpa));
    }
    // The library fills memory that its owner has dropped: it is mapped still.
    drop(guest);
    slots.iter().for_each(|slot| slot.ensure(None).unwrap());
    kuf.close(End::Complete).unwrap();
}
