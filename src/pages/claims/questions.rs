//! Questions about the claims on a range.

use std::ops::Range;

use super::*;

impl<W: Waits> Claims<W> {
    /// Whether a page of `range` is being filled or dropped. Pages that the guest gave back do not count: they are zero
    /// already, and the guest may keep them on their way by touching them all the time.
    pub fn coming(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(Claim::is_coming)
    }

    /// Whether all pages that [`Claims::coming`] counts only wait for the kernel to accept them.
    pub fn only_held_off(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).filter(|claim| claim.is_coming()).all(Claim::is_held_off)
    }

    /// Whether `id` owns a page of `range`.
    pub fn holds(&self, range: &Range<u64>, id: Id) -> bool {
        self.held(range, id).is_some()
    }

    /// The first part of `range` that `id` owns.
    pub fn held(&self, range: &Range<u64>, id: Id) -> Option<Range<u64>> {
        self.parts(range).find(|(_, claim)| claim.id == id && claim.owner == Owner::Fill).map(|(part, _)| part)
    }

    /// The first part of `range` that `id` owns and whose bytes are not all there.
    pub fn half_filled(&self, range: &Range<u64>, id: Id) -> Option<Range<u64>> {
        let half = |c: &Claim<W>| c.id == id && c.owner == Owner::Fill && !c.is_held_off();
        self.parts(range).find(|(_, claim)| half(claim)).map(|(part, _)| part)
    }

    /// Whether `page` is poisoned.
    pub fn is_poisoned(&mut self, page: u64) -> bool {
        self.at(page).is_some_and(|(_, claim)| claim.owner == Owner::Poison)
    }

    /// Whether a known thread waits for a page that may still become present.
    pub fn waited_for(&self) -> bool {
        self.parts(&(0..u64::MAX)).any(|(_, claim)| claim.owner != Owner::Poison && !claim.waiters.is_empty())
    }

    /// Whether `id` owns a page of `range` that was never filled.
    pub fn fills(&self, range: &Range<u64>, id: Id) -> bool {
        self.overlapping(range)
            .any(|claim| claim.id == id && claim.owner == Owner::Fill && claim.origin == State::Absent)
    }

    /// Whether `page` is claimed and was absent before.
    pub fn is_new(&self, page: u64) -> bool {
        self.overlapping(&(page..page + 1)).any(|claim| claim.origin == State::Absent)
    }

    /// Whether the source's bytes for `page` are on their way.
    pub fn awaited(&mut self, page: u64) -> bool {
        let coming = |owner| matches!(owner, Owner::Fill | Owner::Install | Owner::Host);
        self.at(page).is_some_and(|(_, claim)| claim.origin == State::Absent && coming(claim.owner))
    }

    /// Whether a thread is inside the kernel for a page of `range`, for microseconds only.
    pub fn installing(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(in_kernel)
    }

    /// Whether another thread is dropping a page of `range`.
    pub fn dropping(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(|claim| claim.owner == Owner::Discard)
    }

    /// Whether a thread installs or drops a page of `range`.
    pub fn in_kernel(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).any(|claim| matches!(claim.owner, Owner::Install | Owner::Discard))
    }

    /// Whether a thread may be writing to the place of a page of `range`.
    pub fn writing(&self, range: &Range<u64>) -> bool {
        let writes =
            |c: &Claim<W>| c.owner == Owner::Fill && c.origin == State::Absent && c.in_place && !c.is_held_off();
        self.overlapping(range).any(writes)
    }

    /// Whether a thread of the library owns a page of `range` that [`Claims::shut`] has to wait for, or may be filling one.
    pub fn busy(&self, range: &Range<u64>) -> bool {
        self.in_kernel(range) || self.overlapping(range).any(|c| c.owner == Owner::Fill && c.origin == State::Absent)
    }

    /// The pages of `range` that were given back and are becoming zero: a thread makes a page of zeroes, or
    /// `kuf_discard` drops the page.
    pub fn becoming_zero(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.by_start.range(range.start..range.end).filter_map(|(start, claim)| {
            let given_back = match claim.owner {
                Owner::Discard => claim.cancel == Some(Cancel::Removed),
                _ => claim.origin == State::Removed,
            };
            given_back.then_some(start..claim.end)
        })
    }
}
