//! Shared memory that is filled in place: the file behind a slot and a second mapping of it, through which the library
//! (and the fill callback) writes pages that the guest's mapping does not show yet.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

use super::buffer::{make_accessible, map_file, Buffer};
use crate::alloc::try_push;
use crate::error::{Error, Result};
use crate::os::proc::Path;
use crate::os::resident;
use crate::sync::OnceLock;

/// The part of a shared file that backs a slot.
pub struct SharedFile {
    file: OwnedFd,
    offset: u64,
    alias: NonNull<u8>,
    len: usize,
}

// SAFETY: the alias is shared memory; page claims order the writes to it.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Maps `file[offset..offset+len]` a second time. It allocates no page.
    pub fn new(file: OwnedFd, offset: u64, len: u64) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| Error::new(Errno::INVAL, "len does not fit this process"))?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        let alias = map_file(&file, offset, len, prot, flags)
            .map_err(|e| Error::system("mapping the shared file a second time", e))?;
        // A huge page in the file would make 512 pages exist where one is filled: memory for all of them, and
        // MADV_COLLAPSE then maps them all without asking (the kernel refuses it where a page is missing). A kernel
        // without huge pages refuses this, which is as good.
        // SAFETY: advice about the new mapping.
        let _ = unsafe { rustix::mm::madvise(alias.as_ptr().cast(), len, Advice::LinuxNoHugepage) };
        Ok(Self { file, offset, alias, len })
    }

    /// Makes the pages of `bytes` (a range of the slot) exist, so that writing them cannot raise SIGBUS, and returns
    /// where to write. Bytes that were there stay. ENOMEM or ENOSPC: there is no room for the pages.
    pub fn place(&self, bytes: Range<u64>) -> std::result::Result<NonNull<u8>, Errno> {
        let at = self.at(&bytes);
        let len = (bytes.end - bytes.start) as usize;
        if !exist(at, len)? {
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), self.offset + bytes.start, len as u64)?;
        }
        Ok(at)
    }

    /// The address of `bytes` (a range of the slot) in the second mapping.
    fn at(&self, bytes: &Range<u64>) -> NonNull<u8> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len as u64, "outside the slot");
        // SAFETY: within the mapping, as asserted.
        unsafe { self.alias.add(bytes.start as usize) }
    }

    /// Whether the file has the page of `bytes`, as far as this process can see without waiting. None: the kernel
    /// cannot tell.
    pub fn holds(&self, bytes: &Range<u64>, granule: u64) -> Option<bool> {
        resident::exists(self.at(bytes).as_ptr() as u64, granule)
    }

    /// Separates the second mapping from the file: the slot has ended, and a callback of the caller that the library does
    /// not wait for may still be filling pages through it. If there is no memory for the replacement, such writes still
    /// reach the file.
    pub fn cut_off(&self) {
        let (prot, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping where the kernel likes.
        let Ok(apart) = (unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), self.len, prot, flags) }) else {
            return;
        };
        // One step moves the replacement there, so a writer finds memory at every moment.
        // SAFETY: the new mapping takes the place of the second one, which is used only through raw pointers; bytes read
        // there are used no more.
        let moved = unsafe {
            make_accessible(apart, self.len, ProtFlags::READ | ProtFlags::WRITE).and_then(|()| {
                let to = self.alias.as_ptr().cast();
                rustix::mm::mremap_fixed(apart, self.len, self.len, MremapFlags::MAYMOVE, to).map(|_| ())
            })
        };
        if moved.is_err() {
            // SAFETY: still where it was.
            let _ = unsafe { rustix::mm::munmap(apart, self.len) };
        }
    }

    /// Drops the pages of `bytes` from the file. In every mapping they then read as zero, and a touch raises a missing
    /// fault.
    pub fn punch(&self, bytes: &Range<u64>) -> std::result::Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, self.offset + bytes.start, bytes.end - bytes.start)
    }

    /// The ranges of the slot for which the file holds data now. None: there is data, and the file cannot tell where.
    pub fn data(&self) -> Result<Option<Vec<Range<u64>>>> {
        let stat = rustix::fs::fstat(&self.file).map_err(|e| Error::system("fstat", e))?;
        if stat.st_blocks == 0 {
            return Ok(Some(Vec::new()));
        }
        if huge_page_size(&self.file).is_some() {
            // SEEK_DATA there calls all of the file data.
            return Ok(None);
        }
        let end = self.offset + self.len as u64;
        let mut ranges = Vec::new();
        let mut at = self.offset;
        // Open it again, so that lseek does not move the file offset of the caller's description.
        let own = rustix::fs::open(
            &*Path::of_fd(self.file.as_raw_fd()),
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map_err(|e| Error::system("opening the shared file again", e))?;
        let seek = |to| match rustix::fs::seek(&own, to) {
            Ok(at) => Ok(Some(at.min(end))),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(Error::system("looking for data in the shared file", e)),
        };
        while at < end {
            let Some(start) = seek(SeekFrom::Data(at))?.filter(|start| *start < end) else { break };
            let hole = seek(SeekFrom::Hole(start))?.unwrap_or(end);
            try_push(&mut ranges, start - self.offset..hole - self.offset)?;
            at = hole;
        }
        Ok(Some(ranges))
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; the claims that could give out pointers into it went with the slot.
        let _ = unsafe { rustix::mm::munmap(self.alias.as_ptr().cast(), self.len) };
    }
}

/// Makes the pages of a mapping exist and writable, so that writing them cannot raise a signal. Bytes that were there
/// stay. ENOMEM or ENOSPC: there is no room for the pages. EACCES: they may not be written. False: this kernel cannot
/// do it.
pub fn exist(at: NonNull<u8>, len: usize) -> std::result::Result<bool, Errno> {
    match populate(at, len) {
        Ok(()) => Ok(true),
        // The fault would raise SIGBUS: the file has no room (tmpfs size, huge pages), or was truncated.
        Err(Errno::FAULT | Errno::BUSY) => Err(Errno::NOSPC),
        // The kernel is older than Linux 5.14, or the mapping may not be written.
        Err(Errno::INVAL) if can_populate() => Err(Errno::ACCESS),
        // The kernel is too old, or a filter refuses the call.
        Err(Errno::INVAL | Errno::PERM | Errno::ACCESS | Errno::NOSYS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn populate(at: NonNull<u8>, len: usize) -> std::result::Result<(), Errno> {
    // SAFETY: the call changes no byte and no right; an address that is not mapped is an error.
    unsafe { rustix::mm::madvise(at.as_ptr().cast(), len, Advice::LinuxPopulateWrite) }
}

/// Whether the kernel has MADV_POPULATE_WRITE, tested on a page that it cannot refuse.
fn can_populate() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_callback_writes_to_no_file() {
        let page = rustix::param::page_size();
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 2 * page as u64).unwrap();
        let shared = SharedFile::new(file.try_clone().unwrap(), 0, 2 * page as u64).unwrap();
        let at = shared.place(0..page as u64).unwrap();
        let byte = || {
            let mut byte = [0];
            rustix::io::pread(&file, &mut byte, 0).unwrap();
            byte[0]
        };
        // SAFETY: a page that exists and belongs to this test.
        unsafe { at.write(1) };
        assert_eq!(byte(), 1);
        shared.cut_off();
        // SAFETY: as before; the page is not the file's any more.
        unsafe { at.write_bytes(2, 2 * page) };
        assert_eq!(byte(), 1);
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks as usize * 512, page, "nor has a page come to be");
    }
}
