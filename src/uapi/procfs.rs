//! `linux/fs.h`: the query that `/proc/PID/maps` answers since Linux 6.11.

pub const PROCMAP_QUERY_VMA_WRITABLE: u64 = 0x02;
pub const PROCMAP_QUERY_VMA_SHARED: u64 = 0x08;

/// `_IOWR(PROCFS_IOCTL_MAGIC, 17, struct procmap_query)`.
pub const PROCMAP_QUERY: u32 = 0xc068_6611;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct procmap_query {
    pub size: u64,
    pub query_flags: u64,
    pub query_addr: u64,
    pub vma_start: u64,
    pub vma_end: u64,
    pub vma_flags: u64,
    pub vma_page_size: u64,
    pub vma_offset: u64,
    pub inode: u64,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub vma_name_size: u32,
    pub build_id_size: u32,
    pub vma_name_addr: u64,
    pub build_id_addr: u64,
}

const _: () = assert!(size_of::<procmap_query>() == (PROCMAP_QUERY >> 16 & 0x3fff) as usize);
