//! What a handle was opened with, checked.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::cpus::Cpus;
pub use super::host::Host;
use crate::mechanism::kvm_bitmap::Memslot;
use crate::memory::Opaque;
pub use crate::source::NewSource;

/// The mechanism of a handle.
pub enum Which {
    Userfaultfd,
    /// On this VM.
    KvmBitmap(OwnedFd),
    KvmAsync {
        vm: OwnedFd,
        /// The host vouches for ENOENT on an empty queue.
        drain: bool,
    },
}

/// Options of `kuf_open`, in range and with defaults filled in.
pub struct Config {
    pub host: Host,
    pub mechanism: Which,
    pub user_mode_only: bool,
    pub follow_fork: bool,
    pub direct: bool,
    pub adopt_only: bool,
    /// Pages of zeroes are looked for.
    pub detect_zero: bool,
    /// Serviced, with or without a callback.
    pub sources: bool,
    pub fill_threads: usize,
    /// Bytes.
    pub demand_run: u64,
    /// Bytes.
    pub populate_run: u64,
    /// Bytes.
    pub populate_inflight: u64,
    /// At least 1.
    pub userfaultfds: usize,
    /// Where service threads may run; None: where the host's thread may that opens.
    pub cpus: Option<Cpus>,
    /// The same for kuf-populate; None: as `cpus`.
    pub populate_cpus: Option<Cpus>,
    pub queue_max: usize,
    /// How long a service thread may look for the next fault before it sleeps.
    pub spin: Duration,
}

impl Config {
    /// Whether pages come from a callback or from sources.
    pub fn serviced(&self) -> bool {
        self.host.fill.is_some() || self.sources
    }

    /// Whether faults bring more than their own page.
    pub fn goes_ahead(&self) -> bool {
        self.serviced() && self.demand_run > rustix::param::page_size() as u64
    }

    /// How many service threads there are.
    pub fn service_threads(&self) -> usize {
        if self.direct {
            return 0;
        }
        // Without a callback one of them may still be inside an event callback.
        let threads = if self.serviced() { self.fill_threads + 1 } else { 2 };
        // One more may be bringing what nobody has asked for.
        threads + usize::from(self.goes_ahead())
    }
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
    /// Huge pages, where they are possible.
    pub huge: bool,
    pub kvm_attributes: u64,
    /// The memslot, when the library is to set it.
    pub memslot: Option<Memslot>,
    pub opaque: Opaque,
    /// Where its pages come from; None: the fill callback.
    pub source: Option<NewSource>,
}

/// A populate request.
pub struct NewPopulate {
    pub stop: bool,
    /// As if somebody waited for each page: what cannot be filled is poisoned, and the rest is gone on with.
    pub sweep: bool,
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
    /// Nothing: the pages hold their bytes already.
    Present,
}
