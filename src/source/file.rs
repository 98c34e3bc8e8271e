//! A regular file or a block device as a source.
//!
//! Two ways, by what the bytes are for. Memory that the kernel copies into (UFFDIO_COPY) is copied from a mapping of the
//! file: nothing is copied twice. What has to be in a buffer or in the page itself is read there. Both go through the page
//! cache, unless direct I/O was asked for, which always reads.
//!
//! **The mapping is never touched by the library's own code**: a file may be truncated at any time, and touching what is
//! gone raises SIGBUS. The kernel touches it, in madvise(MADV_POPULATE_READ) and UFFDIO_COPY, and says EFAULT.
//!
//! **Readahead.** Populate goes through the file in order, and the kernel's own readahead, which MADV_POPULATE_READ sets off,
//! is the fastest way to do that: measured on a cold file of 512 MiB, in runs of 256 KiB, 2.8 to 3.7 us a page; asking for each
//! run with WILLNEED 5.9 (that keeps readahead from seeing the order); O_DIRECT 4.5; pread 4.0. A single page that somebody
//! waits for is another matter: the readahead of mappings reads all around it. Cold pages at random: 417 us each with it
//! (a device with 8 MiB of readahead), 40 to 52 with WILLNEED, 39 with O_DIRECT. So short runs on demand are asked for by
//! WILLNEED, and nothing else is. What io_uring could add is several runs in flight: that is what `fill_threads` are.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{check_len, Found, Source, Wanted};
use crate::error::{Error, Result};

/// On demand, runs below this are read by themselves: what follows them is not known to be wanted.
const ALONE: u64 = 64 << 10;

/// What O_DIRECT asks of offsets, on any disk.
const BLOCK: u64 = 4096;

/// The part of a file that a slot's pages come from.
pub struct File {
    file: OwnedFd,
    /// Of the slot's first byte.
    offset: u64,
    map: Option<Map>,
    /// The same file in a description whose position is the library's own, when it has holes.
    holes: Option<OwnedFd>,
}

/// A mapping of that part.
struct Map {
    at: NonNull<u8>,
    len: usize,
    /// Bytes of it before the slot's first: it starts with a page.
    skip: usize,
}

// SAFETY: an address that nobody but the kernel reads at.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl File {
    /// Keeps a duplicate of `fd`, for `len` bytes from `offset` on.
    pub fn open(fd: i32, offset: u64, len: u64, direct: bool) -> Result<Self> {
        // SAFETY: looks up the descriptor and nothing else.
        if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(Error::new(libc::EBADF, format!("source->fd {fd} is not an open descriptor")));
        }
        // SAFETY: open, and the host keeps it open for the time of the call; used only to duplicate and to look at it.
        let host = unsafe { BorrowedFd::borrow_raw(fd) };
        let system = |what: &str, e: Errno| Error::system(&format!("source->fd: {what}"), e.raw_os_error());
        let stat = rustix::fs::fstat(host).map_err(|e| system("fstat", e))?;
        let own = |flags| {
            let path = format!("/proc/self/fd/{fd}");
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | flags, Mode::empty())
        };
        let has = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => stat.st_size as u64,
            FileType::BlockDevice => {
                let device = own(OFlags::empty()).map_err(|e| system("opening the device again", e))?;
                rustix::fs::seek(&device, SeekFrom::End(0)).map_err(|e| system("its size", e))?
            }
            _ => {
                let text = format!("source->fd {fd} is neither a regular file nor a block device");
                return Err(Error::new(libc::EBADFD, text));
            }
        };
        check_len("the file", has, offset, len)?;
        if direct && offset % BLOCK != 0 {
            let text =
                format!("source->offset {offset:#x} is not a multiple of {BLOCK}: KUF_SOURCE_DIRECT_IO needs that");
            return Err(Error::new(libc::EINVAL, text));
        }
        let file = if direct {
            own(OFlags::DIRECT).map_err(|e| match e {
                Errno::INVAL => Error::new(libc::ENOTSUP, "source->fd: this file system has no direct I/O"),
                e => system("opening it again for direct I/O", e),
            })?
        } else {
            rustix::io::fcntl_dupfd_cloexec(host, 0).map_err(|e| system("duplicating it", e))?
        };
        let sparse = stat.st_size as u64 == has && (stat.st_blocks as u64).saturating_mul(512) < has;
        let source = Self {
            offset,
            // What cannot be mapped (hugetlbfs at an odd offset) is read.
            map: if direct { None } else { Map::new(&file, offset, len).ok() },
            // Only to save work: holes read as zeroes too.
            holes: if sparse { own(OFlags::empty()).ok() } else { None },
            file,
        };
        source.check_readable()?;
        Ok(source)
    }

    fn check_readable(&self) -> Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.file).map_err(|e| Error::system("source->fd", e.raw_os_error()))?;
        match flags & OFlags::ACCMODE {
            OFlags::WRONLY => Err(Error::new(libc::EBADF, "source->fd is not open for reading")),
            _ => Ok(()),
        }
    }

    /// Whether a hole is at the start of `bytes`, and how far what is there goes on.
    fn extent(&self, bytes: &Range<u64>) -> (bool, u64) {
        let len = bytes.end - bytes.start;
        let Some(holes) = &self.holes else { return (false, len) };
        let from = self.offset + bytes.start;
        match rustix::fs::seek(holes, SeekFrom::Data(from)) {
            Ok(data) if data > from => (true, (data - from).min(len)),
            Ok(_) => {
                let hole = rustix::fs::seek(holes, SeekFrom::Hole(from)).map_or(len, |hole| hole.saturating_sub(from));
                (false, hole.min(len))
            }
            // No data up to the end of the file. If that is where the slot ends no more, reading finds out.
            Err(Errno::NXIO) if self.still_holds(bytes.end) => (true, len),
            Err(_) => (false, len),
        }
    }

    fn still_holds(&self, end: u64) -> bool {
        rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_size as u64 >= self.offset + end)
    }
}

impl Source for File {
    fn find(&self, wanted: &Wanted) -> Found {
        let Wanted { bytes, granule, copied, demand } = wanted;
        let (hole, len) = self.extent(bytes);
        if hole && len >= *granule {
            return Found::Zero(len - len % granule);
        }
        // A granule that is part hole is data.
        let len = if hole { *granule } else { len.next_multiple_of(*granule) };
        match self.map.as_ref().filter(|_| *copied) {
            None => Found::Unread(len),
            Some(map) => {
                let at = map.of(bytes.start);
                if *demand && len < ALONE {
                    map.want(bytes.start, len);
                }
                Found::Memory(len, at)
            }
        }
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), i32> {
        let len = (bytes.end - bytes.start) as usize;
        let mut done = 0;
        while done < len {
            let at = self.offset + bytes.start + done as u64;
            // SAFETY: the caller promises room for `len` bytes.
            let n = unsafe {
                libc::pread64(self.file.as_raw_fd(), to.add(done).as_ptr().cast(), len - done, at as libc::off64_t)
            };
            match n {
                // It was long enough once.
                0 => return Err(libc::EIO),
                // SAFETY: errno of this thread.
                n if n < 0 => match unsafe { *libc::__errno_location() } {
                    libc::EINTR => {}
                    errno => return Err(errno),
                },
                n => done += n as usize,
            }
        }
        Ok(())
    }
}

impl Map {
    fn new(file: &OwnedFd, offset: u64, len: u64) -> std::result::Result<Self, Errno> {
        let page = rustix::param::page_size() as u64;
        let skip = offset % page;
        let len = usize::try_from(skip + len).map_err(|_| Errno::NOMEM)?;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, offset - skip)
        }?;
        NonNull::new(at.cast()).map(|at| Self { at, len, skip: skip as usize }).ok_or(Errno::NOMEM)
    }

    /// Where the slot's byte `offset` is.
    fn of(&self, offset: u64) -> *const u8 {
        self.at.as_ptr().wrapping_add(self.skip + offset as usize).cast_const()
    }

    /// Starts reading these bytes and nothing else, without waiting.
    fn want(&self, offset: u64, len: u64) {
        let page = rustix::param::page_size();
        let at = self.of(offset);
        let start = at.map_addr(|addr| addr & !(page - 1));
        // SAFETY: within the mapping, whose content it does not change.
        let _ = unsafe {
            rustix::mm::madvise(start.cast_mut().cast(), at.addr() - start.addr() + len as usize, Advice::WillNeed)
        };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; runs that are copied from it hold the source.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
    use rustix::io::pwrite;

    const PAGE: u64 = 4096;

    fn file(len: u64, data: &[u64]) -> OwnedFd {
        let file = memfd_create("source", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        for page in data {
            pwrite(&file, &[7_u8; PAGE as usize], page * PAGE).unwrap();
        }
        file
    }

    fn wanted(bytes: Range<u64>, copied: bool) -> Wanted {
        Wanted { bytes, granule: PAGE, copied, demand: true }
    }

    #[test]
    fn holes_are_zero_and_end_where_data_begins() {
        let fd = file(16 * PAGE, &[4, 5]);
        let source = File::open(fd.as_raw_fd(), PAGE, 15 * PAGE, false).unwrap();
        assert_eq!(source.find(&wanted(0..8 * PAGE, false)), Found::Zero(3 * PAGE));
        assert_eq!(source.find(&wanted(3 * PAGE..8 * PAGE, false)), Found::Unread(2 * PAGE));
        assert!(matches!(source.find(&wanted(3 * PAGE..8 * PAGE, true)), Found::Memory(len, _) if len == 2 * PAGE));
        assert_eq!(source.find(&wanted(5 * PAGE..15 * PAGE, true)), Found::Zero(10 * PAGE));
        // Cut off behind the library's back: nothing is known to be zero any more.
        ftruncate(&fd, 6 * PAGE).unwrap();
        assert_eq!(source.find(&wanted(5 * PAGE..15 * PAGE, false)), Found::Unread(10 * PAGE));
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let fd = file(4 * PAGE, &[0, 1, 2, 3]);
        let source = File::open(fd.as_raw_fd(), 0, 4 * PAGE, false).unwrap();
        let mut bytes = vec![0_u8; 4 * PAGE as usize];
        let to = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: room for four pages.
        assert_eq!(unsafe { source.read(&(0..4 * PAGE), to) }, Ok(()));
        ftruncate(&fd, 2 * PAGE).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { source.read(&(0..4 * PAGE), to) }, Err(libc::EIO));
        assert_eq!(crate::memory::outside::bring_in(source.map.as_ref().unwrap().of(2 * PAGE), 1), Err(libc::EFAULT));
        assert_eq!(crate::memory::outside::bring_in(source.map.as_ref().unwrap().of(PAGE), 1), Ok(()));
    }

    #[test]
    fn what_is_refused() {
        let fd = file(4 * PAGE, &[]);
        let errno = |offset, len, direct| File::open(fd.as_raw_fd(), offset, len, direct).err().map(|e| e.errno());
        assert_eq!(errno(0, 5 * PAGE, false), Some(libc::EINVAL));
        assert_eq!(errno(PAGE, 4 * PAGE, false), Some(libc::EINVAL));
        assert_eq!(errno(u64::MAX - 1, 4 * PAGE, false), Some(libc::EINVAL));
        assert_eq!(errno(8, PAGE, true), Some(libc::EINVAL));
        assert_eq!(errno(8, PAGE, false), None);
    }
}
