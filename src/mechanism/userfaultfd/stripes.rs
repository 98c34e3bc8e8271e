//! Which of several userfaultfds a page is under.
//!
//! A userfaultfd has one list of waiting threads, under one lock: each fault is put on it, each read moves entries, and
//! each install searches the whole list for the threads to wake. With several userfaultfds a slot is divided in
//! stripes, which alternate between them, so that vCPUs in different parts of memory seldom contend for one lock.
//!
//! Each stripe is a separate mapping in the kernel. So stripes are few and large, and end where huge pages end.

use std::ops::Range;

use crate::mapping::Extent;

/// No stripe is shorter: sequential access stays on one queue for long, and a small slot is one mapping.
const SHORTEST: u64 = 16 << 20;

/// The number of stripes of a slot, at most about this many. Mappings are limited (vm.max_map_count, 65530 for a
/// process).
const MOST: u64 = 64;

/// How a slot is divided. It depends on the address where the slot was added, not on later moves: a mapping that moves
/// keeps its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripes {
    /// Address of the slot's first byte when it was added: borders are multiples of `len` there.
    origin: u64,
    /// Bytes of a stripe, a power of two.
    len: u64,
    /// How many userfaultfds take turns.
    queues: usize,
}

impl Stripes {
    /// Of a slot of `bytes` at `origin`.
    pub fn new(origin: u64, bytes: u64, granule: u64, queues: usize) -> Self {
        let len = (bytes / MOST).max(SHORTEST).max(granule).next_power_of_two();
        Self { origin, len, queues }
    }

    /// The queue of the byte at `offset` in the slot, and how far from there on it is the same one.
    pub fn at(&self, offset: u64) -> (usize, u64) {
        let at = self.origin + offset;
        let stripe = at / self.len;
        ((stripe % self.queues as u64) as usize, (stripe + 1) * self.len - at)
    }

    /// The pieces of `extent`: queue and addresses.
    pub fn pieces(stripes: Option<&Self>, extent: Extent) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = extent.len - done;
            if left == 0 {
                return None;
            }
            let (queue, same) = stripes.map_or((0, left), |stripes| stripes.at(extent.offset + done));
            let start = extent.hva + done;
            done += same.min(left);
            Some((queue, start..extent.hva + done))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn stripes_are_few_and_end_where_huge_pages_do() {
        for (bytes, granule, len) in [
            (4 * MIB, 4096, SHORTEST),
            (1024 * MIB, 4096, SHORTEST),
            (1025 * MIB, 4096, 2 * SHORTEST),
            (1 << 40, 4096, (1 << 40) / MOST),
            (4096 * MIB, 1 << 30, 1 << 30),
        ] {
            let stripes = Stripes::new(7 << 30, bytes, granule, 4);
            assert_eq!(stripes.len, len);
            assert!(bytes / stripes.len <= MOST);
        }
    }

    #[test]
    fn pieces_cover_an_extent_without_gap_and_take_turns() {
        // Not at a border: the first stripe is shorter.
        let origin = 5 * SHORTEST + 2 * MIB;
        let stripes = Stripes::new(origin, 100 * MIB, 4096, 3);
        let extent = Extent { offset: 0, len: 100 * MIB, hva: origin };
        let pieces: Vec<_> = Stripes::pieces(Some(&stripes), extent).collect();
        assert_eq!(pieces[0], (2, origin..6 * SHORTEST));
        assert!(pieces.windows(2).all(|p| p[0].1.end == p[1].1.start && (p[0].0 + 1) % 3 == p[1].0));
        assert!(pieces[1..].iter().all(|(_, range)| range.start % SHORTEST == 0));
        assert_eq!(pieces.last().unwrap().1.end, origin + 100 * MIB);
    }

    #[test]
    fn a_moved_mapping_keeps_its_queue() {
        let stripes = Stripes::new(0, 64 * MIB, 4096, 2);
        let moved = Extent { offset: SHORTEST - 4096, len: 8192, hva: 0x7000_0000 };
        let pieces: Vec<_> = Stripes::pieces(Some(&stripes), moved).collect();
        assert_eq!(pieces, [(0, 0x7000_0000..0x7000_1000), (1, 0x7000_1000..0x7000_2000)]);
        assert_eq!(stripes.at(SHORTEST), (1, SHORTEST));
    }

    #[test]
    fn one_userfaultfd_has_it_all() {
        let extent = Extent { offset: 0, len: 4096, hva: 0x1000 };
        assert_eq!(Stripes::pieces(None, extent).collect::<Vec<_>>(), [(0, 0x1000..0x2000)]);
    }
}
