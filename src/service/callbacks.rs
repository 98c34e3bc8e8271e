//! Calls of the caller's callbacks. Each is made with no lock held and guarded against a panic, and the thread remembers it,
//! so that a call back into the library knows its callback.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi::*;
use crate::caller::text::{c_text, TEXT};
use crate::caller::{Event, Fill, Filled, LogLevel, OnEvent, OnLog, Run};
use crate::error::{words, Failure, Words};
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
    /// Not now; no thread is known to wait.
    Later,
    /// It failed.
    Failed(Failure),
}

impl Answer {
    /// The result in the tracepoint `fill_end`.
    pub fn traced(&self, granule: u64) -> i64 {
        match self {
            Self::Filled(n) | Self::Elsewhere(n, _) | Self::Zero(n) => (n * granule) as i64,
            Self::Deferred | Self::Later => 0,
            Self::Failed(failure) => -i64::from(failure.errno().raw_os_error()),
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
        let Some(callback) = &self.fill else { return Answer::Failed(Errno::NOTSUP.into()) };
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
            unknown: None,
            buffer: PhantomData,
        };
        let answer = call(Inside::Fill { slot: Arc::as_ptr(slot), id }, || callback.fill(&mut run));
        run.keep_to_src();
        let whole = run.filled / slot.granule;
        let sound = run.filled % slot.granule == 0 && whole > 0 && run.filled <= len;
        match answer {
            Some(Filled::Deferred) => Answer::Deferred,
            Some(Filled::Done) if sound && !run.src.is_null() => Answer::Elsewhere(whole, run.src.cast()),
            Some(Filled::Done) if sound => Answer::Filled(whole),
            Some(Filled::Zero) if sound => Answer::Zero(whole),
            Some(Filled::Later) if !run.is_demand() => Answer::Later,
            other => Answer::Failed(failure(other, &run)),
        }
    }

    /// Raises an event of no slot. `error`: what failed.
    pub fn event(&self, kind: u32, gpa: u64, len: u64, error: Option<Errno>, text: &str) {
        self.event_of(None, &Event { kind, gpa, len, error, text, opaque: None });
    }

    /// Raises an event. `pin`: what holds the slot that it is of.
    pub fn event_of(&self, pin: Option<&EventPin<'_>>, event: &Event<'_>) {
        self.log_text(if event.error.is_none() { KUF_LOG_INFO } else { KUF_LOG_ERROR }, event.text);
        let Some(callback) = &self.event else { return };
        let slot = pin.map_or(std::ptr::null(), |telling| std::ptr::from_ref(telling.slot()));
        call(Inside::Event { slot }, || callback(event));
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

/// Names the value with which the callback has failed `run`, and the rule. `answer`: None when it has panicked.
fn failure(answer: Option<Filled>, run: &Run<'_>) -> Failure {
    match answer {
        None => Failure::new(Errno::NOTRECOVERABLE, "the fill callback has panicked"),
        Some(Filled::Failed(_)) if run.unknown.is_some() => {
            let value = run.unknown.unwrap_or_default();
            let text = words!("the fill callback returned {value}, which is neither a KUF_FILL_* nor an -errno");
            Failure::new(Errno::PROTO, text)
        }
        Some(Filled::Failed(Errno::AGAIN)) => Failure::new(
            Errno::AGAIN,
            "the fill callback returned -EAGAIN, which fails the fill as any errno does: to answer later, return \
             KUF_FILL_DEFERRED and call kuf_resolve; without KUF_RUN_DEMAND, KUF_FILL_LATER leaves the run absent",
        ),
        Some(Filled::Failed(errno)) => errno.into(),
        Some(Filled::Later) => Failure::new(
            Errno::PROTO,
            "the fill callback returned KUF_FILL_LATER for a run with KUF_RUN_DEMAND, for which a thread is blocked: \
             return KUF_FILL_DEFERRED and call kuf_resolve later",
        ),
        Some(Filled::Done | Filled::Zero | Filled::Deferred) => {
            let Run { filled, len, page_size, .. } = run;
            let text = words!(
                "the fill callback set `filled` to {filled}: it has to be a multiple of page_size, {page_size}, above 0 \
                 and at most len, {len}"
            );
            Failure::new(Errno::PROTO, text)
        }
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
