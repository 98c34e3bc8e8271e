//! Page-aligned memory for the bytes of pages that cannot be written in place.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

use crate::alloc::try_push;
use crate::error::{Error, Result};
use crate::sync::{lock, Mutex};

/// Private anonymous memory, which starts as zeroes.
pub struct Buffer {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that the buffer owns.
unsafe impl Send for Buffer {}
// SAFETY: `&Buffer` gives access only by raw pointer, and the user of that pointer rules out races.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Maps at least `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }
            .map_err(|e| Error::system("mapping a fill buffer", e))?;
        NonNull::new(at.cast()).map(|at| Self { at, len }).ok_or_else(|| Error::new(Errno::NOMEM, "no fill buffer"))
    }

    /// The address of the first byte.
    pub fn at(&self) -> NonNull<u8> {
        self.at
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no user of the pointer is left.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Maps `len` bytes of `file` from `offset` on, with no page of it present. This holds even where the process has
/// locked its future mappings (mlockall), where a plain mmap would read the whole file.
pub fn map_file(
    file: &OwnedFd,
    offset: u64,
    len: usize,
    prot: ProtFlags,
    flags: MapFlags,
) -> std::result::Result<NonNull<u8>, Errno> {
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::empty(), flags, file, offset) }?;
    let map = NonNull::new(at.cast()).ok_or(Errno::NOMEM)?;
    // SAFETY: the new mapping, which only this thread knows.
    let opened = unsafe { make_accessible(at, len, prot) };
    opened.map(|()| map).inspect_err(|_| {
        // SAFETY: as above.
        let _ = unsafe { rustix::mm::munmap(at, len) };
    })
}

/// Makes a new, inaccessible mapping accessible. It unlocks the mapping first, so that no page becomes present.
///
/// # Safety
/// The caller owns the mapping.
pub unsafe fn make_accessible(
    at: *mut std::ffi::c_void,
    len: usize,
    prot: ProtFlags,
) -> std::result::Result<(), Errno> {
    // SAFETY: the caller's mapping.
    unsafe {
        rustix::mm::munlock(at, len)
            .and_then(|()| rustix::mm::mprotect(at, len, MprotectFlags::from_bits_retain(prot.bits())))
    }
}

/// Buffers for reuse: mapping and first touch would cost more than filling.
#[derive(Default)]
pub struct Pool {
    free: Mutex<Vec<Buffer>>,
}

impl Pool {
    /// A buffer of at least `len` bytes, of undefined content.
    pub fn take(&self, len: usize) -> Result<Buffer> {
        let mut free = lock(&self.free);
        match free.iter().position(|buffer| buffer.len() >= len) {
            Some(at) => Ok(free.swap_remove(at)),
            None => {
                drop(free);
                Buffer::new(len)
            }
        }
    }

    /// Maps `n` buffers of `len` bytes before they are needed. Until it is written, each takes a mapping but no memory.
    pub fn reserve(&self, n: usize, len: usize) -> Result<()> {
        for _ in 0..n {
            let buffer = Buffer::new(len)?;
            try_push(&mut lock(&self.free), buffer)?;
        }
        Ok(())
    }

    /// Returns a buffer to the pool.
    pub fn put(&self, buffer: Buffer) {
        // Without memory for the list, the buffer is unmapped.
        let _ = try_push(&mut lock(&self.free), buffer);
    }
}
