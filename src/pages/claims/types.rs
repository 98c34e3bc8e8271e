//! The types of claims, and of the answers about them.

use std::ops::Range;

use smallvec::SmallVec;

use crate::alloc::{List, SharedBytes};
use crate::sync::time::Instant;

/// The owner of a claimed page, which alone may put bytes in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A thread of the library: inside the fill callback, or on its way to the kernel.
    Fill,
    /// A thread that is inside the kernel's install call.
    Install,
    /// The caller: it has promised to call `kuf_resolve`.
    Host,
    /// `kuf_discard`: it is dropping the page.
    Discard,
    /// No owner, for good: the page could not be filled.
    Poison,
}

/// Why an owner's bytes may not be used. On a discard's claim, `Removed` says that the pages are zero from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// The guest gave the page back meanwhile: it is zero from now on.
    Removed,
    /// The caller discarded the page meanwhile: ask the source again.
    Again,
}

/// Bytes that `kuf_resolve` passed for a page whose callback may still be writing to the page itself.
#[derive(Debug)]
pub enum Early {
    /// A copy of the bytes.
    Data(SharedBytes),
    /// Zeroes.
    Zero,
    /// The bytes are in place.
    InPlace,
    /// The bytes are lost: the page is to be poisoned.
    Poison,
}

/// A waiter for one page.
pub trait Waits {
    /// The page it waits for.
    fn page(&self) -> u64;

    /// Whether `earlier` is the same thread, which took a signal and faulted again.
    fn is_again(&self, _earlier: &Self) -> bool {
        false
    }
}

/// The waiters of a claim.
pub type Waiters<W> = List<W>;

/// Runs of pages, in order: mostly one.
pub type Runs = SmallVec<[Range<u64>; 2]>;

/// Identity of the claims made by one `claim` or `take`.
pub type Id = u64;

/// A run of pages that the caller still owes.
#[derive(Debug, PartialEq, Eq)]
pub struct Owed {
    pub pages: Range<u64>,
    pub demand: bool,
    pub since: Instant,
}

/// The parts of a range, by what `kuf_resolve` may do with them.
pub struct Taken {
    pub id: Id,
    /// The end of the part that was looked at, which is less than the range when memory runs short. The start of the
    /// range: there is no memory at all.
    pub until: u64,
    /// Runs that the caller owns now, to be installed.
    pub install: Runs,
    /// Parts where a callback may be writing: the bytes are to be left as [`Early`].
    pub early: Vec<Range<u64>>,
    /// Runs that another thread installs or another `kuf_resolve` resolves: to be looked at again, for that may fail.
    /// The caller looks at no others again: pages that this call made present may have been discarded since.
    pub again: Runs,
    /// The times at which the caller was asked for the parts that it owed.
    pub asked: Vec<Instant>,
    /// How many of the pages were asked for by readahead,
    pub ahead: u64,
    /// or to be populated, and not on demand.
    pub populated: u64,
}

/// The outcome of claims that have ended.
#[must_use]
pub struct Settled<W> {
    /// The waiters, to be woken.
    pub waiters: Waiters<W>,
    /// The slot has become whole by this: no page is absent or being filled. Reported once, and again only after a
    /// discard.
    pub whole: bool,
}

/// The pages claimed to be dropped.
pub struct Discarding {
    pub id: Id,
    /// Runs to be dropped in the kernel and settled.
    pub runs: Runs,
    /// How many of these pages were given back before.
    pub removed: u64,
}

/// The answer of [`Claims::begin_install`](super::Claims::begin_install).
pub struct Begun {
    /// Runs that are [`Owner::Install`] now.
    pub runs: Runs,
    /// Some parts were cancelled and stay behind, for [`Claims::cancelled`](super::Claims::cancelled).
    pub cancelled: bool,
    /// The end of the part that was looked at, which is less than the range when memory runs short, but never nothing.
    pub until: u64,
}

/// The properties of a new claim.
#[derive(Clone, Copy)]
pub struct Terms {
    pub owner: Owner,
    pub in_place: bool,
    pub demand: bool,
    /// The claim is for readahead.
    pub speculative: bool,
    /// When the claim began; None: now.
    pub since: Option<Instant>,
}
