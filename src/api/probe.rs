//! What works on this host.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::abi::*;
use crate::error::{Error, Result};
use crate::probe::{report, Report};

/// What works on this host, and why the rest does not.
pub struct Probe {
    report: Report,
    /// KUF_FEATURE_*.
    features: u32,
}

/// A way to catch the guest's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mechanism {
    /// userfaultfd(2).
    Userfaultfd,
    /// The KVM userfault bitmap, which is in no released kernel.
    KvmBitmap,
    /// KVM asynchronous userfaults, which are in no released kernel.
    KvmAsync,
}

/// A feature of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// Pages can be poisoned.
    Poison,
    /// Shared memory can be filled in place.
    Minor,
    /// The kernel names the thread of a fault.
    ThreadId,
    /// userfaultfd serves KVM guests for this process.
    KernelFaults,
    /// userfaultfd works for this process at least for accesses from user mode.
    UserFaults,
    /// Memory can be filled on huge pages.
    Huge,
}

/// Finds out what works here. It changes nothing. `vm`: a KVM VM, for the mechanism that needs one to be found out.
pub fn probe(vm: Option<BorrowedFd<'_>>) -> Result<Probe> {
    let report = report(vm.map(|vm| vm.as_raw_fd()))?;
    Ok(Probe { features: report.features(), report })
}

impl Probe {
    /// Whether a handle can have this mechanism now: how it works here, or the error of `Kuf::open`.
    pub fn mechanism(&self, mechanism: Mechanism) -> std::result::Result<&str, &Error> {
        self.report.found(match mechanism {
            Mechanism::Userfaultfd => KUF_MECHANISM_USERFAULTFD,
            Mechanism::KvmBitmap => KUF_MECHANISM_KVM_BITMAP,
            Mechanism::KvmAsync => KUF_MECHANISM_KVM_ASYNC,
        })
    }

    /// Whether a feature works.
    pub fn has(&self, feature: Feature) -> bool {
        let feature = match feature {
            Feature::Poison => KUF_FEATURE_POISON,
            Feature::Minor => KUF_FEATURE_MINOR,
            Feature::ThreadId => KUF_FEATURE_THREAD_ID,
            Feature::KernelFaults => KUF_FEATURE_KERNEL_FAULTS,
            Feature::UserFaults => KUF_FEATURE_USER_FAULTS,
            Feature::Huge => KUF_FEATURE_HUGE,
        };
        self.features & feature != 0
    }
}
