//! Memory for allocations that must not fail: the small ones of fixed size that Rust's standard library makes. The
//! standard library ends the process if there is no memory for one.
//!
//! With the feature `reserve`, which the C library is built with, [`Reserve`] is the library's allocator. It is malloc,
//! except that a small allocation for which malloc has no memory comes from 256 blocks of 512 bytes and 64 of 16 KiB.
//! These are part of the library and take no memory until they are used. Allocations that may fail do not use the
//! reserve ([`refusable`]), and `alloc::has_room` refuses a new handle or slot when less than half of the reserve is
//! left.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

use crate::sync::thread_local;

thread_local! {
    static REFUSABLE: Cell<bool> = const { Cell::new(false) };
    static NEEDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs an allocation that may fail, and so does not use the reserve.
pub fn refusable<T>(allocate: impl FnOnce() -> T) -> T {
    let before = REFUSABLE.replace(!NEEDED.get());
    let result = allocate();
    REFUSABLE.set(before);
    result
}

/// Runs a step that must not fail: its allocations that are refusable elsewhere may use the reserve too.
pub fn needed<T>(allocate: impl FnOnce() -> T) -> T {
    let before = NEEDED.replace(true);
    let result = allocate();
    NEEDED.set(before);
    result
}

/// Bytes of the largest allocation that the reserve serves, such as a service.
pub const LARGEST: usize = 16 << 10;

/// `WORDS` times 64 blocks of `BLOCK` bytes.
#[repr(C, align(4096))]
struct Blocks<const BLOCK: usize, const WORDS: usize> {
    bytes: UnsafeCell<[[[u8; BLOCK]; 64]; WORDS]>,
    /// A bit for each block that is taken.
    taken: [AtomicU64; WORDS],
}

// SAFETY: only the user that took a block accesses its bytes.
unsafe impl<const BLOCK: usize, const WORDS: usize> Sync for Blocks<BLOCK, WORDS> {}

impl<const BLOCK: usize, const WORDS: usize> Blocks<BLOCK, WORDS> {
    const fn new() -> Self {
        Self { bytes: UnsafeCell::new([[[0; BLOCK]; 64]; WORDS]), taken: [const { AtomicU64::new(0) }; WORDS] }
    }

    /// Takes a block. Null: the layout does not fit, or all blocks are taken.
    fn take(&self, layout: Layout) -> *mut u8 {
        if layout.size() > BLOCK || layout.align() > BLOCK {
            return ptr::null_mut();
        }
        for (word, taken) in self.taken.iter().enumerate() {
            let mut before = taken.load(Ordering::Relaxed);
            while before != u64::MAX {
                let bit = before.trailing_ones() as usize;
                match taken.compare_exchange_weak(before, before | 1 << bit, Ordering::Acquire, Ordering::Relaxed) {
                    Ok(_) => return self.bytes.get().cast::<u8>().wrapping_add((word * 64 + bit) * BLOCK),
                    Err(now) => before = now,
                }
            }
        }
        ptr::null_mut()
    }

    /// The number of the block at this address, if it is one of these.
    fn number(&self, at: *mut u8) -> Option<usize> {
        let offset = at.addr().wrapping_sub(self.bytes.get().addr());
        (offset < WORDS * 64 * BLOCK).then_some(offset / BLOCK)
    }

    /// Returns a block. False: the address is not one of these blocks.
    fn give_back(&self, at: *mut u8) -> bool {
        let Some(number) = self.number(at) else { return false };
        self.taken[number / 64].fetch_and(!(1 << (number % 64)), Ordering::Release);
        true
    }

    fn is_half_free(&self) -> bool {
        let taken: u32 = self.taken.iter().map(|taken| taken.load(Ordering::Relaxed).count_ones()).sum();
        taken as usize <= WORDS * 64 / 2
    }
}

/// Malloc, and blocks of two sizes.
pub struct Reserve {
    small: Blocks<512, 4>,
    large: Blocks<LARGEST, 1>,
}

impl Reserve {
    pub const fn new() -> Self {
        Self { small: Blocks::new(), large: Blocks::new() }
    }

    /// Whether the reserve has enough left for another handle or slot.
    pub fn is_half_free(&self) -> bool {
        self.small.is_half_free() && self.large.is_half_free()
    }

    fn take(&self, layout: Layout) -> *mut u8 {
        if REFUSABLE.get() {
            return ptr::null_mut();
        }
        let small = self.small.take(layout);
        if small.is_null() {
            self.large.take(layout)
        } else {
            small
        }
    }

    fn has(&self, at: *mut u8) -> bool {
        self.small.number(at).is_some() || self.large.number(at).is_some()
    }
}

// SAFETY: System's memory, or a block of the layout's size and alignment, which has no other user until it is returned.
unsafe impl GlobalAlloc for Reserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let at = unsafe { System.alloc(layout) };
        if at.is_null() {
            self.take(layout)
        } else {
            at
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let at = unsafe { System.alloc_zeroed(layout) };
        if !at.is_null() {
            return at;
        }
        let at = self.take(layout);
        if !at.is_null() {
            // SAFETY: a block of at least this size.
            unsafe { at.write_bytes(0, layout.size()) };
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if !self.small.give_back(at) && !self.large.give_back(at) {
            // SAFETY: not a block of the reserve, so System's; the caller's promise.
            unsafe { System.dealloc(at, layout) }
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !self.has(at) {
            // SAFETY: System's; the caller's promise.
            let grown = unsafe { System.realloc(at, layout, size) };
            if !grown.is_null() {
                return grown;
            }
        }
        // SAFETY: the caller promises that the size is right for this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: the caller promises that the size is not 0; both blocks have as many bytes; the old one is no longer
        // used.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                to.copy_from_nonoverlapping(at, layout.size().min(size));
                self.dealloc(at, layout);
            }
            to
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_one_user_at_a_time() {
        static RESERVE: Reserve = Reserve::new();
        let reserve = &RESERVE;
        let layout = Layout::from_size_align(200, 8).expect("a layout");
        let mut all: Vec<_> = std::iter::repeat_with(|| reserve.take(layout)).take_while(|at| !at.is_null()).collect();
        assert_eq!(all.len(), 5 * 64);
        assert!(all.iter().all(|at| at.addr() % 8 == 0) && !reserve.is_half_free());
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[1].addr() - pair[0].addr() >= 200));
        // SAFETY: taken above, with this layout.
        all.iter().for_each(|at| unsafe { reserve.dealloc(*at, layout) });
        assert!(reserve.is_half_free());
        assert!(reserve.take(Layout::new::<[u8; LARGEST + 1]>()).is_null());
    }

    #[test]
    fn a_block_grows_into_malloc() {
        static RESERVE: Reserve = Reserve::new();
        let reserve = &RESERVE;
        let layout = Layout::from_size_align(100, 8).expect("a layout");
        let at = reserve.take(layout);
        // SAFETY: 100 bytes, then 50_000, with their layouts.
        unsafe {
            at.write_bytes(7, 100);
            let grown = reserve.realloc(at, layout, 50_000);
            assert!(!reserve.has(grown) && std::slice::from_raw_parts(grown, 100).iter().all(|byte| *byte == 7));
            assert_eq!(reserve.take(layout), at);
            reserve.dealloc(grown, Layout::from_size_align_unchecked(50_000, 8));
        }
    }
}
