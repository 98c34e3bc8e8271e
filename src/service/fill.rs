//! Getting the bytes of a claimed run: the place to write them, the host's callback, and what follows from its answer.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::host::Answer;
use super::install::Failed;
use super::Service;
use crate::capi::types::*;
use crate::claims::{Early, Id};
use crate::mechanism::Content;
use crate::memory::buffer::Buffer;
use crate::memory::{Slot, Waiter};
use crate::pages::State;

/// A run that the calling thread has claimed and is to fill.
pub struct Run {
    pub slot: Arc<Slot>,
    pub id: Id,
    pub pages: Range<u64>,
    /// The page somebody waits for; None when nobody does.
    pub wanted: Option<u64>,
    /// When this began.
    pub since: Instant,
}

/// Where the callback writes.
enum Place {
    InPlace(NonNull<u8>),
    Buffer(Buffer),
}

impl Service {
    /// Fills a run: the only way from a claim to the host's callback. Err is the errno with which the source failed,
    /// for pages that were not poisoned for it.
    pub(super) fn fill(&self, run: &Run) -> Result<(), i32> {
        let Run { slot, id, pages, .. } = run;
        match self.fill_once(run) {
            Ok(()) => Ok(()),
            // The claim may be torn to pieces by now; nobody can touch this memory any more.
            Err(errno) if slot.gone().is_some() => {
                self.abandon_quietly(slot, *id, pages.clone());
                Err(errno)
            }
            Err(errno) => self.fill_failed(run, errno),
        }
    }

    fn fill_once(&self, run: &Run) -> Result<(), i32> {
        let Run { slot, id, pages, wanted, since } = run;
        let (id, demand) = (*id, wanted.is_some());
        let place = self.place(slot, pages)?;
        let (buf, in_place) = match &place {
            Place::InPlace(at) => (*at, true),
            Place::Buffer(buffer) => (buffer.at(), false),
        };
        let flags = if in_place { KUF_FILL_IN_PLACE } else { 0 } | if demand { KUF_FILL_DEMAND } else { 0 };
        self.stats.fills.add(1);
        // Memory that is written in place was made to exist meanwhile.
        let started = if in_place { Instant::now() } else { *since };
        let answer = self.config.host.fill(slot, id, pages, buf, flags);
        let took = started.elapsed();
        if demand {
            self.crew.took(took);
        }
        if !matches!(answer, Answer::Deferred) {
            self.stats.filling.record(took);
        }
        let content = if in_place { Content::InPlace } else { Content::Data(buf.as_ptr()) };
        let result = match answer {
            Answer::Filled(n) => self.filled(slot, id, pages, n, content, demand),
            Answer::Zero(n) if in_place => {
                // Not where the callback itself has resolved pages of the run: the guest has them.
                for run in slot.claims().held(pages.start..pages.start + n, id) {
                    let (at, len) = ((run.start - pages.start) * slot.granule, (run.end - run.start) * slot.granule);
                    // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                    unsafe { buf.add(at as usize).write_bytes(0, len as usize) };
                }
                self.filled(slot, id, pages, n, Content::ZeroInPlace, demand)
            }
            Answer::Zero(n) => self.filled(slot, id, pages, n, Content::Zero, demand),
            Answer::Deferred => {
                self.stats.fills_deferred.add(1);
                let early = slot.claims().defer(pages.clone(), id);
                self.install_early(slot, id, early);
                self.abandon_cancelled(slot, id, pages.clone());
                Ok(())
            }
            Answer::Failed(errno) => {
                self.stats.fills_failed.add(1);
                let early = slot.claims().early(pages.clone(), id);
                self.install_early(slot, id, early);
                Err(errno)
            }
        };
        if let Place::Buffer(buffer) = place {
            self.buffers.put(buffer);
        }
        result
    }

    /// The first `n` pages are there; the rest was not to be had this time.
    fn filled(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: &Range<u64>,
        n: u64,
        content: Content,
        demand: bool,
    ) -> Result<(), i32> {
        let done = pages.start..pages.start + n;
        let (opened, result) = self.install(slot, id, done.clone(), pages.start, content);
        if !demand {
            self.stats.bytes_populated.add(opened * slot.granule);
        }
        if n < pages.end - pages.start {
            self.abandon(slot, id, done.end..pages.end);
        }
        match result {
            Err(Failed { page, errno: libc::EFAULT }) if slot.shared.is_some() => {
                // Dropped from the file between being put there and being opened: asked for again.
                self.abandon(slot, id, page..done.end);
                Ok(())
            }
            other => other.map_err(|failed| failed.errno),
        }
    }

    fn place(&self, slot: &Arc<Slot>, pages: &Range<u64>) -> Result<Place, i32> {
        match self.place_in(slot, pages)? {
            Some(at) => Ok(Place::InPlace(at)),
            None => {
                let len = (pages.end - pages.start) * slot.granule;
                self.buffers.take(len as usize).map(Place::Buffer).map_err(|e| e.errno())
            }
        }
    }

    /// Where to write `pages` in place, if that is how the slot is filled. A shortage of memory is waited out.
    pub(super) fn place_in(&self, slot: &Slot, pages: &Range<u64>) -> Result<Option<NonNull<u8>>, i32> {
        let mut tries = 0;
        loop {
            match slot.mechanism.place(slot, pages) {
                // Memory comes and goes; a page given up is lost.
                Err(errno) if tries < 200 && matches!(errno, libc::ENOMEM | libc::ENOSPC) => {
                    self.stats.install_no_memory.add(1);
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }

    /// Bytes that kuf_resolve brought while the callback was running.
    pub(super) fn install_early(&self, slot: &Arc<Slot>, id: Id, early: Vec<(Range<u64>, Early)>) {
        for (pages, bytes) in early {
            // Bytes that are in place already may have been dropped since: the page must not be made anew for them.
            let written = matches!(bytes, Early::Data(_) | Early::Zero);
            let at = match if written { self.place_in(slot, &pages) } else { Ok(None) } {
                Ok(at) => at,
                Err(errno) => {
                    self.could_not(slot, id, pages, errno);
                    continue;
                }
            };
            let content = match (&bytes, at) {
                (Early::Data(bytes), Some(at)) => {
                    // SAFETY: `place` made these bytes writable, and the claim makes them this thread's; `bytes` is as long.
                    unsafe { at.copy_from_nonoverlapping(NonNull::from(bytes.as_slice()).cast(), bytes.len()) };
                    Content::InPlace
                }
                (Early::Data(bytes), None) => Content::Data(bytes.as_ptr()),
                (Early::Zero, Some(at)) => {
                    // SAFETY: as above.
                    unsafe { at.write_bytes(0, ((pages.end - pages.start) * slot.granule) as usize) };
                    Content::ZeroInPlace
                }
                (Early::Zero, None) => Content::Zero,
                (Early::InPlace, _) => Content::InPlace,
                (Early::Poison, _) => {
                    self.poison(slot, id, pages.clone(), libc::EIO, "poisoned by kuf_resolve");
                    continue;
                }
            };
            let (_, result) = self.install(slot, id, pages.clone(), pages.start, content);
            if let Err(failed) = result {
                self.could_not(slot, id, failed.page..pages.end, failed.errno);
            }
        }
    }

    /// The source failed for a run. Where somebody waits it is asked again page by page: a neighbour may be what is
    /// bad.
    fn fill_failed(&self, run: &Run, errno: i32) -> Result<(), i32> {
        let Run { slot, id, pages, wanted, .. } = run;
        if pages.end - pages.start == 1 && wanted.is_some() {
            self.poison(slot, *id, pages.clone(), errno, "the source failed");
            return Ok(());
        }
        let mut waiters = self.abandon_quietly(slot, *id, pages.clone());
        waiters.sort_by_key(|waiter| waiter.page);
        let mut wanted: Vec<u64> = waiters.iter().map(|w| w.page).chain(*wanted).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for page in wanted {
            let mine: Vec<Waiter> = {
                let (mine, others) = waiters.into_iter().partition(|w: &Waiter| w.page == page);
                waiters = others;
                mine
            };
            let claimed = {
                let mut claims = slot.claims();
                let terms = slot.fill_terms(true);
                let claimed = claims.claim(&slot.pages, page, 1, State::Absent, terms);
                let strays: Vec<_> = mine.into_iter().filter_map(|waiter| claims.join(waiter).err()).collect();
                self.push_again(slot, strays);
                claimed
            };
            if let Some((id, pages)) = claimed {
                // One page: it is filled or poisoned.
                let _ = self.fill(&Run { slot: slot.clone(), id, pages, wanted: Some(page), since: Instant::now() });
            }
        }
        Err(errno)
    }

    /// Closes what the claim `id` owns of `pages` for good, and says so.
    pub(super) fn poison(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>, errno: i32, why: &str) -> u64 {
        self.poison_with(slot, id, pages, Content::Poison, errno, why)
    }

    pub(super) fn poison_with(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: Range<u64>,
        content: Content,
        errno: i32,
        why: &str,
    ) -> u64 {
        if slot.in_place() {
            // What a failed fill has left there is nobody's.
            slot.claims().held(pages.clone(), id).iter().for_each(|run| slot.scrub(run));
        }
        let (gpa, len) = slot.gpa_of(&pages);
        let reason = std::io::Error::from_raw_os_error(errno);
        let (poisoned, result) = self.install(slot, id, pages.clone(), pages.start, content);
        let text = format!("guest memory {gpa:#x}..{:#x} {why} ({reason})", gpa + len);
        let Err(failed) = result else {
            if poisoned > 0 {
                self.config.host.event(KUF_EVENT_POISONED, gpa, len, errno, &format!("{text}: poisoned"));
            }
            return poisoned;
        };
        let rest = failed.page..pages.end;
        let held = slot.claims().held(rest.clone(), id);
        let closed = self.close_off(slot, &held);
        {
            let mut claims = slot.claims();
            claims.poison(rest.clone(), id);
            slot.wake_sleepers(&claims);
        }
        self.stats.bytes_poisoned.add((rest.end - rest.start) * slot.granule);
        let how = if closed { "made inaccessible" } else { "left closed: whoever touches it stays blocked" };
        self.config.host.event(KUF_EVENT_CLOSED_OFF, gpa, len, errno, &format!("{text}: {how}"));
        poisoned + (rest.end - rest.start)
    }

    /// Makes touching `pages` fail where they could not be poisoned. False: there is no way.
    pub(super) fn close_off(&self, slot: &Slot, pages: &[Range<u64>]) -> bool {
        // With the gate held, so that the slot stays: its addresses are somebody else's memory once it has gone.
        let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
        slot.gone().is_none() && pages.iter().all(|pages| slot.mechanism.close_off(slot, pages))
    }
}
