//! Takes a slot off the map and out of the kernel, and gives an adopted userfaultfd up with its last slot.

use rustix::io::Errno;

use crate::error::Result;
use crate::mechanism::Mechanism;
use crate::memory::Slot;
use crate::service::calls::no_slot_starts;
use crate::service::queues::{quiet, read, watch};
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::Arc;

/// Takes a slot and its views off the map and, with `release`, out of the kernel. From here on no install of a late
/// owner reaches its addresses, which may get a new owner. The gate is held all the time, as when slots are added: so
/// the addresses are unregistered before a new slot registers them. Err: another thread has taken the slot off, and the
/// addresses may be another slot's already.
pub fn take_out(service: &Service, slot: &Arc<Slot>, views: &[Arc<Slot>], release: impl Fn(&Arc<Slot>)) -> Result<()> {
    let _gate = quiet::gate_to_remove(service, &slot.mechanism);
    if slot.detached.swap(true, Ordering::AcqRel) {
        // A kuf_close, or another kuf_remove_memory, was first.
        return Err(service.check_open().err().unwrap_or_else(|| no_slot_starts(slot.gpa)));
    }
    slot.gone.store(Errno::NOENT.raw_os_error(), Ordering::Release);
    for view in views {
        view.detached.store(true, Ordering::Release);
        view.gone.store(Errno::NOENT.raw_os_error(), Ordering::Release);
    }
    let updated = service.memory.update(|map| {
        map.remove(slot);
        Ok(())
    });
    if updated.is_err() {
        // The slot is still on the map: kuf_close detaches it.
        slot.detached.store(false, Ordering::Release);
    }
    updated?;
    views.iter().chain([slot]).for_each(release);
    quiet::end_events(service, slot);
    Ok(())
}

/// Stops catching touches of a slot whose pages are all present, removed, poisoned or inaccessible. A slot that has to
/// stay registered keeps its mechanism until the process ends: threads that touch its unfilled pages stay blocked.
pub fn detach(slot: &Slot, in_use: bool) {
    if slot.stays.load(Ordering::SeqCst) {
        std::mem::forget(slot.mechanism.clone());
    } else {
        slot.detach(in_use);
    }
}

/// Stops reading an adopted userfaultfd if it has no slot left.
pub fn give_up_unused(service: &Service, mechanism: &Arc<dyn Mechanism>) {
    if mechanism.facts().adopted {
        let _adopting = service.queues.lock_adopting();
        if !service.memory.map().all().any(|other| other.mechanism.id() == mechanism.id()) {
            give_up(service, mechanism);
        }
    }
}

/// Stops reading an adopted userfaultfd, which has no slot left. The caller holds `adopting`.
pub fn give_up(service: &Service, mechanism: &Arc<dyn Mechanism>) {
    quiet::read_out(service, mechanism);
    let queue = service.queues.first(mechanism.id());
    watch::drop_mechanism(service, mechanism.id());
    queue.iter().for_each(|queue| read::forget_parked(service, queue));
}
