//! Sources: where the pages of a slot come from without a callback.

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::api::checks::invalid;
use crate::caller::Keep;
use crate::error::{words, Result};
use crate::service::config::NewSource;
use crate::source::{check_len, Kind, NewLayer, PageBitmap, SMALLEST_PAGE};
use crate::sync::Arc;

/// Where the pages of a slot come from without a callback. Descriptors are borrowed and duplicated.
///
/// A source can be put over another one ([`Source::over`]), which has the pages that this one does not have: a difference
/// over its base. A source that is not over another one is zero where it has no page.
pub struct Source<'a> {
    /// The uppermost first.
    layers: Vec<Layer>,
    descriptor: PhantomData<BorrowedFd<'a>>,
}

struct Layer {
    kind: SourceKind,
    /// The bytes of the slot. None: all; an end of 0 is that of the slot.
    part: Option<(u64, u64)>,
    bitmap: Option<PageBitmap>,
}

pub(crate) enum SourceKind {
    File { fd: i32, offset: u64, direct: bool },
    Memory { addr: *const u8, len: u64, offset: u64, keep: Option<Keep> },
    Zero,
}

impl<'a> Source<'a> {
    pub(crate) fn of(kind: SourceKind) -> Self {
        Self { layers: vec![Layer { kind, part: None, bitmap: None }], descriptor: PhantomData }
    }

    /// A regular file or a block device, open for reading, from `offset` on. Holes are zero and are not read; of a source
    /// that is over another one, they are pages that it does not have.
    pub fn file(file: &'a impl AsFd, offset: u64) -> Self {
        Self::of(SourceKind::File { fd: file.as_fd().as_raw_fd(), offset, direct: false })
    }

    /// As [`Source::file`], read past the page cache (O_DIRECT). `offset` is a multiple of 4096.
    pub fn file_direct(file: &'a impl AsFd, offset: u64) -> Self {
        Self::of(SourceKind::File { fd: file.as_fd().as_raw_fd(), offset, direct: true })
    }

    /// Bytes that never change.
    pub fn bytes(bytes: &'static [u8]) -> Source<'static> {
        Source::of(SourceKind::Memory { addr: bytes.as_ptr(), len: bytes.len() as u64, offset: 0, keep: None })
    }

    /// Bytes that the library keeps for as long as it reads them.
    pub fn shared(bytes: Arc<[u8]>) -> Source<'static> {
        let (addr, len) = (bytes.as_ptr(), bytes.len() as u64);
        Source::of(SourceKind::Memory { addr, len, offset: 0, keep: Some(Arc::new(bytes)) })
    }

    /// The `len` bytes of memory at `addr`.
    ///
    /// # Safety
    /// The memory stays mapped and unchanged until the slot has been removed or the handle has ended (after
    /// [`Kuf::close_without_waiting`](crate::Kuf::close_without_waiting): until the fill callback is dropped). If it is
    /// unreadable, fills fail.
    pub unsafe fn raw(addr: *const u8, len: u64) -> Source<'static> {
        Source::of(SourceKind::Memory { addr, len, offset: 0, keep: None })
    }

    /// Zeroes.
    pub fn zero() -> Source<'static> {
        Source::of(SourceKind::Zero)
    }

    /// The bytes of the slot that this source may have, multiples of 4096; its own bytes begin at `bytes.start`. All of the
    /// slot without this. Of several layers, this is about the uppermost.
    pub fn part(self, bytes: Range<u64>) -> Self {
        self.part_of(bytes.start, bytes.end.saturating_sub(bytes.start))
    }

    /// `len` 0: up to the end of the slot.
    pub(crate) fn part_of(mut self, start: u64, len: u64) -> Self {
        self.layers[0].part = Some((start, len));
        self
    }

    /// Which pages of `page_size` bytes this source has: one bit for each, from the start of its part on, the lowest bit of
    /// the first byte first. Holes of a file are zero then, and the file may end where its last page does. Of several layers,
    /// this is about the uppermost. Fails with ENOMEM only.
    pub fn bitmap(mut self, bits: &[u8], page_size: u64) -> Result<Self> {
        self.layers[0].bitmap = Some(PageBitmap::new(bits, page_size)?);
        Ok(self)
    }

    /// Puts this source over `base`, which has the pages that this one does not have.
    pub fn over(mut self, base: Self) -> Self {
        self.layers.extend(base.layers);
        self
    }

    /// Checks the source for a slot of `len` bytes.
    pub(crate) fn check(self, slot_len: u64) -> Result<NewSource> {
        if self.layers.len() > MOST_LAYERS {
            return invalid(words!("source: more than {MOST_LAYERS} layers"));
        }
        self.layers.into_iter().map(|layer| layer.check(slot_len)).collect::<Result<_>>().map(NewSource)
    }
}

/// Layers of a source, at most: each has a descriptor of its own.
pub(crate) const MOST_LAYERS: usize = 1024;

impl Layer {
    fn check(self, slot_len: u64) -> Result<NewLayer> {
        let part = match self.part {
            None => 0..slot_len,
            Some((start, 0)) => start..slot_len,
            Some((start, len)) => start..start.saturating_add(len),
        };
        if part.start >= part.end || part.end > slot_len {
            return invalid(words!(
                "source->slot_offset {:#x} + slot_len is not within the slot, which has {slot_len:#x} bytes",
                part.start
            ));
        }
        let whole = |at: u64| at % SMALLEST_PAGE == 0 || at == slot_len;
        if !whole(part.start) || !whole(part.end) {
            return invalid(words!("source->slot_offset and slot_len have to be multiples of {SMALLEST_PAGE}"));
        }
        let len = part.end - part.start;
        let mut needed = len;
        if let Some(bitmap) = &self.bitmap {
            let page_size = bitmap.page_size();
            if !page_size.is_power_of_two() || page_size < SMALLEST_PAGE {
                return invalid(words!(
                    "source->bitmap_page_size is {page_size}: a power of two, at least {SMALLEST_PAGE}"
                ));
            }
            let (has, bytes) = bitmap.has_and_needs(len);
            if has < bytes {
                return invalid(words!("source->bitmap_size is {has}: {len:#x} bytes need a bitmap of {bytes} bytes"));
            }
            needed = bitmap.end(len);
        }
        let kind = match self.kind {
            SourceKind::File { fd, offset, direct } => Kind::File { fd, offset, direct },
            SourceKind::Memory { addr, len, offset, keep } => {
                if (addr.addr() as u64).checked_add(len).is_none() {
                    return invalid(words!("source->addr {:#x} + len {len:#x} overflows", addr.addr()));
                }
                check_len("its memory", len, offset, needed)?;
                Kind::Memory { at: addr.wrapping_add(offset as usize), keep }
            }
            SourceKind::Zero => Kind::Zero,
        };
        Ok(NewLayer { kind, part, bitmap: self.bitmap })
    }
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kinds = self.layers.iter().map(|layer| match &layer.kind {
            SourceKind::File { .. } => "file",
            SourceKind::Memory { .. } => "memory",
            SourceKind::Zero => "zero",
        });
        f.write_str("Source")?;
        f.debug_list().entries(kinds).finish()
    }
}
