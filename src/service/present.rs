//! `KUF_RESOLVE_PRESENT`: pages that hold their bytes already, although the library has booked them as absent.
//!
//! Who is there is looked up twice. Before anything is claimed, so that the claims of pages that are not there (somebody's
//! who is filling them, or the host's debt) are left alone; and again with the claim in hand and the gate held
//! (`Content::There`), when no removal can come between the look and the booking. What was given back and has been
//! reported is *removed* by then and not claimed; what is given back unheard of afterwards reads as zero, as ever.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::install::Failed;
use super::Service;
use crate::claims::Id;
use crate::error::{Error, Result};
use crate::mechanism::Content;
use crate::memory::Slot;
use crate::service::config::Resolution;

/// Pages looked up at a time: the gate is held meanwhile.
const LOOK: u64 = 512;

impl Service {
    /// Makes what is there of `pages` present. Returns how many pages.
    pub(super) fn resolve_present(&self, slot: &Arc<Slot>, pages: Range<u64>) -> Result<u64> {
        if slot.in_place() {
            let text =
                "the slot is filled in place, where a page that is there need not be whole: name those that are \
                        with KUF_RESOLVE_IN_PLACE";
            return Err(Error::new(libc::EINVAL, text));
        }
        let (mut booked, mut from) = (0, pages.start);
        while let Some(first) = slot.pages.first_open(from..pages.end) {
            let part = first..pages.end.min(first + LOOK);
            from = part.end;
            for run in self.there(slot, &part)? {
                booked += self.resolve_pages(slot, run, Resolution::Present)?;
            }
        }
        Ok(booked)
    }

    fn there(&self, slot: &Arc<Slot>, pages: &Range<u64>) -> Result<Vec<Range<u64>>> {
        let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
        if slot.gone().is_some() {
            return Ok(Vec::new());
        }
        slot.mechanism.there(slot, pages).ok_or_else(|| {
            let text = "which pages another process has cannot be seen from here: KUF_RESOLVE_ZERO keeps those it has";
            Error::new(libc::ENOTSUP, text)
        })
    }

    /// Books what is there still of `run`, which the claim `id` owns, and gives up the rest. Err is an errno.
    pub(super) fn book_present(&self, slot: &Arc<Slot>, id: Id, run: Range<u64>) -> std::result::Result<u64, i32> {
        let (mut booked, mut from) = (0, run.start);
        while from < run.end {
            let (n, result) = self.install(slot, id, from..run.end, from, Content::There);
            booked += n;
            match result {
                Ok(()) => break,
                Err(Failed { page, errno: libc::EFAULT }) => {
                    // Dropped since the first look.
                    self.abandon(slot, id, page..page + 1);
                    from = page + 1;
                }
                Err(failed) => return Err(failed.errno),
            }
        }
        Ok(booked)
    }
}
