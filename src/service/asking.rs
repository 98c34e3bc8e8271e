//! Who is asking the host for pages of a slot. Its claim does not say: `kuf_resolve`, or the guest, may take the pages away
//! while the callback runs, which goes on with the host's word for the slot in hand.

use std::sync::atomic::Ordering;

use super::fill::Run;
use crate::memory::Slot;

/// Counts as long as it lives.
pub struct Asking<'a>(&'a Slot);

impl<'a> Asking<'a> {
    /// None: the run was taken away, and the slot may be the host's again.
    pub fn begin(run: &'a Run) -> Option<Self> {
        let Run { slot, id, pages, .. } = run;
        let root = slot.parent.as_ref().unwrap_or(slot);
        root.asking.fetch_add(1, Ordering::SeqCst);
        let asking = Self(root);
        // Who takes the slot off says so before it looks for those who ask, and until the slot has gone: either it sees
        // this one, or this one sees it.
        let stays = root.leaving.load(Ordering::SeqCst) == 0 && root.gone().is_none();
        (stays || slot.claims().holds(pages, *id)).then_some(asking)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asking.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Slot {
    /// Whether anybody is asking the host for pages of it.
    pub fn asks(&self) -> bool {
        self.asking.load(Ordering::SeqCst) > 0
    }
}
