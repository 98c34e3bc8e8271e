//! The handle behind `struct kuf *`: who may come in, and when it is over.
//!
//! A door is never freed, only shut: a few words per open for the life of the process buy that a closed handle is
//! recognised, on any thread, for ever. It is kept in a list, so that leak checkers see it owned.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use once_cell::sync::OnceCell;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::types::{kuf, KUF_CLOSE_NOWAIT};
use crate::error::{Error, Result};
use crate::panics::quietly;
use crate::service::{refuse_inside_callbacks, Service};

const MAGIC: u64 = 0x6b75_665f_646f_6f72;

/// What a `struct kuf *` points to.
pub struct Door {
    magic: u64,
    /// The process that opened it.
    process: Option<u64>,
    service: RwLock<Option<Arc<Service>>>,
    /// Calls inside, and whoever waits for the last to leave.
    calls: Mutex<usize>,
    left: Condvar,
    /// Somebody waits, or will. Waking nobody would be a system call in every call.
    closing: AtomicBool,
}

/// A call in progress.
pub struct Visit {
    door: &'static Door,
    /// None only while leaving.
    service: Option<Arc<Service>>,
    /// The caller's thread was unwinding already: it is a destructor of the host's that calls.
    unwinding: bool,
}

static DOORS: Mutex<Vec<&'static Door>> = Mutex::new(Vec::new());

impl Door {
    /// A handle for `service`.
    pub fn open(service: Arc<Service>) -> *mut kuf {
        let door: &'static Door = Box::leak(Box::new(Door {
            magic: MAGIC,
            process: this_process(),
            service: RwLock::new(Some(service)),
            calls: Mutex::new(0),
            closing: AtomicBool::new(false),
            left: Condvar::new(),
        }));
        DOORS.lock().unwrap_or_else(PoisonError::into_inner).push(door);
        std::ptr::from_ref(door).cast_mut().cast()
    }

    /// Lets a call in.
    ///
    /// # Safety
    /// `handle` is NULL or came from [`Door::open`].
    pub unsafe fn enter(handle: *mut kuf) -> Result<Visit> {
        // SAFETY: the caller's promise.
        let door = unsafe { Self::at(handle) }?;
        let service = door.service.read().unwrap_or_else(PoisonError::into_inner);
        let service = service.clone().ok_or_else(closed)?;
        // Counted with the door still held open: close sees every call that got in.
        *door.calls.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Ok(Visit { door, service: Some(service), unwinding: std::thread::panicking() })
    }

    /// Ends the handle's service, or refuses to.
    ///
    /// # Safety
    /// As for [`Door::enter`].
    pub unsafe fn close(handle: *mut kuf, flags: u32) -> Result<()> {
        // SAFETY: the caller's promise.
        let visit = unsafe { Self::enter(handle) }?;
        refuse_inside_callbacks("kuf_close")?;
        let door = visit.door;
        visit.service().prepare_close(flags)?;
        let service = {
            let mut inside = door.service.write().unwrap_or_else(PoisonError::into_inner);
            let service = inside.clone().ok_or_else(closed)?;
            service.check_settled(flags)?;
            *inside = None;
            service
        };
        drop(visit);
        service.begin_end();
        service.settle_rest(flags);
        if flags & KUF_CLOSE_NOWAIT == 0 {
            door.closing.store(true, Ordering::Relaxed);
            let mut calls = door.calls.lock().unwrap_or_else(PoisonError::into_inner);
            while *calls > 0 {
                let wait = door.left.wait_timeout(calls, Duration::from_millis(1));
                drop(wait.unwrap_or_else(PoisonError::into_inner));
                // The service threads have ended; a call may be in madvise, which waits for its event to be read.
                service.serve_at_the_end();
                calls = door.calls.lock().unwrap_or_else(PoisonError::into_inner);
            }
            // A kuf_discard that was inside may have made pages absent since.
            drop(calls);
            service.settle_rest(flags);
        }
        service.end(flags);
        Ok(())
    }

    unsafe fn at(handle: *mut kuf) -> Result<&'static Door> {
        let door = NonNull::new(handle.cast::<Door>()).ok_or_else(|| Error::null("kuf"))?;
        if !door.is_aligned() {
            return Err(not_a_handle());
        }
        // SAFETY: the caller promises that it came from `open`, and doors are never freed.
        let door: &'static Door = unsafe { door.as_ref() };
        if door.magic != MAGIC {
            return Err(not_a_handle());
        }
        if door.process != this_process() {
            let text = "this handle belongs to the parent process: its threads do not exist here";
            return Err(Error::new(libc::ECHILD, text));
        }
        Ok(door)
    }
}

impl Visit {
    /// What is behind the door.
    pub fn service(&self) -> &Arc<Service> {
        match &self.service {
            Some(service) => service,
            None => unreachable!("a visit has its service until it is dropped"),
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.unwinding {
            // What the call held, pages that others wait for perhaps, nobody will bring any more.
            let _ = quietly(|| self.service().fail("a call has failed inside (a bug)"));
        }
        // Before the count: a kuf_close that waits for it has the last reference then, and releases before it returns.
        self.service = None;
        let mut calls = self.door.calls.lock().unwrap_or_else(PoisonError::into_inner);
        *calls -= 1;
        if *calls == 0 && self.door.closing.load(Ordering::Relaxed) {
            self.door.left.notify_all();
        }
    }
}

fn closed() -> Error {
    Error::new(libc::EBADF, "this handle is closed, or being closed")
}

fn not_a_handle() -> Error {
    Error::new(libc::EINVAL, "kuf is not a handle that kuf_open returned")
}

/// A number that is this process's alone: on a page that the kernel wipes in a forked child, because asking for the pid
/// would be a system call in every call. A child that opens handles of its own gets a number of its own. None: no such
/// page (before Linux 4.14), and forks go unnoticed.
fn this_process() -> Option<u64> {
    struct Page(NonNull<AtomicU64>);
    // SAFETY: an atomic, mapped for the life of the process.
    unsafe impl Send for Page {}
    // SAFETY: as above.
    unsafe impl Sync for Page {}
    static PAGE: OnceCell<Page> = OnceCell::new();
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let page = PAGE.get_or_try_init(|| {
        let len = rustix::param::page_size();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        // SAFETY: the page just mapped; wiped in children only.
        unsafe { rustix::mm::madvise(at, len, Advice::LinuxWipeOnFork) }?;
        NonNull::new(at.cast()).map(Page).ok_or(rustix::io::Errno::NOMEM)
    });
    // SAFETY: mapped above, zero at first and after a fork, never unmapped.
    let number = unsafe { page.ok()?.0.as_ref() };
    if number.load(Ordering::Relaxed) == 0 {
        // NEXT is inherited by a child, so it goes on counting there.
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let _ = number.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
    }
    Some(number.load(Ordering::Relaxed))
}
