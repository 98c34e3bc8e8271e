//! Getting the bytes of a claimed run: the place to write them, the host's callback or a source, and what follows from the
//! answer.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::asking::Asking;
use super::host::Answer;
use super::huge::is_stretch;
use super::install::Failed;
use super::resolve::check_not_unresolved;
use super::zero::Bytes;
use super::Service;
use crate::ahead::NEAR;
use crate::capi::types::*;
use crate::claims::{Early, Id, Waiters};
use crate::mechanism::Content;
use crate::memory::buffer::Buffer;
use crate::memory::outside::{bring_in, read_host};
use crate::memory::staging::Staging;
use crate::memory::{Slot, Waiter};
use crate::pages::State;
use crate::source::{Found, Source, Wanted};

/// What a fill of ordinary length brings, in bytes: so much of a longer one is compared with it.
const FEW: u64 = 16 << 10;

/// A run that the calling thread has claimed and is to fill.
pub struct Run {
    pub slot: Arc<Slot>,
    pub id: Id,
    pub pages: Range<u64>,
    /// The page somebody waits for; None when nobody does.
    pub wanted: Option<u64>,
    /// The thread that touched it first, or 0.
    pub thread: u32,
    /// Nobody has asked for it: it is brought ahead of a toucher.
    pub ahead: bool,
    /// When this began.
    pub since: Instant,
}

impl Run {
    /// For `thread` (0: unknown), which waits for `page`, from now on.
    pub fn demand(slot: &Arc<Slot>, id: Id, pages: Range<u64>, page: u64, thread: u32) -> Self {
        Self { slot: slot.clone(), id, pages, wanted: Some(page), thread, ahead: false, since: Instant::now() }
    }
}

/// Where the bytes are written.
// "In place" is the term everywhere.
#[allow(clippy::enum_variant_names)]
enum Place {
    InPlace {
        at: NonNull<u8>,
        /// It was there then.
        since: Instant,
    },
    Buffer(Buffer),
    /// A huge page for all of the run.
    Staged(Staging),
}

impl Place {
    fn at(&self) -> NonNull<u8> {
        match self {
            Self::InPlace { at, .. } => *at,
            Self::Buffer(buffer) => buffer.at(),
            Self::Staged(staging) => staging.at(),
        }
    }
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
        let Run { slot, id, pages, wanted, ahead, since, .. } = run;
        let (id, demand) = (*id, wanted.is_some());
        let stats = self.stats.here();
        let mut place = None;
        // Resolved, or shut, before anybody was asked: nothing is left to do.
        let Some(asking) = Asking::begin(run) else { return Ok(()) };
        let asked = match &slot.source {
            Some(source) => {
                stats.fills(1);
                self.ask_source(run, source.as_ref(), &mut place)
            }
            None => {
                let place = place.insert(self.place(slot, pages)?);
                stats.fills(1);
                self.ask_host(run, place)
            }
        };
        let answer = self.fetch(run, asked, &mut place);
        drop(asking);
        // Memory that is written in place was made to exist meanwhile.
        let now = Instant::now();
        let took = match &place {
            Some(Place::InPlace { since, .. }) => now.saturating_duration_since(*since),
            _ => now.saturating_duration_since(*since),
        };
        // Zeroes that are looked for take their time, which is opening's.
        let since = Some(now);
        if demand || *ahead {
            // As if it were no longer than a few pages: what takes long because there is much of it is no slow source.
            let bytes = (pages.end - pages.start) * slot.granule;
            self.crew.took(took / (bytes / FEW).clamp(1, NEAR / FEW) as u32);
        }
        if !matches!(answer, Answer::Deferred) {
            stats.filling(took);
        }
        let mut moved = false;
        let result = match (answer, &place) {
            (Answer::Filled(n), Some(place)) => {
                let zeroes = &self.zeroes(slot, id, &(pages.start..pages.start + n), place.at());
                let content = match place {
                    Place::InPlace { .. } => Content::InPlace,
                    // A huge page has room for no other page: neither one of zeroes nor one that comes later.
                    Place::Staged(staging) if zeroes.is_empty() && n == pages.end - pages.start => {
                        moved = true;
                        Content::Staged(staging.at().as_ptr())
                    }
                    Place::Buffer(_) | Place::Staged(_) => Content::Data(place.at().as_ptr()),
                };
                self.filled(run, n, Bytes { zeroes, wanted: *wanted, since, ..Bytes::plain(content, pages.start) })
            }
            // What was filled has a place.
            (Answer::Filled(_), None) => Err(libc::EPROTO),
            (Answer::Elsewhere(n, src), _) => {
                self.filled(run, n, Bytes { since, ..Bytes::plain(Content::Data(src), pages.start) })
            }
            (Answer::Zero(n), place) => self.filled_with_zero(run, n, place.as_ref()),
            (Answer::Deferred, _) => {
                stats.fills_deferred(1);
                let early = slot.claims().defer(pages.clone(), id);
                self.install_early(slot, id, early);
                self.abandon_cancelled(slot, id, pages.clone());
                Ok(())
            }
            (Answer::Failed(errno), _) => {
                stats.fills_failed(1);
                let early = slot.claims().early(pages.clone(), id);
                self.install_early(slot, id, early);
                Err(errno)
            }
        };
        match place {
            Some(Place::Buffer(buffer)) => self.buffers.put(buffer),
            Some(Place::Staged(staging)) => self.staging.put(staging, moved),
            Some(Place::InPlace { .. }) | None => {}
        }
        result
    }

    fn ask_host(&self, run: &Run, place: &Place) -> Answer {
        let in_place = if matches!(place, Place::InPlace { .. }) { KUF_FILL_IN_PLACE } else { 0 };
        let demand = if run.wanted.is_some() { KUF_FILL_DEMAND } else { 0 };
        self.config.host.fill(run, place.at(), in_place | demand)
    }

    /// Asks a built-in source, and has it read into a place if that is what it takes.
    fn ask_source(&self, run: &Run, source: &dyn Source, place: &mut Option<Place>) -> Answer {
        let Run { slot, pages, wanted, .. } = run;
        let granule = slot.granule;
        let bytes = slot.bytes_of(pages);
        let copied = !slot.in_place() && !self.detects(slot) && !is_stretch(slot, pages);
        match source.find(&Wanted { bytes: bytes.clone(), granule, copied, demand: wanted.is_some() }) {
            Found::Zero(len) => Answer::Zero(len / granule),
            Found::Memory(len, at) => Answer::Elsewhere(len / granule, at),
            Found::Unread(len) => {
                let n = len / granule;
                let placed = self.place(slot, &(pages.start..pages.start + n)).and_then(|new| {
                    let to = place.insert(new).at();
                    // SAFETY: `place` made room for these bytes, and the claim makes them this thread's.
                    unsafe { source.read(&(bytes.start..bytes.start + len), to) }
                });
                placed.map_or_else(Answer::Failed, |()| Answer::Filled(n))
            }
        }
    }

    /// Bytes in memory of the host's are brought in, and copied where they are needed: everywhere but where the kernel
    /// copies them to the guest itself.
    fn fetch(&self, run: &Run, answer: Answer, place: &mut Option<Place>) -> Answer {
        let Run { slot, id, pages, .. } = run;
        let Answer::Elsewhere(n, src) = answer else { return answer };
        let part = pages.start..pages.start + n;
        let len = n * slot.granule;
        if let Err(error) = check_not_unresolved(&self.memory.map(), src, len) {
            return Answer::Failed(error.errno());
        }
        if place.is_none() {
            *place = self.stage(slot, &part).map(Place::Staged);
        }
        if !slot.in_place() && !self.detects(slot) && !matches!(place, Some(Place::Staged(_))) {
            let brought = self.patiently(|| bring_in(src, len as usize));
            return brought.map_or_else(Answer::Failed, |()| Answer::Elsewhere(n, src));
        }
        let to = match place {
            Some(place) => place.at(),
            None => match self.place(slot, &part) {
                Ok(new) => place.insert(new).at(),
                Err(errno) => return Answer::Failed(errno),
            },
        };
        // Not where the callback itself has resolved pages of the run: the guest has them. With the claims free again:
        // reading may take as long as a disk does.
        let held = slot.claims().held(part, *id);
        for run in held {
            let (at, len) = ((run.start - pages.start) * slot.granule, (run.end - run.start) * slot.granule);
            // SAFETY: within the place, which has room for the run.
            let to = unsafe { to.add(at as usize) };
            if let Err(errno) = self.patiently(|| read_host(src.wrapping_add(at as usize), to, len as usize)) {
                return Answer::Failed(errno);
            }
        }
        Answer::Filled(n)
    }

    /// The first `n` pages are zero. `place`: where the callback could have written.
    fn filled_with_zero(&self, run: &Run, n: u64, place: Option<&Place>) -> Result<(), i32> {
        let Run { slot, id, pages, wanted, .. } = run;
        let done = pages.start..pages.start + n;
        if !slot.in_place() {
            let zeroes: &[_] = if self.leaves_zeroes(slot) { &[done] } else { &[] };
            let bytes = Bytes { zeroes, wanted: *wanted, ..Bytes::plain(Content::Zero, pages.start) };
            return self.filled(run, n, bytes);
        }
        let zeroes = if self.detects(slot) { std::slice::from_ref(&done) } else { &[] };
        // What is left out, or dropped, needs no writing; who waits gets a page.
        let write = match zeroes {
            [] => done.clone(),
            _ if slot.mechanism.marks() => 0..0,
            _ => wanted.filter(|page| done.contains(page)).map_or(0..0, |page| page..page + 1),
        };
        if !write.is_empty() {
            let at = match place {
                // SAFETY: within the place.
                Some(place) => unsafe { place.at().add(((write.start - pages.start) * slot.granule) as usize) },
                None => self.place_in(slot, &write)?.ok_or(libc::EPROTO)?,
            };
            // Not where the callback itself has resolved pages of the run: the guest has them.
            let held = slot.claims().held(write.clone(), *id);
            for run in held {
                let (from, len) = ((run.start - write.start) * slot.granule, (run.end - run.start) * slot.granule);
                // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                unsafe { at.add(from as usize).write_bytes(0, len as usize) };
            }
        }
        let bytes = Bytes { zeroes, wanted: *wanted, ..Bytes::plain(Content::ZeroInPlace, pages.start) };
        self.filled(run, n, bytes)
    }

    /// The first `n` pages are there; the rest was not to be had this time.
    fn filled(&self, run: &Run, n: u64, bytes: Bytes<'_>) -> Result<(), i32> {
        let Run { slot, id, pages, wanted, ahead, .. } = run;
        let id = *id;
        let done = pages.start..pages.start + n;
        let bytes = Bytes { behind: wanted.is_none() && !ahead, ..bytes };
        let (opened, result) = self.install_bytes(slot, id, done.clone(), bytes);
        match (wanted, ahead) {
            (None, true) => self.stats.here().bytes_ahead(opened * slot.granule),
            (None, false) => self.stats.here().bytes_populated(opened * slot.granule),
            _ => {}
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
            Some(at) => Ok(Place::InPlace { at, since: Instant::now() }),
            None => {
                if let Some(staging) = self.stage(slot, pages) {
                    return Ok(Place::Staged(staging));
                }
                let len = (pages.end - pages.start) * slot.granule;
                self.buffers.take(len as usize).map(Place::Buffer).map_err(|e| e.errno())
            }
        }
    }

    /// Where to write `pages` in place, if that is how the slot is filled. A shortage of memory is waited out.
    pub(super) fn place_in(&self, slot: &Slot, pages: &Range<u64>) -> Result<Option<NonNull<u8>>, i32> {
        self.patiently(|| slot.mechanism.place(slot, pages))
    }

    /// Does what may fail for want of memory, for a while: memory comes and goes, and a page given up is lost.
    pub(super) fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, i32>) -> Result<T, i32> {
        let mut tries = 0;
        loop {
            match attempt() {
                Err(errno) if tries < 200 && matches!(errno, libc::ENOMEM | libc::ENOSPC) => {
                    self.stats.here().install_no_memory(1);
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
            let mine: Waiters<Waiter> = {
                let (mine, others) = waiters.into_iter().partition(|w: &Waiter| w.page == page);
                waiters = others;
                mine
            };
            let thread = mine.first().map_or(0, |waiter| waiter.thread);
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
                let _ = self.fill(&Run::demand(slot, id, pages, page, thread));
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
        self.closed_off(slot, id, &rest);
        let how = if closed { "made inaccessible" } else { "left closed: whoever touches it stays blocked" };
        self.config.host.event(KUF_EVENT_CLOSED_OFF, gpa, len, errno, &format!("{text}: {how}"));
        poisoned + (rest.end - rest.start)
    }

    /// Books that the claim `id` has closed `pages` for good without poison.
    pub(super) fn closed_off(&self, slot: &Slot, id: Id, pages: &Range<u64>) {
        let mut claims = slot.claims();
        for waiter in claims.poison(pages.clone(), id) {
            self.stats.overlap.end(waiter.thread, waiter.read_at, Instant::now());
        }
        slot.wake_sleepers(&claims);
        self.stats.here().bytes_poisoned((pages.end - pages.start) * slot.granule);
    }

    /// Makes touching `pages` fail where they could not be poisoned. False: there is no way.
    pub(super) fn close_off(&self, slot: &Slot, pages: &[Range<u64>]) -> bool {
        // With the gate held, so that the slot stays: its addresses are somebody else's memory once it has gone.
        let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
        slot.gone().is_none() && pages.iter().all(|pages| slot.mechanism.close_off(slot, pages))
    }
}
