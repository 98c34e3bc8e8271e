//! Which pages of this process's memory are there, without touching them.

use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use super::Slot;

/// An entry of pagemap: the page is mapped, the zero page included.
const PRESENT: u64 = 1 << 63;
/// It is swapped out, or what stands there is a mark and no page.
const SWAPPED: u64 = 1 << 62;
/// It is write-protected through userfaultfd. Together with [`SWAPPED`] it may be the mark that says so of a page that
/// never was.
const PROTECTED: u64 = 1 << 57;

/// `/proc/self/pagemap` of the process that opened it, where it can be.
pub struct Pagemap(Option<OwnedFd>);

impl Pagemap {
    pub fn open() -> Self {
        Self(rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok())
    }

    /// The parts of `pages` that are there now, in order.
    pub fn there(&self, slot: &Slot, pages: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (part, hva) in slot.mapped(pages) {
            let looked = self.look(slot, hva, part.end - part.start).into_iter().zip(part);
            for at in looked.filter_map(|(there, at)| there.then_some(at)) {
                match runs.last_mut().filter(|last| last.end == at) {
                    Some(last) => last.end += 1,
                    None => runs.push(at..at + 1),
                }
            }
        }
        runs
    }

    fn look(&self, slot: &Slot, hva: u64, n: u64) -> Vec<bool> {
        let page = rustix::param::page_size() as u64;
        // A page of a file may be there and not mapped, and a huge page is never swapped out: mincore knows of both.
        let mapped = (slot.private && slot.granule == page).then(|| self.entries(hva / page, n)).flatten();
        mapped.unwrap_or_else(|| resident(hva, n, slot.granule))
    }

    fn entries(&self, first: u64, n: u64) -> Option<Vec<bool>> {
        let mut bytes = vec![0_u8; n as usize * 8];
        let got = rustix::io::pread(self.0.as_ref()?, &mut bytes, first * 8).ok()?;
        let there = |entry: u64| entry & PRESENT != 0 || entry & (SWAPPED | PROTECTED) == SWAPPED;
        (got == bytes.len()).then(|| {
            bytes.chunks_exact(8).map(|entry| entry.try_into().is_ok_and(|e| there(u64::from_ne_bytes(e)))).collect()
        })
    }
}

/// As mincore(2) has it, which says nothing of marks and, of what is swapped out, only what is still in memory.
fn resident(hva: u64, n: u64, granule: u64) -> Vec<bool> {
    let page = rustix::param::page_size() as u64;
    if granule == page {
        let mut resident = vec![0_u8; n as usize];
        // SAFETY: only looks up what is mapped; `resident` has a byte for each page.
        let looked = unsafe { libc::mincore(hva as *mut _, (n * page) as usize, resident.as_mut_ptr()) } == 0;
        return resident.into_iter().map(|byte| looked && byte & 1 != 0).collect();
    }
    let huge = |n| {
        let mut resident = 0_u8;
        // SAFETY: looks up one base page and writes one byte.
        let looked = unsafe { libc::mincore((hva + n * granule) as *mut _, page as usize, &mut resident) } == 0;
        looked && resident & 1 != 0
    };
    (0..n).map(huge).collect()
}
