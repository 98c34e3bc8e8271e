//! What a handle was opened with, checked.

pub use super::host::Host;
use crate::memory::Opaque;

/// Options of `kuf_open`, in range and with defaults filled in.
pub struct Config {
    pub host: Host,
    pub user_mode_only: bool,
    pub follow_fork: bool,
    pub direct: bool,
    pub adopt_only: bool,
    pub fill_threads: usize,
    /// Bytes.
    pub demand_run: u64,
    /// Bytes.
    pub populate_run: u64,
    /// Bytes.
    pub populate_inflight: u64,
    pub queue_max: usize,
}

/// A slot to be added, with what can be checked without the kernel checked.
pub struct NewMemory {
    pub gpa: u64,
    pub len: u64,
    pub hva: u64,
    /// 0: find out.
    pub granule: u64,
    /// The shared file and the offset in it.
    pub file: Option<(i32, u64)>,
    pub uffd: Option<i32>,
    pub remote: bool,
    pub fill_all: bool,
    pub opaque: Opaque,
}

/// A populate request.
pub struct NewPopulate {
    pub stop: bool,
    /// None: everything.
    pub range: Option<(u64, u64)>,
    /// Bytes per second; 0: no limit.
    pub rate: u64,
}

/// What `kuf_resolve` brings.
#[derive(Clone, Copy)]
pub enum Resolution {
    Data(*const u8),
    Zero,
    InPlace,
    Poison,
}
