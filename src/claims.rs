//! Who owns each page that is being filled.
//!
//! A page in [`State::Filling`] belongs to exactly one claim here, and only the claim's owner may put bytes in its
//! place. The table lives under the slot's mutex; states are changed together with it, and read without it. A claim has
//! an identity, so that an owner that comes back late (a callback that took its time, say) learns which pages are still
//! its own: others may have been resolved by the host or given back by the guest meanwhile, and asked for anew.
//!
//! The way of a claim: `claim` → (fill) → `begin_install` → kernel → `settle`. On the way it may be deferred to the
//! host, taken over by `kuf_resolve`, cancelled by a discard, or cut out by a removal. No claim is in
//! [`Owner::Install`] unless its owner holds the mechanism's gate, which whoever reads kernel events takes exclusively:
//! that is what orders removals against installs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use smallvec::SmallVec;

use crate::pages::{Pages, State};

/// Who may put bytes in the place of a claimed page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A thread of the library: inside the fill callback, or on its way to the kernel.
    Fill,
    /// A thread that is inside the kernel's install call.
    Install,
    /// The host, which has promised to call `kuf_resolve`.
    Host,
    /// `kuf_discard`, which is dropping the page.
    Discard,
    /// Nobody ever: it could not be filled.
    Poison,
}

/// Why the bytes that an owner brings may not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// The guest gave the page back meanwhile: zero from now on.
    Removed,
    /// The host discarded the page meanwhile: ask the source again.
    Again,
}

/// Bytes that `kuf_resolve` brought for a page whose callback may still be writing to the page itself.
#[derive(Debug)]
pub enum Early {
    /// A copy of the bytes.
    Data(Vec<u8>),
    /// Zeroes.
    Zero,
    /// They are in place.
    InPlace,
    /// They are lost.
    Poison,
}

/// Something that waits for one page.
pub trait Waits {
    /// Which.
    fn page(&self) -> u64;
}

/// Who waited for a claim: mostly one, and then no memory is allocated for it.
pub type Waiters<W> = SmallVec<[W; 1]>;

/// Runs of pages, in order: mostly one.
pub type Runs = SmallVec<[Range<u64>; 2]>;

/// Identity of the claims made by one `claim` or `take`.
pub type Id = u64;

/// What is known of a claim besides its range.
pub struct Claim<W> {
    end: u64,
    id: Id,
    owner: Owner,
    /// What the pages become when the claim is abandoned.
    origin: State,
    /// The owner may be writing to the page itself, so nobody else may, and a removal has to wait for the owner.
    in_place: bool,
    demand: bool,
    /// It was asked for ahead of a toucher.
    ahead: bool,
    /// The host was asked for it before `kuf_resolve` took it: it is owed again when that fails.
    owed: bool,
    /// The host has brought bytes early: it will not bring them again, also when they could not be used.
    answered: bool,
    cancel: Option<Cancel>,
    early: Option<Early>,
    since: Instant,
    waiters: Waiters<W>,
}

/// A run of pages the host still owes.
#[derive(Debug, PartialEq, Eq)]
pub struct Owed {
    pub pages: Range<u64>,
    pub demand: bool,
    pub since: Instant,
}

/// What `kuf_resolve` may do with each part of a range.
#[derive(Default)]
pub struct Taken {
    pub id: Id,
    /// Now owned by the caller: to be installed.
    pub install: Runs,
    /// A callback may be writing there: to be left as [`Early`].
    pub early: Vec<Range<u64>>,
    /// When the parts that were owed by the host had been asked for.
    pub asked: Vec<Instant>,
    /// Pages of them that nobody waited for: that were asked for ahead of a toucher,
    pub ahead: u64,
    /// or to be populated.
    pub populated: u64,
}

/// What a discard has to do still.
pub struct Discarding<W> {
    pub id: Id,
    /// To be dropped in the kernel, and settled.
    pub runs: Runs,
    /// Who waited for pages that are removed now.
    pub waiters: Waiters<W>,
}

/// Pages per kind of owner.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Tally {
    pub filling: u64,
    pub deferred: u64,
    pub poisoned: u64,
}

/// How a run is claimed.
#[derive(Clone, Copy)]
pub struct Terms {
    pub owner: Owner,
    pub in_place: bool,
    pub demand: bool,
    /// It is asked for ahead of a toucher.
    pub ahead: bool,
    /// When it began; None: now.
    pub since: Option<Instant>,
}

/// The claims of one slot.
pub struct Claims<W> {
    by_start: BTreeMap<u64, Claim<W>>,
    next: Id,
    granule: u64,
    /// Threads asleep until something settles.
    pub sleepers: usize,
}

impl<W: Waits> Claims<W> {
    /// No claims yet, on pages of `granule` bytes.
    pub fn new(granule: u64) -> Self {
        Self { by_start: BTreeMap::new(), next: 0, granule, sleepers: 0 }
    }

    /// Claims the run of at most `max` pages in state `from` that starts at `first`. None when `first` is not in it.
    pub fn claim(
        &mut self,
        pages: &Pages,
        first: u64,
        max: u64,
        from: State,
        terms: Terms,
    ) -> Option<(Id, Range<u64>)> {
        let run = pages.first_run(first..pages.total().min(first.saturating_add(max)), from, max)?;
        if run.start != first {
            return None;
        }
        let id = self.fresh();
        self.insert(pages, run.clone(), id, from, terms);
        Some((id, run))
    }

    /// Adds `waiter` to the claim on its page, which becomes a demanded one. Gives the waiter back when there is no
    /// claim.
    pub fn join(&mut self, waiter: W) -> Result<Owner, W> {
        match self.at(waiter.page()) {
            Some((_, claim)) => {
                claim.demand = true;
                claim.waiters.push(waiter);
                Ok(claim.owner)
            }
            None => Err(waiter),
        }
    }

    /// Moves what `id` still owns of `range` to the kernel's hands. Returns it, and whether cancelled parts stay behind
    /// for [`Claims::cancelled`].
    pub fn begin_install(&mut self, range: Range<u64>, id: Id) -> (Runs, bool) {
        self.isolate(&range);
        let (mut runs, mut cancelled) = (Runs::new(), false);
        for (start, claim) in self.by_start.range_mut(range) {
            if claim.id != id || claim.owner != Owner::Fill {
                continue;
            }
            if claim.cancel.is_some() {
                cancelled = true;
                continue;
            }
            claim.owner = Owner::Install;
            extend(&mut runs, *start..claim.end);
        }
        (runs, cancelled)
    }

    /// Takes `range` back from the kernel's hands: the gate is about to be released.
    pub fn suspend(&mut self, range: Range<u64>, id: Id) {
        self.isolate(&range);
        for claim in self.by_start.range_mut(range).map(|(_, c)| c) {
            if claim.id == id && claim.owner == Owner::Install {
                claim.owner = Owner::Fill;
            }
        }
    }

    /// Parts of `range` that `id` owns and whose bytes may not be used. True: what is in their place is a fill's, and has
    /// to go. False: it may be the guest's own, which was only unmapped.
    pub fn cancelled(&mut self, range: Range<u64>, id: Id) -> Vec<(Range<u64>, bool)> {
        self.isolate(&range);
        let mine = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill;
        let scrub = |c: &Claim<W>| c.origin == State::Absent || c.cancel == Some(Cancel::Again);
        self.by_start
            .range(range)
            .filter(|(_, claim)| mine(claim) && claim.cancel.is_some())
            .map(|(start, claim)| (*start..claim.end, scrub(claim)))
            .collect()
    }

    /// Ends the cancelled claims of `id` in `range`, each by what it is cancelled for by now. Returns who waited.
    pub fn settle_cancelled(&mut self, pages: &Pages, range: Range<u64>, id: Id) -> Waiters<W> {
        let mut waiters = Waiters::new();
        let mine = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill && c.cancel.is_some();
        self.drain(range, mine, |start, claim| {
            let to = if claim.cancel == Some(Cancel::Removed) { State::Removed } else { State::Absent };
            pages.transition(start..claim.end, State::Filling, to);
            append(&mut waiters, claim.waiters);
        });
        waiters
    }

    /// Whether `id` owns a page of `range`.
    pub fn holds(&self, range: &Range<u64>, id: Id) -> bool {
        self.overlapping(range).any(|claim| claim.id == id && claim.owner == Owner::Fill)
    }

    /// What `id` owns of `range`.
    pub fn held(&mut self, range: Range<u64>, id: Id) -> Runs {
        self.isolate(&range);
        self.by_start
            .range(range)
            .filter(|(_, c)| c.id == id && c.owner == Owner::Fill)
            .map(|(s, c)| *s..c.end)
            .collect()
    }

    /// Ends what `id` owns of `range`: the pages become `to`, or what they were when `to` is None. Returns who waited.
    pub fn settle(&mut self, pages: &Pages, range: Range<u64>, id: Id, to: Option<State>) -> Waiters<W> {
        let mut waiters = Waiters::new();
        let mine = |claim: &Claim<W>| claim.id == id && claim.owner != Owner::Host;
        self.drain(range, mine, |start, claim| {
            pages.transition(start..claim.end, State::Filling, to.unwrap_or(claim.origin));
            append(&mut waiters, claim.waiters);
        });
        waiters
    }

    /// Gives what `id` owns of `range` to nobody for ever. Returns who waited.
    pub fn poison(&mut self, range: Range<u64>, id: Id) -> Waiters<W> {
        self.isolate(&range);
        let mut waiters = Waiters::new();
        for claim in self.by_start.range_mut(range).map(|(_, c)| c).filter(|c| c.id == id) {
            claim.owner = Owner::Poison;
            claim.early = None;
            waiters.append(&mut claim.waiters);
        }
        waiters
    }

    /// What is poisoned, in order.
    pub fn poisoned(&self) -> Runs {
        let mut runs = Runs::new();
        for (start, claim) in self.by_start.iter().filter(|(_, claim)| claim.owner == Owner::Poison) {
            extend(&mut runs, *start..claim.end);
        }
        runs
    }

    /// Whether `page` is.
    pub fn is_poisoned(&mut self, page: u64) -> bool {
        self.at(page).is_some_and(|(_, claim)| claim.owner == Owner::Poison)
    }

    /// Whether somebody is known to wait for a page that may still become present.
    pub fn waited_for(&self) -> bool {
        self.by_start.values().any(|claim| claim.owner != Owner::Poison && !claim.waiters.is_empty())
    }

    /// Takes a poisoned page in hand to mark it again. None: it is not poisoned any more.
    pub fn begin_mark(&mut self, page: u64) -> Option<Id> {
        let id = self.fresh();
        self.isolate(&(page..page + 1));
        let (_, claim) = self.at(page).filter(|(_, claim)| claim.owner == Owner::Poison)?;
        (claim.owner, claim.id) = (Owner::Install, id);
        Some(id)
    }

    /// Leaves what `id` owns of `range` to the host. Parts for which bytes came early stay the caller's, with them, or
    /// cancelled if the page was discarded or given back since.
    pub fn defer(&mut self, range: Range<u64>, id: Id) -> Vec<(Range<u64>, Early)> {
        self.isolate(&range);
        let mut early = Vec::new();
        for (start, claim) in self.by_start.range_mut(range) {
            if claim.id != id || claim.owner != Owner::Fill {
                continue;
            }
            match claim.early.take() {
                Some(bytes) => early.push((*start..claim.end, bytes)),
                None if claim.answered => {}
                None => claim.owner = Owner::Host,
            }
        }
        early
    }

    /// What the host may resolve of `range`. `mine` is the claim of the callback that the calling thread is in, if any:
    /// that callback is not writing at this moment.
    pub fn take(&mut self, pages: &Pages, range: Range<u64>, in_place: bool, mine: Option<Id>) -> Taken {
        let id = self.fresh();
        let mut taken = Taken { id, ..Taken::default() };
        self.isolate(&range);
        for (start, claim) in self.by_start.range_mut(range.clone()) {
            let run = *start..claim.end;
            let theirs = match claim.owner {
                Owner::Host => true,
                // A page that is being zeroed because the guest gave it back is not the host's to fill.
                Owner::Fill => claim.origin == State::Absent && (!claim.in_place || Some(claim.id) == mine),
                Owner::Install | Owner::Discard | Owner::Poison => false,
            };
            if theirs {
                if claim.owner == Owner::Host {
                    taken.asked.push(claim.since);
                    claim.owed = true;
                }
                if claim.owner == Owner::Host || Some(claim.id) == mine {
                    match (claim.demand, claim.ahead) {
                        (true, _) => {}
                        (false, true) => taken.ahead += claim.end - start,
                        (false, false) => taken.populated += claim.end - start,
                    }
                }
                claim.owner = Owner::Fill;
                claim.id = id;
                claim.early = None;
                // The host knows what it has discarded: what it brings now is of the page's new life.
                claim.cancel = claim.cancel.filter(|cancel| *cancel != Cancel::Again);
                extend(&mut taken.install, run);
            } else if claim.owner == Owner::Fill && claim.origin == State::Absent && claim.early.is_none() {
                taken.early.push(run);
            }
        }
        let mut from = range.start;
        while let Some(run) = pages.first_run(from..range.end, State::Absent, u64::MAX) {
            from = run.end;
            let terms = Terms { owner: Owner::Fill, in_place, demand: false, ahead: false, since: None };
            self.insert(pages, run.clone(), id, State::Absent, terms);
            taken.install.push(run);
        }
        taken.install.sort_by_key(|run| run.start);
        taken
    }

    /// Ends a `take` that could not be carried through on `range`: what the host owed is owed again, the rest is what
    /// it was.
    /// Returns who waited for the latter.
    pub fn give_back(&mut self, pages: &Pages, range: Range<u64>, id: Id) -> Waiters<W> {
        self.isolate(&range);
        for claim in self.by_start.range_mut(range.clone()).map(|(_, c)| c) {
            if claim.id == id && claim.owed {
                claim.owner = Owner::Host;
            }
        }
        self.settle(pages, range, id, None)
    }

    /// Keeps `bytes` for `range`, which [`Claims::take`] named as early. Gives them back when the callback has returned
    /// meanwhile.
    pub fn stash(&mut self, range: Range<u64>, bytes: Early) -> Result<(), Early> {
        self.isolate(&range);
        match self.by_start.get_mut(&range.start) {
            Some(claim) if claim.end == range.end && claim.owner == Owner::Fill && claim.early.is_none() => {
                claim.early = Some(bytes);
                claim.answered = true;
                Ok(())
            }
            _ => Err(bytes),
        }
    }

    /// Whether `page` is on its way from the source.
    pub fn awaited(&mut self, page: u64) -> bool {
        let coming = |owner| matches!(owner, Owner::Fill | Owner::Install | Owner::Host);
        self.at(page).is_some_and(|(_, claim)| claim.origin == State::Absent && coming(claim.owner))
    }

    /// Marks the claim on `page` as one that somebody waits for.
    pub fn want(&mut self, page: u64) -> Option<Owner> {
        let (_, claim) = self.at(page)?;
        claim.demand = true;
        Some(claim.owner)
    }

    /// The bytes that came early for what `id` owns of `range`, its own having failed.
    pub fn early(&mut self, range: Range<u64>, id: Id) -> Vec<(Range<u64>, Early)> {
        self.isolate(&range);
        self.by_start
            .range_mut(range)
            .filter(|(_, claim)| claim.id == id && claim.owner == Owner::Fill)
            .filter_map(|(start, claim)| claim.early.take().map(|bytes| (*start..claim.end, bytes)))
            .collect()
    }

    /// The guest gave `range` back. Whatever was on its way there may not arrive. Returns who waited and is to be
    /// served anew.
    pub fn remove(&mut self, pages: &Pages, range: Range<u64>) -> Waiters<W> {
        debug_assert!(
            self.overlapping(&range).all(|c| c.owner != Owner::Install),
            "events are read with the gate held"
        );
        self.isolate(&range);
        for claim in self.by_start.range_mut(range.clone()).map(|(_, c)| c) {
            if claim.in_place && matches!(claim.owner, Owner::Fill | Owner::Host) {
                claim.cancel = Some(Cancel::Removed);
                claim.early = None;
            }
        }
        let mut waiters = Waiters::new();
        let stays =
            |c: &Claim<W>| c.owner == Owner::Discard || c.in_place && matches!(c.owner, Owner::Fill | Owner::Host);
        self.drain(
            range.clone(),
            |c| !stays(c),
            |start, claim| {
                pages.transition(start..claim.end, State::Filling, State::Removed);
                append(&mut waiters, claim.waiters);
            },
        );
        pages.transition(range.clone(), State::Absent, State::Removed);
        pages.transition(range, State::Present, State::Removed);
        waiters
    }

    /// Begins to drop `range`: claims what may hold bytes, for the caller to drop in the kernel and then settle as
    /// `Removed` or `Absent`; makes the rest that at once; and cancels fills that are under way. The caller has seen
    /// that no page of it is being installed or dropped.
    pub fn begin_discard(&mut self, pages: &Pages, range: Range<u64>, removed: bool, in_place: bool) -> Discarding<W> {
        let id = self.fresh();
        self.isolate(&range);
        let mut runs = Runs::new();
        for (start, claim) in self.by_start.range_mut(range.clone()) {
            match claim.owner {
                Owner::Poison => {
                    (claim.owner, claim.id, claim.origin) = (Owner::Discard, id, State::Absent);
                    extend(&mut runs, *start..claim.end);
                }
                Owner::Fill => {
                    claim.cancel = Some(if removed { Cancel::Removed } else { Cancel::Again });
                    claim.early = None;
                }
                // What the host brings from now on is of the page's new life, if it has one.
                Owner::Host => claim.cancel = removed.then_some(Cancel::Removed),
                Owner::Install | Owner::Discard => {}
            }
        }
        let mut waiters = Waiters::new();
        if removed {
            // Nobody writes to these pages themselves, so nobody has to be waited for.
            let cut = |c: &Claim<W>| !c.in_place && matches!(c.owner, Owner::Fill | Owner::Host);
            self.drain(range.clone(), cut, |start, claim| {
                pages.transition(start..claim.end, State::Filling, State::Removed);
                append(&mut waiters, claim.waiters);
            });
        }
        // In a file, a removed page may hold its bytes still, if it was only unmapped, and an absent one what a fill that
        // failed has left.
        let hold: &[State] = match (in_place, removed) {
            (false, _) => &[State::Present],
            (true, false) => &[State::Present, State::Removed],
            (true, true) => &[State::Present, State::Removed, State::Absent],
        };
        for &state in hold {
            let mut from = range.start;
            while let Some(run) = pages.first_run(from..range.end, state, u64::MAX) {
                from = run.end;
                let terms = Terms { owner: Owner::Discard, in_place: false, demand: false, ahead: false, since: None };
                self.insert(pages, run.clone(), id, state, terms);
                runs.push(run);
            }
        }
        if removed {
            pages.transition(range, State::Absent, State::Removed);
        } else {
            pages.transition(range, State::Removed, State::Absent);
        }
        runs.sort_by_key(|run| run.start);
        Discarding { id, runs, waiters }
    }

    /// Whether a thread is inside the kernel for a page of `range`: it is out again in microseconds.
    pub fn installing(&self, range: &Range<u64>) -> bool {
        // A page that is only looked at again (a late fault), or zeroed, can be seen by the guest all the while.
        self.overlapping(range)
            .any(|c| c.owner == Owner::Install || (c.owner == Owner::Fill && c.origin != State::Absent))
    }

    /// Whether another thread is dropping a page of `range`.
    pub fn dropping(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(|claim| claim.owner == Owner::Discard)
    }

    /// Whether a thread of the library owns a page of `range`.
    pub fn busy(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(|c| matches!(c.owner, Owner::Fill | Owner::Install | Owner::Discard))
    }

    /// Whether a page of `range` is still to become present (poisoned ones are not).
    pub fn open(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(|claim| claim.owner != Owner::Poison)
    }

    /// Takes everything from everybody, for good: late owners find nothing. Returns the runs that were not settled and
    /// who waited for them.
    pub fn shut(&mut self, pages: &Pages) -> (Id, Vec<Range<u64>>, Waiters<W>) {
        let id = self.fresh();
        let mut waiters = Waiters::new();
        for claim in self.by_start.values_mut() {
            claim.id = id;
            claim.early = None;
            if claim.owner != Owner::Poison {
                claim.owner = Owner::Fill;
                claim.cancel = None;
            }
            waiters.append(&mut claim.waiters);
        }
        let mut from = 0;
        while let Some(run) = pages.first_run(from..pages.total(), State::Absent, u64::MAX) {
            from = run.end;
            let terms = Terms { owner: Owner::Fill, in_place: false, demand: false, ahead: false, since: None };
            self.insert(pages, run, id, State::Absent, terms);
        }
        let runs = self.by_start.iter().filter(|(_, c)| c.owner == Owner::Fill).map(|(s, c)| *s..c.end).collect();
        (id, runs, waiters)
    }

    /// What the host has been asked for, in order: what it owes, and what a callback has not returned for yet.
    pub fn asked(&self) -> impl Iterator<Item = Owed> + '_ {
        let asked = |c: &Claim<W>| c.owner == Owner::Host || (c.owner == Owner::Fill && c.origin == State::Absent);
        self.by_start.iter().filter(move |(_, claim)| asked(claim)).map(|(start, claim)| Owed {
            pages: *start..claim.end,
            demand: claim.demand,
            since: claim.since,
        })
    }

    /// What the host owes at `page`, and the first who waits for it.
    pub fn owed_at(&mut self, page: u64) -> Option<(Owed, Option<&W>)> {
        let (start, claim) = self.at(page)?;
        let owed = Owed { pages: start..claim.end, demand: claim.demand, since: claim.since };
        (claim.owner == Owner::Host).then(|| (owed, claim.waiters.iter().find(|w| w.page() == page)))
    }

    /// Pages per kind of owner.
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for (start, claim) in &self.by_start {
            let pages = claim.end - start;
            match claim.owner {
                Owner::Fill | Owner::Install | Owner::Discard => tally.filling += pages,
                Owner::Host => tally.deferred += pages,
                Owner::Poison => tally.poisoned += pages,
            }
        }
        tally
    }

    fn fresh(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    fn insert(&mut self, pages: &Pages, run: Range<u64>, id: Id, origin: State, terms: Terms) {
        let moved = pages.transition(run.clone(), origin, State::Filling);
        debug_assert_eq!(moved, run.end - run.start);
        let Terms { owner, in_place, demand, ahead, since } = terms;
        let (owed, answered, cancel, early) = (false, false, None, None);
        let (end, since, waiters) = (run.end, since.unwrap_or_else(Instant::now), Waiters::new());
        let claim =
            Claim { end, id, owner, origin, in_place, demand, ahead, owed, answered, cancel, early, since, waiters };
        self.by_start.insert(run.start, claim);
    }

    fn at(&mut self, page: u64) -> Option<(u64, &mut Claim<W>)> {
        let (start, claim) = self.by_start.range_mut(..=page).next_back()?;
        (page < claim.end).then_some((*start, claim))
    }

    fn overlapping<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = &'a Claim<W>> {
        let first = self.by_start.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let range = range.clone();
        self.by_start.range(first..range.end).map(|(_, claim)| claim).filter(move |claim| claim.end > range.start)
    }

    /// Takes the claims of `range` that `which` picks out, and hands them to `each`.
    fn drain(&mut self, range: Range<u64>, which: impl Fn(&Claim<W>) -> bool, mut each: impl FnMut(u64, Claim<W>)) {
        self.isolate(&range);
        let starts: SmallVec<[u64; 4]> =
            self.by_start.range(range).filter(|(_, c)| which(c)).map(|(start, _)| *start).collect();
        for start in starts {
            if let Some(claim) = self.by_start.remove(&start) {
                each(start, claim);
            }
        }
    }

    /// Sees to it that no claim crosses either end of `range`.
    fn isolate(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
    }

    fn split(&mut self, page: u64) {
        let granule = self.granule;
        let Some((start, claim)) = self.at(page) else { return };
        if start == page {
            return;
        }
        let (before, after) = std::mem::take(&mut claim.waiters).into_iter().partition(|w: &W| w.page() < page);
        claim.waiters = before;
        let early = match &mut claim.early {
            Some(Early::Data(bytes)) => Some(Early::Data(bytes.split_off(((page - start) * granule) as usize))),
            Some(Early::Zero) => Some(Early::Zero),
            Some(Early::InPlace) => Some(Early::InPlace),
            Some(Early::Poison) => Some(Early::Poison),
            None => None,
        };
        let tail = Claim { early, waiters: after, ..*claim };
        claim.end = page;
        self.by_start.insert(page, tail);
    }
}

/// Moves `more` to the end of `waiters`.
fn append<W>(waiters: &mut Waiters<W>, more: Waiters<W>) {
    if waiters.is_empty() {
        *waiters = more;
    } else {
        waiters.extend(more);
    }
}

/// Appends `run`, merging it with a last one that ends where it starts.
fn extend(runs: &mut Runs, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}
