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

/// A memory slot of a [`Kuf`](crate::Kuf). It is only a name of the slot that is at this guest physical address now: to
/// drop it does not end the slot, which ends with [`Slot::remove`] or with the handle. Its calls fail with EBADF when
/// the handle has ended, and with ENOENT when the slot has been removed and no other one has its place.
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

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// False: a slot has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// How many bytes of the slot are in which state.
    pub fn progress(&self) -> Result<Progress> {
        self.door.enter()?.service().progress(self.gpa).map(Progress::from)
    }

    /// The settings in effect for the slot.
    pub fn settings(&self) -> Result<Settings> {
        settings::settings(self.door.enter()?.service(), self.gpa).map(Settings::from)
    }

    /// Fills the slot in the background, behind all demand. See [`Kuf::populate`](crate::Kuf::populate).
    pub fn populate(&self) -> Result<()> {
        let range = Some((self.gpa, self.len));
        populate::populate(self.door.enter()?.service(), NewPopulate { stop: false, sweep: false, range, rate: 0 })
    }

    /// Fills the slot at demand priority and returns when all of it is present. See [`Kuf::ensure`](crate::Kuf::ensure).
    pub fn ensure(&self, timeout: Option<Duration>) -> Result<()> {
        ensure::ensure(self.door.enter()?.service(), self.gpa, self.len, milliseconds(timeout))
    }

    /// Drops `len` bytes from byte `offset` of the slot on. See [`Kuf::discard`](crate::Kuf::discard).
    pub fn discard(&self, offset: u64, len: u64, how: Discard) -> Result<()> {
        let gpa = self.gpa.saturating_add(offset);
        discard::discard(self.door.enter()?.service(), gpa, len, how == Discard::Zero)
    }

    /// Ends the slot: its memory stays mapped and is the caller's alone afterwards. `end` decides about unresolved
    /// pages. It may be called in an event callback, but not in a fill callback (EDEADLK).
    ///
    /// EBUSY: there are unresolved pages and `end` is [`End::Complete`]; or a callback for this slot is still running
    /// after 100 ms: try again. EIO: not every page could be filled and `end` is [`End::Populate`]; ETIMEDOUT: not in
    /// time ([`Options::end_timeout`](crate::Options::end_timeout)); the slot goes on. ENOTSUP: [`End::Populate`] on a
    /// caller-driven handle. EINVAL: [`End::HandOver`].
    pub fn remove(&self, end: End) -> Result<()> {
        remove_memory::remove_memory(self.door.enter()?.service(), self.gpa, end.flags())
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({:#x}..{:#x})", self.gpa, self.gpa + self.len)
    }
}
