//! A claim on its way to the kernel and back: it is installed, cancelled, poisoned, deferred or given up.

use std::ops::Range;

use super::*;

impl<W: Waits> Claims<W> {
    /// Notes that `id` has all bytes of `range`, and that the kernel refuses to install them for now.
    pub fn hold_off(&mut self, range: Range<u64>, id: Id) {
        self.each(range, |_, claim| {
            if claim.id == id {
                claim.held_off = id;
            }
            true
        });
    }

    /// Marks the pages of `range` that `id` still owns as being inside the kernel.
    pub fn begin_install(&mut self, range: Range<u64>, id: Id) -> Begun {
        self.begin(range, id, |_| true)
    }

    /// The same, to poison them: parts with early bytes stay the caller's.
    pub fn begin_poison(&mut self, range: Range<u64>, id: Id) -> Begun {
        self.begin(range, id, |claim| claim.early.is_none())
    }

    pub(super) fn begin(&mut self, range: Range<u64>, id: Id, which: impl Fn(&Claim<W>) -> bool) -> Begun {
        self.isolate(&range);
        let mut begun = Begun { runs: Runs::new(), cancelled: false, until: range.end };
        self.each(range, |run, claim| {
            if claim.id != id || claim.owner != Owner::Fill || !which(claim) {
                return true;
            }
            if claim.cancel.is_some() {
                begun.cancelled = true;
            } else if extend(&mut begun.runs, run.clone()).is_ok() {
                claim.owner = Owner::Install;
            } else {
                begun.until = run.start;
            }
            begun.until > run.start
        });
        begun
    }

    /// Takes `range` back from the kernel, before the caller releases the gate.
    pub fn suspend(&mut self, range: Range<u64>, id: Id) {
        self.isolate(&range);
        self.each(range, |_, claim| {
            if claim.id == id && claim.owner == Owner::Install {
                claim.owner = Owner::Fill;
            }
            true
        });
    }

    /// The first part of `range` that `id` owns and whose bytes may not be used. True: a fill's bytes are in its place,
    /// and have to be dropped. False: the bytes may be the guest's own, which was only unmapped. Not those for which bytes
    /// have come since: see [`Claims::early`].
    pub fn cancelled(&self, range: &Range<u64>, id: Id) -> Option<(Range<u64>, bool)> {
        let mine = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill && c.cancel.is_some() && c.early.is_none();
        let scrub = |c: &Claim<W>| c.origin == State::Absent || c.cancel == Some(Cancel::Again);
        self.parts(range).find(|(_, claim)| mine(claim)).map(|(part, claim)| (part, scrub(claim)))
    }

    /// Ends the cancelled claims of `id` in `range`, each as its `cancel` says now.
    pub fn settle_cancelled(&mut self, pages: &Pages, range: Range<u64>, id: Id) -> Settled<W> {
        let mut waiters = Waiters::default();
        let mine = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill && c.cancel.is_some() && c.early.is_none();
        self.drain(range, mine, |run, claim| {
            let to = if claim.cancel == Some(Cancel::Removed) { State::Removed } else { State::Absent };
            pages.transition(run, State::Filling, to);
            waiters.append(&mut claim.waiters);
        });
        self.settled(pages, waiters)
    }

    /// Ends the claims of `id` in `range`: the pages become `to`, or return to their former state when `to` is None.
    pub fn settle(&mut self, pages: &Pages, range: Range<u64>, id: Id, to: Option<State>) -> Settled<W> {
        let mut waiters = Waiters::default();
        let mine = |claim: &Claim<W>| claim.id == id && !matches!(claim.owner, Owner::Host | Owner::Poison);
        self.drain(range, mine, |run, claim| {
            pages.transition(run, State::Filling, to.unwrap_or(claim.origin));
            waiters.append(&mut claim.waiters);
        });
        self.settled(pages, waiters)
    }

    /// Poisons the claims of `id` in `range`, for good. Returns the waiters.
    pub fn poison(&mut self, range: Range<u64>, id: Id) -> Waiters<W> {
        self.isolate(&range);
        let mut waiters = Waiters::default();
        self.each(range, |_, claim| {
            if claim.id == id {
                (claim.owner, claim.owed) = (Owner::Poison, false);
                claim.early = None;
                waiters.append(&mut claim.waiters);
            }
            true
        });
        waiters
    }

    /// Claims a poisoned page, for the caller to mark it again. None: it is not poisoned any more.
    pub fn begin_mark(&mut self, page: u64) -> Option<Id> {
        let id = self.fresh();
        let mut mine = None;
        self.isolate(&(page..page + 1));
        self.each(page..page + 1, |_, claim| {
            if claim.owner == Owner::Poison {
                (claim.owner, claim.id) = (Owner::Install, id);
                mine = Some(id);
            }
            true
        });
        mine
    }

    /// Defers the pages of `range` that `id` owns to the caller, except parts with early bytes: [`Claims::early`] returns
    /// those, or they are cancelled if the page was discarded or given back since.
    pub fn defer(&mut self, range: Range<u64>, id: Id) {
        self.isolate(&range);
        self.each(range, |_, claim| {
            if claim.id == id && claim.owner == Owner::Fill && claim.early.is_none() && !claim.answered {
                claim.owner = Owner::Host;
            }
            true
        });
    }

    /// Gives up the pages of `range` that `id` owns. Pages that `take` or a discard took from the caller are owed again;
    /// pages of a callback that called `kuf_resolve` itself are the callback's again; poisoned pages are poisoned
    /// again. The rest becomes `to`, or returns to its former state when `to` is None. Returns None, with nothing
    /// changed, when bytes have come early: the caller is to use them ([`Claims::early`]).
    pub fn give_back(&mut self, pages: &Pages, range: Range<u64>, id: Id, to: Option<State>) -> Option<Settled<W>> {
        self.isolate(&range);
        let mut early = false;
        self.each(range.clone(), |_, claim| {
            early |= claim.id == id && claim.owner == Owner::Fill && claim.early.is_some();
            !early
        });
        if early {
            return None;
        }
        self.each(range.clone(), |_, claim| {
            // Skip parts that the owner has poisoned or deferred: they are settled.
            if claim.id != id || !is_busy(claim.owner) {
                return true;
            }
            claim.resolving = false;
            // Its bytes are not used, and the next owner may write there.
            claim.held_off = 0;
            if claim.owner == Owner::Discard {
                claim.cancel = None;
            }
            if claim.owed {
                claim.owner = Owner::Host;
            } else if claim.poisoned {
                claim.owner = Owner::Poison;
            } else if claim.owner == Owner::Fill {
                claim.id = claim.lender.take().unwrap_or(id);
            }
            true
        });
        Some(self.settle(pages, range, id, to))
    }
}
