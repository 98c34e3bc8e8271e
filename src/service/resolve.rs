//! `kuf_resolve`: what the host brings, asked for or not.

use std::cell::Cell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::config::Resolution;
use super::host::{filling_here, refuse_inside_quiet};
use super::zero::Bytes;
use super::Service;
use crate::claims::{Early, Id};
use crate::error::{Error, Result};
use crate::mechanism::Content;
use crate::memory::outside::{bring_in, mapped, read_host};
use crate::memory::{Map, Slot};

impl Service {
    /// Makes `gpa..gpa+len` present. Returns the bytes made so by this call.
    pub fn resolve(&self, gpa: u64, len: u64, how: Resolution) -> Result<u64> {
        refuse_inside_quiet("kuf_resolve")?;
        self.check_open()?;
        let map = self.memory.map();
        let (slot, offsets) = map.range(gpa, len)?;
        let pages = aligned(slot, &offsets)?;
        if matches!(how, Resolution::InPlace) && !slot.in_place() {
            let text = "KUF_RESOLVE_IN_PLACE needs a slot that is filled in place (KUF_MEMORY_FD, minor faults)";
            return Err(Error::new(libc::EINVAL, text));
        }
        if let Some(errno) = slot.gone() {
            return Err(Error::new(errno, "the process behind this memory slot is gone"));
        }
        // A single page that the kernel copies is copied as a whole or not at all: it says itself when src is too short.
        let whole = pages.end - pages.start == 1 && !slot.in_place();
        if let Resolution::Data(src) = how {
            if !whole {
                check_mapped(src, len)?;
            }
            check_not_unresolved(&map, src, len)?;
            let by_kernel = !slot.in_place() && !self.detects(slot);
            if by_kernel && !(whole && last_src(src)) {
                // The kernel copies from there with the gate held, which nobody may hold while a disk is read. Whether that
                // is needed mincore does not say of a file that this process may only read. What is wrong with it, the
                // copy will say.
                let _ = bring_in(src, len as usize);
            }
        }
        if matches!(how, Resolution::Present) {
            return Ok(self.resolve_present(slot, pages)? * slot.granule);
        }
        let opened = self.resolve_pages(slot, pages.clone(), how)?;
        if slot.shared.is_none() {
            // A child's private copy is filled by the same bytes. It may be gone at any moment: that is no error here.
            for fork in map.forks_of(slot) {
                let _ = self.resolve_pages(fork, pages.clone(), how);
            }
        }
        if let (0, true, Resolution::Data(src)) = (opened, whole, how) {
            // Nothing was copied, and src not looked at.
            check_mapped(src, len)?;
        }
        Ok(opened * slot.granule)
    }

    pub(super) fn resolve_pages(&self, slot: &Arc<Slot>, pages: Range<u64>, how: Resolution) -> Result<u64> {
        let mut opened = 0;
        let mut left = vec![pages.clone()];
        // A second round only for parts whose callback returned between the two looks.
        while let Some(part) = left.pop() {
            let taken = slot.claims().take(&slot.pages, part.clone(), slot.in_place(), filling_here(slot));
            for (n, run) in taken.install.iter().enumerate() {
                match self.resolve_run(slot, taken.id, run.clone(), pages.start, how) {
                    Ok(n) => opened += n,
                    Err(errno) => {
                        for run in &taken.install[n..] {
                            // Another thread may have brought bytes for it meanwhile.
                            let early = slot.claims().early(run.clone(), taken.id);
                            self.install_early(slot, taken.id, early);
                            self.abandon(slot, taken.id, run.clone());
                        }
                        return Err(failure(errno));
                    }
                }
            }
            for asked in &taken.asked {
                self.stats.here().filling(asked.elapsed());
            }
            self.stats.here().bytes_populated(taken.populated * slot.granule);
            self.stats.here().bytes_ahead(taken.ahead * slot.granule);
            for run in taken.early {
                let bytes = self.early(slot, &run, pages.start, how)?;
                let stashed = slot.claims().stash(run.clone(), bytes);
                if stashed.is_err() {
                    left.push(run);
                }
            }
        }
        Ok(opened)
    }

    fn resolve_run(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        run: Range<u64>,
        base: u64,
        how: Resolution,
    ) -> std::result::Result<u64, i32> {
        let len = ((run.end - run.start) * slot.granule) as usize;
        let place = || slot.mechanism.place(slot, &run);
        let content = match how {
            Resolution::Poison => {
                return Ok(self.poison(slot, id, run, libc::EIO, "was given up by the host"));
            }
            Resolution::InPlace => Content::InPlace,
            Resolution::Present => return self.book_present(slot, id, run),
            Resolution::Zero => match place()? {
                Some(at) => {
                    // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                    unsafe { at.write_bytes(0, len) };
                    Content::ZeroInPlace
                }
                None => Content::Zero,
            },
            Resolution::Data(src) => {
                let from = src.wrapping_add(((run.start - base) * slot.granule) as usize);
                match place()? {
                    Some(at) => {
                        read_host(from, at, len)?;
                        let zeroes = &self.zeroes(slot, id, &run, at);
                        let bytes = Bytes { zeroes, ..Bytes::plain(Content::InPlace, run.start) };
                        let (opened, result) = self.install_bytes(slot, id, run, bytes);
                        return result.map(|()| opened).map_err(|failed| failed.errno);
                    }
                    None if self.detects(slot) => return self.resolve_through_buffer(slot, id, run, from),
                    None => Content::Data(src),
                }
            }
        };
        // Data is counted from the first page of the call, which is where src starts.
        let (opened, result) = self.install(slot, id, run, base, content);
        result.map(|()| opened).map_err(|failed| failed.errno)
    }

    /// `from` may be unreadable: only what was copied from it can be looked through.
    fn resolve_through_buffer(
        &self,
        slot: &Arc<Slot>,
        id: Id,
        run: Range<u64>,
        from: *const u8,
    ) -> std::result::Result<u64, i32> {
        let step = (self.config.populate_run / slot.granule).clamp(1, run.end - run.start);
        let buffer = self.buffers.take((step * slot.granule) as usize).map_err(|e| e.errno())?;
        let (mut opened, mut at, mut result) = (0, run.start, Ok(()));
        while at < run.end && result.is_ok() {
            let part = at..run.end.min(at + step);
            at = part.end;
            let src = from.wrapping_add(((part.start - run.start) * slot.granule) as usize);
            result = read_host(src, buffer.at(), ((part.end - part.start) * slot.granule) as usize).and_then(|()| {
                let zeroes = &self.zeroes(slot, id, &part, buffer.at());
                let content = Content::Data(buffer.at().as_ptr());
                let bytes = Bytes { zeroes, ..Bytes::plain(content, part.start) };
                let (n, result) = self.install_bytes(slot, id, part, bytes);
                opened += n;
                result.map_err(|failed| failed.errno)
            });
        }
        self.buffers.put(buffer);
        result.map(|()| opened)
    }

    /// Keeps bytes for pages that a callback may be writing to at this moment.
    fn early(&self, slot: &Slot, run: &Range<u64>, base: u64, how: Resolution) -> Result<Early> {
        Ok(match how {
            Resolution::Zero => Early::Zero,
            Resolution::InPlace => Early::InPlace,
            Resolution::Poison => Early::Poison,
            // Only what is written in place is waited for, and that is refused before.
            Resolution::Present => return Err(Error::new(libc::EINVAL, "the slot is filled in place")),
            Resolution::Data(src) => {
                let mut bytes = vec![0_u8; ((run.end - run.start) * slot.granule) as usize];
                let from = src.wrapping_add(((run.start - base) * slot.granule) as usize);
                read_host(from, NonNull::from(bytes.as_mut_slice()).cast(), bytes.len()).map_err(failure)?;
                Early::Data(bytes)
            }
        })
    }
}

/// The pages of a range that has to be whole granules.
pub(super) fn aligned(slot: &Slot, offsets: &Range<u64>) -> Result<Range<u64>> {
    if offsets.start % slot.granule != 0 || offsets.end % slot.granule != 0 {
        let text = format!("gpa and len have to be multiples of the slot's granule, {:#x}", slot.granule);
        return Err(Error::new(libc::EINVAL, text));
    }
    Ok(slot.pages_of(offsets))
}

fn failure(errno: i32) -> Error {
    match errno {
        libc::EFAULT => Error::new(libc::EFAULT, "src is not readable over len bytes (or the bytes are not in place)"),
        libc::ENOMEM | libc::ENOSPC => Error::new(libc::ENOMEM, "the kernel has no memory for these pages"),
        libc::ESRCH => Error::new(libc::ESRCH, "the process behind this memory slot is gone"),
        errno => Error::system("making pages present", errno),
    }
}

/// Refuses a source that ends before the range does, before anything is opened. What is mapped but unreadable is found
/// by the kernel when it gets there.
fn check_mapped(src: *const u8, len: u64) -> Result<()> {
    mapped(src, len as usize)
        .map_err(|errno| Error::new(errno, format!("src is not mapped over {len:#x} bytes: nothing was resolved")))
}

/// Whether this thread's last single page came from there too, as from a buffer that is filled again for each: it is in
/// memory. To ask the kernel would take a good part of the time that the page takes.
fn last_src(src: *const u8) -> bool {
    thread_local! {
        static LAST: Cell<usize> = const { Cell::new(0) };
    }
    LAST.replace(src.addr()) == src.addr()
}

/// Refuses a source that is unresolved guest memory: reading it would wait for this very service.
pub(super) fn check_not_unresolved(map: &Map, src: *const u8, len: u64) -> Result<()> {
    let src = src.addr() as u64;
    if map.mapped_here(src..src.saturating_add(len)).any(|(slot, pages)| slot.pages.first_open(pages).is_some()) {
        let text = "src is guest memory that is not present itself: reading it would wait for this service";
        return Err(Error::new(libc::EDEADLK, text));
    }
    Ok(())
}
