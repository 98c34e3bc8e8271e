//! Pages of zeroes among the bytes of a fill (`KUF_OPEN_DETECT_ZERO`): how they are found, and how they are installed
//! without a copy.
//!
//! | memory | a page of zeroes |
//! |---|---|
//! | private, base pages | the kernel's zero page (UFFDIO_ZEROPAGE): no memory until it is written |
//! | private, huge pages | as any other: there is no zero page of that size to map |
//! | shared | left out: a hole in the file, in state *removed*, zero when it is touched. A UFFDIO_ZEROPAGE there would take a page. A thread that waits for it, or asks for it with `kuf_ensure`, gets the page at once |
//! | behind marks (KVM asynchronous) | the bytes that were written there are dropped before the mark is removed |

use std::ops::Range;
use std::ptr::NonNull;

use crate::alloc::{try_push, NoMemory};
use crate::memory::Slot;
use crate::pages::claims::Id;
use crate::sync::Arc;

/// Which of `pages` are zero, if the slot detects zeroes. `at` has their bytes; no other thread writes them where the claim
/// `id` holds the pages.
pub fn zeroes(slot: &Arc<Slot>, id: Id, pages: &Range<u64>, at: NonNull<u8>) -> Vec<Range<u64>> {
    let mut zeroes: Vec<Range<u64>> = Vec::new();
    if !slot.detects_zero {
        return zeroes;
    }
    let granule = slot.granule as usize;
    // Without memory for the list the rest counts as data.
    let _ = slot.each_held(id, pages, |run| {
        for page in run {
            // SAFETY: the bytes of a page that the claim holds, in a buffer of this thread's or in place.
            let bytes = unsafe {
                std::slice::from_raw_parts(at.add((page - pages.start) as usize * granule).as_ptr(), granule)
            };
            if !is_zero(bytes) {
                continue;
            }
            match zeroes.last_mut().filter(|last| last.end == page) {
                Some(last) => last.end += 1,
                None => try_push(&mut zeroes, page..page + 1)?,
            }
        }
        Ok::<_, NoMemory>(())
    });
    zeroes
}

/// Whether a page holds nothing but zeroes. On a page of data the search ends at its first 256-byte block that is not zero,
/// usually the first block.
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
