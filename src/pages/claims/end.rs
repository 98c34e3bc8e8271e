//! The end of a slot: it takes every page from its owner and poisons those that are not settled.

use std::ops::Range;

use super::*;

impl<W: Waits> Claims<W> {
    /// Takes out all waiters: their pages will not become present.
    pub fn take_waiters(&mut self) -> Waiters<W> {
        let mut waiters = Waiters::default();
        self.each(0..u64::MAX, |_, claim| {
            waiters.append(&mut claim.waiters);
            true
        });
        waiters
    }

    /// Whether a page still needs its source: it is absent, or its claim is neither poisoned nor inside the kernel.
    pub fn unresolved(&self, pages: &Pages) -> bool {
        let open = |c: &Claim<W>| c.owner != Owner::Poison && !in_kernel(c);
        pages.count(State::Absent) > 0 || self.overlapping(&(0..u64::MAX)).any(open)
    }

    /// Takes every page from its owner for good: late owners find no page of theirs, and no page is filled any more.
    /// Pages that were only looked at again or zeroed return to their former state. Returns the id for
    /// [`Claims::next_unsettled`], and the waiters.
    pub fn shut(&mut self, pages: &Pages) -> (Id, Waiters<W>) {
        let id = self.fresh();
        let mut waiters = Waiters::default();
        let settled = |claim: &Claim<W>| claim.owner == Owner::Fill && claim.origin != State::Absent;
        self.drain(0..u64::MAX, settled, |run, claim| {
            pages.transition(run, State::Filling, claim.origin);
            waiters.append(&mut claim.waiters);
        });
        self.each(0..u64::MAX, |_, claim| {
            claim.held_off = if claim.is_held_off() { id } else { 0 };
            claim.id = id;
            claim.early = None;
            if claim.owner == Owner::Discard {
                // The kernel may drop the page at any moment, so it is to be poisoned.
                claim.origin = State::Absent;
            }
            if claim.owner != Owner::Poison {
                claim.owner = Owner::Fill;
                claim.cancel = None;
            }
            waiters.append(&mut claim.waiters);
            true
        });
        self.shut = true;
        (id, waiters)
    }

    /// For the claims of `id` in `range` that the kernel refuses for now: leaves those that are filled in place to the
    /// end of the slot. From here on no owner may give the pages up, and their bytes stay where they are.
    pub fn leave_held_off(&mut self, range: Range<u64>, id: Id) {
        let end = self.fresh();
        self.isolate(&range);
        self.each(range, |_, claim| {
            let whole = claim.in_place && claim.origin == State::Absent && claim.is_held_off();
            // Early bytes are still to be used, and a callback that resolves its own pages may continue to write there.
            let last = claim.early.is_none() && claim.lender.is_none();
            if claim.id == id && claim.owner == Owner::Fill && whole && last {
                (claim.id, claim.held_off) = (end, end);
                (claim.owed, claim.resolving) = (false, false);
            }
            true
        });
    }

    /// The next run that is not settled, for the caller to poison; `id` owns it. `from`: no page before it is absent;
    /// this call keeps it up to date.
    pub fn next_unsettled(&mut self, pages: &Pages, from: &mut u64, id: Id) -> Option<Range<u64>> {
        if let Some(run) = pages.first_run(*from..pages.total(), State::Absent, u64::MAX) {
            if self.by_start.room() == 0 && self.by_start.reserve(SPARE).is_err() {
                // After the end of the slot no caller needs the poisoned pages one by one.
                self.forget_poisoned();
            }
            let terms = Terms { owner: Owner::Fill, in_place: false, demand: false, speculative: false, since: None };
            if self.insert(pages, run.clone(), id, State::Absent, terms) {
                *from = run.end;
                return Some(run);
            }
        }
        self.held(&(0..u64::MAX), id)
    }

    /// Drops the claims of poisoned pages. The pages stay poisoned.
    pub(super) fn forget_poisoned(&mut self) {
        let poisoned = self.tally.poisoned;
        self.drain(0..u64::MAX, |claim| claim.owner == Owner::Poison, |_, _| {});
        self.tally.poisoned = poisoned;
    }

    /// Whether [`Claims::shut`] was called.
    pub fn is_shut(&self) -> bool {
        self.shut
    }

    /// Whether a claimed page that was never filled still has to be poisoned. Pages that the guest gave back do not
    /// count: a thread may still be making them zero.
    pub fn to_be_poisoned(&self) -> bool {
        self.overlapping(&(0..u64::MAX)).any(|c| c.owner != Owner::Poison && c.origin == State::Absent)
    }

    /// The first poisoned run from `page` on.
    pub fn next_poisoned(&self, pages: &Pages, page: u64) -> Option<Range<u64>> {
        if self.shut {
            return self.next_unowned(pages, page);
        }
        let all = page..u64::MAX;
        let mut poisoned = self.parts(&all).filter(|(_, claim)| claim.owner == Owner::Poison).map(|(part, _)| part);
        let first = poisoned.next()?;
        let end = poisoned.try_fold(first.end, |end, part| if part.start == end { Ok(part.end) } else { Err(end) });
        Some(first.start..end.unwrap_or_else(|end| end))
    }

    /// The first run from `page` on of pages that are in [`State::Filling`] and have no owner but poison: poisoned
    /// pages, with a claim or without. A page that is being zeroed is not among them.
    pub(super) fn next_unowned(&self, pages: &Pages, page: u64) -> Option<Range<u64>> {
        let mut from = page;
        loop {
            let run = pages.first_run(from..pages.total(), State::Filling, u64::MAX)?;
            match self.parts(&run).find(|(_, claim)| claim.owner != Owner::Poison) {
                None => return Some(run),
                Some((part, _)) if part.start > run.start => return Some(run.start..part.start),
                Some((part, _)) => from = part.end,
            }
        }
    }
}
