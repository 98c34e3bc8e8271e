//! `kuf_resolve`: what the host brings, asked for or not.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::config::Resolution;
use super::host::{filling_here, refuse_inside_quiet};
use super::Service;
use crate::claims::{Early, Id};
use crate::error::{Error, Result};
use crate::mechanism::Content;
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
        if let Resolution::Data(src) = how {
            check_mapped(src, len)?;
            check_not_unresolved(&map, src, len)?;
        }
        let opened = self.resolve_pages(slot, pages.clone(), how)?;
        if slot.shared.is_none() {
            // A child's private copy is filled by the same bytes. It may be gone at any moment: that is no error here.
            for fork in map.forks_of(slot) {
                let _ = self.resolve_pages(fork, pages.clone(), how);
            }
        }
        Ok(opened * slot.granule)
    }

    fn resolve_pages(&self, slot: &Arc<Slot>, pages: Range<u64>, how: Resolution) -> Result<u64> {
        let mut opened = 0;
        let mut left = vec![pages.clone()];
        // A second round only for parts whose callback returned between the two looks.
        while let Some(part) = left.pop() {
            let taken = slot.claims().take(&slot.pages, part.clone(), slot.in_place(), filling_here(slot));
            for asked in &taken.asked {
                self.stats.filling.record(asked.elapsed());
            }
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
            self.stats.bytes_populated.add(taken.ahead * slot.granule);
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
            Resolution::Zero => match place()? {
                Some(at) => {
                    // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                    unsafe { at.write_bytes(0, len) };
                    Content::ZeroInPlace
                }
                None => Content::Zero,
            },
            Resolution::Data(src) => match place()? {
                Some(at) => {
                    read_host(src.wrapping_add(((run.start - base) * slot.granule) as usize), at, len)?;
                    Content::InPlace
                }
                None => Content::Data(src),
            },
        };
        // Data is counted from the first page of the call, which is where src starts.
        let (opened, result) = self.install(slot, id, run, base, content);
        result.map(|()| opened).map_err(|failed| failed.errno)
    }

    /// Keeps bytes for pages that a callback may be writing to at this moment.
    fn early(&self, slot: &Slot, run: &Range<u64>, base: u64, how: Resolution) -> Result<Early> {
        Ok(match how {
            Resolution::Zero => Early::Zero,
            Resolution::InPlace => Early::InPlace,
            Resolution::Poison => Early::Poison,
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
    let page = rustix::param::page_size();
    let start = src.addr() & !(page - 1);
    let short = || Error::new(libc::EFAULT, format!("src is not mapped over {len:#x} bytes: nothing was resolved"));
    let end = src.addr().checked_add(len as usize).ok_or_else(short)?.next_multiple_of(page);
    let mut resident = [0_u8; 512];
    for at in (start..end).step_by(resident.len() * page) {
        let len = (end - at).min(resident.len() * page);
        // SAFETY: only looks up what is mapped; `resident` has a byte for each page.
        if unsafe { libc::mincore(at as *mut _, len, resident.as_mut_ptr()) } != 0 {
            return Err(short());
        }
    }
    Ok(())
}

/// Refuses a source that is unresolved guest memory: reading it would wait for this very service.
fn check_not_unresolved(map: &Map, src: *const u8, len: u64) -> Result<()> {
    let src = src.addr() as u64;
    for slot in map.slots().iter().filter(|slot| !slot.mechanism.remote()) {
        for (slot, pages) in map.within_hva(slot.mechanism.id(), src..src.saturating_add(len)) {
            if slot.pages.first_open(pages).is_some() {
                let text = "src is guest memory that is not present itself: reading it would wait for this service";
                return Err(Error::new(libc::EDEADLK, text));
            }
        }
    }
    Ok(())
}

/// Copies from memory of the host's that may turn out unreadable: by the kernel, which says so instead of faulting.
fn read_host(src: *const u8, to: NonNull<u8>, len: usize) -> std::result::Result<(), i32> {
    let mut done = 0;
    while done < len {
        // SAFETY: `done` is below `len`, for which `to` has room.
        let local = libc::iovec { iov_base: unsafe { to.add(done) }.as_ptr().cast(), iov_len: len - done };
        let remote = libc::iovec { iov_base: src.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
        let me = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: writes only where `local` says, which is this thread's for the time of the call.
        let n = unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) };
        match usize::try_from(n) {
            Ok(0) | Err(_) => return Err(libc::EFAULT),
            Ok(n) => done += n,
        }
    }
    Ok(())
}
