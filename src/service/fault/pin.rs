//! Counts the threads that are in a callback for a slot. The claims do not show them: `kuf_resolve`, or the guest, may take
//! the pages away while the callback runs, which still holds the slot's memory_opaque.

use std::ops::Range;

use rustix::io::Errno;

use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Id};
use crate::service::inside::telling_here;
use crate::sync::atomic::Ordering;
use crate::sync::Arc;

/// Counts as long as it lives.
pub struct FillPin<'a>(&'a Slot);

impl<'a> FillPin<'a> {
    /// None: the run was taken away, and the slot may already be removed.
    pub fn begin(slot: &'a Arc<Slot>, id: Id, pages: &Range<u64>) -> Option<Self> {
        let root = slot.parent.as_ref().unwrap_or(slot);
        root.pins.fetch_add(1, Ordering::SeqCst);
        let asking = Self(root);
        // A thread that removes the slot sets `removing` before it looks at the pins, and keeps it set until the slot has
        // gone: either that thread sees this pin, or this thread sees `removing`.
        let stays = root.removing.load(Ordering::SeqCst) == 0 && root.gone().is_none();
        (stays || slot.claims().holds(pages, id)).then_some(asking)
    }
}

/// Counts as long as it lives: an event of the slot is raised.
pub struct EventPin<'a>(FillPin<'a>);

impl<'a> EventPin<'a> {
    /// Of `pages`, which the claim `id` is about to poison. None: the pages were taken away by a thread that ends the slot
    /// and raises the event itself, and the slot may already be removed.
    pub fn of_claimed(slot: &'a Slot, pages: &Range<u64>, id: Id) -> Option<Self> {
        Self::if_so(slot, |claims| claims.holds(pages, id))
    }

    /// None: the slot was removed, or is about to be.
    pub fn begin(slot: &'a Slot) -> Option<Self> {
        Self::if_so(slot, |claims| !claims.is_shut())
    }

    /// At the end of the service, which shuts every slot. None: the slot was removed before, or is about to be. As in
    /// [`FillPin::begin`], either this thread sees `removing`, or the thread that removes the slot sees this pin.
    pub fn at_end(slot: &'a Slot) -> Option<Self> {
        let root = slot.parent.as_deref().unwrap_or(slot);
        root.pins.fetch_add(1, Ordering::SeqCst);
        let telling = Self(FillPin(root));
        let stays = root.removing.load(Ordering::SeqCst) == 0 && root.gone() != Some(Errno::NOENT);
        stays.then_some(telling)
    }

    /// With the claims locked, as in the thread that removes the slot: either that thread sees this pin, or this thread sees
    /// the claims shut.
    fn if_so(slot: &'a Slot, stays: impl Fn(&Claims<Waiter>) -> bool) -> Option<Self> {
        let claims = slot.claims();
        stays(&claims).then(|| {
            let root = slot.parent.as_deref().unwrap_or(slot);
            root.pins.fetch_add(1, Ordering::SeqCst);
            Self(FillPin(root))
        })
    }

    /// The slot it is of.
    pub fn slot(&self) -> &'a Slot {
        self.0 .0
    }
}

impl Drop for FillPin<'_> {
    fn drop(&mut self) {
        self.0.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Slot {
    /// Whether any other thread is in a callback for it.
    pub fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::SeqCst) > u32::from(telling_here(self))
    }
}
