//! What a real kernel does not do on demand: a userfaultfd that refuses, and a library that fails inside.

use std::ffi::{c_int, c_void, CStr};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::config::{Config, Host, NewMemory, Resolution, Which};
use super::Service;
use crate::capi::types::*;
use crate::error::Result;
use crate::mechanism::gate::Gate;
use crate::mechanism::userfaultfd::Userfaultfd;
use crate::mechanism::{Content, Installed, Left, Mechanism, Message, Stop};
use crate::memory::{Opaque, Slot};

pub(super) const PAGE: usize = 4096;
const PAGES: usize = 16;

/// A userfaultfd that fails as told.
pub(super) struct Faulty {
    real: Userfaultfd,
    no_poison: bool,
    /// Installs still to be refused for want of memory.
    no_memory: AtomicU64,
    panic: AtomicBool,
    /// What happens while a slot is being added, before it is on the map.
    adding: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Mechanism for Faulty {
    fn moves(&self) -> bool {
        self.adding.lock().unwrap().take().is_some_and(|happens| {
            happens();
            false
        })
    }
    fn id(&self) -> u32 {
        self.real.id()
    }
    fn gate(&self) -> &Gate {
        self.real.gate()
    }
    fn inlet(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.real.inlet(queue)
    }
    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<Left, i32> {
        self.real.read(queue, room, out)
    }
    fn attach(&self, slot: &Slot) -> Result<()> {
        self.real.attach(slot)
    }
    fn detach(&self, slot: &Slot, in_use: bool) {
        self.real.detach(slot, in_use);
    }
    fn place(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, i32> {
        self.real.place(slot, pages)
    }
    fn install(&self, slot: &Slot, pages: &Range<u64>, content: Content) -> Installed {
        assert!(!self.panic.swap(false, Ordering::SeqCst), "as the test wants it");
        if self.no_memory.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Installed { pages: 0, stop: Some(Stop::NoMemory(libc::ENOMEM)) };
        }
        if self.no_poison && content.is_poison() {
            return Installed { pages: 0, stop: Some(Stop::Unsupported) };
        }
        self.real.install(slot, pages, content)
    }
    fn wake(&self, slot: &Slot, pages: &Range<u64>) {
        self.real.wake(slot, pages);
    }
    fn wake_range(&self, hva: Range<u64>) {
        self.real.wake_range(hva);
    }
    fn drop_pages(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<(), i32> {
        self.real.drop_pages(slot, pages)
    }
    fn close_off(&self, slot: &Slot, pages: &Range<u64>) -> bool {
        self.real.close_off(slot, pages)
    }
    fn alive(&self) -> bool {
        self.real.alive()
    }
    fn remote(&self) -> bool {
        self.real.remote()
    }
    fn adopted(&self) -> bool {
        self.real.adopted()
    }
    fn child(&self, fd: OwnedFd) -> Option<Arc<dyn Mechanism>> {
        self.real.child(fd)
    }
}

/// What the host saw.
#[derive(Default)]
pub(super) struct Seen {
    events: Mutex<Vec<(u32, i32, String)>>,
    pub fail: AtomicBool,
}

impl Seen {
    pub fn wait_for(&self, kind: u32) -> (i32, String) {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if let Some((_, error, text)) = self.events.lock().unwrap().iter().find(|(k, ..)| *k == kind) {
                return (*error, text.clone());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("event {kind} did not come: {:?}", self.events.lock().unwrap());
    }
}

unsafe extern "C-unwind" fn fill(opaque: *mut c_void, fill: *mut kuf_fill) -> c_int {
    // SAFETY: opaque is the test's Seen, and fill is the library's for the time of the call.
    let (seen, fill) = unsafe { (&*opaque.cast::<Seen>(), &mut *fill) };
    if seen.fail.load(Ordering::SeqCst) {
        return -libc::EIO;
    }
    // SAFETY: buf has room for len bytes.
    unsafe { fill.buf.cast::<u8>().write_bytes(7, fill.len as usize) };
    KUF_FILLED
}

unsafe extern "C-unwind" fn event(opaque: *mut c_void, event: *const kuf_event) {
    // SAFETY: as in `fill`.
    let (seen, event) = unsafe { (&*opaque.cast::<Seen>(), &*event) };
    // SAFETY: the text is a C string for the time of the call.
    let text = unsafe { CStr::from_ptr(event.text) }.to_string_lossy().into_owned();
    seen.events.lock().unwrap().push((event.kind, event.error, text));
}

pub(super) struct Rig {
    pub service: Arc<Service>,
    faulty: Arc<Faulty>,
    pub seen: Arc<Seen>,
    pub hva: usize,
}

/// A service over a faulty userfaultfd with one slot. None where userfaultfd is not to be had.
pub(super) fn rig(no_poison: bool) -> Option<Rig> {
    let Ok((real, _)) = Userfaultfd::open(true, true, false, 1) else {
        eprintln!("SKIP: no userfaultfd for this process");
        return None;
    };
    let (no_memory, panic) = (AtomicU64::new(0), AtomicBool::new(false));
    let faulty = Arc::new(Faulty { real, no_poison, no_memory, panic, adding: Mutex::default() });
    let seen = Arc::new(Seen::default());
    let host = Host {
        fill: Some(fill),
        event: Some(event),
        log: None,
        release: None,
        opaque: Opaque(Arc::as_ptr(&seen).cast_mut().cast()),
        log_level: 0,
        opened: AtomicBool::new(false),
    };
    let config = Config {
        host,
        mechanism: Which::Userfaultfd,
        user_mode_only: true,
        follow_fork: false,
        direct: false,
        adopt_only: false,
        detect_zero: false,
        sources: false,
        fill_threads: 2,
        demand_run: PAGE as u64,
        populate_run: PAGE as u64,
        populate_inflight: 1 << 20,
        queue_max: 64,
        spin: Duration::ZERO,
        userfaultfds: 1,
        cpus: None,
        populate_cpus: None,
    };
    let service = Service::open_with(config, Some(faulty.clone())).unwrap();
    let hva = mapping();
    service.add_memory(memory(hva)).unwrap();
    Some(Rig { service, faulty, seen, hva })
}

fn mapping() -> usize {
    let (len, prot) = (PAGE * PAGES, rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE);
    // SAFETY: a new mapping where the kernel likes.
    let hva = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, rustix::mm::MapFlags::PRIVATE) };
    hva.unwrap() as usize
}

fn memory(hva: usize) -> NewMemory {
    NewMemory {
        gpa: 0,
        len: (PAGE * PAGES) as u64,
        hva: hva as u64,
        granule: 0,
        file: None,
        uffd: None,
        remote: false,
        fill_all: false,
        huge: false,
        kvm_attributes: 0,
        memslot: None,
        opaque: Opaque(std::ptr::null_mut()),
        source: None,
    }
}

impl Rig {
    /// Reads one byte of a page, on a thread of its own.
    pub fn touch(&self, page: usize) -> std::thread::JoinHandle<u8> {
        let at = self.hva + page * PAGE;
        // SAFETY: mapped for the life of the process; another thread only ever fills it with 7.
        std::thread::spawn(move || unsafe { std::ptr::without_provenance::<u8>(at).read_volatile() })
    }

    pub fn end(&self, flags: u32) {
        self.service.prepare_close(flags).unwrap();
        self.service.begin_end();
        self.service.settle_rest(flags);
        self.service.end(flags);
    }

    /// Whether the kernel lets a read of the page through. EFAULT: it is closed.
    pub fn readable(&self, page: usize) -> bool {
        let mut byte = [0_u8];
        let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: (self.hva + page * PAGE) as *mut c_void, iov_len: 1 };
        let me = std::process::id() as libc::pid_t;
        // SAFETY: reads into `byte` only, and says so when it cannot.
        unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) == 1 }
    }
}

#[test]
fn a_panic_in_a_service_thread_is_fatal_and_leaves_pages_closed() {
    let Some(rig) = rig(false) else { return };
    assert_eq!(rig.touch(0).join().unwrap(), 7);
    rig.faulty.panic.store(true, Ordering::SeqCst);
    // Nobody may be left waiting for it when the test ends: poison ends the wait of a system call without a signal.
    let hva = rig.hva;
    let waiting = std::thread::spawn(move || {
        let mut byte = [0_u8];
        let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: (hva + PAGE) as *mut c_void, iov_len: 1 };
        // SAFETY: as in `readable`.
        unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) }
    });
    let (error, text) = rig.seen.wait_for(KUF_EVENT_FATAL);
    assert_eq!(error, -libc::EIO);
    assert!(text.contains("as the test wants it"), "{text}");
    assert_eq!(rig.service.ensure(0, PAGE as u64, -1).unwrap_err().errno(), libc::EIO);
    assert!(!waiting.is_finished(), "the page of the fill that died was opened");
    // No flag says what to do with unresolved pages; a dead service poisons them all the same.
    rig.end(0);
    assert_eq!(waiting.join().unwrap(), -1);
    assert!((1..PAGES).all(|page| !rig.readable(page)), "a page that was never filled can be read");
    assert!(rig.readable(0));
}

#[test]
fn a_slot_that_comes_while_the_service_ends_is_not_left_open() {
    if !super::huge::possible(PAGE as u64, true) {
        eprintln!("SKIP: no huge pages, of which the test would be asked");
        return;
    }
    let Some(mut rig) = rig(false) else { return };
    let service = rig.service.clone();
    *rig.faulty.adding.lock().unwrap() = Some(Box::new(move || {
        service.begin_end();
        service.settle_rest(KUF_CLOSE_POISON);
        service.end(KUF_CLOSE_POISON | KUF_CLOSE_NOWAIT);
    }));
    let hva = mapping();
    let late = NewMemory { gpa: 1 << 30, huge: true, ..memory(hva) };
    let error = rig.service.add_memory(late).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
    assert!(rig.faulty.adding.lock().unwrap().is_none(), "the service has not ended in the middle");
    rig.hva = hva;
    assert!((0..PAGES).all(|page| !rig.readable(page)), "a page that was never filled can be read");
}

#[test]
fn without_poison_a_failed_page_is_made_inaccessible() {
    let Some(rig) = rig(true) else { return };
    rig.seen.fail.store(true, Ordering::SeqCst);
    assert_eq!(rig.service.ensure(0, PAGE as u64, -1).unwrap_err().errno(), libc::EHWPOISON);
    let (error, text) = rig.seen.wait_for(KUF_EVENT_CLOSED_OFF);
    assert_eq!(error, -libc::EIO);
    assert!(text.contains("inaccessible"), "{text}");
    assert!(!rig.readable(0));
    rig.seen.fail.store(false, Ordering::SeqCst);
    assert_eq!(rig.touch(1).join().unwrap(), 7);
    rig.end(KUF_CLOSE_POISON);
    assert!((2..PAGES).all(|page| !rig.readable(page)));
    assert!(rig.readable(1));
}

#[test]
fn a_late_fault_of_a_slot_that_has_gone_changes_nothing_at_its_addresses() {
    for no_poison in [false, true] {
        let Some(rig) = rig(no_poison) else { return };
        rig.seen.fail.store(true, Ordering::SeqCst);
        for page in [0, 1] {
            assert_eq!(rig.service.ensure(page * PAGE as u64, PAGE as u64, -1).unwrap_err().errno(), libc::EHWPOISON);
        }
        let slot = rig.service.memory.map().slots().first().unwrap().clone();
        rig.service.remove_memory(0, KUF_CLOSE_POISON).unwrap();
        let (len, prot) = (PAGE * PAGES, rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE);
        let flags = rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::FIXED;
        // SAFETY: in place of the rig's own mapping, which nobody uses.
        unsafe { rustix::mm::mmap_anonymous(rig.hva as *mut c_void, len, prot, flags) }.unwrap();
        // A service thread got as far as this before the slot was removed.
        let late = |page| rig.service.touch_poison(&slot, page);
        late(0);
        assert!(rig.readable(0), "memory that is the host's own again was closed");
        rig.seen.fail.store(false, Ordering::SeqCst);
        rig.service.add_memory(memory(rig.hva)).unwrap();
        late(1);
        assert_eq!(rig.touch(1).join().unwrap(), 7, "a page of the slot that is there now was closed");
        rig.end(KUF_CLOSE_POISON);
        // SAFETY: as above.
        unsafe { rustix::mm::mmap_anonymous(rig.hva as *mut c_void, len, prot, flags) }.unwrap();
        late(0);
        assert!(rig.readable(0));
    }
}

#[test]
fn a_shortage_of_memory_that_passes_is_waited_out() {
    let Some(rig) = rig(false) else { return };
    rig.faulty.no_memory.store(5, Ordering::SeqCst);
    assert_eq!(rig.touch(3).join().unwrap(), 7);
    assert_eq!(rig.service.stats().install_no_memory, 5);
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_shortage_of_memory_while_the_source_is_read_is_waited_out_too() {
    let Some(rig) = rig(false) else { return };
    let attempts = std::cell::Cell::new(0);
    let after = |n, errno| {
        attempts.set(0);
        rig.service.patiently(|| {
            attempts.set(attempts.get() + 1);
            (attempts.get() > n).then_some(()).ok_or(errno)
        })
    };
    assert_eq!((after(3, libc::ENOMEM), attempts.get()), (Ok(()), 4));
    assert_eq!((after(3, libc::EFAULT), attempts.get()), (Err(libc::EFAULT), 1));
    rig.end(KUF_CLOSE_POISON);
}

#[test]
fn a_shortage_of_memory_that_stays_is_an_error_and_no_zero_page() {
    let Some(rig) = rig(false) else { return };
    rig.faulty.no_memory.store(u64::MAX, Ordering::SeqCst);
    let page = vec![9_u8; PAGE];
    let error = rig.service.resolve(0, PAGE as u64, Resolution::Data(page.as_ptr())).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    rig.faulty.no_memory.store(0, Ordering::SeqCst);
    assert_eq!(rig.service.resolve(0, PAGE as u64, Resolution::Data(page.as_ptr())).unwrap(), PAGE as u64);
    assert_eq!(rig.touch(0).join().unwrap(), 9);
    rig.end(KUF_CLOSE_POISON);
}
