//! The callbacks of a C caller.

use std::ffi::c_void;

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::text::c_text;
use crate::caller::{Event, Fill, Filled, LogLevel, Opaque, Run};
use crate::sync::atomic::{AtomicBool, Ordering};

/// The `struct kuf *` that callbacks get.
#[derive(Clone, Copy)]
struct HandlePointer(*mut kuf_handle);

// SAFETY: an address that is only handed to the caller; the caller's calls check it.
unsafe impl Send for HandlePointer {}
// SAFETY: as above.
unsafe impl Sync for HandlePointer {}

/// The four functions of `struct kuf_options`, and their argument.
pub struct CCallbacks {
    fill: kuf_fill_fn,
    event: kuf_event_fn,
    log: kuf_log_fn,
    release: kuf_release_fn,
    opaque: Opaque,
    handle: HandlePointer,
    /// Set once kuf_open has succeeded: from then on the library has to call release.
    opened: AtomicBool,
}

impl CCallbacks {
    /// Those of `o`, for the handle that kuf_open is about to return.
    pub fn new(o: &kuf_options, handle: *mut kuf_handle) -> Self {
        let (opaque, handle, opened) = (Opaque(o.opaque), HandlePointer(handle), AtomicBool::new(false));
        Self { fill: o.fill, event: o.event, log: o.log, release: o.release, opaque, handle, opened }
    }

    /// kuf_open has succeeded.
    pub fn opened(&self) {
        self.opened.store(true, Ordering::Release);
    }

    pub fn event(&self, event: &Event<'_>) {
        let Some(callback) = self.event else { return };
        let text = c_text(event.text, |_| false);
        let event = kuf_event {
            size: size_of::<kuf_event>() as u32,
            kind: event.kind,
            gpa: event.gpa,
            len: event.len,
            error: -event.error.map_or(0, Errno::raw_os_error),
            reserved: 0,
            text: text.as_ptr().cast(),
            memory_opaque: event.opaque.map_or(std::ptr::null_mut(), |opaque| opaque.0),
            kuf: self.handle.0,
        };
        // SAFETY: as the header promises; `event` and its text outlive the call.
        unsafe { callback(self.opaque.0, &event) };
    }

    pub fn log(&self, level: LogLevel, text: &str) {
        let Some(callback) = self.log else { return };
        let text = c_text(text, |byte| byte == b'\n');
        // SAFETY: as the header promises; the text outlives the call.
        unsafe { callback(self.opaque.0, level.number(), text.as_ptr().cast()) };
    }
}

impl Fill for CCallbacks {
    fn fill(&self, run: &mut Run<'_>) -> Filled {
        let Some(callback) = self.fill else { return Filled::Failed(Errno::NOTSUP) };
        let mut fill = kuf_fill {
            size: size_of::<kuf_fill>() as u32,
            flags: run.flags,
            gpa: run.gpa,
            len: run.len,
            buf: run.buf.as_ptr().cast(),
            filled: run.filled,
            page_size: run.page_size,
            memory_opaque: run.opaque,
            memory_offset: run.memory_offset,
            src: run.src,
            thread: run.thread,
            reserved: 0,
            kuf: self.handle.0,
        };
        // SAFETY: the callback and its argument are as the header requires; `fill` and its buffer outlive the call.
        let answer = unsafe { callback(self.opaque.0, &mut fill) };
        (run.filled, run.src) = (fill.filled, fill.src);
        match answer {
            KUF_FILL_DONE => Filled::Done,
            KUF_FILL_ZERO => Filled::Zero,
            KUF_FILL_DEFERRED => Filled::Deferred,
            KUF_FILL_LATER => Filled::Later,
            -4095..0 => Filled::Failed(Errno::from_raw_os_error(-answer)),
            unknown => {
                run.unknown = Some(unknown);
                Filled::Failed(Errno::PROTO)
            }
        }
    }
}

impl Drop for CCallbacks {
    /// Calls the caller's release: the service drops its callbacks when their last user is gone.
    fn drop(&mut self) {
        if let Some(release) = self.release.filter(|_| self.opened.load(Ordering::Acquire)) {
            let opaque: *mut c_void = self.opaque.0;
            // SAFETY: as the header promises; called once, since this is dropped once.
            unsafe { release(opaque) };
        }
    }
}
