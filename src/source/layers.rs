//! A source made of layers: differences over a base, parts of several files, files with a bitmap.
//!
//! The layers are flattened into one list of extents when the slot is added, so that a page costs one search however many
//! layers there are. What no layer has is zero.

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use super::{Check, Found, Source, Wanted};
use crate::alloc::{try_push, NoMemory};
use crate::error::Failure;
use crate::os::usercopy::copy_nofault;

/// Bytes of the slot that come from one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// The extent goes up to the start of the next.
    start: u64,
    layer: Option<u32>,
}

/// One layer of a slot's source.
pub struct Layer {
    pub source: Box<dyn Source>,
    /// The bytes of the slot that it may have. Its own bytes are counted from the start of them.
    pub part: Range<u64>,
}

/// The layers of a slot and the bytes that each one has.
pub struct Layers {
    layers: Vec<Layer>,
    /// In order and without gaps, from 0 up to `len`. Neighbours are of different layers.
    extents: Vec<Extent>,
    len: u64,
}

impl Layers {
    /// Zeroes: a slot of `len` bytes without a layer.
    pub fn new(len: u64) -> Result<Self, NoMemory> {
        let mut extents = Vec::new();
        try_push(&mut extents, Extent { start: 0, layer: None })?;
        Ok(Self { layers: Vec::new(), extents, len })
    }

    /// Puts a layer over the others, or zeroes. `has` are the bytes of the slot that it has, in order, within `layer.part`.
    pub fn put(&mut self, layer: Option<Layer>, has: impl Iterator<Item = Range<u64>>) -> Result<(), NoMemory> {
        let number = layer.as_ref().map(|_| self.layers.len() as u32);
        let mut merged: Vec<Extent> = Vec::new();
        let mut below = self.extents.iter().copied().peekable();
        // The layer that was uppermost where `merged` ends.
        let mut under = None;
        for bytes in has {
            while let Some(extent) = below.next_if(|extent| extent.start < bytes.start) {
                under = extent.layer;
                append(&mut merged, extent)?;
            }
            append(&mut merged, Extent { start: bytes.start, layer: number })?;
            while let Some(extent) = below.next_if(|extent| extent.start <= bytes.end) {
                under = extent.layer;
            }
            if bytes.end < self.len {
                append(&mut merged, Extent { start: bytes.end, layer: under })?;
            }
        }
        below.try_for_each(|extent| append(&mut merged, extent))?;
        if let Some(layer) = layer {
            try_push(&mut self.layers, layer)?;
        }
        self.extents = merged;
        Ok(())
    }

    /// The extents that `bytes` is in: the layer of each, and its bytes within `bytes`.
    fn pieces<'a>(&'a self, bytes: &'a Range<u64>) -> impl Iterator<Item = (Option<&'a Layer>, Range<u64>)> + 'a {
        let first = self.extents.partition_point(|extent| extent.start <= bytes.start).saturating_sub(1);
        let within = self.extents[first..].iter().take_while(|extent| extent.start < bytes.end);
        within.enumerate().map(move |(i, extent)| {
            let end = self.extents.get(first + i + 1).map_or(self.len, |next| next.start);
            let layer = extent.layer.map(|layer| &self.layers[layer as usize]);
            (layer, extent.start.max(bytes.start)..end.min(bytes.end))
        })
    }
}

/// Appends an extent, unless the last one goes on with the same layer. It takes the place of what is from its start on.
fn append(list: &mut Vec<Extent>, extent: Extent) -> Result<(), NoMemory> {
    while list.last().is_some_and(|last| last.start >= extent.start) {
        list.pop();
    }
    match list.last() {
        Some(last) if last.layer == extent.layer => Ok(()),
        _ => try_push(list, extent),
    }
}

impl Layer {
    fn own(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start - self.part.start..bytes.end - self.part.start
    }

    /// Copies the layer's bytes of `bytes` to `to`.
    ///
    /// # Safety
    /// As [`Source::read`].
    unsafe fn copy(&self, bytes: &Range<u64>, to: NonNull<u8>) -> Result<(), Errno> {
        let len = bytes.end - bytes.start;
        let bytes = self.own(bytes);
        match self.source.find(&Wanted { bytes: bytes.clone(), granule: len, demand: true }) {
            // SAFETY: the caller's promise.
            Found::Zero(_) => unsafe { to.write_bytes(0, len as usize) },
            Found::Memory(_, at) => copy_nofault(at, to, len as usize)?,
            // SAFETY: the caller's promise.
            Found::Unread(_) => unsafe { self.source.read(&bytes, to) }?,
        }
        Ok(())
    }
}

impl Source for Layers {
    fn find(&self, wanted: &Wanted) -> Found {
        let Wanted { bytes, granule, demand } = wanted;
        let mut pieces = self.pieces(bytes);
        let Some((layer, piece)) = pieces.next() else { return Found::Unread(*granule) };
        let len = (piece.end - piece.start) / granule * granule;
        match layer {
            // A granule of several pieces is put together.
            _ if len == 0 => Found::Unread(*granule),
            None => Found::Zero(len),
            Some(layer) => {
                let bytes = layer.own(&(piece.start..piece.start + len));
                layer.source.find(&Wanted { bytes, granule: *granule, demand: *demand })
            }
        }
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> Result<(), Errno> {
        for (layer, piece) in self.pieces(bytes) {
            // SAFETY: within the room that the caller promises.
            let to = unsafe { to.add((piece.start - bytes.start) as usize) };
            match layer {
                // SAFETY: as above.
                None => unsafe { to.write_bytes(0, (piece.end - piece.start) as usize) },
                // SAFETY: as above.
                Some(layer) => unsafe { layer.copy(&piece, to) }?,
            }
        }
        Ok(())
    }

    fn still_has(&self, bytes: &Range<u64>) -> u64 {
        let mut has = 0;
        for (layer, piece) in self.pieces(bytes) {
            let len = piece.end - piece.start;
            let here = layer.map_or(len, |layer| layer.source.still_has(&layer.own(&piece)));
            has += here;
            if here < len {
                break;
            }
        }
        has
    }

    fn explain(&self, bytes: &Range<u64>) -> Option<Failure> {
        let layers = || self.pieces(bytes).filter_map(|(layer, piece)| Some((layer?, layer?.own(&piece))));
        let short = layers().find(|(layer, own)| layer.source.still_has(own) < own.end - own.start);
        match short {
            Some((layer, own)) => layer.source.explain(&own),
            None => layers().find_map(|(layer, own)| layer.source.explain(&own)),
        }
    }

    fn each_memory(&self, bytes: &Range<u64>, check: &mut Check) -> Result<(), Errno> {
        self.pieces(bytes).try_for_each(|(layer, piece)| match layer {
            Some(layer) => layer.source.each_memory(&layer.own(&piece), check),
            None => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{open, Kind, NewLayer, NewSource, PageBitmap};
    use crate::sync::Arc;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;

    /// Memory in which each byte is `value`.
    fn memory(value: u8, pages: u64) -> Kind {
        let bytes: Arc<[u8]> = vec![value; (pages * PAGE) as usize].into();
        Kind::Memory { at: bytes.as_ptr(), keep: Some(Arc::new(bytes)) }
    }

    /// What the source says of each page, in requests of at most `run` pages of `granule`.
    fn content(source: &dyn Source, granule: u64, run: u64) -> Vec<u8> {
        let (mut bytes, mut at) = (vec![0xee_u8; (PAGES * PAGE) as usize], 0);
        while at < PAGES * PAGE {
            let wanted = at..(at + run * granule).min(PAGES * PAGE);
            let to = NonNull::from(&mut bytes[at as usize]);
            let found = source.find(&Wanted { bytes: wanted.clone(), granule, demand: false });
            let len = match found {
                Found::Zero(len) | Found::Memory(len, _) | Found::Unread(len) => len,
            };
            assert!(len > 0 && len % granule == 0 && at + len <= wanted.end);
            match found {
                // SAFETY: `bytes` has room for them.
                Found::Zero(_) => unsafe { to.write_bytes(0, len as usize) },
                // SAFETY: memory of the test's, and room as above.
                Found::Memory(_, from) => unsafe { std::ptr::copy_nonoverlapping(from, to.as_ptr(), len as usize) },
                // SAFETY: as above.
                Found::Unread(_) => unsafe { source.read(&(at..at + len), to) }.unwrap(),
            }
            assert_eq!(source.still_has(&(at..at + len)), len);
            at += len;
        }
        bytes
    }

    #[test]
    fn layers_are_what_each_page_says_one_by_one() {
        let mut random = 7_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        for _ in 0..300 {
            let mut right = vec![0_u8; PAGES as usize];
            let mut layers = Vec::new();
            for value in 1..=1 + next(10) as u8 {
                let start = next(PAGES);
                let end = start + 1 + next(PAGES - start);
                let page_size = PAGE << next(3);
                let per_bit = page_size / PAGE;
                let bits: Vec<u8> = (0..PAGES.div_ceil(8)).map(|_| (next(256) & next(256)) as u8).collect();
                let with_bitmap = next(2) == 0;
                let has = |page: u64| {
                    let bit = (page - start) / per_bit;
                    !with_bitmap || bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1
                };
                let is_zero = next(5) == 0;
                for page in (start..end).filter(|page| has(*page)) {
                    right[page as usize] = if is_zero { 0 } else { value };
                }
                let kind = if is_zero { Kind::Zero } else { memory(value, end - start) };
                let bitmap = with_bitmap.then(|| PageBitmap::new(&bits, page_size).unwrap());
                layers.insert(0, NewLayer { kind, part: start * PAGE..end * PAGE, bitmap });
            }
            let source = open(&NewSource(layers), PAGES * PAGE).unwrap();
            for (granule, run) in [(PAGE, 1), (PAGE, 7), (4 * PAGE, 3), (16 * PAGE, 4)] {
                let found = content(source.as_ref(), granule, run);
                let wrong = (0..PAGES as usize * PAGE as usize).find(|at| found[*at] != right[at / PAGE as usize]);
                assert_eq!(wrong, None);
            }
        }
    }

    #[test]
    fn a_search_costs_the_same_for_many_layers() {
        let layers = (0..200).map(|n| NewLayer { kind: memory(n, PAGES), part: 0..PAGES * PAGE, bitmap: None });
        let mut flat = Layers::new(PAGES * PAGE).unwrap();
        for layer in layers {
            let Kind::Memory { at, keep } = layer.kind else { unreachable!() };
            let source = Box::new(crate::source::memory::Memory::new(at, keep));
            let layer = Layer { source, part: layer.part };
            flat.put(Some(layer), std::iter::once(0..PAGES * PAGE)).unwrap();
        }
        assert_eq!(flat.extents, [Extent { start: 0, layer: Some(199) }]);
    }

    #[test]
    fn memory_that_is_put_together_is_checked_first() {
        let part = 0..PAGES * PAGE;
        let half = PageBitmap::new(&[0x55; 8], PAGE).unwrap();
        let lower = NewLayer { kind: Kind::Zero, part: part.clone(), bitmap: None };
        let upper = NewLayer { kind: memory(3, PAGES), part: part.clone(), bitmap: Some(half) };
        let source = open(&NewSource(vec![upper, lower]), PAGES * PAGE).unwrap();
        let mut seen = 0;
        let mut count = |_: *const u8, len| {
            seen += len;
            Ok(())
        };
        source.each_memory(&(0..4 * PAGE), &mut count).unwrap();
        assert_eq!(seen, 2 * PAGE);
        assert_eq!(source.each_memory(&part, &mut |_, _| Err(Errno::DEADLK)), Err(Errno::DEADLK));
    }
}
