//! KVM's numbers that matter before any memory is served: enough to tell the userfault kernels apart.
//!
//! No released kernel has either interface and their capability numbers were reused, so none of these numbers alone
//! proves anything: see `probe`.

use std::mem::size_of;

use super::{ioc, IOC_READ, IOC_WRITE};

pub const KVM_CAP_MEMORY_ATTRIBUTES: u32 = 233;
/// The asynchronous interface's capability (RFC, July 2024). Mainline has given 236 to KVM_CAP_PRE_FAULT_MEMORY.
pub const KVM_CAP_USERFAULT_ASYNC: u32 = 236;
pub const KVM_USERFAULT_DISABLE: u64 = 1 << 1;
pub const KVM_MEMORY_ATTRIBUTE_USERFAULT: u64 = 1 << 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct kvm_fault {
    /// A guest frame number, whatever the name says.
    pub address: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct kvm_enable_cap {
    pub cap: u32,
    pub flags: u32,
    pub args: [u64; 4],
    pub pad: [u8; 64],
}

pub const KVM_ENABLE_CAP: u32 = ioc(IOC_WRITE, 0xAE, 0xA3, size_of::<kvm_enable_cap>());
pub const KVM_READ_USERFAULT: u32 = ioc(IOC_READ, 0xAE, 0xD5, size_of::<kvm_fault>());

const _: () = {
    assert!(size_of::<kvm_fault>() == 8);
    assert!(KVM_ENABLE_CAP == 0x4068_AEA3);
    assert!(KVM_READ_USERFAULT == 0x8008_AED5);
};
