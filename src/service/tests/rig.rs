//! The set-up of every test of a service: [`config`], [`memory`], a caller whose callbacks keep count, and the [`Rig`]
//! that holds a service over a test double of the kernel.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::*;
use crate::caller::{self, Fill, Filled, Run};
use crate::mechanism::Mechanism;
use crate::memory::Slot;
use crate::service::config::{Callbacks, Config, NewMemory, Which};
use crate::service::tests::calls::{Calls, Close};
use crate::service::Service;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc, Mutex};

pub const PAGE: u64 = 4096;
/// Pages of a rig's slot.
pub const PAGES: u64 = 64;
/// Bytes of a rig's slot.
pub const LEN: u64 = PAGE * PAGES;
/// How long a test waits for something that has to come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The byte that the fill callback writes all over a page. Never 0.
pub fn pattern(gfn: u64) -> u8 {
    (gfn % 251 + 1) as u8
}

/// A page for `kuf_resolve`.
pub fn page_of(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for a thread that has to end, and returns what it returned.
pub fn ends<T>(what: &str, waiting: thread::JoinHandle<T>) -> T {
    wait_until(what, || waiting.is_finished());
    waiting.join().unwrap()
}

/// An event as the callback got it.
#[derive(Clone, Debug)]
pub struct Event {
    pub kind: u32,
    pub error: i32,
    pub text: String,
}

/// A fill callback calls this first. None: it fills.
type Instead = Arc<dyn Fn(&mut Run<'_>) -> Option<Filled> + Send + Sync>;

/// The caller: it controls its callbacks, and keeps the events that they got.
#[derive(Default)]
pub struct Caller {
    pub events: Mutex<Vec<Event>>,
    /// The gfn of each page that the callback was asked for, in order.
    pub fills: Mutex<Vec<u64>>,
    /// Fills wait while it is set.
    pub hold: AtomicBool,
    /// Fills that are running now.
    pub inside: AtomicU64,
    /// Gfns that cannot be filled.
    failing: Mutex<Range<u64>>,
    /// Gfns whose pages are zero.
    zero: Mutex<Range<u64>>,
    instead: Mutex<Option<Instead>>,
}

impl Caller {
    /// From now on these gfns, and no others, fail with EIO.
    pub fn fail(&self, gfns: Range<u64>) {
        *self.failing.lock().unwrap() = gfns;
    }

    pub fn fail_none(&self) {
        self.fail(0..0);
    }

    /// From now on these gfns, and no others, are filled with zeroes.
    pub fn fill_zeroes(&self, gfns: Range<u64>) {
        *self.zero.lock().unwrap() = gfns;
    }

    pub fn do_instead(&self, instead: impl Fn(&mut Run<'_>) -> Option<Filled> + Send + Sync + 'static) {
        *self.instead.lock().unwrap() = Some(Arc::new(instead));
    }

    pub fn fill_again(&self) {
        *self.instead.lock().unwrap() = None;
    }

    pub fn has(&self, kind: u32) -> bool {
        self.count(kind) > 0
    }

    pub fn count(&self, kind: u32) -> usize {
        self.events.lock().unwrap().iter().filter(|event| event.kind == kind).count()
    }

    /// The first event of the kind.
    pub fn wait_for(&self, kind: u32) -> Event {
        wait_until(&format!("event {kind} comes"), || self.has(kind));
        self.events.lock().unwrap().iter().find(|event| event.kind == kind).cloned().unwrap()
    }

    fn answer(&self, run: &mut Run<'_>) -> Filled {
        let gfns = run.gpa() / PAGE..(run.gpa() + run.len()) / PAGE;
        self.fills.lock().unwrap().extend(gfns.clone());
        let instead = self.instead.lock().unwrap().clone();
        if let Some(answer) = instead.and_then(|instead| instead(run)) {
            return answer;
        }
        for (page, gfn) in run.buf().chunks_exact_mut(PAGE as usize).zip(gfns) {
            if self.failing.lock().unwrap().contains(&gfn) {
                return Filled::Failed(Errno::IO);
            }
            page.fill(if self.zero.lock().unwrap().contains(&gfn) { 0 } else { pattern(gfn) });
        }
        Filled::Done
    }

    fn told(&self, event: &caller::Event<'_>) {
        let error = -event.error.map_or(0, Errno::raw_os_error);
        self.events.lock().unwrap().push(Event { kind: event.kind, error, text: event.text.to_owned() });
    }
}

impl Fill for Caller {
    fn fill(&self, run: &mut Run<'_>) -> Filled {
        while self.hold.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        let answer = self.answer(run);
        self.inside.fetch_sub(1, Ordering::SeqCst);
        answer
    }
}

/// Options as `kuf_open` checks them: the caller's two callbacks, two fill threads, runs of one page. A test
/// that wants something else says so with `Config { .., ..config(&caller) }`.
pub fn config(caller: &Arc<Caller>) -> Config {
    let told = caller.clone();
    let callbacks = Callbacks {
        fill: Some(caller.clone()),
        event: Some(Box::new(move |event| told.told(event))),
        log: None,
        log_level: 0,
        to_stderr: false,
    };
    Config {
        callbacks,
        mechanism: Which::Userfaultfd,
        user_mode_only: true,
        follow_fork: false,
        direct: false,
        adopt_only: false,
        detect_zero: false,
        serviced: true,
        fill_threads: 2,
        demand_run: PAGE,
        populate_run: PAGE,
        populate_inflight: 1 << 20,
        spin: Duration::ZERO,
        end_timeout: None,
        userfaultfds: 1,
        cpus: None,
    }
}

/// A slot of [`PAGES`] pages at gpa 0. As with [`config`], a test changes the fields that it is about.
pub fn memory(hva: u64) -> NewMemory {
    NewMemory::at(0, LEN, hva)
}

/// [`LEN`] bytes of anonymous memory, for the life of the process. Returns where it is.
pub fn mapping() -> u64 {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), LEN as usize, prot, MapFlags::PRIVATE) };
    at.unwrap().expose_provenance() as u64
}

/// Unmaps the memory there and maps new anonymous memory in its place.
pub fn map_anew(hva: u64) {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
    // SAFETY: in place of a mapping of a test, which no other thread uses.
    unsafe { rustix::mm::mmap_anonymous(address(hva), LEN as usize, prot, flags) }.unwrap();
}

/// A memfd of [`LEN`] bytes, mapped for the life of the process, and the slot of it at `gpa`.
pub fn shared_memory(gpa: u64) -> (OwnedFd, NewMemory) {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, LEN).unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), LEN as usize, prot, MapFlags::SHARED, file.as_fd(), 0) };
    let slot = memory(at.unwrap().expose_provenance() as u64);
    let slot = NewMemory { gpa, file: Some((file.as_raw_fd(), 0)), ..slot };
    (file, slot)
}

pub fn address(hva: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(hva as usize)
}

/// The byte at an address, read by a system call: a page that is poisoned or inaccessible is None and no signal.
pub fn byte_at(hva: u64) -> Option<u8> {
    let mut byte = [0_u8];
    let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: address(hva), iov_len: 1 };
    let me = std::process::id() as libc::pid_t;
    // SAFETY: reads into `byte` only, and says so when it cannot.
    let n = unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) };
    (n == 1).then_some(byte[0])
}

pub fn is_readable(hva: u64) -> bool {
    byte_at(hva).is_some()
}

/// [`is_readable`] on a thread of its own, which waits while the page is absent.
pub fn read_in_thread(hva: u64) -> thread::JoinHandle<bool> {
    thread::spawn(move || is_readable(hva))
}

/// A service with one slot, over a test double that stands for the kernel.
pub struct Rig<Kernel> {
    pub service: Arc<Service>,
    pub kernel: Arc<Kernel>,
    pub caller: Arc<Caller>,
    pub hva: u64,
}

impl<Kernel> Rig<Kernel> {
    pub fn new(
        caller: Arc<Caller>,
        config: Config,
        kernel: &Arc<Kernel>,
        mechanism: Arc<dyn Mechanism>,
        slot: NewMemory,
    ) -> Self {
        let hva = slot.hva;
        let service = Service::open_with(config, Some(mechanism)).unwrap();
        service.add(slot).unwrap();
        Self { service, kernel: kernel.clone(), caller, hva }
    }

    /// The slot with the lowest addresses: the rig's own, unless the test removed it.
    pub fn slot(&self) -> Arc<Slot> {
        self.service.memory.map().slots()[0].clone()
    }

    /// Whether the kernel lets a read of the page through.
    pub fn readable(&self, page: u64) -> bool {
        is_readable(self.hva + page * PAGE)
    }

    /// Fails if one of the pages, which were never filled, can be read.
    pub fn assert_closed(&self, pages: Range<u64>) {
        for page in pages {
            assert!(!self.readable(page), "page {page}, which was never filled, can be read");
        }
    }

    /// Fails if one of the pages was poisoned or made inaccessible.
    pub fn assert_readable(&self, pages: Range<u64>) {
        for page in pages {
            assert!(self.readable(page), "page {page} cannot be read");
        }
    }

    /// `kuf_close`, which succeeds.
    pub fn end(&self, flags: u32) {
        self.service.prepare_close(flags).unwrap();
        self.end_at_once(flags);
    }

    /// The part of `kuf_close` after the fills.
    fn end_at_once(&self, flags: u32) {
        self.service.begin_end(flags).unwrap();
        self.service.rest_of_end(flags);
    }
}

/// The callbacks use the caller, so the service has to end before it.
impl<Kernel> Drop for Rig<Kernel> {
    fn drop(&mut self) {
        if !self.service.life.is_open() {
            return;
        }
        if std::thread::panicking() {
            // Its threads may still touch pages, which poison would end with SIGBUS: the service stays as it is.
            std::mem::forget(self.caller.clone());
        } else {
            self.end_at_once(KUF_END_POISON);
        }
    }
}
