//! Turns exits on and off for a slot with a bitmap whose memslot the library sets: a vCPU that touches an absent page leaves
//! KVM_RUN.
//!
//! A change waits for vCPUs, which may wait for pages: no gate and no claim is held meanwhile.

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::mechanism::bitmap::{Bitmap, Exits};
use crate::memory::Slot;

/// Whether there is a memslot to change.
pub fn sets_memslot(slot: &Slot) -> bool {
    slot.binding.bitmap().is_some_and(Bitmap::sets_memslot)
}

/// Lets vCPUs exit at absent pages of a slot that was added. Until now the userfaultfd caught their faults. A slot that is
/// whole by now needs no exits.
pub fn begin(slot: &Slot) -> Result<()> {
    set(slot, Exits::On, || !slot.whole())
        .map_err(|e| Error::system("KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT", e))
}

/// The same before pages are claimed to be discarded: a set bit has an effect only on pages that KVM maps afterwards.
pub fn need(slot: &Slot) -> std::result::Result<(), Errno> {
    set(slot, Exits::On, || true)
}

/// Every page is present or removed: KVM may map huge pages again.
pub fn save(slot: &Slot) {
    // A page may have been discarded since.
    let _ = set(slot, Exits::Off, || slot.whole());
}

/// Turns the exits off for good: every slot that ends with this one is detached.
pub fn end(slot: &Slot) {
    let _ = set(slot, Exits::Over, || true);
}

fn set(slot: &Slot, to: Exits, still: impl Fn() -> bool) -> std::result::Result<(), Errno> {
    slot.binding.bitmap().map_or(Ok(()), |bitmap| bitmap.set_exits(to, still))
}
