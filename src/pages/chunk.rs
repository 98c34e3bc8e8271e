//! The states of a chunk of pages: kept by block, and by page only in a block whose pages differ.

use std::ptr;

use super::{uniform_words, State, STATES};
use crate::alloc::{try_box, try_collect, NoMemory};
use crate::sync::atomic::{AtomicPtr, AtomicU64, AtomicU8, Ordering};
use crate::sync::{lock, Mutex};

/// Words of a block: 256 bytes for 4 MiB of 4 KiB pages. A smaller block would cost more than a few per cent of
/// overhead.
#[cfg(not(loom))]
pub const WORDS: usize = 32;
#[cfg(loom)]
pub const WORDS: usize = 1;

/// Blocks in the first segment of places: 4 KiB. The second segment has as many, and each one after it as many as all
/// before it together.
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

/// The states of a block's or a chunk's pages.
pub enum Held<T> {
    /// All of its pages are in this state.
    All(State),
    /// The pages are in different states, or have been.
    Each(T),
}

/// The states of [`BLOCKS`] blocks. A block gets a place for its words when it first needs one and keeps it, so that
/// untouched blocks take no memory.
pub struct Chunk {
    /// By block: a value below 4 is the state of all its pages, any other value is its place plus 4.
    blocks: [AtomicU8; BLOCKS],
    /// The places, allocated as they are needed.
    segments: [AtomicPtr<Block>; SEGMENTS],
    /// How many places are taken.
    taken: Mutex<u8>,
}

impl Chunk {
    /// All pages in `state`.
    pub fn new(state: State) -> Result<Box<Self>, NoMemory> {
        try_box(Self {
            blocks: std::array::from_fn(|_| AtomicU8::new(state as u8)),
            segments: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            taken: Mutex::new(0),
        })
    }

    /// The states of a block's pages.
    pub fn block(&self, block: usize) -> Held<&Block> {
        match held(self.blocks[block].load(Ordering::Acquire)) {
            Held::All(state) => Held::All(state),
            Held::Each(place) => Held::Each(self.place(place)),
        }
    }

    /// Moves a block whose pages are all in `from` to `to`. False: they are not all in `from`.
    pub fn turn(&self, block: usize, from: State, to: State) -> bool {
        self.blocks[block].compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Gives a block words of its own, if it has none yet.
    pub fn split(&self, block: usize) -> Result<&Block, NoMemory> {
        // Look without the lock first: every fault comes here, and most find that the block has words already.
        if let Held::Each(words) = self.block(block) {
            return Ok(words);
        }
        let mut taken = lock(&self.taken);
        let mut now = self.blocks[block].load(Ordering::Acquire);
        loop {
            let state = match held(now) {
                Held::All(state) => state,
                Held::Each(place) => return Ok(self.place(place)),
            };
            let words = self.new_place(*taken)?;
            // No other thread sees the words before the block's byte names their place.
            words.iter().for_each(|word| word.store(uniform_words(state), Ordering::Relaxed));
            match self.blocks[block].compare_exchange(now, *taken + 4, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    *taken += 1;
                    return Ok(words);
                }
                // Another thread has just moved all of the block's pages to another state.
                Err(other) => now = other,
            }
        }
    }

    /// A place that is taken, or that `new_place` has made.
    fn place(&self, place: u8) -> &Block {
        let (segment, at) = segment_of(place);
        let first = self.segments[segment].load(Ordering::Acquire);
        // SAFETY: `new_place` allocated the segment, with room for this place, before any thread could know the place;
        // only drop frees it.
        unsafe { &*first.add(at) }
    }

    /// The place after those that are taken. The caller holds the lock on `taken`.
    fn new_place(&self, place: u8) -> Result<&Block, NoMemory> {
        let (segment, _) = segment_of(place);
        if self.segments[segment].load(Ordering::Acquire).is_null() {
            let none = || -> Block { std::array::from_fn(|_| AtomicU64::new(0)) };
            let blocks = try_collect((0..blocks_in(segment)).map(|_| none()))?.into_boxed_slice();
            self.segments[segment].store(Box::into_raw(blocks).cast(), Ordering::Release);
        }
        Ok(self.place(place))
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        for (n, segment) in self.segments.iter().enumerate() {
            let first = segment.load(Ordering::Acquire);
            if !first.is_null() {
                // SAFETY: from Box::into_raw in `new_place`, with as many blocks; `&mut self` shows that no reference
                // to it is left.
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

/// The segment of a place, and its index there.
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
    use crate::sync::thread;

    #[test]
    fn every_place_has_its_own_address() {
        let places: Vec<_> = (0..BLOCKS as u8).map(segment_of).collect();
        let expected: Vec<_> = (0..SEGMENTS).flat_map(|s| (0..blocks_in(s)).map(move |at| (s, at))).collect();
        assert_eq!(places, expected);
    }

    #[test]
    fn blocks_split_at_the_same_time_get_a_place_each() {
        for round in 0..50 {
            let chunk = Chunk::new(State::Absent).expect("memory");
            thread::scope(|scope| {
                for n in 0..4 {
                    let chunk = &chunk;
                    scope.spawn(move || {
                        for block in 0..BLOCKS {
                            // Two threads meet at each block.
                            let block = (block + round * n / 2) % BLOCKS;
                            chunk.split(block).expect("memory")[n].store(1 + block as u64, Ordering::Relaxed);
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
    fn splitting_a_turned_block_keeps_its_state() {
        let chunk = Chunk::new(State::Absent).expect("memory");
        assert!(chunk.turn(3, State::Absent, State::Removed) && !chunk.turn(3, State::Absent, State::Present));
        assert!(chunk
            .split(3)
            .expect("memory")
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == uniform_words(State::Removed)));
        assert!(!chunk.turn(3, State::Removed, State::Absent), "it has words now");
        assert!(matches!(chunk.block(2), Held::All(State::Absent)));
    }
}
