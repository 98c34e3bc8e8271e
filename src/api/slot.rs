//! A memory slot of a handle.

use crate::api::checks::milliseconds;
use crate::api::door::Door;
use crate::api::{Discard, End, Progress, Settings};
use crate::error::Result;
use crate::service::background::populate;
use crate::service::calls::{discard, ensure, remove_memory, settings};
use crate::service::config::NewPopulate;
use crate::sync::time::Duration;
use crate::sync::Arc;

/// A memory slot that was added to a [`Kuf`](crate::Kuf). It is only a name: the slot ends with [`Slot::remove`] or with the handle. Its
/// calls fail with EBADF when the handle has ended, and with ENOENT when the slot has been removed.
#[derive(Clone)]
pub struct Slot {
    door: Arc<Door>,
    gpa: u64,
    len: u64,
}

impl Slot {
    pub(crate) fn new(door: Arc<Door>, gpa: u64, len: u64) -> Self {
        Self { door, gpa, len }
    }

    /// The first guest physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// False: a slot has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// How far the slot is.
    pub fn progress(&self) -> Result<Progress> {
        self.door.enter()?.service().progress(self.gpa).map(Progress::from)
    }

    /// The settings of the slot in effect.
    pub fn settings(&self) -> Result<Settings> {
        settings::settings(self.door.enter()?.service(), self.gpa).map(Settings::from)
    }

    /// Fills the slot in the background, behind all demand. An event of the kind
    /// [`EventKind::Populated`](crate::EventKind::Populated) ends it.
    pub fn populate(&self) -> Result<()> {
        let range = Some((self.gpa, self.len));
        populate::populate(self.door.enter()?.service(), NewPopulate { stop: false, sweep: false, range, rate: 0 })
    }

    /// Returns when all of the slot is present. See [`Kuf::ensure`](crate::Kuf::ensure).
    pub fn ensure(&self, timeout: Option<Duration>) -> Result<()> {
        ensure::ensure(self.door.enter()?.service(), self.gpa, self.len, milliseconds(timeout))
    }

    /// Drops the content of `len` bytes from `offset` on. See [`Kuf::discard`](crate::Kuf::discard).
    pub fn discard(&self, offset: u64, len: u64, how: Discard) -> Result<()> {
        let gpa = self.gpa.saturating_add(offset);
        discard::discard(self.door.enter()?.service(), gpa, len, how == Discard::Zero)
    }

    /// Ends the slot: its memory is the caller's alone afterwards. `end` says what becomes of unresolved pages.
    ///
    /// EBUSY: there are unresolved pages and `end` is [`End::Complete`], or a callback for this slot is running: try again
    /// when it has returned.
    pub fn remove(&self, end: End) -> Result<()> {
        remove_memory::remove_memory(self.door.enter()?.service(), self.gpa, end.flags())
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({:#x}..{:#x})", self.gpa, self.gpa + self.len)
    }
}
