//! The code that the targets in `fuzz/` run: all code that reads bytes from outside, with the properties that hold for
//! any bytes. The test below runs it over `fuzz/corpus`, without tools.

use std::mem::{align_of, size_of};

use crate::abi::*;
use crate::api::Memory;
use crate::capi::convert::{self, read_struct, write_struct, Sized32};
use crate::capi::convert_memory;
use crate::error::Result;
use crate::os::maps;
use crate::record_file::{self, Recording, Run};

/// A file of `kuf_record_stop`, as it is and with correct checksums.
pub fn recording(bytes: &[u8]) {
    one_recording(bytes);
    one_recording(&record_file::with_checksums(bytes));
}

fn one_recording(bytes: &[u8]) {
    let mut left = bytes;
    let read = Recording::read(|buffer| {
        let n = buffer.len().min(left.len());
        buffer[..n].copy_from_slice(&left[..n]);
        left = &left[n..];
        Ok(n)
    });
    let Ok(recording) = read else { return };
    let ranges: Vec<_> = recording.runs().collect();
    assert_eq!(ranges.len() as u64, recording.count());
    assert!(ranges.iter().all(|range| range.start < range.end));
    let unit = recording.unit();
    let runs: Vec<_> =
        ranges.iter().map(|range| Run { first: range.start / unit, units: (range.end - range.start) / unit }).collect();
    let again = record_file::encode(unit, &runs).expect("memory");
    // A header may be longer than today's; the bytes after it have one form only.
    let (entries, used) = (record_file::HEADER..again.len() - record_file::SUM, bytes.len() - left.len());
    assert_eq!(again[entries.clone()], bytes[used - record_file::SUM - entries.len()..used - record_file::SUM]);
}

/// `/proc/self/maps` and `/proc/self/smaps`: 16 bytes say which range is looked for, the rest is the file.
pub fn proc_maps(bytes: &[u8]) {
    let Some((range, text)) = bytes.split_first_chunk::<16>() else { return };
    let number = |at: usize| u64::from_le_bytes(range[at..at + 8].try_into().expect("8 bytes"));
    let (start, end) = (number(0).min(number(8)), number(0).max(number(8)));
    if let Ok(found) = maps::select(text, start..end) {
        let mut covered = start;
        for mapping in &found {
            assert!(mapping.hva.start <= covered, "{found:?} leaves {covered:#x} out");
            covered = covered.max(mapping.hva.end);
        }
        assert!(covered >= end, "{found:?} ends before {end:#x}");
    }
    let _ = maps::page_size_in(text, start);
    let _ = maps::registered_in(text);
}

/// The structs that a caller passes. The first byte selects one; the rest is its memory, and not a byte more.
pub fn structs(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 7 {
        0 => with::<kuf_options>(bytes, |options| {
            let options = kuf_options { cpus: std::ptr::null(), ..options };
            // Use a number beyond all open descriptors, for a fuzzer would find its own.
            let options = kuf_options { vm_fd: options.vm_fd.saturating_add(1 << 20), ..options };
            let _ = convert::options(&options, std::ptr::null_mut()).and_then(|(options, _)| options.config());
        }),
        1 => with::<kuf_memory>(bytes, |memory| {
            if let Ok(new) = convert_memory::memory(&memory, None, None).and_then(Memory::check) {
                assert!(
                    new.len > 0 && new.gpa.checked_add(new.len).is_some() && new.hva.checked_add(new.len).is_some()
                );
            }
        }),
        2 => with::<kuf_source>(bytes, |source| {
            let memory = kuf_memory { gpa: 4096, hva: 4096, len: 1 << 20, ..Default::default() };
            let bits = [0x5a_u8; 32];
            let bitmap = if source.bitmap.is_null() { source.bitmap } else { bits.as_ptr().cast() };
            let bitmap_size = source.bitmap_size.min(bits.len() as u64);
            let source = kuf_source { bitmap, bitmap_size, base: std::ptr::null(), ..source };
            // SAFETY: the bitmap is as long as it says, and there is no base.
            let source = unsafe { convert_memory::sources(&raw const source) };
            let _ = source.and_then(|source| convert_memory::memory(&memory, source, None)).and_then(Memory::check);
        }),
        3 => with::<kuf_populate_request>(bytes, |request| {
            let _ = convert::populate(&request);
        }),
        4 => {
            // SAFETY: as long as it says.
            let _ = unsafe { convert::cpus(bytes.as_ptr().cast(), bytes.len() as u64, "cpus") };
        }
        5 => with::<kuf_kvm_memory>(bytes, |kvm| {
            let memory = kuf_memory { gpa: 4096, hva: 4096, len: 1 << 20, ..Default::default() };
            let _ = convert_memory::memory(&memory, None, Some(&kvm)).and_then(Memory::check);
        }),
        _ => with::<kuf_progress_info>(bytes, |_| {}),
    }
}

/// Reads a caller's struct, if it can be read, and writes one in its place.
fn with<T: Sized32>(bytes: &[u8], look: impl FnOnce(T)) {
    let Some(size) = bytes.first_chunk().map(|size| u32::from_le_bytes(*size) as usize) else { return };
    // Check the caller's promise, so that a read of a byte too many shows.
    if size > bytes.len() {
        return;
    }
    let mut memory = Aligned::new(&bytes[..size.max(size_of::<u32>())]);
    // SAFETY: as many bytes as the size says.
    let read: Result<T> = unsafe { read_struct(memory.at(), "it") };
    let Ok(value) = read else { return };
    // SAFETY: as above.
    let written = unsafe { write_struct(memory.at(), "it", |_| Ok(value)) };
    assert_eq!(written.expect("what can be read can be written"), 0);
    assert_eq!(memory.bytes(size)[..size.min(size_of::<T>())], bytes[..size.min(size_of::<T>())]);
    look(value);
}

/// A piece of the heap of exactly so many bytes, where a struct may be.
struct Aligned {
    at: *mut u8,
    layout: std::alloc::Layout,
}

impl Aligned {
    fn new(bytes: &[u8]) -> Self {
        let layout = std::alloc::Layout::from_size_align(bytes.len(), align_of::<u64>()).expect("a layout");
        // SAFETY: not of no bytes.
        let at = unsafe { std::alloc::alloc(layout) };
        assert!(!at.is_null());
        // SAFETY: room for all of them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        Self { at, layout }
    }

    fn at<T>(&mut self) -> *mut T {
        self.at.cast()
    }

    fn bytes(&self, size: usize) -> &[u8] {
        // SAFETY: no more than there are.
        unsafe { std::slice::from_raw_parts(self.at, size) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: from `alloc`, with this layout.
        unsafe { std::alloc::dealloc(self.at, self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over_the_corpus(target: &str, run: fn(&[u8])) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut count = 0;
        for file in std::fs::read_dir(&folder).expect("the corpus is in the tree") {
            run(&std::fs::read(file.expect("a file").path()).expect("its bytes"));
            count += 1;
        }
        assert!(count >= 10, "{} files in {}", count, folder.display());
    }

    #[test]
    fn recordings_of_the_corpus() {
        over_the_corpus("recording", recording);
    }

    #[test]
    fn maps_of_the_corpus() {
        over_the_corpus("proc_maps", proc_maps);
    }

    #[test]
    fn structs_of_the_corpus() {
        over_the_corpus("structs", structs);
    }

    #[test]
    fn the_maps_of_this_process() {
        let mut text = vec![0; 16];
        let here = text.as_ptr().addr() as u64;
        text[..8].copy_from_slice(&here.to_le_bytes());
        text[8..].copy_from_slice(&(here + 1).to_le_bytes());
        text.extend(std::fs::read("/proc/self/maps").expect("its mappings"));
        proc_maps(&text);
        text.truncate(16);
        text.extend(std::fs::read("/proc/self/smaps").expect("its mappings"));
        proc_maps(&text);
    }
}
