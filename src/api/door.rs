//! The state of a handle: it admits calls, and ends the service after the last one. [`Kuf`](crate::Kuf) and `struct kuf
//! *` have one each.

use std::ptr::NonNull;

use once_cell::sync::OnceCell;
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::mapping::buffer::Buffer;
use crate::panics::quietly;
use crate::service::calls::close;
use crate::service::calls::end_slot::Toll;
use crate::service::threads::serve;
use crate::service::{refuse_inside_callbacks, Service};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::time::Duration;
use crate::sync::{lock, read, thread, wait_timeout, write, Arc, Condvar, Mutex, RwLock};

/// The state of a handle.
pub struct Door {
    /// The process that opened it.
    process: u64,
    inside: RwLock<Inner>,
    /// The number of calls inside.
    calls: Mutex<usize>,
    left: Condvar,
    /// A close waits for the calls, or is about to. Without it, each call would make a system call to wake no thread.
    closing: AtomicBool,
}

enum Inner {
    Nothing,
    /// Calls may enter.
    Open(Arc<Service>),
    /// A close is ending the service.
    Ending,
    /// A close panicked while it ended the service; the next one continues.
    HalfEnded(Arc<Service>),
}

/// A call in progress.
pub struct Call<'a> {
    door: &'a Door,
    /// None only while the call leaves.
    service: Option<Arc<Service>>,
    /// The caller's thread was unwinding already: a destructor of the caller made the call.
    unwinding: bool,
}

impl Door {
    /// The door of a handle without a service.
    pub fn new() -> Result<Self> {
        Ok(Self {
            process: this_process()?,
            inside: RwLock::new(Inner::Nothing),
            calls: Mutex::new(0),
            closing: AtomicBool::new(false),
            left: Condvar::new(),
        })
    }

    /// Opens it for calls to `service`.
    pub fn open(&self, service: Arc<Service>) {
        *write(&self.inside) = Inner::Open(service);
    }

    /// Checks that this is the process that opened it.
    fn check_process(&self) -> Result<()> {
        if self.process != this_process()? {
            let text = "this handle belongs to the parent process: its threads do not exist here";
            return Err(Error::new(Errno::CHILD, text));
        }
        Ok(())
    }

    /// Admits a call.
    pub fn enter(&self) -> Result<Call<'_>> {
        self.check_process()?;
        let inside = read(&self.inside);
        let service = inside.open()?;
        // Count the call while the lock is held, so that a close sees every call that entered.
        *lock(&self.calls) += 1;
        Ok(Call { door: self, service: Some(service), unwinding: thread::panicking() })
    }

    /// Ends the service, or refuses to. Continues a close that panicked.
    pub fn close(&self, flags: u32) -> Result<()> {
        self.check_process()?;
        refuse_inside_callbacks("kuf_close")?;
        let end = match self.half_ended() {
            Some(end) => end,
            None => {
                let visit = self.enter()?;
                close::prepare_close(visit.service(), flags)?;
                let mut inside = write(&self.inside);
                let service = inside.open()?;
                close::begin_end(&service, flags)?;
                *inside = Inner::Ending;
                End { door: self, service: Some(service) }
            }
        };
        end.go_through(flags);
        Ok(())
    }

    /// Takes over the end of a service that an earlier close left when it panicked.
    fn half_ended(&self) -> Option<End<'_>> {
        let mut inside = write(&self.inside);
        match std::mem::replace(&mut *inside, Inner::Ending) {
            Inner::HalfEnded(service) => Some(End { door: self, service: Some(service) }),
            other => {
                *inside = other;
                None
            }
        }
    }
}

impl Inner {
    fn open(&self) -> Result<Arc<Service>> {
        match self {
            Self::Open(service) => Ok(service.clone()),
            Self::Nothing | Self::Ending | Self::HalfEnded(_) => Err(closed()),
        }
    }
}

/// The part of a close that cannot be refused.
struct End<'a> {
    door: &'a Door,
    /// None: the service has ended.
    service: Option<Arc<Service>>,
}

impl End<'_> {
    fn go_through(mut self, flags: u32) {
        let Some(service) = &self.service else { return };
        let mut toll = Toll::default();
        close::settle_rest(service, flags, &mut toll);
        if flags & KUF_END_NOWAIT == 0 {
            self.wait_for_calls(service);
            // A kuf_discard that was still inside may have made pages absent since.
            close::settle_rest(service, flags, &mut toll);
        }
        close::end(service, flags, &mut toll);
        *write(&self.door.inside) = Inner::Nothing;
        // Dropping the last reference drops the caller's callbacks.
        self.service = None;
    }

    fn wait_for_calls(&self, service: &Arc<Service>) {
        let door = self.door;
        door.closing.store(true, Ordering::Relaxed);
        let mut calls = lock(&door.calls);
        while *calls > 0 {
            drop(wait_timeout(&door.left, calls, Duration::from_millis(1)));
            // The service threads have ended, so this thread reads events: a call may be in madvise, which waits for
            // that.
            serve::serve_at_the_end(service);
            calls = lock(&door.calls);
        }
    }
}

impl Drop for End<'_> {
    /// Runs after a panic, unless the service has ended.
    fn drop(&mut self) {
        if let Some(service) = self.service.take() {
            service.fail_at_the_end();
            *write(&self.door.inside) = Inner::HalfEnded(service);
        }
    }
}

impl Call<'_> {
    /// The service of the handle.
    pub fn service(&self) -> &Arc<Service> {
        match &self.service {
            Some(service) => service,
            None => unreachable!("a call has its service until it is dropped"),
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if thread::panicking() && !self.unwinding {
            // The call may have left claims that no thread will fill, so fail the service.
            let _ = quietly(|| self.service().fail("a call has failed inside (a bug)"));
        }
        // Drop this before counting down, so that a close that waits has the last reference and releases before it
        // returns.
        self.service = None;
        let mut calls = lock(&self.door.calls);
        *calls -= 1;
        if *calls == 0 && self.door.closing.load(Ordering::Relaxed) {
            self.door.left.notify_all();
        }
    }
}

fn closed() -> Error {
    Error::new(Errno::BADF, "this handle is closed, or being closed")
}

/// A number that only this process has. It is on a page that the kernel wipes in a forked child, for getpid would be a
/// system call in every call. A child that opens handles gets a number of its own. Before Linux 4.14 the kernel wipes
/// no page, and the library does not notice forks. Err: there is no memory for the page; after the first success there
/// is no error.
fn this_process() -> Result<u64> {
    struct Page(NonNull<AtomicU64>);
    // SAFETY: an atomic that stays mapped until the process ends.
    unsafe impl Send for Page {}
    // SAFETY: as above.
    unsafe impl Sync for Page {}
    static PAGE: OnceCell<Page> = OnceCell::new();
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let page = PAGE.get_or_try_init(|| {
        let page = Buffer::new(1)?;
        let (at, len) = (page.at(), page.len());
        // SAFETY: the page just mapped, which the kernel wipes only in children.
        match unsafe { rustix::mm::madvise(at.as_ptr().cast(), len, Advice::LinuxWipeOnFork) } {
            Ok(()) | Err(Errno::INVAL) => {
                std::mem::forget(page);
                Ok(Page(at.cast()))
            }
            Err(errno) => Err(Error::system("MADV_WIPEONFORK", errno)),
        }
    });
    // SAFETY: mapped above, zero at first and after a fork, never unmapped.
    let number = unsafe { page?.0.as_ref() };
    if number.load(Ordering::Relaxed) == 0 {
        // A child inherits NEXT and goes on counting.
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let _ = number.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
    }
    Ok(number.load(Ordering::Relaxed))
}
