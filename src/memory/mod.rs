//! Memory slots, and the way from an address to a page.

pub mod huge;
pub mod ranges;
mod slot;
pub mod staging;

use std::ops::Range;

use rustix::io::Errno;

use crate::alloc::{refusable, try_collect, NoMemory};
use crate::error::{words, Error, Result};
use crate::mapping::Extent;
use crate::mechanism::Address;
use crate::sync::{read, write, Arc, RwLock};
pub use slot::{Parts, Slot, Waiter};

/// Every slot of a handle. Readers take a snapshot; changes make a new one.
#[derive(Default)]
pub struct Memory {
    map: RwLock<Arc<Map>>,
}

/// A snapshot of the slots.
#[derive(Default)]
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
    /// The bytes of the slot that are in `hva`.
    fn within(&self, hva: &Range<u64>) -> Option<Range<u64>> {
        let Extent { offset, len, hva: here } = self.extent;
        let (start, end) = (here.max(hva.start), (here + len).min(hva.end));
        (start < end).then(|| offset + (start - here)..offset + (end - here))
    }
}

impl Memory {
    /// The slots now.
    pub fn map(&self) -> Arc<Map> {
        read(&self.map).clone()
    }

    /// Looks at the slots while no thread adds or removes one. `look` takes no lock under which another thread reads
    /// the map.
    pub fn hold<T>(&self, look: impl FnOnce(&Map) -> T) -> T {
        look(&read(&self.map))
    }

    /// Changes the map. When `change` returns Err, the map is as it was. It is copied only while another thread looks at it,
    /// and none sees it while it is being changed.
    pub fn update<T>(&self, change: impl FnOnce(&mut Map) -> Result<T>) -> Result<T> {
        change(self.own(&mut write(&self.map))?)
    }

    /// The kernel moved (`to` given) or unmapped the mappings that slots of `mechanism` had at `hva`. Err: there is no
    /// memory to record it.
    pub fn moved(&self, mechanism: u32, hva: &Range<u64>, to: Option<u64>) -> Result<()> {
        let mut map = write(&self.map);
        if map.within_hva(mechanism, hva.clone()).next().is_none() {
            return Ok(());
        }
        self.own(&mut map)?.moved(mechanism, hva, to)
    }

    /// The map, which no other thread looks at.
    fn own<'a>(&self, map: &'a mut Arc<Map>) -> Result<&'a mut Map> {
        if Arc::get_mut(map).is_none() {
            *map = Arc::new(map.copy()?);
        }
        Arc::get_mut(map).ok_or(NoMemory.into())
    }
}

impl Map {
    fn copy(&self) -> std::result::Result<Self, NoMemory> {
        Ok(Self {
            slots: try_collect(self.slots.iter().cloned())?,
            forks: try_collect(self.forks.iter().cloned())?,
            index: try_collect(self.index.iter().cloned())?,
        })
    }

    /// The slots by gpa, without forked views.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// The slots and the forked views.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Slot>> + Clone {
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

    /// The slot that starts there.
    pub fn starting_at(&self, gpa: u64) -> Option<&Arc<Slot>> {
        self.at_gpa(gpa).filter(|slot| slot.gpa == gpa)
    }

    /// The slot that holds all of `gpa..gpa+len`, and the offset of `gpa` in it.
    pub fn range(&self, gpa: u64, len: u64) -> Result<(&Arc<Slot>, Range<u64>)> {
        if len == 0 {
            return Err(Error::new(Errno::INVAL, "len is 0"));
        }
        let Some(end) = gpa.checked_add(len) else {
            return Err(Error::new(Errno::INVAL, words!("gpa {gpa:#x} + len {len:#x} overflows")));
        };
        let slot = self
            .at_gpa(gpa)
            .ok_or_else(|| Error::new(Errno::NOENT, words!("gpa {gpa:#x} is in no memory slot of this handle")))?;
        if end > slot.gpa + slot.len {
            let text = words!(
                "{gpa:#x}..{end:#x} leaves its memory slot {:#x}..{:#x}: one slot a call",
                slot.gpa,
                slot.gpa + slot.len
            );
            return Err(Error::new(Errno::RANGE, text));
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

    /// The parts of `hva` that slots of `mechanism` have mapped: slot and bytes of it. The caller decides about the
    /// pages at the ends: [`Slot::pages_of`] has all touched pages, [`Slot::pages_inside`] those that are covered as a
    /// whole.
    ///
    /// [`Slot::pages_of`]: crate::mapping::Region::pages_of
    /// [`Slot::pages_inside`]: crate::mapping::Region::pages_inside
    pub fn within_hva(&self, mechanism: u32, hva: Range<u64>) -> impl Iterator<Item = (&Arc<Slot>, Range<u64>)> {
        let of = self.placed_in(mechanism, &hva);
        self.index[of].iter().filter_map(move |placed| Some((&placed.slot, placed.within(&hva)?)))
    }

    /// The parts of `hva` that slots of `mechanism` have mapped, as addresses in order.
    pub fn mapped_in(&self, mechanism: u32, hva: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let of = self.placed_in(mechanism, &hva);
        self.index[of].iter().map(move |Placed { extent: Extent { hva: here, len, .. }, .. }| {
            (*here).max(hva.start)..(here + len).min(hva.end)
        })
    }

    /// Which entries of the index are of `hva`.
    fn placed_in(&self, mechanism: u32, hva: &Range<u64>) -> Range<usize> {
        let ends = |p: &Placed| (p.mechanism, p.extent.hva + p.extent.len);
        let first = self.index.partition_point(|p| ends(p) <= (mechanism, hva.start));
        let after = self.index.partition_point(|p| (p.mechanism, p.extent.hva) < (mechanism, hva.end));
        first..after.max(first)
    }

    /// Refuses a source that is unresolved guest memory: reading it would wait for the very service that reads it.
    pub fn check_not_unresolved(&self, src: *const u8, len: u64) -> Result<()> {
        let src = src.addr() as u64;
        if self.mapped_here(src..src.saturating_add(len)).any(|(slot, pages)| slot.pages.first_open(pages).is_some()) {
            let text = "src is guest memory that is not present itself: reading it would wait for this service";
            return Err(Error::new(Errno::DEADLK, text));
        }
        Ok(())
    }

    /// The pages that `hva` touches of all slots that this process has mapped.
    pub fn mapped_here(&self, hva: Range<u64>) -> impl Iterator<Item = (&Arc<Slot>, Range<u64>)> {
        let mut next = 0;
        let mechanisms = std::iter::from_fn(move || {
            let mechanism = self.index.get(next)?.mechanism;
            next = self.index.partition_point(|placed| placed.mechanism <= mechanism);
            Some(mechanism)
        });
        let overlapping = mechanisms.flat_map(move |mechanism| self.within_hva(mechanism, hva.clone()));
        let here = overlapping.filter(|(slot, _)| !slot.facts().remote);
        here.map(|(slot, bytes)| (slot, slot.pages_of(&bytes)))
    }

    /// Adds a slot, unless it overlaps another in guest physical or host virtual addresses.
    pub fn add(&mut self, slot: Arc<Slot>) -> Result<()> {
        self.check_free(&slot)?;
        refusable(|| self.slots.try_reserve(1)).map_err(NoMemory::from)?;
        self.place(&slot)?;
        let at = self.slots.partition_point(|s| s.gpa < slot.gpa);
        self.slots.insert(at, slot);
        Ok(())
    }

    /// Puts a slot in the index.
    fn place(&mut self, slot: &Arc<Slot>) -> Result<()> {
        let (mechanism, extents) = (slot.mechanism.id(), slot.extents()?);
        refusable(|| self.index.try_reserve(extents.len())).map_err(NoMemory::from)?;
        for extent in extents {
            self.put(Placed { mechanism, extent, slot: slot.clone() });
        }
        Ok(())
    }

    fn put(&mut self, placed: Placed) {
        let key = |p: &Placed| (p.mechanism, p.extent.hva);
        let at = self.index.partition_point(|p| key(p) < key(&placed));
        self.index.insert(at, placed);
    }

    fn moved(&mut self, mechanism: u32, hva: &Range<u64>, to: Option<u64>) -> Result<()> {
        let places = self.placed_in(mechanism, hva);
        // A place may become three.
        refusable(|| self.index.try_reserve(2 * places.len())).map_err(NoMemory::from)?;
        let mut were = Vec::new();
        refusable(|| were.try_reserve_exact(places.len())).map_err(NoMemory::from)?;
        for placed in &self.index[places.clone()] {
            placed.slot.reserve_extents(2)?;
        }
        were.extend(self.index.drain(places));
        for placed in were {
            placed.slot.moved(hva, to);
            for extent in placed.extent.moved(hva, to) {
                self.put(Placed { extent, ..placed.clone() });
            }
        }
        Ok(())
    }

    /// Refuses a slot that overlaps another.
    pub fn check_free(&self, slot: &Slot) -> Result<()> {
        let (gpa, end) = (slot.gpa, slot.gpa + slot.len);
        if let Some((other, _)) = self.within_gpa(gpa..end).next() {
            let text = words!("gpa {gpa:#x}..{end:#x} overlaps the memory slot at {:#x}", other.gpa);
            return Err(Error::new(Errno::EXIST, text));
        }
        for extent in slot.extents()? {
            let mut taken = self.within_hva(slot.mechanism.id(), extent.hva..extent.hva + extent.len);
            if let Some((other, _)) = taken.next() {
                let text = words!("the host mapping overlaps that of the memory slot at gpa {:#x}", other.gpa);
                return Err(Error::new(Errno::EXIST, text));
            }
        }
        Ok(())
    }

    /// Adds a forked child's view.
    pub fn add_fork(&mut self, slot: Arc<Slot>) -> Result<()> {
        refusable(|| self.forks.try_reserve(1)).map_err(NoMemory::from)?;
        self.place(&slot)?;
        self.forks.push(slot);
        Ok(())
    }

    /// Takes a slot and the views of it out.
    pub fn remove(&mut self, slot: &Arc<Slot>) {
        let at = self.slots.partition_point(|other| other.gpa < slot.gpa);
        if self.slots.get(at).is_some_and(|other| Arc::ptr_eq(other, slot)) {
            self.slots.remove(at);
        }
        let mechanism = slot.mechanism.id();
        slot.each_extent(|extent| {
            let mut places = self.placed_in(mechanism, &(extent.hva..extent.hva + extent.len));
            if let Some(at) = places.find(|at| Arc::ptr_eq(&self.index[*at].slot, slot)) {
                self.index.remove(at);
            }
        });
        let is_view = |other: &Arc<Slot>| other.parent.as_ref().is_some_and(|parent| Arc::ptr_eq(parent, slot));
        if self.forks.iter().any(is_view) {
            self.forks.retain(|other| !is_view(other));
            self.index.retain(|placed| !is_view(&placed.slot));
        }
    }

    /// Takes out the views of a child that is gone.
    pub fn remove_forks(&mut self, mechanism: u32) {
        self.forks.retain(|fork| fork.mechanism.id() != mechanism);
        self.index.retain(|placed| placed.mechanism != mechanism);
    }
}
