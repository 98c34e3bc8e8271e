//! KVM's userfault interfaces, both forms. No released kernel has either.
//!
//! Linux has since given their capability numbers to other features, so no number alone proves that a feature exists:
//! see `probe`.

use std::mem::{offset_of, size_of};

use super::{ioc, IOC_READ, IOC_WRITE};

pub const KVM_CAP_MEMORY_ATTRIBUTES: u32 = 233;

// The asynchronous interface (RFC, July 2024).

/// Mainline has given 236 to KVM_CAP_PRE_FAULT_MEMORY.
pub const KVM_CAP_USERFAULT_ASYNC: u32 = 236;
pub const KVM_USERFAULT_ENABLE: u64 = 1 << 0;
pub const KVM_USERFAULT_DISABLE: u64 = 1 << 1;
pub const KVM_MEMORY_ATTRIBUTE_USERFAULT: u64 = 1 << 4;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct kvm_fault {
    /// A guest frame number, despite the field's name.
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

#[repr(C)]
#[derive(Clone, Copy)]
pub struct kvm_memory_attributes {
    pub address: u64,
    pub size: u64,
    pub attributes: u64,
    pub flags: u64,
}

// The bitmap (v3, June 2025).

pub const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
pub const KVM_MEM_READONLY: u32 = 1 << 1;
pub const KVM_MEM_USERFAULT: u32 = 1 << 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct kvm_userspace_memory_region2 {
    pub slot: u32,
    pub flags: u32,
    pub guest_phys_addr: u64,
    pub memory_size: u64,
    pub userspace_addr: u64,
    pub guest_memfd_offset: u64,
    pub guest_memfd: u32,
    pub pad1: u32,
    pub userfault_bitmap: u64,
    pub pad2: [u64; 13],
}

/// With both interfaces: a mark or a bit caused the KVM_EXIT_MEMORY_FAULT.
pub const KVM_MEMORY_EXIT_FLAG_USERFAULT: u64 = 1 << 4;

pub const KVM_CHECK_EXTENSION: u32 = 0xAE03;
pub const KVM_SET_USER_MEMORY_REGION2: u32 = ioc(IOC_WRITE, 0xAE, 0x49, size_of::<kvm_userspace_memory_region2>());
pub const KVM_ENABLE_CAP: u32 = ioc(IOC_WRITE, 0xAE, 0xA3, size_of::<kvm_enable_cap>());
pub const KVM_SET_MEMORY_ATTRIBUTES: u32 = ioc(IOC_WRITE, 0xAE, 0xD2, size_of::<kvm_memory_attributes>());
pub const KVM_READ_USERFAULT: u32 = ioc(IOC_READ, 0xAE, 0xD5, size_of::<kvm_fault>());

const _: () = {
    assert!(size_of::<kvm_fault>() == 8);
    assert!(size_of::<kvm_userspace_memory_region2>() == 160);
    assert!(offset_of!(kvm_userspace_memory_region2, userfault_bitmap) == 48);
    assert!(KVM_SET_USER_MEMORY_REGION2 == 0x40A0_AE49);
    assert!(KVM_ENABLE_CAP == 0x4068_AEA3);
    assert!(KVM_SET_MEMORY_ATTRIBUTES == 0x4020_AED2);
    assert!(KVM_READ_USERFAULT == 0x8008_AED5);
};
