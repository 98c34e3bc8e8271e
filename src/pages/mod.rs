//! Page states: two bits a page in atomic words, for the blocks of pages that are not all in one state.
//!
//! Two levels stand above the words. A chunk of pages that are all in one state is one pointer-sized tag, so an
//! untouched terabyte costs a directory of 16 KiB, and a terabyte that is removed as a whole costs no more. In a chunk
//! with a touched page, each block of pages in one state is a byte (`chunk.rs`), and a block with pages in different
//! states takes 256 bytes.

mod chunk;
pub mod claims;
#[cfg(not(loom))]
pub mod readahead;

use std::ops::Range;
use std::ptr;

use crate::alloc::{patiently, try_collect, NoMemory};
use crate::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use chunk::{Block, Chunk, Held, BLOCKS, WORDS};

/// The content of a page, which decides what may be written to its place in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The page holds nothing yet: the source has its bytes.
    Absent = 0,
    /// A claim owns the page: see [`claims`].
    Filling = 1,
    /// The page holds its bytes.
    Present = 2,
    /// The guest gave the page back, or it was unmapped: it is zero at the next touch, and the source is not asked.
    Removed = 3,
}

const STATES: [State; 4] = [State::Absent, State::Filling, State::Present, State::Removed];

const PER_WORD: u64 = 32;
const PER_BLOCK: u64 = PER_WORD * WORDS as u64;
const PER_CHUNK: u64 = PER_BLOCK * BLOCKS as u64;
/// The low bit of each page's pair.
const LOW: u64 = 0x5555_5555_5555_5555;

/// The states of one slot's pages.
pub struct Pages {
    len: u64,
    /// The directory. Below 4: every page of the chunk is in that state. Else a `Box<Chunk>`.
    chunks: Box<[AtomicPtr<Chunk>]>,
    counts: [AtomicU64; 4],
}

impl Pages {
    /// `len` pages, all absent.
    pub fn new(len: u64) -> Result<Self, NoMemory> {
        let chunks = (0..len.div_ceil(PER_CHUNK)).map(|_| AtomicPtr::new(tag(State::Absent)));
        Ok(Self {
            len,
            chunks: try_collect(chunks)?.into_boxed_slice(),
            counts: [AtomicU64::new(len), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    /// Gives each block of `range` words of its own, so that no change of state within it needs memory.
    pub fn reserve(&self, range: Range<u64>) -> Result<(), NoMemory> {
        let mut page = range.start;
        while page < range.end {
            match self.chunk(page) {
                Held::All(state) => self.split(page, state)?,
                Held::Each(chunk) => {
                    chunk.split(block_in_chunk(page))?;
                    page = self.block_end(page);
                }
            }
        }
        Ok(())
    }

    /// Makes room for a change of state of all of `range`: only the blocks at its two ends may need words.
    pub fn reserve_ends(&self, range: &Range<u64>) -> Result<(), NoMemory> {
        for at in [range.start, range.end] {
            if at % PER_BLOCK != 0 && at < self.len {
                self.reserve(at..at + 1)?;
            }
        }
        Ok(())
    }

    /// Number of pages.
    pub fn total(&self) -> u64 {
        self.len
    }

    /// Pages in `state` now.
    pub fn count(&self, state: State) -> u64 {
        self.counts[state as usize].load(Ordering::Relaxed)
    }

    /// Whether every page is present or removed. The caller holds the lock on the slot's claims: a page that moves from
    /// one state to another counts in neither meanwhile.
    pub fn whole(&self) -> bool {
        self.count(State::Absent) == 0 && self.count(State::Filling) == 0
    }

    /// The state of `page`.
    pub fn get(&self, page: u64) -> State {
        STATES[(self.word(page) >> (page % PER_WORD * 2) & 3) as usize]
    }

    /// Moves every page of `range` that is in `from` to `to`, each by compare-and-swap. Returns how many.
    ///
    /// The caller reserves the memory for it before. Pages of a block for which there is no memory stay as they are.
    pub fn transition(&self, range: Range<u64>, from: State, to: State) -> u64 {
        debug_assert!(range.end <= self.len);
        let mut moved = 0;
        let mut page = range.start;
        // A compare-and-swap that fails, because another thread changed this chunk, is retried.
        while page < range.end {
            let whole = page % PER_CHUNK == 0 && range.end >= self.chunk_end(page);
            match self.chunk(page) {
                Held::All(state) if state != from => page = self.chunk_end(page),
                Held::All(_) if whole => {
                    let turned =
                        self.directory(page).compare_exchange(tag(from), tag(to), Ordering::AcqRel, Ordering::Acquire);
                    if turned.is_ok() {
                        moved += self.chunk_end(page) - page;
                        page = self.chunk_end(page);
                    }
                }
                Held::All(state) => {
                    if patiently(|| self.split(page, state)).is_err() {
                        page = self.chunk_end(page);
                    }
                }
                Held::Each(chunk) => {
                    let end = range.end.min(self.block_end(page));
                    moved += self.transition_in(chunk, page..end, from, to);
                    page = end;
                }
            }
        }
        if moved > 0 && from != to {
            self.counts[from as usize].fetch_sub(moved, Ordering::AcqRel);
            self.counts[to as usize].fetch_add(moved, Ordering::AcqRel);
        }
        moved
    }

    /// The same within one block.
    fn transition_in(&self, chunk: &Chunk, range: Range<u64>, from: State, to: State) -> u64 {
        let block = block_in_chunk(range.start);
        let whole = range.start % PER_BLOCK == 0 && range.end == self.block_end(range.start);
        let words = loop {
            match chunk.block(block) {
                Held::All(state) if state != from => return 0,
                Held::All(_) if whole => {
                    if chunk.turn(block, from, to) {
                        return range.end - range.start;
                    }
                }
                Held::All(_) => match patiently(|| chunk.split(block)) {
                    Ok(words) => break words,
                    Err(NoMemory) => return 0,
                },
                Held::Each(words) => break words,
            }
        };
        let (mut moved, mut page) = (0, range.start);
        while page < range.end {
            let end = range.end.min((page / PER_WORD + 1) * PER_WORD);
            moved += swap_word(&words[word_in_block(page)], mask(page, end), from, to);
            page = end;
        }
        moved
    }

    /// The first run of pages in `state` within `range`, at most `max` pages of it.
    pub fn first_run(&self, range: Range<u64>, state: State, max: u64) -> Option<Range<u64>> {
        let start = self.scan(range.clone(), |s| s == state)?;
        let limit = range.end.min(start.saturating_add(max));
        let end = self.scan(start..limit, |s| s != state).unwrap_or(limit);
        Some(start..end)
    }

    /// The first page of `range` that is absent or being filled.
    pub fn first_open(&self, range: Range<u64>) -> Option<u64> {
        self.scan(range, |s| matches!(s, State::Absent | State::Filling))
    }

    /// How many of the pages around `page` (an aligned stretch of 32, with it) are present or being filled.
    pub fn asked_around(&self, page: u64) -> u32 {
        let word = self.word(page);
        (matches(word, State::Present) | matches(word, State::Filling)).count_ones()
    }

    /// The pages around `page` that are in its state, within `window`, which has `page` in it and nothing of another
    /// aligned stretch of 32.
    pub fn alike_around(&self, page: u64, window: &Range<u64>) -> Range<u64> {
        let word = self.word(page);
        let at = page % PER_WORD * 2;
        // A bit for each page of the window that is in another state.
        let others = mask(window.start, window.end) & !matches(word, STATES[(word >> at & 3) as usize]);
        let (below, above) = (others & ((1 << at) - 1), others >> at);
        let start = if below == 0 { window.start } else { page - page % PER_WORD + u64::from(below.ilog2()) / 2 + 1 };
        let end = if above == 0 { window.end } else { page + u64::from(above.trailing_zeros()) / 2 };
        start..end
    }

    /// The run of pages in the state of `page` that has `page` in it, within `range`.
    pub fn run_around(&self, page: u64, range: &Range<u64>) -> Range<u64> {
        let state = self.get(page);
        let word = |page: u64| {
            let start = page - page % PER_WORD;
            start.max(range.start)..(start + PER_WORD).min(range.end)
        };
        let mut run = self.alike_around(page, &word(page));
        while run.start > range.start && run.start % PER_WORD == 0 && self.get(run.start - 1) == state {
            run.start = self.alike_around(run.start - 1, &word(run.start - 1)).start;
        }
        run.end = self.scan(run.end..range.end, |other| other != state).unwrap_or(range.end);
        run
    }

    /// The first page of `range` whose state `wanted` accepts.
    fn scan(&self, range: Range<u64>, wanted: impl Fn(State) -> bool) -> Option<u64> {
        let accept = STATES.map(&wanted);
        let mut page = range.start;
        while page < range.end {
            let (held, uniform_to) = match self.chunk(page) {
                Held::All(state) => (Held::All(state), self.chunk_end(page)),
                Held::Each(chunk) => (chunk.block(block_in_chunk(page)), self.block_end(page)),
            };
            let words = match held {
                Held::All(state) if accept[state as usize] => return Some(page),
                Held::All(_) => {
                    page = uniform_to;
                    continue;
                }
                Held::Each(words) => words,
            };
            let end = range.end.min((page / PER_WORD + 1) * PER_WORD);
            let word = words[word_in_block(page)].load(Ordering::Acquire);
            let hits = STATES.iter().filter(|s| accept[**s as usize]).fold(0, |hits, s| hits | matches(word, *s));
            let hits = hits & mask(page, end);
            if hits != 0 {
                return Some(page / PER_WORD * PER_WORD + u64::from(hits.trailing_zeros()) / 2);
            }
            page = end;
        }
        None
    }

    /// Where the chunk that has `page` ends.
    fn chunk_end(&self, page: u64) -> u64 {
        self.len.min((page / PER_CHUNK + 1) * PER_CHUNK)
    }

    fn block_end(&self, page: u64) -> u64 {
        self.len.min((page / PER_BLOCK + 1) * PER_BLOCK)
    }

    fn directory(&self, page: u64) -> &AtomicPtr<Chunk> {
        &self.chunks[(page / PER_CHUNK) as usize]
    }

    fn chunk(&self, page: u64) -> Held<&Chunk> {
        let chunk = self.directory(page).load(Ordering::Acquire);
        // SAFETY: not a tag, so it came from Box::into_raw in `split` and is freed only by drop.
        uniform(chunk).map_or_else(|| Held::Each(unsafe { &*chunk }), Held::All)
    }

    /// The word that has `page` in it.
    fn word(&self, page: u64) -> u64 {
        let held: Held<&Block> = match self.chunk(page) {
            Held::All(state) => Held::All(state),
            Held::Each(chunk) => chunk.block(block_in_chunk(page)),
        };
        match held {
            Held::All(state) => uniform_words(state),
            Held::Each(words) => words[word_in_block(page)].load(Ordering::Acquire),
        }
    }

    /// Gives the chunk of `page`, whose pages were all in `state`, a table of its own, unless another thread has done
    /// so.
    fn split(&self, page: u64, state: State) -> Result<(), NoMemory> {
        let made = Box::into_raw(Chunk::new(state)?);
        let put = self.directory(page).compare_exchange(tag(state), made, Ordering::AcqRel, Ordering::Acquire);
        if put.is_err() {
            // SAFETY: made a moment ago; no other thread has seen it.
            drop(unsafe { Box::from_raw(made) });
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            let chunk = chunk.load(Ordering::Acquire);
            if uniform(chunk).is_none() {
                // SAFETY: not a tag, so it came from Box::into_raw; `&mut self` shows that no reference to it is left.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
    }
}

fn tag(state: State) -> *mut Chunk {
    ptr::without_provenance_mut(state as usize)
}

fn uniform(chunk: *mut Chunk) -> Option<State> {
    STATES.get(chunk.addr()).copied()
}

fn block_in_chunk(page: u64) -> usize {
    (page / PER_BLOCK % BLOCKS as u64) as usize
}

fn word_in_block(page: u64) -> usize {
    (page / PER_WORD % WORDS as u64) as usize
}

/// A word of pages that are all in `state`.
fn uniform_words(state: State) -> u64 {
    LOW * state as u64
}

/// Low bits of the pages of a word that are in `state`.
fn matches(word: u64, state: State) -> u64 {
    let differs = word ^ uniform_words(state);
    !(differs | differs >> 1) & LOW
}

/// Low bits of the pages `start..end`, all within one word.
fn mask(start: u64, end: u64) -> u64 {
    let pages = end - start;
    let bits = if pages == PER_WORD { u64::MAX } else { (1 << (pages * 2)) - 1 };
    (bits << (start % PER_WORD * 2)) & LOW
}

fn swap_word(word: &AtomicU64, mask: u64, from: State, to: State) -> u64 {
    let mut now = word.load(Ordering::Acquire);
    loop {
        let hits = matches(now, from) & mask;
        if hits == 0 {
            return 0;
        }
        let new = (now & !(hits * 3)) | (hits * to as u64);
        match word.compare_exchange_weak(now, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return u64::from(hits.count_ones()),
            Err(other) => now = other,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn new_pages_are_absent_and_counted() {
        let pages = Pages::new(100_000).expect("memory");
        assert_eq!(pages.count(State::Absent), 100_000);
        assert_eq!(pages.get(99_999), State::Absent);
        assert_eq!(pages.first_run(0..100_000, State::Absent, u64::MAX), Some(0..100_000));
        assert_eq!(pages.first_run(0..100_000, State::Present, u64::MAX), None);
    }

    #[test]
    fn transition_moves_only_pages_in_from() {
        let pages = Pages::new(PER_CHUNK * 3 + 7).expect("memory");
        assert_eq!(pages.transition(5..70, State::Absent, State::Filling), 65);
        assert_eq!(pages.transition(0..100, State::Filling, State::Present), 65);
        assert_eq!(pages.transition(0..100, State::Absent, State::Removed), 35);
        assert_eq!(pages.get(4), State::Removed);
        assert_eq!(pages.get(5), State::Present);
        assert_eq!(pages.get(69), State::Present);
        assert_eq!(pages.get(70), State::Removed);
        assert_eq!(pages.first_run(0..200, State::Present, 10), Some(5..15));
        assert_eq!(pages.count(State::Present), 65);
        assert_eq!(pages.count(State::Absent), PER_CHUNK * 3 + 7 - 100);
    }

    #[test]
    fn whole_chunks_need_no_memory_and_can_be_split_later() {
        let pages = Pages::new(PER_CHUNK * 4 + 9).expect("memory");
        assert_eq!(pages.transition(0..PER_CHUNK * 4 + 9, State::Absent, State::Removed), PER_CHUNK * 4 + 9);
        assert!(pages.chunks.iter().all(|c| uniform(c.load(Ordering::Acquire)) == Some(State::Removed)));
        assert_eq!(pages.transition(PER_CHUNK..PER_CHUNK + 1, State::Removed, State::Present), 1);
        assert_eq!(pages.get(PER_CHUNK), State::Present);
        assert_eq!(pages.get(PER_CHUNK + 1), State::Removed);
        assert_eq!(pages.first_run(0..pages.total(), State::Present, u64::MAX), Some(PER_CHUNK..PER_CHUNK + 1));
    }

    #[test]
    fn touched_blocks_alone_take_memory() {
        let pages = Pages::new(PER_CHUNK * 3).expect("memory");
        let blocks = |pages: &Pages| -> usize {
            let split = |chunk: u64, block| match pages.chunk(chunk * PER_CHUNK) {
                Held::All(_) => false,
                Held::Each(chunk) => matches!(chunk.block(block), Held::Each(_)),
            };
            (0..3).map(|chunk| (0..BLOCKS).filter(|block| split(chunk, *block)).count()).sum()
        };
        // Scattered pages take one block each, and the blocks between take none.
        for n in 0..20 {
            let page = PER_CHUNK + n * PER_BLOCK * 3 + 5;
            assert_eq!(pages.transition(page..page + 1, State::Absent, State::Filling), 1);
            assert_eq!(pages.transition(page..page + 1, State::Filling, State::Present), 1);
        }
        assert_eq!(blocks(&pages), 20);
        // Whole blocks need no words, wherever they are.
        let whole = PER_CHUNK * 2 - PER_BLOCK * 2..PER_CHUNK * 2 + PER_BLOCK * 3;
        assert_eq!(pages.transition(whole.clone(), State::Absent, State::Removed), PER_BLOCK * 5);
        assert_eq!(blocks(&pages), 20);
        assert_eq!(pages.first_run(0..pages.total(), State::Removed, u64::MAX), Some(whole));
        // A range that begins and ends within blocks needs words for these two.
        let range = PER_CHUNK * 2 + PER_BLOCK * 4 + 1..PER_CHUNK * 2 + PER_BLOCK * 7 - 1;
        assert_eq!(pages.transition(range.clone(), State::Absent, State::Present), PER_BLOCK * 3 - 2);
        assert_eq!(blocks(&pages), 22);
        assert_eq!(pages.first_run(PER_CHUNK * 2..pages.total(), State::Present, u64::MAX), Some(range));
        assert!(pages.chunks.first().is_some_and(|c| uniform(c.load(Ordering::Acquire)) == Some(State::Absent)));
    }

    #[test]
    fn a_reserved_range_needs_no_memory() {
        let words = |pages: &Pages, page| match pages.chunk(page) {
            Held::All(_) => false,
            Held::Each(chunk) => matches!(chunk.block(block_in_chunk(page)), Held::Each(_)),
        };
        let has_words = |pages: &Pages| (0..6).filter(|n| words(pages, n * PER_BLOCK)).collect::<Vec<_>>();
        let pages = Pages::new(PER_CHUNK * 2 + 9).expect("memory");
        pages.reserve(PER_BLOCK - 1..PER_BLOCK * 2 + 1).expect("memory");
        assert_eq!(has_words(&pages), [0, 1, 2]);
        assert_eq!(pages.count(State::Absent), pages.total());
        let pages = Pages::new(PER_CHUNK * 2 + 9).expect("memory");
        pages.reserve_ends(&(PER_BLOCK - 1..PER_BLOCK * 3)).expect("memory");
        pages.reserve_ends(&(PER_BLOCK * 4..PER_BLOCK * 5 + 1)).expect("memory");
        pages.reserve_ends(&(0..pages.total())).expect("memory");
        assert_eq!(has_words(&pages), [0, 5]);
        assert_eq!(Pages::new(u64::MAX).err(), Some(NoMemory));
    }

    #[test]
    fn finds_pages_of_the_same_state_around_a_page() {
        let pages = Pages::new(PER_CHUNK + 40).expect("memory");
        assert_eq!(pages.alike_around(7, &(0..16)), 0..16);
        assert_eq!(pages.asked_around(7), 0);
        for (page, state) in [(3, State::Present), (9, State::Filling), (12, State::Removed), (31, State::Present)] {
            pages.transition(page..page + 1, State::Absent, state);
        }
        pages.transition(32..40, State::Absent, State::Present);
        assert_eq!(pages.asked_around(0), 3, "removed does not count, nor does what is in the next 32");
        assert_eq!(pages.alike_around(7, &(0..16)), 4..9);
        assert_eq!(pages.alike_around(0, &(0..16)), 0..3);
        assert_eq!(pages.alike_around(10, &(0..16)), 10..12);
        assert_eq!(pages.alike_around(15, &(0..16)), 13..16);
        assert_eq!(pages.alike_around(16, &(16..32)), 16..31);
        assert_eq!(pages.alike_around(31, &(16..32)), 31..32);
        assert_eq!(pages.alike_around(35, &(32..48)), 32..40);
        let last = PER_CHUNK + 32;
        assert_eq!(pages.alike_around(last + 3, &(last..last + 8)), last..last + 8);
    }

    #[test]
    fn agrees_with_a_plain_array_under_random_transitions() {
        const LEN: u64 = PER_CHUNK + PER_BLOCK + 1_000;
        let pages = Pages::new(LEN).expect("memory");
        let mut model = vec![State::Absent; LEN as usize];
        let mut random = crate::testing::random();
        for round in 0..3_000 {
            // Some ranges lie within a block or two, some are whole blocks, and some are about a chunk.
            let (start, len) = match round % 50 {
                0 => (random(3) * PER_BLOCK, PER_CHUNK),
                1..10 => (random(BLOCKS as u64) * PER_BLOCK, (1 + random(4)) * PER_BLOCK),
                _ => (random(LEN), 1 + random(300)),
            };
            let end = (start + len).min(LEN);
            let (from, to) = (STATES[random(4) as usize], STATES[random(4) as usize]);
            let mut moved = 0;
            for state in &mut model[start as usize..end as usize] {
                if *state == from {
                    *state = to;
                    moved += 1;
                }
            }
            assert_eq!(pages.transition(start..end, from, to), moved);
            let at = random(LEN);
            assert_eq!(pages.get(at), model[at as usize]);
            assert_eq!(pages.first_open(at..LEN).map(|p| model[p as usize]), {
                let open = |s: &&State| matches!(s, State::Absent | State::Filling);
                model[at as usize..].iter().find(open).copied()
            });
            let (window, state) = (at.saturating_sub(300)..(at + 300).min(LEN), model[at as usize]);
            let run = pages.run_around(at, &window);
            assert!(run.contains(&at) && run.clone().all(|p| model[p as usize] == state));
            assert!(run.start == window.start || model[run.start as usize - 1] != state);
            assert!(run.end == window.end || model[run.end as usize] != state);
            let run = pages.first_run(at..LEN, from, 50);
            let first = (at..LEN).find(|p| model[*p as usize] == from);
            assert_eq!(run.as_ref().map(|r| r.start), first);
            if let Some(run) = run {
                assert!(run.clone().all(|p| model[p as usize] == from));
                assert!(run.end - run.start == 50 || run.end == LEN || model[run.end as usize] != from);
            }
        }
        for state in STATES {
            assert_eq!(pages.count(state), model.iter().filter(|s| **s == state).count() as u64);
        }
    }
}
