//! Whether a handle is open, ending, or dead.

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use crate::sync::time::{Duration, Instant};

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const DEAD: u8 = 2;

/// The life of one handle.
pub struct Life {
    state: AtomicU8,
    /// Unresolved pages are left to another handler.
    hands_over: AtomicBool,
    opened: Instant,
}

impl Life {
    /// A handle that is open from now on.
    pub fn new() -> Self {
        Self { state: AtomicU8::new(OPEN), hands_over: AtomicBool::new(false), opened: Instant::now() }
    }

    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }

    pub fn is_open(&self) -> bool {
        self.state() == OPEN
    }

    pub fn is_closing(&self) -> bool {
        self.state() == CLOSING
    }

    pub fn is_dead(&self) -> bool {
        self.state() == DEAD
    }

    /// Notes that kuf_close has begun. A dead handle stays dead.
    pub fn close(&self) {
        let _ = self.state.compare_exchange(OPEN, CLOSING, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Notes that the kuf_close that is about to begin leaves unresolved pages to another handler.
    pub fn hand_over(&self) {
        self.hands_over.store(true, Ordering::Release);
    }

    /// Whether kuf_close leaves unresolved pages to another handler.
    pub fn hands_over(&self) -> bool {
        self.hands_over.load(Ordering::Acquire)
    }

    /// Notes that the service has failed. False: it had ended before.
    pub fn fail(&self) -> bool {
        self.state.compare_exchange(OPEN, DEAD, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Notes that a kuf_close has failed.
    pub fn fail_at_the_end(&self) {
        self.state.store(DEAD, Ordering::Release);
    }

    /// Refuses work when the service is ending or has failed.
    pub fn check(&self) -> Result<()> {
        match self.state() {
            OPEN => Ok(()),
            CLOSING => Err(Error::new(Errno::CANCELED, "kuf_close has begun on this handle")),
            _ => Err(Error::new(Errno::IO, "the service of this handle is dead after an internal failure: close it")),
        }
    }

    /// How long ago the handle was opened.
    pub fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// The age at `now`.
    pub fn age_at(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.opened)
    }
}
