//! Memory of the host's as a source.

use std::ops::Range;
use std::ptr::NonNull;

use super::{Found, Source, Wanted};
use crate::memory::outside::read_host;

/// From here on.
pub struct Memory(*const u8);

// SAFETY: never looked behind but by the kernel; the header says how long it has to stay.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(at: *const u8) -> Self {
        Self(at)
    }

    fn at(&self, bytes: &Range<u64>) -> *const u8 {
        self.0.wrapping_add(bytes.start as usize)
    }
}

impl Source for Memory {
    fn find(&self, wanted: &Wanted) -> Found {
        Found::Memory(wanted.bytes.end - wanted.bytes.start, self.at(&wanted.bytes))
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), i32> {
        read_host(self.at(bytes), to, (bytes.end - bytes.start) as usize)
    }
}
