//! Pages of zeroes among the bytes that were brought (`KUF_OPEN_DETECT_ZERO`): finding them, and what is done instead of
//! opening them with a copy.
//!
//! | memory | a page of zeroes |
//! |---|---|
//! | private, base pages | the kernel's zero page (UFFDIO_ZEROPAGE): no memory until it is written |
//! | private, huge pages | as any other: there is no zero page of that size to map |
//! | shared | left out: a hole in the file, in state *removed*, zero when it is touched. A UFFDIO_ZEROPAGE there would take a page. Who waits for it, or asks for it with `kuf_ensure`, gets it at once |
//! | behind marks (KVM asynchronous) | what was written there is dropped before the mark is taken off |

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use super::Service;
use crate::claims::Id;
use crate::mechanism::Content;
use crate::memory::Slot;

/// What pages are opened with.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    /// Where they are.
    pub content: Content,
    /// The page that they start with.
    pub base: u64,
    /// Pages that are known to be zero, in order.
    pub zeroes: &'a [Range<u64>],
    /// The page that is to be present whatever it holds.
    pub wanted: Option<u64>,
    /// Nobody is likely to touch them soon: whoever waits for others goes first.
    pub behind: bool,
    /// When they were there, if somebody has looked at the clock.
    pub since: Option<Instant>,
}

/// How a piece of a run is opened.
pub(super) enum Way {
    With(Content),
    /// Not at all: it is zero, and nobody waits for it.
    Leave,
}

impl<'a> Bytes<'a> {
    /// `content` from `base` on, of which nothing else is known.
    pub fn plain(content: Content, base: u64) -> Self {
        Self { content, base, zeroes: &[], wanted: None, behind: false, since: None }
    }

    /// The longest piece from the start of `run` that is opened in one way.
    pub fn piece(&self, slot: &Slot, run: &Range<u64>) -> (Range<u64>, Way) {
        let page = run.start;
        let content = match self.content {
            Content::Data(bytes) => Content::Data(bytes.wrapping_add(((page - self.base) * slot.granule) as usize)),
            Content::Staged(bytes) => Content::Staged(bytes.wrapping_add(((page - self.base) * slot.granule) as usize)),
            other => other,
        };
        let next = self.zeroes.get(self.zeroes.partition_point(|zero| zero.end <= page));
        match next {
            // Marks are taken off a run in one go: what is zero has been dropped before (`drop_zeroes`).
            Some(zero) if !slot.mechanism.marks() => {
                let ends = |end: u64| page..end.min(run.end);
                if zero.start > page {
                    return (ends(zero.start), Way::With(content));
                }
                match self.wanted.filter(|wanted| zero.contains(wanted) && *wanted >= page) {
                    _ if slot.private => (ends(zero.end), Way::With(Content::Zero)),
                    Some(wanted) if wanted == page => (ends(page + 1), Way::With(self.present_zero())),
                    Some(wanted) => (ends(wanted), Way::Leave),
                    None => (ends(zero.end), Way::Leave),
                }
            }
            _ => (run.clone(), Way::With(content)),
        }
    }

    fn present_zero(&self) -> Content {
        match self.content {
            Content::Data(_) | Content::Staged(_) | Content::Zero => Content::Zero,
            _ => Content::ZeroInPlace,
        }
    }

    /// Behind marks: gives the memory of zeroes back.
    pub fn drop_zeroes(&self, slot: &Slot, run: &Range<u64>) {
        if !slot.mechanism.marks() {
            return;
        }
        for zero in self.zeroes.iter().filter_map(|zero| overlap(zero, run)) {
            // Zero in any case; if it cannot be dropped it goes on taking memory.
            let _ = slot.drop_or_zero(&zero);
        }
    }

    /// How many of `pages` are known to be zero.
    pub fn zero_pages(&self, pages: &Range<u64>) -> u64 {
        self.zeroes.iter().filter_map(|zero| overlap(zero, pages)).map(|zero| zero.end - zero.start).sum()
    }
}

impl Service {
    /// Whether zeroes are looked for among the bytes of this slot.
    pub(super) fn detects(&self, slot: &Slot) -> bool {
        let base = slot.granule == rustix::param::page_size() as u64;
        self.config.detect_zero && (base || !slot.private || slot.mechanism.marks())
    }

    /// Whether zeroes of this slot are left out, so that who needs them present has to open them.
    pub(super) fn leaves_zeroes(&self, slot: &Slot) -> bool {
        self.config.detect_zero && !slot.private && !slot.mechanism.marks()
    }

    /// Which of `pages` are zero, if that is to be found out: `at` has their bytes, which nobody else writes where the
    /// claim `id` holds them.
    pub(super) fn zeroes(&self, slot: &Arc<Slot>, id: Id, pages: &Range<u64>, at: NonNull<u8>) -> Vec<Range<u64>> {
        let mut zeroes: Vec<Range<u64>> = Vec::new();
        if !self.detects(slot) {
            return zeroes;
        }
        let granule = slot.granule as usize;
        let held = slot.claims().held(pages.clone(), id);
        for page in held.into_iter().flatten() {
            // SAFETY: the bytes of a page that the claim holds, in a buffer of this thread's or in place.
            let bytes = unsafe {
                std::slice::from_raw_parts(at.add((page - pages.start) as usize * granule).as_ptr(), granule)
            };
            if !is_zero(bytes) {
                continue;
            }
            match zeroes.last_mut().filter(|last| last.end == page) {
                Some(last) => last.end += 1,
                None => zeroes.push(page..page + 1),
            }
        }
        zeroes
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let (start, end) = (a.start.max(b.start), a.end.min(b.end));
    (start < end).then_some(start..end)
}

/// Whether a page holds nothing but zeroes. A page of data is left at its first 256 bytes that are not, as a rule the
/// first of all.
///
/// The compiler makes vector code of it: sixteen 16-byte loads and `por` for a block on x86-64, and one test
/// (tests/check/symbols.sh looks).
#[inline(never)]
fn is_zero(page: &[u8]) -> bool {
    const BLOCK: usize = 256;
    page.chunks_exact(BLOCK).all(|block| {
        let words = block.chunks_exact(8).map(|word| word.try_into().map_or(1, u64::from_ne_bytes));
        words.fold(0, |all, word| all | word) == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_no_zero() {
        let mut page = vec![0_u8; 4096];
        assert!(is_zero(&page));
        for at in [0, 1, 7, 8, 255, 256, 2047, 4088, 4095] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(is_zero(&page));
    }
}
