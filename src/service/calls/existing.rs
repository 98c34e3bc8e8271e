//! Pages that exist already when their slot is added.
//!
//! The kernel reports no fault of an existing page: the guest reads its bytes, mostly the zeroes of MAP_POPULATE,
//! mlockall, preallocation, or a huge page of which one byte was touched. So the library refuses such memory, unless
//! the caller vouches for it (`KUF_MEMORY_POPULATED`): then these pages are present.
//!
//! The library looks at memory twice: before it changes anything, where most refusals come; and when the memory is
//! registered and the gate is held, so that it does not miss a page that appeared in between. Adopted memory was mostly
//! registered before, and a refusal must not unregister it, so the library looks at it once. It looks at the pages of a
//! file only before, because that takes the file's lock; a page that appears in the file later raises a minor fault,
//! unless it is mapped too.
//!
//! Poison marks that an earlier slot has left count as existing pages, in shared memory too: they are in the page
//! table, and a touch of one raises no userfault either.

use std::ops::Range;

use rustix::io::Errno;

use crate::error::{words, Error, Result};
use crate::mapping::shared::SharedFile;
use crate::memory::Slot;
use crate::pages::State;
use crate::service::config::NewMemory;

/// Pages looked at by one system call.
const LOOK: u64 = 1 << 15;

/// The bytes of the slot that its file holds and that count as present. Refuses them unless the flags allow them.
pub fn in_file(new: &NewMemory, granule: u64, file: Option<&SharedFile>) -> Result<Vec<Range<u64>>> {
    let Some(file) = file.filter(|_| !new.fill_all) else { return Ok(Vec::new()) };
    match file.data()? {
        Some(data) if new.populated => Ok(data),
        Some(data) => {
            let mut found = Found::default();
            data.iter().for_each(|bytes| found.add(bytes.start / granule..bytes.end.div_ceil(granule)));
            found.refuse(new.hva, granule, new.len / granule).map(|()| Vec::new())
        }
        None if new.populated => {
            let text = "hugetlbfs cannot tell which pages of fd exist: pass an empty file, or KUF_MEMORY_FILL_ALL";
            Err(Error::new(Errno::NOTSUP, text))
        }
        None => {
            let text = "fd is a hugetlbfs file that holds pages, which would not be filled: pass an empty file, or \
                        KUF_MEMORY_FILL_ALL";
            Err(Error::new(Errno::BUSY, text))
        }
    }
}

/// Looks before `slot` is registered: existing pages become present if the flags allow them, else the slot is refused.
/// Skips slots whose pages are about to be dropped, and mechanisms that do not use the page table.
pub fn look_before(new: &NewMemory, slot: &Slot) -> Result<()> {
    match (slot.in_place() && new.fill_all || slot.facts().gates_kvm_only, new.populated) {
        (true, _) => Ok(()),
        (false, true) => book(slot),
        (false, false) => refuse(new, slot),
    }
}

/// The same after the slot is registered, with the gate held.
pub fn look_after(new: &NewMemory, slot: &Slot) -> Result<()> {
    match new.populated || !slot.facts().adopted {
        true => look_before(new, slot),
        false => Ok(()),
    }
}

fn book(slot: &Slot) -> Result<()> {
    each(slot, |run| {
        let _claims = slot.claims();
        slot.pages.reserve_ends(&run)?;
        slot.pages.transition(run, State::Absent, State::Present);
        Ok(())
    })
}

fn refuse(new: &NewMemory, slot: &Slot) -> Result<()> {
    let mut found = Found::default();
    each(slot, |run| {
        found.add(run);
        Ok(())
    })?;
    found.refuse(new.hva, slot.granule, slot.pages.total()).map_err(|error| match new.fill_all {
        true => {
            let text =
                "KUF_MEMORY_FILL_ALL of a file that holds pages needs minor faults, which this kernel does not have \
                        for it: pass an empty file";
            Error::new(Errno::NOTSUP, text)
        }
        false => error,
    })
}

/// Calls `act` with each run of existing pages, as far as this process can see them.
fn each(slot: &Slot, mut act: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    if slot.facts().remote {
        return Ok(());
    }
    let total = slot.pages.total();
    for from in (0..total).step_by(LOOK as usize) {
        let there = slot.binding.resident(&(from..total.min(from + LOOK)));
        let runs = there.ok_or_else(|| {
            let text = "the library cannot see which pages of this memory exist (/proc/self/pagemap, mincore)";
            Error::new(Errno::NOTSUP, text)
        })?;
        runs.into_iter().try_for_each(&mut act)?;
    }
    Ok(())
}

/// Pages that exist.
#[derive(Default)]
struct Found {
    pages: u64,
    first: u64,
}

impl Found {
    fn add(&mut self, run: Range<u64>) {
        if self.pages == 0 {
            self.first = run.start;
        }
        self.pages += run.end - run.start;
    }

    fn refuse(&self, hva: u64, granule: u64, total: u64) -> Result<()> {
        let Self { pages, first } = self;
        if *pages == 0 {
            return Ok(());
        }
        let at = hva + first * granule;
        let text = words!(
            "{pages} of {total} pages exist already, the first at hva {at:#x}: they would not be filled. Add memory before \
             MAP_POPULATE, mlock, preallocation or anything else touches it; or drop it first (MADV_DONTNEED, for a \
             shared file MADV_REMOVE too; KUF_MEMORY_FILL_ALL for a file that is filled in place); or set \
             KUF_MEMORY_POPULATED if what these pages hold is the guest's own"
        );
        Err(Error::new(Errno::BUSY, text))
    }
}
