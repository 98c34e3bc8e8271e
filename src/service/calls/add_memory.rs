//! `kuf_add_memory`: makes a slot, arms it and puts it on the map.

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::has_room;
use crate::error::{words, Error, Result, Words};
use crate::mapping::shared::SharedFile;
use crate::mapping::{self, Extent, Region};
use crate::mechanism::userfaultfd::Userfaultfd;
use crate::mechanism::Mechanism;
use crate::memory::{huge, Parts, Slot};
use crate::os::descriptor::{borrow, duplicate, is_userfaultfd, same_file};
use crate::pages::State;
use crate::service::calls::new_memory::{self, move_works, Checked};
use crate::service::calls::{discard, end_slot, existing, kvm, take_out};
use crate::service::config::NewMemory;
use crate::service::fault::{complete, exits};
use crate::service::inside::refuse_inside_callbacks;
use crate::service::queues::{events, quiet, watch};
use crate::service::{Service, Work};
use crate::source;
use crate::sync::Arc;

/// `kuf_add_memory`.
pub fn add_memory(service: &Service, new: NewMemory) -> Result<()> {
    refuse_inside_callbacks("kuf_add_memory")?;
    service.check_open()?;
    has_room()?;
    check_source(service, &new)?;
    let marks = service.own.as_ref().is_some_and(|own| own.facts().gates_kvm_only);
    let checked = new_memory::check(&new, marks)?;
    service.reserve_buffers(checked.granule)?;
    let slot = begin(service, &new, checked)?;
    let mechanism = &slot.mechanism;
    // Pages that are mapped already would never fault, so they are unmapped. This process cannot unmap another process's
    // pages.
    let emptied = exits::begin(&slot).and_then(|()| match new.fill_all && !new.remote {
        true => discard::empty(service, &slot),
        false => Ok(()),
    });
    withdraw_at_the_end(service, &slot)?;
    if let Err(error) = emptied {
        // The memory is the caller's as it was before the call.
        take_back(service, &slot, false);
        take_out::give_up_unused(service, mechanism);
        return Err(error);
    }
    events::unpark(service, mechanism.id(), false);
    if mechanism.facts().adopted {
        // An earlier reader of this userfaultfd may have taken faults with it: threads that wait ask again.
        slot.binding.wake(&(0..slot.pages.total()));
    }
    service.config.callbacks.log(KUF_LOG_INFO, || describe(&slot));
    if slot.settle(|claims| claims.becomes_whole(&slot.pages)) {
        complete::completion(service, &slot).into_iter().for_each(|notice| service.push(Work::Notice(notice)));
    }
    Ok(())
}

/// Makes the slot, and has touches of it caught. On failure nothing has changed.
fn begin(service: &Service, new: &NewMemory, checked: Checked) -> Result<Arc<Slot>> {
    let Checked { granule, private, writable, file } = checked;
    let marks = service.own.as_ref().is_some_and(|own| own.facts().gates_kvm_only);
    let kvm = kvm::for_kvm(service, new)?;
    let source = new.source.as_ref().map(|source| source::open(source, new.len)).transpose()?;
    let adopting = new.uffd.map(|_| service.queues.lock_adopting());
    let (mechanism, fresh) = mechanism_for(service, new)?;
    let huge = new.huge && huge::possible(granule, private) && mechanism.facts().can_move && move_works();
    let base_pages = granule == rustix::param::page_size() as u64;
    let detects_zero = service.config.detect_zero && (base_pages || !private || marks);
    let region = Region::new(mapping::Parts {
        gpa: new.gpa,
        len: new.len,
        granule,
        private,
        writable,
        // Marks keep the guest off the slot's own mapping, which is then the way in.
        shared: file.clone().filter(|_| !marks),
        extents: vec![Extent { offset: 0, len: new.len, hva: new.hva }],
    });
    let made = Slot::new(Parts {
        region,
        opaque: new.opaque,
        mechanism: mechanism.clone(),
        source,
        parent: None,
        kvm,
        huge,
        populated: new.populated,
        fills_all: new.fill_all,
        detects_zero,
        keep: new.keep.clone(),
    });
    let added = made.and_then(|slot| put_on_map(service, new, Arc::new(slot), file.as_deref()));
    if added.is_err() && fresh {
        take_out::give_up(service, &mechanism);
    }
    drop(adopting);
    added
}

/// Describes a slot, for the log.
fn describe(slot: &Slot) -> Words {
    let how = match (slot.in_place(), slot.huge.wanted) {
        (true, _) => "filled in place",
        (false, true) => "filled by copy, or by moving huge pages",
        (false, false) => "filled by copy",
    };
    words!("memory slot {:#x}..{:#x}, page size {:#x}, {how}", slot.gpa, slot.gpa + slot.len, slot.granule)
}

/// Puts `slot` on the map and arms it. `file`: the file behind the slot, if there is one to fill.
fn put_on_map(service: &Service, new: &NewMemory, slot: Arc<Slot>, file: Option<&SharedFile>) -> Result<Arc<Slot>> {
    if service.memory.map().check_free(&slot).is_err() {
        // The other slot may have been unmapped or moved, and its event be read but not yet applied.
        drop(slot.mechanism.gate().read());
        service.memory.map().check_free(&slot)?;
    }
    for range in existing::in_file(new, slot.granule, file)? {
        let pages = slot.pages_inside(&range);
        slot.pages.reserve_ends(&pages)?;
        slot.pages.transition(pages, State::Absent, State::Present);
    }
    existing::look_before(new, &slot)?;
    let mechanism = &slot.mechanism;
    let mut given_back = Vec::new();
    {
        // Hold the gate: no event of this address range is half applied, and no page is installed before the range is
        // registered.
        let _gate = quiet::gate_to_add(service, mechanism, &(new.hva..new.hva + new.len))?;
        // Add the slot before arming it, for the first fault may come before `arm` returns. The map is locked, so that
        // no other thread finds a slot that is then refused, and whose addresses another slot may get.
        service.memory.update(|map| {
            map.add(slot.clone())?;
            let attached = slot.binding.arm(&slot.pages).and_then(|()| {
                existing::look_after(new, &slot).inspect_err(|_| {
                    if !mechanism.facts().adopted {
                        slot.detach(false);
                    }
                })
            });
            attached.inspect_err(|_| map.remove(&slot))
        })?;
        if mechanism.facts().adopted {
            events::apply_given_back(service, &slot, &mut given_back);
        }
    }
    given_back.into_iter().for_each(|work| service.push(work));
    Ok(slot)
}

/// Ends `slot`, which was just added, if the handle is being closed. A kuf_close that does not wait for calls may have
/// gone through the map before, and then only this call can keep the slot's absent pages from reading as zeroes. If it
/// has not, it finds the slot on the map: the map's lock makes one of the two see the other.
fn withdraw_at_the_end(service: &Service, slot: &Arc<Slot>) -> Result<()> {
    match service.check_open() {
        Err(ended) if ended.errno() == Errno::CANCELED => {
            if !slot.facts().adopted {
                end_slot::poison_rest(service, slot);
            }
            take_back(service, slot, true);
            Err(ended)
        }
        _ => Ok(()),
    }
}

/// Removes a slot that was just added, unless another thread has removed it already. Under the caller's own userfaultfd
/// the memory stays registered, and faults that were read here are raised again there.
fn take_back(service: &Service, slot: &Arc<Slot>, in_use: bool) {
    let adopted = slot.facts().adopted;
    let taken = take_out::take_out(service, slot, &[], |slot| match adopted {
        true => slot.binding.wake(&(0..slot.pages.total())),
        false => take_out::detach(slot, in_use),
    });
    if taken.is_ok() {
        slot.wake_sleepers(&slot.claims());
        exits::end(slot);
    }
}

/// Checks that the slot has a source or a callback.
fn check_source(service: &Service, new: &NewMemory) -> Result<()> {
    let text = match (&new.source, service.serviced(), &service.config.callbacks.fill) {
        (Some(_), false, _) => "memory->source: the handle has neither a fill callback nor KUF_OPEN_SOURCES",
        (None, true, None) => "memory->source is NULL: with KUF_OPEN_SOURCES and no fill callback each slot needs one",
        _ => return Ok(()),
    };
    Err(Error::new(Errno::INVAL, text))
}

/// The mechanism of a new slot, and whether this call made it.
fn mechanism_for(service: &Service, new: &NewMemory) -> Result<(Arc<dyn Mechanism>, bool)> {
    let Some(fd) = new.uffd else {
        let own = service
            .own
            .clone()
            .ok_or_else(|| Error::new(Errno::INVAL, "opened with KUF_OPEN_ADOPT_ONLY: each slot needs memory->uffd"))?;
        return Ok((own, false));
    };
    let host_fd = borrow(fd, "uffd")?;
    let known = service.queues.list().iter().find_map(|queue| {
        let brought_as = queue.host_fd?;
        let same = same_file(queue.mechanism.fd(queue.number)?, host_fd).unwrap_or(brought_as == fd);
        same.then(|| queue.mechanism.clone())
    });
    if let Some(known) = known {
        return Ok((known, false));
    }
    if !is_userfaultfd(fd) {
        return Err(Error::new(Errno::BADFD, words!("uffd {fd} is not a userfaultfd")));
    }
    let own = duplicate(host_fd, "uffd")?;
    let mechanism: Arc<dyn Mechanism> = Arc::new(Userfaultfd::adopt(own, new.remote)?);
    watch::add_mechanism(service, mechanism.clone(), Some((fd, new.remote)))?;
    Ok((mechanism, true))
}
