//! The claims that `kuf_resolve` takes, and the pages that the caller owes.

use std::ops::Range;

use super::*;

impl<W: Waits> Claims<W> {
    /// Claims the pages of `range` that the caller may resolve. `mine` is the claim of the callback that the calling
    /// thread is in, if any: that callback is not writing at this moment.
    pub fn take(&mut self, pages: &Pages, range: Range<u64>, in_place: bool, mine: Option<Id>) -> Taken {
        let id = self.fresh();
        let (install, early, again, asked) = Default::default();
        let mut taken = Taken { id, until: range.end, install, early, again, asked, ahead: 0, populated: 0 };
        if self.shut {
            return taken;
        }
        self.isolate(&range);
        self.each(range.clone(), |run, claim| {
            let room = refusable(|| taken.install.try_reserve(1)).is_ok()
                && refusable(|| taken.early.try_reserve(1)).is_ok()
                && refusable(|| taken.again.try_reserve(1)).is_ok()
                && refusable(|| taken.asked.try_reserve(1)).is_ok();
            if !room {
                taken.until = run.start;
                return false;
            }
            let theirs = match claim.owner {
                Owner::Host => true,
                // The caller may not fill a page that is being zeroed because the guest gave it back.
                Owner::Fill if claim.resolving => false,
                Owner::Fill => claim.origin == State::Absent && (!claim.in_place || Some(claim.id) == mine),
                Owner::Install | Owner::Discard | Owner::Poison => false,
            };
            if theirs {
                if claim.owner == Owner::Host {
                    taken.asked.push(claim.since);
                    claim.owed = true;
                }
                if claim.owner == Owner::Host || Some(claim.id) == mine {
                    match (claim.demand, claim.speculative) {
                        (true, _) => {}
                        (false, true) => taken.ahead += run.end - run.start,
                        (false, false) => taken.populated += run.end - run.start,
                    }
                }
                claim.lender =
                    mine.filter(|mine| claim.id == *mine && claim.owner == Owner::Fill && claim.cancel.is_none());
                (claim.owner, claim.id, claim.resolving) = (Owner::Fill, id, true);
                // The caller knows what it has discarded, so bytes that it passes now are valid again.
                claim.cancel = claim.cancel.filter(|cancel| *cancel != Cancel::Again);
                let _ = extend(&mut taken.install, run);
            } else if claim.origin == State::Absent {
                match claim.owner {
                    Owner::Fill if claim.in_place && claim.early.is_none() => taken.early.push(run),
                    Owner::Fill if claim.in_place => {}
                    Owner::Fill | Owner::Install => drop(extend(&mut taken.again, run)),
                    Owner::Host | Owner::Discard | Owner::Poison => {}
                }
            }
            true
        });
        let mut from = range.start;
        while let Some(run) = pages.first_run(from..taken.until, State::Absent, u64::MAX) {
            from = run.end;
            let terms = Terms { owner: Owner::Fill, in_place, demand: false, speculative: false, since: None };
            let room = self.reserve(pages, &(run.start..run.start), false).is_ok()
                && refusable(|| taken.install.try_reserve(1)).is_ok();
            if !room || !self.insert(pages, run.clone(), id, State::Absent, terms) {
                taken.until = run.start;
                break;
            }
            if let Some((_, claim)) = self.at(run.start) {
                claim.resolving = true;
            }
            taken.install.push(run);
        }
        taken.install.sort_unstable_by_key(|run| run.start);
        taken
    }

    /// Keeps `bytes` for `range`, which [`Claims::take`] named as early. Returns them when the callback has returned
    /// meanwhile, or the slot is shut: its pages are to be poisoned, and bytes written in their place reach no guest. Pages
    /// that the guest has given back stay so.
    pub fn stash(&mut self, range: Range<u64>, bytes: Early) -> Result<(), Early> {
        self.isolate(&range);
        match self.by_start.first_mut(range.clone()) {
            Some((start, claim))
                if !self.shut
                    && start == range.start
                    && claim.end == range.end
                    && claim.owner == Owner::Fill
                    && claim.early.is_none() =>
            {
                claim.answered = true;
                if claim.cancel != Some(Cancel::Removed) {
                    claim.early = Some(bytes);
                }
                Ok(())
            }
            _ => Err(bytes),
        }
    }

    /// Takes the first early bytes for the pages of `range` that `id` owns, after the owner's own fill has failed, or was
    /// cancelled by a discard. A discard drops the bytes that came before it, so these are valid.
    pub fn early(&mut self, range: &Range<u64>, id: Id) -> Option<(Range<u64>, Early)> {
        self.isolate(range);
        let mut early = None;
        self.each(range.clone(), |run, claim| {
            if claim.id == id && claim.owner == Owner::Fill {
                early = claim.early.take().map(|bytes| (run, bytes));
                if early.is_some() {
                    claim.cancel = None;
                }
            }
            early.is_none()
        });
        early
    }

    /// Whether a page of `range` that `id` owns has early bytes, or was cancelled.
    pub fn has_early_or_cancelled(&self, range: &Range<u64>, id: Id) -> bool {
        // Not of a claim that could not be split at an end of `range`.
        let mine = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill && c.end <= range.end;
        let mut its = self.by_start.range(range.start..range.end);
        its.any(|(_, c)| mine(c) && (c.early.is_some() || c.cancel.is_some()))
    }

    /// The runs that the caller was asked for, in order: those it owes, and those whose callback has not returned yet.
    pub fn asked(&self) -> impl Iterator<Item = Owed> + '_ {
        let asked = |c: &Claim<W>| c.owner == Owner::Host || (c.owner == Owner::Fill && c.origin == State::Absent);
        self.by_start.range(0..u64::MAX).filter(move |(_, claim)| asked(claim)).map(|(start, claim)| Owed {
            pages: start..claim.end,
            demand: claim.demand,
            since: claim.since,
        })
    }

    /// The run that the caller owes at `page`, and the first waiter for this page.
    pub fn owed_at(&mut self, page: u64) -> Option<(Owed, Option<&W>)> {
        let (start, claim) = self.at(page)?;
        let owed = Owed { pages: start..claim.end, demand: claim.demand, since: claim.since };
        (claim.owner == Owner::Host).then(|| (owed, claim.waiters.iter().find(|w| w.page() == page)))
    }

    /// Whether the caller owes `page`, or will owe it again if its present owner fails.
    pub fn may_be_owed(&mut self, page: u64) -> bool {
        self.at(page).is_some_and(|(_, claim)| claim.owed || claim.owner == Owner::Host)
    }
}
