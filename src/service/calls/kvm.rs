//! The calls for the KVM mechanisms: a slot's bitmap, the pages that KVM itself uses, and quiet times for memslot
//! changes.

use rustix::io::Errno;

use crate::alloc::try_push;
use crate::error::{words, Error, Result};
use crate::mechanism::bitmap::Bitmap;
use crate::mechanism::ForKvm;
use crate::memory::Slot;
use crate::service::config::{NewMemory, Which};
use crate::service::fault::exits;
use crate::service::inside::{refuse_inside_callbacks, refuse_inside_quiet};
use crate::service::queues::read;
use crate::service::{deadline, Service};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, thread};

/// The part of the slot options that KVM needs. Refuses options that do not go with the mechanism.
pub fn for_kvm(service: &Service, new: &NewMemory) -> Result<ForKvm> {
    let refuse = |text: &'static str| Err(Error::new(Errno::INVAL, text));
    let which = &service.config.mechanism;
    if !matches!(which, Which::Userfaultfd) && new.uffd.is_some() {
        return refuse("memory->uffd does not go with a KVM mechanism");
    }
    if new.kvm_attributes != 0 && !matches!(which, Which::KvmAsync { .. }) {
        return refuse("kvm->attributes have to be 0 without KUF_MECHANISM_KVM_ASYNC");
    }
    if new.memslot.is_some() && (!matches!(which, Which::KvmBitmap(_)) || service.config.direct) {
        return refuse("KUF_KVM_MEMORY_MEMSLOT goes with KUF_MECHANISM_KVM_BITMAP, and not with KUF_OPEN_DIRECT");
    }
    Ok(ForKvm { attributes: new.kvm_attributes, memslot: new.memslot })
}

/// `kuf_kvm_bitmap`.
pub fn kvm_bitmap(service: &Service, gpa: u64) -> Result<u64> {
    service.check_open()?;
    let map = service.memory.map();
    let slot = map.starting_at(gpa);
    let slot = slot.ok_or_else(|| Error::new(Errno::NOENT, words!("no memory slot starts at gpa {gpa:#x}")))?;
    slot.binding
        .bitmap()
        .map(Bitmap::address)
        .ok_or_else(|| Error::new(Errno::NOTSUP, "this handle's mechanism has no bitmaps"))
}

/// `kuf_kvm_owned`.
pub fn kvm_owned(service: &Service, gpa: u64, len: u64) -> Result<()> {
    refuse_inside_quiet("kuf_kvm_owned")?;
    service.check_open()?;
    let map = service.memory.map();
    let (slot, offsets) = map.range(gpa, len)?;
    let pages = slot.pages_of(&offsets);
    let mut owned = lock(&slot.kvm.owned);
    if !owned.contains(&pages) {
        try_push(&mut owned, pages)?;
    }
    Ok(())
}

/// Refuses a memslot change in a callback, for a vCPU inside KVM may be waiting for this thread.
pub fn refuse_memslot_change(slot: &Slot, call: &str) -> Result<()> {
    match exits::sets_memslot(slot) {
        true => refuse_inside_callbacks(call),
        false => Ok(()),
    }
}

/// `kuf_kvm_quiesce`: returns when no thread is known to wait for a page.
pub fn quiesce(service: &Service, timeout_ms: i32) -> Result<()> {
    refuse_inside_callbacks("kuf_kvm_quiesce")?;
    let deadline = deadline(timeout_ms)?;
    loop {
        service.check_open()?;
        // Read the queues, so that all faults from before this call are known.
        for queue in service.queues.list().iter().filter(|queue| queue.number == 0) {
            read::drain_mechanism(service, &queue.mechanism);
        }
        let map = service.memory.map();
        if let Some((slot, page)) = map.slots().iter().find_map(|slot| Some((slot, untold(slot)?))) {
            let text = words!(
                "KVM waits for the poisoned page at gpa {:#x}: kuf_discard it so that it is filled again, or end \
                 the vCPU",
                slot.gpa + page * slot.granule
            );
            return Err(Error::new(Errno::HWPOISON, text));
        }
        // Check this before the claims: demand becomes a claim with a waiter, or is served, before its count goes down.
        let queued = service.threads.demanded() > 0;
        let busy = map.all().find(|slot| slot.claims().waited_for());
        match busy {
            None if !queued => return Ok(()),
            _ if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                return Err(Error::new(Errno::TIMEDOUT, "threads still wait for pages"));
            }
            Some(slot) => {
                let claims = slot.claims();
                drop(slot.sleep(claims, Some(Instant::now() + Duration::from_millis(1))));
            }
            None => thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// A poisoned page for which a thread inside KVM waits, and which kuf_kvm_quiesce has not reported yet.
fn untold(slot: &Slot) -> Option<u64> {
    let mut parked = lock(&slot.kvm.parked);
    let (page, told) = parked.iter_mut().find(|(_, told)| !**told)?;
    *told = true;
    Some(*page)
}
