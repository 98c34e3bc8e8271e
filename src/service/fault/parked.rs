//! Threads that are blocked inside KVM for a poisoned page: KVM has no error for them, so they stay there until the page is
//! discarded and filled.

use rustix::io::Errno;

use crate::abi::*;
use crate::error::words;
use crate::memory::Slot;
use crate::service::fault::notice::Notice;
use crate::service::{Fault, Service, Work};
use crate::stats::all_blocked::Wait;
use crate::sync::time::Instant;
use crate::sync::{lock, Arc};
use std::ops::Range;

/// A thread inside KVM waits for a poisoned page, and stays there.
pub fn parked(service: &Service, slot: &Arc<Slot>, pages: Range<u64>) {
    if lock(&slot.kvm.parked).insert(pages.start, false).is_some() {
        return;
    }
    // A discard that came in between has found no parked thread to serve.
    if !slot.claims().is_poisoned(pages.start) {
        return serve_parked(service, slot, &pages);
    }
    let (gpa, len) = slot.gpa_of(&pages);
    let text = words!(
        "KVM itself waits for guest memory {gpa:#x}..{:#x}, which is poisoned: the vCPU stays in KVM_RUN until it \
         is killed or the page is discarded and filled",
        gpa + len
    );
    service.push(Work::Notice(Notice {
        slot: Some(slot.clone()),
        kind: KUF_KVM_EVENT_PARKED,
        gpa,
        len,
        error: Some(Errno::HWPOISON),
        text,
    }));
}

/// Poisoned pages were discarded: fills those that a thread inside KVM still waits for.
pub fn serve_parked(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>) {
    let waited_for: Vec<u64> = {
        let mut parked = lock(&slot.kvm.parked);
        let here: Vec<u64> = parked.range(pages.clone()).map(|(page, _)| *page).collect();
        here.iter().for_each(|page| {
            parked.remove(page);
        });
        here
    };
    for page in waited_for {
        let (slot, flags, wait) = (slot.clone(), KUF_KVM_FAULT, Wait::unknown(Instant::now()));
        service.push(Work::Fault(Fault { slot, page, flags, wait }));
    }
}
