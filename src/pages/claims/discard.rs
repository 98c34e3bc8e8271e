//! Dropped pages: `kuf_discard` drops them, or the guest gives them back.

use std::ops::Range;

use super::*;

impl<W: Waits> Claims<W> {
    /// The guest gave `range` back: bytes that are on their way there may not arrive, and the returned waiters are to
    /// be served anew. `marks_stay`: poisoned pages stay poisoned, for their marks are still in the page table.
    pub fn remove(&mut self, pages: &Pages, range: Range<u64>, marks_stay: bool) -> Settled<W> {
        debug_assert!(
            self.overlapping(&range).all(|c| c.owner != Owner::Install),
            "events are read with the gate held"
        );
        self.isolate(&range);
        // A page that is being made zero stays with its owner, because zero is right. If each removal took it away, a
        // thread that gives the page back again and again would keep it from ever becoming present.
        let zeroed = |c: &Claim<W>| c.owner == Owner::Fill && c.origin == State::Removed && c.cancel.is_none();
        self.each(range.clone(), |_, claim| {
            if claim.in_place && matches!(claim.owner, Owner::Fill | Owner::Host) && !zeroed(claim) {
                claim.cancel = Some(Cancel::Removed);
                claim.early = None;
            }
            true
        });
        let mut waiters = Waiters::default();
        let stays = |c: &Claim<W>| match c.owner {
            Owner::Discard => true,
            Owner::Fill | Owner::Host => c.in_place || zeroed(c),
            Owner::Poison => marks_stay,
            Owner::Install => false,
        };
        self.drain(
            range.clone(),
            |c| !stays(c),
            |run, claim| {
                pages.transition(run, State::Filling, State::Removed);
                waiters.append(&mut claim.waiters);
            },
        );
        pages.transition(range.clone(), State::Absent, State::Removed);
        pages.transition(range, State::Present, State::Removed);
        self.settled(pages, waiters)
    }

    /// Claims the pages of `range`, whatever their state, for the caller to drop in the kernel and then settle as
    /// `Removed` (if `removed`) or `Absent`. A claim stays with its owner if that may be writing to the page itself, or
    /// if the caller has promised the bytes; it is cancelled where its bytes would be those from before the discard. The
    /// caller has seen that no page of it is being installed or dropped. Err: there is no memory, and nothing has
    /// changed.
    ///
    /// It claims pages in every state because the states do not say which pages hold bytes: memory may have been filled
    /// before it was added, a page that was given back with MADV_FREE keeps its bytes, and so does a page of a file
    /// that was only unmapped.
    pub fn begin_discard(&mut self, pages: &Pages, range: Range<u64>, removed: bool) -> Result<Discarding, NoMemory> {
        let runs = self.room_to_discard(pages, &range)?;
        let id = self.fresh();
        let target = removed.then_some(Cancel::Removed);
        self.isolate(&range);
        self.each(range.clone(), |_, claim| {
            match claim.owner {
                Owner::Install | Owner::Discard => return true,
                Owner::Fill if claim.in_place => {
                    claim.cancel = Some(if removed { Cancel::Removed } else { Cancel::Again });
                    claim.early = None;
                    if !removed {
                        // If the slot ends before the owner is done, `shut` must not treat the page as one that was
                        // zero.
                        claim.origin = State::Absent;
                    }
                    return true;
                }
                // The bytes that the caller resolves from now on are valid: they come after the discard.
                Owner::Host if claim.in_place || !removed => {
                    claim.cancel = removed.then_some(Cancel::Removed);
                    return true;
                }
                // The discard takes the claim over; a late owner finds that it owns the page no more.
                Owner::Fill | Owner::Host | Owner::Poison => {}
            }
            (claim.owed, claim.poisoned) = (claim.owner == Owner::Host, claim.owner == Owner::Poison);
            (claim.owner, claim.id, claim.cancel, claim.origin) = (Owner::Discard, id, target, State::Absent);
            true
        });
        let removed = self.claim_to_drop(pages, &range, id, State::Removed, target);
        self.claim_to_drop(pages, &range, id, State::Present, target);
        self.claim_to_drop(pages, &range, id, State::Absent, target);
        (self.whole, self.discarded) = (false, id);
        Ok(self.discarding(&range, id, runs, removed))
    }

    /// Claims the absent pages of `range`, for the caller to drop what lies in their place and settle them as `Absent`.
    /// Err: as above.
    pub fn begin_emptying(&mut self, pages: &Pages, range: Range<u64>) -> Result<Discarding, NoMemory> {
        let runs = self.room_to_discard(pages, &range)?;
        let id = self.fresh();
        self.claim_to_drop(pages, &range, id, State::Absent, None);
        Ok(self.discarding(&range, id, runs, 0))
    }

    /// Claims all pages of `range` in state `from`, for which there is room. `target`: the `cancel` of these claims.
    /// Returns how many pages.
    pub(super) fn claim_to_drop(
        &mut self,
        pages: &Pages,
        range: &Range<u64>,
        id: Id,
        from: State,
        target: Option<Cancel>,
    ) -> u64 {
        let terms = Terms { owner: Owner::Discard, in_place: false, demand: false, speculative: false, since: None };
        let (mut at, mut claimed) = (range.start, 0);
        while let Some(run) = pages.first_run(at..range.end, from, u64::MAX) {
            (at, claimed) = (run.end, claimed + (run.end - run.start));
            let inserted = self.insert(pages, run.clone(), id, from, terms);
            debug_assert!(inserted, "there was room");
            if let Some((_, claim)) = self.at(run.start) {
                claim.cancel = target;
            }
        }
        claimed
    }

    pub(super) fn discarding(&self, range: &Range<u64>, id: Id, runs: Runs, removed: u64) -> Discarding {
        let mut runs = runs;
        for (run, _) in self.parts(range).filter(|(_, claim)| claim.id == id) {
            let _ = extend(&mut runs, run);
        }
        Discarding { id, runs, removed }
    }

    /// Makes room for as many claims and runs as a discard of `range` can make.
    pub(super) fn room_to_discard(&mut self, pages: &Pages, range: &Range<u64>) -> Result<Runs, NoMemory> {
        let mut n = self.parts(range).count();
        for state in [State::Absent, State::Present, State::Removed] {
            let mut from = range.start;
            while let Some(run) = pages.first_run(from..range.end, state, u64::MAX) {
                (from, n) = (run.end, n + 1);
            }
        }
        self.by_start.reserve(n + SPARE)?;
        pages.reserve_ends(range)?;
        let mut runs = Runs::new();
        refusable(|| runs.try_reserve(n)).map_err(|_| NoMemory)?;
        Ok(runs)
    }

    /// Whether pages were discarded after the claim `id` was made.
    pub fn discarded_since(&self, id: Id) -> bool {
        self.discarded > id
    }
}
