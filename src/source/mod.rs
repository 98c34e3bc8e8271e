//! Built-in page sources, which fill the pages of a slot without a callback.
//!
//! The service asks a source two or three times for each run. [`Source::find`] answers without reading;
//! [`Source::read`] reads, if that is the only way to the bytes; [`Source::still_has`] tells whether the source had
//! them all. The service installs them, as after a callback.
//!
//! **No lock that a thread blocked on guest memory can hold.** A thread that writes guest memory to the source's own
//! file (a snapshot over the file that is served) holds the file's lock in the kernel while it waits for a page. A fill
//! that asks for that lock waits for ever: lseek with SEEK_DATA, read(2) and direct I/O take it on many file systems,
//! MADV_WILLNEED on some.

mod file;
mod memory;

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::caller::Keep;
use crate::error::{words, Error, Failure, Result};
use crate::sync::Arc;

/// A source as passed to `kuf_add_memory`, after the checks that need no system call.
pub enum NewSource {
    File {
        fd: i32,
        /// The offset of the slot's first byte in the file.
        offset: u64,
        /// Reads bypass the page cache.
        direct: bool,
    },
    Memory {
        /// The address of the slot's first byte.
        at: *const u8,
        /// The owner of the memory, if it is to be kept.
        keep: Option<Keep>,
    },
    Zero,
}

/// A request to a source.
pub struct Wanted {
    /// Offsets in the slot, in whole granules, never empty.
    pub bytes: Range<u64>,
    pub granule: u64,
    /// A thread waits for the bytes.
    pub demand: bool,
}

/// The answer to a request. Lengths are in whole granules, from the start of the wanted bytes and not beyond their end.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The bytes are zero.
    Zero(u64),
    /// The bytes are in memory, as far as it is readable.
    Memory(u64, *const u8),
    /// The bytes are to be read.
    Unread(u64),
}

/// The source of a slot's pages.
pub trait Source: Send + Sync {
    /// Finds the wanted bytes without reading.
    fn find(&self, wanted: &Wanted) -> Found;

    /// Writes `bytes` (offsets in the slot) to `to`. Err is an errno.
    ///
    /// # Safety
    /// `to` has room for the bytes, and no other thread uses it meanwhile.
    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), Errno>;

    /// How many of `bytes`, from their start, the source has now. The service asks after it has the bytes and before it
    /// installs them, for missing bytes may have looked like zeroes.
    fn still_has(&self, bytes: &Range<u64>) -> u64 {
        bytes.end - bytes.start
    }

    /// Why `bytes` could not be read, if the source can tell.
    fn explain(&self, bytes: &Range<u64>) -> Option<Failure>;
}

/// Opens a source for a slot of `len` bytes.
pub fn open(new: &NewSource, len: u64) -> Result<Arc<dyn Source>> {
    Ok(match new {
        NewSource::File { fd, offset, direct } => Arc::new(file::File::open(*fd, *offset, len, *direct)?),
        NewSource::Memory { at, keep } => Arc::new(memory::Memory::new(*at, keep.clone())),
        NewSource::Zero => Arc::new(Zero),
    })
}

/// A source of zeroes.
struct Zero;

impl Source for Zero {
    fn find(&self, wanted: &Wanted) -> Found {
        Found::Zero(wanted.bytes.end - wanted.bytes.start)
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { to.write_bytes(0, (bytes.end - bytes.start) as usize) };
        Ok(())
    }

    fn explain(&self, _bytes: &Range<u64>) -> Option<Failure> {
        None
    }
}

/// The error of a source that ends before its slot.
fn too_short(what: &str, has: u64, offset: u64, len: u64) -> Error {
    let text =
        words!("source: {what} holds {has:#x} bytes, fewer than source->offset {offset:#x} + the slot's len {len:#x}");
    Error::new(Errno::INVAL, text)
}

/// Returns [`too_short`] if a source of `has` bytes ends before its slot.
pub fn check_len(what: &str, has: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= has => Ok(()),
        _ => Err(too_short(what, has, offset, len)),
    }
}
