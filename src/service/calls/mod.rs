//! The calls of the C ABI.

pub mod add_memory;
pub mod close;
pub mod discard;
pub mod end_slot;
pub mod ensure;
pub mod existing;
pub mod kvm;
pub mod new_memory;
pub mod poll;
pub mod remove_memory;
pub mod resolve;
pub mod settings;
pub mod take_out;

use std::ops::Range;

use rustix::io::Errno;

use crate::error::{words, Error, Result};
use crate::memory::Slot;

pub fn no_slot_starts(gpa: u64) -> Error {
    Error::new(Errno::NOENT, words!("no memory slot starts at gpa {gpa:#x}"))
}

pub fn known_flags(flags: u32, known: u32) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::new(Errno::INVAL, words!("unknown flags {unknown:#x}"))),
    }
}

pub fn unresolved(slot: &Slot) -> Error {
    let text = words!(
        "the memory slot at gpa {:#x} has unresolved pages: pass KUF_END_POPULATE to fill them or KUF_END_POISON to \
         poison them",
        slot.gpa
    );
    Error::new(Errno::BUSY, text)
}

/// The pages of a range that has to be whole granules.
pub fn aligned(slot: &Slot, offsets: &Range<u64>) -> Result<Range<u64>> {
    if offsets.start % slot.granule != 0 || offsets.end % slot.granule != 0 {
        let text = words!("gpa and len have to be multiples of the slot's page size, {:#x}", slot.granule);
        return Err(Error::new(Errno::INVAL, text));
    }
    Ok(slot.pages_of(offsets))
}
