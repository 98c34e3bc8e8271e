//! The checks of a new memory slot.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::error::{words, Error, Result};
use crate::mapping::shared::{huge_page_size, SharedFile};
use crate::mechanism::userfaultfd::open;
use crate::os::descriptor::{borrow, duplicate};
use crate::os::maps::{self, Mapping};
use crate::service::config::NewMemory;
use crate::sync::Arc;
use crate::uapi::userfaultfd::{UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MOVE};

/// The facts that the checks have found about new memory.
pub struct Checked {
    pub granule: u64,
    /// Its mapping is MAP_PRIVATE.
    pub private: bool,
    pub writable: bool,
    /// The file behind it, if its pages are filled in place.
    pub file: Option<Arc<SharedFile>>,
}

/// Refuses memory that cannot be served. `marks`: only KVM regards what closes its pages.
pub fn check(new: &NewMemory, marks: bool) -> Result<Checked> {
    let file = new.file.map(|(fd, offset)| Ok::<_, Error>((shared_file(fd)?, offset))).transpose()?;
    let huge_file = file.as_ref().and_then(|(file, _)| huge_page_size(file));
    let mappings = if new.remote { Vec::new() } else { maps::covering(new.hva..new.hva + new.len)? };
    let granule = granule(new, huge_file, &mappings)?;
    for (what, value) in
        [("gpa", new.gpa), ("len", new.len), ("hva", new.hva), ("fd_offset", file.as_ref().map_or(0, |f| f.1))]
    {
        if value % granule != 0 {
            let text = words!("{what} {value:#x} is not a multiple of the page size {granule:#x}");
            return Err(Error::new(Errno::INVAL, text));
        }
    }
    if let Some(mapping) = mappings.iter().find(|m| !m.shared && m.inode != 0 && !m.anonymous_huge) {
        let text = words!(
            "hva {:#x} is a private mapping of a file: the guest would read the file's bytes without a fault",
            mapping.hva.start
        );
        return Err(Error::new(Errno::INVAL, text));
    }
    if let Some(mapping) = mappings.iter().find(|mapping| marks && !mapping.writable) {
        let text = words!("hva {:#x} is not writable: pages are written straight to it", mapping.hva.start);
        return Err(Error::new(Errno::INVAL, text));
    }
    let private = match (&file, mappings.first()) {
        (Some((file, offset)), Some(_)) => {
            check_file_is_mapped(file, *offset, new, &mappings)?;
            false
        }
        (Some(_), None) => false,
        (None, first) => first.is_none_or(|mapping| !mapping.shared),
    };
    let in_place = file.filter(|_| marks || minor_works(huge_file.is_some()));
    let file = in_place.map(|(file, offset)| SharedFile::new(file, offset, new.len).map(Arc::new)).transpose()?;
    if marks && file.is_none() {
        maps::refuse_resident(new.hva..new.hva + new.len)?;
    }
    Ok(Checked { granule, private, writable: mappings.iter().all(|mapping| mapping.writable), file })
}

fn granule(new: &NewMemory, huge: Option<u64>, mappings: &[Mapping]) -> Result<u64> {
    let page = rustix::param::page_size() as u64;
    let found = match huge {
        Some(huge) => Some(huge),
        // Shared memory that came without its descriptor may be hugetlbfs too.
        None if mappings.iter().any(|m| m.anonymous_huge || m.shared && new.file.is_none()) => {
            let asked = mappings.first().and_then(|mapping| mapping.page_size);
            Some(asked.map_or_else(|| maps::page_size(new.hva), Ok)?)
        }
        None if new.remote && new.file.is_none() => None,
        None => Some(page),
    };
    let granule = match (new.granule, found) {
        (0, found) => found.unwrap_or(page),
        (given, Some(found)) if given != found => {
            let text = words!("page_size {given:#x} is not that of the mapping, {found:#x}");
            return Err(Error::new(Errno::INVAL, text));
        }
        (given, _) => given,
    };
    if granule < page || !granule.is_power_of_two() {
        return Err(Error::new(Errno::INVAL, words!("page_size {granule:#x} is no page size")));
    }
    Ok(granule)
}

fn minor_works(huge: bool) -> bool {
    let needed = if huge { UFFD_FEATURE_MINOR_HUGETLBFS } else { UFFD_FEATURE_MINOR_SHMEM };
    // A handler that may not open a userfaultfd, and adopts one, cannot query features: kernels since 5.14 have both.
    open::offered(false).map_or(true, |(features, _)| features & needed != 0)
}

fn shared_file(fd: i32) -> Result<OwnedFd> {
    const TMPFS_MAGIC: u32 = 0x0102_1994;
    let host = borrow(fd, "fd")?;
    let kind = rustix::fs::fstatfs(host).map(|stat| stat.f_type as u32).unwrap_or(0);
    if kind != TMPFS_MAGIC && huge_page_size(host).is_none() {
        let text = words!("fd {fd} is not shared memory (a memfd, or a file on tmpfs or hugetlbfs)");
        return Err(Error::new(Errno::BADFD, text));
    }
    duplicate(host, "fd")
}

fn check_file_is_mapped(file: &OwnedFd, offset: u64, new: &NewMemory, mappings: &[Mapping]) -> Result<()> {
    let stat = rustix::fs::fstat(file).map_err(|e| Error::system("fstat of fd", e))?;
    for mapping in mappings {
        let wanted = offset.wrapping_add(mapping.hva.start).wrapping_sub(new.hva);
        // hugetlbfs and memfd have no device number that can be compared on every kernel; inode and offset are enough.
        if !mapping.shared || mapping.inode != stat.st_ino || mapping.offset != wanted {
            let text = words!("hva {:#x} is not a MAP_SHARED mapping of fd at fd_offset {offset:#x}", new.hva);
            return Err(Error::new(Errno::BADFD, text));
        }
    }
    if stat.st_size >= 0 && (stat.st_size as u64) < offset.saturating_add(new.len) {
        let text = words!("fd holds {:#x} bytes, fewer than fd_offset + len", stat.st_size);
        return Err(Error::new(Errno::BADFD, text));
    }
    Ok(())
}

pub fn move_works() -> bool {
    // As above: the feature is assumed, and the first move finds out.
    open::offered(true).map_or(true, |(features, _)| features & UFFD_FEATURE_MOVE != 0)
}
