//! The mappings of this process, from `/proc/self/maps`, which the library reads when a slot is added; and from
//! `/proc/self/smaps`, when a handle ends whose userfaultfd cannot be read.

use std::ffi::CStr;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::alloc::{try_push, zeroes};
use crate::error::{words, Error, Result};
use crate::os::proc;
use crate::uapi::procfs::*;
use crate::uapi::userfaultfd::{UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP};

/// The properties of a mapping that matter here.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping {
    pub hva: Range<u64>,
    pub shared: bool,
    pub writable: bool,
    pub inode: u64,
    /// Device number as `makedev` builds it.
    pub device: u64,
    /// Offset in the file at `hva.start`.
    pub offset: u64,
    pub anonymous_huge: bool,
    /// The page size, if the kernel has reported it.
    pub page_size: Option<u64>,
}

/// The mappings that cover `hva` without a gap. Since Linux 6.11 the cost grows only with the number of these mappings;
/// before, with that of all mappings.
pub fn covering(hva: Range<u64>) -> Result<Vec<Mapping>> {
    match Query::open().and_then(|query| cover(|at| query.covering(at), &hva)) {
        Err(Errno::NOTTY | Errno::INVAL | Errno::PERM | Errno::ACCESS | Errno::NOSYS) => {
            select(&read(c"/proc/self/maps")?, hva)
        }
        asked => asked.map_err(|errno| Error::system("asking /proc/self/maps", errno))?,
    }
}

/// The mappings that cover `hva`, each found by `covering` at an address.
fn cover(
    mut covering: impl FnMut(u64) -> std::result::Result<Option<Mapping>, Errno>,
    hva: &Range<u64>,
) -> std::result::Result<Result<Vec<Mapping>>, Errno> {
    let mut covered = hva.start;
    let mut found = Vec::new();
    while covered < hva.end {
        let Some(mapping) = covering(covered)? else { return Ok(Err(not_mapped(covered, hva))) };
        covered = mapping.hva.end;
        try_push(&mut found, mapping)?;
    }
    Ok(Ok(found))
}

fn not_mapped(at: u64, hva: &Range<u64>) -> Error {
    let text = words!("hva {at:#x} of {:#x}..{:#x} is not mapped in this process", hva.start, hva.end);
    Error::new(Errno::FAULT, text)
}

/// `/proc/self/maps`, queried for one mapping at a time.
struct Query(OwnedFd);

impl Query {
    fn open() -> std::result::Result<Self, Errno> {
        rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(Self)
    }

    /// The mapping that contains this address.
    fn covering(&self, at: u64) -> std::result::Result<Option<Mapping>, Errno> {
        let mut name = [0_u8; 32];
        let mut query = procmap_query {
            size: size_of::<procmap_query>() as u64,
            query_addr: at,
            vma_name_size: name.len() as u32,
            vma_name_addr: name.as_mut_ptr().addr() as u64,
            ..procmap_query::default()
        };
        let mut named = query;
        // A name that does not fit is none of the names that matter here: query again without it.
        let asked = match self.ask(&mut named) {
            Err(Errno::NAMETOOLONG) => {
                (query.vma_name_size, query.vma_name_addr) = (0, 0);
                self.ask(&mut query).map(|()| query)
            }
            asked => asked.map(|()| named),
        };
        match asked {
            Err(Errno::NOENT) => Ok(None),
            asked => asked.map(|found| {
                Some(Mapping {
                    hva: found.vma_start..found.vma_end,
                    shared: found.vma_flags & PROCMAP_QUERY_VMA_SHARED != 0,
                    writable: found.vma_flags & PROCMAP_QUERY_VMA_WRITABLE != 0,
                    inode: found.inode,
                    device: libc::makedev(found.dev_major, found.dev_minor),
                    offset: found.vma_offset,
                    anonymous_huge: found.vma_name_size > 0 && name.starts_with(b"/anon_hugepage"),
                    page_size: Some(found.vma_page_size),
                })
            }),
        }
    }

    fn ask(&self, query: &mut procmap_query) -> std::result::Result<(), Errno> {
        // SAFETY: the struct that the request was computed from; the name has the room that its size field says.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), PROCMAP_QUERY as _, std::ptr::from_mut(query)) } {
            0 => Ok(()),
            // SAFETY: errno of this thread.
            _ => Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() })),
        }
    }
}

/// The page size of the mapping at `hva`, for mappings whose file does not tell it.
pub fn page_size(hva: u64) -> Result<u64> {
    page_size_in(&read(c"/proc/self/smaps")?, hva)
}

/// Reads a file as bytes, for the file names in it may have any encoding.
fn read(path: &CStr) -> Result<Vec<u8>> {
    proc::read(path).map_err(|e| Error::system(&words!("reading {}", path.to_string_lossy()), e))
}

/// Refuses a range that holds pages: a thread touched them before the library could catch the fault, and KVM may still
/// have them mapped.
pub fn refuse_resident(hva: Range<u64>) -> Result<()> {
    let page = rustix::param::page_size() as u64;
    let mut resident = zeroes(1 << 20)?;
    for at in hva.clone().step_by(resident.len() * page as usize) {
        let len = (hva.end - at).min(resident.len() as u64 * page);
        // SAFETY: the call only looks up pages; `resident` has a byte for each.
        if unsafe { libc::mincore(at as *mut _, len as usize, resident.as_mut_ptr()) } != 0 {
            return Err(Error::new(Errno::FAULT, words!("hva {at:#x} is not mapped any more")));
        }
        let pages = len.div_ceil(page) as usize;
        if let Some(n) = resident[..pages].iter().position(|byte| byte & 1 != 0) {
            let text = words!(
                "hva {:#x} was touched before its slot was added: KVM may keep an old translation. Add the memory before \
                 anything touches it and before a vCPU loads its MSRs",
                at + n as u64 * page
            );
            return Err(Error::new(Errno::BUSY, text));
        }
    }
    Ok(())
}

pub fn select(text: &[u8], hva: Range<u64>) -> Result<Vec<Mapping>> {
    let mut covered = hva.start;
    let mut found = Vec::new();
    for mapping in lines(text).filter_map(parse) {
        if mapping.hva.end <= hva.start || mapping.hva.start >= hva.end {
            continue;
        }
        if mapping.hva.start > covered {
            break;
        }
        covered = covered.max(mapping.hva.end);
        try_push(&mut found, mapping)?;
    }
    if covered < hva.end {
        return Err(not_mapped(covered, &hva));
    }
    Ok(found)
}

pub fn page_size_in(text: &[u8], hva: u64) -> Result<u64> {
    let mut here = false;
    for line in lines(text) {
        let mut words = words_of(line);
        let head = words.next().unwrap_or("");
        if let Some(range) = range(head) {
            here = range.contains(&hva);
        } else if here && head == "KernelPageSize:" {
            let kib = words.next().and_then(|kib| kib.parse::<u64>().ok());
            let bytes = kib.and_then(|kib| kib.checked_mul(1024));
            return bytes.ok_or_else(|| Error::new(Errno::INVAL, "unreadable KernelPageSize"));
        }
    }
    Err(Error::new(Errno::INVAL, "the page size is not known: set memory->page_size"))
}

/// A mapping that is registered with a userfaultfd.
#[derive(Debug, PartialEq, Eq)]
pub struct Registered {
    pub hva: Range<u64>,
    /// UFFDIO_REGISTER_MODE_*.
    pub modes: u64,
    pub accessible: bool,
}

/// The mappings of this process that are registered with any userfaultfd.
pub fn registered() -> Result<Vec<Registered>> {
    registered_in(&read(c"/proc/self/smaps")?)
}

pub fn registered_in(text: &[u8]) -> Result<Vec<Registered>> {
    let mut found = Vec::new();
    let mut last = None;
    for line in lines(text) {
        let mut words = words_of(line);
        let head = words.next().unwrap_or("");
        if let Some(hva) = range(head) {
            last = Some((hva, !words.next().unwrap_or("").starts_with("---")));
        } else if head == "VmFlags:" {
            let mode = |word| match word {
                "um" => UFFDIO_REGISTER_MODE_MISSING,
                "uw" => UFFDIO_REGISTER_MODE_WP,
                "ui" => UFFDIO_REGISTER_MODE_MINOR,
                _ => 0,
            };
            let modes = words.map(mode).fold(0, |all, mode| all | mode);
            if let Some((hva, accessible)) = last.take().filter(|_| modes != 0) {
                try_push(&mut found, Registered { hva, modes, accessible })?;
            }
        }
    }
    Ok(found)
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// The words of a line. A word that is not UTF-8 is part of a file name, and is not used.
fn words_of(line: &[u8]) -> impl Iterator<Item = &str> {
    let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    words.map(|word| std::str::from_utf8(word).unwrap_or(""))
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word, 16).ok()
}

fn range(word: &str) -> Option<Range<u64>> {
    let (start, end) = word.split_once('-')?;
    Some(hex(start)?..hex(end)?)
}

fn parse(line: &[u8]) -> Option<Mapping> {
    let mut words = words_of(line);
    let hva = range(words.next()?)?;
    let rights = words.next()?.as_bytes();
    let (writable, shared) = (rights.get(1) == Some(&b'w'), rights.get(3) == Some(&b's'));
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = libc::makedev(hex(major)? as u32, hex(minor)? as u32);
    let inode = words.next()?.parse().ok()?;
    let anonymous_huge = words.next().is_some_and(|path| path.starts_with("/anon_hugepage"));
    Some(Mapping { hva, shared, writable, inode, device, offset, anonymous_huge, page_size: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
10000-20000 rw-p 00000000 00:00 0 \n\
20000-30000 r--s 00003000 00:01 1033                       /memfd:ram (deleted)\n\
40000-50000 rw-p 00000000 00:0e 99                         /anon_hugepage (deleted)\n";

    #[test]
    fn the_query_agrees_with_the_file() {
        let Ok(query) = Query::open() else { return };
        if query.covering(0) == Err(Errno::NOTTY) {
            return;
        }
        let text = proc::read(c"/proc/self/maps").unwrap();
        let own = lines(&text).filter_map(parse).filter(|mapping| mapping.inode != 0);
        let mut n = 0;
        for mapping in own {
            let asked = query.covering(mapping.hva.start).unwrap().expect("it is mapped");
            assert!(asked.page_size.is_some());
            assert_eq!(Mapping { page_size: None, ..asked }, mapping);
            n += 1;
        }
        assert!(n > 3 && query.covering(0x1000) == Ok(None));
    }

    #[test]
    fn finds_what_covers_a_range() {
        let found = select(MAPS, 0x18000..0x28000).unwrap();
        assert_eq!(found.len(), 2);
        assert!(!found[0].shared && found[1].shared && found[0].writable && !found[1].writable);
        assert_eq!((found[1].inode, found[1].offset, found[1].device), (1033, 0x3000, libc::makedev(0, 1)));
        assert!(select(MAPS, 0x40000..0x50000).unwrap()[0].anonymous_huge);
    }

    #[test]
    fn a_file_name_may_have_any_encoding() {
        let text = b"10000-20000 rw-p 00000000 00:00 0 /tmp/\xff\xfe image\n20000-30000 rw-p 00000000 00:00 0 \n";
        assert_eq!(select(text, 0x10000..0x30000).unwrap().len(), 2);
        let text = b"10000-20000 rw-p 00000000 00:00 0 /tmp/\xff\nKernelPageSize:     2048 kB\n";
        assert_eq!(page_size_in(text, 0x18000).unwrap(), 2 << 20);
        assert_eq!(page_size_in(text, 0x28000).unwrap_err().errno(), Errno::INVAL);
    }

    #[test]
    fn registered_mappings_have_their_flags() {
        let text = b"10000-20000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr mw me ac sd um \n\
20000-30000 ---s 00003000 00:01 1033 /memfd:ram (deleted)\nSize: 64 kB\nVmFlags: mr um ui\n\
40000-50000 rw-p 00000000 00:00 0 \nVmFlags: rd wr\n";
        let found = registered_in(text).unwrap();
        let missing = UFFDIO_REGISTER_MODE_MISSING;
        let second =
            Registered { hva: 0x20000..0x30000, modes: missing | UFFDIO_REGISTER_MODE_MINOR, accessible: false };
        assert_eq!(found, [Registered { hva: 0x10000..0x20000, modes: missing, accessible: true }, second]);
    }

    #[test]
    fn a_gap_is_an_error_that_names_it() {
        let error = select(MAPS, 0x28000..0x48000).unwrap_err();
        assert_eq!(error.errno(), Errno::FAULT);
        assert!(error.text().contains("0x30000"), "{error}");
        assert_eq!(select(MAPS, 0x1000..0x2000).unwrap_err().errno(), Errno::FAULT);
        assert_eq!(select(MAPS, 0x48000..0x58000).unwrap_err().errno(), Errno::FAULT);
    }
}
