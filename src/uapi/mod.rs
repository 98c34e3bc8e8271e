//! The kernel's numbers and struct layouts, asserted at compile time. No logic.
//!
//! They are our own because no published binding has all of them (UFFDIO_POISON and UFFDIO_MOVE, KVM userfaults).

pub mod ioctl;
pub mod kvm;
pub mod pagemap;
pub mod procfs;
pub mod userfaultfd;

/// Request number of an ioctl, as `_IOC` of `asm-generic/ioctl.h` builds it.
pub(crate) const fn ioc(dir: u32, ty: u32, nr: u32, size: usize) -> u32 {
    dir << 30 | (size as u32) << 16 | ty << 8 | nr
}

pub(crate) const IOC_NONE: u32 = 0;
pub(crate) const IOC_WRITE: u32 = 1;
pub(crate) const IOC_READ: u32 = 2;
