//! The states of a stretch of pages that are not all in one: block by block, and page by page only where pages of a block
//! differ.

use std::ptr;

use super::{uniform_words, State, STATES};
use crate::sync::atomic::{AtomicPtr, AtomicU64, AtomicU8, Ordering};
use crate::sync::{lock, Mutex};

/// Words of a block: 256 bytes, which is as little as has a few per cent of overhead, for 4 MiB in pages of 4 KiB.
#[cfg(not(loom))]
pub const WORDS: usize = 32;
#[cfg(loom)]
pub const WORDS: usize = 1;

/// Blocks in the first segment of places: 4 KiB of them. The next has as many, and each that follows as all before it.
#[cfg(not(loom))]
const FIRST: usize = 16;
#[cfg(loom)]
const FIRST: usize = 1;

#[cfg(not(loom))]
const SEGMENTS: usize = 4;
#[cfg(loom)]
const SEGMENTS: usize = 1;

/// Blocks of a chunk.
pub const BLOCKS: usize = FIRST << (SEGMENTS - 1);

/// A block's byte is a state or a place.
const _: () = assert!(BLOCKS + STATES.len() <= 1 << u8::BITS);

/// Two bits a page.
pub type Block = [AtomicU64; WORDS];

/// What is known of a block, or of a chunk.
pub enum Held<T> {
    /// All of its pages are in this state.
    All(State),
    /// They are not, or were not once.
    Each(T),
}

/// The states of [`BLOCKS`] blocks. Blocks get places for their words in the order in which they need them, so that the
/// memory is for what was touched and not for what lies between, and they keep them.
pub struct Chunk {
    /// By block: below 4, the state of all of its pages. Else, less 4, its place.
    blocks: [AtomicU8; BLOCKS],
    /// Places, allocated as they are needed.
    segments: [AtomicPtr<Block>; SEGMENTS],
    /// How many places are taken.
    taken: Mutex<u8>,
}

impl Chunk {
    /// All pages in `state`.
    pub fn new(state: State) -> Box<Self> {
        Box::new(Self {
            blocks: std::array::from_fn(|_| AtomicU8::new(state as u8)),
            segments: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            taken: Mutex::new(0),
        })
    }

    /// What the pages of a block are in.
    pub fn block(&self, block: usize) -> Held<&Block> {
        match held(self.blocks[block].load(Ordering::Acquire)) {
            Held::All(state) => Held::All(state),
            Held::Each(place) => Held::Each(self.place(place)),
        }
    }

    /// Moves all pages of a block that are all in `from` to `to`. False: they are not.
    pub fn turn(&self, block: usize, from: State, to: State) -> bool {
        self.blocks[block].compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Gives a block words of its own, if it has none yet.
    pub fn split(&self, block: usize) -> &Block {
        let mut taken = lock(&self.taken);
        let mut now = self.blocks[block].load(Ordering::Acquire);
        loop {
            let state = match held(now) {
                Held::All(state) => state,
                Held::Each(place) => return self.place(place),
            };
            let words = self.new_place(*taken);
            // Nobody sees them before the block says where they are.
            words.iter().for_each(|word| word.store(uniform_words(state), Ordering::Relaxed));
            match self.blocks[block].compare_exchange(now, *taken + 4, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    *taken += 1;
                    return words;
                }
                // All of its pages went to another state just now.
                Err(other) => now = other,
            }
        }
    }

    /// A place that is taken, or that was made.
    fn place(&self, place: u8) -> &Block {
        let (segment, at) = segment_of(place);
        let first = self.segments[segment].load(Ordering::Acquire);
        // SAFETY: a place's segment was allocated by `new_place`, with room for it, before anybody could know of the place,
        // and is freed only by drop.
        unsafe { &*first.add(at) }
    }

    /// The place after those that are taken. By one thread at a time: with `taken` locked.
    fn new_place(&self, place: u8) -> &Block {
        let (segment, _) = segment_of(place);
        if self.segments[segment].load(Ordering::Acquire).is_null() {
            let none = || std::array::from_fn(|_| AtomicU64::new(0));
            let blocks: Box<[Block]> = (0..blocks_in(segment)).map(|_| none()).collect();
            self.segments[segment].store(Box::into_raw(blocks).cast(), Ordering::Release);
        }
        self.place(place)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        for (n, segment) in self.segments.iter().enumerate() {
            let first = segment.load(Ordering::Acquire);
            if !first.is_null() {
                // SAFETY: from Box::into_raw in `new_place`, with as many blocks; nobody else has a reference any more.
                drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(first, blocks_in(n))) });
            }
        }
    }
}

fn held(block: u8) -> Held<u8> {
    STATES.get(usize::from(block)).map_or_else(|| Held::Each(block - 4), |state| Held::All(*state))
}

fn blocks_in(segment: usize) -> usize {
    FIRST << segment.saturating_sub(1)
}

/// Which segment a place is in, and where in it.
fn segment_of(place: u8) -> (usize, usize) {
    let place = usize::from(place);
    match (place / FIRST).checked_ilog2() {
        None => (0, place),
        Some(doubled) => (doubled as usize + 1, place - (FIRST << doubled)),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_somewhere_else() {
        let places: Vec<_> = (0..BLOCKS as u8).map(segment_of).collect();
        let expected: Vec<_> = (0..SEGMENTS).flat_map(|s| (0..blocks_in(s)).map(move |at| (s, at))).collect();
        assert_eq!(places, expected);
    }

    #[test]
    fn blocks_that_are_split_at_once_get_a_place_each() {
        for round in 0..50 {
            let chunk = Chunk::new(State::Absent);
            std::thread::scope(|scope| {
                for n in 0..4 {
                    let chunk = &chunk;
                    scope.spawn(move || {
                        for block in 0..BLOCKS {
                            // Two of them meet at each block.
                            let block = (block + round * n / 2) % BLOCKS;
                            chunk.split(block)[n].store(1 + block as u64, Ordering::Relaxed);
                        }
                    });
                }
            });
            assert_eq!(usize::from(*lock(&chunk.taken)), BLOCKS);
            for block in 0..BLOCKS {
                let Held::Each(words) = chunk.block(block) else { panic!("block {block} has no words") };
                assert!((0..4).all(|n| words[n].load(Ordering::Relaxed) == 1 + block as u64));
            }
        }
    }

    #[test]
    fn a_block_that_was_turned_is_split_as_it_is() {
        let chunk = Chunk::new(State::Absent);
        assert!(chunk.turn(3, State::Absent, State::Removed) && !chunk.turn(3, State::Absent, State::Present));
        assert!(chunk.split(3).iter().all(|word| word.load(Ordering::Relaxed) == uniform_words(State::Removed)));
        assert!(!chunk.turn(3, State::Removed, State::Absent), "it has words now");
        assert!(matches!(chunk.block(2), Held::All(State::Absent)));
    }
}
