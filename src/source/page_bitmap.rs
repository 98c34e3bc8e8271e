//! The bitmap of a layer: one bit for each page, the lowest bit of the first byte first. A page whose bit is clear is not in
//! the layer.

use std::ops::Range;

use crate::alloc::{zeroes, NoMemory};

/// A bitmap, copied from the caller.
pub struct PageBitmap {
    bits: Vec<u8>,
    page_size: u64,
}

impl PageBitmap {
    pub fn new(bits: &[u8], page_size: u64) -> Result<Self, NoMemory> {
        let mut copy = zeroes(bits.len())?;
        copy.copy_from_slice(bits);
        Ok(Self { bits: copy, page_size })
    }

    /// Bytes of a page: not 0 where the other functions are used.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The bytes of the bitmap, and how many of them `len` bytes of memory need.
    pub fn has_and_needs(&self, len: u64) -> (u64, u64) {
        (self.bits.len() as u64, len.div_ceil(self.page_size).div_ceil(8))
    }

    /// Where the last page that is set ends, at most `len`.
    pub fn end(&self, len: u64) -> u64 {
        let last = self.bits.iter().rposition(|byte| *byte != 0);
        let bit = last.map_or(0, |at| at as u64 * 8 + u64::from(8 - self.bits[at].leading_zeros()));
        bit.saturating_mul(self.page_size).min(len)
    }

    /// The runs of pages that are set, as bytes of the slot within `part`, to which the first bit belongs.
    pub fn set<'a>(&'a self, part: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        let pages = (part.end - part.start).div_ceil(self.page_size);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true).filter(|start| *start < pages)?;
            let end = self.next(start, false).unwrap_or(pages);
            at = end;
            let byte = |page: u64| (part.start + page * self.page_size).min(part.end);
            Some(byte(start)..byte(end))
        })
    }

    /// The first page from `page` on whose bit is `set`. Bytes without a page of interest are skipped.
    fn next(&self, mut page: u64, set: bool) -> Option<u64> {
        let skip = if set { 0 } else { 0xff };
        loop {
            let byte = *self.bits.get((page / 8) as usize)?;
            let rest = if set { byte } else { !byte } >> (page % 8);
            if byte != skip && rest != 0 {
                return Some(page + u64::from(rest.trailing_zeros()));
            }
            page = (page / 8 + 1) * 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bits: &[u8], part: Range<u64>) -> Vec<(u64, u64)> {
        PageBitmap::new(bits, 10).unwrap().set(&part).map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn runs_of_set_bits_are_found_across_bytes() {
        assert_eq!(runs(&[0, 0, 0], 0..240), []);
        assert_eq!(runs(&[0xff, 0xff], 0..160), [(0, 160)]);
        assert_eq!(runs(&[0b1100_0001, 0b0000_0011, 0, 0x80], 0..320), [(0, 10), (60, 100), (310, 320)]);
    }

    #[test]
    fn runs_are_cut_at_the_end_of_the_part_and_begin_at_its_start() {
        assert_eq!(runs(&[0xff, 0xff], 1000..1155), [(1000, 1155)]);
        assert_eq!(runs(&[0xf0], 1000..1045), [(1040, 1045)]);
        assert_eq!(runs(&[0xf0], 1000..1040), []);
    }

    #[test]
    fn the_end_is_that_of_the_last_page_that_is_set() {
        let end = |bits: &[u8], len| PageBitmap::new(bits, 10).unwrap().end(len);
        assert_eq!(end(&[0, 0], 160), 0);
        assert_eq!(end(&[1, 0], 160), 10);
        assert_eq!(end(&[0x81, 0], 160), 80);
        assert_eq!(end(&[0, 0x80], 155), 155);
    }

    #[test]
    fn all_runs_together_are_the_bits() {
        let mut random = 12345_u64;
        for _ in 0..200 {
            let bits: Vec<u8> = (0..9)
                .map(|_| {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (random >> 33) as u8 & (random >> 41) as u8
                })
                .collect();
            let mut found = vec![0_u8; bits.len()];
            for (start, end) in runs(&bits, 0..720) {
                assert!(start < end && start % 10 == 0 && end % 10 == 0);
                (start / 10..end / 10).for_each(|bit| found[(bit / 8) as usize] |= 1 << (bit % 8));
            }
            assert_eq!(found, bits);
        }
    }
}
