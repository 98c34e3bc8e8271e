//! What becomes of pages that are not filled.

use crate::abi::*;

/// What becomes of the unresolved pages of a slot or handle that ends. They are never left to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There are none: else the call fails with EBUSY, and all goes on as before.
    Complete,
    /// They are filled first. If one cannot be filled the call fails with EIO, and all goes on as before.
    Populate,
    /// They are filled first, and those that cannot be filled are poisoned.
    PopulateOrPoison,
    /// They are poisoned: a touch raises SIGBUS. Stop the vCPUs before.
    Poison,
    /// They are left to another handler of the same userfaultfd. Only for a handle of which every slot came with
    /// [`Memory::userfaultfd`](crate::Memory::userfaultfd), and not for a single slot.
    HandOver,
}

/// What becomes of pages whose content is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The next touch fills them again.
    Refill,
    /// The guest gave them back: they read as zero.
    Zero,
}

impl End {
    /// KUF_END_*.
    pub(crate) fn flags(self) -> u32 {
        match self {
            Self::Complete => 0,
            Self::Populate => KUF_END_POPULATE,
            Self::PopulateOrPoison => KUF_END_POPULATE | KUF_END_POISON,
            Self::Poison => KUF_END_POISON,
            Self::HandOver => KUF_END_HANDOVER,
        }
    }
}
