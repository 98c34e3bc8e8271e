//! The library's own threads.
//!
//! They are not std's: those allocate first on a new thread, and end the process where there is no memory. These need
//! only the memory that pthread_create(3) has allocated, or has failed to.

use std::io::Write;

use rustix::io::Errno;

#[cfg(not(shuttle))]
use crate::panics::caught;

/// The name of a thread.
pub struct Name([u8; 16]);

impl Name {
    /// Formats a name and cuts it after 15 bytes.
    pub fn new(name: std::fmt::Arguments<'_>) -> Self {
        let mut room = [0; 16];
        let _ = (&mut room[..15]).write_fmt(name);
        Self(room)
    }
}

/// A thread of the library. Dropping the value detaches the thread.
#[cfg(not(shuttle))]
pub struct Worker {
    thread: libc::pthread_t,
    ended: bool,
}

// musl's pthread_t is a pointer.
// SAFETY: a name for the thread, which any thread may pass to libc.
#[cfg(not(shuttle))]
unsafe impl Send for Worker {}
// SAFETY: as above.
#[cfg(not(shuttle))]
unsafe impl Sync for Worker {}

#[cfg(not(shuttle))]
impl Worker {
    /// Starts a thread. Err is an errno: EAGAIN or ENOMEM.
    pub fn start<F: FnOnce() + Send + 'static>(name: Name, body: F) -> Result<Self, Errno> {
        let start = Box::into_raw(crate::alloc::try_box((name, body))?);
        let mut thread = std::mem::MaybeUninit::uninit();
        let mut attributes = std::mem::MaybeUninit::uninit();
        // SAFETY: the attributes are initialised before they are used; `start` belongs to the new thread from here on,
        // if there is one.
        let errno = unsafe {
            libc::pthread_attr_init(attributes.as_mut_ptr());
            libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK);
            let errno = libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run::<F>, start.cast());
            libc::pthread_attr_destroy(attributes.as_mut_ptr());
            errno
        };
        if errno != 0 {
            // SAFETY: made above, and passed to no thread.
            drop(unsafe { Box::from_raw(start) });
            return Err(Errno::from_raw_os_error(errno));
        }
        // SAFETY: pthread_create has set it.
        Ok(Self { thread: unsafe { thread.assume_init() }, ended: false })
    }

    /// Whether the thread has ended; if so, it is joined.
    pub fn has_ended(&mut self) -> bool {
        // SAFETY: a thread that is not joined yet.
        self.ended = self.ended || unsafe { libc::pthread_tryjoin_np(self.thread, std::ptr::null_mut()) } == 0;
        self.ended
    }

    /// Waits until the thread has ended.
    pub fn join(mut self) {
        if !self.ended {
            // SAFETY: as above.
            unsafe { libc::pthread_join(self.thread, std::ptr::null_mut()) };
        }
        self.ended = true;
    }

    /// The thread's identity in libc.
    pub fn pthread(&self) -> libc::pthread_t {
        self.thread
    }
}

#[cfg(not(shuttle))]
impl Drop for Worker {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: a thread that was not joined.
            unsafe { libc::pthread_detach(self.thread) };
        }
    }
}

/// Bytes of a thread's stack. Callbacks run on it too.
#[cfg(not(shuttle))]
const STACK: usize = 2 << 20;

#[cfg(not(shuttle))]
extern "C" fn run<F: FnOnce()>(start: *mut std::ffi::c_void) -> *mut std::ffi::c_void {
    // SAFETY: made by `start` for this thread.
    let (name, body) = *unsafe { Box::from_raw(start.cast::<(Name, F)>()) };
    // SAFETY: this thread and a C string.
    unsafe { libc::pthread_setname_np(libc::pthread_self(), name.0.as_ptr().cast()) };
    // A panic ends here: the caller's frames are C's.
    let _ = caught(body, |_| ());
    std::ptr::null_mut()
}

/// The same, under the simulation's scheduler.
#[cfg(shuttle)]
pub struct Worker(Option<crate::sync::thread::JoinHandle<()>>);

#[cfg(shuttle)]
impl Worker {
    pub fn start<F: FnOnce() + Send + 'static>(name: Name, body: F) -> Result<Self, Errno> {
        let name = String::from_utf8_lossy(&name.0).trim_end_matches('\0').to_owned();
        crate::sync::thread::Builder::new()
            .name(name)
            .spawn(body)
            .map(|thread| Self(Some(thread)))
            .map_err(|_| Errno::AGAIN)
    }

    pub fn has_ended(&mut self) -> bool {
        self.0.as_ref().is_none_or(|thread| thread.is_finished())
    }

    pub fn join(mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }

    pub fn pthread(&self) -> libc::pthread_t {
        // SAFETY: returns the calling thread, which runs all of the simulation.
        unsafe { libc::pthread_self() }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicU32, Ordering};
    use crate::sync::time::Duration;
    use crate::sync::{thread, Arc};

    #[test]
    fn a_worker_has_its_name_runs_and_ends() {
        let said = Arc::new(AtomicU32::new(0));
        let also = said.clone();
        let mut worker = Worker::start(Name::new(format_args!("kuf-worker-{}", "test")), move || {
            let mut name = [0_u8; 16];
            // SAFETY: room for a thread's name.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            also.store(u32::from(name.starts_with(b"kuf-worker-test")), Ordering::SeqCst);
            std::panic::resume_unwind(Box::new("it ends there"));
        })
        .expect("a thread");
        while !worker.has_ended() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(worker.has_ended() && said.load(Ordering::SeqCst) == 1 && Arc::strong_count(&said) == 1);
        worker.join();
        Worker::start(Name::new(format_args!("kuf-worker-{}", "test")), || {}).expect("a thread").join();
    }
}
