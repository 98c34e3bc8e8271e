//! The options of a handle, checked.

use std::os::fd::OwnedFd;

use crate::caller::{Keep, Opaque};
use crate::mechanism::bitmap::Memslot;
use crate::os::cpus::Cpus;
pub use crate::service::callbacks::Callbacks;
pub use crate::source::NewSource;
use crate::sync::time::Duration;

/// The mechanism of a handle.
pub enum Which {
    Userfaultfd,
    /// The bitmap mechanism on this VM.
    KvmBitmap(OwnedFd),
    KvmAsync {
        vm: OwnedFd,
        /// The caller vouches for ENOENT on an empty queue.
        drain: bool,
    },
}

/// Bytes of deferred populate runs that may be outstanding at once: enough to keep a distant source busy. The
/// simulation reaches the limit with little memory.
pub const POPULATE_INFLIGHT: u64 = if cfg!(shuttle) { 16 << 10 } else { 16 << 20 };

/// Options of `kuf_open`, in range and with defaults filled in.
pub struct Config {
    pub callbacks: Callbacks,
    pub mechanism: Which,
    pub user_mode_only: bool,
    pub follow_fork: bool,
    pub direct: bool,
    pub adopt_only: bool,
    /// The library looks for pages of zeroes in filled bytes.
    pub detect_zero: bool,
    /// Pages come from a callback or from sources, and not from the caller's own loop.
    pub serviced: bool,
    pub fill_threads: usize,
    /// Bytes.
    pub demand_run: u64,
    /// Bytes.
    pub populate_run: u64,
    /// Bytes of deferred populate runs that may be outstanding at once.
    pub populate_inflight: u64,
    /// At least 1.
    pub userfaultfds: usize,
    /// The CPUs of service threads. None: those of the thread that calls kuf_open.
    pub cpus: Option<Cpus>,
    /// How long a service thread may poll for the next fault before it sleeps.
    pub spin: Duration,
    /// How long KUF_END_POPULATE may take. None: no limit.
    pub end_timeout: Option<Duration>,
}

impl Config {
    /// Whether faults fill more than their own page.
    pub fn goes_ahead(&self) -> bool {
        self.serviced && self.demand_run > rustix::param::page_size() as u64
    }

    /// How many service threads there are.
    pub fn service_threads(&self) -> usize {
        if self.direct {
            return 0;
        }
        // Without a fill callback, one of them may still be inside an event callback.
        let threads = if self.serviced { self.fill_threads + 1 } else { 2 };
        // One more thread may be prefetching.
        threads + usize::from(self.goes_ahead())
    }
}

/// A slot to be added, after the checks that need no system call.
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
    /// The memory may hold pages already, which are the guest's own.
    pub populated: bool,
    /// Fill with huge pages, where that is possible.
    pub huge: bool,
    pub kvm_attributes: u64,
    /// The memslot, when the library is to set it.
    pub memslot: Option<Memslot>,
    pub opaque: Opaque,
    /// The source of its pages. None: the fill callback.
    pub source: Option<NewSource>,
    /// An owner to keep for as long as the slot lives.
    pub keep: Option<Keep>,
}

impl NewMemory {
    /// Private memory of this process at `hva`, without anything special.
    pub fn at(gpa: u64, len: u64, hva: u64) -> Self {
        Self {
            gpa,
            len,
            hva,
            granule: 0,
            file: None,
            uffd: None,
            remote: false,
            fill_all: false,
            populated: false,
            huge: false,
            kvm_attributes: 0,
            memslot: None,
            opaque: Opaque(std::ptr::null_mut()),
            source: None,
            keep: None,
        }
    }
}

/// A populate request.
pub struct NewPopulate {
    pub stop: bool,
    /// Fill as if a thread waited for each page: poison pages that cannot be filled, and continue with the rest.
    pub sweep: bool,
    /// None: all slots.
    pub range: Option<(u64, u64)>,
    /// Bytes per second; 0: no limit.
    pub rate: u64,
}

/// The bytes that `kuf_resolve` passes.
#[derive(Clone, Copy)]
pub enum Resolution {
    Data(*const u8),
    Zero,
    InPlace,
    Poison,
    /// No bytes: the pages hold theirs already.
    Present,
}
