//! Shared memory that is filled in place: the file behind a slot and a second mapping of it, through which the library
//! (and the fill callback) writes pages that the guest's mapping does not show yet.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use once_cell::sync::OnceCell;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::buffer::Buffer;
use crate::error::{Error, Result};

/// The part of a shared file that backs a slot.
pub struct SharedFile {
    file: OwnedFd,
    offset: u64,
    alias: NonNull<u8>,
    len: usize,
}

// SAFETY: the alias is shared memory; who may write where is settled by page claims.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Maps `file[offset..offset+len]` a second time. Nothing is allocated yet.
    pub fn new(file: OwnedFd, offset: u64, len: u64) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| Error::new(libc::EINVAL, "len does not fit this process"))?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping where the kernel likes.
        let alias = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &file, offset) }
            .map_err(|e| Error::system("mapping the shared file a second time", e.raw_os_error()))?;
        let alias = NonNull::new(alias.cast()).ok_or_else(|| Error::new(libc::ENOMEM, "no second mapping"))?;
        Ok(Self { file, offset, alias, len })
    }

    /// Makes the pages of `bytes` (a range of the slot) exist, so that writing them cannot raise SIGBUS, and returns
    /// where to write. Content that was there stays. ENOMEM or ENOSPC when they cannot be had.
    pub fn place(&self, bytes: Range<u64>) -> std::result::Result<NonNull<u8>, Errno> {
        let at = self.at(&bytes);
        let len = (bytes.end - bytes.start) as usize;
        if !exist(at, len)? {
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), self.offset + bytes.start, len as u64)?;
        }
        Ok(at)
    }

    /// Where `bytes` (a range of the slot) is in the second mapping.
    fn at(&self, bytes: &Range<u64>) -> NonNull<u8> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len as u64, "outside the slot");
        // SAFETY: within the mapping, as asserted.
        unsafe { self.alias.add(bytes.start as usize) }
    }

    /// Drops the pages of `bytes` from the file: they read as zero, in every mapping, and touching them faults as
    /// missing.
    pub fn punch(&self, bytes: &Range<u64>) -> std::result::Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, self.offset + bytes.start, bytes.end - bytes.start)
    }

    /// The ranges of the slot that hold data in the file now.
    pub fn data(&self) -> Result<Vec<Range<u64>>> {
        let stat = rustix::fs::fstat(&self.file).map_err(|e| Error::system("fstat", e.raw_os_error()))?;
        if stat.st_blocks == 0 {
            return Ok(Vec::new());
        }
        if huge_page_size(&self.file).is_some() {
            // SEEK_DATA there calls all of the file data.
            let text = "hugetlbfs cannot tell which pages of fd hold data: pass an empty file or KUF_MEMORY_FILL_ALL";
            return Err(Error::new(libc::ENOTSUP, text));
        }
        let end = self.offset + self.len as u64;
        let mut ranges = Vec::new();
        let mut at = self.offset;
        // A description of its own, so that the file offset the host may rely on is not moved.
        let own = rustix::fs::open(
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file)),
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map_err(|e| Error::system("opening the shared file again", e.raw_os_error()))?;
        let seek = |to| match rustix::fs::seek(&own, to) {
            Ok(at) => Ok(Some(at.min(end))),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(Error::system("looking for data in the shared file", e.raw_os_error())),
        };
        while at < end {
            let Some(start) = seek(SeekFrom::Data(at))?.filter(|start| *start < end) else { break };
            let hole = seek(SeekFrom::Hole(start))?.unwrap_or(end);
            ranges.push(start - self.offset..hole - self.offset);
            at = hole;
        }
        Ok(ranges)
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; claims that could hand out pointers into it are gone with the slot.
        let _ = unsafe { rustix::mm::munmap(self.alias.as_ptr().cast(), self.len) };
    }
}

/// Makes the pages of a mapping exist and writable, so that writing them cannot raise a signal. Content that was there
/// stays. ENOMEM or ENOSPC when they cannot be had, EACCES when they may not be written. False: this kernel cannot.
pub fn exist(at: NonNull<u8>, len: usize) -> std::result::Result<bool, Errno> {
    match populate(at, len) {
        Ok(()) => Ok(true),
        // The fault handler's SIGBUS: the file has no room (tmpfs size, huge pages), or was truncated.
        Err(Errno::FAULT | Errno::BUSY) => Err(Errno::NOSPC),
        // Before Linux 5.14, or the mapping may not be written.
        Err(Errno::INVAL) if can_populate() => Err(Errno::ACCESS),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn populate(at: NonNull<u8>, len: usize) -> std::result::Result<(), Errno> {
    // SAFETY: changes no byte and no right; an address that is not mapped is an error.
    unsafe { rustix::mm::madvise(at.as_ptr().cast(), len, Advice::LinuxPopulateWrite) }
}

/// Whether the kernel has MADV_POPULATE_WRITE, tried on a page that it cannot refuse.
fn can_populate() -> bool {
    static CAN: OnceCell<bool> = OnceCell::new();
    *CAN.get_or_init(|| {
        let page = rustix::param::page_size();
        Buffer::new(page).is_ok_and(|buffer| populate(buffer.at(), page) != Err(Errno::INVAL))
    })
}

/// The page size of a hugetlbfs file; None for any other.
pub fn huge_page_size(file: impl AsFd) -> Option<u64> {
    const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
    let stat = rustix::fs::fstatfs(file).ok()?;
    (stat.f_type as u32 == HUGETLBFS_MAGIC).then_some(stat.f_bsize as u64)
}
