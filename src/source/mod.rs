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
mod layers;
mod memory;
mod page_bitmap;

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use self::file::{File, Holes};
use self::layers::{Layer, Layers};
pub use self::page_bitmap::PageBitmap;
use crate::alloc::{try_box, try_collect};
use crate::caller::Keep;
use crate::error::{words, Error, Failure, Result};
use crate::sync::Arc;

/// Pages of guests are at least as large, and so are the blocks of a difference between two states of a guest.
pub const SMALLEST_PAGE: u64 = 4096;

/// A source as passed to `kuf_add_memory`, after the checks that need no system call: its layers, from the uppermost down.
/// What none of them has is zero.
pub struct NewSource(pub Vec<NewLayer>);

/// A layer of a source.
pub struct NewLayer {
    pub kind: Kind,
    /// The bytes of the slot that it may have.
    pub part: Range<u64>,
    /// Which of them it has. None: all; of a file that is not the lowest layer, those that are no hole.
    pub bitmap: Option<PageBitmap>,
}

/// Where the bytes of a layer come from.
pub enum Kind {
    File {
        fd: i32,
        /// The offset of the layer's first byte in the file.
        offset: u64,
        /// Reads bypass the page cache.
        direct: bool,
    },
    Memory {
        /// The address of the layer's first byte.
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

    /// Calls `check` for the memory of this process that [`Source::read`] would read for `bytes`, as far as the caller owns
    /// it: it may be guest memory.
    fn each_memory(&self, _bytes: &Range<u64>, _check: &mut Check) -> std::result::Result<(), Errno> {
        Ok(())
    }

    /// Why `bytes` could not be read, if the source can tell.
    fn explain(&self, bytes: &Range<u64>) -> Option<Failure>;
}

/// Looks at memory of the caller's before it is read: its address and length.
pub type Check<'a> = dyn FnMut(*const u8, u64) -> std::result::Result<(), Errno> + 'a;

/// Opens a source for a slot of `len` bytes.
pub fn open(new: &NewSource, len: u64) -> Result<Arc<dyn Source>> {
    if let [NewLayer { kind, part, bitmap: None }] = new.0.as_slice() {
        if *part == (0..len) {
            return Ok(match kind {
                Kind::File { fd, offset, direct } => Arc::new(File::open(*fd, *offset, len, *direct, Holes::Zero)?),
                Kind::Memory { at, keep } => Arc::new(memory::Memory::new(*at, keep.clone())),
                Kind::Zero => Arc::new(Zero),
            });
        }
    }
    let mut layers = Layers::new(len)?;
    for (number, layer) in new.0.iter().enumerate().rev() {
        put(&mut layers, layer, number + 1 == new.0.len()).map_err(|error| match new.0.len() {
            1 => error,
            _ => error.within(&words!("layer {} of the source", number + 1)),
        })?;
    }
    Ok(Arc::new(layers))
}

/// Puts a layer over those below it.
fn put(layers: &mut Layers, new: &NewLayer, lowest: bool) -> Result<()> {
    let NewLayer { kind, part, bitmap } = new;
    let len = part.end - part.start;
    // The pages of a file that are no hole, where holes show the layer below.
    let mut data = None;
    let source: Option<Box<dyn Source>> = match kind {
        Kind::File { fd, offset, direct } => {
            let needed = bitmap.as_ref().map_or(len, |bitmap| bitmap.end(len));
            if needed == 0 {
                return Ok(());
            }
            let holes = if lowest || bitmap.is_some() { Holes::Zero } else { Holes::Below };
            let file = File::open(*fd, *offset, needed, *direct, holes)?;
            if holes == Holes::Below {
                data = Some(try_collect(file.data(len).map(|data| whole_pages(&data, part)))?);
            }
            Some(try_box(file)?)
        }
        Kind::Memory { at, keep } => Some(try_box(memory::Memory::new(*at, keep.clone()))?),
        Kind::Zero => None,
    };
    let layer = source.map(|source| Layer { source, part: part.clone() });
    match (bitmap, data) {
        (Some(bitmap), _) => layers.put(layer, bitmap.set(part)),
        (None, Some(data)) => layers.put(layer, data.into_iter()),
        (None, None) => layers.put(layer, std::iter::once(part.clone())),
    }?;
    Ok(())
}

/// The bytes of the slot whose pages hold a byte of `data`, which are bytes of the layer.
fn whole_pages(data: &Range<u64>, part: &Range<u64>) -> Range<u64> {
    let start = data.start - data.start % SMALLEST_PAGE;
    part.start + start..(part.start + data.end.next_multiple_of(SMALLEST_PAGE)).min(part.end)
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
