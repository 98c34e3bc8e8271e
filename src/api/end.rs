//! The fate of unresolved pages at the end, and of dropped pages.

use crate::abi::*;

/// How to end a slot or handle that has unresolved pages. They are never left to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// End only if there are none. Otherwise the call fails with EBUSY, and the slot or handle goes on.
    Complete,
    /// Fill them first. If one cannot be filled, the call fails with EIO, or ETIMEDOUT if the time is up
    /// ([`Options::end_timeout`](crate::Options::end_timeout)), and the slot or handle goes on.
    Populate,
    /// Fill them first, and poison those that cannot be filled in time.
    PopulateOrPoison,
    /// Poison them: a touch raises SIGBUS. Stop the vCPUs first.
    Poison,
    /// Leave them to another handler of the same userfaultfd. Only for a handle, and only if each of its slots has a
    /// [`Memory::userfaultfd`](crate::Memory::userfaultfd); otherwise EINVAL.
    HandOver,
}

/// The contents of dropped pages at their next touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The source fills them again.
    Refill,
    /// They read as zero: the guest has given them back.
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
