//! Built-in page sources: where the pages of a slot come from without a callback.
//!
//! A source is asked twice for each run. [`Source::find`] says what is known without reading; [`Source::read`] reads, if
//! the bytes have to be in a buffer (or in the page itself). What follows is the service's, as with a callback.

mod file;
mod memory;

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};

/// A source as `kuf_add_memory` is given it, with what can be checked without the kernel checked.
#[derive(Clone, Copy)]
pub enum NewSource {
    File {
        fd: i32,
        /// Of the slot's first byte, in the file.
        offset: u64,
        /// Past the page cache.
        direct: bool,
    },
    Memory {
        /// The slot's first byte.
        at: *const u8,
    },
    Zero,
}

/// What is wanted of a source.
pub struct Wanted {
    /// Offsets in the slot, in whole granules, never empty.
    pub bytes: Range<u64>,
    pub granule: u64,
    /// The kernel will copy them from wherever they are; else they are needed in a certain place.
    pub copied: bool,
    /// Somebody waits.
    pub demand: bool,
}

/// What is known of them. Lengths are in whole granules, from the start of what is wanted and not beyond its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// They are zero.
    Zero(u64),
    /// They are in memory, as far as it is readable.
    Memory(u64, *const u8),
    /// They are to be read.
    Unread(u64),
}

/// Where the pages of a slot come from.
pub trait Source: Send + Sync {
    /// What is known without reading.
    fn find(&self, wanted: &Wanted) -> Found;

    /// Writes `bytes` (offsets in the slot) to `to`. Err is an errno.
    ///
    /// # Safety
    /// `to` has room for them, and nobody else uses it meanwhile.
    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), i32>;
}

/// Opens a source for a slot of `len` bytes.
pub fn open(new: NewSource, len: u64) -> Result<Arc<dyn Source>> {
    Ok(match new {
        NewSource::File { fd, offset, direct } => Arc::new(file::File::open(fd, offset, len, direct)?),
        NewSource::Memory { at } => Arc::new(memory::Memory::new(at)),
        NewSource::Zero => Arc::new(Zero),
    })
}

/// Nothing but zeroes.
struct Zero;

impl Source for Zero {
    fn find(&self, wanted: &Wanted) -> Found {
        Found::Zero(wanted.bytes.end - wanted.bytes.start)
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), i32> {
        // SAFETY: the caller's promise.
        unsafe { to.write_bytes(0, (bytes.end - bytes.start) as usize) };
        Ok(())
    }
}

/// A source that ends before its slot does.
fn too_short(what: &str, has: u64, offset: u64, len: u64) -> Error {
    let text =
        format!("source: {what} holds {has:#x} bytes, fewer than source->offset {offset:#x} + the slot's len {len:#x}");
    Error::new(libc::EINVAL, text)
}

/// As [`too_short`], for who checks it elsewhere.
pub fn check_len(what: &str, has: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= has => Ok(()),
        _ => Err(too_short(what, has, offset, len)),
    }
}
