//! The host mapping of a range of guest memory, and the operations on it.
//!
//! Upper layers know pages and their owners. This layer knows only memory: the file behind a mapping ([`shared`]) and
//! the library's own memory ([`buffer`]).

pub mod buffer;
pub mod shared;

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MprotectFlags};

use crate::alloc::{refusable, try_collect, NoMemory};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{lock, read, write, Arc, Mutex, RwLock};
use shared::{exist, SharedFile};

/// Bytes of a huge page, where base pages have 4 KiB.
pub const HUGE: u64 = 2 << 20;

/// A piece of a range and the host address it is mapped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the range, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The host address.
    pub hva: u64,
}

impl Extent {
    /// The extents that replace this one when the kernel moves (`to` given) or unmaps the addresses `hva`.
    pub fn moved(&self, hva: &Range<u64>, to: Option<u64>) -> impl Iterator<Item = Self> {
        let piece = |from: u64, end: u64, hva| Self { offset: self.offset + (from - self.hva), len: end - from, hva };
        let all = self.hva..self.hva + self.len;
        let (start, end) = (hva.start.clamp(all.start, all.end), hva.end.clamp(all.start, all.end));
        let moved = to.map(|to| piece(start, end, to + (start - hva.start)));
        let left = [Some(piece(all.start, start, all.start)), moved, Some(piece(end, all.end, end))];
        left.into_iter().flatten().filter(|extent| extent.len > 0)
    }
}

/// The parts of a [`Region`].
pub struct Parts {
    pub gpa: u64,
    pub len: u64,
    pub granule: u64,
    pub private: bool,
    pub writable: bool,
    pub shared: Option<Arc<SharedFile>>,
    pub extents: Vec<Extent>,
}

/// The host mapping of a range of guest memory. Pages are counted from its start.
pub struct Region {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Page size in bytes.
    pub granule: u64,
    /// The mapping is MAP_PRIVATE.
    pub private: bool,
    /// The mapping may be written.
    pub writable: bool,
    /// The file behind it, when its pages are filled in place.
    pub shared: Option<Arc<SharedFile>>,
    /// The slot has ended, and all pages were taken from their owners for good. Pages that are given back from now on
    /// need no more care, and inaccessible pages stay inaccessible. Set with the slot's claims locked.
    pub ending: AtomicBool,
    extents: RwLock<Vec<Extent>>,
    /// How often the extents have changed.
    changes: AtomicU64,
    /// Pages that [`Region::protect`] has made inaccessible, until they are dropped.
    inaccessible: Mutex<Vec<Range<u64>>>,
}

impl Region {
    pub fn new(parts: Parts) -> Self {
        let Parts { gpa, len, granule, private, writable, shared, extents } = parts;
        Self {
            gpa,
            len,
            granule,
            private,
            writable,
            shared,
            ending: AtomicBool::new(false),
            extents: RwLock::new(extents),
            changes: AtomicU64::new(0),
            inaccessible: Mutex::default(),
        }
    }

    /// The same memory in a forked child.
    pub fn forked(&self) -> Result<Self, NoMemory> {
        let &Self { gpa, len, granule, private, writable, .. } = self;
        let (shared, extents) = (self.shared.clone(), self.extents()?);
        Ok(Self::new(Parts { gpa, len, granule, private, writable, shared, extents }))
    }

    /// All pages of the region.
    pub fn all(&self) -> Range<u64> {
        0..self.len / self.granule
    }

    /// The bytes of `pages`, as offsets in the slot.
    pub fn bytes_of(&self, pages: &Range<u64>) -> Range<u64> {
        pages.start * self.granule..pages.end * self.granule
    }

    /// The address where `pages` are mapped, after making them exist and writable. Err is an errno.
    pub fn own_place(&self, pages: &Range<u64>) -> Result<NonNull<u8>, Errno> {
        let len = (pages.end - pages.start) * self.granule;
        let (hva, mapped) = self.hva_of(pages.start).ok_or(Errno::NOENT)?;
        if mapped * self.granule < len {
            return Err(Errno::NOENT);
        }
        let at = NonNull::new(hva as *mut u8).ok_or(Errno::FAULT)?;
        // Before Linux 5.14 the kernel cannot make them exist: then a write may raise SIGBUS.
        exist(at, len as usize).map(|_| at)
    }

    /// Drops the bytes of `pages`, which poison marks protect. Zeroes bytes that cannot be dropped (locked shared
    /// memory).
    pub fn drop_or_zero(&self, pages: &Range<u64>) -> Result<(), Errno> {
        self.drop_content(pages).or_else(|_| {
            let at = self.own_place(pages)?;
            // SAFETY: `own_place` made these bytes writable, and the caller's claim makes them its own.
            unsafe { at.write_bytes(0, ((pages.end - pages.start) * self.granule) as usize) };
            Ok(())
        })
    }

    /// Drops the bytes of `pages`, in this process's mapping and in the file if there is one. Err is an errno: EINVAL for
    /// locked memory that cannot be dropped.
    pub fn drop_content(&self, pages: &Range<u64>) -> Result<(), Errno> {
        if !self.private && self.shared.is_none() {
            // Do this first, for the kernel may refuse it.
            self.each_mapped(pages, |at, len| advise(at, len, libc::MADV_REMOVE))?;
        }
        // Unmap even before punching a hole, which leaves poison marks in place.
        self.unmap(pages)?;
        self.unprotect(pages)?;
        match &self.shared {
            Some(shared) => shared.punch(&self.bytes_of(pages)),
            None => Ok(()),
        }
    }

    /// Drops `pages` from the mapping in this process: private memory loses their bytes, a shared file keeps them. Err
    /// is an errno.
    pub fn unmap(&self, pages: &Range<u64>) -> Result<(), Errno> {
        self.each_mapped(pages, |at, len| match advise(at, len, libc::MADV_DONTNEED) {
            // Locked memory (mlock, mlockall).
            Err(Errno::INVAL) => advise(at, len, MADV_DONTNEED_LOCKED),
            other => other,
        })
    }

    /// Whether a poisoned page stays poisoned when the guest gives it back. In shared memory neither MADV_REMOVE nor
    /// MADV_DONTNEED makes it zero, and an inaccessible page stays inaccessible.
    pub fn keeps_poison(&self) -> bool {
        !self.private || !lock(&self.inaccessible).is_empty()
    }

    /// Makes `pages` inaccessible until they are dropped. False: the kernel refused, or there is no memory.
    pub fn protect(&self, pages: &Range<u64>) -> bool {
        let mut inaccessible = lock(&self.inaccessible);
        if refusable(|| inaccessible.try_reserve(1)).is_err() {
            return false;
        }
        inaccessible.push(pages.clone());
        self.allow(pages, MprotectFlags::empty()).is_ok()
    }

    /// Makes those of `pages` accessible again that [`Region::protect`] made inaccessible.
    fn unprotect(&self, pages: &Range<u64>) -> Result<(), Errno> {
        let rights = if self.writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        let mut inaccessible = lock(&self.inaccessible);
        let mut at = 0;
        while let Some(run) = inaccessible.get(at).cloned() {
            let part = run.start.max(pages.start)..run.end.min(pages.end);
            if part.is_empty() {
                at += 1;
                continue;
            }
            if self.ending.load(Ordering::Acquire) {
                // Pages that the end of a failed service made inaccessible stay so, even if a discard was dropping
                // them.
                return Err(Errno::CANCELED);
            }
            // A run that is cut in the middle becomes two.
            refusable(|| inaccessible.try_reserve(1)).map_err(|_| Errno::NOMEM)?;
            self.allow(&part, rights)?;
            inaccessible.swap_remove(at);
            inaccessible.extend([run.start..part.start, part.end..run.end].into_iter().filter(|rest| !rest.is_empty()));
        }
        Ok(())
    }

    fn allow(&self, pages: &Range<u64>, rights: MprotectFlags) -> Result<(), Errno> {
        // SAFETY: guest memory of a slot; the pages hold nothing.
        self.each_mapped(pages, |at, len| unsafe { rustix::mm::mprotect(at, len, rights) })
    }

    /// Forbids the kernel to make huge pages of the mapping's pages. A kernel without huge pages refuses this, which
    /// has the same effect.
    pub fn refuse_collapse(&self) {
        let advise = |at, len| {
            // SAFETY: advice about guest memory of a slot; it changes no bytes.
            let _ = unsafe { rustix::mm::madvise(at, len, Advice::LinuxNoHugepage) };
            Ok(())
        };
        let _ = self.each_mapped(&self.all(), advise);
    }

    /// Calls `act` with each mapped piece of `pages`.
    pub fn each_mapped(
        &self,
        pages: &Range<u64>,
        act: impl Fn(*mut c_void, usize) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.mapped(pages).try_for_each(|(part, hva)| {
            let len = (part.end - part.start) * self.granule;
            act(hva as *mut c_void, len as usize)
        })
    }

    /// The mapped parts of `pages`, in order, each with its address. Parts that the caller has unmapped are left out.
    pub fn mapped(&self, pages: &Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let mut rest = pages.clone();
        std::iter::from_fn(move || {
            let (part, hva) = self.next_mapped(&rest)?;
            rest.start = part.end;
            Some((part, hva))
        })
    }

    fn next_mapped(&self, pages: &Range<u64>) -> Option<(Range<u64>, u64)> {
        let bytes = self.bytes_of(pages);
        let extents = read(&self.extents);
        let first = extents.partition_point(|e| e.offset + e.len <= bytes.start);
        let extent = extents.get(first).filter(|e| e.offset < bytes.end && !bytes.is_empty())?;
        let (start, end) = (extent.offset.max(bytes.start), (extent.offset + extent.len).min(bytes.end));
        Some((start / self.granule..end / self.granule, extent.hva + (start - extent.offset)))
    }

    /// The pages that `offsets` (in bytes) touches.
    pub fn pages_of(&self, offsets: &Range<u64>) -> Range<u64> {
        offsets.start / self.granule..offsets.end.div_ceil(self.granule)
    }

    /// The pages that lie in `offsets` as a whole. The caller asks for removed bytes, or for data: a page keeps its
    /// bytes if only a part of it was removed.
    pub fn pages_inside(&self, offsets: &Range<u64>) -> Range<u64> {
        let start = offsets.start.div_ceil(self.granule);
        start..(offsets.end / self.granule).max(start)
    }

    /// The guest physical address and the length of `pages`.
    pub fn gpa_of(&self, pages: &Range<u64>) -> (u64, u64) {
        (self.gpa + pages.start * self.granule, (pages.end - pages.start) * self.granule)
    }

    /// The address of `page`, and how many pages are mapped from there on without a gap. None: the page is unmapped.
    pub fn hva_of(&self, page: u64) -> Option<(u64, u64)> {
        let offset = page * self.granule;
        let extents = read(&self.extents);
        let after = extents.partition_point(|e| e.offset <= offset);
        let extent = extents.get(after.checked_sub(1)?)?;
        let within = offset - extent.offset;
        (within < extent.len).then(|| (extent.hva + within, (extent.len - within) / self.granule))
    }

    /// The extents that are mapped now.
    pub fn extents(&self) -> Result<Vec<Extent>, NoMemory> {
        try_collect(read(&self.extents).iter().copied())
    }

    /// Passes the extents to `each`, in the order of their offsets, with no lock held.
    pub fn each_extent(&self, mut each: impl FnMut(Extent)) {
        let mut from = 0;
        while let Some(extent) = self.next_extent(from) {
            from = extent.offset + extent.len;
            each(extent);
        }
    }

    /// The first extent from this offset on.
    pub fn next_extent(&self, offset: u64) -> Option<Extent> {
        let extents = read(&self.extents);
        extents.get(extents.partition_point(|extent| extent.offset < offset)).copied()
    }

    /// Makes room for `more` extents.
    pub fn reserve_extents(&self, more: usize) -> Result<(), NoMemory> {
        Ok(refusable(|| write(&self.extents).try_reserve(more))?)
    }

    /// Notes that the kernel moved (`to` given) or unmapped the addresses `hva`. The caller has made room for two more
    /// extents for each one changed.
    pub fn moved(&self, hva: &Range<u64>, to: Option<u64>) {
        let mut extents = write(&self.extents);
        while let Some(n) = extents.iter().position(|e| e.hva < hva.end && hva.start < e.hva + e.len) {
            let was = extents.remove(n);
            self.changes.fetch_add(1, Ordering::SeqCst);
            for piece in was.moved(hva, to) {
                let at = extents.partition_point(|e| e.offset < piece.offset);
                extents.insert(at, piece);
            }
        }
    }

    /// How often the kernel has moved or unmapped a part of the region, as far as it was reported.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }
}

/// Since Linux 5.18; the C library may not know it.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

fn advise(at: *mut c_void, len: usize, advice: libc::c_int) -> Result<(), Errno> {
    // SAFETY: guest memory of a slot, which the caller gave to the library and wants dropped.
    match unsafe { libc::madvise(at, len, advice) } {
        0 => Ok(()),
        // SAFETY: errno of this thread.
        _ => Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_extent_leaves_its_other_parts() {
        let extent = Extent { offset: 100, len: 50, hva: 1000 };
        let left = |hva, to| extent.moved(&hva, to).map(|e| (e.offset, e.len, e.hva)).collect::<Vec<_>>();
        assert_eq!(left(1000..1050, None), []);
        assert_eq!(left(900..1010, None), [(110, 40, 1010)]);
        assert_eq!(left(1010..1020, None), [(100, 10, 1000), (120, 30, 1020)]);
        assert_eq!(left(1010..1020, Some(5000)), [(100, 10, 1000), (110, 10, 5000), (120, 30, 1020)]);
        assert_eq!(left(1040..1100, Some(5000)), [(100, 40, 1000), (140, 10, 5000)]);
        assert_eq!(left(900..1100, Some(5000)), [(100, 50, 5100)]);
    }
}
