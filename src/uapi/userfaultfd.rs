//! `linux/userfaultfd.h` as of Linux 6.12.

use std::mem::{offset_of, size_of};

use super::{ioc, IOC_NONE, IOC_READ, IOC_WRITE};

pub const UFFD_API: u64 = 0xAA;
pub const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Makes a new userfaultfd from `/dev/userfaultfd`, which needs only the permissions of that file.
pub const USERFAULTFD_IOC_NEW: u32 = ioc(IOC_NONE, 0xAA, 0x00, 0);

pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub const UFFD_FEATURE_MOVE: u64 = 1 << 16;

pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
pub const UFFDIO_REGISTER_MODE_RWP: u64 = 1 << 3;

pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub const UFFD_EVENT_FORK: u8 = 0x13;
pub const UFFD_EVENT_REMAP: u8 = 0x14;
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_range {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_register {
    pub range: uffdio_range,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_move {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub done: i64,
}

/// `uffdio_zeropage`, `uffdio_continue` and `uffdio_poison` have one layout; `done` is the field that each names its
/// own way.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffdio_span {
    pub range: uffdio_range,
    pub mode: u64,
    pub done: i64,
}

/// `struct uffd_msg` with the union spelled as words: a = pagefault.flags, remap.from, remove.start, fork.ufd (low
/// half); b = pagefault.address, remap.to, remove.end; c = remap.len, pagefault.feat.ptid (low half).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct uffd_msg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub a: u64,
    pub b: u64,
    pub c: u64,
}

pub const UFFDIO_API: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x3F, size_of::<uffdio_api>());
pub const UFFDIO_REGISTER: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x00, size_of::<uffdio_register>());
pub const UFFDIO_UNREGISTER: u32 = ioc(IOC_READ, 0xAA, 0x01, size_of::<uffdio_range>());
pub const UFFDIO_WAKE: u32 = ioc(IOC_READ, 0xAA, 0x02, size_of::<uffdio_range>());
pub const UFFDIO_COPY: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x03, size_of::<uffdio_copy>());
pub const UFFDIO_ZEROPAGE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x04, size_of::<uffdio_span>());
pub const UFFDIO_MOVE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x05, size_of::<uffdio_move>());
pub const UFFDIO_CONTINUE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x07, size_of::<uffdio_span>());
pub const UFFDIO_POISON: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x08, size_of::<uffdio_span>());

const _: () = {
    assert!(size_of::<uffd_msg>() == 32);
    assert!(offset_of!(uffd_msg, a) == 8);
    assert!(offset_of!(uffdio_copy, copy) == 32);
    assert!(offset_of!(uffdio_span, done) == 24);
    assert!(offset_of!(uffdio_move, done) == 32);
    assert!(USERFAULTFD_IOC_NEW == 0x0000_AA00);
    assert!(UFFDIO_API == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
    assert!(UFFDIO_WAKE == 0x8010_AA02);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(UFFDIO_ZEROPAGE == 0xC020_AA04);
    assert!(UFFDIO_MOVE == 0xC028_AA05);
    assert!(UFFDIO_CONTINUE == 0xC020_AA07);
    assert!(UFFDIO_POISON == 0xC020_AA08);
};
