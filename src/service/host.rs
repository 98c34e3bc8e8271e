//! Calls into the host: its four callbacks, each with nothing locked, each guarded against a panic, each remembered by
//! the thread so that a call back into the library knows where it comes from.

use std::cell::Cell;
use std::ffi::{c_void, CString};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::fill::Run;
use crate::capi::types::*;
use crate::claims::Id;
use crate::error::{Error, Result};
use crate::memory::{Opaque, Slot};
use crate::panics::loudly;

/// The host's side of a handle.
pub struct Host {
    pub fill: kuf_fill_fn,
    pub event: kuf_event_fn,
    pub log: kuf_log_fn,
    pub release: kuf_release_fn,
    pub opaque: Opaque,
    pub log_level: u32,
    /// Set once kuf_open can no longer fail: from then on the host is owed a release.
    pub opened: AtomicBool,
}

/// What the fill callback answered.
pub enum Answer {
    /// This many pages from the start of the run are in the buffer.
    Filled(u64),
    /// This many pages from the start of the run are in memory of the host's, which may turn out unreadable.
    Elsewhere(u64, *const u8),
    /// This many pages from the start of the run are zero.
    Zero(u64),
    /// kuf_resolve will follow.
    Deferred,
    /// It failed with this errno.
    Failed(i32),
}

/// Which callback a thread is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inside {
    Fill { slot: *const Slot, id: Id },
    Event,
    Quiet,
}

thread_local! {
    static INSIDE: Cell<Option<Inside>> = const { Cell::new(None) };
}

/// Refuses a call that would wait for the thread that makes it.
pub fn refuse_inside_callbacks(call: &str) -> Result<()> {
    match INSIDE.get() {
        None => Ok(()),
        Some(_) => Err(deadlock(call)),
    }
}

/// As [`refuse_inside_callbacks`], but allowed in an event callback.
pub fn refuse_inside_fill(call: &str) -> Result<()> {
    match INSIDE.get() {
        None | Some(Inside::Event) => Ok(()),
        Some(_) => Err(deadlock(call)),
    }
}

/// Refuses any call from a log or release callback.
pub fn refuse_inside_quiet(call: &str) -> Result<()> {
    match INSIDE.get() {
        Some(Inside::Quiet) => Err(deadlock(call)),
        _ => Ok(()),
    }
}

fn deadlock(call: &str) -> Error {
    Error::new(
        libc::EDEADLK,
        format!("{call} may not be called from this callback: it would wait for the callback itself"),
    )
}

/// The claim of the fill callback that this thread is in, if it is for `slot`.
pub fn filling_here(slot: &Arc<Slot>) -> Option<Id> {
    match INSIDE.get() {
        Some(Inside::Fill { slot: here, id }) if here == Arc::as_ptr(slot) => Some(id),
        _ => None,
    }
}

/// Runs host code. None: it panicked.
fn call<T>(inside: Inside, body: impl FnOnce() -> T) -> Option<T> {
    // Put back, not cleared: an event may be raised by kuf_resolve inside a fill callback.
    let before = INSIDE.replace(Some(inside));
    let result = loudly(body);
    INSIDE.set(before);
    result
}

impl Host {
    /// Asks for the pages of `run` to be written at `buf`.
    pub fn fill(&self, run: &Run, buf: NonNull<u8>, flags: u32) -> Answer {
        let Some(callback) = self.fill else { return Answer::Failed(libc::ENOTSUP) };
        let Run { slot, pages, thread, .. } = run;
        let id = run.id;
        let (gpa, len) = slot.gpa_of(pages);
        let mut fill = kuf_fill {
            size: size_of::<kuf_fill>() as u32,
            flags: flags | if slot.parent.is_some() { KUF_FILL_FORKED } else { 0 },
            gpa,
            len,
            buf: buf.as_ptr().cast(),
            filled: len,
            granule: slot.granule,
            memory_opaque: slot.opaque.0,
            memory_offset: pages.start * slot.granule,
            src: std::ptr::null(),
            thread: *thread,
            reserved: 0,
        };
        // SAFETY: the callback and its argument are as the header promises; `fill` and its buffer outlive the call.
        let answer =
            call(Inside::Fill { slot: Arc::as_ptr(slot), id }, || unsafe { callback(self.opaque.0, &mut fill) });
        let whole = fill.filled / slot.granule;
        let sound = fill.filled % slot.granule == 0 && whole > 0 && fill.filled <= len;
        match answer {
            None => Answer::Failed(libc::ENOTRECOVERABLE),
            Some(KUF_DEFERRED) => Answer::Deferred,
            Some(KUF_FILLED) if sound && !fill.src.is_null() => Answer::Elsewhere(whole, fill.src.cast()),
            Some(KUF_FILLED) if sound => Answer::Filled(whole),
            Some(KUF_ZERO) if sound => Answer::Zero(whole),
            Some(errno) if (-4095..0).contains(&errno) => Answer::Failed(-errno),
            Some(_) => Answer::Failed(libc::EPROTO),
        }
    }

    /// Raises an event. `error` is an errno, positive, or 0.
    pub fn event(&self, kind: u32, gpa: u64, len: u64, error: i32, text: &str) {
        self.log(if error == 0 { KUF_LOG_INFO } else { KUF_LOG_ERROR }, || text.to_owned());
        let Some(callback) = self.event else { return };
        let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
        let size = size_of::<kuf_event>() as u32;
        let event = kuf_event { size, kind, gpa, len, error: -error, reserved: 0, text: text.as_ptr() };
        // SAFETY: as the header promises; `event` and its text outlive the call.
        call(Inside::Event, || unsafe { callback(self.opaque.0, &event) });
    }

    /// Whether log records of `level` are passed on.
    pub fn wants(&self, level: u32) -> bool {
        self.log.is_some() && level <= self.log_level
    }

    /// Passes on a log record if the host wants its level.
    pub fn log(&self, level: u32, text: impl FnOnce() -> String) {
        let Some(callback) = self.log.filter(|_| self.wants(level)) else { return };
        let text = CString::new(text().replace(['\0', '\n'], " ")).unwrap_or_default();
        // SAFETY: as the header promises; the text outlives the call.
        call(Inside::Quiet, || unsafe { callback(self.opaque.0, level, text.as_ptr()) });
    }
}

impl Drop for Host {
    /// The last user of the callbacks is gone.
    fn drop(&mut self) {
        if let Some(release) = self.release.filter(|_| self.opened.load(Ordering::Acquire)) {
            let opaque: *mut c_void = self.opaque.0;
            // SAFETY: as the header promises; called once, since a Host is dropped once.
            call(Inside::Quiet, || unsafe { release(opaque) });
        }
    }
}
