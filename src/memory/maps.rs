//! What the kernel says is mapped in this process: `/proc/self/maps`, read when a slot is added and at no other time.

use std::ops::Range;

use crate::error::{Error, Result};

/// A mapping, as far as it matters here.
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
}

/// The mappings that cover `hva` without a gap.
pub fn covering(hva: Range<u64>) -> Result<Vec<Mapping>> {
    let text = std::fs::read_to_string("/proc/self/maps")
        .map_err(|e| Error::system("reading /proc/self/maps", e.raw_os_error().unwrap_or(libc::EIO)))?;
    select(&text, hva)
}

/// Refuses a range that holds pages: whoever made them did so before they could be caught, and may hold on to them.
pub fn refuse_resident(hva: Range<u64>) -> Result<()> {
    let page = rustix::param::page_size() as u64;
    let mut resident = vec![0_u8; 1 << 20];
    for at in hva.clone().step_by(resident.len() * page as usize) {
        let len = (hva.end - at).min(resident.len() as u64 * page);
        // SAFETY: only looks up what is there; `resident` has a byte for each page.
        if unsafe { libc::mincore(at as *mut _, len as usize, resident.as_mut_ptr()) } != 0 {
            return Err(Error::new(libc::EFAULT, format!("hva {at:#x} is not mapped any more")));
        }
        let pages = len.div_ceil(page) as usize;
        if let Some(n) = resident[..pages].iter().position(|byte| byte & 1 != 0) {
            let text = format!(
                "hva {:#x} was touched before its slot was added: KVM may hold on to what it has looked up there. Add the \
                 memory before anything touches it and before a vCPU loads its MSRs",
                at + n as u64 * page
            );
            return Err(Error::new(libc::EBUSY, text));
        }
    }
    Ok(())
}

fn select(text: &str, hva: Range<u64>) -> Result<Vec<Mapping>> {
    let mut covered = hva.start;
    let mut found = Vec::new();
    for mapping in text.lines().filter_map(parse) {
        if mapping.hva.end <= hva.start || mapping.hva.start >= hva.end {
            continue;
        }
        if mapping.hva.start > covered {
            break;
        }
        covered = mapping.hva.end;
        found.push(mapping);
    }
    if covered < hva.end {
        let text = format!("hva {covered:#x} of {:#x}..{:#x} is not mapped in this process", hva.start, hva.end);
        return Err(Error::new(libc::EFAULT, text));
    }
    Ok(found)
}

fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |word: &str| u64::from_str_radix(word, 16).ok();
    let hva = hex(start)?..hex(end)?;
    let rights = words.next()?.as_bytes();
    let (writable, shared) = (rights.get(1) == Some(&b'w'), rights.get(3) == Some(&b's'));
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = libc::makedev(hex(major)? as u32, hex(minor)? as u32);
    let inode = words.next()?.parse().ok()?;
    let anonymous_huge = words.next().is_some_and(|path| path.starts_with("/anon_hugepage"));
    Some(Mapping { hva, shared, writable, inode, device, offset, anonymous_huge })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
10000-20000 rw-p 00000000 00:00 0 \n\
20000-30000 r--s 00003000 00:01 1033                       /memfd:ram (deleted)\n\
40000-50000 rw-p 00000000 00:0e 99                         /anon_hugepage (deleted)\n";

    #[test]
    fn finds_what_covers_a_range() {
        let found = select(MAPS, 0x18000..0x28000).unwrap();
        assert_eq!(found.len(), 2);
        assert!(!found[0].shared && found[1].shared && found[0].writable && !found[1].writable);
        assert_eq!((found[1].inode, found[1].offset, found[1].device), (1033, 0x3000, libc::makedev(0, 1)));
        assert!(select(MAPS, 0x40000..0x50000).unwrap()[0].anonymous_huge);
    }

    #[test]
    fn a_gap_is_an_error_that_names_it() {
        let error = select(MAPS, 0x28000..0x48000).unwrap_err();
        assert_eq!(error.errno(), libc::EFAULT);
        assert!(error.text().contains("0x30000"), "{error}");
        assert_eq!(select(MAPS, 0x1000..0x2000).unwrap_err().errno(), libc::EFAULT);
        assert_eq!(select(MAPS, 0x48000..0x58000).unwrap_err().errno(), libc::EFAULT);
    }
}
