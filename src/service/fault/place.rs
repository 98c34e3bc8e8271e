//! Where the bytes of a fill are written: the page itself, a buffer, or a huge page.

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::mapping::buffer::Buffer;
use crate::memory::staging::Staging;
use crate::memory::Slot;
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{huge, retry, settle};
use crate::service::Service;
use crate::sync::time::Instant;
use crate::sync::Arc;

/// Where the bytes are written.
// "In place" is the term everywhere.
#[allow(clippy::enum_variant_names)]
pub enum FillPlace {
    InPlace {
        at: NonNull<u8>,
        /// When the place was allocated.
        since: Instant,
    },
    Buffer(Buffer),
    /// A huge page for all of the run.
    Staged(Staging),
}

impl FillPlace {
    pub fn at(&self) -> NonNull<u8> {
        match self {
            Self::InPlace { at, .. } => *at,
            Self::Buffer(buffer) => buffer.at(),
            Self::Staged(staging) => staging.at(),
        }
    }
}

/// The place of `pages`, a run to be filled.
pub fn place_for(
    service: &Service,
    slot: &Arc<Slot>,
    pages: &Range<u64>,
    patience: &RetryLimits,
) -> Result<FillPlace, Errno> {
    match settle::place_in(service, slot, pages, patience)? {
        Some(at) => Ok(FillPlace::InPlace { at, since: Instant::now() }),
        None => {
            if let Some(staging) = stage_for(service, slot, pages) {
                return Ok(FillPlace::Staged(staging));
            }
            let len = (pages.end - pages.start) * slot.granule;
            retry::patiently(service, patience, || service.buffers.take(len as usize).map_err(|e| e.errno()))
                .map(FillPlace::Buffer)
        }
    }
}

/// A huge page to fill for `pages`, where the slot wants them.
pub fn stage_for(service: &Service, slot: &Slot, pages: &Range<u64>) -> Option<Staging> {
    slot.huge.wanted.then(|| huge::stage(service, slot, pages)).flatten()
}
