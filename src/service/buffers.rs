//! The library's memory in which pages are filled before they are installed.

use crate::error::Result;
use crate::mapping::buffer::{Buffer, Pool};
use crate::memory::staging::{self, Staging};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Buffers of one handle, each kept for the next fill.
#[derive(Default)]
pub struct Buffers {
    pool: Pool,
    /// Bytes of the longest buffers that were reserved.
    reserved: AtomicU64,
    staging: staging::Pool,
}

impl Buffers {
    /// Reserves a buffer of `len` bytes for each of `threads` threads. Without it, a process that has no mapping left
    /// would have to give up a page.
    pub fn reserve(&self, threads: usize, len: u64) -> Result<()> {
        if self.reserved.fetch_max(len, Ordering::Relaxed) >= len {
            return Ok(());
        }
        self.pool.reserve(threads, len as usize)
    }

    /// Takes a buffer of `len` bytes.
    pub fn take(&self, len: usize) -> Result<Buffer> {
        self.pool.take(len)
    }

    /// Returns a buffer.
    pub fn put(&self, buffer: Buffer) {
        self.pool.put(buffer);
    }

    /// Takes a huge page for the pages at `hva`, if the kernel has one.
    pub fn take_staging(&self, hva: u64) -> Option<Staging> {
        self.staging.take(hva)
    }

    /// Returns a huge page; `moved`: its pages are the guest's now.
    pub fn put_staging(&self, staging: Staging, moved: bool) {
        self.staging.put(staging, moved);
    }
}
