//! The mechanisms and features of this host.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::abi::*;
use crate::error::{Error, Result};
use crate::probe::{report, Report};

/// The mechanisms and features that work on this host, and why the rest does not. Made by [`probe()`].
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
    /// Pages can be poisoned; without it they become inaccessible (PROT_NONE).
    Poison,
    /// Shared memory can be filled in place, without a copy.
    Minor,
    /// The kernel reports the thread of a fault: block times are known.
    ThreadId,
    /// userfaultfd serves KVM guests for this process.
    KernelFaults,
    /// userfaultfd works for this process at least for accesses from user mode.
    UserFaults,
    /// Private memory can be filled with transparent huge pages ([`Memory::huge`](crate::Memory::huge)).
    Huge,
}

/// Finds out which mechanisms and features work here. It changes nothing. `vm`: a KVM VM, needed only to try
/// [`Mechanism::KvmAsync`].
///
/// EINVAL: `vm` is no KVM VM.
pub fn probe(vm: Option<BorrowedFd<'_>>) -> Result<Probe> {
    let report = report(vm.map(|vm| vm.as_raw_fd()))?;
    Ok(Probe { features: report.features(), report })
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let userfaultfd = self.mechanism(Mechanism::Userfaultfd);
        f.debug_struct("Probe")
            .field("features", &self.features)
            .field("userfaultfd", &userfaultfd)
            .finish_non_exhaustive()
    }
}

impl Probe {
    /// Whether a handle can use this mechanism now. Ok: how it works here, in words. Err: the error that `Kuf::open`
    /// would return.
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
