//! Background fills, for which no thread is blocked.

pub mod ended;
pub mod populate;
pub mod prefetch;
pub mod rate;
pub mod recorded;
pub mod recorder;
pub mod replay;
pub mod replay_window;
pub mod sweep;

use std::ops::Range;

use rustix::io::Errno;

use crate::error::Failure;
use crate::memory::Slot;
use crate::service::fault::batch::RecentDemand;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{lock, Arc, Mutex};

/// Why a target was not filled to its end.
#[derive(Debug)]
pub enum Stopped {
    /// A fill failed.
    Failed(Failure),
    /// The callback left pages absent, with KUF_FILL_LATER.
    Later,
    /// By KUF_POPULATE_STOP, or the service ends.
    Canceled,
    /// The time of the call is up.
    TimedOut,
    /// Other threads give memory back all the time, so that the kernel installs no page.
    GaveUp,
}

impl<F: Into<Failure>> From<F> for Stopped {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

/// The result of a step of a target.
pub type Step = std::result::Result<(), Stopped>;

/// The action on each part of the pages to fill.
pub type Act<'a> = dyn FnMut(&Arc<Slot>, &Range<u64>) -> Step + 'a;

/// Skips a slot that was removed meanwhile, as if its memory never existed.
pub fn skip_removed(slot: &Slot, go_on: &dyn Fn() -> Step, step: Step) -> Step {
    match step {
        Err(_) if slot.gone() == Some(Errno::NOENT) || slot.ending.load(Ordering::Acquire) => go_on(),
        other => other,
    }
}

/// Background work of one handle.
#[derive(Default)]
pub struct Background {
    pub populate: populate::PopulateQueue,
    pub prefetch: prefetch::Prefetch,
    pub recorder: recorder::Recorder,
    pub windows: replay_window::ReplayWindows,
    pub recent_demand: RecentDemand,
    /// A recording or a replay observes demand faults. Read without a lock: a fault pays only for this when none does.
    observed: AtomicBool,
    changing: Mutex<()>,
}

impl Background {
    /// Whether a recording or a replay observes demand faults.
    pub fn is_observed(&self) -> bool {
        self.observed.load(Ordering::Relaxed)
    }

    /// Updates the flag. Call it after a recording or a replay window has begun or ended.
    pub fn observers_changed(&self) {
        let _changing = lock(&self.changing);
        self.observed.store(self.recorder.is_on() || self.windows.is_open(), Ordering::Relaxed);
    }
}
