//! PAGEMAP_SCAN (Linux 6.7) finds the pages of a range, without an entry for each missing page.

use super::{ioc, IOC_READ, IOC_WRITE};

/// A run of pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct page_region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

#[repr(C)]
#[derive(Default)]
pub struct pm_scan_arg {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

/// Not write-protected through userfaultfd.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Mapped, the zero page included.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Swapped out, or a mark without a page.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;

pub const PAGEMAP_SCAN: u32 = ioc(IOC_READ | IOC_WRITE, b'f' as u32, 16, size_of::<pm_scan_arg>());

const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610 && size_of::<page_region>() == 24);
