//! Memory slots, and the way from an address to a page.

pub mod buffer;
pub mod maps;
pub mod outside;
pub mod pagemap;
pub mod shared;
mod slot;
pub mod staging;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::mechanism::Address;
pub use slot::{Extent, ForKvm, Opaque, Parts, Slot, Waiter};

/// Every slot of a handle. Readers take a snapshot; changes make a new one.
#[derive(Default)]
pub struct Memory {
    map: RwLock<Arc<Map>>,
}

/// A snapshot of the slots.
#[derive(Default, Clone)]
pub struct Map {
    /// By gpa, disjoint.
    slots: Vec<Arc<Slot>>,
    /// Forked children's views of them.
    forks: Vec<Arc<Slot>>,
    /// By (mechanism, hva), disjoint within a mechanism.
    index: Vec<Placed>,
}

#[derive(Clone)]
struct Placed {
    mechanism: u32,
    extent: Extent,
    slot: Arc<Slot>,
}

impl Placed {
    /// The pages of the slot that are in `hva`.
    fn within(&self, hva: &Range<u64>) -> Option<Range<u64>> {
        let Extent { offset, len, hva: here } = self.extent;
        let (start, end) = (here.max(hva.start), (here + len).min(hva.end));
        (start < end).then(|| {
            let granule = self.slot.granule;
            (offset + (start - here)) / granule..(offset + (end - here)).div_ceil(granule)
        })
    }
}

impl Memory {
    /// The slots now.
    pub fn map(&self) -> Arc<Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the map; `change` sees a copy, which takes its place if it returns Ok.
    pub fn update<T>(&self, change: impl FnOnce(&mut Map) -> Result<T>) -> Result<T> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Map::clone(&map);
        let value = change(&mut next)?;
        next.reindex();
        *map = Arc::new(next);
        Ok(value)
    }

    /// Brings the address index up to date after a slot's mapping was moved or removed.
    pub fn reindex(&self) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Map::clone(&map);
        next.reindex();
        *map = Arc::new(next);
    }
}

impl Map {
    /// The slots by gpa, without forked views.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// The slots and the forked views.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.iter().chain(&self.forks)
    }

    /// Children's views of `slot`.
    pub fn forks_of<'a>(&'a self, slot: &'a Arc<Slot>) -> impl Iterator<Item = &'a Arc<Slot>> {
        self.forks.iter().filter(|fork| fork.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, slot)))
    }

    /// The slot that holds `gpa`.
    pub fn at_gpa(&self, gpa: u64) -> Option<&Arc<Slot>> {
        let after = self.slots.partition_point(|slot| slot.gpa <= gpa);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        (gpa - slot.gpa < slot.len).then_some(slot)
    }

    /// The slot that holds all of `gpa..gpa+len`, and the offset of `gpa` in it.
    pub fn range(&self, gpa: u64, len: u64) -> Result<(&Arc<Slot>, Range<u64>)> {
        if len == 0 {
            return Err(Error::new(libc::EINVAL, "len is 0"));
        }
        let Some(end) = gpa.checked_add(len) else {
            return Err(Error::new(libc::EINVAL, format!("gpa {gpa:#x} + len {len:#x} overflows")));
        };
        let slot = self
            .at_gpa(gpa)
            .ok_or_else(|| Error::new(libc::ENOENT, format!("gpa {gpa:#x} is in no memory slot of this handle")))?;
        if end > slot.gpa + slot.len {
            let text = format!(
                "{gpa:#x}..{end:#x} leaves its memory slot {:#x}..{:#x}: one slot a call",
                slot.gpa,
                slot.gpa + slot.len
            );
            return Err(Error::new(libc::ERANGE, text));
        }
        Ok((slot, gpa - slot.gpa..end - slot.gpa))
    }

    /// The parts of a guest physical range that are in slots, as offsets in each, in order.
    pub fn within_gpa(&self, gpa: Range<u64>) -> impl Iterator<Item = (&Arc<Slot>, Range<u64>)> {
        let first = self.slots.partition_point(|slot| slot.gpa + slot.len <= gpa.start);
        self.slots[first..].iter().take_while(move |slot| slot.gpa < gpa.end).map(move |slot| {
            let from = gpa.start.saturating_sub(slot.gpa);
            (slot, from..(gpa.end - slot.gpa).min(slot.len))
        })
    }

    /// The slot of `mechanism` that has this address, and the page there.
    pub fn at(&self, mechanism: u32, address: Address) -> Option<(&Arc<Slot>, u64)> {
        match address {
            Address::Hva(hva) => self.at_hva(mechanism, hva),
            Address::Gpa(gpa) => {
                let slot = self.at_gpa(gpa).filter(|slot| slot.mechanism.id() == mechanism)?;
                Some((slot, (gpa - slot.gpa) / slot.granule))
            }
        }
    }

    /// The slot that has `hva` mapped through `mechanism`, and the page there.
    pub fn at_hva(&self, mechanism: u32, hva: u64) -> Option<(&Arc<Slot>, u64)> {
        let after = self.index.partition_point(|p| (p.mechanism, p.extent.hva) <= (mechanism, hva));
        let placed = self.index.get(after.checked_sub(1)?)?;
        let within = hva.checked_sub(placed.extent.hva)?;
        (placed.mechanism == mechanism && within < placed.extent.len)
            .then(|| (&placed.slot, (placed.extent.offset + within) / placed.slot.granule))
    }

    /// The parts of `hva..hva+len` that slots of `mechanism` have mapped: slot and page range.
    pub fn within_hva(&self, mechanism: u32, hva: Range<u64>) -> Vec<(Arc<Slot>, Range<u64>)> {
        let here = self.index.iter().filter(|placed| placed.mechanism == mechanism);
        here.filter_map(|placed| Some((placed.slot.clone(), placed.within(&hva)?))).collect()
    }

    /// The same of all slots that this process has mapped, for a look.
    pub fn mapped_here(&self, hva: Range<u64>) -> impl Iterator<Item = (&Arc<Slot>, Range<u64>)> {
        let overlapping = self.index.iter().filter_map(move |placed| Some((&placed.slot, placed.within(&hva)?)));
        overlapping.filter(|(slot, _)| !slot.mechanism.remote())
    }

    /// Adds a slot, unless it overlaps another in guest physical or host virtual addresses.
    pub fn add(&mut self, slot: Arc<Slot>) -> Result<()> {
        let (gpa, end) = (slot.gpa, slot.gpa + slot.len);
        if let Some(other) = self.slots.iter().find(|s| s.gpa < end && gpa < s.gpa + s.len) {
            let text = format!("gpa {gpa:#x}..{end:#x} overlaps the memory slot at {:#x}", other.gpa);
            return Err(Error::new(libc::EEXIST, text));
        }
        for extent in slot.extents() {
            let taken = self.within_hva(slot.mechanism.id(), extent.hva..extent.hva + extent.len);
            if let Some((other, _)) = taken.first() {
                let text = format!("the host mapping overlaps that of the memory slot at gpa {:#x}", other.gpa);
                return Err(Error::new(libc::EEXIST, text));
            }
        }
        let at = self.slots.partition_point(|s| s.gpa < gpa);
        self.slots.insert(at, slot);
        Ok(())
    }

    /// Adds a forked child's view.
    pub fn add_fork(&mut self, slot: Arc<Slot>) {
        self.forks.push(slot);
    }

    /// Takes a slot and the views of it out.
    pub fn remove(&mut self, slot: &Arc<Slot>) {
        self.slots.retain(|s| !Arc::ptr_eq(s, slot));
        self.forks.retain(|f| !f.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, slot)));
    }

    /// Takes out the views of a child that is gone.
    pub fn remove_forks(&mut self, mechanism: u32) {
        self.forks.retain(|fork| fork.mechanism.id() != mechanism);
    }

    fn reindex(&mut self) {
        self.index.clear();
        for slot in self.slots.iter().chain(&self.forks) {
            let mechanism = slot.mechanism.id();
            self.index.extend(slot.extents().into_iter().map(|extent| Placed {
                mechanism,
                extent,
                slot: slot.clone(),
            }));
        }
        self.index.sort_by_key(|p| (p.mechanism, p.extent.hva));
    }
}
