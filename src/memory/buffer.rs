//! Page-aligned memory for the bytes on their way to a page that cannot be written in place.

use std::ptr::NonNull;

use crate::error::{Error, Result};
use crate::sync::{lock, Mutex};

/// Private anonymous memory, zero at first.
pub struct Buffer {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that the buffer owns.
unsafe impl Send for Buffer {}
// SAFETY: access through &Buffer is only by raw pointer, under the rules of whoever writes there.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// At least `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let (prot, flags) = (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::PRIVATE);
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }
            .map_err(|e| Error::system("mapping a fill buffer", e.raw_os_error()))?;
        NonNull::new(at.cast()).map(|at| Self { at, len }).ok_or_else(|| Error::new(libc::ENOMEM, "no fill buffer"))
    }

    /// Its first byte.
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
        // SAFETY: mapped by `new` with this length; nobody holds the pointer any more.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Buffers that are used again: mapping and first touch would cost more than filling.
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

    /// Gives it back.
    pub fn put(&self, buffer: Buffer) {
        lock(&self.free).push(buffer);
    }
}
