//! Calls of the caller's callbacks. Each is made with no lock held and guarded against a panic, and the thread remembers it,
//! so that a call back into the library knows its callback.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::text::{c_text, TEXT};
use crate::caller::{Event, Fill, Filled, LogLevel, OnEvent, OnLog, Run};
use crate::error::Words;
use crate::memory::Slot;
use crate::pages::claims::Id;
use crate::service::fault::pin::EventPin;
use crate::service::inside::{call, Inside};
use crate::sync::Arc;

/// The caller's side of a handle.
#[derive(Default)]
pub struct Callbacks {
    pub fill: Option<Arc<dyn Fill>>,
    pub event: Option<OnEvent>,
    pub log: Option<OnLog>,
    pub log_level: u32,
    /// Log records of every level go to standard error too.
    pub to_stderr: bool,
}

/// The answer of the fill callback.
pub enum Answer {
    /// This many pages from the start of the run are in the buffer.
    Filled(u64),
    /// This many pages from the start of the run are in the caller's memory, which may be unreadable.
    Elsewhere(u64, *const u8),
    /// This many pages from the start of the run are zero.
    Zero(u64),
    /// kuf_resolve will follow.
    Deferred,
    /// It failed with this errno.
    Failed(Errno),
}

impl Answer {
    /// The result in the tracepoint `fill_end`.
    pub fn traced(&self, granule: u64) -> i64 {
        match self {
            Self::Filled(n) | Self::Elsewhere(n, _) | Self::Zero(n) => (n * granule) as i64,
            Self::Deferred => 0,
            Self::Failed(errno) => -i64::from(errno.raw_os_error()),
        }
    }
}

impl Callbacks {
    /// Asks the callback to write `pages` at `buf`.
    pub fn fill(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: &Range<u64>,
        thread: u32,
        buf: NonNull<u8>,
        flags: u32,
    ) -> Answer {
        let Some(callback) = &self.fill else { return Answer::Failed(Errno::NOTSUP) };
        let (gpa, len) = slot.gpa_of(pages);
        let mut run = Run {
            flags: flags | if slot.parent.is_some() { KUF_RUN_FORKED } else { 0 },
            page_size: slot.granule,
            opaque: slot.opaque.0,
            memory_offset: pages.start * slot.granule,
            thread,
            gpa,
            len,
            buf,
            filled: len,
            src: std::ptr::null(),
            src_len: u64::MAX,
            buffer: PhantomData,
        };
        let answer = call(Inside::Fill { slot: Arc::as_ptr(slot), id }, || callback.fill(&mut run));
        run.keep_to_src();
        let whole = run.filled / slot.granule;
        let sound = run.filled % slot.granule == 0 && whole > 0 && run.filled <= len;
        match answer {
            None => Answer::Failed(Errno::NOTRECOVERABLE),
            Some(Filled::Deferred) => Answer::Deferred,
            Some(Filled::Done) if sound && !run.src.is_null() => Answer::Elsewhere(whole, run.src.cast()),
            Some(Filled::Done) if sound => Answer::Filled(whole),
            Some(Filled::Zero) if sound => Answer::Zero(whole),
            Some(Filled::Failed(errno)) => Answer::Failed(errno),
            Some(Filled::Done | Filled::Zero) => Answer::Failed(Errno::PROTO),
        }
    }

    /// Raises an event of no slot. `error`: what failed.
    pub fn event(&self, kind: u32, gpa: u64, len: u64, error: Option<Errno>, text: &str) {
        self.event_of(None, kind, gpa, len, error, text);
    }

    /// Raises an event, of the slot `of` if it is given.
    pub fn event_of(&self, of: Option<&EventPin<'_>>, kind: u32, gpa: u64, len: u64, error: Option<Errno>, text: &str) {
        self.log_text(if error.is_none() { KUF_LOG_INFO } else { KUF_LOG_ERROR }, text);
        let Some(callback) = &self.event else { return };
        let event = Event { kind, gpa, len, error, text };
        let slot = of.map_or(std::ptr::null(), |telling| std::ptr::from_ref(telling.slot()));
        call(Inside::Event { slot }, || callback(&event));
    }

    /// Highest level of log records that are passed on; 0: none.
    pub fn level(&self) -> u32 {
        if self.log.is_some() {
            self.log_level
        } else {
            0
        }
    }

    /// Whether log records of `level` are passed on.
    pub fn wants(&self, level: u32) -> bool {
        self.to_stderr || level <= self.level()
    }

    /// Passes on a log record if the caller wants its level.
    pub fn log(&self, level: u32, text: impl FnOnce() -> Words) {
        if self.wants(level) {
            self.log_text(level, &text());
        }
    }

    fn log_text(&self, level: u32, text: &str) {
        if self.to_stderr {
            write_line(text);
        }
        let Some(callback) = self.log.as_ref().filter(|_| level <= self.log_level) else { return };
        call(Inside::Quiet, || callback(LogLevel::of(level), text));
    }
}

/// Writes a log record to standard error: whole lines, also where several threads or processes do so.
fn write_line(text: &str) {
    const PREFIX: &[u8] = b"kuf: ";
    let text = c_text(text, |byte| byte == b'\n');
    let len = text.iter().position(|byte| *byte == 0).unwrap_or(TEXT);
    let mut line = [b'\n'; PREFIX.len() + TEXT + 1];
    line[..PREFIX.len()].copy_from_slice(PREFIX);
    line[PREFIX.len()..][..len].copy_from_slice(&text[..len]);
    // There is no other place to report a failure to.
    let _ = rustix::io::write(std::io::stderr(), &line[..PREFIX.len() + len + 1]);
}

impl Drop for Callbacks {
    /// The caller's destructors run when the last user of the callbacks is gone.
    fn drop(&mut self) {
        call(Inside::Quiet, || drop((self.fill.take(), self.event.take(), self.log.take())));
    }
}
