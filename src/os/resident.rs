//! Finds which pages of this process's memory exist, without touching them.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::uapi::pagemap::*;

/// An entry of pagemap: the page is mapped, the zero page included.
const PRESENT: u64 = 1 << 63;
/// The page is swapped out, or the entry is a mark and no page.
const SWAPPED: u64 = 1 << 62;
/// The page is write-protected through userfaultfd. Together with [`SWAPPED`] the entry may be such a mark for a page
/// that never existed.
const PROTECTED: u64 = 1 << 57;

/// Runs that one PAGEMAP_SCAN can return.
const REGIONS: usize = 64;

/// `/proc/self/pagemap` of the process that opened it, or None where it cannot be opened.
pub struct Pagemap(Option<OwnedFd>);

/// The properties of a slot that decide how its pages are looked up.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Bytes of a page.
    pub granule: u64,
    /// MAP_PRIVATE.
    pub private: bool,
    /// The kernel reports faults of pages that the file has and that are not mapped (minor faults).
    pub in_place: bool,
}

impl Pagemap {
    pub fn open() -> Self {
        Self(rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok())
    }

    /// The parts of `pages`, in order, whose touch raises no fault that a service would receive. Either the page table
    /// has a page there, or the mark of a poisoned or swapped-out one; or the page is in a file whose faults are
    /// reported only where the file has no page. None: the kernel cannot tell.
    ///
    /// `parts`: runs of pages, each with the address where it is mapped.
    pub fn there(&self, parts: impl Iterator<Item = (Range<u64>, u64)>, kind: Kind) -> Option<Vec<Range<u64>>> {
        let mut runs = Runs::default();
        for (part, hva) in parts {
            self.look(hva, &part, kind, &mut runs)?;
        }
        Some(runs.0)
    }

    fn look(&self, hva: u64, pages: &Range<u64>, kind: Kind, runs: &mut Runs) -> Option<()> {
        let table = self.in_table(hva, pages, kind.granule);
        let small = kind.granule == rustix::param::page_size() as u64;
        match (table, kind.in_place) {
            // The kernel reports a fault of a page that is not mapped, even if the file has it.
            (table, true) => table.into_iter().flatten().for_each(|run| runs.add(run)),
            (Some(table), false) if kind.private && small => table.into_iter().for_each(|run| runs.add(run)),
            // A file may have a page that is not mapped, and an old pagemap does not report huge pages. mincore sees
            // both, but no marks.
            (table, false) => {
                let mut there = resident(hva, pages.end - pages.start, kind.granule)?;
                for Range { start, end } in table.into_iter().flatten() {
                    there[(start - pages.start) as usize..(end - pages.start) as usize].fill(true);
                }
                runs.add_each(pages.start, there.into_iter());
            }
        }
        Some(())
    }

    /// The runs of `pages` with an entry in the page table; the first page is at `hva`. None: the kernel cannot tell.
    fn in_table(&self, hva: u64, pages: &Range<u64>, granule: u64) -> Option<Vec<Range<u64>>> {
        let n = pages.end - pages.start;
        let mut runs = Runs::default();
        if let Some(found) = self.scan(hva..hva + n * granule) {
            let page_at = |at: u64| pages.start + (at - hva) / granule;
            found.into_iter().for_each(|run| runs.add(page_at(run.start)..page_at(run.end)));
        } else if granule == rustix::param::page_size() as u64 {
            runs.add_each(pages.start, self.entries(hva / granule, n)?.into_iter().map(is_there));
        } else {
            return None;
        }
        Some(runs.0)
    }

    /// The addresses with an entry, by PAGEMAP_SCAN. None: this kernel has no such call, or there is no pagemap.
    fn scan(&self, bytes: Range<u64>) -> Option<Vec<Range<u64>>> {
        let mut there = Vec::new();
        let fd = self.0.as_ref()?.as_raw_fd();
        let mut at = bytes.start;
        while at < bytes.end {
            let mut regions = [page_region::default(); REGIONS];
            let mut scan = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                start: at,
                end: bytes.end,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: REGIONS as u64,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
                ..pm_scan_arg::default()
            };
            // SAFETY: `scan` is the struct that the request was computed from; the kernel writes to it, and at most
            // `REGIONS` of `regions`.
            let found = unsafe { libc::ioctl(fd, libc::c_ulong::from(PAGEMAP_SCAN) as _, &mut scan) };
            let found = regions.get(..usize::try_from(found).ok()?)?;
            for region in found {
                match region.categories {
                    0 => there.extend(self.unwritten(region.start..region.end)?),
                    _ => there.push(region.start..region.end),
                }
            }
            if scan.walk_end <= at {
                return None;
            }
            at = scan.walk_end;
        }
        Some(there)
    }

    /// The addresses with an entry among those that PAGEMAP_SCAN calls neither present nor written. Such an entry is a
    /// write-protection mark where no page is. From Linux 7.3 on, which reports "written" only of memory with write
    /// protection, it may also be a swapped-out page or a poison mark. For huge pages the entry does not show the mark.
    fn unwritten(&self, bytes: Range<u64>) -> Option<Vec<Range<u64>>> {
        let page = rustix::param::page_size() as u64;
        let first = bytes.start / page;
        let mut runs = Runs::default();
        let entries = self.entries(first, bytes.end / page - first)?.into_iter();
        runs.add_each(first, entries.map(|entry| entry & PRESENT != 0 || entry & PROTECTED == 0));
        Some(runs.0.into_iter().map(|run| run.start * page..run.end * page).collect())
    }

    /// Whether the page table has an entry at `hva`. None: the kernel cannot tell.
    pub fn mapped(&self, hva: u64) -> Option<bool> {
        self.entries(hva / rustix::param::page_size() as u64, 1)?.first().copied().map(is_there)
    }

    fn entries(&self, first: u64, n: u64) -> Option<Vec<u64>> {
        let mut bytes = vec![0_u8; n as usize * 8];
        let got = rustix::io::pread(self.0.as_ref()?, &mut bytes, first * 8).ok()?;
        (got == bytes.len())
            .then(|| bytes.chunks_exact(8).map(|entry| entry.try_into().map_or(0, u64::from_ne_bytes)).collect())
    }
}

/// Whether an entry of pagemap is a page, or a mark other than that of write protection.
fn is_there(entry: u64) -> bool {
    entry & PRESENT != 0 || entry & (SWAPPED | PROTECTED) == SWAPPED
}

/// Runs of pages, in order.
#[derive(Default)]
struct Runs(Vec<Range<u64>>);

impl Runs {
    /// Appends a run, which starts at the end of the last one or after it.
    fn add(&mut self, run: Range<u64>) {
        match self.0.last_mut().filter(|last| last.end == run.start) {
            Some(last) => last.end = run.end,
            None => self.0.push(run),
        }
    }

    /// Appends the pages from `first` on for which `there` is true.
    fn add_each(&mut self, first: u64, there: impl Iterator<Item = bool>) {
        for (page, _) in (first..).zip(there).filter(|(_, there)| *there) {
            self.add(page..page + 1);
        }
    }
}

/// Whether the page of `granule` bytes at `hva` exists, mapped or not. None: the kernel cannot tell.
pub fn exists(hva: u64, granule: u64) -> Option<bool> {
    resident(hva, 1, granule)?.first().copied()
}

/// The pages that mincore(2) reports. It sees no marks, and of swapped-out pages only those still in memory. None: the
/// call fails.
fn resident(hva: u64, n: u64, granule: u64) -> Option<Vec<bool>> {
    let page = rustix::param::page_size() as u64;
    if granule == page {
        let mut resident = vec![0_u8; n as usize];
        // SAFETY: the call only looks up pages; `resident` has a byte for each.
        let looked = unsafe { libc::mincore(hva as *mut _, (n * page) as usize, resident.as_mut_ptr()) } == 0;
        return looked.then(|| resident.into_iter().map(|byte| byte & 1 != 0).collect());
    }
    let huge = |n| {
        let mut resident = 0_u8;
        // SAFETY: looks up one base page and writes one byte.
        let looked = unsafe { libc::mincore((hva + n * granule) as *mut _, page as usize, &mut resident) } == 0;
        looked.then_some(resident & 1 != 0)
    };
    (0..n).map(huge).collect()
}
