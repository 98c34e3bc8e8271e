//! Lists of ranges.

use std::ops::Range;

/// Cuts `range` out of `ranges`, which are disjoint, and returns the parts that were cut.
pub fn take_within(ranges: &mut Vec<Range<u64>>, range: &Range<u64>) -> Vec<Range<u64>> {
    let mut taken = Vec::new();
    let mut left = Vec::with_capacity(ranges.len());
    for other in ranges.drain(..) {
        let (start, end) = (other.start.max(range.start), other.end.min(range.end));
        if start >= end {
            left.push(other);
            continue;
        }
        taken.push(start..end);
        left.extend([other.start..start, end..other.end].into_iter().filter(|part| !part.is_empty()));
    }
    *ranges = left;
    taken
}

/// Cuts `range` out of `ranges`, which may overlap: each part of it out of one of them. Returns the parts that none has.
pub fn take_once(ranges: &mut Vec<Range<u64>>, range: &Range<u64>) -> Vec<Range<u64>> {
    let mut rest = vec![range.clone()];
    let mut left = Vec::with_capacity(ranges.len());
    for other in ranges.drain(..) {
        let taken = take_within(&mut rest, &other);
        let first = left.len();
        left.push(other);
        for part in taken {
            let mut cut = left.split_off(first);
            let _ = take_within(&mut cut, &part);
            left.append(&mut cut);
        }
    }
    *ranges = left;
    rest
}

#[cfg(test)]
mod tests {
    use super::{take_once, take_within};

    #[test]
    fn a_range_is_cut_out_of_others() {
        let mut ranges = vec![0..10, 20..30, 40..50];
        assert_eq!(take_within(&mut ranges, &(5..45)), [5..10, 20..30, 40..45]);
        assert_eq!(ranges, [0..5, 45..50]);
        assert!(take_within(&mut ranges, &(5..45)).is_empty());
    }

    #[test]
    fn each_part_is_cut_out_of_one_range() {
        let mut ranges = vec![0..10, 20..30, 5..18, 50..60];
        assert_eq!(take_once(&mut ranges, &(0..40)), [18..20, 30..40]);
        assert_eq!(ranges, [5..10, 50..60]);
        assert_eq!(take_once(&mut ranges, &(0..60)), [0..5, 10..50]);
        assert!(ranges.is_empty());
    }
}
