//! A source that reads the caller's memory.

use std::ops::Range;
use std::ptr::NonNull;

use super::{Check, Found, Source, Wanted};
use rustix::io::Errno;

use crate::caller::Keep;
use crate::error::{words, Failure};
use crate::os::usercopy::copy_nofault;

/// The address of the slot's first byte, and the owner of the memory.
pub struct Memory {
    at: *const u8,
    _keep: Option<Keep>,
}

// SAFETY: only the kernel reads at the address; the header says how long the memory has to stay.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(at: *const u8, keep: Option<Keep>) -> Self {
        Self { at, _keep: keep }
    }

    fn at(&self, bytes: &Range<u64>) -> *const u8 {
        self.at.wrapping_add(bytes.start as usize)
    }
}

impl Source for Memory {
    fn find(&self, wanted: &Wanted) -> Found {
        Found::Memory(wanted.bytes.end - wanted.bytes.start, self.at(&wanted.bytes))
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), Errno> {
        copy_nofault(self.at(bytes), to, (bytes.end - bytes.start) as usize)
    }
    fn each_memory(&self, bytes: &Range<u64>, check: &mut Check) -> std::result::Result<(), Errno> {
        check(self.at(bytes), bytes.end - bytes.start)
    }

    fn explain(&self, bytes: &Range<u64>) -> Option<Failure> {
        let (at, len) = (self.at(bytes), bytes.end - bytes.start);
        // The bytes of another layer may be those that failed.
        let unreadable = |offset| {
            let mut byte = 0_u8;
            copy_nofault(at.wrapping_add(offset), NonNull::from(&mut byte), 1).is_err()
        };
        let last = len.saturating_sub(1) as usize;
        (0..last).step_by(rustix::param::page_size()).chain([last]).any(unreadable).then(|| {
            Failure::new(Errno::FAULT, words!("the memory of its source, {len} bytes at {at:p}, is not readable"))
        })
    }
}
