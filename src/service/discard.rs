//! `kuf_discard`: pages are dropped and armed again.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::host::refuse_inside_quiet;
use super::resolve::aligned;
use super::Service;
use crate::claims::{Discarding, Id};
use crate::error::{Error, Result};
use crate::memory::Slot;
use crate::pages::State;

impl Service {
    /// Drops `gpa..gpa+len`. `removed`: the guest gave it back, so it is zero from now on; else it refills from the
    /// source.
    pub fn discard(&self, gpa: u64, len: u64, removed: bool) -> Result<()> {
        refuse_inside_quiet("kuf_discard")?;
        self.check_open()?;
        let map = self.memory.map();
        let (slot, offsets) = map.range(gpa, len)?;
        let pages = aligned(slot, &offsets)?;
        if let Some(errno) = slot.gone() {
            return Err(Error::new(errno, "the process behind this memory slot is gone"));
        }
        if slot.mechanism.remote() && slot.shared.is_none() {
            let text = "only the process that owns this memory can drop it: the slot has no KUF_MEMORY_FD";
            return Err(Error::new(libc::ENOTSUP, text));
        }
        self.refuse_memslot_change(slot, "kuf_discard")?;
        self.drop_pages(slot, pages, removed)
    }

    fn drop_pages(&self, slot: &Arc<Slot>, pages: Range<u64>, removed: bool) -> Result<()> {
        // A thread that comes from madvise may be here before its event, read already, was applied: this discard is later.
        drop(slot.mechanism.gate().write().unwrap_or_else(PoisonError::into_inner));
        if !removed {
            slot.mechanism.before_drop(slot).map_err(|e| Error::system("changing the memslot", e))?;
        }
        let Discarding { id, runs, waiters } = loop {
            let mut claims = slot.claims();
            // Under the lock: a kuf_close that does not wait for this has not looked at the slot yet.
            self.check_open()?;
            if !claims.installing(&pages) && !claims.dropping(&pages) {
                // Not whole any more from here on, whatever becomes of the rest.
                slot.complete.store(false, Ordering::Release);
                let before = slot.pages.count(State::Removed);
                let begun = claims.begin_discard(&slot.pages, pages.clone(), removed, slot.in_place());
                let more = slot.pages.count(State::Removed).saturating_sub(before);
                self.stats.here().bytes_removed(more * slot.granule);
                slot.wake_sleepers(&claims);
                break begun;
            }
            drop(claims);
            std::thread::yield_now();
        };
        self.push_again(slot, waiters);
        let state = if removed { State::Removed } else { State::Absent };
        for (n, run) in runs.iter().enumerate() {
            // While this waits for the kernel, the REMOVE event it causes is read by a service thread, which leaves the
            // pages alone that are claimed here.
            if let Err(errno) = slot.mechanism.drop_pages(slot, run) {
                self.drop_failed(slot, id, &runs[n..], state);
                return Err(Error::system("dropping guest pages", errno));
            }
            // Whoever has read the REMOVE event of this may not have applied it yet.
            drop(slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner));
            let bytes = (run.end - run.start) * slot.granule;
            self.stats.here().bytes_discarded(bytes);
            self.stats.here().bytes_removed(if state == State::Removed { bytes } else { 0 });
            self.dropped(slot, id, run, state);
        }
        if !removed {
            // It may have been taken for complete between the two; without exits all are caught still.
            let _ = slot.mechanism.before_drop(slot);
        }
        if let Some(work) = self.completion(slot) {
            self.work_on(work);
        }
        Ok(())
    }

    /// The pages of `run` are what they were dropped for; who waits for one is served anew.
    fn dropped(&self, slot: &Arc<Slot>, id: Id, run: &Range<u64>, state: State) {
        let waiters = {
            let mut claims = slot.claims();
            let waiters = claims.settle(&slot.pages, run.clone(), id, Some(state));
            slot.wake_sleepers(&claims);
            waiters
        };
        self.serve_parked(slot, run);
        self.push_again(slot, waiters);
    }

    /// The first of `runs` could not be dropped as a whole. What a shared file holds is there still. Of other memory some
    /// may be gone, and none of it may be taken for present: what is not gone keeps its bytes when it is filled anew.
    fn drop_failed(&self, slot: &Arc<Slot>, id: Id, runs: &[Range<u64>], state: State) {
        let mut rest = runs;
        if let Some((first, others)) = runs.split_first().filter(|_| slot.shared.is_none()) {
            self.dropped(slot, id, first, state);
            rest = others;
        }
        rest.iter().for_each(|run| self.abandon(slot, id, run.clone()));
    }
}
