//! The owner of each page that is being filled.
//!
//! A page in [`State::Filling`] belongs to exactly one claim here, and only the claim's owner may put bytes in its
//! place. The table lives under the slot's mutex; states are changed together with it, and read without it. A claim has
//! an identity, so that an owner that comes back late (from a slow callback) learns which pages are still its own: the
//! caller may have resolved others, or the guest may have given them back and touched them again.
//!
//! The way of a claim: `claim` → (fill) → `begin_install` → kernel → `settle`. On the way it may be deferred to the
//! caller, taken over by `kuf_resolve`, cancelled by a discard, or cut by a removal. A claim is in [`Owner::Install`]
//! only while its owner holds the mechanism's gate. The thread that reads kernel events takes the gate exclusively,
//! which orders removals against installs.
//!
//! Memory: only [`Claims::reserve`], called before a run is claimed, may run out of it. The steps that follow, to the
//! end of the claim, need none: entries and waiters are allocated by then, and lists of any length are returned piece
//! by piece.

mod discard;
mod end;
mod install;
mod questions;
mod resolve;
mod types;

use std::ops::Range;

use crate::alloc::table::Table;
use crate::alloc::{patiently, refusable, List, NoMemory, Node};
use crate::pages::{Pages, State};
use crate::sync::time::Instant;
pub use types::*;

/// Claims that can be made or split without memory, kept for faults and for steps that cannot fail.
const SPARE: usize = 16;

/// Entries that one claim may need: itself, and a part cut off at either end.
const FEW: usize = 3;

/// A claim without its first page, which is the table's key.
pub struct Claim<W> {
    end: u64,
    id: Id,
    owner: Owner,
    /// The state that the pages return to when the claim is abandoned.
    origin: State,
    /// The owner may be writing to the page itself, so no other thread may, and a removal has to wait for the owner.
    in_place: bool,
    demand: bool,
    /// The claim was made for readahead.
    speculative: bool,
    /// The caller owed the pages before `kuf_resolve` or `kuf_discard` took them: it owes them again when that fails.
    owed: bool,
    /// The pages were poisoned before `kuf_discard` took them: they are poisoned again when that fails.
    poisoned: bool,
    /// The claim of the callback that called `kuf_resolve` for these pages: they are the callback's again when that
    /// call fails.
    lender: Option<Id>,
    /// A `kuf_resolve` is resolving these pages now. Another call for them waits, and still has its bytes if this one
    /// fails.
    resolving: bool,
    /// The caller has passed early bytes: it will not pass them again, even if they could not be used.
    answered: bool,
    /// The owner that has all its bytes and writes no more, but whose install the kernel refused for now; 0: none.
    held_off: Id,
    cancel: Option<Cancel>,
    early: Option<Early>,
    since: Instant,
    waiters: Waiters<W>,
}

impl<W> Claim<W> {
    /// Whether only the kernel delays the install. A cancelled claim is not delayed: its owner still has to drop its
    /// bytes.
    fn is_held_off(&self) -> bool {
        self.held_off == self.id && self.cancel.is_none()
    }

    /// Whether the page still waits for bytes, or for a discard to end.
    fn is_coming(&self) -> bool {
        self.owner == Owner::Discard || self.owner != Owner::Poison && self.origin == State::Absent
    }
}

/// Pages per kind of owner.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Tally {
    pub filling: u64,
    pub deferred: u64,
    pub poisoned: u64,
}

impl Tally {
    fn of(&mut self, owner: Owner) -> &mut u64 {
        match owner {
            Owner::Fill | Owner::Install | Owner::Discard => &mut self.filling,
            Owner::Host => &mut self.deferred,
            Owner::Poison => &mut self.poisoned,
        }
    }
}

/// The claims of one slot.
pub struct Claims<W> {
    by_start: Table<Claim<W>>,
    next: Id,
    granule: u64,
    tally: Tally,
    /// Claims whose owner is a thread of the library.
    busy: usize,
    /// Room for one more waiter.
    room: Option<Box<Node<W>>>,
    /// The slot's wholeness has been reported.
    whole: bool,
    /// The id of the last discard.
    discarded: Id,
    /// The slot has ended: pages are no longer filled or dropped. Pages that the guest gave back are still zeroed.
    shut: bool,
    /// Threads that sleep until a claim settles.
    pub sleepers: usize,
}

impl<W: Waits> Claims<W> {
    /// No claims yet, on pages of `granule` bytes.
    pub fn new(granule: u64) -> Self {
        let (by_start, tally, room) = Default::default();
        Self { by_start, next: 0, granule, tally, busy: 0, room, whole: false, discarded: 0, shut: false, sleepers: 0 }
    }

    /// Makes room for claims in `range` and for one waiter. Err: there is no memory for it now.
    ///
    /// `demand`: a thread waits for a page. Only such a claim may use the spare entries.
    pub fn reserve(&mut self, pages: &Pages, range: &Range<u64>, demand: bool) -> Result<(), NoMemory> {
        // Each claim of a thread may be split at both ends.
        let plenty = self.by_start.reserve(SPARE + (FEW - 1) * self.busy).is_ok();
        if self.room.is_none() {
            self.room = List::room().ok();
        }
        let enough = plenty || demand && self.by_start.room() >= FEW;
        if self.room.is_none() || !enough {
            return Err(NoMemory);
        }
        pages.reserve(range.clone())
    }

    /// As [`Claims::reserve`], for a change of all of `range` that the library cannot refuse (a kernel event).
    pub fn reserve_ends(&mut self, pages: &Pages, range: &Range<u64>) -> Result<(), NoMemory> {
        if self.by_start.reserve(SPARE).is_err() && self.by_start.room() < FEW {
            return Err(NoMemory);
        }
        pages.reserve_ends(range)
    }

    /// Claims the run of at most `max` pages in state `from` that starts at `first`. None when `first` is in another
    /// state, or when the caller did not reserve and there is no memory.
    pub fn claim(
        &mut self,
        pages: &Pages,
        first: u64,
        max: u64,
        from: State,
        terms: Terms,
    ) -> Option<(Id, Range<u64>)> {
        let run = pages.first_run(first..pages.total().min(first.saturating_add(max)), from, max)?;
        if run.start != first || self.shut && from == State::Absent {
            return None;
        }
        let id = self.fresh();
        self.insert(pages, run.clone(), id, from, terms).then_some((id, run))
    }

    /// Adds `waiter` to the claim on its page, once for each waiting thread, and marks the claim as demanded. Gives the
    /// waiter back when there is no claim, or when there is no memory, which [`Claims::reserve`] rules out.
    pub fn join(&mut self, waiter: W) -> Result<Owner, W> {
        let room = List::room().ok();
        let Self { by_start, room: spare, .. } = self;
        match by_start.floor_mut(waiter.page()) {
            Some((_, claim)) if waiter.page() < claim.end => {
                if !claim.waiters.iter().any(|earlier| waiter.is_again(earlier)) {
                    let Some(room) = room.or_else(|| spare.take()) else { return Err(waiter) };
                    claim.waiters.push(waiter, room);
                }
                claim.demand = true;
                Ok(claim.owner)
            }
            _ => Err(waiter),
        }
    }

    /// The result of a change of states: `waiters` are to be woken.
    fn settled(&mut self, pages: &Pages, waiters: Waiters<W>) -> Settled<W> {
        Settled { waiters, whole: self.becomes_whole(pages) }
    }

    /// Whether the slot has become whole, reported once.
    pub fn becomes_whole(&mut self, pages: &Pages) -> bool {
        pages.whole() && !std::mem::replace(&mut self.whole, true)
    }

    /// Marks the claim on `page` as demanded.
    pub fn want(&mut self, page: u64) -> Option<Owner> {
        let (_, claim) = self.at(page)?;
        claim.demand = true;
        Some(claim.owner)
    }

    /// Pages per kind of owner.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn fresh(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    /// Inserts a claim on `run`, which is in state `origin`. False: there is no memory, and nothing has changed.
    #[must_use]
    fn insert(&mut self, pages: &Pages, run: Range<u64>, id: Id, origin: State, terms: Terms) -> bool {
        let Terms { owner, in_place, demand, speculative, since } = terms;
        let (owed, poisoned, resolving, answered) = (false, false, false, false);
        let (lender, held_off, cancel, early) = (None, 0, None, None);
        let (end, since, waiters) = (run.end, since.unwrap_or_else(Instant::now), Waiters::default());
        let claim = Claim {
            end,
            id,
            owner,
            origin,
            in_place,
            demand,
            speculative,
            owed,
            poisoned,
            lender,
            resolving,
            answered,
            held_off,
            cancel,
            early,
            since,
            waiters,
        };
        let inserted = self.by_start.insert(run.start, claim);
        if inserted {
            self.count(owner, run.end - run.start);
            let moved = pages.transition(run.clone(), origin, State::Filling);
            debug_assert_eq!(moved, run.end - run.start);
        }
        inserted
    }

    fn count(&mut self, owner: Owner, pages: u64) {
        *self.tally.of(owner) += pages;
        self.busy += usize::from(is_busy(owner));
    }

    fn at(&mut self, page: u64) -> Option<(u64, &mut Claim<W>)> {
        self.by_start.floor_mut(page).filter(|(_, claim)| page < claim.end)
    }

    /// The claims that overlap `range`, each with the part of its pages inside.
    fn parts<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = (Range<u64>, &'a Claim<W>)> {
        let first = self.by_start.floor(range.start).map_or(range.start, |(start, _)| start);
        let (from, to) = (range.start, range.end);
        self.by_start
            .range(first..to)
            .map(move |(start, claim)| (start.max(from)..claim.end.min(to), claim))
            .filter(|(part, _)| !part.is_empty())
    }

    fn overlapping<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = &'a Claim<W>> {
        self.parts(range).map(|(_, claim)| claim)
    }

    /// Passes the claims of `range`, which the caller has isolated, to `change` until that returns false. Skips a claim
    /// that could not be split at an end of `range`.
    fn each(&mut self, range: Range<u64>, mut change: impl FnMut(Range<u64>, &mut Claim<W>) -> bool) {
        let (mut from, mut more) = (range.start, true);
        while let Some((start, claim)) = self.by_start.first_mut(from..range.end).filter(|_| more) {
            let (run, before) = (start..claim.end, claim.owner);
            from = run.end;
            if run.end > range.end {
                continue;
            }
            more = change(run.clone(), claim);
            let after = claim.owner;
            self.recount(before, after, run.end - run.start);
        }
    }

    fn recount(&mut self, before: Owner, after: Owner, pages: u64) {
        if before != after {
            *self.tally.of(before) -= pages;
            self.busy -= usize::from(is_busy(before));
            self.count(after, pages);
        }
    }

    /// Removes the claims of `range` that `which` accepts, and passes them to `each`.
    fn drain(
        &mut self,
        range: Range<u64>,
        which: impl Fn(&Claim<W>) -> bool,
        mut each: impl FnMut(Range<u64>, &mut Claim<W>),
    ) {
        self.isolate(&range);
        let mut from = range.start;
        while let Some((start, claim)) = self.by_start.first_mut(from..range.end) {
            from = claim.end;
            if claim.end > range.end || !which(claim) {
                continue;
            }
            let Some(mut claim) = self.by_start.remove(start) else { break };
            *self.tally.of(claim.owner) -= claim.end - start;
            self.busy -= usize::from(is_busy(claim.owner));
            each(start..claim.end, &mut claim);
        }
    }

    /// Splits the claims that cross either end of `range`.
    fn isolate(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
    }

    fn split(&mut self, page: u64) {
        if self.at(page).is_none_or(|(start, _)| start == page) {
            return;
        }
        if self.by_start.room() == 0 && patiently(|| self.by_start.reserve(1)).is_err() {
            // The claim stays whole, and callers that want only a part of it leave it alone.
            return;
        }
        let granule = self.granule;
        let Some((start, claim)) = self.at(page) else { return };
        let after = claim.waiters.take_if(|w: &W| w.page() >= page);
        let early = match &mut claim.early {
            Some(Early::Data(bytes)) => Some(Early::Data(bytes.split_off(((page - start) * granule) as usize))),
            Some(Early::Zero) => Some(Early::Zero),
            Some(Early::InPlace) => Some(Early::InPlace),
            Some(Early::Poison) => Some(Early::Poison),
            None => None,
        };
        let tail = Claim { early, waiters: after, ..*claim };
        claim.end = page;
        self.busy += usize::from(is_busy(tail.owner));
        let inserted = self.by_start.insert(page, tail);
        debug_assert!(inserted, "there was room");
    }
}

/// Whether a thread of the library owns the claim.
fn is_busy(owner: Owner) -> bool {
    !matches!(owner, Owner::Host | Owner::Poison)
}

/// Whether the owner is done within microseconds. It is installing, looking at a page again (a late fault), or zeroing
/// one; in the last two cases the guest can see the page meanwhile.
fn in_kernel<W>(claim: &Claim<W>) -> bool {
    claim.owner == Owner::Install || (claim.owner == Owner::Fill && claim.origin != State::Absent)
}

/// Appends `run`, merging it with a last one that ends where it starts.
fn extend(runs: &mut Runs, run: Range<u64>) -> Result<(), NoMemory> {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => {
            runs.try_reserve(1).map_err(|_| NoMemory)?;
            runs.push(run);
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests;
