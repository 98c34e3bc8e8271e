//! Installing pages: from a claim to the kernel and back.

use std::ops::Range;

use rustix::io::Errno;

use crate::abi::*;
use crate::error::words;
use crate::mechanism::{Content, Installed, Stop};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Begun, Id, Waiters};
use crate::pages::State;
use crate::service::fault::bytes::{Bytes, Counted, Piece};
use crate::service::fault::notice::Notice;
use crate::service::fault::retry::{Backoff, RetryLimits};
use crate::service::fault::{batch, complete, huge, parked};
use crate::service::queues::between::{self, About};
use crate::service::queues::{quiet, read};
use crate::service::{Service, Work};
use crate::stats::{trace, Shard};
use crate::sync::time::Instant;
use crate::sync::Arc;

/// An install that could not be finished. The claim still owns everything from `page` on.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    pub page: u64,
    pub errno: Errno,
}

/// Where and why the kernel has stopped.
type Stopped = Option<(u64, Stop)>;

/// Pages of one claim on their way to the kernel.
pub struct Install<'a> {
    service: &'a Service,
    slot: &'a Arc<Slot>,
    id: Id,
    bytes: Bytes<'a>,
    /// The counters of the installing thread.
    stats: &'a Shard,
    /// All of the pages.
    all: Range<u64>,
    /// Pages installed.
    installed: u64,
    /// When threads were last woken, if that is known.
    ended: Option<Instant>,
    /// Pages that the kernel has installed and that are still to be booked. Neighbouring pieces are booked together.
    ready: Range<u64>,
    /// The slot has become whole by this install.
    whole: bool,
    /// Some pages were discarded or given back meanwhile.
    cancelled: bool,
}

/// The outcome of an install.
pub struct Outcome {
    /// How many pages were installed.
    pub installed: u64,
    pub result: Result<(), Failed>,
    /// Some pages were discarded or given back meanwhile. Those with bytes that came since are still to be installed:
    /// see [`settle::install`](super::settle::install).
    pub cancelled: bool,
}

/// Installs what the claim `id` still owns of `pages` with `bytes`, and wakes the threads that wait for them.
pub fn install<'a>(service: &'a Service, slot: &'a Arc<Slot>, id: Id, pages: Range<u64>, bytes: Bytes<'a>) -> Outcome {
    let started = bytes.since.unwrap_or_else(Instant::now);
    let (stats, all) = (service.stats.here(), pages.clone());
    let (installed, ended, ready, whole, cancelled) = (0, None, 0..0, false, false);
    let mut install = Install { service, slot, id, bytes, stats, all, installed, ended, ready, whole, cancelled };
    let mut at = pages.start;
    if let Content::Move(from) = bytes.content {
        at = install.move_huge(&pages);
        install.bytes.content = Content::Copy(from);
    }
    let batch = match pages.end - at {
        1 => 1,
        n => batch::batch_pages(service, slot, n, &install.bytes, service.life.age_at(started)),
    };
    let mut result = Ok(());
    while at < pages.end && result.is_ok() {
        if at > pages.start {
            slot.mechanism.gate().let_pass();
        }
        let part = at..pages.end.min(at.saturating_add(batch));
        at = part.end;
        result = install.batch(part);
    }
    if install.installed > 0 || result.is_ok() {
        let ended = install.ended.unwrap_or_else(Instant::now);
        stats.installing(ended.saturating_duration_since(started));
    }
    if install.whole {
        complete::tell_whole(service, slot);
    }
    Outcome { installed: install.installed, result, cancelled: install.cancelled }
}

impl Install<'_> {
    /// Moves a huge page to its place. Returns the first page that could not be moved; its bytes are still in the source and
    /// are to be copied.
    fn move_huge(&mut self, pages: &Range<u64>) -> u64 {
        if self.slot.claims().held(pages, self.id).as_ref() != Some(pages) {
            // Part of it was resolved or given back meanwhile.
            return pages.start;
        }
        let result = self.batch(pages.clone());
        huge::tried_huge(self.service, self.slot, result.is_ok(), "it could not be moved there");
        result.map_or_else(|failed| failed.page, |()| pages.end)
    }

    /// Installs `pages`, and tries again what the kernel refuses for the moment.
    fn batch(&mut self, pages: Range<u64>) -> Result<(), Failed> {
        let (mut waiting, own) = (Backoff::default(), RetryLimits::default());
        let patience = self.bytes.patience.unwrap_or(&own);
        let mut pages = pages;
        loop {
            let (stopped, until) = if waiting.is_long() {
                self.attempt_between_events(&pages)?
            } else {
                let _gate = self.slot.mechanism.gate().read();
                self.attempt(&pages)?
            };
            match stopped {
                None if until == pages.end => {
                    patience.got_through();
                    return Ok(());
                }
                None => pages.start = until,
                // With the gate released: only now can events be read.
                Some((page, stop)) => {
                    self.wait_after(stop, patience, &mut waiting).map_err(|errno| Failed { page, errno })?;
                }
            }
        }
    }

    /// Waits before the next try. Err is an errno: there is no next try.
    fn wait_after(&self, stop: Stop, patience: &RetryLimits, waiting: &mut Backoff) -> Result<(), Errno> {
        let (service, slot, now) = (self.service, self.slot, Instant::now());
        match stop {
            // At the end only the thread that ends the slot retries, and only for a while: an install might never succeed
            // while threads give memory back without pause.
            Stop::Again if service.ends(slot) && !self.waits_at_the_end(now) => Err(Errno::CANCELED),
            Stop::Again if service.queues.is_unread(&slot.mechanism) && patience.is_out(now) => Err(Errno::AGAIN),
            Stop::Again => {
                service.stats.here().install_again(1);
                if !patience.tries_again() {
                    read::drain_mechanism(service, &slot.mechanism);
                    return Err(Errno::CANCELED);
                }
                quiet::wait_for_events(service, &slot.mechanism, waiting);
                Ok(())
            }
            Stop::NoMemory(errno) => {
                service.stats.here().install_no_memory(1);
                if !patience.for_memory(now) {
                    return Err(errno);
                }
                waiting.pause();
                Ok(())
            }
            Stop::Untrue => {
                if !patience.for_memory(now) {
                    return Err(Errno::PROTO);
                }
                waiting.pause();
                Ok(())
            }
            Stop::Dead if slot.facts().remote || slot.facts().adopted => {
                if let Some(work) = read::gone(slot) {
                    service.push(work);
                }
                Err(Errno::SRCH)
            }
            Stop::Dead => {
                service.fail("the kernel says that this process is gone");
                Err(Errno::SRCH)
            }
            Stop::BadSource => Err(Errno::FAULT),
            Stop::Unsupported => Err(Errno::OPNOTSUPP),
            Stop::Other(errno) => Err(errno),
            Stop::Exists | Stop::Marked | Stop::Unmapped => Err(Errno::PROTO),
        }
    }

    /// Whether it is part of an end that still waits for events on their way.
    fn waits_at_the_end(&self, now: Instant) -> bool {
        self.bytes.patience.is_some_and(|patience| patience.for_events(now, self.slot.facts().remote))
    }

    /// As [`Install::attempt`], between the events of threads that give memory back without pause.
    fn attempt_between_events(&mut self, pages: &Range<u64>) -> Result<(Stopped, u64), Failed> {
        let (all, service, mechanism) = (self.all.clone(), self.service, &self.slot.mechanism);
        let about = About::Fill(self.slot, &all, self.id);
        let (attempt, _gate) = between::between_events(service, mechanism, &about, || {
            let attempt = self.attempt(pages);
            let in_the_way = matches!(attempt, Ok((Some((_, Stop::Again)), _)));
            (attempt, in_the_way)
        });
        attempt
    }

    /// With the gate held: installs what the claim still owns of `pages`. Returns where and why it stopped short, and up to
    /// which page this was about.
    fn attempt(&mut self, pages: &Range<u64>) -> Result<(Stopped, u64), Failed> {
        let (slot, id) = (self.slot, self.id);
        if let Some(errno) = slot.gone() {
            // Its addresses may be another slot's by now.
            return Err(Failed { page: pages.start, errno });
        }
        // This comes first: a thread that cancels pages after it waits until the kernel call is done.
        let begun = match self.bytes.content.is_poison() {
            false => slot.claims().begin_install(pages.clone(), id),
            true => slot.claims().begin_poison(pages.clone(), id),
        };
        let Begun { runs, cancelled, until } = begun;
        if cancelled {
            self.cancelled = true;
            self.whole |= settle_cancelled(self.service, slot, id, pages.clone());
        }
        let mut stopped = None;
        for run in &runs {
            self.bytes.drop_zeroes(slot, run);
            self.ready = run.start..run.start;
            stopped = self.run(run);
            self.book(run.end);
            if stopped.is_some() {
                break;
            }
        }
        if stopped.is_some() {
            let mut claims = slot.claims();
            claims.suspend(pages.clone(), id);
            // Its owner writes no more to any of it.
            claims.hold_off(self.all.clone(), id);
        }
        Ok((stopped, until))
    }

    fn run(&mut self, run: &Range<u64>) -> Stopped {
        let mut page = run.start;
        while page < run.end {
            let (piece, content, counted) = match self.bytes.piece(self.slot, &(page..run.end)) {
                (piece, Piece::With(content, counted)) => (piece, content, counted),
                (piece, Piece::Leave) => {
                    if let Err(errno) = self.leave(&piece) {
                        return Some((page, Stop::Other(errno)));
                    }
                    page = piece.end;
                    continue;
                }
            };
            let installed = self.slot.binding.install(&piece, content);
            let (place, result) = (self.slot.gpa_of(&piece), installed.traced(self.slot.granule));
            trace::install(self.service, place, content.traced(), result);
            let Installed { pages, stop } = installed;
            if pages > 0 {
                self.count(page..page + pages, counted);
                page += pages;
                self.ready.end = page;
            }
            match stop {
                None if pages > 0 => {}
                // The kernel installed nothing and gave no reason.
                None => return Some((page, Stop::Other(Errno::PROTO))),
                Some(stop) => {
                    if let Some(stop) = self.pass(page, stop, content) {
                        return Some((page, stop));
                    }
                    page += 1;
                }
            }
        }
        None
    }

    /// Settles `page`, at which the kernel has stopped, so that the run goes on with the next page. Some: the run stops
    /// here.
    fn pass(&mut self, page: u64, stop: Stop, content: Content) -> Option<Stop> {
        let pages = page..page + 1;
        match stop {
            Stop::Exists if self.is_foreign(page, content) => {
                self.stats.install_exists(1);
                if !content.is_poison() {
                    return Some(Stop::Other(Errno::EXIST));
                }
                // A poison mark cannot replace a page that exists.
                self.slot.binding.make_inaccessible(&pages);
                self.installed += 1;
                self.ready.end = pages.end;
            }
            Stop::Exists => {
                // An install that found the page there has woken no thread.
                self.stats.install_exists(1);
                self.wake_and_settle(pages, State::Present);
            }
            Stop::Marked => {
                self.book(page);
                self.marked(page);
                self.book(pages.end);
            }
            // The waiting threads touch the present mapping again.
            Stop::Unmapped => self.wake_and_settle(pages, State::Removed),
            stop => return Some(stop),
        }
        None
    }

    fn wake_and_settle(&mut self, pages: Range<u64>, state: State) {
        self.slot.binding.wake(&pages);
        let next = pages.end;
        self.settled(pages, state);
        self.book(next);
    }

    /// Counts `pages`, before they are booked as present: a thread that sees them present finds them counted.
    fn count(&mut self, pages: Range<u64>, counted: Counted) {
        let n = pages.end - pages.start;
        let zero = if self.slot.facts().gates_kvm_only { self.bytes.zero_pages(&pages) } else { 0 };
        self.installed += n;
        Counted::Zeroed.add(self.stats, zero * self.slot.granule);
        counted.add(self.stats, (n - zero) * self.slot.granule);
    }

    /// Whether an existing page is foreign: the guest had no page there, and another thread or process has put one there
    /// since. Its bytes are not the source's.
    fn is_foreign(&self, page: u64, content: Content) -> bool {
        let slot = self.slot;
        let by_copy = matches!(content, Content::Copy(_) | Content::Move(_) | Content::Zero) || content.is_poison();
        !slot.populated && !slot.in_place() && by_copy && slot.claims().is_new(page)
    }

    /// A page was poisoned, because only a poison mark could show that no page exists there.
    fn marked(&mut self, page: u64) {
        let pages = page..page + 1;
        Counted::Poisoned.add(self.stats, self.slot.granule);
        self.poisoned(pages.clone());
        let (gpa, len) = self.slot.gpa_of(&pages);
        let text =
            words!("guest memory {gpa:#x}..{:#x} does not exist although the kernel says so: poisoned", gpa + len);
        let (slot, kind, error) = (Some(self.slot.clone()), KUF_EVENT_POISONED, Some(Errno::EXIST));
        self.service.push(Work::Notice(Notice { slot, kind, gpa, len, error, text }));
    }

    /// Books the pages that are ready; the next ones start at `next`.
    fn book(&mut self, next: u64) {
        let ready = std::mem::replace(&mut self.ready, next..next);
        if ready.is_empty() {
        } else if self.bytes.content.is_poison() {
            self.poisoned(ready);
        } else {
            self.settled(ready, State::Present);
        }
    }

    /// Zeroes of shared memory that no thread is known to wait for: a hole in the file. Err is an errno.
    fn leave(&mut self, pages: &Range<u64>) -> Result<(), Errno> {
        let slot = self.slot;
        if let Some(shared) = &slot.shared {
            shared.punch(&slot.bytes_of(pages))?;
        }
        let n = pages.end - pages.start;
        Counted::Zeroed.add(self.stats, n * slot.granule);
        let settled = slot.settle(|claims| claims.settle(&slot.pages, pages.clone(), self.id, Some(State::Removed)));
        self.whole |= settled.whole;
        // Threads that came meanwhile get a page of zeroes after all.
        self.service.push_again(slot, settled.waiters);
        self.installed += n;
        self.book(pages.end);
        Ok(())
    }

    fn poisoned(&mut self, pages: Range<u64>) {
        let slot = self.slot;
        let waiters = slot.settle(|claims| claims.poison(pages, self.id));
        for waiter in waiters.iter().filter(|waiter| waiter.flags & KUF_KVM_FAULT != 0) {
            parked::parked(self.service, slot, waiter.page..waiter.page + 1);
        }
        self.ended = ended(self.service, slot, waiters, self.stats);
    }

    fn settled(&mut self, pages: Range<u64>, state: State) {
        let slot = self.slot;
        let settled = slot.settle(|claims| claims.settle(&slot.pages, pages, self.id, Some(state)));
        self.whole |= settled.whole;
        self.ended = ended(self.service, slot, settled.waiters, self.stats);
    }
}

/// Ends the waits of the threads that go on. A child's view of the page still has to be mapped.
pub fn ended(service: &Service, slot: &Arc<Slot>, waiters: Waiters<Waiter>, stats: &Shard) -> Option<Instant> {
    if waiters.is_empty() {
        return None;
    }
    let now = Instant::now();
    for waiter in waiters {
        match waiter.fork {
            None => service.stats.ended(stats, waiter.wait, now),
            Some(_) => service.push_again(slot, Some(waiter)),
        }
    }
    Some(now)
}

/// Drops the bytes of the claim `id` for pages that were given back or discarded meanwhile. Returns whether the slot has
/// become whole by that.
#[must_use]
pub fn settle_cancelled(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) -> bool {
    let first = || slot.claims().cancelled(&pages, id);
    let mut whole = false;
    while let Some((pages, scrub)) = first() {
        if scrub {
            slot.scrub(&pages);
        }
        let settled = slot.settle(|claims| claims.settle_cancelled(&slot.pages, pages, id));
        whole |= settled.whole;
        service.push_again(slot, settled.waiters);
    }
    whole
}
