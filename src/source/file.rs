//! A source that reads a regular file or a block device.
//!
//! The kernel copies the bytes from a mapping of the file, to the guest (UFFDIO_COPY) or to a buffer
//! (process_vm_readv). For direct I/O, or where the file cannot be mapped, the library reads them with pread(2).
//!
//! **The mapping is never touched by the library's own code**: a file may be truncated at any time, and touching a
//! truncated page raises SIGBUS. The kernel touches the mapping, in madvise(MADV_POPULATE_READ) and UFFDIO_COPY, and
//! answers EFAULT. If the file ends inside a page, the rest of that page reads as zeroes without an error. So the
//! library checks the file's length after it has the bytes.
//!
//! **Locks.** A page fault on the mapping and fstat(2) take no lock that write(2) to the file holds while it reads its
//! source. lseek(2) for holes takes such a lock, so the library looks for holes once, when the slot is added.
//! MADV_WILLNEED takes it on xfs, so it is used only on file systems known not to. pread(2) takes it on xfs, and with
//! O_DIRECT on ext4 and xfs.
//!
//! **Readahead.** Populate goes through the file in order, and the kernel's own readahead, which MADV_POPULATE_READ
//! sets off, is the fastest way to do that: measured on a cold file of 512 MiB, in runs of 256 KiB, 2.8 to 3.7 us a
//! page; asking for each run with WILLNEED 5.9 (that keeps readahead from seeing the order); O_DIRECT 4.5; pread 4.0. A
//! single page on demand is another matter: the readahead of mappings reads all around it. Cold pages at random (ext4,
//! a device with 8 MiB of readahead): 400 us each with it, 65 with WILLNEED, 97 from a mapping with MADV_RANDOM. Eight
//! pages: 338, 140 and 572. So short runs on demand are requested by WILLNEED, or read from a second mapping with
//! MADV_RANDOM if they are very short. io_uring could add several runs in flight, which `fill_threads` provide already.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{check_len, Found, Source, Wanted};
use crate::alloc::try_push;
use crate::error::{words, Error, Failure, Result};
use crate::mapping::buffer::map_file;
use crate::os::proc::Path;

/// On demand, runs below this are read alone: the pages after them may not be wanted.
const ALONE: u64 = 64 << 10;

/// Where WILLNEED is not safe, runs up to this are read page by page.
const FEW: u64 = 16 << 10;

/// Holes that the library remembers where they only save work: each takes two system calls when the slot is added, and 16
/// bytes. Further holes are read, as zeroes.
const MOST_HOLES: usize = 1 << 16;

/// The alignment of offsets that O_DIRECT needs; enough for every disk.
const BLOCK: u64 = 4096;

/// What the holes of a file mean.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Holes {
    /// Zeroes that need not be read.
    Zero,
    /// Bytes that the layer below has. All of them have to be known.
    Below,
}

/// The part of a file that a slot's pages come from.
pub struct File {
    file: OwnedFd,
    /// The offset of the slot's first byte.
    offset: u64,
    /// fstat reports the length, which it does not for a device.
    regular: bool,
    map: Option<Map>,
    /// How to read few pages without those around them.
    few: Few,
    /// The holes at the time the slot was added: bytes of the slot, in order.
    holes: Vec<Range<u64>>,
}

/// How to read a few pages without the pages around them.
enum Few {
    /// MADV_WILLNEED, which takes no lock on this file system.
    Ask,
    /// A mapping without readahead.
    Map(Map),
    /// There is no way to.
    No,
}

/// A mapping of the file's part.
struct Map {
    at: NonNull<u8>,
    len: usize,
    /// Bytes before the slot's first byte, for the mapping starts at a page.
    skip: usize,
}

// SAFETY: an address that only the kernel reads at.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl File {
    /// Keeps a duplicate of `fd`, for `len` bytes from `offset` on.
    pub fn open(fd: i32, offset: u64, len: u64, direct: bool, meaning: Holes) -> Result<Self> {
        // SAFETY: looks up the descriptor and nothing else.
        if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(Error::new(Errno::BADF, words!("source->fd {fd} is not an open descriptor")));
        }
        // SAFETY: open, and the caller keeps it open during the call, which only duplicates it and looks at it.
        let host = unsafe { BorrowedFd::borrow_raw(fd) };
        let system = |what: &str, e: Errno| Error::system(&words!("source->fd: {what}"), e);
        let stat = rustix::fs::fstat(host).map_err(|e| system("fstat", e))?;
        let own = |flags| rustix::fs::open(&*Path::of_fd(fd), OFlags::RDONLY | OFlags::CLOEXEC | flags, Mode::empty());
        let has = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => stat.st_size as u64,
            FileType::BlockDevice => {
                let device = own(OFlags::empty()).map_err(|e| system("opening the device again", e))?;
                rustix::fs::seek(&device, SeekFrom::End(0)).map_err(|e| system("its size", e))?
            }
            _ => {
                let text = words!("source->fd {fd} is neither a regular file nor a block device");
                return Err(Error::new(Errno::BADFD, text));
            }
        };
        check_len("the file", has, offset, len)?;
        if direct && offset % BLOCK != 0 {
            let text =
                words!("source->offset {offset:#x} is not a multiple of {BLOCK}: KUF_SOURCE_DIRECT_IO needs that");
            return Err(Error::new(Errno::INVAL, text));
        }
        let file = if direct {
            own(OFlags::DIRECT).map_err(|e| match e {
                Errno::INVAL => Error::new(Errno::NOTSUP, "source->fd: this file system has no direct I/O"),
                e => system("opening it again for direct I/O", e),
            })?
        } else {
            rustix::io::fcntl_dupfd_cloexec(host, 0).map_err(|e| system("duplicating it", e))?
        };
        let regular = stat.st_size as u64 == has;
        // Blocks that are allocated and were never written are holes too.
        let sparse = regular && (meaning == Holes::Below || (stat.st_blocks as u64).saturating_mul(512) < has);
        // A file that cannot be mapped (hugetlbfs at an odd offset) is read.
        let map = if direct { None } else { Map::new(&file, offset, len).ok() };
        let few = match &map {
            Some(_) if !regular || readahead_takes_no_lock(&file) => Few::Ask,
            Some(_) => Map::new(&file, offset, len).map_or(Few::No, |map| map.without_readahead()),
            None => Few::No,
        };
        let holes = match sparse {
            true => own(OFlags::empty()).and_then(|file| holes_of(&file, offset..offset + len, meaning)),
            false => Ok(Vec::new()),
        };
        let holes = match meaning {
            // They only save work.
            Holes::Zero => holes.unwrap_or_default(),
            Holes::Below => holes.map_err(|e| system("its holes", e))?,
        };
        let source = Self { file, offset, regular, map, few, holes };
        source.check_readable()?;
        Ok(source)
    }

    fn check_readable(&self) -> Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.file).map_err(|e| Error::system("source->fd", e))?;
        match flags & OFlags::ACCMODE {
            OFlags::WRONLY => Err(Error::new(Errno::BADF, "source->fd is not open for reading")),
            _ => Ok(()),
        }
    }

    /// The bytes of the first `len` that are no hole, in order.
    pub fn data(&self, len: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let starts = std::iter::once(0).chain(self.holes.iter().map(|hole| hole.end));
        let ends = self.holes.iter().map(|hole| hole.start).chain(std::iter::once(len));
        starts.zip(ends).map(|(start, end)| start..end).filter(|data| !data.is_empty())
    }

    /// Whether `bytes` starts with a hole, and the length of the hole or data there.
    fn extent(&self, bytes: &Range<u64>) -> (bool, u64) {
        let next = self.holes.get(self.holes.partition_point(|hole| hole.end <= bytes.start));
        match next.filter(|hole| hole.start < bytes.end) {
            Some(hole) if hole.start <= bytes.start => (true, hole.end.min(bytes.end) - bytes.start),
            Some(hole) => (false, hole.start - bytes.start),
            None => (false, bytes.end - bytes.start),
        }
    }

    /// The address from which the kernel is to copy `len` bytes. A few pages on demand are read alone.
    fn mapped<'a>(&'a self, map: &'a Map, wanted: &Wanted, len: u64) -> *const u8 {
        let at = wanted.bytes.start;
        match &self.few {
            Few::Ask if wanted.demand && len < ALONE => map.want(at, len),
            Few::Map(few) if wanted.demand && len <= FEW => return few.of(at),
            _ => {}
        }
        map.of(at)
    }
}

impl Source for File {
    fn find(&self, wanted: &Wanted) -> Found {
        let Wanted { bytes, granule, .. } = wanted;
        let (hole, len) = self.extent(bytes);
        if hole && len >= *granule {
            return Found::Zero(len - len % granule);
        }
        // A granule that is part hole is data.
        let len = if hole { *granule } else { len.next_multiple_of(*granule) };
        match &self.map {
            None => Found::Unread(len),
            Some(map) => Found::Memory(len, self.mapped(map, wanted, len)),
        }
    }

    fn still_has(&self, bytes: &Range<u64>) -> u64 {
        let len = bytes.end - bytes.start;
        if !self.regular {
            return len;
        }
        let end = rustix::fs::fstat(&self.file).map_or(0, |stat| stat.st_size as u64);
        end.saturating_sub(self.offset + bytes.start).min(len)
    }

    fn explain(&self, bytes: &Range<u64>) -> Option<Failure> {
        let has = rustix::fs::fstat(&self.file).ok().filter(|_| self.regular)?.st_size as u64;
        let end = self.offset + bytes.end;
        let text = || words!("the file is now {has} bytes, the page needs bytes up to {end}");
        (has < end).then(|| Failure::new(Errno::IO, text()))
    }

    unsafe fn read(&self, bytes: &Range<u64>, to: NonNull<u8>) -> std::result::Result<(), Errno> {
        let len = (bytes.end - bytes.start) as usize;
        let mut done = 0;
        while done < len {
            let at = self.offset + bytes.start + done as u64;
            // SAFETY: the caller promises room for `len` bytes.
            let n = unsafe {
                libc::pread64(self.file.as_raw_fd(), to.add(done).as_ptr().cast(), len - done, at as libc::off64_t)
            };
            match n {
                // The file has become shorter.
                0 => return Err(Errno::IO),
                // SAFETY: errno of this thread.
                n if n < 0 => match Errno::from_raw_os_error(unsafe { *libc::__errno_location() }) {
                    Errno::INTR => {}
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
        let at = map_file(file, offset - skip, len, ProtFlags::READ, MapFlags::PRIVATE)?;
        Ok(Self { at, len, skip: skip as usize })
    }

    fn without_readahead(self) -> Few {
        // SAFETY: advice about this mapping, whose content it does not change.
        match unsafe { rustix::mm::madvise(self.at.as_ptr().cast(), self.len, Advice::Random) } {
            Ok(()) => Few::Map(self),
            Err(_) => Few::No,
        }
    }

    /// The address of the slot's byte `offset`.
    fn of(&self, offset: u64) -> *const u8 {
        self.at.as_ptr().wrapping_add(self.skip + offset as usize).cast_const()
    }

    /// Starts to read these bytes and no others, without waiting.
    fn want(&self, offset: u64, len: u64) {
        let page = rustix::param::page_size();
        let at = self.of(offset);
        let start = at.map_addr(|addr| addr & !(page - 1));
        // SAFETY: advice about a part of the mapping, whose content it does not change.
        let _ = unsafe {
            rustix::mm::madvise(start.cast_mut().cast(), at.addr() - start.addr() + len as usize, Advice::WillNeed)
        };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; a run that is copied from it keeps the source alive.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Whether MADV_WILLNEED is safe on this file system. On others it may take the file's lock, as on xfs, or go on to
/// another file system.
fn readahead_takes_no_lock(file: &OwnedFd) -> bool {
    const EXT: u32 = 0xef53;
    const BTRFS: u32 = 0x9123_683e;
    const TMPFS: u32 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|stat| [EXT, BTRFS, TMPFS].contains(&(stat.f_type as u32)))
}

/// The holes of `file` within `part`, counted from its start. `file` is the library's own description: the search moves
/// its position.
fn holes_of(file: &OwnedFd, part: Range<u64>, meaning: Holes) -> std::result::Result<Vec<Range<u64>>, Errno> {
    let most = if meaning == Holes::Below { usize::MAX } else { MOST_HOLES };
    let (mut holes, mut at) = (Vec::new(), part.start);
    while at < part.end && holes.len() < most {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(part.end),
            // There is no data up to the end of the file.
            Err(Errno::NXIO) => part.end,
            Err(errno) => return Err(errno),
        };
        if data > at {
            try_push(&mut holes, at - part.start..data - part.start)?;
        }
        if data == part.end {
            break;
        }
        at = rustix::fs::seek(file, SeekFrom::Hole(data))?;
    }
    Ok(holes)
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

    fn wanted(bytes: Range<u64>) -> Wanted {
        Wanted { bytes, granule: PAGE, demand: true }
    }

    #[test]
    fn holes_are_zero_and_end_where_data_begins() {
        let fd = file(16 * PAGE, &[4, 5]);
        let source = File::open(fd.as_raw_fd(), PAGE, 15 * PAGE, false, Holes::Zero).unwrap();
        assert_eq!(source.find(&wanted(0..8 * PAGE)), Found::Zero(3 * PAGE));
        assert!(matches!(source.find(&wanted(3 * PAGE..8 * PAGE)), Found::Memory(len, _) if len == 2 * PAGE));
        assert_eq!(source.find(&wanted(5 * PAGE..15 * PAGE)), Found::Zero(10 * PAGE));
        assert_eq!(source.find(&wanted(7 * PAGE..9 * PAGE)), Found::Zero(2 * PAGE));
        assert!(matches!(source.find(&wanted(PAGE..15 * PAGE)), Found::Zero(len) if len == 2 * PAGE));
    }

    fn found(file: &OwnedFd, part: Range<u64>) -> Vec<Range<u64>> {
        holes_of(file, part, Holes::Below).unwrap()
    }

    #[test]
    fn holes_are_found_within_the_part() {
        let fd = file(16 * PAGE, &[1, 3, 5]);
        let holes = found(&fd, PAGE..8 * PAGE);
        assert_eq!(holes, [PAGE..2 * PAGE, 3 * PAGE..4 * PAGE, 5 * PAGE..7 * PAGE]);
        assert_eq!(found(&fd, PAGE..2 * PAGE), []);
        assert_eq!(found(&fd, 2 * PAGE..3 * PAGE).first(), Some(&(0..PAGE)));
        assert_eq!(found(&file(4 * PAGE, &[]), 0..4 * PAGE).first(), Some(&(0..4 * PAGE)));
    }

    #[test]
    fn a_truncation_is_reported_even_within_a_page() {
        let fd = file(4 * PAGE, &[0, 1]);
        let source = File::open(fd.as_raw_fd(), PAGE, 3 * PAGE, false, Holes::Zero).unwrap();
        assert_eq!(source.still_has(&(0..3 * PAGE)), 3 * PAGE);
        ftruncate(&fd, 2 * PAGE + 100).unwrap();
        assert_eq!(source.still_has(&(0..3 * PAGE)), PAGE + 100);
        assert_eq!(source.still_has(&(2 * PAGE..3 * PAGE)), 0);
        let failure = source.explain(&(PAGE..2 * PAGE)).unwrap();
        assert_eq!(failure.to_string(), "EIO: the file is now 8292 bytes, the page needs bytes up to 12288");
        assert!(source.explain(&(0..PAGE)).is_none());
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let fd = file(4 * PAGE, &[0, 1, 2, 3]);
        let source = File::open(fd.as_raw_fd(), 0, 4 * PAGE, false, Holes::Zero).unwrap();
        let mut bytes = vec![0_u8; 4 * PAGE as usize];
        let to = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: room for four pages.
        assert_eq!(unsafe { source.read(&(0..4 * PAGE), to) }, Ok(()));
        ftruncate(&fd, 2 * PAGE).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { source.read(&(0..4 * PAGE), to) }, Err(Errno::IO));
        assert_eq!(crate::os::usercopy::populate_read(source.map.as_ref().unwrap().of(2 * PAGE), 1), Err(Errno::FAULT));
        assert_eq!(crate::os::usercopy::populate_read(source.map.as_ref().unwrap().of(PAGE), 1), Ok(()));
    }

    #[test]
    fn a_bad_length_or_offset_is_refused() {
        let fd = file(4 * PAGE, &[]);
        let errno =
            |offset, len, direct| File::open(fd.as_raw_fd(), offset, len, direct, Holes::Zero).err().map(|e| e.errno());
        assert_eq!(errno(0, 5 * PAGE, false), Some(Errno::INVAL));
        assert_eq!(errno(PAGE, 4 * PAGE, false), Some(Errno::INVAL));
        assert_eq!(errno(u64::MAX - 1, 4 * PAGE, false), Some(Errno::INVAL));
        assert_eq!(errno(8, PAGE, true), Some(Errno::INVAL));
        assert_eq!(errno(8, PAGE, false), None);
    }
}
