//! Faults that the caller reads.

use std::ptr::NonNull;

use crate::abi::*;
use crate::sync::time::Duration;

/// A page fault, as given by [`Kuf::read`](crate::Kuf::read), or a run of pages that the caller has been asked for, as
/// given by [`Kuf::pending`](crate::Kuf::pending).
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Fault(kuf_fault);

// SAFETY: the pointers in it are only handed back.
unsafe impl Send for Fault {}
// SAFETY: as above.
unsafe impl Sync for Fault {}

impl Fault {
    /// The guest physical address; a multiple of the slot's page size.
    pub fn gpa(&self) -> u64 {
        self.0.gpa
    }

    /// Bytes to resolve: one page from `read`, a run of pages from `pending`.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// False: there is at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// `gpa` minus the slot's first address: the offset in an image of this slot, in bytes.
    pub fn memory_offset(&self) -> u64 {
        self.0.memory_offset
    }

    /// [`Memory::tag`](crate::Memory::tag) of the slot.
    pub fn tag(&self) -> usize {
        self.0.memory_opaque.addr()
    }

    /// Whether a thread is blocked until the page is resolved.
    pub fn is_demand(&self) -> bool {
        self.has(KUF_FAULT_DEMAND)
    }

    /// Whether the access was a write.
    pub fn is_write(&self) -> bool {
        self.has(KUF_FAULT_WRITE)
    }

    /// Whether the fault is a forked child's. Resolve it like any other.
    pub fn is_forked(&self) -> bool {
        self.has(KUF_FAULT_FORKED)
    }

    /// The thread ID of the first thread that touched the page, if the kernel reports it.
    pub fn thread(&self) -> Option<u32> {
        (self.0.thread != 0).then_some(self.0.thread)
    }

    /// The time since the fault was read from the kernel, or since the page was asked for.
    pub fn age(&self) -> Duration {
        Duration::from_nanos(self.0.age_ns)
    }

    /// Where to write the bytes of the page before [`Kuf::resolve_in_place`](crate::Kuf::resolve_in_place); valid until
    /// the page is resolved. None if the slot is not filled in place, and from `pending`.
    pub fn place(&self) -> Option<NonNull<u8>> {
        NonNull::new(self.0.place.cast())
    }

    fn has(&self, flag: u32) -> bool {
        self.0.flags & flag != 0
    }
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fault")
            .field("gpa", &format_args!("{:#x}", self.gpa()))
            .field("len", &format_args!("{:#x}", self.len()))
            .field("demand", &self.is_demand())
            .field("write", &self.is_write())
            .field("thread", &self.thread())
            .finish_non_exhaustive()
    }
}

/// Fills the spare room of `faults` for `n` more with `fill`, which returns how many it wrote.
pub(crate) fn append<E>(
    faults: &mut Vec<Fault>,
    n: usize,
    fill: impl FnOnce(&mut [std::mem::MaybeUninit<kuf_fault>]) -> Result<usize, E>,
) -> Result<usize, E> {
    let spare = &mut faults.spare_capacity_mut()[..n];
    // SAFETY: a Fault is a kuf_fault and nothing else.
    let room = unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), n) };
    let written = fill(room)?.min(n);
    // SAFETY: that many were written.
    unsafe { faults.set_len(faults.len() + written) };
    Ok(written)
}
