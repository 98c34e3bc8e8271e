//! KVM's queue of userfaults as it may not be: last in first out, entries lost, stale, twice, without a signal, signals
//! without an entry. The fake stands where the ioctls and the eventfd are; everything above it is the library.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::config::{Config, Host, NewMemory, NewPopulate, Resolution, Which};
use super::Service;
use crate::capi::types::*;
use crate::mechanism::kvm_async::{Calls, KvmAsync};
use crate::memory::Opaque;
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_USERFAULT as MARK;

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
/// Where the slot is, so that a gfn is never a page number by luck.
const GPA: u64 = 7 << 20;
const PRIVATE: u64 = 1 << 3;
const PATIENCE: Duration = Duration::from_secs(20);

/// What a page holds when it is filled.
fn pattern(gfn: u64) -> u8 {
    (gfn % 251 + 1) as u8
}

/// What is wrong with this kernel.
#[derive(Default, Clone, Copy)]
struct Wrong {
    newest_first: bool,
    /// Entries to be taken off with EFAULT and no answer.
    lose: u64,
    /// Signals to be left out.
    drop_signals: u64,
    /// Attribute changes to be refused with ENOMEM.
    no_memory: u64,
    /// Every read fails with this.
    fail: Option<Errno>,
}

#[derive(Default)]
struct State {
    wrong: Wrong,
    marked: BTreeSet<u64>,
    entries: VecDeque<u64>,
    /// Reads while the queue was empty and no signal was outstanding: an oops on the interface as it was posted.
    over_reads: u64,
    /// Signals given and not used for a read yet.
    outstanding: u64,
    may_look: bool,
    disabled: bool,
    /// Pages that took no memory when they were opened.
    empty: Vec<u64>,
    /// What went wrong that should never.
    complaints: Vec<String>,
}

/// A KVM of threads that want pages.
struct Fake {
    state: Mutex<State>,
    changed: Condvar,
    event: OwnedFd,
    hva: u64,
}

impl Fake {
    fn new(hva: u64) -> Arc<Self> {
        let event = super::eventfd().unwrap();
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), event, hva })
    }

    fn wrong(&self, wrong: Wrong) {
        self.state.lock().unwrap().wrong = wrong;
    }

    fn signal(&self, state: &mut State) {
        if state.wrong.drop_signals > 0 {
            state.wrong.drop_signals -= 1;
            return;
        }
        state.outstanding += 1;
        rustix::io::write(&self.event, &1_u64.to_ne_bytes()).unwrap();
    }

    /// An entry that nobody waits for.
    fn queue(&self, gfn: u64) {
        let mut state = self.state.lock().unwrap();
        state.entries.push_back(gfn);
        self.signal(&mut state);
    }

    /// A signal with no entry.
    fn signal_only(&self) {
        let mut state = self.state.lock().unwrap();
        self.signal(&mut state);
    }

    /// KVM's own access: the first byte of a page, when it may be read. None: it was not in good time.
    fn access(self: &Arc<Self>, gfn: u64) -> JoinHandle<Option<u8>> {
        let fake = self.clone();
        let mut state = fake.state.lock().unwrap();
        if state.marked.contains(&gfn) {
            state.entries.push_back(gfn);
            fake.signal(&mut state);
        }
        drop(state);
        std::thread::spawn(move || {
            let state = fake.state.lock().unwrap();
            let closed = |state: &mut State| state.marked.contains(&gfn) && !state.disabled;
            let (_state, end) = fake.changed.wait_timeout_while(state, PATIENCE, closed).unwrap();
            if end.timed_out() {
                None
            } else {
                fake.byte(gfn)
            }
        })
    }

    fn resident(&self, gfn: u64) -> bool {
        let (at, mut resident) = (self.hva + gfn * PAGE - GPA, 0);
        // SAFETY: looks up one page and writes one byte.
        let looked = unsafe { libc::mincore(at as *mut c_void, PAGE as usize, &mut resident) } == 0;
        looked && resident & 1 != 0
    }

    /// None: the page is inaccessible.
    fn byte(&self, gfn: u64) -> Option<u8> {
        let mut byte = [0_u8];
        let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: (self.hva + gfn * PAGE - GPA) as *mut c_void, iov_len: 1 };
        // SAFETY: reads into `byte` only, and says so when it cannot.
        let n = unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) };
        (n == 1).then_some(byte[0])
    }
}

struct Handle(Arc<Fake>);

impl Calls for Handle {
    fn signals(&self) -> std::result::Result<u64, Errno> {
        let mut count = [0_u8; 8];
        match rustix::io::read(&self.0.event, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(errno) => Err(errno),
        }
    }

    fn read_fault(&self) -> std::result::Result<u64, Errno> {
        let mut state = self.0.state.lock().unwrap();
        if let Some(errno) = state.wrong.fail {
            return Err(errno);
        }
        if state.outstanding == 0 && state.entries.is_empty() {
            state.over_reads += 1;
        }
        state.outstanding = state.outstanding.saturating_sub(1);
        let entry = if state.wrong.newest_first { state.entries.pop_back() } else { state.entries.pop_front() };
        if entry.is_some() && state.wrong.lose > 0 {
            state.wrong.lose -= 1;
            return Err(Errno::FAULT);
        }
        entry.ok_or(Errno::NOENT)
    }

    fn set_attributes(&self, gpa: u64, len: u64, attributes: u64) -> std::result::Result<(), Errno> {
        let mut state = self.0.state.lock().unwrap();
        let gfns = gpa / PAGE..(gpa + len) / PAGE;
        let marks = attributes & MARK != 0;
        if !marks && state.wrong.no_memory > 0 {
            state.wrong.no_memory -= 1;
            return Err(Errno::NOMEM);
        }
        if attributes & !MARK != PRIVATE {
            state.complaints.push(format!("attributes {attributes:#x} on {gfns:?}"));
        }
        for gfn in gfns {
            if marks {
                state.marked.insert(gfn);
            } else if state.marked.remove(&gfn) {
                if !self.0.resident(gfn) {
                    state.empty.push(gfn);
                }
                if let Some(byte) = self.0.byte(gfn).filter(|byte| *byte != pattern(gfn)) {
                    state.complaints.push(format!("gfn {gfn:#x} opened holding {byte}"));
                }
            }
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn disable(&self) {
        self.0.state.lock().unwrap().disabled = true;
        self.0.changed.notify_all();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// What the host did and saw.
#[derive(Default)]
struct Seen {
    events: Mutex<Vec<(u32, u64)>>,
    /// First gfn of each fill, in order.
    fills: Mutex<Vec<u64>>,
    /// Fills wait while it is set.
    hold: AtomicBool,
    /// A gfn that cannot be filled; 0: none.
    bad: AtomicU64,
    /// The gfn whose page is zero.
    zero: AtomicU64,
    /// Resolve the first page inside the callback and answer KUF_ZERO for the run.
    resolve_inside: Mutex<Option<Arc<Service>>>,
    /// Callbacks running now.
    inside: AtomicU64,
}

impl Seen {
    fn has(&self, kind: u32) -> bool {
        self.events.lock().unwrap().iter().any(|(k, _)| *k == kind)
    }

    fn wait_for(&self, kind: u32) {
        wait_until(&format!("event {kind}"), || self.has(kind));
    }

    fn fills_of(&self, gfn: u64) -> usize {
        self.fills.lock().unwrap().iter().filter(|filled| **filled == gfn).count()
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

unsafe extern "C-unwind" fn fill(opaque: *mut c_void, fill: *mut kuf_fill) -> c_int {
    // SAFETY: opaque is the test's Seen, and fill is the library's for the time of the call.
    let (seen, fill) = unsafe { (&*opaque.cast::<Seen>(), &mut *fill) };
    while seen.hold.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let resolve_inside = seen.resolve_inside.lock().unwrap().clone();
    if let Some(service) = resolve_inside {
        let bytes = vec![pattern(fill.gpa / PAGE); PAGE as usize];
        service.resolve(fill.gpa, PAGE, Resolution::Data(bytes.as_ptr())).unwrap();
        return KUF_ZERO;
    }
    seen.inside.fetch_add(1, Ordering::SeqCst);
    let answer = fill_run(seen, fill);
    seen.inside.fetch_sub(1, Ordering::SeqCst);
    answer
}

fn fill_run(seen: &Seen, fill: &kuf_fill) -> c_int {
    for gfn in fill.gpa / PAGE..(fill.gpa + fill.len) / PAGE {
        seen.fills.lock().unwrap().push(gfn);
        if gfn == seen.bad.load(Ordering::SeqCst) {
            return -libc::EIO;
        }
        let offset = (gfn * PAGE - fill.gpa) as usize;
        let byte = if gfn == seen.zero.load(Ordering::SeqCst) { 0 } else { pattern(gfn) };
        // SAFETY: buf has room for len bytes.
        unsafe { fill.buf.cast::<u8>().add(offset).write_bytes(byte, PAGE as usize) };
    }
    KUF_FILLED
}

unsafe extern "C-unwind" fn event(opaque: *mut c_void, event: *const kuf_event) {
    // SAFETY: as in `fill`.
    let (seen, event) = unsafe { (&*opaque.cast::<Seen>(), &*event) };
    seen.events.lock().unwrap().push((event.kind, event.gpa));
}

struct Rig {
    service: Arc<Service>,
    fake: Arc<Fake>,
    seen: Arc<Seen>,
    stopped: AtomicBool,
}

/// What the callbacks use is gone with the rig: so has the service to be.
impl Drop for Rig {
    fn drop(&mut self) {
        self.stop();
    }
}

fn rig(drain: bool) -> Rig {
    rig_of(drain, false, false)
}

/// `direct`: caller-driven without threads, with room for one fault.
fn rig_of(drain: bool, direct: bool, detect_zero: bool) -> Rig {
    let (len, prot) = ((PAGE * PAGES) as usize, rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE);
    // SAFETY: a new mapping where the kernel likes.
    let hva = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, rustix::mm::MapFlags::PRIVATE) };
    let hva = hva.unwrap().expose_provenance() as u64;
    let fake = Fake::new(hva);
    let seen = Arc::new(Seen::default());
    let host = Host {
        fill: (!direct).then_some(fill),
        event: Some(event),
        log: None,
        release: None,
        opaque: Opaque(Arc::as_ptr(&seen).cast_mut().cast()),
        log_level: 0,
        opened: AtomicBool::new(false),
    };
    let vm = super::eventfd().unwrap();
    let config = Config {
        host,
        mechanism: Which::KvmAsync { vm, drain },
        user_mode_only: false,
        follow_fork: false,
        direct,
        adopt_only: false,
        detect_zero,
        sources: false,
        fill_threads: 1,
        demand_run: PAGE,
        populate_run: 4 * PAGE,
        populate_inflight: 1 << 20,
        queue_max: if direct { 1 } else { 4096 },
        spin: Duration::ZERO,
        userfaultfds: 1,
        cpus: None,
        populate_cpus: None,
    };
    let mechanism = Arc::new(KvmAsync::over(Box::new(Handle(fake.clone())), drain));
    let service = Service::open_with(config, Some(mechanism)).unwrap();
    let slot = NewMemory {
        gpa: GPA,
        len: len as u64,
        hva,
        granule: 0,
        file: None,
        uffd: None,
        remote: false,
        fill_all: false,
        huge: false,
        kvm_attributes: PRIVATE,
        memslot: None,
        opaque: Opaque(std::ptr::null_mut()),
        source: None,
    };
    service.add_memory(slot).unwrap();
    Rig { service, fake, seen, stopped: AtomicBool::new(false) }
}

impl Rig {
    fn gfn(page: u64) -> u64 {
        GPA / PAGE + page
    }

    /// Every access ended with the right byte.
    fn all_right(accesses: Vec<(u64, JoinHandle<Option<u8>>)>) {
        for (gfn, access) in accesses {
            assert_eq!(access.join().unwrap(), Some(pattern(gfn)), "gfn {gfn:#x}");
        }
    }

    fn access(&self, page: u64) -> (u64, JoinHandle<Option<u8>>) {
        (Self::gfn(page), self.fake.access(Self::gfn(page)))
    }

    /// Ends the service; the kernel has nothing to complain about.
    fn end(self) {
        self.service.prepare_close(KUF_CLOSE_POISON).unwrap();
        self.stop();
        let state = self.fake.state.lock().unwrap();
        assert!(state.complaints.is_empty(), "{:?}", state.complaints);
        assert!(state.may_look || state.over_reads == 0, "the queue was read more often than it was signalled");
    }

    fn stop(&self) {
        if !self.stopped.swap(true, Ordering::SeqCst) {
            self.service.begin_end();
            self.service.settle_rest(KUF_CLOSE_POISON);
            self.service.end(KUF_CLOSE_POISON);
        }
    }

    /// As [`Rig::end`], with every page filled, so that all of them can be looked at.
    fn fill_and_end(self) {
        assert!(self.service.populate_now(None).is_ok());
        assert!((0..PAGES).all(|page| self.fake.byte(Self::gfn(page)) == Some(pattern(Self::gfn(page)))));
        assert!(self.fake.state.lock().unwrap().marked.is_empty());
        self.end();
    }

    /// As [`Rig::fill_and_end`], where looking into an empty queue is allowed.
    fn look_and_end(self) {
        self.fake.state.lock().unwrap().may_look = true;
        self.fill_and_end();
    }
}

#[test]
fn newest_first_starves_nobody() {
    let rig = rig(false);
    rig.fake.wrong(Wrong { newest_first: true, ..Wrong::default() });
    rig.seen.hold.store(true, Ordering::SeqCst);
    let first = rig.access(0);
    wait_until("the first fault", || rig.service.stats().faults == 1);
    let rest: Vec<_> = (1..PAGES).map(|page| rig.access(page)).collect();
    wait_until("every fault", || rig.service.stats().faults == PAGES);
    rig.seen.hold.store(false, Ordering::SeqCst);
    Rig::all_right(std::iter::once(first).chain(rest).collect());
    rig.fill_and_end();
}

#[test]
fn a_lost_fault_starts_a_sweep_of_kvms_own_pages_first() {
    let rig = rig(false);
    rig.service.kvm_owned(GPA + 40 * PAGE, 2 * PAGE).unwrap();
    rig.fake.wrong(Wrong { lose: 1, ..Wrong::default() });
    let lost = rig.access(40);
    rig.seen.wait_for(KUF_EVENT_SWEEP);
    Rig::all_right(vec![lost]);
    wait_until("the sweep's end", || rig.fake.state.lock().unwrap().marked.is_empty());
    let fills = rig.seen.fills.lock().unwrap().clone();
    assert_eq!(fills[..2], [Rig::gfn(40), Rig::gfn(41)], "{fills:?}");
    assert_eq!(rig.service.stats().faults_lost, 1);
    assert!(!rig.seen.has(KUF_EVENT_POPULATED), "nobody has asked for a populate");
    rig.fill_and_end();
}

#[test]
fn a_sweep_goes_on_after_a_page_that_cannot_be_filled_and_leaves_it_closed() {
    let rig = rig(false);
    rig.seen.bad.store(Rig::gfn(9), Ordering::SeqCst);
    rig.fake.wrong(Wrong { lose: 1, ..Wrong::default() });
    let lost = rig.access(50);
    Rig::all_right(vec![lost]);
    rig.seen.wait_for(KUF_EVENT_POISONED);
    wait_until("the rest", || rig.fake.state.lock().unwrap().marked.len() == 1);
    assert!(rig.fake.state.lock().unwrap().marked.contains(&Rig::gfn(9)));
    assert_eq!(rig.service.vcpu_fault(GPA + 9 * PAGE, PAGE, 1 << 4).unwrap_err().errno(), libc::EHWPOISON);
    let fake = rig.fake.clone();
    rig.end();
    assert_eq!(fake.byte(Rig::gfn(9)), None, "a page that was never filled can be read");
}

#[test]
fn every_fault_lost_is_no_storm_of_sweeps() {
    let rig = rig(false);
    rig.fake.wrong(Wrong { lose: u64::MAX, ..Wrong::default() });
    Rig::all_right((0..PAGES).map(|page| rig.access(page)).collect());
    assert!(rig.service.stats().faults_lost <= PAGES);
    rig.fill_and_end();
}

#[test]
fn stale_and_foreign_entries_are_counted_and_ignored() {
    let rig = rig(false);
    Rig::all_right(vec![rig.access(3)]);
    let before = rig.seen.fills.lock().unwrap().len();
    rig.fake.queue(Rig::gfn(3));
    for gfn in [0, GPA / PAGE - 1, Rig::gfn(PAGES), u64::MAX, 1 << 52] {
        rig.fake.queue(gfn);
    }
    wait_until("six faults", || rig.service.stats().faults == 7);
    wait_until("a late one", || rig.service.stats().faults_late == 1);
    assert_eq!(rig.service.stats().faults_unknown, 5);
    assert_eq!(rig.seen.fills.lock().unwrap().len(), before);
    rig.fill_and_end();
}

#[test]
fn an_entry_twice_is_one_fill() {
    let rig = rig(false);
    rig.seen.hold.store(true, Ordering::SeqCst);
    let waiting: Vec<_> = (0..20).map(|_| rig.access(5)).collect();
    rig.fake.queue(Rig::gfn(5));
    wait_until("every fault", || rig.service.stats().faults == 21);
    rig.seen.hold.store(false, Ordering::SeqCst);
    Rig::all_right(waiting);
    assert_eq!(rig.seen.fills_of(Rig::gfn(5)), 1);
    rig.fill_and_end();
}

#[test]
fn more_signals_than_entries_are_no_harm() {
    let rig = rig(false);
    for _ in 0..10 {
        rig.fake.signal_only();
    }
    Rig::all_right((0..8).map(|page| rig.access(page)).collect());
    rig.fill_and_end();
}

#[test]
fn without_a_signal_the_queue_is_not_read() {
    let rig = rig(false);
    rig.fake.wrong(Wrong { drop_signals: 1, ..Wrong::default() });
    let unsignalled = rig.access(1);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(rig.service.stats().faults, 0);
    // One signal is one read: that of the first entry.
    let signalled = rig.access(2);
    Rig::all_right(vec![unsignalled]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.service.stats().faults, 1);
    rig.fill_and_end();
    Rig::all_right(vec![signalled]);
}

#[test]
fn a_dropped_signal_is_found_by_looking() {
    let rig = rig(true);
    rig.fake.wrong(Wrong { drop_signals: 2, ..Wrong::default() });
    Rig::all_right(vec![rig.access(1), rig.access(2)]);
    rig.seen.wait_for(KUF_EVENT_UNSIGNALLED);
    assert_eq!(rig.service.stats().faults_unsignalled, 2);
    Rig::all_right((3..20).map(|page| rig.access(page)).collect());
    assert_eq!(rig.seen.events.lock().unwrap().iter().filter(|(k, _)| *k == KUF_EVENT_UNSIGNALLED).count(), 1);
    rig.look_and_end();
}

#[test]
fn a_signal_that_is_late_is_not_taken_for_dropped() {
    let rig = rig(true);
    for page in 0..8 {
        // The entry is found by looking, its signal comes after.
        rig.fake.state.lock().unwrap().wrong.drop_signals = 1;
        let access = rig.access(page);
        wait_until("the fault", || rig.service.stats().faults == page + 1);
        rig.fake.signal_only();
        Rig::all_right(vec![access]);
    }
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(rig.service.stats().faults_unsignalled, 0);
    assert!(!rig.seen.has(KUF_EVENT_UNSIGNALLED));
    rig.look_and_end();
}

#[test]
fn a_vm_of_another_process_is_the_end() {
    let rig = rig(false);
    rig.fake.wrong(Wrong { fail: Some(Errno::IO), ..Wrong::default() });
    let waiting = rig.access(1);
    rig.seen.wait_for(KUF_EVENT_FATAL);
    assert_eq!(rig.service.vcpu_fault(GPA, PAGE, 1 << 4).unwrap_err().errno(), libc::EIO);
    assert!(!waiting.1.is_finished(), "a page was opened that nobody had filled");
    assert_eq!(rig.fake.state.lock().unwrap().marked.len() as u64, PAGES);
    rig.end();
    assert_eq!(waiting.1.join().unwrap(), None);
}

#[test]
fn a_shortage_of_memory_that_passes_is_waited_out() {
    let rig = rig(false);
    rig.fake.wrong(Wrong { no_memory: 3, ..Wrong::default() });
    Rig::all_right(vec![rig.access(7)]);
    assert_eq!(rig.service.stats().install_no_memory, 3);
    rig.fill_and_end();
}

#[test]
fn who_waits_inside_kvm_for_a_poisoned_page_is_reported_and_served_after_a_discard() {
    let rig = rig(false);
    rig.seen.bad.store(Rig::gfn(4), Ordering::SeqCst);
    let (gfn, waiting) = rig.access(4);
    rig.seen.wait_for(KUF_EVENT_PARKED);
    assert_eq!(rig.service.quiesce(0).unwrap_err().errno(), libc::EHWPOISON);
    assert_eq!(rig.service.vcpu_fault(GPA + 4 * PAGE, PAGE, 1 << 4).unwrap_err().errno(), libc::EHWPOISON);
    assert!(!waiting.is_finished());
    rig.seen.bad.store(0, Ordering::SeqCst);
    rig.service.discard(GPA + 4 * PAGE, PAGE, false).unwrap();
    Rig::all_right(vec![(gfn, waiting)]);
    rig.service.quiesce(-1).unwrap();
    rig.fill_and_end();
}

#[test]
fn quiescing_waits_for_who_waits() {
    let rig = rig(false);
    rig.service.quiesce(0).unwrap();
    rig.seen.hold.store(true, Ordering::SeqCst);
    let waiting = rig.access(6);
    assert_eq!(rig.service.quiesce(30).unwrap_err().errno(), libc::ETIMEDOUT);
    rig.seen.hold.store(false, Ordering::SeqCst);
    rig.service.quiesce(-1).unwrap();
    Rig::all_right(vec![waiting]);
    rig.fill_and_end();
}

#[test]
fn a_lost_fault_of_a_page_that_was_given_back_is_swept_up_too() {
    let rig = rig(false);
    rig.service.discard(GPA + 8 * PAGE, PAGE, true).unwrap();
    rig.fake.wrong(Wrong { lose: 1, ..Wrong::default() });
    let (_, waiting) = rig.access(8);
    assert_eq!(waiting.join().unwrap(), Some(0));
}

#[test]
fn what_there_was_no_room_for_is_announced_again() {
    let rig = rig_of(false, true, false);
    let waiting = [rig.access(1), rig.access(1), rig.access(2)];
    let mut asked = BTreeSet::new();
    while asked.len() < 2 {
        assert!(rig.service.caller_poll(5000).unwrap(), "a fault is in KVM's queue and nobody says so: {asked:?}");
        let mut out = [std::mem::MaybeUninit::<kuf_fault>::uninit(); 16];
        let n = rig.service.caller_read(&mut out).unwrap_or(0);
        // SAFETY: that many were written.
        asked.extend(out[..n].iter().map(|fault| unsafe { fault.assume_init_ref() }.gpa));
    }
    for gpa in asked {
        let bytes = vec![pattern(gpa / PAGE); PAGE as usize];
        assert_eq!(rig.service.resolve(gpa, PAGE, Resolution::Data(bytes.as_ptr())).unwrap(), PAGE);
    }
    Rig::all_right(waiting.into());
    rig.end();
}

#[test]
fn zero_is_not_written_over_what_the_callback_has_resolved_itself() {
    let rig = rig(false);
    *rig.seen.resolve_inside.lock().unwrap() = Some(rig.service.clone());
    rig.service.ensure(GPA, PAGE, -1).unwrap();
    *rig.seen.resolve_inside.lock().unwrap() = None;
    rig.fill_and_end();
}

#[test]
fn zeroes_give_their_memory_back_before_the_guest_sees_them() {
    let rig = rig_of(false, false, true);
    rig.seen.zero.store(Rig::gfn(2), Ordering::SeqCst);
    rig.service.populate(NewPopulate { stop: false, sweep: false, range: None, rate: 0 }).unwrap();
    wait_until("everything", || rig.service.progress(KUF_ALL).unwrap().present == PAGE * PAGES);
    assert_eq!(rig.fake.state.lock().unwrap().empty, [Rig::gfn(2)]);
    let stats = rig.service.stats();
    assert_eq!((stats.bytes_zeroed, stats.bytes_in_place), (PAGE, PAGE * (PAGES - 1)));
    assert_eq!(rig.fake.byte(Rig::gfn(2)), Some(0));
    assert_eq!(rig.fake.byte(Rig::gfn(3)), Some(pattern(Rig::gfn(3))));
    assert!(rig.fake.state.lock().unwrap().marked.is_empty());
}

#[test]
fn locked_memory_can_be_discarded() {
    let rig = rig(false);
    // SAFETY: locks the slot's own mapping, as it is touched.
    let locked = unsafe { libc::mlock2(rig.fake.hva as *const c_void, (PAGE * PAGES) as usize, libc::MLOCK_ONFAULT) };
    if locked != 0 {
        return eprintln!("SKIP: this process may not lock memory");
    }
    Rig::all_right(vec![rig.access(3)]);
    rig.service.discard(GPA + 3 * PAGE, PAGE, false).unwrap();
    rig.service.vcpu_fault(GPA + 3 * PAGE, PAGE, 1 << 4).unwrap();
    assert!(!rig.fake.state.lock().unwrap().marked.contains(&Rig::gfn(3)));
    // Given back while its fill writes to it.
    rig.seen.hold.store(true, Ordering::SeqCst);
    let service = rig.service.clone();
    let filling = std::thread::spawn(move || service.ensure(GPA + 5 * PAGE, PAGE, 10_000));
    wait_until("the fill", || rig.service.stats().fills == 3);
    rig.service.discard(GPA + 5 * PAGE, PAGE, true).unwrap();
    rig.seen.hold.store(false, Ordering::SeqCst);
    filling.join().unwrap().unwrap();
    assert_eq!(rig.fake.byte(Rig::gfn(5)), Some(0), "what a cancelled fill wrote is there");
}

#[test]
fn a_slot_is_not_taken_away_from_under_a_fill() {
    for _ in 0..20 {
        let rig = rig(false);
        rig.service.populate(NewPopulate { stop: false, sweep: false, range: None, rate: 0 }).unwrap();
        wait_until("a fill", || !rig.seen.fills.lock().unwrap().is_empty());
        while let Err(error) = rig.service.remove_memory(GPA, KUF_CLOSE_POISON) {
            assert_eq!(error.errno(), libc::EBUSY, "{error}");
        }
        assert_eq!(rig.seen.inside.load(Ordering::SeqCst), 0, "removed with a callback inside its memory");
    }
}

#[test]
fn a_mark_that_somebody_else_has_put_there_does_not_keep_a_vcpu_leaving() {
    let rig = rig(false);
    rig.service.vcpu_fault(GPA, PAGE, 1 << 4).unwrap();
    rig.fake.state.lock().unwrap().marked.insert(Rig::gfn(0));
    rig.service.vcpu_fault(GPA, PAGE, 1 << 4).unwrap();
    assert!(!rig.fake.state.lock().unwrap().marked.contains(&Rig::gfn(0)));
    rig.fill_and_end();
}
