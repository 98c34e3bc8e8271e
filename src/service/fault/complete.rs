//! A slot becomes complete: every page is present or removed.

use crate::abi::*;
use crate::error::words;
use crate::memory::Slot;
use crate::service::fault::exits;
use crate::service::fault::notice::Notice;
use crate::service::Service;
use crate::sync::Arc;

/// The notice for the caller that `slot` has become whole.
pub fn completion(service: &Service, slot: &Arc<Slot>) -> Option<Notice> {
    if slot.parent.is_some() {
        return None;
    }
    if exits::sets_memslot(slot) {
        service.background.populate.save_costs_of(slot);
    }
    let (kind, gpa, len, error) = (KUF_EVENT_COMPLETE, slot.gpa, slot.len, None);
    let text = words!("memory slot {gpa:#x}..{:#x} is complete", gpa + len);
    Some(Notice { slot: Some(slot.clone()), kind, gpa, len, error, text })
}

/// Tells the caller that `slot` has become whole. With no lock held.
pub fn tell_whole(service: &Service, slot: &Arc<Slot>) {
    if let Some(notice) = completion(service, slot) {
        notice.raise(service);
    }
}
