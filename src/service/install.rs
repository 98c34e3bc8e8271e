//! Opening pages: from a claim to the kernel and back.

use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::zero::{Bytes, Way};
use super::{Service, Work};
use crate::capi::types::*;
use crate::claims::{Id, Waiters};
use crate::mechanism::kvm_bitmap::Bitmap;
use crate::mechanism::{Content, Installed, Stop};
use crate::memory::{Slot, Waiter};
use crate::pages::State;
use crate::stats::Shard;

/// How long an install is tried again for want of memory: guests are stopped meanwhile, but a page given up is lost.
const MEMORY_PATIENCE: Duration = Duration::from_secs(2);

/// An install that could not be finished. The claim still owns everything from `page` on.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    pub page: u64,
    pub errno: i32,
}

/// How far an install has come.
struct Done<'a> {
    /// Where the thread that installs counts.
    stats: &'a Shard,
    /// Pages opened.
    opened: u64,
    /// When the last ones were, if that is known.
    ended: Option<Instant>,
    /// Those that are open in the kernel and still to be booked: neighbours at once, however many pieces they were.
    ready: Range<u64>,
}

impl Service {
    /// Opens what the claim `id` still owns of `pages` with `content` and wakes who waits. `base` is the page whose
    /// bytes `content` starts with. Returns the pages opened here.
    pub(super) fn install(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: Range<u64>,
        base: u64,
        content: Content,
    ) -> (u64, Result<(), Failed>) {
        self.install_bytes(slot, id, pages, Bytes::plain(content, base))
    }

    /// As [`Service::install`], of bytes of which more is known.
    pub(super) fn install_bytes(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: Range<u64>,
        bytes: Bytes<'_>,
    ) -> (u64, Result<(), Failed>) {
        let started = bytes.since.unwrap_or_else(Instant::now);
        let (mut done, mut at, mut bytes) =
            (Done { stats: self.stats.here(), opened: 0, ended: None, ready: 0..0 }, pages.start, bytes);
        if let Content::Staged(from) = bytes.content {
            at = self.install_staged(slot, id, pages.clone(), bytes, &mut done);
            bytes.content = Content::Data(from);
        }
        let since_open = started.saturating_duration_since(self.opened);
        let stretch = self.stretch(slot, pages.end - at, &bytes, since_open);
        let mut result = Ok(());
        while at < pages.end && result.is_ok() {
            if at > pages.start {
                slot.mechanism.gate().let_pass();
            }
            let part = at..pages.end.min(at.saturating_add(stretch));
            at = part.end;
            result = self.install_stretch(slot, id, part, bytes, &mut done);
        }
        if done.opened > 0 || result.is_ok() {
            let ended = done.ended.unwrap_or_else(Instant::now);
            done.stats.installing(ended.saturating_duration_since(started));
        }
        if let Some(work) = self.completion(slot) {
            self.work_on(work);
        }
        (done.opened, result)
    }

    /// Moves a huge page to its place. Returns the first page that could not be moved, which is still where it was, to be
    /// copied.
    fn install_staged(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: Range<u64>,
        bytes: Bytes<'_>,
        done: &mut Done<'_>,
    ) -> u64 {
        if slot.claims().held(pages.clone(), id)[..] != [pages.clone()] {
            // Part of it was resolved or given back meanwhile.
            return pages.start;
        }
        let result = self.install_stretch(slot, id, pages.clone(), bytes, done);
        self.tried_huge(slot, result.is_ok(), "it could not be moved there");
        result.map_or_else(|failed| failed.page, |()| pages.end)
    }

    fn install_stretch(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        pages: Range<u64>,
        bytes: Bytes<'_>,
        done: &mut Done<'_>,
    ) -> Result<(), Failed> {
        let mut waiting = Waiting::default();
        loop {
            let again = {
                let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
                if let Some(errno) = slot.gone() {
                    // Its addresses may be another slot's by now.
                    return Err(Failed { page: pages.start, errno });
                }
                // First: what is cancelled after this is in the kernel's hands, and whoever cancels waits for that.
                let (runs, cancelled) = slot.claims().begin_install(pages.clone(), id);
                if cancelled {
                    self.settle_cancelled(slot, id, pages.clone());
                }
                let again = self.install_runs(slot, id, &runs, bytes, done);
                if again.is_some() {
                    slot.claims().suspend(pages.clone(), id);
                }
                again
            };
            let (page, stop) = match again {
                None => return Ok(()),
                Some(again) => again,
            };
            // With the gate released: only now can events be read.
            match stop {
                Stop::Again => {
                    self.stats.here().install_again(1);
                    self.pump_events(&slot.mechanism);
                    waiting.pause();
                }
                Stop::NoMemory(errno) => {
                    self.stats.here().install_no_memory(1);
                    if waiting.longer_than(MEMORY_PATIENCE) {
                        return Err(Failed { page, errno });
                    }
                    waiting.pause();
                }
                Stop::Dead => {
                    if let Some(work) = self.gone(slot, libc::ESRCH) {
                        self.push(work);
                    }
                    return Err(Failed { page, errno: libc::ESRCH });
                }
                Stop::BadSource => return Err(Failed { page, errno: libc::EFAULT }),
                Stop::Unsupported => return Err(Failed { page, errno: libc::EOPNOTSUPP }),
                Stop::Other(errno) => return Err(Failed { page, errno }),
                Stop::Exists | Stop::Unmapped => return Err(Failed { page, errno: libc::EPROTO }),
            }
        }
    }

    /// Under the gate. Returns where and why it stopped short.
    fn install_runs(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        runs: &[Range<u64>],
        bytes: Bytes<'_>,
        done: &mut Done<'_>,
    ) -> Option<(u64, Stop)> {
        for run in runs {
            bytes.drop_zeroes(slot, run);
            done.ready = run.start..run.start;
            let stopped = self.install_run(slot, id, run, bytes, done);
            self.book(slot, id, bytes, done, run.end);
            if stopped.is_some() {
                return stopped;
            }
        }
        None
    }

    fn install_run(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        run: &Range<u64>,
        bytes: Bytes<'_>,
        done: &mut Done<'_>,
    ) -> Option<(u64, Stop)> {
        let mut page = run.start;
        while page < run.end {
            let (piece, content) = match bytes.piece(slot, &(page..run.end)) {
                (piece, Way::With(content)) => (piece, content),
                (piece, Way::Leave) => {
                    if let Err(errno) = self.leave(slot, id, &piece, done.stats) {
                        return Some((page, Stop::Other(errno)));
                    }
                    done.opened += piece.end - page;
                    page = piece.end;
                    self.book(slot, id, bytes, done, page);
                    continue;
                }
            };
            let Installed { pages, stop } = slot.mechanism.install(slot, &piece, content);
            if pages > 0 {
                done.opened += pages;
                let open = page..page + pages;
                // Before it is booked as present: who sees that finds it counted.
                let zero = if slot.mechanism.marks() { bytes.zero_pages(&open) } else { 0 };
                count_opened(done.stats, slot, Content::ZeroInPlace, zero);
                count_opened(done.stats, slot, content, pages - zero);
                page += pages;
                done.ready.end = page;
            }
            match stop {
                None if pages > 0 => {}
                // Nothing done and no reason given.
                None => return Some((page, Stop::Other(libc::EPROTO))),
                Some(Stop::Exists) => {
                    // Nobody is woken by an install that found the page there.
                    self.stats.here().install_exists(1);
                    slot.mechanism.wake(slot, &(page..page + 1));
                    self.settled(slot, id, page..page + 1, State::Present, done.stats);
                    page += 1;
                    self.book(slot, id, bytes, done, page);
                }
                Some(Stop::Unmapped) => {
                    self.settled(slot, id, page..page + 1, State::Removed, done.stats);
                    page += 1;
                    self.book(slot, id, bytes, done, page);
                }
                Some(stop) => return Some((page, stop)),
            }
        }
        None
    }

    /// Books what is ready; what comes next starts at `next`.
    fn book(&self, slot: &Arc<Slot>, id: Id, bytes: Bytes<'_>, done: &mut Done<'_>, next: u64) {
        let ready = std::mem::replace(&mut done.ready, next..next);
        if !ready.is_empty() {
            done.ended = self.opened(slot, id, ready, bytes.content, done.stats);
        }
    }

    /// Zeroes of shared memory that nobody is known to wait for: a hole in the file. Err is an errno.
    fn leave(&self, slot: &Arc<Slot>, id: Id, pages: &Range<u64>, stats: &Shard) -> Result<(), i32> {
        if let Some(shared) = &slot.shared {
            shared.punch(&slot.bytes_of(pages)).map_err(|e| e.raw_os_error())?;
        }
        count_opened(stats, slot, Content::Zero, pages.end - pages.start);
        let waiters = {
            let mut claims = slot.claims();
            let waiters = claims.settle(&slot.pages, pages.clone(), id, Some(State::Removed));
            slot.wake_sleepers(&claims);
            waiters
        };
        // Who came meanwhile gets a page of zeroes after all.
        self.push_again(slot, waiters);
        Ok(())
    }

    /// Returns when that was, if it looked at the clock.
    fn opened(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>, content: Content, stats: &Shard) -> Option<Instant> {
        if !content.is_poison() {
            return self.settled(slot, id, pages, State::Present, stats);
        }
        let waiters = {
            let mut claims = slot.claims();
            let waiters = claims.poison(pages, id);
            slot.wake_sleepers(&claims);
            waiters
        };
        for waiter in waiters.iter().filter(|waiter| waiter.flags & KUF_FAULT_KVM != 0) {
            self.parked(slot, waiter.page..waiter.page + 1);
        }
        self.ended(slot, waiters, stats)
    }

    /// The claim `id` is done with `pages`. Returns as [`Service::opened`].
    fn settled(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>, state: State, stats: &Shard) -> Option<Instant> {
        let waiters = {
            let mut claims = slot.claims();
            let waiters = claims.settle(&slot.pages, pages, id, Some(state));
            slot.wake_sleepers(&claims);
            waiters
        };
        self.ended(slot, waiters, stats)
    }

    /// Who waited goes on; a child's view of the page still has to be mapped.
    fn ended(&self, slot: &Arc<Slot>, waiters: Waiters<Waiter>, stats: &Shard) -> Option<Instant> {
        if waiters.is_empty() {
            return None;
        }
        let now = Instant::now();
        for waiter in waiters.iter().filter(|waiter| waiter.fork.is_none()) {
            self.stats.ended(stats, waiter.thread, waiter.read_at, now);
        }
        self.push_again(slot, waiters.into_iter().filter(|waiter| waiter.fork.is_some()));
        Some(now)
    }

    /// What the claim `id` brings for pages that were given back or discarded meanwhile is not used.
    pub(super) fn settle_cancelled(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
        let cancelled = slot.claims().cancelled(pages, id);
        for (pages, scrub) in cancelled {
            if scrub {
                slot.scrub(&pages);
            }
            let waiters = {
                let mut claims = slot.claims();
                let waiters = claims.settle_cancelled(&slot.pages, pages, id);
                slot.wake_sleepers(&claims);
                waiters
            };
            self.push_again(slot, waiters);
        }
    }

    /// As [`Service::settle_cancelled`], where no install follows.
    pub(super) fn abandon_cancelled(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
        let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
        self.settle_cancelled(slot, id, pages);
    }

    /// Gives up what the claim `id` owns of `pages`: it is what it was. Who waited is served anew.
    pub(super) fn abandon(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
        let waiters = self.abandon_quietly(slot, id, pages);
        self.push_again(slot, waiters);
    }

    /// As [`Service::abandon`], but returns who waited.
    pub(super) fn abandon_quietly(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>) -> Waiters<Waiter> {
        // With the gate held, so that no removal comes between: what the guest gave back is not what it was.
        let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
        self.settle_cancelled(slot, id, pages.clone());
        let mut claims = slot.claims();
        let waiters = claims.give_back(&slot.pages, pages, id);
        slot.wake_sleepers(&claims);
        waiters
    }

    /// What to tell the host if `slot` has just become whole.
    pub(super) fn completion(&self, slot: &Arc<Slot>) -> Option<Work> {
        use std::sync::atomic::Ordering::AcqRel;
        if slot.parent.is_some() || !slot.whole() || slot.complete.swap(true, AcqRel) {
            return None;
        }
        if slot.kvm.bitmap.as_ref().is_some_and(Bitmap::sets_memslot) {
            self.populate.save_costs_of(slot);
        }
        let (kind, gpa, len, error) = (KUF_EVENT_COMPLETE, slot.gpa, slot.len, 0);
        let text = format!("memory slot {gpa:#x}..{:#x} is complete", gpa + len);
        Some(Work::Notice { kind, gpa, len, error, text })
    }
}

fn count_opened(stats: &Shard, slot: &Slot, content: Content, pages: u64) {
    let bytes = pages * slot.granule;
    match content {
        Content::Data(_) | Content::Staged(_) => stats.bytes_copied(bytes),
        Content::Zero | Content::ZeroInPlace => stats.bytes_zeroed(bytes),
        // Counted when its bytes came, or nobody here has brought them.
        Content::Shown | Content::There => {}
        Content::InPlace => stats.bytes_in_place(bytes),
        Content::Poison | Content::PoisonAtEnd => stats.bytes_poisoned(bytes),
    }
}

/// Pauses that grow from a yield to a millisecond.
#[derive(Default)]
struct Waiting {
    since: Option<Instant>,
    pauses: u32,
}

impl Waiting {
    fn longer_than(&mut self, patience: Duration) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() > patience
    }

    fn pause(&mut self) {
        self.pauses += 1;
        if self.pauses <= 16 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(
                Duration::from_micros(50).saturating_mul(self.pauses - 16).min(Duration::from_millis(1)),
            );
        }
    }
}
