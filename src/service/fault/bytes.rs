//! The bytes that pages are installed with.

use std::ops::Range;

use crate::mechanism::Content;
use crate::memory::Slot;
use crate::service::fault::retry::RetryLimits;
use crate::stats::Shard;
use crate::sync::time::Instant;

/// The counter that installed pages go to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    Copied,
    Zeroed,
    InPlace,
    Poisoned,
    /// They were counted when their bytes came, or this code did not supply them.
    Not,
}

impl Counted {
    /// The usual counter for `content`.
    fn of(content: Content) -> Self {
        match content {
            Content::Copy(_) | Content::Move(_) => Self::Copied,
            Content::Zero => Self::Zeroed,
            Content::Map => Self::InPlace,
            Content::Verify => Self::Not,
            Content::Poison { .. } => Self::Poisoned,
        }
    }

    /// Counts `bytes` bytes.
    pub fn add(self, stats: &Shard, bytes: u64) {
        match self {
            Self::Copied => stats.bytes_copied(bytes),
            Self::Zeroed => stats.bytes_zeroed(bytes),
            Self::InPlace => stats.bytes_in_place(bytes),
            Self::Poisoned => stats.bytes_poisoned(bytes),
            Self::Not => {}
        }
    }
}

/// The bytes of an install, and how to install and count them.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    /// Where the bytes are.
    pub content: Content,
    /// How the pages are counted.
    pub counted: Counted,
    /// The page that they start with.
    pub base: u64,
    /// Pages that are known to be zero, in order.
    pub zeroes: &'a [Range<u64>],
    /// A page that must become present, zero or not.
    pub wanted: Option<u64>,
    /// No thread is likely to touch the pages soon: faults go first.
    pub background: bool,
    /// When the bytes were complete, if that is known.
    pub since: Option<Instant>,
    /// The limits of the whole piece of work that these pages are part of. None: this install has its own limits.
    pub patience: Option<&'a RetryLimits>,
}

/// How a piece of a run is installed.
pub enum Piece {
    With(Content, Counted),
    /// Not at all: it is zero, and no thread is blocked for it.
    Leave,
}

impl<'a> Bytes<'a> {
    /// `content` from `base` on, with the defaults for the rest.
    pub fn plain(content: Content, base: u64) -> Self {
        let counted = Counted::of(content);
        Self { content, counted, base, zeroes: &[], wanted: None, background: false, since: None, patience: None }
    }

    /// Zeroes that are in place.
    pub fn zero_in_place(base: u64) -> Self {
        Self { counted: Counted::Zeroed, ..Self::plain(Content::Map, base) }
    }

    /// Pages that are present, to be mapped where a mapping does not show them yet.
    pub fn present(base: u64) -> Self {
        Self { counted: Counted::Not, ..Self::plain(Content::Map, base) }
    }

    /// The longest piece from the start of `run` that is installed in one way.
    pub fn piece(&self, slot: &Slot, run: &Range<u64>) -> (Range<u64>, Piece) {
        let page = run.start;
        let at = |bytes: *const u8| bytes.wrapping_add(((page - self.base) * slot.granule) as usize);
        let content = match self.content {
            Content::Copy(bytes) => Content::Copy(at(bytes)),
            Content::Move(bytes) => Content::Move(at(bytes)),
            other => other,
        };
        let next = self.zeroes.get(self.zeroes.partition_point(|zero| zero.end <= page));
        match next {
            // KVM's marks are removed from a whole run in one call; `drop_zeroes` has dropped the zero pages before.
            Some(zero) if !slot.facts().gates_kvm_only => {
                let ends = |end: u64| page..end.min(run.end);
                if zero.start > page {
                    return (ends(zero.start), Piece::With(content, self.counted));
                }
                match self.wanted.filter(|wanted| zero.contains(wanted) && *wanted >= page) {
                    _ if slot.private => (ends(zero.end), Piece::With(Content::Zero, Counted::Zeroed)),
                    Some(wanted) if wanted == page => {
                        (ends(page + 1), Piece::With(self.present_zero(), Counted::Zeroed))
                    }
                    Some(wanted) => (ends(wanted), Piece::Leave),
                    None => (ends(zero.end), Piece::Leave),
                }
            }
            _ => (run.clone(), Piece::With(content, self.counted)),
        }
    }

    fn present_zero(&self) -> Content {
        match self.content {
            Content::Copy(_) | Content::Move(_) | Content::Zero => Content::Zero,
            _ => Content::Map,
        }
    }

    /// Where KVM's marks gate the slot: frees the memory of zero pages.
    pub fn drop_zeroes(&self, slot: &Slot, run: &Range<u64>) {
        if !slot.facts().gates_kvm_only {
            return;
        }
        for zero in self.zeroes.iter().filter_map(|zero| overlap(zero, run)) {
            // The page is zero in any case; a failure only leaves its memory allocated.
            let _ = slot.drop_or_zero(&zero);
        }
    }

    /// How many of `pages` are known to be zero.
    pub fn zero_pages(&self, pages: &Range<u64>) -> u64 {
        self.zeroes.iter().filter_map(|zero| overlap(zero, pages)).map(|zero| zero.end - zero.start).sum()
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let (start, end) = (a.start.max(b.start), a.end.min(b.end));
    (start < end).then_some(start..end)
}
