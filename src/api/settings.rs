//! The settings in effect.

use crate::abi::*;
use crate::api::Mechanism;
use crate::sync::time::Duration;

/// The settings in effect, with defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The mechanism of the handle.
    pub mechanism: Mechanism,
    /// Concurrent calls of the fill callback; 0 on a caller-driven handle.
    pub fill_threads: u32,
    /// How many userfaultfds share the slot's memory, or the library has opened for the handle.
    pub userfaultfds: u32,
    /// How long a service thread busy-polls for the next fault before it sleeps; 0 also where busy-polling has no effect.
    pub spin: Duration,
    /// The most bytes that one fault fills; 0 on a caller-driven handle.
    pub demand_run: u64,
    /// The longest run, in bytes, of a fill for which no thread is blocked; 0 on a caller-driven handle.
    pub populate_run: u64,
    /// The page size in bytes: of the slot, or of ordinary memory for the handle.
    pub page_size: u64,
    /// Pages of the slot are filled in place.
    pub in_place: bool,
    /// Huge pages are used where possible.
    pub huge: bool,
    /// The slot uses a userfaultfd of the caller's.
    pub adopted: bool,
    /// The slot is memory of another process.
    pub remote: bool,
}

impl From<kuf_settings_info> for Settings {
    fn from(s: kuf_settings_info) -> Self {
        let has = |flag| s.flags & flag != 0;
        Self {
            mechanism: match s.mechanism {
                KUF_MECHANISM_KVM_BITMAP => Mechanism::KvmBitmap,
                KUF_MECHANISM_KVM_ASYNC => Mechanism::KvmAsync,
                _ => Mechanism::Userfaultfd,
            },
            fill_threads: s.fill_threads,
            userfaultfds: s.userfaultfds,
            spin: Duration::from_micros(s.spin_us.into()),
            demand_run: s.demand_run,
            populate_run: s.populate_run,
            page_size: s.page_size,
            in_place: has(KUF_SETTING_IN_PLACE),
            huge: has(KUF_SETTING_HUGE),
            adopted: has(KUF_SETTING_ADOPTED),
            remote: has(KUF_SETTING_REMOTE),
        }
    }
}
